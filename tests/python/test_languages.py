"""The backends in PHP, Ruby and Go that are there to be copied, against the real server."""

import json
import os
import subprocess

import msgpack
import pytest
import requests
from branca import Branca
from conftest import BINARY, DEADLINE, TARGET, TESTS, Process, free_port, missing, subscribe, tool

TEXTS = ["", "plain", "Zwölf Boxkämpfer 🥊, 日本語", "two\nlines", "\n", "x" * 9000]


def vectors(name):
    return json.loads((TESTS / "vectors" / name).read_text())["vectors"]


def checked(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=110, **options)


def php(port):
    program = tool("php")
    modules = checked(program, "-m").stdout.split()
    for module in ("curl", "gmp", "msgpack", "sodium"):
        if module not in modules:
            missing(f"PHP has no {module}: apt install php-{module}")
    return [program, "-S", f"127.0.0.1:{port}", TESTS / "php" / "backend.php"]


def ruby(port):
    program = tool("ruby")
    found = checked(program, "-e", "require 'msgpack'; require 'rbnacl'; require 'webrick'")
    if found.returncode:
        missing(f"Ruby lacks a library: apt install ruby-msgpack ruby-rbnacl: {found.stderr}")
    return [program, TESTS / "ruby" / "backend.rb"]


def go(port):
    program, folder = tool("go"), TARGET / "go"
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    # Debian's libraries, no network, and nothing left elsewhere.
    libraries = "/usr/share/gocode"
    for library in ("golang.org/x/crypto", "github.com/vmihailenco/msgpack/v5"):
        if not os.path.isdir(f"{libraries}/src/{library}"):
            missing(f"no {library} under {libraries}: see tests/tools.sh for the packages")
    env = os.environ | {"GO111MODULE": "off", "GOPATH": libraries, "GOFLAGS": "", "CGO_ENABLED": "0"}
    env |= {"GOCACHE": str(folder / "cache"), "GOTMPDIR": str(folder / "tmp"), "GOTELEMETRY": "off"}
    built = checked(program, "build", "-o", folder / "backend", TESTS / "go" / "backend.go", env=env)
    assert built.returncode == 0, built.stderr
    return [folder / "backend"]


@pytest.fixture(params=[php, ruby, go], ids=["php", "ruby", "go"])
def backend(request, start):
    """backend(server, secret) starts the backend of a language; its address."""

    def backend(server, secret=None):
        port = free_port()
        env = {"SSE_SECRET": secret or server.secret, "PUSH_URL": server.url, "PORT": str(port)}
        # As a browser would have it, whose address of the server is another.
        env |= {"PUSH_PUBLIC_URL": server.url.replace("127.0.0.1", "localhost")}
        process = start(Process, request.param(port), os.environ | env)
        url = f"http://127.0.0.1:{port}"
        process.wait_for(lambda: answers(url), "answering")
        return url

    return backend


def answers(url):
    try:
        return requests.get(f"{url}/events", allow_redirects=False, timeout=DEADLINE).status_code
    except requests.ConnectionError:
        return None


def redirected(url):
    """Where the backend sends a browser."""
    answer = requests.get(f"{url}/events", allow_redirects=False, timeout=DEADLINE)
    assert answer.status_code == 307, answer.text
    return answer.headers["Location"]


def post(url, text):
    answer = requests.post(f"{url}/news", data=text.encode(), timeout=DEADLINE)
    assert answer.status_code == 200, answer.text


# The whole flow: asked for a stream, sent to it with a fresh token, told something.
def test_a_backend_redirects_and_publishes(serve, backend):
    server = serve()
    url = backend(server)
    target = redirected(url)
    assert target.startswith(f"http://localhost:{server.port}/events?token=")
    events = subscribe(target.replace("localhost", "127.0.0.1"))
    for text in TEXTS:
        post(url, text)
        assert events.event() == ("message", text)
    # Another browser, another token.
    assert redirected(url) != target
    # What it cannot publish, it says; and goes on when it can.
    server.kill()
    answer = requests.post(f"{url}/news", data="lost", timeout=DEADLINE)
    assert answer.status_code == 502 and "not published" in answer.text
    server.again()
    events = subscribe(redirected(url).replace("localhost", "127.0.0.1"))
    post(url, "back again")
    assert events.event() == ("message", "back again")


# What a server with another secret says reaches whoever reads the backend's log.
def test_a_backend_says_why_it_is_refused(serve, backend):
    answer = requests.post(f"{backend(serve(), 'ab' * 32)}/news", data="x", timeout=DEADLINE)
    assert answer.status_code == 502 and "another SSE_SECRET" in answer.text


# Every secret that the vectors know, two of them while one is replaced: what the backend mints is
# opened by the server's command and by another library, and holds what it should.
def test_a_backend_mints_under_the_secrets_of_the_vectors(serve, backend):
    secrets = {vector["secret"] for vector in vectors("door.json")}
    secrets |= {vector["key"] for vector in vectors("branca.json") if len(vector["key"]) == 64}
    assert len(secrets) >= 3 and any("," in secret for secret in secrets)
    for secret in sorted(secrets):
        server = serve(secret=secret)
        url = backend(server, secret.replace(",", " , "))
        token = redirected(url).partition("token=")[2]
        payload = {"topics": ["news"]}
        assert msgpack.unpackb(Branca(secret.split(",")[0]).decode(token)) == payload
        opened = subprocess.run(
            [BINARY, "open", token], env={"SSE_SECRET": secret}, capture_output=True, text=True, timeout=DEADLINE
        )
        assert opened.returncode == 0 and "news" in opened.stdout, opened
        events = subscribe(f"{server.url}/events?token={token}")
        post(url, "x")
        assert events.event() == ("message", "x")
        server.kill()


# Each text that the vectors deliver is delivered so from each language.
def test_a_backend_publishes_the_texts_of_the_vectors(serve, backend):
    delivered = [
        data
        for vector in vectors("door.json")
        if vector["door"] == "/submit" and vector["status"] == 200
        for _, _, data in vector["delivers"]
    ]
    assert len(set(delivered)) >= 5
    server = serve()
    url = backend(server)
    events = subscribe(redirected(url).replace("localhost", "127.0.0.1"))
    for text in delivered:
        post(url, text)
        assert events.event() == ("message", text)


# Written to be copied, and so to be read.
@pytest.mark.parametrize("name", ["php/backend.php", "ruby/backend.rb", "go/backend.go", "node/backend.mjs"])
def test_a_backend_is_one_short_file(name):
    assert len((TESTS / name).read_text().splitlines()) <= 60
