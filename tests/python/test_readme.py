"""Every snippet of the README, taken from the README and run as written."""

import os
import re
import secrets
import subprocess
import sys

import pytest
import requests
from conftest import DEADLINE, ROOT, TESTS, Process, free_port, subscribe, until
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

README = (ROOT / "README.md").read_text()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_shell_lines_show_an_event(start):
    """`make run` prints the README's lines, with a secret in them; they are run in two shells."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("SSE_")}
    run = start(Process, ["make", "run"], env | {"SSE_LISTEN": f"127.0.0.1:{port}"}, ROOT)
    # What is printed last is printed once it serves.
    run.wait_for(lambda: any("sse-server event" in line for line in run.lines), "serving", within=110)
    assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=DEADLINE).ok

    printed = [line.strip() for line in run.lines if re.match(r"  \S", line)]
    make, lines, publish = snippets("sh")
    assert make == "make run\n"
    lines = [*lines.splitlines(), *publish.splitlines()]
    secret = re.search(r"SSE_SECRET=(\w{64})", printed[0])[1]
    written = [line.replace("SSE_SECRET=…", f"SSE_SECRET={secret}") for line in lines]
    printed = [line.replace(f"PATH={ROOT}/", "PATH=$PWD/") for line in printed]
    assert written == [line.replace(f"127.0.0.1:{port}", "localhost:8000") for line in printed]

    export, *lines = (line.replace(":8000", f":{port}") for line in written)
    listening, telling = (["sh", "-c", f"{export}; {line}"] for line in lines)
    reader = start(Process, listening, env, ROOT)
    reader.find("retry: ")
    told = subprocess.run(telling, env=env, cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == '{"events": 1, "deliveries": 1}\n', told.stderr
    reader.find("event: update")
    reader.find("data: 21C")
    assert run.stop() in (0, -15)  # make reports the signal it got, or what the server said


def test_a_port_that_is_taken_is_said_and_nothing_is_printed_that_is_not_true(start, serve):
    taken = serve().url.removeprefix("http://")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SSE_")}
    run = start(Process, ["make", "run"], env | {"SSE_LISTEN": taken}, ROOT)
    run.child.wait(timeout=110)
    run.reader.join(DEADLINE)
    assert any("in use" in line and "SSE_LISTEN" in line for line in run.lines), run.lines
    assert not any("subscribe" in line for line in run.lines), run.lines


@pytest.fixture
def application(serve, start, tmp_path):
    """The README's application, in a file and a process of its own, under a key being replaced."""
    secret, port = f"{secrets.token_hex(32)}, {'01' * 32}", free_port()
    server = serve(retry=300, secret=secret)
    (python,) = snippets("python")
    assert "port=5000" in python
    (tmp_path / "app.py").write_text(python.replace("port=5000", f"port={port}"))
    env = os.environ | {"SSE_SECRET": secret, "PUSH_URL": server.url}
    app = start(Process, [sys.executable, "app.py"], env, tmp_path)
    app.url, app.server = f"http://127.0.0.1:{port}", server
    until(lambda: reachable(app.url), "the application answers")
    return app


def reachable(url):
    try:
        return requests.get(url, timeout=DEADLINE).ok
    except requests.ConnectionError:
        return False


def write(app, text):
    assert requests.post(f"{app.url}/messages", data=text, timeout=DEADLINE).ok


def test_the_application_redirects_a_subscriber_and_publishes(application):
    answer = requests.get(f"{application.url}/events", allow_redirects=False, timeout=DEADLINE)
    assert answer.status_code == 307
    stream = subscribe(answer.headers["Location"])
    write(application, "from Python")
    assert stream.event() == ("changed", "")
    # What a user changed is not undone by a push server that is away.
    application.server.kill()
    write(application, "all the same")
    messages = requests.get(f"{application.url}/messages", timeout=DEADLINE).json()
    assert messages == ["from Python", "all the same"]
    application.find("not published: ")


def test_the_page_of_the_application_shows_events_and_recovers(application, browser):
    browser.get(application.url)

    def shows(text):
        script = "return document.getElementById('shown').textContent"
        until(lambda: browser.execute_script(script) == text, f"the page shows {text!r}", within=60)

    write(application, "first")
    shows("first")
    box = browser.find_element(By.ID, "text")
    box.send_keys("second", Keys.ENTER)
    shows("first\nsecond")
    application.server.kill()
    write(application, "third")
    again = application.server.again()
    shows("first\nsecond\nthird")  # by itself, through the redirect
    write(application, "fourth")
    shows("first\nsecond\nthird\nfourth")
    again.stop()


# No line that would know better than the browser.
PLAIN = """<!doctype html><script>
window.heard = [];
window.failures = 0;
const source = new EventSource("/events");
source.onerror = () => failures++;
source.addEventListener("tick", (event) => heard.push(event.data));
</script>"""


# What the README says of these lines: a page without a script of its own survives its token's end, a
# server that is away, and a backend that is, as in every deployment; no log holds a token.
@pytest.mark.timeout(240)
def test_the_nginx_lines_mount_it_and_a_plain_page_survives(nginx, serve, site, browser):
    server, backend, port = serve(retry=500, token_ttl=5, renew_url="/events"), site(), free_port()
    redirect = lambda _: (307, {"Location": f"/push/events?token={server.token('news')}"}, "")
    away = lambda _: (502, {}, "")
    backend.pages |= {"/": lambda _: (200, {}, PLAIN), "/events": redirect}
    (lines,) = snippets("nginx")
    for old, new in {
        "http://127.0.0.1:8000/": f"{server.url}/",
        "http://127.0.0.1:5000": backend.url,
        "/var/log/nginx/": "logs/",
    }.items():
        assert old in lines
        lines = lines.replace(old, new)
    proxy = nginx(
        f"server {{ listen 127.0.0.1:{port};\n{lines}\nlocation / {{ proxy_pass {backend.url}; }} }}"
    )
    browser.get(f"http://127.0.0.1:{port}/")

    def hears(data):
        def heard():
            server.publish("news", "tick", data)
            return data in browser.execute_script("return window.heard")

        until(heard, f"the page hears {data!r}", within=60)

    def fails_more_than_once():
        # An end for good is told once; whoever tries again fails again.
        browser.execute_script("window.failures = 0")
        until(lambda: browser.execute_script("return window.failures") >= 3, "it tries again", within=60)

    hears("first")
    backend.pages["/events"] = away
    server.stop()
    fails_more_than_once()
    server = server.again()
    backend.pages["/events"] = redirect
    hears("after an outage of both")
    # The token expires, so that the way back leads through the backend.
    backend.pages["/events"], before = away, backend.asked.count("/events")
    fails_more_than_once()
    assert backend.asked.count("/events") > before
    backend.pages["/events"] = redirect
    hears("after an outage of the backend")
    # Nothing else of the server is to be had there.
    public = f"http://127.0.0.1:{port}/push"
    assert requests.get(f"{public}/ping", timeout=DEADLINE).status_code == 404
    for log in (proxy.prefix / "logs").iterdir():
        assert "token=" not in log.read_text(), log.name


def test_it_is_short_enough_to_be_read():
    before_the_reference = README[: README.index("\n## HTTP\n")]
    assert len(before_the_reference.split()) <= 1800


def test_the_configurations_it_links_to_exist():
    links = re.findall(r"\]\((tests/[^)#]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert TESTS.is_dir()
