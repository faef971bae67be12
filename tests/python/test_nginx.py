"""Behind Debian's nginx: with the configuration in tests/nginx/sse-server.conf, and with the one
line that people write first."""

import re
import socket
import ssl
import subprocess
import time
import zlib

import httpx
import pytest
import requests
from conftest import DEADLINE, Process, free_port, publish_through, subscribe, subscribe_http2
from conftest import tool, until


@pytest.fixture
def behind(recommended):
    """behind(server, {old: new}) puts the recommended nginx in front of a server."""

    def behind(server, changes=None):
        return recommended({"127.0.0.1:8000": f"127.0.0.1:{server.port}"} | (changes or {}))

    return behind


# A proxy that gathers bytes before it sends them on makes push pointless.
def test_events_arrive_at_once_behind_the_recommended_nginx(serve, behind):
    server = serve(heartbeat=600)
    proxy = behind(server)
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={server.token('a')}")
    for number in range(20):
        # Nothing follows this event: whatever holds it back would hold it back for ever.
        assert publish_through(server, proxy, "a", "tick", str(number)) == 1
        assert events.event() == ("tick", str(number))


# The proxy's limits are for strangers: the largest honest request has to pass them.
def test_the_longest_token_and_the_largest_submission_pass_the_recommended_nginx(
    serve, behind
):
    server = serve()
    proxy = behind(server)
    topics = [f"{number:03}-{'x' * 150}" for number in range(18)]
    token = server.token(*topics)
    assert 3800 < len(token) <= 4096
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={token}")
    data = "y" * 11_900
    assert 16_000 < len(server.submission((topics[-1], "big", data))) <= 16_384
    assert publish_through(server, proxy, topics[-1], "big", data) == 1
    assert events.event() == ("big", data)


# Someone reads the page for an hour and nothing happens: the stream must still be there then.
def test_heartbeats_keep_an_idle_stream_open_past_the_timeout_of_nginx(serve, behind):
    short = {"proxy_read_timeout 60s": "proxy_read_timeout 2s"}
    server = serve(heartbeat=1)
    proxy = behind(server, short)
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={server.token('a')}")
    begin = time.monotonic()
    while time.monotonic() < begin + 5:
        events.frame()
    assert server.publish("a", "late", "") == 1
    assert events.event() == ("late", "")


# What the test above would look like if heartbeats did nothing.
def test_without_heartbeats_nginx_cuts_an_idle_stream(serve, behind):
    server = serve(heartbeat=600)
    proxy = behind(server, {"proxy_read_timeout 60s": "proxy_read_timeout 2s"})
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={server.token('a')}")
    assert events.ended.wait(DEADLINE)


# curl's HTTP/2 is another implementation than Python's.
def test_curl_reads_and_submits_over_http2(serve, behind, start):
    server = serve()
    proxy = behind(server)
    curl = [tool("curl"), "--no-progress-meter", "--http2", "--cacert", proxy.cert]
    reader = start(Process, [*curl, "-iN", f"{proxy.url}/events?token={server.token('a')}"])
    reader.find(r"^HTTP/2 200")
    reader.find(r"^retry: ")
    body = server.submission(("a", "hello", "over HTTP/2"))
    sent = subprocess.run(
        [*curl, "--data-binary", "@-", f"{proxy.url}/submit"],
        input=body, capture_output=True, text=True, timeout=DEADLINE,
    )
    assert '"deliveries": 1' in sent.stdout or '"deliveries":1' in sent.stdout, sent
    reader.find(r"^data: over HTTP/2")


OPEN_STREAMS = """
    window.streams = [];
    window.heard = 0;
    for (let i = 0; i < arguments[1]; i++) {
        const stream = new EventSource(arguments[0]);
        stream.addEventListener("tick", () => window.heard++);
        window.streams.push(stream);
    }
"""
COUNT_OPEN = "return window.streams.filter((stream) => stream.readyState === 1).length"


# A user with a dozen tabs: with HTTP/1.1 the browser gives an address six connections, and every
# further tab waits for ever.
def test_http2_lifts_the_six_connection_limit_of_browsers(serve, behind, chrome):
    server = serve()
    proxy = behind(server)
    chrome.get(f"{proxy.url}/ping")
    chrome.execute_script(OPEN_STREAMS, f"{proxy.url}/events?token={server.token('a')}", 12)
    until(lambda: chrome.execute_script(COUNT_OPEN) == 12, "all 12 streams open")
    assert server.publish("a", "tick", "") == 12
    until(lambda: chrome.execute_script("return window.heard") == 12, "all 12 streams heard it")


# The limit that the test above is about is real.
def test_http1_gives_a_browser_six_streams(serve, chrome):
    server = serve()
    chrome.get(f"{server.url}/ping")
    chrome.execute_script(OPEN_STREAMS, f"{server.url}/events?token={server.token('a')}", 8)
    until(lambda: chrome.execute_script(COUNT_OPEN) == 6, "six streams open")
    chrome.execute_script("window.streams.find((stream) => stream.readyState === 1).close()")
    until(lambda: server.publish("a", "tick", "") == 6, "the seventh takes the free place")
    assert chrome.execute_script(COUNT_OPEN) <= 6


def greet(proxy):
    """A TLS connection of an attacker's, who writes what he likes."""
    raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=DEADLINE)
    return proxy.tls.wrap_socket(raw, server_hostname="127.0.0.1")


def send_until_refused(connection, head, more, pause=0, limit=64 << 20):
    """Sends `more` again and again until there is an answer: its status, or None for a close
    without one. nginx goes on reading for a while after it, so as not to cut the answer off."""
    sent, answer, end = 0, None, time.monotonic() + DEADLINE
    try:
        connection.sendall(head)
        while answer is None:
            assert sent < limit and time.monotonic() < end, f"took {sent} bytes without a word"
            connection.settimeout(DEADLINE)
            connection.sendall(more)
            sent += len(more)
            connection.settimeout(pause)
            try:
                answer = connection.recv(64)
            except (TimeoutError, ssl.SSLWantReadError):
                pass
    except OSError:
        answer = answer or b""
    status = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return status and int(status[1])


def passed_on(proxy):
    """The lines of the access log that tell of a request given to the server behind."""
    return [line for line in proxy.log("sse-access.log").splitlines() if "upstream=1" in line]


# An endless header line or an endless number of them. Neither reaches the server, and nginx itself
# keeps but a few kilobytes.
def test_header_bomb_is_stopped_by_the_proxy(serve, behind):
    server = serve()
    proxy = behind(server)
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={server.token('a')}")
    before = server.rss()
    bombs = {
        "request line": (b"GET /events?token=", b"A" * 65536),
        "header": (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: ", b"A" * 65536),
        "headers": (b"GET /ping HTTP/1.1\r\nHost: a\r\n", b"X: AAAAAAAAAAAA\r\n" * 4096),
    }
    for name, (head, more) in bombs.items():
        for _ in range(10):
            with greet(proxy) as connection:
                status = send_until_refused(connection, head, more)
            assert status in (None, 400, 414, 431), f"{name}: {status}"
    assert server.rss() - before < 4 << 20
    # The server behind has seen nobody but the one honest subscriber.
    assert server.publish("a", "still", "here") == 1
    assert events.event() == ("still", "here")
    assert passed_on(proxy) == []


# A body over the limit, and one that never ends: neither takes a connection of the server.
def test_body_bombs_are_stopped_by_the_proxy(serve, behind):
    server = serve()
    proxy = behind(server, {"client_body_timeout 10s": "client_body_timeout 1s"})
    post = b"POST /submit HTTP/1.1\r\nHost: a\r\n"
    for head in (b"Content-Length: 16385\r\n\r\n", b"Content-Length: 99999999999999\r\n\r\n"):
        with greet(proxy) as connection:
            connection.sendall(post + head)
            assert connection.recv(64).startswith(b"HTTP/1.1 413")
    with greet(proxy) as connection:
        chunks = b"1000\r\n" + b"A" * 4096 + b"\r\n"
        head = post + b"Transfer-Encoding: chunked\r\n\r\n"
        assert send_until_refused(connection, head, chunks) in (None, 413)
    with greet(proxy) as connection:
        connection.sendall(post + b"Content-Length: 1000\r\n\r\nA")
        # A stalled body: nginx gives up on it, with or without a word.
        assert connection.recv(64)[:12] in (b"", b"HTTP/1.1 408")
    assert passed_on(proxy) == []


# A sender that drips a byte now and then never trips a timeout on single reads. nginx's is on the
# whole head.
def test_dripped_headers_are_stopped_by_the_proxy(serve, behind):
    proxy = behind(serve(), {"client_header_timeout 10s": "client_header_timeout 1s"})
    with greet(proxy) as connection:
        head = b"GET /ping HTTP/1.1\r\nHost: a\r\nX: "
        assert send_until_refused(connection, head, b"A", pause=0.1) in (None, 408)
    assert passed_on(proxy) == []


# nginx never passes such a line on.
@pytest.mark.parametrize("version", ["2.0", "3.0"])
def test_an_http2_request_line_is_stopped_by_the_proxy(serve, behind, version):
    server = serve()
    proxy = behind(server)
    with greet(proxy) as connection:
        connection.sendall(f"GET /ping HTTP/{version}\r\nHost: a\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 505 HTTP Version Not Supported" in answer
    assert passed_on(proxy) == []
    assert server.publish("a", "", "", url=server.url) == 0


# One address must not take every stream there is.
def test_one_address_gets_a_limited_number_of_streams(serve, behind):
    server = serve()
    proxy = behind(server, {"sse_per_address 100": "sse_per_address 3"})
    url = f"{proxy.url}/events?token={server.token('a')}"
    streams = [subscribe_http2(proxy, url) for _ in range(3)]
    # Closed unanswered: any answer would end a page's EventSource for good.
    with pytest.raises(httpx.RemoteProtocolError):
        subscribe_http2(proxy, url)
    streams[0].close()

    def room_again():
        try:
            return subscribe_http2(proxy, url)
        except httpx.RemoteProtocolError:
            return None

    until(room_again, "a place that was left is given again")


# Whoever reads the logs must not be able to read other people's events.
def test_no_token_is_written_to_the_logs_of_the_proxy(serve, behind):
    server = serve()
    proxy = behind(server)
    token = server.token("a")
    stream = subscribe(f"{proxy.url}/events?token={token}", proxy.tls)
    server.publish("a", "", "x")
    assert stream.event() == ("message", "x")
    stream.close()
    server.stop()
    # Nor by what nginx has to say of a server that is away.
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{proxy.url}/events?token={token}", verify=proxy.cert, timeout=DEADLINE)
    until(lambda: " 444 " in proxy.log("sse-access.log"), "the refusal is logged")
    for name in ("sse-access.log", "sse-error.log", "access.log", "error.log"):
        assert token[:20] not in proxy.log(name), name


# Only backends submit.
def test_submissions_from_elsewhere_are_refused_by_the_proxy(serve, behind):
    server = serve()
    proxy = behind(server, {"allow 127.0.0.1": "allow 192.0.2.1"})
    with pytest.raises(requests.HTTPError, match="403"):
        publish_through(server, proxy, "a", "", "x")


PLAIN = """
server {
    listen 127.0.0.1:%d;
    location / { proxy_pass http://127.0.0.1:%d; }
    location /push/ { proxy_pass http://127.0.0.1:%d/; }
    %s
}
"""


@pytest.fixture
def plain(nginx):
    """plain(server, more="") runs the proxy that people write first: HTTP/1.0 to the server,
    buffering on, everything at its default."""

    def plain(server, more=""):
        port = free_port()
        proxy = nginx(PLAIN % (port, server.port, server.port, more))
        proxy.url = f"http://127.0.0.1:{port}"
        return proxy

    return plain


# Nobody reads the README before they try it behind the proxy that they have.
@pytest.mark.parametrize("path", ["", "/push"])
def test_events_arrive_at_once_behind_a_plain_proxy_pass(serve, plain, path):
    server = serve(heartbeat=600)
    proxy = plain(server)
    events = subscribe(f"{proxy.url}{path}/events?token={server.token('a')}")
    for number in range(5):
        assert server.publish("a", "tick", str(number), proxy.url + path) == 1
        assert events.event() == ("tick", str(number))


# A proxy that compresses everything gathers bytes too, as compression is better that way.
def test_events_arrive_at_once_behind_a_proxy_that_compresses_everything(serve, plain):
    server = serve(heartbeat=600)
    proxy = plain(server, "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 0;")
    unzip = zlib.decompressobj(wbits=31).decompress  # fails where the stream is not compressed
    url = f"{proxy.url}/events?token={server.token('a')}"
    events = subscribe(url, decode=unzip, **{"Accept-Encoding": "gzip"})
    for number in range(5):
        assert server.publish("a", "tick", str(number)) == 1
        assert events.event() == ("tick", str(number))


# nginx's default timeout is 60 s, the default heartbeat comes every 15 s; here both are shorter.
def test_heartbeats_keep_an_idle_stream_open_behind_a_plain_proxy_pass(serve, plain):
    server = serve(heartbeat=1)
    proxy = plain(server, "proxy_read_timeout 2s;")
    events = subscribe(f"{proxy.url}/events?token={server.token('a')}")
    begin = time.monotonic()
    while time.monotonic() < begin + 5:
        events.frame()
    assert server.publish("a", "late", "") == 1
    assert events.event() == ("late", "")


# A cookie that any page of the same host may set. A server that takes field values for ASCII alone
# would refuse this browser for as long as the cookie lives.
def test_a_cookie_beyond_ascii_is_no_reason_to_refuse_a_browser(serve, plain, chrome):
    server = serve()
    proxy = plain(server)
    chrome.get(f"{proxy.url}/ping")
    chrome.execute_script("document.cookie = 'name=José'")
    chrome.execute_script(OPEN_STREAMS, f"{proxy.url}/events?token={server.token('a')}", 1)
    until(lambda: chrome.execute_script(COUNT_OPEN) == 1, "the stream opens")
    assert server.publish("a", "tick", "") == 1
    until(lambda: chrome.execute_script("return window.heard") == 1, "the event arrives")
    chrome.delete_all_cookies()


# A client that leaves must not stay behind as a stream between nginx and the server.
def test_a_client_that_leaves_the_proxy_is_gone_from_the_server(serve, plain):
    server = serve(heartbeat=1)
    proxy = plain(server)
    events = subscribe(f"{proxy.url}/events?token={server.token('a')}")
    assert server.publish("a", "", "x") == 1
    assert events.event() == ("message", "x")
    events.close()
    until(lambda: server.publish("a", "", "y") == 0, "the stream has ended at the server")
