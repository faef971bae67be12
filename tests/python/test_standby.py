"""Two servers behind nginx, with tests/nginx/standby.conf: whichever dies, and whichever comes
back, no client stays connected and hears nothing."""

import queue
import threading
from contextlib import suppress

import pytest
import requests
from conftest import DEADLINE, TESTS, subscribe, until


class Client:
    """As the demo's page: asks the backend for a stream, and for a new one when it ends."""

    def __init__(self, demo, proxy):
        self.demo, self.proxy = demo, proxy
        self.heard = []
        self.streams = 0
        self.gone = threading.Event()
        self.reader = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.gone.wait(0.1):
            try:
                options = {"allow_redirects": False, "timeout": DEADLINE}
                answer = requests.get(f"{self.demo.url}/events", **options)
                self.reader = subscribe(answer.headers["Location"], self.proxy.tls)
            except (OSError, AssertionError):
                continue  # nobody there, or 502 from nginx
            self.streams += 1
            while not (self.reader.ended.is_set() and self.reader.frames.empty()):
                with suppress(queue.Empty):
                    self.heard.append(self.reader.event(within=0.2))

    def leave(self):
        self.gone.set()
        if self.reader:
            self.reader.close()
        self.thread.join(DEADLINE)


class Pair:
    """Two servers, nginx in front, and a backend that submits to both."""

    def __init__(self, serve, demo, recommended):
        self.active = serve(retry=200)
        self.standby = serve(secret=self.active.secret, retry=200)
        addresses = {
            "127.0.0.1:8000": f"127.0.0.1:{self.active.port}",
            "127.0.0.1:8001": f"127.0.0.1:{self.standby.port}",
            "fail_timeout=5s": "fail_timeout=1s",
        }
        upstream = (TESTS / "nginx" / "standby.conf").read_text()
        self.proxy = recommended(addresses, upstream)
        both = f"{self.active.url},{self.standby.url}"
        self.demo = demo(self.active, PUSH_URLS=both, PUSH_PUBLIC_URL=self.proxy.url)
        self.clients = []

    def join(self, count):
        new = [Client(self.demo, self.proxy) for _ in range(count)]
        self.clients += new
        until(lambda: all(client.streams for client in new), "every client has a stream")

    def everyone_reconnects(self, after):
        """Runs `after`, which ends streams, and waits until every client has a new one."""
        before = [client.streams for client in self.clients]
        after()
        until(
            lambda: all(c.streams > b for c, b in zip(self.clients, before)),
            "every client has a new stream",
        )

    def everyone_hears(self, text):
        self.demo.add(text)

        def counts():
            return {sum(text in data for _, data in client.heard) for client in self.clients}

        until(lambda: 0 not in counts(), f"every client hears {text}")
        assert counts() == {1}  # once, whatever way it took


@pytest.fixture
def pair(serve, demo, recommended):
    pair = Pair(serve, demo, recommended)
    yield pair
    for client in pair.clients:
        client.leave()


def topics_on(server):
    """How many of a server's own subscribers an event would reach."""
    return server.publish("list", "", "count")


# The machine or the process dies at its busiest.
def test_no_client_stays_silent_when_the_active_server_dies(pair):
    pair.join(10)
    assert topics_on(pair.active) == 10
    pair.everyone_hears("one")
    pair.everyone_reconnects(pair.active.kill)
    assert topics_on(pair.standby) == 10
    pair.everyone_hears("two")


# The treacherous moment: nginx sends new clients to the active server again, the others stay where
# they are. Both must hear everything.
def test_no_client_stays_silent_when_the_active_server_comes_back(pair):
    pair.join(5)
    pair.everyone_reconnects(pair.active.kill)
    pair.active.again()

    def back():
        pair.join(1)
        return topics_on(pair.active) > 0

    until(back, "nginx uses the active server again")
    assert topics_on(pair.standby) >= 5
    pair.everyone_hears("three")


# The standby dies unnoticed: those on the active server must not feel it.
def test_losing_the_standby_disturbs_nobody(pair):
    pair.join(5)
    pair.standby.kill()
    pair.everyone_hears("four")
    assert [client.streams for client in pair.clients] == [1] * 5


# A backend that can only be told one address submits through nginx. That follows to the standby...
def test_submissions_through_the_proxy_follow_to_the_standby(pair):
    through = dict(url=pair.proxy.url, verify=pair.proxy.cert)
    pair.join(5)
    assert pair.active.publish("list", "", "five", **through) == 5
    pair.everyone_reconnects(pair.active.kill)
    assert pair.active.publish("list", "", "six", **through) == 5
    # ... but when the active server is back, it follows back, and the clients do not. This is why
    # the configuration says to submit to both. Whoever cannot restarts the standby at that moment:
    # its clients come over.
    pair.active.again()
    until(
        lambda: pair.active.publish("list", "", "lost", **through) == 0,
        "submissions go to the active server again, where nobody is",
    )
    pair.everyone_reconnects(lambda: (pair.standby.stop(), pair.standby.again()))
    assert pair.active.publish("list", "", "seven", **through) == 5
