"""What the Python tests share: the server, the demo, a reverse proxy and browsers, each as a real
process on a port of this machine, ended with the test. A missing tool skips its tests, with the
reason; under CI=true it fails them instead."""

import codecs
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgpack
import pytest
import requests
from branca import Branca

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TARGET = ROOT / "target"
BINARY = Path(os.environ.get("SSE_SERVER_BIN", TARGET / "debug" / "sse-server"))
# The same with the feature redis, in a directory of its own: `make test` builds both.
REDIS_BINARY = Path(os.environ.get("SSE_REDIS_BIN", TARGET / "redis" / "debug" / "sse-server"))
# What browsers, drivers and pytest itself leave behind while they run.
SCRATCH = TARGET / "tmp" / "python"
# For each wait on something that is about to happen. Generous: the machine may be busy.
DEADLINE = 20
# This machine under a name that browsers trust no more than any other: its pages have plain HTTP.
PLAIN_HOST = "plain.test"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Nothing is written to the system's temporary folder, by whatever these tests start."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(SCRATCH)
    if config.option.basetemp is None:
        config.option.basetemp = str(TARGET / "tmp" / "pytest")


def pytest_unconfigure():
    shutil.rmtree(SCRATCH, ignore_errors=True)


def missing(what):
    """Ends a test that cannot run here: a skip that says why, but a failure under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"under CI nothing is skipped: {what}", pytrace=False)
    pytest.skip(what)


def tool(name, *others):
    """The path of a program, or the end of the test."""
    for candidate in (name, *others):
        if found := shutil.which(str(candidate)):
            return found
    missing(f"{name} is not installed")


def until(condition, what, within=DEADLINE):
    """Waits for a condition and returns what it returned."""
    end = time.monotonic() + within
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"not within {within} s: {what}"
        time.sleep(0.02)


def free_port():
    """A port to listen on now, and again after a restart. Below the range from which the system
    takes the ports of outgoing connections: one of those could otherwise sit on it meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Process:
    """A child whose output is always drained, and shown where its test fails."""

    def __init__(self, command, env=None, cwd=None):
        self.name = Path(command[0]).name
        self.lines = []
        self.child = subprocess.Popen(
            [str(part) for part in command],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._drain, daemon=True)
        self.reader.start()

    def _drain(self):
        for line in self.child.stdout:
            self.lines.append(line)
            sys.stdout.write(f"[{self.name}] {line}")  # shown by pytest with a failure

    def wait_for(self, condition, what, within=DEADLINE):
        """As `until`, but ends at once where the process has ended."""

        def check():
            ended = self.child.poll()
            if value := condition():
                return value
            assert ended is None, f"{self.name} ended with {ended}: {''.join(self.lines)}"

        return until(check, f"{self.name}: {what}", within)

    def find(self, pattern):
        """Waits for a line of output that matches."""

        def match():
            return next(filter(None, (re.search(pattern, line) for line in list(self.lines))), None)

        return self.wait_for(match, f"printing {pattern!r}")

    def rss(self):
        """Bytes resident."""
        pages = Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def kill(self):
        """As a crash: no warning, no farewell. Its children (nginx has some) go with it."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self._wait()

    def stop(self, within=DEADLINE):
        """SIGTERM; the exit status."""
        if self.child.poll() is None:
            self.child.terminate()
        return self._wait(within)

    def _wait(self, within=DEADLINE):
        try:
            status = self.child.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.reader.join(5)
        return status


def redis_binary():
    """The path of the server with the feature redis, or the end of the test."""
    if not REDIS_BINARY.is_file():
        build = "cargo build --features redis --target-dir target/redis"
        missing(f"no server binary at {REDIS_BINARY}: run `{build}`")
    return REDIS_BINARY


class SseServer(Process):
    """The binary under test, with its secret and the backend's side of the protocol."""

    def __init__(self, secret=None, port=0, **settings):
        self.secret = secret or secrets.token_hex(32)
        binary = REDIS_BINARY if "redis" in settings else BINARY
        env = {name: value for name, value in os.environ.items() if not name.startswith("SSE_")}
        env |= {"SSE_SECRET": self.secret, "SSE_LISTEN": f"127.0.0.1:{port}"}
        env |= {f"SSE_{name.upper()}": str(value) for name, value in settings.items()}
        super().__init__([binary], env)
        self.port = int(self.find(r"listening on 127\.0\.0\.1:(\d+)")[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.branca = Branca(self.secret.split(",")[0])

    def token(self, *topics, timestamp=None):
        return self.branca.encode(msgpack.packb({"topics": list(topics)}), timestamp)

    def submission(self, *events):
        names = ("topic", "event", "data")
        events = [dict(zip(names, event)) for event in events]
        return self.branca.encode(msgpack.packb({"events": events}))

    def publish(self, topic, event, data, url=None, **options):
        """Submits one event, here or at another address; how many streams it was queued for."""
        answer = requests.post(
            f"{url or self.url}/submit",
            data=self.submission((topic, event, data)),
            timeout=DEADLINE,
            **options,
        )
        answer.raise_for_status()
        return answer.json()["deliveries"]


class Redis(Process):
    """Debian's redis-server, which keeps nothing on disk."""

    def __init__(self, folder):
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        settings = {"--port": self.port, "--bind": "127.0.0.1", "--save": "", "--dir": folder}
        command = [tool("redis-server"), *(part for pair in settings.items() for part in pair)]
        super().__init__(command)
        self.find("Ready to accept connections")


class Reader:
    """Reads a stream of bytes on a thread, so that each wait has a deadline. `open_stream` returns
    the response's chunks as they arrive, and a way to close it."""

    def __init__(self, open_stream):
        self.frames = queue.Queue()
        self.ended = threading.Event()
        self.whole = False  # ended, and not in the middle of anything
        self.close = lambda: None
        opened = queue.Queue()

        def read():
            try:
                chunks, self.close = open_stream()
                opened.put(None)
            except Exception as error:  # handed to whoever asked for the stream
                opened.put(error)
                return
            decoder, rest, frame = codecs.getincrementaldecoder("utf-8")(), "", []
            try:
                for chunk in chunks:
                    *lines, rest = (rest + decoder.decode(chunk)).split("\n")
                    for line in lines:
                        if line:
                            frame.append(line)
                        # No blank line follows a comment or a delay. All else is an event, and ends
                        # with one; one without an event would be an empty frame.
                        if not line or len(frame) == 1 and line.startswith((":", "retry:")):
                            self.frames.put("\n".join(frame))
                            frame = []
                self.whole = not rest and not frame
            except Exception as error:
                print(f"stream ended: {type(error).__name__}: {error}")
            self.ended.set()

        threading.Thread(target=read, daemon=True).start()
        if error := opened.get(timeout=DEADLINE):
            raise error

    def frame(self, within=DEADLINE):
        """The next frame, comments and `retry:` included."""
        return self.frames.get(timeout=within)

    def event(self, within=DEADLINE):
        """The next event as (name, data)."""
        end = time.monotonic() + within
        while True:
            lines = self.frame(max(0.01, end - time.monotonic())).split("\n")
            assert lines != [""], "a blank line without an event"
            data = [line[6:] for line in lines if line.startswith("data: ")]
            if data:
                names = [line[7:] for line in lines if line.startswith("event: ")]
                return (names or ["message"])[-1], "\n".join(data)


def subscribe(url, tls=None, decode=bytes, **headers):
    """A stream over HTTP/1.1; fails where the answer is not 200."""

    def open_stream():
        parts = urlsplit(url)
        kind = partial(HTTPSConnection, context=tls) if tls else HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=DEADLINE)
        connection.connect()
        hang_up = partial(connection.sock.shutdown, socket.SHUT_RDWR)
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        response = connection.getresponse()
        assert response.status == 200, f"{response.status} {response.read()}"
        return map(decode, iter(lambda: response.read1(65536), b"")), hang_up

    return Reader(open_stream)


def subscribe_http2(proxy, url):
    """A stream over HTTP/2, which urllib3 does not speak."""

    def open_stream():
        # In a context of its own: it is told what to offer, and no other client is to offer it.
        tls = ssl.create_default_context(cafile=proxy.cert)
        client = httpx.Client(http2=True, verify=tls, timeout=DEADLINE)
        response = client.send(client.build_request("GET", url), stream=True)
        response.raise_for_status()
        assert response.http_version == "HTTP/2"
        connection = response.extensions["network_stream"].get_extra_info("socket")
        return response.iter_raw(), partial(connection.shutdown, socket.SHUT_RDWR)

    return Reader(open_stream)


def publish_through(server, proxy, topic, event, data):
    return server.publish(topic, event, data, proxy.url, verify=proxy.cert)


class Nginx(Process):
    """Debian's nginx with a configuration of ours, under a directory of its own."""

    def __init__(self, prefix, http):
        (prefix / "logs").mkdir(parents=True)
        self.prefix = prefix
        self.write(http)
        nginx = tool("nginx", "/usr/sbin/nginx")
        command = [nginx, "-p", prefix, "-e", prefix / "logs/start.log", "-c", prefix / "nginx.conf"]
        check = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert check.returncode == 0, check.stderr
        super().__init__(command)
        self.port = int(re.search(r"listen (?:127\.0\.0\.1:)?(\d+)", http)[1])
        until(self.accepts, "nginx accepting connections")

    def write(self, http):
        # As root it would else switch to a user that cannot enter the directory.
        user = "user root;" if os.geteuid() == 0 else ""
        temp = "\n".join(
            f"    {kind}_temp_path temp_{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.prefix / "nginx.conf").write_text(f"""{user}
daemon off;
pid nginx.pid;
worker_processes 2;
error_log logs/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log logs/access.log;
{temp}
{http}
}}
""")

    def accepts(self):
        assert self.child.poll() is None, self.log("error.log")
        return answers(self.port)

    def kill(self):
        with suppress(subprocess.TimeoutExpired):
            self.child.terminate()  # it ends its workers
            self.child.wait(5)
        super().kill()

    def log(self, name):
        path = self.prefix / "logs" / name
        return path.read_text() if path.exists() else ""


def changed(text, changes):
    """A configuration with other addresses and names. A test must not go on about a setting that is
    no longer there."""
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in the configuration"
        text = text.replace(old, str(new))
    return text


class Haproxy(Process):
    """tests/haproxy/sse-server.cfg in front of a server."""

    def __init__(self, folder, server, certificate):
        folder.mkdir()
        port, (cert, key) = free_port(), certificate
        (folder / "both.pem").write_text(cert.read_text() + key.read_text())
        config = changed(
            (TESTS / "haproxy" / "sse-server.cfg").read_text(),
            {
                "bind :443": f"bind 127.0.0.1:{port}",
                "/etc/haproxy/push.example.com.pem": folder / "both.pem",
                "127.0.0.1:8000": f"127.0.0.1:{server.port}",
                "log /dev/log local0": "log stdout format raw local0",
                "    user haproxy\n    group haproxy\n": "",
                "maxconn 20000": "maxconn 1000",
            },
        )
        (folder / "haproxy.cfg").write_text(config)
        super().__init__([tool("haproxy", "/usr/sbin/haproxy"), "-db", "-f", folder / "haproxy.cfg"])
        self.port, self.url = port, f"https://127.0.0.1:{port}"
        self.tls, self.cert = ssl.create_default_context(cafile=cert), cert
        self.wait_for(partial(answers, port), "accepting connections")


class Caddy(Process):
    """tests/caddy/Caddyfile in front of a server."""

    def __init__(self, folder, server, certificate):
        folder.mkdir()
        port, (cert, key) = free_port(), certificate
        config = changed(
            (TESTS / "caddy" / "Caddyfile").read_text(),
            {
                # Neither an administrator's port nor one for http, which others may use.
                "{\n\tservers": "{\n\tadmin off\n\tauto_https disable_redirects\n\tservers",
                "push.example.com {": f"https://127.0.0.1:{port} {{\n\ttls {cert} {key}",
                "127.0.0.1:8000": f"127.0.0.1:{server.port}",
                "/var/log/caddy": folder,
            },
        )
        (folder / "Caddyfile").write_text(config)
        command = [tool("caddy"), "run", "--adapter", "caddyfile", "--config", folder / "Caddyfile"]
        home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        super().__init__(command, os.environ | home)
        self.log = folder / "sse-access.log"
        self.port, self.url = port, f"https://127.0.0.1:{port}"
        self.tls, self.cert = ssl.create_default_context(cafile=cert), cert
        self.wait_for(partial(answers, port), "accepting connections")


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Site:
    """An application on a port of its own, in this process. Each page of it is a function of the
    request's headers that returns a status, header fields and a text."""

    def __init__(self):
        self.pages, self.asked = {}, []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0]
                site.asked.append(path)
                page = site.pages.get(path, lambda _: (404, {}, ""))
                status, fields, text = page(self.headers)
                self.send_response(status)
                for name, value in ({"Content-Type": "text/html"} | fields).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        site = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    def kill(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(start):
    """site() starts an application, at first without pages."""
    return lambda: start(Site)


@pytest.fixture
def start():
    """start(Class, …) makes a process that ends with the test."""
    processes = []

    def start(kind, *args, **kwargs):
        process = kind(*args, **kwargs)
        processes.append(process)
        return process

    yield start
    for process in reversed(processes):
        process.kill()


@pytest.fixture
def haproxy(start, tmp_path, certificate):
    """haproxy(server) puts the recommended HAProxy in front of a server."""
    tool("haproxy", "/usr/sbin/haproxy")
    return lambda server: start(Haproxy, tmp_path / "haproxy", server, certificate)


@pytest.fixture
def caddy(start, tmp_path, certificate):
    """caddy(server) puts the recommended Caddy in front of a server."""
    tool("caddy")
    return lambda server: start(Caddy, tmp_path / "caddy", server, certificate)


@pytest.fixture
def serve(start):
    """serve(heartbeat=1, …) starts the server with these settings; `.again()` does so again."""
    if not BINARY.is_file():
        missing(f"no server binary at {BINARY}: run `cargo build`")

    def serve(**settings):
        server = start(SseServer, **settings)
        same = {"secret": server.secret, "port": server.port} | settings
        # After it has ended: another in its place.
        server.again = lambda **changed: start(SseServer, **(same | changed))
        return server

    return serve


@pytest.fixture
def instances(start, serve, tmp_path):
    """instances(3, heartbeat=1, …) starts so many servers that are one, over a Redis of their own."""
    redis_binary()

    def instances(count, **settings):
        settings["redis"] = start(Redis, tmp_path).url
        first = serve(**settings)
        return [first, *(serve(secret=first.secret, **settings) for _ in range(count - 1))]

    return instances


@pytest.fixture
def nginx(start, tmp_path):
    """nginx(http) starts nginx with these directives in its http block."""
    tool("nginx", "/usr/sbin/nginx")
    return lambda http: start(Nginx, tmp_path / "nginx", http)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate made here, for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    command = [tool("openssl"), *command.split()]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def recommended(nginx, certificate):
    """recommended({old: new}) runs tests/nginx/sse-server.conf with these changes; the upstream
    may be another one, as where there is a standby."""

    def recommended(changes, upstream=None):
        port = free_port()
        cert, key = certificate
        changes = {
            "listen 443": f"listen 127.0.0.1:{port}",
            "push.example.com;": "localhost;",
            "/etc/ssl/certs/push.example.com.pem": cert,
            "/etc/ssl/private/push.example.com.key": key,
            "/var/log/nginx/": "logs/",
        } | changes
        http = (TESTS / "nginx" / "sse-server.conf").read_text()
        if upstream:
            http, found = re.subn(r"(?m)^upstream sse_server \{.*?^\}", upstream, http, flags=re.S)
            assert found == 1
        proxy = nginx(changed(http, changes))
        proxy.url = f"https://127.0.0.1:{port}"
        proxy.tls = ssl.create_default_context(cafile=cert)
        proxy.cert = cert
        return proxy

    return recommended


class Demo(Process):
    """tests/demo/app.py in front of a push server."""

    def __init__(self, server, port=0, **env):
        env = os.environ | {
            "SSE_SECRET": server.secret,
            "PUSH_URLS": server.url,
            "DEMO_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
        } | env
        super().__init__([sys.executable, TESTS / "demo" / "app.py"], env)
        self.url = self.find(r"Running on (http://127\.0\.0\.1:\d+)")[1]

    def add(self, text):
        answer = requests.post(f"{self.url}/items", json={"text": text}, timeout=DEADLINE)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture
def demo(start):
    """demo(server, **env) starts the demo's backend."""
    return lambda server, **env: start(Demo, server, **env)


def chromium(profile):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = tool("chromium")
    for argument in (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
        f"--window-size=900,760 --user-data-dir={profile}"
    ).split():
        options.add_argument(argument)
    options.add_argument(f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1")
    options.accept_insecure_certs = True
    service = webdriver.ChromeService(tool("chromedriver"))
    return webdriver.Chrome(options, service)


def firefox(profile):
    from selenium import webdriver

    options = webdriver.FirefoxOptions()
    options.binary_location = tool("firefox-esr", "firefox")
    options.add_argument("-headless")
    options.add_argument("--width=900")
    options.add_argument("--height=760")
    options.set_preference("network.dns.localDomains", PLAIN_HOST)
    options.accept_insecure_certs = True
    # Debian has no geckodriver; it is built with `cargo install geckodriver`.
    driver = tool("geckodriver", TARGET / "tools" / "bin" / "geckodriver")
    service = webdriver.FirefoxService(driver, log_output=str(profile / "geckodriver.log"))
    return webdriver.Firefox(options, service)


@pytest.fixture(scope="session")
def browsers(tmp_path_factory):
    """Each browser is started once, by the first test that needs it."""
    os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    started = {}

    def browser(kind):
        if kind not in started:
            started[kind] = kind(tmp_path_factory.mktemp(kind.__name__))
            started[kind].set_page_load_timeout(DEADLINE)
            started[kind].set_script_timeout(DEADLINE)
        return started[kind]

    yield browser
    for driver in started.values():
        driver.quit()


def closing_tabs(driver):
    yield driver
    first, *others = driver.window_handles
    for handle in others:
        driver.switch_to.window(handle)
        driver.close()
    driver.switch_to.window(first)
    driver.get("about:blank")  # ends the page's streams


@pytest.fixture
def chrome(browsers):
    """Headless Chromium with one empty tab."""
    yield from closing_tabs(browsers(chromium))


@pytest.fixture(params=[chromium, firefox], ids=["chromium", "firefox"])
def browser(browsers, request):
    """Each browser in turn."""
    yield from closing_tabs(browsers(request.param))


@pytest.fixture(scope="session")
def node_folder():
    """Where the npm packages are installed, with the scripts of tests/node beside them."""
    tool("node")
    folder, source = TARGET / "node", TESTS / "node"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "package-lock.json"
    fresh = lock.is_file() and lock.read_bytes() == (source / lock.name).read_bytes()
    for file in source.iterdir():
        shutil.copy(file, folder)
    if not (fresh and (folder / "node_modules").is_dir()):
        subprocess.run([tool("npm"), "ci"], cwd=folder, check=True, timeout=110)
    return folder


@pytest.fixture
def node(start, node_folder):
    """node(script, *arguments, **environment) runs a script of tests/node."""

    def node(script, *arguments, **env):
        command = [tool("node"), node_folder / script, *arguments]
        return start(Process, command, os.environ | env)

    return node
