"""The two pages that people see, on a phone and on a desk, in light and dark: their contrast, their
names and roles (axe-core), their sizes, and what the keyboard can do."""


import pytest
import requests
from conftest import DEADLINE, TARGET, until
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from test_embedded import JobRunner

SCREENSHOTS = TARGET / "screenshots"


@pytest.fixture(scope="session")
def axe(node_folder):
    return (node_folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


class Look:
    """Chromium's window in a size and a scheme, and what is seen in it."""

    def __init__(self, driver, axe, width, scheme):
        self.driver, self.axe, self.name = driver, axe, f"{width}-{scheme}"
        size = {"width": width, "height": 760, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # no colour half-way
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def reset(self):
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def shows(self, what):
        until(lambda: self.run(f"return {what}"), what, within=60)

    def good(self, name):
        """Takes a picture, and judges what is in it."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}-{self.name}.png"))
        self.run(self.axe)
        found = self.driver.execute_async_script(
            """
            const [done] = arguments;
            const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
            axe.run({ runOnly: tags }).then(({ violations, passes }) => done({
                bad: violations.map(({ id, nodes }) => [id, nodes.map((it) =>
                    it.html + " " + it.failureSummary)]),
                contrast: passes.some(({ id }) => id === "color-contrast"),
            }));
            """
        )
        assert found["bad"] == [] and found["contrast"], (name, self.name, found)
        small = self.run(
            """
            const modal = document.querySelector("dialog:modal") ?? document;
            return [...modal.querySelectorAll("button, input")].map((it) => {
                const { width, height } = it.getBoundingClientRect();
                return [it.outerHTML, width, height];
            }).filter(([, width, height]) => width && (width < 44 || height < 44));
            """
        )
        assert small == [], (name, self.name)
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert self.run(wide) <= 0, "it scrolls to the side"
        wide = "const it = document.querySelector('header'); return it.scrollWidth - it.clientWidth"
        assert self.run(wide) <= 0, (name, self.name, "the status leaves the card")

    def press(self, *keys):
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focused(self):
        script = "const it = document.activeElement; return it.ariaLabel || it.id || it.textContent"
        return self.run(script)

    def ring(self):
        """Whether what has the focus shows it."""
        style = "const it = getComputedStyle(document.activeElement)"
        return self.run(f"{style}; return it.outlineStyle !== 'none' && it.outlineWidth !== '0px'")


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")],
                ids=lambda it: f"{it[0]}-{it[1]}")
def look(chrome, axe, request):
    look = Look(chrome, axe, *request.param)
    yield look
    look.reset()


state = "document.getElementById('status').dataset.state === '{}'".format
top = "return document.getElementById('add').getBoundingClientRect().top"


# Every state that the list can be in, and nothing jumps from one to the other.
def test_the_list_can_be_seen_and_used(serve, demo, look):
    server = serve(retry=300)
    app = demo(server)
    look.driver.get(app.url)
    look.shows(state("live"))
    look.good("list-empty")
    form = look.run(top)
    for text in ("Coffee", "Oat milk", "A much longer thing that does not fit into the line of a phone"):
        app.add(text)
    look.shows("document.querySelectorAll('#list li').length === 3")
    look.good("list-items")
    assert server.publish("list", "", "Lunch is here!") == 1
    look.shows("!document.getElementById('notice').hidden")
    look.good("list-notice")
    assert look.run(top) == form
    look.run("document.getElementById('notice').hidden = true")
    look.run("document.getElementById('clear').click()")
    look.good("list-clear")
    look.press(Keys.ESCAPE)
    look.shows("!document.getElementById('sure').open")
    server.kill()
    look.shows(state("lost"))
    assert look.run(top) == form
    look.good("list-lost")
    look.shows(state("offline"))
    assert look.run(top) == form
    assert look.run("return document.querySelector('header').getBoundingClientRect().height") < 50
    look.good("list-offline")


def test_the_jobs_can_be_seen_and_used(start, look):
    tool = start(JobRunner, 0)
    look.driver.get(tool.url)
    look.shows(state("live"))
    look.shows("document.getElementById('start').ariaDisabled === 'false'")
    look.good("jobs-start")
    # With the keyboard; and who pressed keeps the focus while the jobs run.
    look.press(Keys.TAB)
    assert look.focused() == "start" and look.ring()
    look.press(Keys.ENTER)
    look.shows("document.querySelector('progress').value > 10")
    assert look.focused() == "start"
    look.good("jobs-running")
    look.shows("document.querySelectorAll('.done').length === 3")
    assert look.run("return document.getElementById('summary').textContent") == "All jobs are done."
    look.good("jobs-done")
    look.press(Keys.ENTER)
    look.shows("document.querySelectorAll('.done').length === 0")
    tool.kill()
    look.shows("document.getElementById('status').dataset.state !== 'live'")
    look.good("jobs-lost")


# Nothing needs a mouse, and the focus is never lost.
def test_the_list_can_be_used_with_the_keyboard(serve, demo, chrome, axe):
    app = demo(serve())
    look = Look(chrome, axe, 1280, "light")
    chrome.get(app.url)
    look.shows(state("live"))
    assert look.focused() == "New item"
    for number, text in enumerate(("Tea", "Milk", "Bread")):
        look.press(text, Keys.ENTER)
        look.shows(f"document.querySelectorAll('#list li').length === {number + 1}")
        look.shows("document.getElementById('text').value === ''")
    # Through every button, in the order of the page, each with a ring around it.
    expected = ["Add", "Remove Bread", "Remove Milk", "Remove Tea", "clear"]
    for name in expected:
        look.press(Keys.TAB)
        assert look.focused() == name and look.ring()
    look.press(Keys.ENTER)
    assert look.focused() == "keep" and look.ring()
    look.press(Keys.ENTER)
    look.shows("!document.getElementById('sure').open")
    assert look.focused() == "clear"
    # Who removes one goes on with the next.
    ActionChains(chrome).key_down(Keys.SHIFT).send_keys(Keys.TAB).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert look.focused() == "Remove Milk"
    look.press(Keys.ENTER)
    look.shows("document.querySelectorAll('#list li').length === 2")
    assert look.focused() == "Remove Tea"
    look.press(Keys.TAB, Keys.ENTER, Keys.TAB)
    assert look.focused() == "remove" and look.ring()
    look.press(Keys.ENTER)
    look.shows("document.querySelectorAll('#list li').length === 0")
    assert look.focused() == "New item"
    assert requests.get(f"{app.url}/items", timeout=DEADLINE).json()["items"] == []
    look.reset()
