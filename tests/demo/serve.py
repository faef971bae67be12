"""Runs sse-server, and once it serves says how to try it. Ctrl-C ends both."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent.parent / "target"


def server_binary():
    # One with the feature redis has a directory of its own.
    folder = TARGET / "redis" if "SSE_REDIS" in os.environ else TARGET
    builds = [folder / kind / "sse-server" for kind in ("release", "debug")]
    for binary in [os.environ.get("SSE_SERVER_BIN"), *builds]:
        if binary and Path(binary).is_file():
            return str(binary)
    sys.exit("no sse-server binary: run `cargo build --release` first")


def secret_line(env):
    """Makes a secret where there is none; returns what a second shell has to be told."""
    if "SSE_SECRET_FILE" in env:
        return f"SSE_SECRET_FILE={env['SSE_SECRET_FILE']}"
    env.setdefault("SSE_SECRET", secrets.token_hex(32))
    return f"SSE_SECRET={env['SSE_SECRET']}"


def start(env):
    """Starts the server; returns it, and the address it listens on, once it does."""
    # In its own session: Ctrl-C reaches this process alone, which then ends the server.
    server = subprocess.Popen(
        [server_binary()], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in server.stderr:
        sys.stderr.write(line)
        if found := re.search(r"listening on ([^\s,]+)", line):
            threading.Thread(target=sys.stderr.writelines, args=[server.stderr], daemon=True).start()
            # One that listens on all addresses is met on this machine's own.
            return server, found[1].replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
    sys.exit(server.wait())


def main():
    # Ended by a supervisor, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    env = dict(os.environ)
    secret = secret_line(env)
    server, address = start(env)
    try:
        print(f"""In a second shell, subscribe:
  export {secret} PATH={Path(server_binary()).parent}:$PATH
  curl -N "{address}/events?token=$(sse-server token weather)"
and in a third, after the same export, publish:
  sse-server event weather update 21C | curl --data-binary @- {address}/submit""", flush=True)
        sys.exit(server.wait())
    except KeyboardInterrupt:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
