"""Streams and origins, as browsers see them: which page may read a stream that comes from elsewhere,
and how a plain EventSource renews the token of its stream."""

import time

import pytest
import requests
from conftest import DEADLINE, free_port, until

# A busy machine takes a while.
pytestmark = pytest.mark.timeout(600)

# One stream with credentials and one without; what each of them comes to.
PAGE = """<!doctype html><title>page</title><script>
window.streams = {};
function listen(url, name, options) {
    const noted = (window.streams[name] = { states: [], heard: [] });
    const source = (noted.source = new EventSource(url, options));
    source.onopen = source.onerror = () => noted.states.push(source.readyState);
    source.addEventListener("tick", (event) => noted.heard.push(event.data));
}
function listenTwice(url) {
    listen(url, "plain", {});
    listen(url, "with credentials", { withCredentials: true });
}
%s
</script>"""
NOTES = """
const told = {};
for (const [name, { source, states, heard }] of Object.entries(window.streams))
    told[name] = { state: source.readyState, states, heard };
return told;
"""



# Where page, backend and push server are, and how the page comes to its stream.
ARRANGEMENTS = {
    # The page's own backend redirects.
    "redirected by the page's backend": "listenTwice('{page}/events')",
    # A backend of another origin redirects to a third.
    "redirected by another origin": "listenTwice('{backend}/events')",
    # It hands out the address of the stream instead.
    "address fetched from another origin": (
        "fetch('{backend}/address').then((answer) => answer.text()).then(listenTwice)"
    ),
    # No other origin at all: a proxy shows the push server under the application's host.
    "under the application's host": "listenTwice('/push/events?token={token}')",
    "redirected under the application's host": "listenTwice('/events')",
}
OPEN, DEAD = 1, 2
# Behind a redirect from one foreign origin to another a browser says `Origin: null`, as the
# standard has it, whoever the page is.
TABLE = {
    # setting: whether the page's streams open, in the order of the arrangements above
    "*": [OPEN, OPEN, OPEN, OPEN, OPEN],
    "{page}": [OPEN, DEAD, OPEN, OPEN, OPEN],
    "{page},null": [OPEN, OPEN, OPEN, OPEN, OPEN],
    "null": [DEAD, OPEN, DEAD, OPEN, OPEN],
    "https://elsewhere.example": [DEAD, DEAD, DEAD, OPEN, OPEN],
}

# The application's host, as nginx shows it: the push server under a path, all else the application.
HOST = """
server {
    listen 127.0.0.1:%d;
    location /push/ {
        proxy_pass http://127.0.0.1:%d/;
        # As in tests/nginx/sse-server.conf.
        proxy_intercept_errors on;
        error_page 502 503 504 = @gone;
    }
    location @gone { return 444; }
    location / { proxy_pass http://127.0.0.1:%d; }
}
"""


def shared(headers):
    """What a backend has to send with every answer, redirects too, that a page of another origin may
    follow: the page's origin, and for `withCredentials` that it may."""
    origin = headers.get("Origin", "*")
    fields = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    return fields | {"Access-Control-Allow-Credentials": "true"}


class World:
    """An application with a page, a backend and a push server, each of another origin: `*.localhost`
    is this machine, in both browsers."""

    def __init__(self, serve, site, nginx, driver, **settings):
        self.driver, self.settings = driver, settings
        self.application, self.other, port = site(), site(), free_port()
        self.page = f"http://app.localhost:{port}"
        self.backend = f"http://api.localhost:{self.other.port}"
        settings = {name: str(value).format(**vars(self)) for name, value in settings.items()}
        self.server = serve(retry=300, metrics_listen="127.0.0.1:0", **settings)
        self.push = f"http://push.localhost:{self.server.port}"
        nginx(HOST % (port, self.server.port, self.application.port))
        self.topic, self.minted = "a", 0

    def token(self):
        self.minted = time.time()
        return self.server.token(self.topic)

    def shows(self, script):
        """Opens the page with this script in it."""
        token = self.token()
        text = PAGE % script.format(**vars(self), token=token)
        self.application.pages["/"] = lambda _: (200, {}, text)
        self.driver.get(self.page)

    def redirects(self, site, to, fields=lambda _: {}):
        """`/events` of the application or the backend leads to a fresh token."""

        def redirect(headers):
            return 307, fields(headers) | {"Location": f"{to}/events?token={self.token()}"}, ""

        site.pages["/events"] = redirect

    def notes(self):
        return self.driver.execute_script(NOTES)

    def until(self, condition, why):
        """Waits until it is true of each stream."""
        try:
            until(lambda: self.notes() and all(map(condition, self.notes().values())), why, 60)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.notes()}") from None

    def hears(self, data, streams=1):
        """Publishes once all streams are there; each of them hears it."""

        def published():
            return self.server.publish(self.topic, "tick", data) >= streams

        until(published, f"{streams} streams for {data}", 60)
        self.until(lambda note: data in note["heard"], f"all hear {data}")


    def counted(self, sample):
        address = self.server.find(r"metrics on (127\.0\.0\.1:\d+)")[1]
        text = requests.get(f"http://{address}/metrics", timeout=DEADLINE).text
        return int(text.split(f"\n{sample} ")[1].split()[0])


def follows_the_last_redirect(driver):
    """When it connects anew: by the standard, and Chromium does. Firefox begins anew."""
    return driver.capabilities["browserName"] != "firefox"


@pytest.fixture
def world(serve, site, nginx, browser):
    return lambda **settings: World(serve, site, nginx, browser, **settings)


# The table above, in each browser, with and without credentials.
@pytest.mark.parametrize("allowed", TABLE)
def test_pages_get_the_streams_that_the_setting_allows(world, allowed):
    world = world(allow_origin=allowed)
    world.other.pages["/address"] = lambda headers: (
        200, shared(headers), f"{world.push}/events?token={world.token()}"
    )
    found = {}
    for arrangement, script in ARRANGEMENTS.items():
        world.topic = arrangement
        own = arrangement.endswith("host")
        world.redirects(world.application, "/push" if own else world.push)
        world.redirects(world.other, world.push, shared)
        world.shows(script)
        until(lambda: len(world.notes()) == 2, "the script has run")
        world.until(lambda note: note["state"] != 0, f"{arrangement}: opened or refused")
        states = {note["state"] for note in world.notes().values()}
        found[arrangement] = states.pop() if len(states) == 1 else world.notes()
        if found[arrangement] == OPEN:
            world.hears("hello", 2)
    assert found == dict(zip(ARRANGEMENTS, TABLE[allowed]))


# The push server allows everyone, but the browser reads no redirect of a backend that does not.
@pytest.mark.parametrize("fields", [{}, {"Access-Control-Allow-Origin": "*"}], ids=["none", "star"])
def test_a_backend_of_another_origin_has_to_allow_the_page_too(world, fields):
    world = world()
    world.redirects(world.other, world.push, lambda _: fields)
    world.shows("listenTwice('{backend}/events')")
    world.until(lambda note: note["state"] != 0, "opened or refused")
    states = {name: note["state"] for name, note in world.notes().items()}
    # `*` is not enough for credentials.
    assert states == {"plain": OPEN if fields else DEAD, "with credentials": DEAD}


TTL = 4


def expire(world):
    """Waits until the last token is older than its lifetime."""
    time.sleep(max(0, world.minted + TTL + 2 - time.time()))


# Nobody wrote a line for it: the stream ends with its token; the browser asks again, in Chromium
# with that same token, and is led to a new one. So too when the server was away meanwhile.
def test_a_plain_event_source_outlives_its_token(world):
    world = world(token_ttl=TTL, renew_url="/events")
    world.redirects(world.application, "/push")
    world.shows("listen('/events', 'plain', {{}})")
    world.hears("first")
    world.until(lambda note: note["states"].count(OPEN) >= 3, "the stream has been renewed twice")
    world.hears("later")
    assert world.counted('sse_streams_ended_total{reason="expired"}') >= 2
    world.server.kill()
    expire(world)
    world.server = world.server.again()
    world.hears("after the restart")
    redirected = world.counted('sse_answers_total{status="307"}') > 0
    assert redirected == follows_the_last_redirect(world.driver)
    assert DEAD not in world.notes()["plain"]["states"]
    assert set(world.application.asked) <= {"/", "/events", "/favicon.ico"}


# The same between three origins, where the renewal is one more redirect: Chromium tells the backend
# `Origin: null` then.
def test_a_stream_from_another_origin_outlives_its_token_too(world):
    world = world(token_ttl=TTL, renew_url="{backend}/events")
    world.redirects(world.other, world.push, shared)
    world.shows("listenTwice('{backend}/events')")
    world.hears("first", 2)
    world.until(lambda note: note["states"].count(OPEN) >= 3, "the streams have been renewed twice")
    world.hears("later", 2)
    assert not any(DEAD in note["states"] for note in world.notes().values())


# What the setting is for: Chromium comes back with the old token, which without it is a 401, and
# after that no browser tries again.
def test_without_renewal_chromium_ends_a_plain_event_source_with_its_token(world):
    # Twice as long as above: here a browser that took longer to open it would never get it.
    world = world(token_ttl=2 * TTL)
    world.redirects(world.application, "/push")
    world.shows("listen('/events', 'plain', {{}})")
    world.until(lambda note: OPEN in note["states"], "the stream opens")
    if follows_the_last_redirect(world.driver):
        world.until(lambda note: note["state"] == DEAD, "the stream is dead")
        assert world.application.asked.count("/events") == 1
    else:
        world.until(lambda note: note["states"].count(OPEN) >= 2, "it has begun anew")
        world.hears("later")
