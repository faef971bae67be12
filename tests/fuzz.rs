//! What a stranger's bytes reach first in our own code: a request target that becomes a
//! subscription, a token that becomes topics or events. Chance makes them, and a reader that
//! shares no code with the server's says what has to come of them.
//!
//! Two seconds a test in the suite; `SSE_FUZZ_SECONDS=600` for a long run, `SSE_SEED` for another.
//! What finds its way by coverage is in tests/fuzz: `make fuzz`.

#[path = "support/attack.rs"]
mod attack;
#[path = "support/shape.rs"]
mod shape;
mod support;

use std::time::{Duration, Instant};

use attack::*;
use shape::Verdict;
use support::*;

/// Inputs between two looks at what was delivered.
const ROUND: usize = 200;

/// Calls the job with dice until the time is over; how many rounds that were.
fn rounds(seed: u64, mut job: impl FnMut(&mut Dice)) {
    let seconds = std::env::var("SSE_FUZZ_SECONDS").ok();
    let seconds = seconds.map_or(2, |it| it.parse().expect("SSE_FUZZ_SECONDS: a number"));
    let (mut dice, begun, mut count) = (Dice::new(seed), Instant::now(), 0);
    while count == 0 || begun.elapsed() < Duration::from_secs(seconds) {
        job(&mut dice);
        count += 1;
    }
    println!("  {} inputs in {:.1?}", count * ROUND, begun.elapsed());
}

#[track_caller]
fn expect_no_panic(server: &TestServer) {
    assert!(!server.log().contains("internal error"), "a panic");
}

/// The bytes in a form that can be pasted into a test.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Pieces of MessagePack: every kind of marker, lengths that lie, our own names.
const PACKED: &[&[u8]] = &[
    b"\xa6topics",
    b"\xa6events",
    b"\xa5topic",
    b"\xa5event",
    b"\xa4data",
    b"\xa1a",
    b"\xa1b",
    b"\xc4\x01a",
    b"\xd9\x01a",
    b"\x80",
    b"\x81",
    b"\x82",
    b"\x90",
    b"\x91",
    b"\x92",
    b"\xdc\x00\x01",
    b"\xdd\x00\x00\x00\x01",
    b"\xdd\xff\xff\xff\xff",
    b"\xde\x00\x01",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc0",
    b"\xc1",
    b"\xc3",
    b"\xcb\x7f\xf0\0\0\0\0\0\0",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xd4\x01a",
    b"\xa0",
    b"\xa2\r\n",
    b"\xa1\n",
    b"\xa1\0",
    b"\xa1\xff",
    b"\xa3\xef\xbb\xbf",
    &[0x91; 40],
];

fn payloads() -> Vec<Vec<u8>> {
    let event = |topic, data| map(&[("topic", pack(topic)), ("data", pack(data))]);
    let events = list(&[event("a", "1"), event("b", "2\r\n3\r4\n"), event("c", "")]);
    vec![
        b"\x81\xa6topics\x92\xa1a\xa1b".to_vec(),
        b"\x82\xa6topics\x91\xa1a\xa3exp\xcd\x04\xd2".to_vec(),
        topics_payload(&["a", "b", "c"]),
        topics_payload(&[&"t".repeat(256), "\u{e9}\u{1f600}"]),
        b"\x81\xa6events\x91\x83\xa5topic\xa1a\xa5event\xa1n\xa4data\xa1d".to_vec(),
        b"\x81\xa6events\x92\x81\xa5topic\xa1a\x81\xa5topic\xa1b".to_vec(),
        events_payload(&[("a", "", "x"), ("b", "name", " y\n"), ("a", ":", "")]),
        map(&[("events", events.clone()), ("from", pack(&[1.5, -2.0]))]),
        map(&[("topics", pack(&["a"])), ("events", events)]),
    ]
}

/// A string, in one of the ways there are to write one.
fn written(dice: &mut Dice, text: &str) -> Vec<u8> {
    let length = text.len() as u32;
    let marker = match dice.below(5) {
        0 if length < 32 => vec![0xa0 | length as u8],
        1 if length < 256 => vec![0xd9, length as u8],
        2 => [&[0xda], &length.to_be_bytes()[2..]].concat(),
        3 => [&[0xc5], &length.to_be_bytes()[2..]].concat(),
        _ => [&[0xdb][..], &length.to_be_bytes()].concat(),
    };
    [&marker, text.as_bytes()].concat()
}

/// A map of these and other keys, in any order; one of ours may be missing.
fn mixed(dice: &mut Dice, ours: Vec<(&str, Vec<u8>)>) -> Vec<u8> {
    let mut entries = vec![];
    for (name, value) in ours {
        let at = dice.below(entries.len() + 1);
        if dice.below(20) > 0 {
            entries.insert(at, (written(dice, name), value));
        }
        if dice.below(4) == 0 {
            let name = dice.pick(&["", "Topics", "exp", "data ", "\u{e9}"]);
            let value = dice.pick(&[
                &b"\xc0"[..],
                b"\xc3",
                b"\xcd\x04\xd2",
                b"\xa1x",
                b"\x91\x80",
            ]);
            let at = dice.below(entries.len() + 1);
            entries.insert(at, (written(dice, name), value.to_vec()));
        }
    }
    let count = (entries.len() as u32).to_be_bytes();
    let entries = entries.into_iter().flat_map(|(name, value)| [name, value]);
    [&[0xdf][..], &count, &entries.collect::<Vec<_>>().concat()].concat()
}

/// A payload that is right, or nearly.
fn built(dice: &mut Dice, key: &str) -> Vec<u8> {
    let long = "t".repeat(255 + dice.below(3));
    let topics = ["a", "b", "c", "\r\n", "\u{1f600}", "data: x", &long];
    let names = ["", "name", "n: n", " ", "a\rb", "a\nb", "\0", "\u{2028}"];
    let texts = [
        "",
        "x",
        "\r",
        "\n\n",
        "\r\n",
        "a\r\n\rb",
        "\n\ndata: forged",
        ":",
        "\u{feff}\0",
    ];
    let values: Vec<_> = (0..dice.below(5))
        .map(|_| {
            // The last ones are wrong, or nearly, and one in a list is enough to refuse it.
            let strange = dice.below(9) / 8;
            let topic = dice.pick(&topics[..6 + strange]);
            let topic = written(dice, topic);
            if key == "topics" {
                return topic;
            }
            let name = dice.pick(&names[..4 + 4 * strange]);
            let (name, text) = (written(dice, name), dice.pick(&texts));
            let text = written(dice, text);
            mixed(
                dice,
                vec![("topic", topic), ("event", name), ("data", text)],
            )
        })
        .collect();
    mixed(dice, vec![(key, list(&values))])
}

/// Half of them built, the other half wild.
fn payload(dice: &mut Dice, bases: &[Vec<u8>], key: &str) -> Vec<u8> {
    if dice.below(2) == 0 {
        return built(dice, key);
    }
    let mut payload = bases[dice.below(bases.len())].clone();
    dice.mutate(&mut payload, PACKED);
    payload
}

/// An authentic payload is not a right one: a backend may err, and its encoder. What is not of the
/// agreed shape is refused as a whole; what is, is delivered to the letter.
#[test]
fn authentic_payloads_are_delivered_exactly_or_refused_as_a_whole() {
    let server = TestServer::start(&[]);
    let mut stream = server.subscribe(&["a", "b"]);
    let mut connection = server.connect();
    let (bases, [mut taken, mut refused, mut unsaid]) = (payloads(), [0; 3]);
    rounds(0x5eed, |dice| {
        let mut expected = Vec::new();
        for _ in 0..ROUND {
            let payload = payload(dice, &bases, "events");
            let verdict = shape::submission(&payload);
            if verdict == Verdict::Unsaid {
                unsaid += 1;
                continue;
            }
            let body = server.mint(&payload);
            let length = format!("Content-Length: {}\r\n", body.len());
            connection.send(request("POST", "/submit", &length, body.as_bytes()));
            let answer = Submitted::from(connection.answer());
            let case = format!("{}: {}", hex(&payload), answer.body);
            let Verdict::Valid(events) = verdict else {
                refused += 1;
                // A refused request costs no connection: the next one goes over the same.
                assert_eq!(answer.status, 400, "{case}");
                continue;
            };
            taken += 1;
            assert_eq!(answer.status, 200, "{case}");
            let heard = events.iter().filter(|it| ["a", "b"].contains(&&*it.0));
            let heard: Vec<_> = heard.map(shape::dispatched).collect();
            let counts = (events.len() as u64, heard.len() as u64);
            assert_eq!((answer.events, answer.deliveries), counts, "{case}");
            // At once, since a stream may not lag further than its queue.
            for (name, data) in &heard {
                let message = stream.message();
                assert_eq!((&message.name, &message.data), (name, data), "{case}");
            }
            expected.extend(heard);
        }
        // Nothing else came, of the refused ones least of all.
        assert_eq!(server.publish(&[("a", "end of round", "")]).ok(), 1);
        stream.expect_event("end of round", "");
        expect_no_panic(&server);
    });
    println!("  {taken} taken, {refused} refused, {unsaid} left out");
    assert!(taken > 0 && refused > 0, "one kind was never tried");
}

/// The same for the token of a stream: it hears the topics of its token and no other.
#[test]
fn a_subscription_hears_exactly_the_topics_of_its_payload() {
    let server = TestServer::start(&[]);
    let (bases, [mut taken, mut refused]) = (payloads(), [0; 2]);
    rounds(0x70_91c5, |dice| {
        for _ in 0..ROUND {
            let payload = payload(dice, &bases, "topics");
            let verdict = shape::subscription(&payload);
            if verdict == Verdict::Unsaid {
                continue;
            }
            let target = format!("/events?token={}", server.mint(&payload));
            let Verdict::Valid(topics) = verdict else {
                refused += 1;
                assert_eq!(server.get(&target).status, 400, "{}", hex(&payload));
                continue;
            };
            taken += 1;
            let mut stream = subscribe(server.addr, &target);
            let inside = topics.iter().map(|topic| (&**topic, "", &**topic));
            let outside = ["a", "b", "c", "A", "topics", " a"];
            let outside = outside
                .into_iter()
                .filter(|it| !topics.iter().any(|topic| topic == it));
            let outside = outside.map(|topic| (topic, "", "not permitted"));
            let events: Vec<_> = outside.chain(inside).collect();
            server.publish(&events).ok();
            for topic in &topics {
                // Line ends in a topic are as good as any character; in the data they are alike.
                let data = topic.replace("\r\n", "\n").replace('\r', "\n");
                stream.expect_event("message", &data);
            }
        }
        expect_no_panic(&server);
    });
    println!("  {taken} streamed, {refused} refused");
    assert!(taken > 0 && refused > 0, "one kind was never tried");
}

/// What is no token is not for us to understand: one answer to all of it, wherever it comes.
#[test]
fn garbage_and_mutated_tokens_are_refused_as_tokens() {
    let server = TestServer::start(&[]);
    let mut stream = server.subscribe(&["a"]);
    let subscription = server.token(&["a"]);
    let submission = server.submission(&[("a", "forged", "forged")]);
    let words: &[&[u8]] = &[
        b"0",
        b"z",
        b"870",
        b"%",
        b"+",
        b"_",
        b"=",
        b"\xc3\xa9",
        b" ",
    ];
    rounds(0x0f_0f, |dice| {
        for _ in 0..ROUND {
            let token = match dice.below(4) {
                0 => {
                    let length = dice.below(300);
                    dice.base62(length).into_bytes()
                }
                1 => {
                    let length = dice.below(100);
                    dice.bytes(length)
                }
                kind => {
                    let base = [&subscription, &submission][kind % 2];
                    let mut token = base.clone().into_bytes();
                    dice.mutate(&mut token, words);
                    token
                }
            };
            let trimmed = token.trim_ascii();
            // Two mutations may undo each other.
            if [&subscription, &submission]
                .iter()
                .any(|it| it.as_bytes() == trimmed)
            {
                continue;
            }
            assert_eq!(
                server.post("/submit", &token).status,
                401,
                "{}",
                hex(&token)
            );
            if token
                .iter()
                .all(|byte| byte.is_ascii_graphic() && *byte != b'&')
            {
                let token = String::from_utf8(token).unwrap();
                let answer = server.get(&format!("/events?token={token}"));
                assert_eq!(answer.status, 401, "{token}");
            }
        }
        assert_eq!(server.publish(&[("a", "end of round", "")]).ok(), 1);
        stream.expect_event("end of round", "");
        expect_no_panic(&server);
    });
}

/// What the protocol says of a target that is sent as it should be.
fn documented(target: &str, tokens: &[String]) -> u16 {
    // As a proxy is asked: the name of the host does not matter.
    let target = match target.split_once("://") {
        Some((scheme, rest)) if ["http", "https"].contains(&&*scheme.to_lowercase()) => {
            rest.find(['/', '?']).map_or("", |at| &rest[at..])
        }
        _ => target,
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let token = query.split('&').find_map(|it| it.strip_prefix("token="));
    match (path, token.unwrap_or_default()) {
        ("/ping", _) => 200,
        ("/submit", _) => 405,
        ("/events", token) if tokens.iter().any(|it| it == token) => 200,
        ("/events", token) if token.len() > 4096 => 414,
        ("/events", _) => 401,
        _ => 404,
    }
}

#[test]
fn every_request_target_has_its_documented_answer() {
    let server = TestServer::start(&[("SSE_HEARTBEAT", "1")]);
    let tokens = [server.token(&["a"]), server.token(&["b", "c"])];
    let [one, two] = tokens.each_ref();
    let bases = [
        format!("/events?token={one}"),
        format!("/events?a=b&token={two}&token={one}&c=d"),
        format!("/events?token={one}#token={two}"),
        format!("/events?token={}", "7".repeat(4096)),
        "/ping?".to_string(),
        "/submit".to_string(),
    ];
    let token = format!("token={two}");
    let words: &[&[u8]] = &[
        b"?",
        b"&",
        b"=",
        b"#",
        b"%",
        b"/",
        b"//",
        b"..",
        b"%3f",
        b"%00",
        b";",
        b"token",
        b"token=",
        b"&token=",
        b"?token=",
        b"Token=",
        b"/events",
        b"/events?",
        b"/submit",
        b"/ping",
        b"/metrics",
        b"http://x",
        b"https://x:1/",
        b"*",
        one.as_bytes(),
        token.as_bytes(),
        b" ",
        b"\t",
        b"\r\n",
        b"\xff",
        b"\0",
    ];
    let [mut exact, mut refused, mut streams] = [0; 3];
    rounds(0x7a6e7, |dice| {
        for _ in 0..ROUND {
            let mut target = bases[dice.below(bases.len())].clone().into_bytes();
            dice.mutate(&mut target, words);
            let mut stream = connect(server.addr);
            let head = [
                b"GET ",
                &target[..],
                b" HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
            ]
            .concat();
            send(&mut stream, &head);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let fate = fate(&mut stream);
            let case = String::from_utf8_lossy(&target);
            let graphic = !target.is_empty() && target.iter().all(u8::is_ascii_graphic);
            if !graphic {
                // No target has such bytes, and what is behind them is no second request.
                refused += 1;
                assert_eq!(fate, Fate::Closed(vec![400]), "{case:?}");
                continue;
            }
            exact += 1;
            let status = documented(&case, &tokens);
            if status == 200 && !case.starts_with("/ping") {
                streams += 1;
                assert_eq!(fate, Fate::Stream, "{case}");
            } else {
                assert_eq!(fate, Fate::Closed(vec![status]), "{case}");
            }
        }
        expect_no_panic(&server);
    });
    println!("  {exact} well-formed, {streams} of them streams, {refused} refused");
    assert!(streams > 0 && refused > 0, "one kind was never tried");
}
