"""What is shipped: the static binary and the image. The image is run as a container runs it, with
the system's own tools, so that no engine's helpers are in the way: process 1 of a namespace, and no
file but the image's."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tarfile
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import pytest
import requests
import yaml
from branca import Branca
from conftest import DEADLINE, ROOT, TARGET, Process, Reader, SseServer, free_port, missing
from conftest import subscribe, tool, until

USER = "65532:65532"
# The first build optimises everything.
pytestmark = pytest.mark.timeout(900)


def make(*target):
    """What it said. A first build takes minutes."""
    tool("cargo")
    done = subprocess.run([tool("make"), *target], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if "neither docker nor podman works" in done.stderr:
        missing("neither docker nor podman works here")
    assert done.returncode == 0
    return done.stdout


class Image:
    """The image as its engine hands it on: its configuration, and its layers unpacked."""

    def __init__(self, folder):
        said = make("image")
        engine = re.search(r"image sse-server, made with (\w+): \d+ bytes", said)[1]
        archive, self.tree = folder / "image.tar", folder / "tree"
        subprocess.run([engine, "save", "--output", archive, "sse-server"], check=True)
        self.tree.mkdir()
        self.tree.chmod(0o755)
        with tarfile.open(archive) as saved:
            manifest = json.load(saved.extractfile("manifest.json"))[0]
            self.config = json.load(saved.extractfile(manifest["Config"]))["config"]
            for name in manifest["Layers"]:
                with tarfile.open(fileobj=saved.extractfile(name)) as layer:
                    layer.extractall(self.tree)
        self.env = dict(variable.split("=", 1) for variable in self.config["Env"])

    def inside(self, *command):
        return [tool("chroot"), f"--userspec={USER}", self.tree, *command]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image"))


class Contained(SseServer):
    """The server as the image starts it, but for the port, which others may use."""

    def __init__(self, image, **settings):
        self.image, self.port, self.secret = image, free_port(), secrets.token_hex(32)
        self.url, self.branca = f"http://127.0.0.1:{self.port}", Branca(self.secret)
        self.listen = image.env["SSE_LISTEN"].replace("8000", str(self.port))
        self.env = image.env | {"SSE_SECRET": self.secret, "SSE_LISTEN": self.listen}
        self.env |= {f"SSE_{name.upper()}": str(value) for name, value in settings.items()}
        if "secret_file" in settings:
            file = image.tree / settings["secret_file"].lstrip("/")
            file.parent.mkdir(parents=True)
            file.write_text(self.env.pop("SSE_SECRET"))
        command = image.inside(*image.config["Entrypoint"])
        Process.__init__(self, [tool("unshare"), "--pid", "--fork", *command], self.env)
        self.find(re.escape(f"listening on {self.listen},"))
        # `unshare` waits for it, and ends with its status.
        parent = self.child.pid
        self.pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())

    def healthy(self):
        """Runs the image's health check beside it, as an engine does."""
        kind, *check = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"  # CMD-SHELL would need a shell
        check = self.image.inside(*check)
        return subprocess.run(check, env=self.env, timeout=DEADLINE).returncode == 0


@pytest.fixture
def contained(start, image):
    """contained(queue=4, …) starts the image."""
    if os.geteuid() != 0 or subprocess.run([tool("unshare"), "--pid", "--fork", "true"]).returncode:
        missing("only root can chroot and make process namespaces")
    return lambda **settings: start(Contained, image, **settings)


def musl_is_installed():
    target = f"{os.uname().machine}-unknown-linux-musl"
    command = [tool("rustc"), "--print", "target-libdir", "--target", target]
    told = subprocess.run(command, capture_output=True, text=True)
    return told.returncode == 0 and Path(told.stdout.strip()).is_dir()


# It must run on any Linux, of whatever age and libc.
def test_the_binary_is_static_and_stripped():
    said = make("static")
    binary = (TARGET / "static" / "sse-server").read_bytes()
    # With musl, wherever that can be had: under CI it has to be.
    libc = "musl" if os.environ.get("CI") == "true" or musl_is_installed() else "gnu"
    assert f"static, stripped, for {os.uname().machine}-unknown-linux-{libc}" in said
    assert f"{len(binary)} bytes" in said
    # ELF: the segments' types, of which 3 names a dynamic loader.
    assert binary[:5] == b"\x7fELF\x02"
    at, size, count = struct.unpack_from("<32xQ14xHH", binary)
    segments = [struct.unpack_from("<I", binary, at + size * i)[0] for i in range(count)]
    assert 1 in segments and 3 not in segments
    assert b".symtab\0" not in binary and b".debug_info\0" not in binary


# It runs for tags only: nobody sees before a release what is wrong with it.
def test_the_release_workflow_is_well_formed_and_calls_what_make_has(node):
    workflow, makefile = ROOT / ".github/workflows/release.yml", (ROOT / "Makefile").read_text()

    def findings(path):
        linter = node("workflow.mjs", path)
        linter.find(re.escape(f"read: {path}"))
        return [line for line in linter.lines if line.startswith("finding: ")]

    assert findings(workflow) == []
    called = set(re.findall(r"run: make (\w+)", workflow.read_text()))
    assert called == {"static", "image"}
    assert all(f"\n{target}:" in makefile for target in called)
    # The linter is awake.
    broken = TARGET / "tmp" / "broken.yml"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text(workflow.read_text().replace("github.token", "github.tolken"))
    assert len(findings(broken)) == 2
    broken.unlink()


# What is copied from the README has to start: the image's settings are those of the compose file.
def test_the_compose_file_of_the_readme_starts_the_image(contained, image):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    compose = yaml.safe_load(text)
    (service,) = compose["services"].values()
    assert service["image"] == "sse-server" and service["ports"] == ["127.0.0.1:8000:8000"]
    (secret,) = service["secrets"]
    assert compose["secrets"].keys() == {secret}
    assert service["environment"] == {"SSE_SECRET_FILE": f"/run/secrets/{secret}"}
    server = contained(secret_file=service["environment"]["SSE_SECRET_FILE"])
    # As an engine mounts it, which is gone with the container.
    shutil.rmtree(image.tree / "run")
    stream = subscribe(f"{server.url}/events?token={server.token('news')}")
    assert server.publish("news", "", "composed") == 1
    assert stream.event() == ("message", "composed")


# Whoever wants several instances says so when the binary is made; nobody else gets a client of Redis.
# What such a binary does is tested where instances are; here, that cargo is told.
def test_the_static_binary_has_redis_only_where_it_was_asked_for(tmp_path):
    (tmp_path / "cargo").write_text('#!/bin/sh\necho "told: $*"\nexit 1\n')
    (tmp_path / "cargo").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def told(*arguments):
        command = [tool("make"), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode != 0
        return re.search(r"(?m)^told: (.*)$", done.stdout)[1].split()

    assert "--features" not in told("static")
    with_redis = told("static", "FEATURES=redis")
    assert with_redis[with_redis.index("--features") + 1] == "redis"
    assert "--features" in told("image", "FEATURES=redis")


# Whatever else were in it would have to be kept up to date.
def test_the_image_holds_the_binary_and_nothing_else(image):
    assert [path.name for path in image.tree.rglob("*")] == ["sse-server"]
    binary = image.tree / "sse-server"
    assert binary.read_bytes() == (TARGET / "static" / "sse-server").read_bytes()
    # Not the user's, who then could replace it.
    assert (binary.stat().st_uid, binary.stat().st_mode & 0o7777) == (0, 0o755)


# An orchestrator reads it: a number tells it that this is not root, the rest how to run it.
def test_the_image_says_how_it_is_run(image):
    config = image.config
    assert config["User"] == USER
    assert config["Entrypoint"] == ["/sse-server"] and not config.get("Cmd")
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    # Engines add a PATH.
    assert {name: image.env[name] for name in image.env.keys() - {"PATH"}} == {
        "SSE_LISTEN": "0.0.0.0:8000"
    }
    assert config["Healthcheck"]["Test"] == ["CMD", "/sse-server", "ping"]


# A scratch image has no /proc, /dev or /etc of its own. Engines mount some, and serving needs none:
# only what makes secrets and tokens may read /dev/urandom.
def test_the_image_serves_as_process_1_without_any_other_file(contained):
    server = contained()
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert re.search(r"(?m)^NSpid:\s.*\s1$", status)
    assert re.search(r"(?m)^Uid:\s65532\s65532\s65532\s65532$", status)
    assert os.listdir(f"/proc/{server.pid}/root") == ["sse-server"]
    assert requests.get(f"{server.url}/ping", timeout=DEADLINE).status_code == 200
    sub = subscribe(f"{server.url}/events?token={server.token('news')}")
    assert server.publish("news", "update", "21 °C") == 1
    assert sub.event() == ("update", "21 °C")


# An orchestrator restarts what is not healthy, and only that.
def test_the_image_tells_whether_it_is_healthy(contained):
    server = contained()
    assert server.healthy()
    server.kill()
    until(lambda: not server.healthy(), "the health check sees that nobody listens")


def in_the_kernel(server_port, client_port):
    """Bytes that the kernel holds of what the server has written to this client."""
    held = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.split(":")[1], 16) for address in fields[1:3]]
        to_be_sent, to_be_read = (int(bytes, 16) for bytes in fields[4].split(":"))
        if ports == [server_port, client_port]:
            held += to_be_sent
        if ports == [client_port, server_port]:
            held += to_be_read
    return held


# A rollout. Process 1 gets only the signals that it asked for, and orchestrators kill after ten
# seconds or more whoever does not end; what was accepted has to arrive all the same.
def test_the_image_drains_and_ends_by_itself_after_sigterm(contained):
    # A write timeout longer than the test: the client is not to be cut while it does not read.
    server = contained(write_timeout=600)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(DEADLINE)
    client.connect(("127.0.0.1", server.port))
    client.sendall(f"GET /events?token={server.token('news')} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    until(lambda: server.publish("news", "first", "") == 1, "the stream is open")
    # The kernel takes some megabytes for a client that does not read. What is in the queue, a
    # server that just ended would lose.
    body, sent = server.submission(("news", "", "x" * 9000)), 0
    held = partial(in_the_kernel, server.port, client.getsockname()[1])
    while sent * 9000 - held() < 8 * 9000:
        answer = requests.post(f"{server.url}/submit", data=body, timeout=DEADLINE)
        assert answer.json()["deliveries"] == 1
        sent += 1
    assert server.publish("news", "last", "") == 1
    os.kill(server.pid, signal.SIGTERM)

    def read():
        response = HTTPResponse(client)
        response.begin()
        return iter(lambda: response.read1(65536), b""), client.close

    sub = Reader(read)
    assert server.child.wait(DEADLINE) == 0
    assert sub.ended.wait(DEADLINE) and sub.whole
    delay, *events, last, farewell = [frame for frame in sub.frames.queue if frame != ":"]
    assert events == ["event: first\ndata: "] + ["data: " + "x" * 9000] * sent
    assert last == "event: last\ndata: "
    # After all of them, when to come back: not the one that every stream begins with.
    assert all(re.fullmatch(r"retry: \d+", retry) for retry in (delay, farewell))
