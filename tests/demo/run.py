"""Runs the demo: sse-server and the backend. Prints the address; Ctrl-C ends both."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "target"


def server_binary():
    builds = [TARGET / kind / "sse-server" for kind in ("release", "debug")]
    for binary in [os.environ.get("SSE_SERVER_BIN"), *builds]:
        if binary and Path(binary).is_file():
            return str(binary)
    sys.exit("no sse-server binary: run `cargo build --release` first")


def wait_until_listening(server):
    """Passes the server's log on; returns the address it listens on."""
    for line in server.stderr:
        sys.stderr.write(line)
        if found := re.search(r"listening on ([^\s,]+)", line):
            threading.Thread(target=sys.stderr.writelines, args=[server.stderr], daemon=True).start()
            return found[1]
    sys.exit(server.wait())


def main():
    # Ended by a supervisor, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    env, binary = os.environ, server_binary()
    own_secret = "SSE_SECRET" not in env
    env.setdefault("SSE_SECRET", secrets.token_hex(32))
    # In its own session: Ctrl-C reaches this process alone, which then ends the server.
    server = subprocess.Popen([binary], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        address = wait_until_listening(server)
        env.setdefault("PUSH_URLS", f"http://{address}")
        from app import app  # reads the settings made above
        from werkzeug.serving import make_server

        backend = make_server("127.0.0.1", int(env.get("DEMO_PORT", "5000")), app, threaded=True)
        print(f"Open http://127.0.0.1:{backend.port}/ in two tabs. Ctrl-C ends the demo.")
        if own_secret:
            print(f"To tell all of them something:\n  SSE_SECRET={env['SSE_SECRET']} {binary}"
                  f" event list '' 'Lunch is here!' | curl --data-binary @- {address}/submit")
        sys.stdout.flush()
        backend.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
