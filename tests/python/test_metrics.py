"""The metrics as Prometheus' own parser reads them, while real traffic changes them."""

import re
import resource
import socket
import time
from contextlib import contextmanager

import pytest
import requests
from conftest import DEADLINE, subscribe, until
from prometheus_client.parser import text_string_to_metric_families

KINDS = {
    "sse_subscribers": "gauge",
    "sse_topics": "gauge",
    "sse_queue_high_water": "gauge",
    "sse_events": "counter",
    "sse_deliveries": "counter",
    "sse_delivered_bytes": "counter",
    "sse_answers": "counter",
    "sse_subscribers_cut": "counter",
    "sse_connections_refused": "counter",
    "sse_accept_failures": "counter",
    "process_start_time_seconds": "gauge",
}


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
    """What was counted between two scrapes, those scrapes themselves left out."""
    changed = {name: value - before.get(name, 0) for name, value in after.items()}
    own = "sse_answers_total{path=/metrics,status=200}"
    return {name: value for name, value in changed.items() if value and name != own}


def value(server, sample):
    return samples(server.scrape()).get(sample, 0)


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
    for _ in range(2):
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
        # Once more with samples that have labels.
        requests.get(f"{server.url}/nothing", timeout=DEADLINE)
        subscribe(f"{server.url}/events?token={server.token('a')}").close()
        until(
            lambda: server.publish("a", "", "b") == 0
            or value(server, "sse_subscribers_cut_total{reason=disconnected}"),
            "the departure is noticed",
        )


def test_the_start_time_is_the_process_start(measured):
    before = time.time()
    server = measured()
    after = time.time()
    started = value(server, "process_start_time_seconds")
    # Whole seconds, rounded down.
    assert before - 1 <= started <= after
    server.kill()
    time.sleep(1.1)  # so that the two starts cannot fall into one second
    again = measured()
    assert value(again, "process_start_time_seconds") > started
    assert value(again, "sse_events_total") == 0


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
    body = server.submission(("a", "name", "one\ntwo"), ("a", "", "ü"), ("b", "", "unheard"))
    for _ in range(2):
        receipt = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE).json()
        assert receipt == {"events": 3, "deliveries": 6}
    for stream in streams:
        assert [stream.event() for _ in range(4)] == 2 * [("name", "one\ntwo"), ("message", "ü")]
    frames = "event: name\ndata: one\ndata: two\n\n" + "data: ü\n\n"
    counted = changes(before, samples(server.scrape()))
    # How many waited at once is up to the writers.
    assert 0 <= counted.pop("sse_queue_high_water", 0) <= 4
    assert counted == {
        "sse_events_total": 6,
        "sse_deliveries_total": 12,
        "sse_delivered_bytes_total": 2 * 3 * len(frames.encode()),
        "sse_answers_total{path=/submit,status=200}": 2,
    }


def test_every_refusal_is_counted_by_path_and_status_and_nothing_else_is(measured):
    server = measured(max_subscribers=1, max_body=1000)
    long = f"/events?token={'7' * 4097}"
    expired = server.token("a", timestamp=1)
    empty = server.token()
    taken = subscribe(f"{server.url}/events?token={server.token('a')}")
    before = samples(server.scrape())
    cases = [
        ("GET", "/ping", b"", "/ping", 200),
        ("HEAD", "/ping", b"", "/ping", 200),
        ("OPTIONS", "/events", b"", "/events", 204),
        ("OPTIONS", "/submit", b"", "/submit", 204),
        ("POST", "/submit", b"no token", "/submit", 401),
        ("POST", "/submit", server.token("a").encode(), "/submit", 400),
        ("POST", "/submit", b"7" * 1001, "/submit", 413),
        ("GET", "/submit", b"", "/submit", 405),
        ("GET", "/events", b"", "/events", 401),
        ("GET", f"/events?token={expired}", b"", "/events", 401),
        ("GET", f"/events?token={empty}", b"", "/events", 400),
        ("GET", long, b"", "/events", 414),
        ("GET", f"/events?token={server.token('b')}", b"", "/events", 503),
        ("POST", "/events", b"", "/events", 405),
        # What a stranger asks for must not become a label.
        ("GET", '/a"b\\c{d="e"}', b"", "other", 404),
        ("GET", "/metrics", b"", "other", 404),
        ("BREW", "/ping", b"", "/ping", 405),
    ]
    expected = {}
    for method, target, body, path, status in cases:
        with raw(server) as client:
            head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = client.recv(12)
        assert answer == f"HTTP/1.1 {status}".encode(), (method, target)
        name = f"sse_answers_total{{path={path},status={status}}}"
        expected[name] = expected.get(name, 0) + 1
    assert changes(before, samples(server.scrape())) == expected
    taken.close()


def test_the_high_water_mark_is_the_longest_queue_there_ever_was(measured):
    server = measured(queue=7, write_timeout=600)
    sluggard = stalled(server, "long")
    until_value(server, "sse_subscribers", 1)
    assert value(server, "sse_queue_high_water") == 0
    publish_until(server, "sse_queue_high_water", 7)
    publish_until(server, "sse_subscribers", 0)
    # The queue is gone, the mark stays, and never was beyond the limit.
    assert value(server, "sse_queue_high_water") == 7
    sluggard.close()


def test_each_way_to_lose_a_stream_is_counted_under_its_reason(measured):
    cut = "sse_subscribers_cut_total{{reason={}}}".format
    server = measured(queue=4, write_timeout=600, heartbeat=600)
    sluggard = stalled(server, "long")
    until_value(server, "sse_subscribers", 1)
    publish_until(server, cut("queue_full"), 1)
    sluggard.close()
    leaver = subscribe(f"{server.url}/events?token={server.token('long')}")
    leaver.close()
    publish_until(server, cut("disconnected"), 1)

    patient = measured(queue=60_000, write_timeout=1, heartbeat=600)
    sluggard = stalled(patient, "long")
    until_value(patient, "sse_subscribers", 1)
    publish_until(patient, cut("write_timeout"), 1)
    sluggard.close()

    for server, reasons in [(server, 2), (patient, 1)]:
        found = samples(server.scrape())
        found = {name: count for name, count in found.items() if "_cut_" in name}
        assert len(found) == reasons and set(found.values()) == {1}, found


@contextmanager
def descriptors(count):
    """What is started within may have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_find_no_room_are_counted(measured):
    with descriptors(140):
        server = measured(read_timeout=600)
    idle = [raw(server) for _ in range(100)]
    refused = until(
        lambda: value(server, "sse_connections_refused_total"), "connections are refused"
    )

    def closed():
        for client in idle:
            client.setblocking(False)
            try:
                if client.recv(1) == b"":
                    yield client
            except BlockingIOError:
                pass

    # Of 140, a seventh may be connections.
    assert refused >= 50
    until(
        lambda: value(server, "sse_connections_refused_total") == len(list(closed())),
        "each that was closed is counted",
    )
    assert value(server, "sse_accept_failures_total") == 0


def test_failures_to_accept_are_counted(measured):
    server = measured(read_timeout=600)
    pid, limit = server.child.pid, resource.RLIMIT_NOFILE
    with requests.Session() as session:  # a connection from before still gets its answers
        url = f"http://{server.metrics_url}/metrics"

        def count():
            found = samples(session.get(url, timeout=DEADLINE).text)
            return found.get("sse_accept_failures_total", 0)

        assert count() == 0
        before = resource.prlimit(pid, limit, (3, resource.getrlimit(limit)[1]))
        # An accept that waits has its descriptor already. The next one has none.
        clients = [raw(server), raw(server)]
        until(lambda: count() >= 2, "it is tried again, and fails again")
        resource.prlimit(pid, limit, before)
        clients[1].sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        assert clients[1].recv(12) == b"HTTP/1.1 200"
    for client in clients:
        client.close()
