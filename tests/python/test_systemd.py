"""The systemd unit, as systemd's own tools read it. None of them needs a running systemd."""

import re
import subprocess

import pytest
from conftest import BINARY, TESTS, missing, tool

UNIT = TESTS / "systemd" / "sse-server.service"


@pytest.fixture
def unit(tmp_path):
    """The unit with the binary under test in it, which has to be there."""
    if not BINARY.is_file():
        missing(f"no server binary at {BINARY}: run `cargo build`")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/usr/local/bin/sse-server", str(BINARY)))
    return path


def analyze(*arguments):
    command = [tool("systemd-analyze"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# A directive that is misspelt, or in the wrong section, is a warning in a log, and does nothing.
def test_systemd_understands_every_line_of_the_unit(unit):
    told = analyze("verify", "--man=no", unit)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")
    # It would have said something.
    unit.write_text(unit.read_text().replace("RestartSec=", "RestartSecs="))
    assert "RestartSecs" in analyze("verify", "--man=no", unit).stderr


# systemd's own measure, from 0 (nothing to be had) to 10; most services have more than 9.
def test_the_unit_gives_the_server_little_of_the_system(unit):
    told = analyze("security", "--offline=true", "--threshold=15", unit)
    assert told.returncode == 0, told.stdout
    # Without the lines that harden it, it would not pass.
    hardening = r"(?m)^(Protect|Private|Restrict[A-Z]|System|Capability|DynamicUser).*\n"
    unit.write_text(re.sub(hardening, "", unit.read_text()))
    assert analyze("security", "--offline=true", "--threshold=15", unit).returncode != 0


# Whatever ends the server, it comes back, for ever; only with settings that cannot be used it would
# end again at once, with status 2.
def test_the_unit_restarts_the_server_but_for_wrong_settings():
    text = UNIT.read_text()
    sections = dict(re.findall(r"(?ms)^\[(\w+)\]\n(.*?)(?=^\[|\Z)", text))
    assert "StartLimitIntervalSec=0" in sections["Unit"].splitlines()
    service = sections["Service"].splitlines()
    assert {"Restart=always", "RestartSec=1", "RestartPreventExitStatus=2"} <= set(service)
    wrong = subprocess.run([BINARY], env={"SSE_SECRET": "none"}, capture_output=True, timeout=60)
    assert wrong.returncode == 2


# A secret in the environment can be read by whoever may ask systemd.
def test_the_unit_hands_the_secret_over_as_a_credential():
    lines = UNIT.read_text().splitlines()
    assert "LoadCredential=secret:/etc/sse-server.secret" in lines
    assert "Environment=SSE_SECRET_FILE=%d/secret" in lines
    assert not any("SSE_SECRET=" in line for line in lines)
