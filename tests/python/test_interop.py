"""With clients that nobody here wrote: Python's, curl, and Node's."""

import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import msgpack
import pytest
import requests
import requests_sse
import sseclient
from branca import Branca
from conftest import BINARY, DEADLINE, Process, subscribe, tool, until

TEXTS = ["", "plain", "Zwölf Boxkämpfer 🥊, 日本語", "two\nlines", "trailing\n", "\n", "x" * 9000]


def run(*command, **options):
    options = {"capture_output": True, "text": True, "timeout": DEADLINE, "check": True} | options
    return subprocess.run([str(part) for part in command], **options)


# The README's Python: minted with pybranca and msgpack, sent with requests, read with sseclient-py.
def test_python_mints_submits_and_reads(serve):
    server = serve()
    branca = Branca(server.secret)
    token = branca.encode(msgpack.packb({"topics": ["news"]}))
    url = f"{server.url}/events?token={token}"
    with requests.get(url, stream=True, timeout=DEADLINE) as response:
        events = sseclient.SSEClient(response).events()
        batch = [{"topic": "news", "event": "text", "data": text} for text in TEXTS]
        body = branca.encode(msgpack.packb({"events": batch}))
        receipt = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
        assert receipt.json() == {"events": len(TEXTS), "deliveries": len(TEXTS)}
        for text in TEXTS:
            event = next(events)
            assert (event.event, event.data) == ("text", text)


def iter_lines(url):
    """What requests itself offers. Of its lines those of the data."""
    with requests.get(url, stream=True, timeout=DEADLINE) as response:
        for line in response.iter_lines(decode_unicode=True):
            if line.startswith("data: "):
                yield "message", line[6:]


def sseclient_py(url):
    with requests.get(url, stream=True, timeout=DEADLINE) as response:
        for event in sseclient.SSEClient(response).events():
            yield event.event, event.data


def requests_sse_events(url):
    with requests_sse.EventSource(url, timeout=DEADLINE) as source:
        for event in source:
            yield event.type, event.data


def sseclient_of_pypi(url):
    """The package `sseclient`. Its module has the name that sseclient-py took for a folder."""
    file = importlib.metadata.distribution("sseclient").locate_file("sseclient.py")
    spec = importlib.util.spec_from_file_location("sseclient_of_pypi", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for event in module.SSEClient(url, timeout=DEADLINE):
        yield event.event, event.data


class PythonReader:
    """What a reader makes of a stream, event by event, each with a deadline."""

    def __init__(self, read, url):
        self.events = queue.Queue()
        threading.Thread(target=self.run, args=[read, url], daemon=True).start()

    def run(self, read, url):
        # At the end of the test its server goes away.
        with suppress(requests.RequestException):
            for event in read(url):
                self.events.put(event)

    def next(self):
        return self.events.get(timeout=DEADLINE)


readers = pytest.mark.parametrize(
    "read", [iter_lines, sseclient_py, requests_sse_events, sseclient_of_pypi]
)


def reads(read, server, topic):
    """A reader of the topic, whose stream is open, and shows what comes."""
    reader = PythonReader(read, f"{server.url}/events?token={server.token(topic, 'probe')}")
    until(lambda: server.publish("probe", "", "opening") == 1, "the stream is open")
    assert reader.next() == ("message", "opening")
    return reader


# What reads in pieces of 512 bytes shows a body without chunks when so many have come: for a small
# event on a quiet stream, never. Nothing follows this one.
@readers
def test_python_readers_show_a_small_event_at_once(serve, read):
    server = serve(heartbeat=600)
    reader = reads(read, server, "a")
    for number in range(3):
        assert server.publish("a", "", str(number)) == 1
        assert reader.next() == ("message", str(number))


# What is no event must not look like one: a page that parses each message would fail at the first.
@readers
def test_python_readers_see_no_message_in_a_greeting_or_a_heartbeat(serve, read):
    server = serve(heartbeat=1)
    reader = reads(read, server, "a")
    wait_for_heartbeats(server)
    assert server.publish("a", "", "the first") == 1
    assert reader.next() == ("message", "the first")


def wait_for_heartbeats(server):
    """Two of a stream that opens now: whoever is silent since before has had one at least."""
    heartbeats = subscribe(f"{server.url}/events?token={server.token('silence')}")
    assert heartbeats.frame().startswith("retry: ")
    # The greeting has one as well.
    assert [heartbeats.frame() for _ in range(3)] == [":"] * 3
    heartbeats.close()


# They take Latin-1 for the encoding of text that names none.
@readers
@pytest.mark.parametrize("text", ["✅ Æ 进入", "Zwölf Boxkämpfer 🥊"])
def test_python_readers_read_every_script(serve, read, text):
    server = serve(heartbeat=600)
    reader = reads(read, server, "a")
    assert server.publish("a", "", text) == 1
    assert reader.next() == ("message", text)


# A session keeps its connection; the server closes it when it is idle. The next submission must
# not fail for that.
def test_a_session_outlives_the_servers_patience(serve):
    server = serve(read_timeout=1)
    before = sockets(server)
    with requests.Session() as session:
        for _ in range(3):
            body = server.submission(("a", "", "x"))
            answer = session.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
            assert answer.status_code == 200
            until(lambda: sockets(server) <= before, "the server closes the idle connection")


def sockets(server):
    count = 0
    for link in Path(f"/proc/{server.child.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(link).startswith("socket:")
    return count


# Python's requests sends a generator as chunks. It is told what to do instead, and its session goes
# on with another connection.
def test_a_chunked_submission_from_requests_is_told_to_name_its_length(serve):
    server = serve()
    events = subscribe(f"{server.url}/events?token={server.token('a')}")
    body = server.submission(("a", "", "in one piece"))
    pieces = (body.encode()[at : at + 7] for at in range(0, len(body), 7))
    with requests.Session() as session:
        refused = session.post(f"{server.url}/submit", data=pieces, timeout=DEADLINE)
        assert refused.status_code == 411 and "Content-Length" in refused.text
        assert refused.headers["Connection"] == "close"
        answer = session.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
        assert answer.json() == {"events": 1, "deliveries": 1}
    assert events.event() == ("message", "in one piece")


class Kept:
    """A connection of http.client's, which it makes anew where the server has said that it ends."""

    def __init__(self, server):
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)

    def post(self, body):
        self.connection.request("POST", "/submit", body)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status


class Session:
    def __init__(self, server):
        self.session, self.url = requests.Session(), f"{server.url}/submit"

    def post(self, body):
        return self.session.post(self.url, data=body, timeout=DEADLINE).status_code


def refused_bodies(server):
    """Each way to have a submission refused that came whole, and one that is not read to its end."""
    return {401: "no token", 400: server.token("no events"), 413: "x" * 16_385}


# One bad submission, and on the same connection right behind it a good one. A server that ends a
# connection without saying so loses it: the client has sent it before it sees the end.
@pytest.mark.parametrize("status", [400, 401, 413])
@pytest.mark.parametrize("kind", [Kept, Session])
def test_a_kept_connection_publishes_right_behind_a_refusal(serve, kind, status):
    server = serve()
    events = subscribe(f"{server.url}/events?token={server.token('a')}")
    publisher, refused = kind(server), refused_bodies(server)[status]
    bodies = [server.submission(("a", "", str(number))) for number in range(60)]
    for body in bodies:
        assert publisher.post(refused) == status
        assert publisher.post(body) == 200
    assert [events.event() for _ in bodies] == [("message", str(n)) for n in range(60)]


# A refusal costs no connection.
def test_a_refused_submission_that_was_read_ends_no_connection(serve):
    server = serve()
    publisher = Kept(server)
    assert publisher.post(server.submission(("a", "", ""))) == 200
    first = publisher.connection.sock
    for status in (400, 401):
        assert publisher.post(refused_bodies(server)[status]) == status
        assert publisher.connection.sock is first


# curl asks before it sends more than a kilobyte, and waits a second where nobody answers.
def test_curl_submits(serve):
    server = serve()
    events = subscribe(f"{server.url}/events?token={server.token('a')}")
    body = server.submission(("a", "from-curl", "x" * 5000))
    command = [tool("curl"), "-sv", "-H", "Expect: 100-continue", "--data-binary", "@-"]
    sent = run(*command, f"{server.url}/submit", input=body)
    assert json.loads(sent.stdout) == {"events": 1, "deliveries": 1}
    assert "HTTP/1.1 100 Continue" in sent.stderr, sent.stderr
    assert events.event() == ("from-curl", "x" * 5000)


# With a proxy in its settings, curl names the whole address in the request line.
def test_curl_is_served_as_by_a_proxy(serve):
    server = serve()
    answer = run(tool("curl"), "-sf", "-x", server.url, "http://push.example.com/ping")
    assert answer.stdout == "ok\n"


# The commands of the binary and the libraries speak the same language.
def test_the_commands_and_pybranca_open_each_others_tokens(serve, start):
    server = serve()
    env = {"SSE_SECRET": server.secret}
    token = run(BINARY, "token", "a", "b", env=env).stdout.strip()
    assert msgpack.unpackb(server.branca.decode(token)) == {"topics": ["a", "b"]}
    body = run(BINARY, "event", "a", "hello", "world", env=env).stdout.strip()
    event = {"topic": "a", "event": "hello", "data": "world"}
    assert msgpack.unpackb(server.branca.decode(body)) == {"events": [event]}
    curl = start(Process, [tool("curl"), "-sN", f"{server.url}/events?token={token}"])
    curl.find("^retry: ")
    run(tool("curl"), "-sf", "--data-binary", "@-", f"{server.url}/submit", input=body)
    curl.find("^event: hello")
    curl.find("^data: world")


class NodeReader:
    """tests/node/reader.mjs: the npm package `eventsource`. Or another script that prints so."""

    def __init__(self, node, url, *names, script="reader.mjs"):
        self.process = node(script, url, *names)
        self.read = 0

    def next(self):
        self.process.wait_for(lambda: len(self.process.lines) > self.read, "a line")
        self.read += 1
        return json.loads(self.process.lines[self.read - 1])


# The package with tens of millions of downloads.
def test_npm_eventsource_reads_every_kind_of_text(serve, node):
    server = serve()
    url = f"{server.url}/events?token={server.token('a')}"
    reader = NodeReader(node, url, "text")
    assert reader.next() == {"type": "open"}
    for text in TEXTS:
        assert server.publish("a", "text", text) == 1
        assert reader.next() == {"type": "text", "data": text}
    assert server.publish("a", "", "unnamed") == 1
    assert reader.next() == {"type": "message", "data": "unnamed"}


# A 401 ends it for good, as in a browser: the reader is told so, with the status.
def test_npm_eventsource_gives_up_on_a_refusal(serve, node):
    server = serve()
    reader = NodeReader(node, f"{server.url}/events?token=none")
    assert reader.next() == {"type": "error", "code": 401, "closed": True}


# A message that is none makes a page's JSON.parse throw, and then this package reconnects, for ever.
def test_npm_fetch_event_source_sees_events_and_nothing_else(serve, node):
    server = serve(heartbeat=1)
    url = f"{server.url}/events?token={server.token('a')}"
    reader = NodeReader(node, url, script="fetch-reader.mjs")
    assert reader.next() == {"type": "open"}
    wait_for_heartbeats(server)
    for text in ["plain", "Zwölf Boxkämpfer 🥊, 日本語", "two\nlines", "x" * 9000]:
        assert server.publish("a", "text", text) == 1
        assert reader.next() == {"type": "text", "data": text}


# Node's agent learns of the end of a connection only when it reads again.
@pytest.mark.parametrize("status", [400, 401, 413])
def test_nodes_agent_publishes_right_behind_a_refusal(serve, node, status):
    server = serve()
    good, refused = server.submission(("a", "", "")), refused_bodies(server)[status]
    pairs = 60 if status < 413 else 7  # all of them are arguments of one command
    process = node("publisher.mjs", f"{server.url}/submit", *[refused, good] * pairs)
    assert process.child.wait(DEADLINE) == 0
    process.reader.join(DEADLINE)
    posts = [json.loads(line) for line in process.lines]
    assert [post["outcome"] for post in posts] == [status, 200] * pairs
    if status < 413:
        assert posts[-1]["connections"] == 1


# Middleware that compresses gathers bytes, and holds back the head with them.
def test_a_stream_opens_at_once_behind_express_with_compression(serve, node):
    server = serve(heartbeat=600)
    relay = node("relay.mjs", server.url).find(r"listening on (http://\S+)")[1]
    token = server.token("a")
    events = subscribe(f"{relay}/events?token={token}", **{"Accept-Encoding": "gzip, br"})
    for number in range(3):
        assert server.publish("a", "tick", str(number), relay) == 1
        assert events.event() == ("tick", str(number))


# The flow in Node: backend.mjs mints, redirects and submits; the reader comes back through the
# redirect, with a token that is young enough.
def test_node_backend_and_reader_survive_a_restart(serve, node):
    server = serve(retry=200)
    backend = node("backend.mjs", SSE_SECRET=server.secret, PUSH_URL=server.url, PORT="0")
    url = backend.find(r"listening on (http://\S+)")[1]
    reader = NodeReader(node, f"{url}/events")
    assert reader.next() == {"type": "open"}

    def post(text):
        answer = requests.post(f"{url}/news", data=text.encode(), timeout=DEADLINE)
        assert answer.json()["events"] == 1, answer.text
        return answer.json()["deliveries"]

    assert post("Grüße aus Node") == 1
    assert reader.next() == {"type": "message", "data": "Grüße aus Node"}
    server.kill()
    assert reader.next() == {"type": "error", "closed": False}
    # What it cannot publish, the backend says.
    answer = requests.post(f"{url}/news", data="lost", timeout=DEADLINE)
    assert answer.status_code == 502
    time.sleep(4.1)  # now the first token is older than its lifetime
    server.again(token_ttl=3)
    # From now on its streams end with their tokens, and it is back each time.
    for text in ("back again", "and again"):
        until(lambda: post(text) == 1, "the reader is there")
        while (line := reader.next()) != {"type": "message", "data": text}:
            assert line in ({"type": "error", "closed": False}, {"type": "open"}), line
        while (line := reader.next()) != {"type": "open"}:
            assert line == {"type": "error", "closed": False}, line


# Two secrets while one is being replaced: the backend's snippets use the first.
def test_node_backend_takes_the_first_of_two_secrets(serve, node):
    new, old = "ab" * 32, "cd" * 32
    server = serve(secret=new)
    backend = node("backend.mjs", SSE_SECRET=f"{new},{old}", PUSH_URL=server.url, PORT="0")
    url = backend.find(r"listening on (http://\S+)")[1]
    answer = requests.post(f"{url}/news", data="x", timeout=DEADLINE)
    assert answer.json() == {"events": 1, "deliveries": 0}
