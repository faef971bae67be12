"""Behind Debian's HAProxy and Caddy, with the configurations in tests/haproxy and tests/caddy. What
browsers do behind them when the server is away or full is in test_outages.py."""

import ssl

import httpx
import pytest
import requests
from conftest import DEADLINE, publish_through, subscribe, subscribe_http2, until


@pytest.fixture(params=["nginx", "haproxy", "caddy"])
def behind(request):
    """behind(server) puts a proxy in front of a server, one kind after the other."""
    if request.param == "nginx":
        recommended = request.getfixturevalue("recommended")
        return lambda server: recommended({"127.0.0.1:8000": f"127.0.0.1:{server.port}"})
    return request.getfixturevalue(request.param)


# A proxy that gathers bytes before it sends them on makes push pointless.
def test_events_arrive_at_once_behind_each_proxy(serve, behind):
    server = serve(heartbeat=600)
    proxy = behind(server)
    streams = [
        subscribe_http2(proxy, f"{proxy.url}/events?token={server.token('a')}"),
        subscribe(f"{proxy.url}/events?token={server.token('a')}", proxy.tls),
    ]
    for number in range(10):
        # Nothing follows this event: whatever holds it back would hold it back for ever.
        assert publish_through(server, proxy, "a", "tick", str(number)) == 2
        assert [stream.event() for stream in streams] == 2 * [("tick", str(number))]


# The proxy's limits are for strangers: the largest honest request has to pass them.
def test_the_longest_token_and_the_largest_submission_pass_each_proxy(serve, behind):
    server = serve()
    proxy = behind(server)
    topics = [f"{number:03}-{'x' * 150}" for number in range(18)]
    token = server.token(*topics)
    assert 3800 < len(token) <= 4096
    events = subscribe_http2(proxy, f"{proxy.url}/events?token={token}")
    data = "y" * 11_900
    assert 15_900 < len(server.submission((topics[-1], "big", data))) <= 16_384
    assert publish_through(server, proxy, topics[-1], "big", data) == 1
    assert events.event() == ("big", data)


def statuses(server, proxy):
    """What `/events` and `/submit` answer, over HTTP/1.1 and HTTP/2; None is a broken connection."""
    found = {}
    for http2 in (False, True):
        tls = ssl.create_default_context(cafile=proxy.cert)
        with httpx.Client(http1=not http2, http2=http2, verify=tls, timeout=DEADLINE) as client:
            for name, ask in {
                "stream": lambda: client.get(
                    f"{proxy.url}/events?token={server.token('a')}",
                    headers={"Accept": "text/event-stream"},
                ),
                "submission": lambda: client.post(
                    f"{proxy.url}/submit", content=server.submission(("a", "", ""))
                ),
            }.items():
                try:
                    answer = ask().status_code
                except httpx.TransportError:
                    answer = None
                found.setdefault(name, []).append(answer)
    return found


# Any answer but 200 would end a page's stream for good. A publisher has to read that it failed.
def test_a_stream_is_left_unanswered_and_a_submission_is_not(serve, behind):
    server = serve(max_subscribers=1)
    proxy = behind(server)
    taken = subscribe(f"{server.url}/events?token={server.token('b')}")
    assert statuses(server, proxy) == {"stream": [None, None], "submission": [200, 200]}
    taken.close()
    server.stop()
    found = statuses(server, proxy)
    assert found["stream"] == [None, None]
    assert set(found["submission"]) <= {502, 503}


# Whoever reads the logs must not be able to read other people's events.
def test_no_token_is_written_to_the_logs_of_each_proxy(serve, behind, tmp_path):
    server = serve()
    proxy = behind(server)
    token = server.token("a")
    for stream in (
        subscribe(f"{proxy.url}/events?token={token}", proxy.tls),
        subscribe_http2(proxy, f"{proxy.url}/events?token={token}"),
    ):
        stream.close()
        until(stream.ended.is_set, "the stream has ended")
    # A stream that breaks off, and one that cannot begin, are what proxies complain of.
    stream = subscribe(f"{proxy.url}/events?token={token}", proxy.tls)
    server.kill()
    assert stream.ended.wait(DEADLINE)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{proxy.url}/events?token={token}", verify=proxy.cert, timeout=DEADLINE)
    publish = f"{proxy.url}/submit"
    assert requests.post(publish, data="x", verify=proxy.cert, timeout=DEADLINE).status_code >= 502

    def logs():
        files = [path for path in tmp_path.rglob("*") if "log" in path.name and path.is_file()]
        return "".join(proxy.lines) + "".join(path.read_text() for path in files)

    until(lambda: logs().count("/events") >= 4 and "/submit" in logs(), "all of it is logged")
    assert token[:20] not in logs()


# Only backends submit, and streams and pings are all there is for anyone else.
def test_each_proxy_passes_on_only_what_it_has_to(serve, behind):
    server = serve()
    proxy = behind(server)
    answer = requests.get(f"{proxy.url}/ping", verify=proxy.cert, timeout=DEADLINE)
    assert (answer.status_code, answer.text) == (200, "ok\n")
    for path in ("/", "/metrics", "/events/", "/submit/x"):
        answer = requests.get(f"{proxy.url}{path}", verify=proxy.cert, timeout=DEADLINE)
        assert answer.status_code in (403, 404), path
    # Who goes on sending may see no more than the end of the connection.
    try:
        long = requests.post(
            f"{proxy.url}/submit", data="x" * 20_000, verify=proxy.cert, timeout=DEADLINE
        )
        assert long.status_code in (413, 502)
    except requests.ConnectionError:
        pass


# A client that leaves must not stay behind as a stream between the proxy and the server.
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
def test_a_client_that_leaves_each_proxy_is_gone_from_the_server(serve, behind, version):
    server = serve(heartbeat=1)
    proxy = behind(server)
    url = f"{proxy.url}/events?token={server.token('a')}"
    events = subscribe_http2(proxy, url) if version == "HTTP/2" else subscribe(url, proxy.tls)
    assert server.publish("a", "", "x") == 1
    assert events.event() == ("message", "x")
    events.close()
    until(lambda: server.publish("a", "", "y") == 0, "the stream has ended at the server")
