"""Runs the demo: sse-server and the backend. Prints the address; Ctrl-C ends both. With INSTANCES=3
so many servers, and a Redis of their own, which makes them one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from serve import secret_line, server_binary, start


def start_redis():
    """Starts a Redis that keeps nothing on disk; returns it, and its URL, once it accepts."""
    if not shutil.which("redis-server"):
        sys.exit("INSTANCES needs redis-server (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"redis-server --bind 127.0.0.1 --port {port} --appendonly no --save".split()
    redis = subprocess.Popen([*command, ""], stdout=subprocess.DEVNULL, start_new_session=True)
    while redis.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return redis, f"redis://127.0.0.1:{port}"
        time.sleep(0.02)
    sys.exit("redis-server did not start")


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
    processes, addresses = [], []
    try:
        instances = int(env.get("INSTANCES") or 1)
        if instances > 1:
            redis, env["SSE_REDIS"] = start_redis()
            processes.append(redis)
        for _ in range(instances):
            server, address = start(env)
            processes.insert(0, server)  # ended before their Redis
            addresses.append(f"http://{address}")
            # Only one can have the port, and the other, that were asked for.
            env["SSE_LISTEN"] = "127.0.0.1:0"
            env.pop("SSE_METRICS_LISTEN", None)
        env.setdefault("PUSH_URLS", ",".join(addresses))
        env.setdefault("PUSH_PUBLIC_URL", env["PUSH_URLS"])
        from app import app  # reads the settings made above
        from werkzeug.serving import make_server

        port = int(env.get("DEMO_PORT", "5000"))
        backend = make_server("127.0.0.1", port, app, threaded=True)
        print(f"Open http://127.0.0.1:{backend.port}/ in two tabs. Ctrl-C ends the demo.")
        if own_secret:
            print(f"To tell all of them something:\n  {secret} {server_binary()}"
                  f" event list '' 'Lunch is here!' | curl --data-binary @- {addresses[0]}/submit")
        sys.stdout.flush()
        # Python may drop an exception that a signal raises, wherever it just was: so it raises none.
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        ended.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
