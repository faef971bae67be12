"""Runs the demo: sse-server and the backend. Prints the address; Ctrl-C ends both."""

import os
import signal
import sys
from pathlib import Path

from serve import secret_line, server_binary, start


def main():
    # Ended by a supervisor, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    env = os.environ
    if "SSE_SECRET_FILE" in env:  # the backend needs it, too
        env["SSE_SECRET"] = Path(env.pop("SSE_SECRET_FILE")).read_text().strip()
    own_secret = "SSE_SECRET" not in env
    secret = secret_line(env)
    # A port that is free: 8000 may belong to `make run`.
    env.setdefault("SSE_LISTEN", "127.0.0.1:0")
    server, address = start(env)
    try:
        env.setdefault("PUSH_URLS", f"http://{address}")
        from app import app  # reads the settings made above
        from werkzeug.serving import make_server

        port = int(env.get("DEMO_PORT", "5000"))
        backend = make_server("127.0.0.1", port, app, threaded=True)
        print(f"Open http://127.0.0.1:{backend.port}/ in two tabs. Ctrl-C ends the demo.")
        if own_secret:
            print(f"To tell all of them something:\n  {secret} {server_binary()}"
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
