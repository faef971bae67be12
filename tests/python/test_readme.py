"""Every snippet of the README, taken from the README and run as written."""

import os
import re
import runpy
import subprocess
import threading

import pytest
import requests
from conftest import DEADLINE, ROOT, TESTS, Process, free_port, subscribe, until
from werkzeug.serving import make_server

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
def application(serve, monkeypatch, tmp_path):
    """The README's Python, with a page that holds the README's JavaScript."""
    server = serve(retry=300)
    monkeypatch.setenv("SSE_SECRET", server.secret)
    (python,) = snippets("python")
    (script,) = snippets("js")
    assert "http://127.0.0.1:8000" in python
    (tmp_path / "backend.py").write_text(python.replace("http://127.0.0.1:8000", server.url))
    names = runpy.run_path(tmp_path / "backend.py", run_name="backend")
    app, state = names["app"], ["nothing"]
    page = f"""<!doctype html><p id=shown></p><script>
        const shown = document.getElementById("shown");
        const refetchEverything = async () =>
          (shown.textContent = await (await fetch("/state")).text());
        const show = (data) => (shown.textContent = data);
        {script}</script>"""
    app.add_url_rule("/", "page", lambda: page)
    app.add_url_rule("/state", "state", lambda: state[0])
    backend = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    names |= {"server": server, "state": state, "url": f"http://127.0.0.1:{backend.port}"}
    yield names
    backend.shutdown()


def test_the_python_lines_redirect_a_subscriber_and_publish(application):
    answer = requests.get(f"{application['url']}/events", allow_redirects=False, timeout=DEADLINE)
    assert answer.status_code == 307
    stream = subscribe(answer.headers["Location"])
    application["publish"]("news", "update", "from Python")
    assert stream.event() == ("update", "from Python")


def test_the_javascript_lines_show_events_and_recover(application, browser):
    server, publish, state = (application[name] for name in ("server", "publish", "state"))
    browser.get(application["url"])

    def shows(text):
        script = "return document.getElementById('shown').textContent"
        until(lambda: browser.execute_script(script) == text, f"the page shows {text}", within=60)

    shows("nothing")  # fetched when the stream opened
    publish("news", "update", "first")
    shows("first")
    server.kill()
    state[0] = "changed meanwhile"
    again = server.again()
    shows("changed meanwhile")  # by itself, through the redirect
    until(lambda: publish("news", "update", "second") or True, "published")
    shows("second")
    again.stop()


def test_the_configurations_it_links_to_exist():
    links = re.findall(r"\]\((tests/[^)#]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert TESTS.is_dir()
