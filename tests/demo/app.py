"""A list that is live in every open tab: what a backend does with sse-server.

It does two things: it answers the page's EventSource with a redirect to a fresh token, and it
submits an event whenever something changed. Everything else here is an ordinary Flask app.
"""

import json
import os
import random
import secrets
import threading
import time

import msgpack
import requests
from branca import Branca
from flask import Flask, abort, redirect, request, send_from_directory

# Where this backend reaches sse-server. With a standby, both addresses, separated by a comma.
PUSH_URLS = os.environ.get("PUSH_URLS", "http://127.0.0.1:8000").split(",")
# Where browsers reach it: in production the https address of the reverse proxy.
PUSH_PUBLIC_URLS = os.environ.get("PUSH_PUBLIC_URL", PUSH_URLS[0]).split(",")
# Several instances over Redis are one server: to submit to any of them is enough.
INSTANCES = int(os.environ.get("INSTANCES") or 1)
TOPIC = "list"

branca = Branca(os.environ["SSE_SECRET"].split(",")[0])
push = requests.Session()  # keeps its connections open
app = Flask(__name__)


@app.get("/events")
def events():
    # Check here who asks, as on every other page: the token lets its holder read the topic.
    # The page comes back to this address whenever its stream has ended, so no token gets too old.
    token = branca.encode(msgpack.packb({"topics": [TOPIC]}))
    return redirect(f"{random.choice(PUSH_PUBLIC_URLS)}/events?token={token}", 307)


def publish(event, data=""):
    """Tells every open page. A page that misses it sees the gap in the versions and refetches."""
    events = [{"topic": TOPIC, "event": event, "data": data}]
    body = branca.encode(msgpack.packb({"events": events}))
    for url in random.sample(PUSH_URLS, len(PUSH_URLS)):
        try:
            push.post(f"{url}/submit", data=body, timeout=5).raise_for_status()
            if INSTANCES > 1:
                return
        except requests.RequestException as error:
            app.logger.warning("%s: not published: %s", event, error)


# The list, and its version: one more with every change, and more than in any earlier run, so that
# a page left open notices when this process was restarted.
items = {}
version = int(time.time() * 1000)
lock = threading.Lock()


@app.get("/")
def page():
    return app.send_static_file("index.html")


@app.get("/static/live.js")  # it belongs to no application: copy it into yours
def script():
    return send_from_directory("../client", "live.js")


@app.get("/items")
def state():
    with lock:
        return {"version": version, "items": [{"id": id, "text": items[id]} for id in items]}


@app.post("/items")
def add():
    text = str(request.get_json().get("text", "")).strip()
    if not 0 < len(text) <= 200:
        abort(400, "1 to 200 characters")
    global version
    with lock:
        if len(items) >= 100:
            abort(409, "the list is full")
        id = secrets.token_hex(8)
        items[id] = text
        version += 1
        change = {"version": version, "id": id, "text": text}
    publish("added", json.dumps(change))
    return change, 201


@app.delete("/items/<id>")
def remove(id):
    global version
    with lock:
        if items.pop(id, None) is None:
            abort(404)
        version += 1
        change = {"version": version, "id": id}
    publish("removed", json.dumps(change))
    return change


@app.delete("/items")
def clear():
    global version
    with lock:
        items.clear()
        version += 1
    publish("cleared")  # an event needs no data: every page fetches the new state
    return "", 204


@app.after_request
def protect(response):
    # connect-src must name the push server: the page's EventSource is redirected to it.
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        f"connect-src 'self' {' '.join(PUSH_PUBLIC_URLS)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    # Neither a state nor a token may come out of a cache.
    response.headers["Cache-Control"] = "no-store"
    return response


if __name__ == "__main__":
    app.run(port=int(os.environ.get("DEMO_PORT", "5000")), threaded=True)
