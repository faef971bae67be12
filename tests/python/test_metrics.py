"""The metrics as Prometheus' own parser reads them, while real traffic changes them."""

import re
import resource
import socket
import subprocess
from contextlib import suppress

import pytest
import requests
from conftest import BINARY, DEADLINE, subscribe, until
from prometheus_client.parser import text_string_to_metric_families

KINDS = {
    "sse_build_info": "gauge",
    "sse_subscribers": "gauge",
    "sse_capacity": "gauge",
    "sse_topics": "gauge",
    "sse_events": "counter",
    "sse_deliveries": "counter",
    "sse_delivered_bytes": "counter",
    "sse_streams_opened": "counter",
    "sse_streams_ended": "counter",
    "sse_streams_turned_away": "counter",
    "sse_answers": "counter",
    "sse_connections_evicted": "counter",
    "sse_accept_failures": "counter",
    "sse_redis_failures": "counter",
    "sse_forged_entries": "counter",
}
REASONS = ["left", "queue_full", "write_timeout", "shutdown", "expired", "fault", "gap"]
STATUSES = [200, 204, 307, 400, 401, 404, 405, 408, 411, 413, 414, 431, 503, 505]
ended = "sse_streams_ended_total{{reason={}}}".format
answers = "sse_answers_total{{status={}}}".format


@pytest.fixture
def measured(serve):
    """As `serve`, with the address for metrics."""

    def measured(**settings):
        server = serve(metrics_listen="127.0.0.1:0", **settings)
        server.metrics_url = server.find(r"metrics on (127\.0\.0\.1:\d+)")[1]
        server.scrape = lambda: scrape(server.metrics_url)
        return server

    return measured


def scrape(address):
    """The text of the metrics."""
    answer = requests.get(f"http://{address}/metrics", timeout=DEADLINE)
    assert answer.status_code == 200
    # Anything else Prometheus 3 would not scrape.
    assert answer.headers["Content-Type"].split(";")[0] == "text/plain"
    return answer.text


def samples(text):
    """The values, each under its name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def changes(before, after):
    """What was counted between two scrapes, the first of them left out."""
    changed = {name: value - before[name] for name, value in after.items()}
    changed[answers(200)] -= 1
    return {name: value for name, value in changed.items() if value}


def value(server, sample):
    return samples(server.scrape())[sample]


def until_value(server, sample, wanted):
    until(lambda: value(server, sample) == wanted, f"{sample} is {wanted}")


def raw(server, *, receive_buffer=None):
    """A connection to the server."""
    client = socket.socket()
    if receive_buffer:  # before it connects: the window is agreed on then
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(DEADLINE)
    client.connect(("127.0.0.1", server.port))
    return client


def stalled(server, topic):
    """A stream that nobody reads."""
    client = raw(server, receive_buffer=4096)
    client.sendall(f"GET /events?token={server.token(topic)} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    return client


# Line ends make long frames of short tokens.
LONG = "\n" * 9000


def publish_until(server, sample, wanted):
    body = server.submission(("long", "", LONG))
    with requests.Session() as session:

        def published():
            for _ in range(10):
                session.post(f"{server.url}/submit", data=body, timeout=DEADLINE).raise_for_status()
            return value(server, sample) == wanted

        until(published, f"{sample} is {wanted}", 3 * DEADLINE)


def test_every_family_has_a_help_and_a_type_and_a_name_by_the_conventions(measured):
    server = measured()
    for left in (1, 2):
        text = server.scrape()
        families = list(text_string_to_metric_families(text))
        assert {family.name: family.type for family in families} == KINDS
        for family in families:
            assert family.documentation.endswith("."), family.name
            name = family.name + ("_total" if family.type == "counter" else "")
            # The parser would forgive a second one, and a sample that stands elsewhere.
            lines = [line for line in text.splitlines() if re.search(rf"\b{name}\b", line)]
            starts = [f"# HELP {name} ", f"# TYPE {name} {family.type}"]
            starts += [name] * len(family.samples)
            assert len(lines) == len(starts), lines
            assert all(line.startswith(start) for line, start in zip(lines, starts)), lines
            assert all(sample.name == name for sample in family.samples), family
        assert text.endswith("\n")
        # Once more when something has happened.
        requests.get(f"{server.url}/nothing", timeout=DEADLINE)
        subscribe(f"{server.url}/events?token={server.token('a')}").close()
        until_value(server, ended("left"), left)


# A rate over a counter that appears when it first counts misses that first one, and an alert on it
# is silent for as long as it has never fired.
def test_every_counter_is_there_from_the_start_with_0(measured):
    found = samples(measured().scrape())
    counters = {name: value for name, value in found.items() if "_total" in name}
    labelled = [ended(reason) for reason in REASONS] + [answers(status) for status in STATUSES]
    others = [f"{name}_total" for name, kind in KINDS.items() if kind == "counter"]
    others = [n for n in others if n not in ("sse_streams_ended_total", "sse_answers_total")]
    assert counters == dict.fromkeys(labelled + others, 0)


def test_version_and_capacity_are_those_of_the_start(measured):
    said = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True).stdout
    found = samples(measured(max_subscribers=17).scrape())
    assert found[f"sse_build_info{{version={said.split()[1]}}}"] == 1
    assert found["sse_capacity"] == 17


def test_gauges_say_what_is_open_now(measured):
    server = measured(heartbeat=1)
    first = subscribe(f"{server.url}/events?token={server.token('a', 'b')}")
    second = subscribe(f"{server.url}/events?token={server.token('b', 'c', 'c')}")
    now = samples(server.scrape())
    assert (now["sse_subscribers"], now["sse_topics"]) == (2, 3)
    first.close()
    until_value(server, "sse_subscribers", 1)
    assert value(server, "sse_topics") == 2
    second.close()
    until_value(server, "sse_subscribers", 0)
    assert value(server, "sse_topics") == 0


def test_counters_follow_the_traffic_to_the_letter(measured):
    server = measured()
    streams = [subscribe(f"{server.url}/events?token={server.token('a')}") for _ in range(3)]
    before = samples(server.scrape())
    assert before["sse_streams_opened_total"] == 3
    body = server.submission(("a", "name", "one\ntwo"), ("a", "", "ü"), ("b", "", "unheard"))
    for _ in range(2):
        receipt = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE).json()
        assert receipt == {"events": 3, "deliveries": 6}
    for stream in streams:
        assert [stream.event() for _ in range(4)] == 2 * [("name", "one\ntwo"), ("message", "ü")]
    frames = "event: name\ndata: one\ndata: two\n\n" + "data: ü\n\n"
    counted = changes(before, samples(server.scrape()))
    assert counted == {
        "sse_events_total": 6,
        "sse_deliveries_total": 12,
        "sse_delivered_bytes_total": 2 * 3 * len(frames.encode()),
        answers(200): 2,
    }


# What is counted is what was answered: by whom it was refused, the reader of requests or what
# stands behind it, makes no difference.
def test_every_answer_is_counted_by_its_status_and_nothing_else_is(measured):
    server = measured(max_subscribers=1, max_body=1000, read_timeout=5, renew_url="/again")
    expired = server.token("a", timestamp=1)
    full = f"/events?token={server.token('b')}"
    taken = subscribe(f"{server.url}/events?token={server.token('a')}")
    before = samples(server.scrape())
    cases = [
        ("GET", "/ping", b"", 200),
        ("HEAD", "/ping", b"", 200),
        ("OPTIONS", "/events", b"", 204),
        ("OPTIONS", "*", b"", 204),
        ("POST", "/submit", b"no token", 401),
        ("POST", "/submit", server.token("a").encode(), 400),
        ("POST", "/submit", b"7" * 1001, 413),
        ("GET", "/submit", b"", 405),
        ("GET", "/events", b"", 401),
        ("HEAD", "/events", b"", 401),
        ("GET", f"/events?token={expired}", b"", 307),
        ("HEAD", f"/events?token={expired}", b"", 307),
        ("GET", f"/events?token={server.token()}", b"", 400),
        ("GET", f"/events?token={'7' * 4097}", b"", 414),
        ("GET", full, b"", 503),
        ("POST", "/events", b"", 405),
        # What a stranger asks for must not become a label.
        ("GET", '/a"b\\c{d="e"}', b"", 404),
        ("GET", "/metrics", b"", 404),
        ("BREW", "/ping", b"", 405),
    ]
    head = "{} {} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n"
    cases = [
        (head.format(method, target, len(body)).encode() + body, status)
        for method, target, body, status in cases
    ]
    cases += [
        (b"POST /submit HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"GET /ping HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET /ping HTTP/1.1\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9000, 431),
        (b"GET /" + b"x" * 9000, 414),
        (b"GET /ping HTTP/1.1\r\nHost: late\r\n", 408),
        (b"POST /submit HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nlate", 408),
        # A browser would never come back after an answer: it gets none, and is counted elsewhere.
        (f"GET {full} HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n".encode(), None),
    ]
    expected = {"sse_streams_turned_away_total": 1}
    clients = [raw(server) for _ in cases]
    for client, (request, _) in zip(clients, cases):
        client.sendall(request)
    for client, (request, status) in zip(clients, cases):
        with client:
            answer = client.recv(12)
        if status:
            assert answer == f"HTTP/1.1 {status}".encode(), request
            expected[answers(status)] = expected.get(answers(status), 0) + 1
        else:
            assert answer == b"", request
    assert {status for _, status in cases} == {None, *STATUSES}
    assert changes(before, samples(server.scrape())) == expected
    taken.close()


def test_each_way_to_lose_a_stream_is_counted_under_its_reason(measured):
    server = measured(queue=4, write_timeout=600, heartbeat=600)
    sluggard = stalled(server, "long")
    until_value(server, "sse_subscribers", 1)
    publish_until(server, ended("queue_full"), 1)
    sluggard.close()
    leaver = subscribe(f"{server.url}/events?token={server.token('long')}")
    leaver.close()
    # Without an event, and long before a heartbeat.
    until_value(server, ended("left"), 1)

    patient = measured(queue=60_000, write_timeout=1, heartbeat=600)
    sluggard = stalled(patient, "long")
    until_value(patient, "sse_subscribers", 1)
    publish_until(patient, ended("write_timeout"), 1)
    sluggard.close()

    # With its token.
    brief = measured(token_ttl=3)
    reader = subscribe(f"{brief.url}/events?token={brief.token('a')}")
    assert reader.ended.wait(DEADLINE)
    until_value(brief, ended("expired"), 1)

    for server, reasons in [
        (server, {"queue_full": 1, "left": 1}),
        (patient, {"write_timeout": 1}),
        (brief, {"expired": 1}),
    ]:
        found = samples(server.scrape())
        assert {reason: found[ended(reason)] for reason in REASONS if found[ended(reason)]} == reasons
        assert found["sse_streams_opened_total"] == len(reasons)


# Strangers who say nothing take every descriptor there is. Who comes after them takes the place of
# the one that has been silent for longest, and a publisher is served.
def test_connections_closed_to_make_room_are_counted(measured):
    server = measured(read_timeout=600)
    # It has raised the soft limit to the hard one.
    resource.prlimit(server.child.pid, resource.RLIMIT_NOFILE, (140, 140))
    idle = [raw(server) for _ in range(200)]
    evicted = "sse_connections_evicted_total"
    assert until(lambda: value(server, evicted), "connections are closed") > 0
    assert server.publish("a", "", "b") == 0

    def closed():
        for client in idle:
            client.setblocking(False)
            with suppress(BlockingIOError):
                if client.recv(1) == b"":
                    yield client

    until(
        lambda: value(server, evicted) == len(list(closed())),
        "each that was closed is counted",
    )
    assert 60 <= value(server, evicted) < 200


def test_failures_to_accept_are_counted(measured):
    server = measured(read_timeout=600)
    pid, limit = server.child.pid, resource.RLIMIT_NOFILE
    assert value(server, "sse_accept_failures_total") == 0
    before = resource.prlimit(pid, limit, (3, resource.getrlimit(limit)[1]))
    # An accept that waits has its descriptor already. The next one has none.
    clients = [raw(server), raw(server)]
    # One line a second at most: the second tells of those that were left out.
    said = server.find(r"cannot accept connections: .* suppressed=([1-9]\d*)$")
    resource.prlimit(pid, limit, before)
    clients[1].sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
    assert clients[1].recv(12) == b"HTTP/1.1 200"
    assert value(server, "sse_accept_failures_total") >= int(said[1])
    for client in clients:
        client.close()
