"""Mints door.json anew, with pybranca and msgpack: nothing of the server has a part in it.

    target/venv/bin/python tests/vectors/mint.py > tests/vectors/door.json
"""

import json

import base62
import msgpack
from branca import Branca

ONE, TWO, THREE = "73" * 32, "0a" * 32, "ff" * 32
CLOCK = 1_700_000_000
TTL = {"/events": 86_400, "/submit": 300}

vectors = []


def vector(door, status, comment, payload, age=0, key=ONE, secrets=ONE, change=lambda it: it, **expected):
    if not isinstance(payload, bytes):
        payload = msgpack.packb(payload)
    token = change(Branca(key).encode(payload, CLOCK - age))
    head = {"id": len(vectors), "comment": comment, "door": door, "secret": secrets}
    clock = {"ttl": TTL[door], "clock": CLOCK, "token": token, "status": status}
    vectors.append(head | clock | expected)


def events(status, comment, payload, **how):
    vector("/events", status, comment, payload, **how)


def submit(status, comment, payload, **how):
    vector("/submit", status, comment, payload, **how)


def flip(at):
    """Changes one byte of the decoded token."""

    def change(token):
        raw = bytearray(base62.decodebytes(token))
        raw[at] ^= 1
        return base62.encodebytes(bytes(raw))

    return change


news = {"topics": ["news"]}
many = [f"topic {number}" for number in range(65)]
text16 = b"\xda\x00\x04news"
deep = b"\x91" * 1000 + b"\x90"

events(200, "one topic", news, topics=["news"])
events(200, "three topics", {"topics": ["a", "caf\u00e9", "\U0001f980/\u4f60\u597d"]}, topics=["a", "caf\u00e9", "\U0001f980/\u4f60\u597d"])
events(200, "a topic with every kind of character", {"topics": ["a b\n\r\0:\"&%"]}, topics=["a b\n\r\0:\"&%"])
events(200, "the same topic three times", {"topics": ["news", "a", "news", "news"]}, topics=["news", "a"])
events(200, "unknown keys are ignored", {"user": 7, "topics": ["news"], "x": {"y": [None, 1.5, b"\xff"]}}, topics=["news"])
events(200, "long encodings of short things", b"\xdf\0\0\0\x01\xd9\x06topics\xdd\0\0\0\x01" + text16, topics=["news"])
events(200, "64 topics", {"topics": many[:64]}, topics=many[:64])
events(200, "65 topics, two of them equal", {"topics": many[:64] + many[:1]}, topics=many[:64])
events(200, "a topic of 256 bytes", {"topics": ["t" * 256]}, topics=["t" * 256])
events(200, "a minute before its lifetime ends", news, age=86_340, topics=["news"])
events(200, "dated four minutes ahead: clocks may differ", news, age=-240, topics=["news"])
events(200, "the first of two secrets", news, key=ONE, secrets=f"{ONE},{TWO}", topics=["news"])
events(200, "the second of two secrets", news, key=TWO, secrets=f"{ONE},{TWO}", topics=["news"])
events(401, "a minute after its lifetime ended", news, age=86_460)
events(401, "years after its lifetime ended", news, age=CLOCK)
events(401, "expired, under the second of two secrets", news, key=TWO, secrets=f"{ONE},{TWO}", age=86_460)
events(401, "dated in 2096, far ahead", news, age=CLOCK - 4_000_000_000)
events(401, "another key", news, key=TWO)
events(401, "neither of two secrets", news, key=THREE, secrets=f"{ONE},{TWO}")
events(401, "no token", news, change=lambda token: "")
events(401, "not base62", news, change=lambda token: token + "_")
events(401, "a digit less", news, change=lambda token: token[:-1])
events(401, "a digit more", news, change=lambda token: token + "0")
events(401, "a zero in front", news, change=lambda token: "0" + token)
events(401, "another version", news, change=flip(0))
events(401, "another date", news, change=flip(4))
events(401, "another nonce", news, change=flip(28))
events(401, "another payload", news, change=flip(29))
events(401, "another tag", news, change=flip(-1))
events(400, "no topics", {"topics": []})
events(400, "no list of topics", {"topic": "news"})
events(400, "nil in place of the list", {"topics": None})
events(400, "text in place of the list", {"topics": "news"})
events(400, "a number among the topics", {"topics": ["news", 7]})
events(400, "a list among the topics", {"topics": ["news", ["a"]]})
events(400, "an empty topic", {"topics": ["news", ""]})
events(400, "a topic of 257 bytes", {"topics": ["t" * 257]})
events(400, "a topic of 86 characters and 258 bytes", {"topics": ["\u20ac" * 86]})
events(400, "a topic that is not UTF-8", b"\x81\xa6topics\x91\xa2\xff\xfe")
events(400, "65 topics", {"topics": many})
events(400, "a submission", {"events": [{"topic": "news"}]})
events(400, "an empty payload", b"")
events(400, "nil", None)
events(400, "text", "news")
events(400, "JSON", json.dumps(news).encode())
events(400, "a list in place of the map", [["news"]])
events(400, "a number in place of the key", {0: ["news"]})
events(400, "the reserved byte", b"\xc1")
events(400, "a payload cut short", msgpack.packb(news)[:-1])
events(400, "a byte too many", msgpack.packb(news) + b"\xc0")
events(400, "a list of a promised 4 billion", b"\x81\xa6topics\xdd\xff\xff\xff\xff")
events(400, "lists 1,001 deep", b"\x81\xa6topics" + deep)
events(400, "lists 1,001 deep under an unknown key", b"\x82\xa1x" + deep + msgpack.packb(news)[1:])


def one(**event):
    return {"events": [event]}


good = {"topic": "news", "event": "update", "data": "hi"}
submit(200, "one event", one(**good), delivers=[["news", "update", "hi"]])
submit(200, "no name and no data", one(topic="news"), delivers=[["news", "message", ""]])
submit(200, "an empty name", one(topic="news", event="", data="hi"), delivers=[["news", "message", "hi"]])
submit(200, "an empty list", {"events": []}, delivers=[])
submit(200, "three events, in this order", {"events": [good, {"topic": "a", "data": "1"}, {"topic": "news", "data": "2"}]},
       delivers=[["news", "update", "hi"], ["a", "message", "1"], ["news", "message", "2"]])
submit(200, "every end of a line", one(topic="a", data="1\n2\r\n3\r4\n\n5\n"), delivers=[["a", "message", "1\n2\n3\n4\n\n5\n"]])
submit(200, "data that looks like fields", one(topic="a", data=" x\n: y\ndata: z\n\nevent: w"), delivers=[["a", "message", " x\n: y\ndata: z\n\nevent: w"]])
submit(200, "characters of every length", one(topic="caf\u00e9", event="\u20ac", data="\U0001f980\0\u2028\ufeff"), delivers=[["caf\u00e9", "\u20ac", "\U0001f980\0\u2028\ufeff"]])
submit(200, "unknown keys are ignored", {"v": 1, "events": [good | {"id": 7, "retry": [None]}]}, delivers=[["news", "update", "hi"]])
submit(200, "long encodings of short things", b"\xde\0\x01\xda\0\x06events\xdc\0\x01\xde\0\x01\xd9\x05topic" + text16, delivers=[["news", "message", ""]])
submit(200, "a minute before its lifetime ends", one(**good), age=240, delivers=[["news", "update", "hi"]])
submit(200, "dated four minutes ahead: clocks may differ", one(**good), age=-240, delivers=[["news", "update", "hi"]])
submit(200, "the second of two secrets", one(**good), key=TWO, secrets=f"{ONE},{TWO}", delivers=[["news", "update", "hi"]])
submit(401, "a minute after its lifetime ended", one(**good), age=360)
submit(401, "dated in 2096, far ahead", one(**good), age=CLOCK - 4_000_000_000)
submit(401, "another key", one(**good), key=TWO)
submit(401, "another payload", one(**good), change=flip(29))
submit(401, "another date", one(**good), change=flip(4))
submit(401, "no token", one(**good), change=lambda token: "")
submit(400, "a subscription", news)
submit(400, "nil in place of the list", {"events": None})
submit(400, "an event in place of the list", {"events": good})
submit(400, "no topic", {"events": [good, {"event": "a", "data": "b"}]})
submit(400, "an empty topic", {"events": [good, {"topic": ""}]})
submit(400, "a topic of 257 bytes", {"events": [good, {"topic": "t" * 257}]})
submit(400, "a name with LF", {"events": [good, {"topic": "news", "event": "a\nb"}]})
submit(400, "a name with CR", {"events": [good, {"topic": "news", "event": "a\rb"}]})
submit(400, "a name with NUL", {"events": [good, {"topic": "news", "event": "a\0b"}]})
submit(400, "data that is a number", {"events": [good, {"topic": "news", "data": 7}]})
submit(400, "data that is nil", {"events": [good, {"topic": "news", "data": None}]})
submit(400, "data that is not UTF-8", b"\x81\xa6events\x91\x82\xa5topic\xa4news\xa4data\xa1\xff")
submit(400, "a list in place of an event", {"events": [good, ["news", "update", "hi"]]})
submit(400, "numbers in place of an event's keys", {"events": [good, {0: "news"}]})
submit(400, "a list in place of the map", [[good]])
submit(400, "a payload cut short", msgpack.packb(one(**good))[:-1])
submit(400, "a byte too many", msgpack.packb(one(**good)) + b"\0")
submit(400, "JSON", json.dumps(one(**good)).encode())

about = (
    "A server with this secret and this lifetime, at this time, opens the token at this door with "
    "this status; with 200 it subscribes to the topics, or delivers the events (topic, name, data as "
    "a browser sees them). Minted by mint.py beside this file."
)
lines = ",\n".join("    " + json.dumps(it) for it in vectors)
print(f'{{\n  "about": {json.dumps(about)},\n  "count": {len(vectors)},\n  "vectors": [\n{lines}\n  ]\n}}')
