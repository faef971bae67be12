"""With clients that nobody here wrote: Python's, curl, and Node's."""

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
import requests
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
        # Byte by byte: requests would wait until a larger piece is full.
        events = sseclient.SSEClient(response.iter_content(1)).events()
        batch = [{"topic": "news", "event": "text", "data": text} for text in TEXTS]
        body = branca.encode(msgpack.packb({"events": batch}))
        receipt = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
        assert receipt.json() == {"events": len(TEXTS), "deliveries": len(TEXTS)}
        for text in TEXTS:
            event = next(events)
            assert (event.event, event.data) == ("text", text)


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
            until(lambda: sockets(server) == before, "the server closes the idle connection")


def sockets(server):
    count = 0
    for link in Path(f"/proc/{server.child.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(link).startswith("socket:")
    return count


# Python's requests sends a generator as chunks.
def test_a_chunked_submission_from_requests_is_taken(serve):
    server = serve()
    events = subscribe(f"{server.url}/events?token={server.token('a')}")
    body = server.submission(("a", "", "in pieces")).encode()
    pieces = (body[at : at + 7] for at in range(0, len(body), 7))
    answer = requests.post(f"{server.url}/submit", data=pieces, timeout=DEADLINE)
    assert answer.json() == {"events": 1, "deliveries": 1}
    assert events.event() == ("message", "in pieces")


# curl asks before it sends more than a kilobyte, and waits a second where nobody answers.
@pytest.mark.parametrize("how", ["Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_curl_submits(serve, how):
    server = serve()
    events = subscribe(f"{server.url}/events?token={server.token('a')}")
    body = server.submission(("a", "from-curl", "x" * 5000))
    command = [tool("curl"), "-sv", "-H", how, "--data-binary", "@-", f"{server.url}/submit"]
    sent = run(*command, input=body)
    assert json.loads(sent.stdout) == {"events": 1, "deliveries": 1}
    assert ("HTTP/1.1 100 Continue" in sent.stderr) == how.startswith("Expect"), sent.stderr
    assert events.event() == ("from-curl", "x" * 5000)


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
    """tests/node/reader.mjs: the npm package `eventsource`."""

    def __init__(self, node, url, *names):
        self.process = node("reader.mjs", url, *names)
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


# The flow in Node: backend.mjs mints, redirects and submits; the reader comes back through the
# redirect, with a token that is young enough.
def test_node_backend_and_reader_survive_a_restart(serve, node):
    server = serve(retry=200, token_ttl=2)
    backend = node("backend.mjs", SSE_SECRET=server.secret, PUSH_URL=server.url, PORT="0")
    url = backend.find(r"listening on (http://\S+)")[1]
    reader = NodeReader(node, f"{url}/events")
    assert reader.next() == {"type": "open"}

    def post(text):
        answer = requests.post(f"{url}/news", data=text.encode(), timeout=DEADLINE)
        assert answer.json() == {"events": 1, "deliveries": 1}, answer.text
        assert reader.next() == {"type": "message", "data": text}

    post("Grüße aus Node")
    time.sleep(3.1)  # now the first token is older than its lifetime
    server.kill()
    assert reader.next() == {"type": "error", "closed": False}
    # What it cannot publish, the backend says.
    answer = requests.post(f"{url}/news", data="lost", timeout=DEADLINE)
    assert answer.status_code == 502
    server.again()
    while (line := reader.next()) != {"type": "open"}:
        assert line == {"type": "error", "closed": False}, line
    post("back again")


# Two secrets while one is being replaced: the backend's snippets use the first.
def test_node_backend_takes_the_first_of_two_secrets(serve, node):
    new, old = "ab" * 32, "cd" * 32
    server = serve(secret=new)
    backend = node("backend.mjs", SSE_SECRET=f"{new},{old}", PUSH_URL=server.url, PORT="0")
    url = backend.find(r"listening on (http://\S+)")[1]
    answer = requests.post(f"{url}/news", data="x", timeout=DEADLINE)
    assert answer.json() == {"events": 1, "deliveries": 0}
