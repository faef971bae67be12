"""tests/client/live.js in real browsers: one stream for all tabs, whatever happens to a tab."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import DEADLINE, PLAIN_HOST, TESTS, free_port, until
from selenium.common.exceptions import WebDriverException

PAGE = b"""<!doctype html><title>live</title><script type="module">
import { live } from "./live.js";
// Timers of a page that nobody sees are rare; of this one there are none.
if (location.pathname === "/timeless") window.setInterval = window.setTimeout = () => 1;
window.ask = () => window.dispatchEvent(new Event("visibilitychange"));
const more = new URLSearchParams(location.search).getAll("on");
const heard = (window.heard = []), states = (window.states = []);
window.opened = 0;
live("/events", {
  open: () => window.opened++,
  status: (state) => states.push(state),
  resume: location.pathname === "/resuming",
  on: Object.fromEntries(["news", "error", "open", "stream-reset", ...more].map((name) =>
    [name, (event) => heard.push(`${event.type} ${event.data}`)])),
});
window.ready = true;
</script>"""


class Backend:
    """The page, its script, and the redirect to a stream of the topic `a`."""

    def __init__(self, server, host="127.0.0.1"):
        backend = self
        self.asked = []  # the queries of the requests for a stream
        self.first = []  # what is answered in place of the redirect, and then ends
        self.holds, self.release = threading.Event(), threading.Event()  # of a slow answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                if path == "/events" and backend.first:
                    backend.asked.append(query)
                    self.answer(200, backend.first.pop(), Content_Type="text/event-stream")
                elif path == "/framed":
                    frame = b"<!doctype html><iframe sandbox='allow-scripts' src='/'></iframe>"
                    self.answer(200, frame, Content_Type="text/html")
                elif path == "/events":
                    backend.asked.append(query)
                    token = server.token("a")
                    self.answer(307, Location=f"{server.url}/events?token={token}&{query}")
                elif path == "/live.js":
                    script = (TESTS / "client" / "live.js").read_bytes()
                    self.answer(200, script, Content_Type="text/javascript")
                elif path == "/held":
                    backend.holds.set()
                    backend.release.wait(DEADLINE)
                    self.answer(204)
                elif path == "/nothing":
                    self.answer(204)
                elif path == "/download":
                    self.answer(200, b"x", Content_Disposition="attachment")
                else:
                    self.answer(200, PAGE, Content_Type="text/html")

            def answer(self, status, body=b"", **fields):
                self.send_response(status)
                for name, value in fields.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Cache-Control", "no-store")
                self.send_header("Access-Control-Allow-Origin", "*")  # for the frame, that has none
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://{host}:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def backend():
    """backend(server) serves the page; it ends with the test."""
    started = []

    def backend(*args, **kwargs):
        started.append(Backend(*args, **kwargs))
        return started[-1]

    yield backend
    for it in started:
        it.close()


class Live:
    """The push server, and what it says of its streams."""

    def __init__(self, serve):
        self.metrics = free_port()
        self.server = serve(metrics_listen=f"127.0.0.1:{self.metrics}", retry=300)

    def metric(self, name):
        page = requests.get(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5).text
        return int(re.search(rf"^{name} (\d+)$", page, re.M)[1])

    def streams(self):
        return self.metric("sse_subscribers")


@pytest.fixture
def push(serve):
    return Live(serve)


class Tab:
    def __init__(self, driver, url, new=True):
        if new:
            driver.switch_to.new_window("tab")
        self.driver, self.handle = driver, driver.current_window_handle
        driver.get(url)

    def get(self, expression):
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(f"return {expression}")

    def run(self, script):
        self.driver.switch_to.window(self.handle)
        self.driver.execute_script(script)

    def live(self):
        state = "window.ready && window.states.at(-1) === 'live' && window.opened"
        until(lambda: self.get(state), "the tab is live", within=60)
        return self

    def hears(self, *events):
        until(lambda: self.get("window.heard.length") >= len(events), f"the tab hears {events}")
        assert self.get("window.heard") == list(events)

    def leads(self):
        """Whether this tab holds the lock, of all that share it."""
        script = (
            "const done = arguments[0];"
            "navigator.locks.query().then(({ held }) => done(held.map((lock) => lock.clientId)))"
        )
        self.driver.switch_to.window(self.handle)
        held = self.driver.execute_async_script(script)
        mine = (
            "const done = arguments[0];"
            "navigator.locks.request('whose ' + Math.random(), () => navigator.locks.query())"
            ".then(({ held }) => done(held.find((lock) => lock.name.startsWith('whose ')).clientId))"
        )
        return self.driver.execute_async_script(mine) in held

    def close(self):
        self.driver.switch_to.window(self.handle)
        self.driver.close()


def tabs(driver, url, count):
    """As many, all of them live. The first one, empty, stays as it is: it outlives the test."""
    opened = [Tab(driver, url) for _ in range(count)]
    return [tab.live() for tab in opened]


def tell(push, tabs, *texts):
    """Each is told once by the server, over one stream, and heard once in every tab."""
    for text in texts:
        assert push.server.publish("a", "news", text) == 1
    for tab in tabs:
        tab.hears(*[f"news {text}" for text in texts])


def leader(tabs):
    return next(tab for tab in tabs if tab.leads())


# What HTTP/1.1 would not allow, and the server would pay for ten times.
def test_ten_tabs_share_one_stream(push, backend, browser):
    ten = tabs(browser, backend(push.server).url, 10)
    assert push.streams() == 1 and push.metric("sse_streams_opened_total") == 1
    tell(push, ten, "one", "two", "three")
    # Each fetched its state when it came, and once only.
    assert [tab.get("window.opened") for tab in ten] == [1] * 10


# Who holds the stream goes: another one takes over, and every tab fetches its state.
def test_another_tab_takes_over_when_the_leading_one_is_closed(push, backend, browser):
    all_tabs = tabs(browser, backend(push.server).url, 4)
    gone = leader(all_tabs)
    gone.close()
    goes_on(push, [tab for tab in all_tabs if tab is not gone])


def goes_on(push, rest):
    for tab in rest:
        until(lambda: tab.get("window.opened") == 2, "the tab fetches its state again")
    until(lambda: push.streams() == 1, "one stream is left")
    tell(push, rest, "later")
    assert push.metric("sse_streams_opened_total") == 2
    assert sum(tab.leads() for tab in rest) == 1


# Its process ends, without a word to anybody. (Firefox has no address for that.)
def test_another_tab_takes_over_when_the_leading_one_crashes(push, backend, chrome):
    all_tabs = tabs(chrome, backend(push.server).url, 4)
    gone = leader(all_tabs)
    chrome.switch_to.window(gone.handle)
    with pytest.raises(WebDriverException, match="crash"):
        chrome.get("chrome://crash")
    gone.close()
    goes_on(push, [tab for tab in all_tabs if tab is not gone])


# A tab that was put to sleep, or is stuck, keeps its lock and answers nobody. A tab that is seen
# asks every few seconds, and when it is shown. (Firefox lets messages through to a page that waits.)
def test_a_tab_that_is_seen_takes_over_from_one_that_sleeps(push, backend, chrome):
    site = backend(push.server)
    asleep, awake = tabs(chrome, f"{site.url}/timeless", 2)
    assert asleep.leads()
    awake.run(
        """
        window.answers = 0;
        window.channel = new BroadcastChannel(`live ${location.origin}/events`);
        channel.onmessage = ({ data }) => (window.answers += data.kind === "welcome");
        """
    )
    # As long as it answers, it keeps the stream.
    for count in range(1, 8):
        awake.run("ask()")
        until(lambda: awake.get("window.answers") >= count, "the leading tab answers")
    assert asleep.leads() and push.metric("sse_streams_opened_total") == 1
    asleep.run(
        """
        new BroadcastChannel("sleep").onmessage = () => {
            const request = new XMLHttpRequest();
            request.open("GET", "/held", false); // nothing else happens in this tab meanwhile
            request.send();
        };
        """
    )
    awake.run("new BroadcastChannel('sleep').postMessage('')")
    assert site.holds.wait(DEADLINE)
    until(lambda: awake.get("(ask(), window.opened)") == 2, "the other one takes over")
    assert awake.leads()
    # It wakes, lets go of its stream, and hears of the other one's.
    site.release.set()
    until(lambda: push.streams() == 1, "one stream is left")
    assert push.server.publish("a", "news", "x") == 1
    awake.hears("news x")
    asleep.hears("news x")


# Web Locks are there for HTTPS and localhost alone.
def test_without_web_locks_each_tab_has_a_stream(push, backend, browser):
    two = tabs(browser, backend(push.server, PLAIN_HOST).url, 2)
    assert two[0].get("window.isSecureContext") is False
    assert push.streams() == 2
    assert push.server.publish("a", "news", "x") == 2
    for tab in two:
        tab.hears("news x")


# What has the name of the connection's own events is not one of them.
@pytest.mark.parametrize("name", ["error", "open"])
def test_an_event_may_be_named_as_those_of_the_connection(push, backend, browser, name):
    two = tabs(browser, backend(push.server).url, 2)
    for text in ("1", "2"):
        assert push.server.publish("a", name, text) == 1
    for tab in two:
        tab.hears(f"{name} 1", f"{name} 2")
        assert tab.get("window.opened") == 1 and tab.get("window.states") == ["live"]
    assert push.metric("sse_streams_opened_total") == 1


# Firefox ends the streams of a page that starts a download, and fires nothing.
@pytest.mark.parametrize("target", ["/download", "/nothing"])
def test_a_download_ends_no_stream_for_good(push, backend, browser, target):
    two = tabs(browser, backend(push.server).url, 2)
    led = leader(two)
    led.get(f"location.assign('{target}')")
    firefox = browser.capabilities["browserName"] == "firefox"
    if firefox:
        until(lambda: push.metric("sse_streams_opened_total") == 2, "a new stream", within=60)
        for tab in two:
            until(lambda: tab.get("window.opened") == 2, "the tab fetches its state again")
    tell(push, two, "still here")


# A deployment: the stream goes, nobody reloads, and every tab fetches what it missed.
def test_every_tab_is_live_again_when_the_server_is(push, backend, browser):
    three = tabs(browser, backend(push.server).url, 3)
    push.server.kill()
    for tab in three:
        until(lambda: tab.get("window.states").count("lost") == 1, "the tab says so")
    push.server.again()
    for tab in three:
        until(lambda: tab.get("window.opened") == 2, "the tab fetches its state", within=60)
        assert tab.get("window.states.at(-1)") == "live"
    assert push.streams() == 1
    tell(push, three, "back")


# A browser delays the timers of a tab that nobody sees, by a minute and more: one that is seen makes
# it look at the clock.
def test_a_tab_that_nobody_sees_comes_back_when_one_that_is_seen_asks(push, backend, browser):
    hidden, seen = tabs(browser, f"{backend(push.server).url}/timeless", 2)
    assert hidden.leads()
    push.server.kill()
    until(lambda: seen.get("window.states.at(-1)") == "lost", "the other tab is told")
    push.server.again()
    until(lambda: seen.get("(ask(), window.opened)") == 2, "a new stream")
    assert hidden.leads() and push.metric("sse_streams_opened_total") == 1
    tell(push, [hidden, seen], "back")


# Another network: what was open may be dead without anybody having said so.
def test_a_new_network_makes_a_new_stream(push, backend, browser):
    one, two = tabs(browser, backend(push.server).url, 2)
    one.run("window.dispatchEvent(new Event('online'))")
    two.run("window.dispatchEvent(new Event('online'))")  # it has no stream
    until(lambda: two.get("window.opened") == 2, "a new stream")
    until(lambda: push.streams() == 1, "the old one is gone")
    assert push.metric("sse_streams_opened_total") == 2
    tell(push, [one, two], "x")


# Pages of one site that listen for different events.
def test_each_tab_hears_the_names_that_it_alone_listens_for(push, backend, browser):
    url = backend(push.server).url
    plain, more = Tab(browser, url).live(), Tab(browser, f"{url}/?on=rare").live()
    third = Tab(browser, url).live()
    assert push.server.publish("a", "rare", "x") == 1
    more.hears("rare x")
    # Whoever takes over, knows of it.
    assert plain.leads()
    plain.close()
    until(lambda: third.get("window.opened") == 2, "another one takes over")
    until(lambda: push.streams() == 1, "one stream is left")
    assert push.server.publish("a", "rare", "y") == 1
    more.hears("rare x", "rare y")
    assert third.get("window.heard") == []


# Where events have ids, the server sends what was missed since the last one that any tab heard. The
# state is fetched again only where it says that it no longer holds that.
def test_where_events_have_ids_a_stream_goes_on_behind_the_last(push, backend, browser):
    site = backend(push.server)
    site.first = [b"id: 7-0\nevent: news\ndata: x\n\n"]
    tab = Tab(browser, f"{site.url}/resuming", new=False)
    tab.hears("news x")
    until(lambda: push.streams() == 1, "the stream goes on")
    until(lambda: tab.get("window.states.at(-1)") == "live", "the tab knows")
    assert site.asked == ["", "last_event_id=7-0"]
    assert tab.get("window.opened") == 1 and tab.get("window.states") == ["live", "lost", "live"]
    assert push.server.publish("a", "stream-reset", "") == 1
    tab.hears("news x", "stream-reset ")
    assert tab.get("window.opened") == 2


# A page that may not use locks, although its browser has them: an origin of its own in a frame.
def test_a_page_that_may_not_lock_has_a_stream_of_its_own(push, backend, browser):
    browser.get(f"{backend(push.server).url}/framed")
    browser.switch_to.frame(0)
    until(lambda: browser.execute_script("return window.opened"), "the frame is live")
    assert push.server.publish("a", "news", "x") == 1
    heard = "return window.heard"
    until(lambda: browser.execute_script(heard) == ["news x"], "the frame hears the event")
    assert push.metric("sse_streams_opened_total") == 1
    browser.switch_to.default_content()
