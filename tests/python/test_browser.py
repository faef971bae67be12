"""The demo in real browsers: headless Chromium and Firefox, each through its own driver."""

import signal
import subprocess
import sys
import time

import pytest
import requests
from conftest import TARGET, TESTS, Demo, Process, free_port, subscribe, until
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SCREENSHOTS = TARGET / "screenshots"


class Page:
    """The demo's page in one tab."""

    def __init__(self, driver, url):
        self.driver, self.handle = driver, driver.current_window_handle
        driver.get(url)

    def here(self):
        self.driver.switch_to.window(self.handle)
        return self

    def state(self):
        return self.here().driver.execute_script(
            "return document.getElementById('status').dataset.state"
        )

    def shows(self, state):
        """Waits until the page says that its connection is in this state. Its pause before the
        next attempt may have doubled a few times."""
        until(lambda: self.state() == state, f"the page's state is {state}", within=60)
        return self

    def items(self):
        return self.here().driver.execute_script(
            "return [...document.querySelectorAll('#list li span')].map((row) => row.textContent)"
        )

    def lists(self, *items):
        until(lambda: self.items() == list(items), f"the page lists {items}, not {self.items()}")
        return self

    def notice(self):
        return self.here().driver.execute_script(
            "const notice = document.getElementById('notice');"
            "return notice.hidden ? null : notice.textContent"
        )

    def add(self, text):
        self.here().driver.find_element(By.ID, "text").send_keys(text, Keys.ENTER)

    def click(self, selector):
        self.here().driver.find_element(By.CSS_SELECTOR, selector).click()

    def picture(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        browser = self.here().driver.capabilities["browserName"]
        self.driver.save_screenshot(str(SCREENSHOTS / f"{browser}-{name}.png"))


def second_tab(driver, url):
    driver.switch_to.new_window("tab")
    return Page(driver, url)


# The promise of the whole thing.
def test_two_tabs_update_each_other(serve, demo, browser):
    server = serve()
    app = demo(server)
    first = Page(browser, app.url).shows("live")
    second = second_tab(browser, app.url).shows("live")
    assert server.publish("list", "unheard", "") == 1  # one stream does for both
    first.picture("empty")
    first.add("Coffee")
    second.lists("Coffee")
    second.add("Oat milk")
    first.lists("Oat milk", "Coffee").picture("two-items")
    first.click("li:last-child button")
    second.lists("Oat milk")
    # "Clear all" is an event with a name and no data.
    # It asks first, and only who insists is obeyed.
    second.click("#clear")
    second.picture("clear-all")
    second.click("#keep")
    second.click("#clear")
    second.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    second.lists("Oat milk")
    second.click("#clear")
    second.click("#remove")
    first.lists()


# A browser drops an event without a `data:` line; one with an empty one has to arrive.
def test_a_named_event_with_empty_data_arrives(serve, demo, browser):
    server = serve()
    page = Page(browser, demo(server).url).shows("live")
    page.driver.execute_script(
        """
        window.heard = [];
        const source = new EventSource("events");
        source.onopen = () => (window.opened = true);
        source.addEventListener("nudge", (event) => window.heard.push(event.type, event.data));
        """
    )
    until(lambda: page.driver.execute_script("return window.opened"), "the second stream opens")
    assert server.publish("list", "nudge", "") == 2
    until(lambda: page.driver.execute_script("return window.heard.length"), "the event arrives")
    assert page.driver.execute_script("return window.heard") == ["nudge", ""]


# Without a name an event is a `message`; nothing that people write may be lost on the way.
@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Zwölf Boxkämpfer 🥊, 日本語, עברית, \u2028 too",
        "first line\n\n  third: indented\n: no comment\ndata: no field",
        " a leading space",
        "<img src=x onerror=document.body.remove()>",
    ],
    ids=["plain", "unicode", "lines", "space", "markup"],
)
def test_default_messages_arrive_unchanged(serve, demo, browser, text):
    server = serve()
    page = Page(browser, demo(server).url).shows("live")
    assert server.publish("list", "", text) == 1
    until(page.notice, "the notice is shown")
    assert page.notice() == text
    page.picture("notice")


# Somebody else's text is text.
def test_markup_in_an_item_stays_text(serve, demo, browser):
    app = demo(serve())
    page = Page(browser, app.url).shows("live")
    evil = "<script>document.title='owned'</script><b>&amp;"
    app.add(evil)
    page.lists(evil)
    assert page.driver.title == "Shared list"


# The page's origin is the backend's, the stream comes from another one: CORS decides.
def test_a_stream_from_another_origin_needs_its_permission(serve, demo, browser):
    port = free_port()
    server = serve(allow_origin=f"http://127.0.0.1:{port}")
    allowed = demo(server, DEMO_PORT=str(port))
    refused = demo(server)
    assert server.url != allowed.url
    Page(browser, allowed.url).shows("live")
    Page(browser, refused.url).shows("offline")


# A deployment, a crash, a power cut: nobody reloads the page, and nobody shows an old list. The
# token of the first connection is too old by then; the redirect hands out a new one.
@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_page_heals_itself_when_the_server_restarts(serve, demo, browser, end):
    server = serve(retry=300, token_ttl=1)
    app = demo(server)
    page = Page(browser, app.url).shows("live")
    app.add("before")
    page.lists("before")
    time.sleep(2.1)  # now the token is older than its lifetime
    server.kill() if end == "killed" else server.stop()
    # Firefox goes from the one to the other as soon as its own attempt has failed.
    until(lambda: page.state() in ("lost", "offline"), "the page sees that it is gone")
    if end == "killed":
        page.picture("lost")
    app.add("meanwhile")  # saved, though nobody could be told
    server.again()
    page.shows("live").lists("meanwhile", "before")
    app.add("after")
    page.lists("after", "meanwhile", "before")


# A backend can check again who asks only if it is asked again. The token of the first connection
# would still do, and Chromium, left alone, would go on with it.
def test_every_reconnect_goes_through_the_backend(serve, demo, browser):
    server = serve(retry=300)
    app = demo(server)
    page = Page(browser, app.url).shows("live")
    assert sum("GET /events " in line for line in app.lines) == 1
    server.kill()
    server.again()
    until(lambda: sum("GET /events " in line for line in app.lines) >= 2, "the backend is asked")
    page.shows("live")
    app.add("with a new token")
    page.lists("with a new token")


# What makes the healing above mean something: the first token would have been refused.
def test_an_old_token_is_refused(serve):
    server = serve(token_ttl=1)
    old = server.token("list", timestamp=int(time.time()) - 3)
    assert requests.get(f"{server.url}/events?token={old}", timeout=5).status_code == 401


# A full server ends the connection unanswered. The page tries again, and fetches its state
# meanwhile.
def test_a_page_turned_away_comes_back_by_itself(serve, demo, browser):
    server = serve(max_subscribers=1, heartbeat=1)
    app = demo(server)
    other = subscribe(f"{server.url}/events?token={server.token('list')}")
    page = Page(browser, app.url).shows("offline")
    page.picture("offline")
    app.add("seen by both")
    assert other.event()[0] == "added"
    page.lists("seen by both")
    other.close()
    page.shows("live")
    app.add("live again")
    page.lists("live again", "seen by both")


# A browser gives up for good on an answer such as 503. Nobody wrote a script here that would know
# better: what is left unanswered is tried again by the browser itself.
def test_a_plain_event_source_that_was_turned_away_opens_when_there_is_room(serve, browser):
    server = serve(max_subscribers=1, retry=200)
    url = f"{server.url}/events?token={server.token('a')}"
    browser.get(f"{server.url}/ping")
    browser.execute_script(
        """
        window.errors = 0;
        window.first = new EventSource(arguments[0]);
        window.first.onopen = () => {
            window.second = new EventSource(arguments[0]);
            window.second.onerror = () => window.errors++;
        };
        """,
        url,
    )
    until(lambda: browser.execute_script("return window.errors"), "the second is turned away")
    browser.execute_script("window.first.close()")
    opens = "return window.second.readyState === EventSource.OPEN"
    until(lambda: browser.execute_script(opens), "the second opens by itself", within=60)
    assert server.publish("a", "", "x") == 1


# Backend and server disagree on the secret (a rotation gone wrong), which is a 401.
def test_a_page_refused_with_401_comes_back_by_itself(serve, demo, browser):
    server = serve(retry=300)
    app = demo(server)
    page = Page(browser, app.url).shows("live")
    server.kill()
    wrong = server.again(secret="00" * 32)
    page.shows("offline")
    wrong.kill()
    server.again()
    page.shows("live")
    app.add("all is well")
    page.lists("all is well")


# The backend forgets its list when it restarts; open pages must not go on showing it.
def test_a_page_notices_that_the_backend_restarted(serve, demo, start, browser):
    server = serve(retry=300)
    port = free_port()
    app = demo(server, DEMO_PORT=str(port))
    page = Page(browser, app.url).shows("live")
    app.add("forgotten")
    page.lists("forgotten")
    app.kill()
    app = start(Demo, server, DEMO_PORT=str(port))
    app.add("new")
    page.lists("new")


# The command behind `make demo`: both start, the page works, and neither is left behind.
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_the_demo_starts_and_ends_as_a_whole(start, monkeypatch, end):
    from conftest import BINARY

    monkeypatch.setenv("SSE_SERVER_BIN", str(BINARY))
    monkeypatch.setenv("SSE_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("DEMO_PORT", "0")
    monkeypatch.delenv("SSE_SECRET", raising=False)
    demo = start(Process, [sys.executable, TESTS / "demo" / "run.py"])
    push = demo.find(r"listening on ([\d.:]+)")[1]
    url = demo.find(r"Open (http://\S+)")[1]
    assert requests.get(f"{url}items", timeout=5).json()["items"] == []
    hint = demo.find(r"(SSE_SECRET=.*)")[1]
    with requests.get(f"{url}events", timeout=5, stream=True) as stream:
        assert stream.status_code == 200
        assert stream.url.startswith(f"http://{push}/")
        said = subprocess.run(hint, shell=True, capture_output=True, text=True, timeout=10)
        assert '"deliveries":1' in said.stdout.replace(" ", ""), said
    demo.child.send_signal(end)
    assert demo.child.wait(10) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://{push}/ping", timeout=5)
