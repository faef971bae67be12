"""The example of embedding (tests/embedded) in real browsers, as its users see it."""

from conftest import BINARY, TARGET, Process, free_port, missing, until

SCREENSHOTS = TARGET / "screenshots"
EXAMPLE = BINARY.parent / "examples" / "job_runner"


class JobRunner(Process):
    def __init__(self, port):
        if not EXAMPLE.is_file():
            missing(f"no example at {EXAMPLE}: run `cargo build --examples`")
        super().__init__([EXAMPLE, f"127.0.0.1:{port}"])
        self.url = self.find(r"Open (http://\S+)")[1]


class Page:
    """What a person would see."""

    def __init__(self, driver, url):
        self.driver, self.handle = driver, driver.current_window_handle
        driver.get(url)

    def run(self, script):
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(script)

    def shows(self, status):
        text = "return document.getElementById('status').textContent"
        until(lambda: self.run(text) == status, f"the page shows {status}", within=60)
        return self

    def percents(self):
        bars = "return [...document.querySelectorAll('progress')].map((bar) => bar.value)"
        return self.run(bars)

    def start(self):
        enabled = "return document.getElementById('start').ariaDisabled === 'false'"
        until(lambda: self.run(enabled), "the button can be pressed")
        self.run("document.getElementById('start').click()")

    def watch(self):
        """Notes every value that a bar has from now on, however late this test looks."""
        self.run(
            """
            window.seen = new Set();
            const look = () => document.querySelectorAll("progress").forEach((bar) => {
                window.seen.add(bar.value);
            });
            const all = { subtree: true, childList: true, attributes: true };
            new MutationObserver(look).observe(document.body, all);
            """
        )

    def picture(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.run("")
        browser = self.driver.capabilities["browserName"]
        self.driver.save_screenshot(str(SCREENSHOTS / f"{browser}-{name}.png"))


def second_tab(driver, url):
    driver.switch_to.new_window("tab")
    return Page(driver, url)


# A button in one tab, bars that move in both, and nobody reloads.
def test_every_page_shows_the_jobs_until_they_are_done(start, browser):
    tool = start(JobRunner, 0)
    first = Page(browser, tool.url).shows("Live")
    second = second_tab(browser, tool.url).shows("Live")
    assert first.percents() == second.percents() == [0, 0, 0]
    first.watch()
    second.watch()
    second.start()
    until(lambda: any(first.percents()), "bars that move")
    first.picture("jobs-running")
    for page in (first, second):
        until(lambda: page.percents() == [100, 100, 100], "all jobs done")
        assert sorted(page.run("return [...window.seen]")) == list(range(101))
    # Who comes later, sees where things are.
    third = second_tab(browser, tool.url).shows("Live")
    assert third.percents() == [100, 100, 100]
    third.picture("jobs-done")


# A new release of the tool: another secret, another port of the push server, and counted from the
# beginning. The open page finds its way, and does not go on showing what was.
def test_a_page_heals_itself_when_the_tool_restarts(start, browser):
    port = free_port()
    tool = start(JobRunner, port)
    page = Page(browser, tool.url).shows("Live")
    page.start()
    until(lambda: min(page.percents()) > 0, "bars that move")
    tool.kill()
    until(lambda: page.run("return !document.querySelector('[data-state=live]')"), "the page sees that")
    page.picture("jobs-lost")
    start(JobRunner, port)
    page.shows("Live")
    assert page.percents() == [0, 0, 0]
    page.start()
    until(lambda: min(page.percents()) > 0, "bars that move again")
