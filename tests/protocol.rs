//! What the protocol promises, rule by rule, told by the bytes on the wire.

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use support::*;

const OTHER_SECRET: &str = "0101010101010101010101010101010101010101010101010101010101010101";

// --------------------------------------------------------------------- answers to what is wrong

/// One row: what is sent, and what must be answered.
struct Refused {
    what: String,
    request: Vec<u8>,
    status: u16,
    allow: &'static str,
    /// What the answer must not repeat.
    token: String,
    /// Bytes of the request are left unread, so that no other can follow.
    ends: bool,
}

fn refused(what: &str, status: u16, request: Vec<u8>, token: &str) -> Refused {
    Refused {
        what: what.into(),
        request,
        status,
        allow: "",
        token: token.into(),
        ends: false,
    }
}

fn refused_at_once(what: &str, status: u16, request: Vec<u8>) -> Refused {
    Refused {
        ends: true,
        ..refused(what, status, request, "")
    }
}

fn events_with(what: &str, status: u16, token: &str) -> Refused {
    let target = format!("/events?token={token}");
    refused(what, status, request("GET", &target, "", b""), token)
}

fn submit_with(what: &str, status: u16, body: &[u8]) -> Refused {
    let length = format!("Content-Length: {}\r\n", body.len());
    let token = String::from_utf8_lossy(body).into_owned();
    let request = request("POST", "/submit", &length, body);
    refused(what, status, request, &token)
}

fn with_method(method: &str, target: &str, allow: &'static str) -> Refused {
    let what = format!("{method} {target}");
    let request = request(method, target, "Content-Length: 0\r\n", b"");
    Refused {
        allow,
        ..refused(&what, 405, request, "")
    }
}

/// The moment that a `Date` names, in seconds since 1970, after RFC 9110, section 5.6.7. By its own
/// arithmetic: the day of the week must be that of the day.
#[track_caller]
fn moment(date: &str) -> u64 {
    const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let words: Vec<_> = date.split(' ').collect();
    let [weekday, day, month, year, time, "GMT"] = words[..] else {
        panic!("{date:?}")
    };
    let number = |digits: &str, length: usize| -> u64 {
        let plain = digits.len() == length && digits.bytes().all(|byte| byte.is_ascii_digit());
        assert!(plain, "{date:?}");
        digits.parse().unwrap()
    };
    let month = MONTHS.iter().position(|name| *name == month).expect(date) as u64 + 1;
    let (day, year) = (number(day, 2), number(year, 4));
    let time: Vec<_> = time.split(':').map(|digits| number(digits, 2)).collect();
    let [hours, minutes, seconds] = time[..] else {
        panic!("{date:?}")
    };
    assert!(hours < 24 && minutes < 60 && seconds <= 60, "{date:?}");
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let length = |month: u64| match month {
        2 if leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    assert!((1..=length(month)).contains(&day), "{date:?}");
    let years: u64 = (1970..year).map(|year| 365 + u64::from(leap(year))).sum();
    let days = years + (1..month).map(length).sum::<u64>() + day - 1;
    // The first of January 1970 was a Thursday.
    let name = DAYS[(days as usize + 4) % 7];
    assert_eq!(weekday.strip_suffix(','), Some(name), "{date:?}");
    ((days * 24 + hours) * 60 + minutes) * 60 + seconds
}

#[test]
fn the_reader_of_dates_knows_the_calendar() {
    assert_eq!(moment("Thu, 01 Jan 1970 00:00:00 GMT"), 0);
    assert_eq!(moment("Sun, 06 Nov 1994 08:49:37 GMT"), 784_111_777);
    assert_eq!(moment("Tue, 29 Feb 2000 12:00:00 GMT"), 951_825_600);
    assert_eq!(moment("Tue, 14 Nov 2023 22:13:20 GMT"), 1_700_000_000);
    assert_eq!(moment("Sun, 07 Feb 2106 06:28:15 GMT"), u64::from(u32::MAX));
}

/// What every answer has: a date that is true, the CORS header, each field once; and where it says
/// what is wrong, a sentence of one line.
#[track_caller]
fn expect_well_formed(what: &str, answer: &Answer, asked: u32) {
    assert_eq!(answer.version, "HTTP/1.1", "{what}");
    let names = answer.fields.iter().map(|(name, _)| name.to_lowercase());
    let names: Vec<_> = names.collect();
    let once: BTreeSet<_> = names.iter().collect();
    assert_eq!(once.len(), names.len(), "{what}: {names:?}");
    let date = answer.header("Date").expect(what);
    let moment = moment(date);
    assert!(
        (u64::from(asked)..=now().into()).contains(&moment),
        "{what}: {date} is not now"
    );
    let origin = answer.header("Access-Control-Allow-Origin");
    assert_eq!(origin, Some("*"), "{what}");
    assert_eq!(
        answer.header("WWW-Authenticate").is_some(),
        answer.status == 401,
        "{what}"
    );
    assert_eq!(answer.header("Allow").is_some(), answer.status == 405);
    assert_eq!(answer.header("Retry-After").is_some(), answer.status == 503);
    if answer.status >= 400 {
        let (text, kind) = (answer.text(), answer.header("Content-Type"));
        assert_eq!(kind, Some("text/plain; charset=utf-8"), "{what}");
        assert!(
            text.ends_with('\n') && text.lines().count() == 1 && text.len() > 10,
            "{what}: {text:?}"
        );
    }
}

/// Whether the connection ends is said by its answer, and true: nothing follows, or the next
/// request is answered.
#[track_caller]
fn expect_as_said(what: &str, connection: &mut Connection, answer: &Answer, ends: bool) {
    let said = answer.header("Connection");
    assert_eq!(said, ends.then_some("close"), "{what}: {}", answer.text());
    if ends {
        connection.expect_closed();
        return;
    }
    connection.send(request("GET", "/ping", "", b""));
    let next = connection.answer();
    assert_eq!((next.status, &*next.text()), (200, "ok\n"), "{what}");
}

/// Payloads that neither door may take, and why.
fn bad_payloads() -> Vec<(&'static str, Vec<u8>)> {
    let good = [
        ("topics", pack(&["news"])),
        ("events", list(&[map(&[("topic", pack("news"))])])),
    ];
    let deep = [vec![0x91; 4000], vec![0x90]].concat();
    vec![
        ("an empty payload", vec![]),
        ("no MessagePack", vec![0xc1]),
        ("text", b"Hello world!".to_vec()),
        ("JSON", br#"{"topics":["news"],"events":[]}"#.to_vec()),
        ("nil", vec![0xc0]),
        ("a number", pack(&7)),
        ("an empty map", map(&[])),
        ("a list in place of the map", list(&[pack(&["news"])])),
        ("a map cut short", map(&good)[..20].to_vec()),
        ("a map that promises more", {
            [&[0xdf, 0xff, 0xff, 0xff, 0xff][..], &map(&good)[5..]].concat()
        }),
        ("bytes behind the map", [map(&good), vec![0xc0]].concat()),
        ("the map twice", [map(&good), map(&good)].concat()),
        (
            "nil in place of the list",
            map(&[("topics", vec![0xc0]), ("events", vec![0xc0])]),
        ),
        (
            "text in place of the list",
            map(&[("topics", pack("news")), ("events", pack("news"))]),
        ),
        (
            "numbers in the list",
            map(&[("topics", pack(&[1, 2])), ("events", pack(&[1, 2]))]),
        ),
        (
            "a list of a promised 4 billion",
            map(&[("topics", vec![0xdd, 0xff, 0xff, 0xff, 0xff])]),
        ),
        ("a string of a promised 4 GiB", {
            let long = vec![0xdb, 0xff, 0xff, 0xff, 0xff];
            map(&[("topics", list(std::slice::from_ref(&long)))])
        }),
        (
            "lists 4,000 deep",
            map(&[("topics", deep.clone()), ("events", deep.clone())]),
        ),
        (
            "lists 4,000 deep under an unknown key",
            [
                &[0xdf, 0, 0, 0, 3][..],
                &map(&[("other", deep)])[5..],
                &map(&good)[5..],
            ]
            .concat(),
        ),
        (
            "numbers for keys",
            [&[0x81, 0x00][..], &pack(&["news"])].concat(),
        ),
        (
            "names in upper case",
            map(&[("Topics", pack(&["news"])), ("Events", list(&[]))]),
        ),
    ]
}

/// Submissions whose first event is good; one thing is wrong with what follows.
fn bad_submissions() -> Vec<(&'static str, Vec<u8>)> {
    let event = |topic: &str, name: &str| map(&[("topic", pack(topic)), ("event", pack(name))]);
    let good = || event("news", "update");
    let second = |event: Vec<u8>| map(&[("events", list(&[good(), event]))]);
    let long = "t".repeat(257);
    let not_utf8 = vec![0xa2, 0xff, 0xfe];
    let numbered_event = [&[0x81, 0x00][..], &pack("news")].concat();
    vec![
        ("an empty topic", second(event("", "update"))),
        ("a topic of 257 bytes", second(event(&long, "update"))),
        ("a name with LF", second(event("news", "up\ndate"))),
        ("a name with CR", second(event("news", "up\rdate"))),
        ("a name with NUL", second(event("news", "up\0date"))),
        ("a name that forges data", {
            second(event("news", "x\ndata: forged\n\n"))
        }),
        ("no topic", second(map(&[("event", pack("update"))]))),
        (
            "a topic that is no text",
            second(map(&[("topic", pack(&1))])),
        ),
        ("a topic not in UTF-8", {
            second(map(&[("topic", not_utf8.clone())]))
        }),
        ("data not in UTF-8", {
            second(map(&[("topic", pack("news")), ("data", not_utf8)]))
        }),
        ("data that is a number", {
            second(map(&[("topic", pack("news")), ("data", pack(&1))]))
        }),
        ("data that is nil", {
            second(map(&[("topic", pack("news")), ("data", vec![0xc0])]))
        }),
        ("a name that is nil", {
            second(map(&[("topic", pack("news")), ("event", vec![0xc0])]))
        }),
        ("an event that is nil", second(vec![0xc0])),
        (
            "an event that is a list",
            second(pack(&["news", "update", "hi"])),
        ),
        ("a list that ends early", {
            [&[0x81][..], &pack("events"), &[0x92], &good()].concat()
        }),
        ("an event with numbers for keys", second(numbered_event)),
        ("bytes behind the map", {
            [second(good()), b"\n".to_vec()].concat()
        }),
    ]
}

/// Every row of the protocol's table: the status tells a backend what to do, the text why, and
/// the CORS header lets a browser's console show it. None of them may help to guess a secret.
#[test]
fn what_is_wrong_is_answered_as_the_protocol_says() {
    // Nothing of this waits for a timeout.
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let good = server.token(&["news"]);
    let old = |payload: &[u8], age| server.mint_at(payload, now() - age);
    let foreign = mint(OTHER_SECRET, &topics_payload(&["news"]), now());
    let middle = good.len() / 2;
    let other = if &good[middle..=middle] == "a" {
        "b"
    } else {
        "a"
    };
    let tampered = [&good[..middle], other, &good[middle + 1..]].concat();

    let old_submission = old(&events_payload(&[("news", "", "")]), 400);
    let ahead = |payload: &[u8], time| server.mint_at(payload, now() + time);
    let topics = topics_payload(&["news"]);
    let events = events_payload(&[("news", "", "")]);
    let ten_years = 10 * 365 * 86_400;
    let too_many = server.submission(&[("news", "", ""); 65]);
    let mut rows = vec![
        refused("no query", 401, request("GET", "/events", "", b""), ""),
        refused("no token", 401, request("GET", "/events?", "", b""), ""),
        refused(
            "a token by another name",
            401,
            {
                request(
                    "GET",
                    &format!("/events?Token={good}&xtoken={good}"),
                    "",
                    b"",
                )
            },
            &good,
        ),
        events_with("an empty token", 401, ""),
        events_with("a short token", 401, "abc"),
        events_with("a token not in base62", 401, &"-".repeat(80)),
        events_with("a good token and a dash", 401, &format!("{good}-")),
        events_with("percent signs", 401, &format!("%61{good}")),
        events_with("a token cut short", 401, &good[..good.len() - 1]),
        events_with("a good token twice", 401, &good.repeat(2)),
        events_with("a tampered token", 401, &tampered),
        events_with("zeros", 401, &"0".repeat(100)),
        events_with("the largest digits", 401, &"z".repeat(4096)),
        events_with("a token too long", 414, &"z".repeat(4097)),
        events_with("another key's token", 401, &foreign),
        events_with(
            "an expired token",
            401,
            &old(&topics_payload(&["news"]), 86_500),
        ),
        events_with("an hour ahead", 401, &ahead(&topics, 3600)),
        events_with("ten years ahead", 401, &ahead(&topics, ten_years)),
        events_with("dated 2106", 401, &server.mint_at(&topics, u32::MAX)),
        events_with("no topics", 400, &server.mint(&topics_payload(&[]))),
        events_with("an empty topic", 400, &server.token(&["news", ""])),
        events_with(
            "a topic of 257 bytes",
            400,
            &server.token(&[&"t".repeat(257)]),
        ),
        events_with("65 topics", 400, &{
            let topics: Vec<String> = (0..65).map(|n| n.to_string()).collect();
            server.mint(&map(&[("topics", pack(&topics))]))
        }),
        events_with("a topic not in UTF-8", 400, &{
            server.mint(&map(&[("topics", list(&[vec![0xa2, 0xff, 0xfe]]))]))
        }),
        events_with("a submission", 400, &server.submission(&[("news", "", "")])),
        submit_with("no body", 401, b""),
        submit_with("a line end", 401, b"\n"),
        submit_with("text", 401, b"Hello world!"),
        submit_with("bytes", 401, &[0xff; 100]),
        submit_with("another key's token", 401, foreign.as_bytes()),
        submit_with("a tampered token", 401, tampered.as_bytes()),
        submit_with("an expired token", 401, old_submission.as_bytes()),
        submit_with("an hour ahead", 401, ahead(&events, 3600).as_bytes()),
        submit_with("ten years ahead", 401, ahead(&events, ten_years).as_bytes()),
        submit_with(
            "dated 2106",
            401,
            server.mint_at(&events, u32::MAX).as_bytes(),
        ),
        submit_with("a subscription's token", 400, good.as_bytes()),
        submit_with("more events than a queue holds", 413, too_many.as_bytes()),
        Refused {
            ends: true,
            ..submit_with("a body over the limit", 413, &[b'z'; 16_385])
        },
        refused_at_once(
            "a declared length over the limit, and no body",
            413,
            request("POST", "/submit", "Content-Length: 16385\r\n", b""),
        ),
        refused_at_once("a body in chunks", 411, {
            let body = chunked(&[good.as_bytes()]);
            request("POST", "/submit", "Transfer-Encoding: chunked\r\n", &body)
        }),
        refused_at_once("a head over 8 KiB", 431, {
            request("GET", "/ping", &format!("X: {}\r\n", "x".repeat(8192)), b"")
        }),
        refused_at_once("a request line over 8 KiB", 414, {
            request("GET", &format!("/ping?{}", "x".repeat(8192)), "", b"")
        }),
        refused_at_once("no HTTP", 400, b"Hello world!\r\n\r\n".to_vec()),
        refused_at_once("another version", 505, b"GET / HTTP/2.0\r\n\r\n".to_vec()),
        with_method("POST", "/events", "GET, HEAD, OPTIONS"),
        with_method("PUT", "/events?token=abc", "GET, HEAD, OPTIONS"),
        with_method("DELETE", "/events", "GET, HEAD, OPTIONS"),
        with_method("GET", "/submit", "POST, OPTIONS"),
        with_method("PUT", "/submit", "POST, OPTIONS"),
        with_method("PATCH", "/submit", "POST, OPTIONS"),
        with_method("POST", "/ping", "GET, HEAD, OPTIONS"),
        with_method("DELETE", "/ping", "GET, HEAD, OPTIONS"),
        with_method("BREW", "/ping", "GET, HEAD, OPTIONS"),
    ];
    for target in [
        "/",
        "/event",
        "/events/",
        "/Events",
        "//events",
        "/submit/",
        "/metrics",
        "/?token=a",
        "*",
    ] {
        let what = format!("GET {target}");
        rows.push(refused(&what, 404, request("GET", target, "", b""), ""));
    }
    for (what, payload) in bad_payloads() {
        let token = server.mint(&payload);
        // The deep ones are longer than a query may be; the submission's door sees them too.
        if token.len() <= 4096 {
            rows.push(events_with(what, 400, &token));
        }
        rows.push(submit_with(what, 400, token.as_bytes()));
    }
    for (what, payload) in bad_submissions() {
        rows.push(submit_with(what, 400, server.mint(&payload).as_bytes()));
    }

    for Refused {
        what,
        request,
        status,
        allow,
        token,
        ends,
    } in &rows
    {
        let what = format!(
            "{what}: {}",
            String::from_utf8_lossy(&request[..request.len().min(60)])
        );
        let (mut connection, asked) = (server.connect(), now());
        connection.send(request);
        let answer = connection.answer();
        let text = answer.text();
        assert_eq!(answer.status, *status, "{what}: {text}");
        expect_well_formed(&what, &answer, asked);
        assert!(!text.contains(SECRET), "{what}: {text}");
        let repeated = token.len() > 15
            && (0..token.len() - 15).any(|at| {
                token
                    .get(at..at + 15)
                    .is_some_and(|piece| text.contains(piece))
            });
        assert!(!repeated, "{what}: {text}");
        if let Some(scheme) = answer.header("WWW-Authenticate") {
            // One that no browser knows, or it would ask its user for a password.
            let known = ["basic", "digest", "negotiate", "ntlm"];
            let scheme = scheme.split(' ').next().unwrap().to_lowercase();
            assert!(!scheme.is_empty() && !known.contains(&&*scheme), "{what}");
        }
        assert_eq!(answer.header("Allow").unwrap_or_default(), *allow, "{what}");
        expect_as_said(&what, &mut connection, &answer, *ends);
    }
    // None of it has cost the server anything, and its log is as discreet as its answers.
    assert_eq!(server.publish(&[("news", "", "")]).ok(), 0);
    let log = server.log();
    assert!(
        !log.contains(SECRET) && !log.contains(&good[..20]) && !log.contains("forged"),
        "{log}"
    );
}

/// Java's HTTP client and curl's --http2 offer an upgrade with each request. It is declined, the
/// body ends where it was said to, and the connection does not end at all.
#[test]
fn an_offered_upgrade_is_declined_and_ends_nothing() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let mut sub = server.subscribe(&["news"]);
    let mut connection = server.connect();
    for size in [1, 9000, 2] {
        let data = "x".repeat(size);
        let body = server.submission(&[("news", "", &data)]);
        let fields = format!(
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\
             Content-Length: {}\r\n",
            body.len()
        );
        connection.send(request("POST", "/submit", &fields, body.as_bytes()));
        let answer = connection.answer();
        assert_eq!(answer.header("Connection"), None);
        assert_eq!(answer.header("Upgrade"), None);
        assert_eq!(Submitted::from(answer).ok(), 1);
        sub.expect_event("message", &data);
    }
    // So do streams, and so it is where the offer stands alone.
    for fields in [
        "Connection: Upgrade\r\nUpgrade: h2c\r\n",
        "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        "Upgrade: h2c\r\n",
    ] {
        connection.send(request("GET", "/ping", fields, b""));
        let answer = connection.answer();
        expect_as_said(fields, &mut connection, &answer, false);
        let target = format!("/events?token={}", server.token(&["news"]));
        let mut stream = server.connect();
        stream.send(request("GET", &target, fields, b""));
        assert_eq!(stream.head().status, 200);
    }
}

/// What is wrong in a payload is told to its sender alone.
#[test]
fn nothing_of_a_payload_is_logged() {
    let server = TestServer::start(&[]);
    let secret = "private-room-of-alice";
    for payload in [
        map(&[("topics", pack(secret))]),
        map(&[("events", pack(secret))]),
        map(&[("events", list(&[map(&[("data", pack(&4_111_111))])]))]),
    ] {
        let token = server.mint(&payload);
        assert_eq!(server.get(&format!("/events?token={token}")).status, 400);
        assert_eq!(server.post("/submit", token.as_bytes()).status, 400);
        server.wait_for_log("request refused: ");
    }
    let log = server.log();
    assert!(!log.contains("alice") && !log.contains("4111111"), "{log}");
}

/// A HEAD request has no body to be answered with, on an error neither: the bytes would be taken
/// for the next answer. What else there is to say is what GET would be told.
#[test]
fn head_is_answered_as_get_would_be_without_a_body() {
    let server = TestServer::start(&[("SSE_METRICS_LISTEN", "127.0.0.1:0")]);
    let good = format!("/events?token={}", server.token(&["news"]));
    let empty = format!("/events?token={}", server.token(&[]));
    let long = format!("/events?token={}", "z".repeat(4097));
    let mut connection = server.connect();
    for (target, status) in [
        ("/ping", 200),
        (&*good, 200),
        ("/events", 401),
        (&empty, 400),
        (&long, 414),
        ("/submit", 405),
        ("/nothing", 404),
    ] {
        let head_of = |connection: &mut Connection, method: &str| {
            connection.send(request(method, target, "", b""));
            let mut head = match method {
                "HEAD" => connection.head(),
                _ => connection.answer(),
            };
            assert_eq!(head.status, status, "{method} {target}");
            // Those are of the moment, and of the connection.
            let kept = |name: &str| name != "Date" && name != "Connection";
            head.fields.retain(|(name, _)| kept(name));
            head.fields
        };
        let head = head_of(&mut connection, "HEAD");
        // Still in step: nothing came behind the head, and no stream began.
        connection.send(request("GET", "/ping", "", b""));
        assert_eq!(connection.answer().text(), "ok\n", "{target}");
        assert_eq!(head, head_of(&mut server.connect(), "GET"), "{target}");
    }
    // The one stream is that of GET.
    server.wait_for_metric("sse_subscribers", 0);
    assert_eq!(server.metric("sse_streams_opened_total"), 1);
}

/// A health check with HEAD must not see room where there is none.
#[test]
fn head_of_a_stream_is_503_where_all_are_taken() {
    let server = TestServer::start(&[("SSE_MAX_SUBSCRIBERS", "1")]);
    let sub = server.subscribe(&["news"]);
    let target = format!("/events?token={}", server.token(&["news"]));
    let mut connection = server.connect();
    connection.send(request("HEAD", &target, "", b""));
    let answer = connection.head();
    assert_eq!(answer.status, 503);
    assert!(answer.header("Retry-After").is_some());
    expect_as_said("HEAD", &mut connection, &answer, false);
    drop(sub);
}

/// A backend's client writes its next request as soon as it has an answer, or before. A connection
/// that ended behind a refusal took good submissions with it: 60 of 60 with Node's agent.
#[test]
fn a_good_submission_right_behind_a_refused_one_is_taken() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let post = |body: &str| {
        let length = format!("Content-Length: {}\r\n", body.len());
        request("POST", "/submit", &length, body.as_bytes())
    };
    let refused = [
        (post("nonsense"), 401),
        (post(""), 401),
        (post(&server.mint(b"no MessagePack")), 400),
        (post(&server.submission(&[("", "", "")])), 400),
        (post(&server.submission(&[("news", "", ""); 65])), 413),
        (
            request("POST", "/nothing", "Content-Length: 5\r\n", b"hello"),
            404,
        ),
        (
            request("PUT", "/submit", "Content-Length: 5\r\n", b"hello"),
            405,
        ),
        (request("GET", "/events?token=nonsense", "", b""), 401),
    ];
    let mut connection = server.connect();
    for round in 0..60 {
        let (refused, status) = &refused[round % refused.len()];
        let data = round.to_string();
        let good = post(&server.submission(&[("news", "", &data)]));
        // By turns behind the answer, and without waiting for it.
        if round % 2 == 0 {
            connection.send(refused);
            assert_eq!(connection.answer().status, *status);
            connection.send(good);
        } else {
            connection.send([&refused[..], &good].concat());
            assert_eq!(connection.answer().status, *status);
        }
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("message", &data);
    }
}

/// A batch that no queue can hold could only cut its own listeners.
#[test]
fn more_events_than_sse_queue_are_refused_and_nothing_is_delivered() {
    for (settings, limit) in [(&[][..], 64), (&[("SSE_QUEUE", "2")], 2)] {
        let server = TestServer::start(settings);
        let mut sub = server.subscribe(&["news"]);
        for topic in ["news", "nobody"] {
            let batch = vec![(topic, "batch", ""); limit + 1];
            let answer = server.publish(&batch);
            assert_eq!(answer.status, 413, "{}", answer.body);
            assert!(answer.body.contains("SSE_QUEUE"), "{}", answer.body);
        }
        let batch = vec![("news", "whole", ""); limit];
        assert_eq!(server.publish(&batch).ok(), limit as u64);
        for _ in 0..limit {
            sub.expect_event("whole", "");
        }
        server.publish(&[("news", "after", "")]).ok();
        sub.expect_event("after", "");
    }
}

/// Half a submission would leave the subscribers in a state that the backend never meant.
#[test]
fn nothing_of_a_refused_submission_is_delivered() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    for (what, payload) in bad_submissions() {
        let answer = server.post("/submit", server.mint(&payload).as_bytes());
        assert_eq!(answer.status, 400, "{what}: {}", answer.text());
    }
    server.publish(&[("news", "after", "")]).ok();
    sub.expect_event("after", "");
}

/// A stranger's bytes must not become events, whatever is wrong with them.
#[test]
fn nothing_of_an_unauthenticated_submission_is_delivered() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let payload = events_payload(&[("news", "forged", "")]);
    let expired = server.mint_at(&payload, now() - 400);
    let foreign = mint(OTHER_SECRET, &payload, now());
    for token in [expired, foreign] {
        assert_eq!(server.post("/submit", token.as_bytes()).status, 401);
    }
    server.publish(&[("news", "after", "")]).ok();
    sub.expect_event("after", "");
}

// ------------------------------------------------------------------------------------- requests

/// What proxies and browsers need to see: no caching, no buffering, no length; nothing that
/// compresses, since it holds a stream back; a charset, since some readers guess another.
#[test]
fn a_stream_begins_as_the_protocol_says() {
    let server = TestServer::start(&[]);
    let (mut connection, asked) = (server.connect(), now());
    let target = format!("/events?token={}", server.token(&["news"]));
    connection.send(request("GET", &target, "Accept-Encoding: gzip\r\n", b""));
    let head = connection.head();
    assert_eq!(head.status, 200);
    expect_well_formed("a stream", &head, asked);
    for (name, value) in [
        ("Content-Type", Some("text/event-stream; charset=utf-8")),
        ("Cache-Control", Some("no-store, no-transform")),
        ("X-Accel-Buffering", Some("no")),
        ("Transfer-Encoding", Some("chunked")),
        ("Connection", Some("close")),
        ("Content-Length", None),
        ("Content-Encoding", None),
    ] {
        assert_eq!(head.header(name), value, "{name}");
    }
    // No event has come, and yet a browser's `onopen` has fired. No blank line: widely used
    // readers make an empty message of one.
    let first = String::from_utf8(connection.frame()).unwrap();
    let delay = first
        .strip_prefix("retry: ")
        .and_then(|rest| rest.strip_suffix("\n:\n"));
    let delay: u64 = delay.and_then(|delay| delay.parse().ok()).expect(&first);
    assert!((3000..=6000).contains(&delay), "{first:?}");
}

/// All bytes behind the head of a stream, which the server ends.
fn body_of(server: &TestServer, version: &str) -> String {
    let mut connection = server.connect();
    let target = format!("/events?token={}", server.token(&["news"]));
    connection.send(format!("GET {target} {version}\r\nHost: test\r\n\r\n"));
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    while !String::from_utf8_lossy(&bytes).contains("\n:\n") {
        let size = connection.read(&mut buffer);
        assert!(size > 0, "the stream ended");
        bytes.extend_from_slice(&buffer[..size]);
    }
    server
        .publish(&[("news", "update", "a\nb"), ("news", "", "")])
        .ok();
    server.signal("TERM");
    bytes.extend(connection.rest());
    let text = String::from_utf8(bytes).unwrap();
    text.split_once("\r\n\r\n").expect("a head").1.to_string()
}

/// Clients built on Python's requests show a small event of an unchunked body only when 512 bytes
/// have come; and how a stream ended nobody could tell. One chunk a frame, or an event would wait
/// for the rest of its chunk.
#[test]
fn each_frame_is_a_chunk_and_the_last_one_says_that_this_is_the_end() {
    let server = TestServer::start(&[("SSE_RETRY", "2000"), ("SSE_HEARTBEAT", "600")]);
    let body = body_of(&server, "HTTP/1.1");
    let retries: Vec<_> = body
        .split("retry: ")
        .skip(1)
        .map(|rest| &rest[..4])
        .collect();
    let [first, last] = retries[..] else {
        panic!("{body:?}")
    };
    let chunk = |frame: &str| format!("{:x}\r\n{frame}\r\n", frame.len());
    let expected = [
        chunk(&format!("retry: {first}\n:\n")),
        chunk("event: update\ndata: a\ndata: b\n\n"),
        chunk("data: \n\n"),
        chunk(&format!("retry: {last}\n")),
        "0\r\n\r\n".into(),
    ];
    assert_eq!(body, expected.concat());
}

/// nginx speaks it to its upstreams as it comes: no chunks, and the end is the close.
#[test]
fn a_stream_of_http_1_0_is_sent_as_it_is() {
    let server = TestServer::start(&[("SSE_RETRY", "2000"), ("SSE_HEARTBEAT", "600")]);
    let body = body_of(&server, "HTTP/1.0");
    let retries: Vec<_> = body
        .split("retry: ")
        .skip(1)
        .map(|rest| &rest[..4])
        .collect();
    let [first, last] = retries[..] else {
        panic!("{body:?}")
    };
    let expected =
        format!("retry: {first}\n:\nevent: update\ndata: a\ndata: b\n\ndata: \n\nretry: {last}\n");
    assert_eq!(body, expected);
}

/// A client that took a break for an end would believe that it has missed nothing.
#[test]
fn a_stream_that_breaks_off_can_be_told_from_one_that_ended() {
    let end = |signal: &str| {
        let server = TestServer::start(&[]);
        let mut sub = server.subscribe(&["news"]);
        server.publish(&[("news", "update", "hi")]).ok();
        sub.expect_event("update", "hi");
        server.signal(signal);
        sub.expect_end();
        sub.connection.whole
    };
    assert!(end("TERM"), "a farewell");
    assert!(end("INT"), "a farewell");
    assert!(!end("KILL"), "a server that was killed");
    // One that is cut, since it does not read. Every line end becomes a line of the frame.
    let server = TestServer::start(&[("SSE_QUEUE", "2")]);
    let mut stalled = server.subscribe(&["news"]);
    let data = "\n".repeat(4000);
    let cut = wait_until(DEADLINE, || {
        server.publish(&[("news", "", &data)]).ok() == 0
    });
    assert!(cut, "nobody was cut");
    assert!(!stalled.rest().is_empty());
    assert!(!stalled.connection.whole, "a cut that looks like an end");
}

/// The gap that every push server must close: between the head and the registration an event
/// could be lost, and the client would never know.
#[test]
fn an_event_submitted_after_the_head_was_read_arrives() {
    let server = TestServer::start(&[]);
    let token = server.token(&["news"]);
    let mut publisher = server.connect();
    for round in 0..500 {
        let round = round.to_string();
        let body = server.submission(&[("news", "update", &round)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        let mut sub = server.stream(&token);
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        // Those of earlier rounds may not have been noticed to be gone.
        assert!(Submitted::from(publisher.answer()).ok() >= 1);
        sub.expect_event("update", &round);
    }
}

#[test]
fn an_event_reaches_the_subscribers_of_its_topic_and_no_others() {
    let server = TestServer::start(&[]);
    let mut news = server.subscribe(&["news"]);
    let mut sport = server.subscribe(&["sport"]);
    let mut both = server.subscribe(&["sport", "news"]);
    assert_eq!(server.publish(&[("news", "a", "1")]).ok(), 2);
    assert_eq!(server.publish(&[("sport", "b", "2")]).ok(), 2);
    // A topic is compared byte by byte: none of these is one of theirs.
    for other in ["News", "new", "news ", "news/today", "*", "nobody"] {
        assert_eq!(server.publish(&[(other, "c", "3")]).ok(), 0, "{other}");
    }
    let answer = server.publish(&[
        ("news", "d", "4"),
        ("sport", "d", "5"),
        ("nobody", "d", "6"),
    ]);
    assert_eq!((answer.events, answer.ok()), (3, 4));
    for (sub, expected) in [
        (&mut news, vec![("a", "1"), ("d", "4")]),
        (&mut sport, vec![("b", "2"), ("d", "5")]),
        (
            &mut both,
            vec![("a", "1"), ("b", "2"), ("d", "4"), ("d", "5")],
        ),
    ] {
        for (name, data) in expected {
            sub.expect_event(name, data);
        }
    }
}

#[test]
fn the_answer_to_a_submission_is_json_with_both_counts() {
    let server = TestServer::start(&[]);
    let _sub = server.subscribe(&["news"]);
    let body = server.submission(&[("news", "", ""), ("nobody", "", "")]);
    let answer = server.post("/submit", body.as_bytes());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    assert_eq!(answer.header("Access-Control-Allow-Origin"), Some("*"));
    assert_eq!(
        answer.text().trim_end(),
        r#"{"events": 2, "deliveries": 1}"#
    );
    // Nothing to publish is no mistake: a backend may submit what it has collected.
    let answer = server.publish(&[]);
    assert_eq!(
        (answer.status, answer.events, answer.deliveries),
        (200, 0, 0)
    );
}

#[test]
fn a_missing_name_or_data_means_the_default() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let topic = || ("topic", pack("news"));
    let events = [
        map(&[topic()]),
        map(&[topic(), ("event", pack("")), ("data", pack("a"))]),
        map(&[topic(), ("data", pack("b"))]),
        map(&[topic(), ("event", pack("update"))]),
    ];
    let body = server.mint(&map(&[("events", list(&events))]));
    assert_eq!(
        Submitted::from(server.post("/submit", body.as_bytes())).ok(),
        4
    );
    sub.expect_event("message", "");
    sub.expect_event("message", "a");
    sub.expect_event("message", "b");
    sub.expect_event("update", "");
}

/// Old and new backends may add to a payload what this server does not know.
#[test]
fn unknown_keys_and_duplicate_topics_do_no_harm() {
    let server = TestServer::start(&[]);
    let unknown = map(&[
        ("a", list(&[vec![0xc0], pack(&-1), pack(&1.5)])),
        ("", pack(&true)),
    ]);
    let extension = vec![0xc7, 3, 9, 1, 2, 3];
    let payload = map(&[
        ("user", unknown.clone()),
        ("topics", pack(&["news", "news", "sport", "news"])),
        ("extension", extension.clone()),
    ]);
    let mut sub = server.stream(&server.mint(&payload));
    let event = map(&[
        ("id", unknown.clone()),
        ("topic", pack("news")),
        ("x", extension),
    ]);
    let payload = map(&[
        ("v", unknown),
        ("events", list(&[event])),
        ("topics", pack(&7)),
    ]);
    let body = server.mint(&payload);
    let deliveries = Submitted::from(server.post("/submit", body.as_bytes())).ok();
    assert_eq!(deliveries, 1, "a topic counts once");
    sub.expect_event("message", "");
    // Also where the limit is concerned.
    let many = map(&[("topics", pack(&["news"; 200][..]))]);
    assert_eq!(server.stream(&server.mint(&many)).head.status, 200);
}

/// Polyfills add `lastEventId` and cache breakers to the query.
#[test]
fn other_query_parameters_and_headers_are_ignored() {
    let server = TestServer::start(&[]);
    let token = server.token(&["news"]);
    for target in [
        format!("/events?lastEventId=7&token={token}"),
        format!("/events?token={token}&r=0.123&x"),
        format!("/events?&&a=b=c&%00=%zz&token={token}&token=abc"),
    ] {
        let mut sub = subscribe(server.addr, &target);
        server.publish(&[("news", "update", "hi")]).ok();
        sub.expect_event("update", "hi");
    }
    let fields = "Last-Event-ID: 7\r\nCache-Control: no-cache\r\nOrigin: https://app.example\r\n";
    let mut connection = server.connect();
    connection.send(request(
        "GET",
        &format!("/events?token={token}"),
        fields,
        b"",
    ));
    assert_eq!(connection.head().status, 200);
    // `curl --data` says that the body is a form. It is a token.
    let body = server.submission(&[("news", "update", "hi")]);
    let fields = format!(
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n",
        body.len() + 2
    );
    let answer = server.raw(request(
        "POST",
        "/submit?a=b",
        &fields,
        format!("{body}\r\n").as_bytes(),
    ));
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn ping_needs_no_token() {
    let server = TestServer::start(&[]);
    for target in ["/ping", "/ping?", "/ping?check=1"] {
        let answer = server.get(target);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("Access-Control-Allow-Origin"), Some("*"));
    }
}

/// A page of another origin, with credentials and without, directly and after a redirect, when
/// browsers say `null`: what protects a stream is its token.
#[test]
fn an_origin_is_echoed_where_it_is_allowed() {
    let server = |setting: &str| {
        let settings = [
            ("SSE_ALLOW_ORIGIN", setting),
            ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
        ];
        TestServer::start(&settings[usize::from(setting.is_empty())..])
    };
    let list = "https://app.example, http://localhost:3000,null";
    let (app, local) = ("https://app.example", "http://localhost:3000");
    for (setting, origin, echoed) in [
        ("*", "", "*"),
        ("*", app, app),
        ("*", local, local),
        ("*", "null", "null"),
        (
            "*",
            "chrome-extension://abcdef",
            "chrome-extension://abcdef",
        ),
        (list, app, app),
        (list, local, local),
        (list, "null", "null"),
        (list, "https://app.example.evil", ""),
        (list, "https://app.exampl", ""),
        (list, "http://app.example", ""),
        (list, "https://app.example, http://localhost:3000", app),
        (list, "*", ""),
        (app, app, app),
        (app, "null", ""),
        (app, local, ""),
    ] {
        let server = server(setting);
        let token = server.token(&["news"]);
        let length = |body: &str| format!("Content-Length: {}\r\n", body.len());
        let submission = server.submission(&[("news", "", "")]);
        for (method, target, body, status) in [
            ("GET", format!("/events?token={token}"), "", 200),
            ("HEAD", format!("/events?token={token}"), "", 200),
            ("GET", "/events".into(), "", 401),
            ("POST", "/submit".into(), &*submission, 200),
            ("POST", "/submit".into(), "nonsense", 401),
            ("GET", "/ping".into(), "", 200),
            ("GET", "/nothing".into(), "", 404),
            ("PUT", "/events".into(), "", 405),
            ("OPTIONS", "/events".into(), "", 204),
        ] {
            let mut fields = length(body);
            if !origin.is_empty() {
                fields += &format!("Origin: {origin}\r\n");
            }
            let mut connection = server.connect();
            connection.send(request(method, &target, &fields, body.as_bytes()));
            let head = connection.head();
            let what = format!("{setting:?} {origin:?} {method} {target}");
            assert_eq!(head.status, status, "{what}");
            let allowed = head
                .header("Access-Control-Allow-Origin")
                .unwrap_or_default();
            assert_eq!(allowed, echoed, "{what}");
            let credentials = head.header("Access-Control-Allow-Credentials");
            let echo = !origin.is_empty() && !echoed.is_empty();
            assert_eq!(credentials, echo.then_some("true"), "{what}");
            // Else a cache would give one page the answer to another.
            assert_eq!(head.header("Vary"), Some("Origin"), "{what}");
        }
    }
}

/// It is for the operator's own network, and no page has any business there.
#[test]
fn the_metrics_address_allows_no_origin() {
    let server = TestServer::start(&[("SSE_METRICS_LISTEN", "127.0.0.1:0")]);
    let mut connection = Connection::open(server.metrics.unwrap());
    for target in ["/metrics", "/nothing"] {
        connection.send(request(
            "GET",
            target,
            "Origin: https://app.example\r\n",
            b"",
        ));
        let answer = connection.answer();
        let cors = answer.text().to_lowercase().contains("access-control");
        assert!(!cors, "{}", answer.text());
    }
}

/// Whoever is no longer allowed to listen hears no more when the token's time is over; and a page
/// whose stream goes on through a proxy that keeps reading for it does not hold it for ever.
#[test]
fn a_stream_ends_with_its_token() {
    let metrics = ("SSE_METRICS_LISTEN", "127.0.0.1:0");
    let server = TestServer::start(&[("SSE_TOKEN_TTL", "10"), ("SSE_RETRY", "500"), metrics]);
    let payload = topics_payload(&["news"]);
    let (left, began) = (6, Instant::now());
    let mut subs: Vec<_> = (0..20)
        .map(|_| server.stream(&server.mint_at(&payload, now() - 10 + left)))
        .collect();
    server.publish(&[("news", "", "before")]).ok();
    let mut ends = Vec::new();
    for sub in &mut subs {
        sub.expect_event("message", "before");
        match sub.item() {
            Some(Item::Retry(delay)) => assert!((500..=1000).contains(&delay), "{delay}"),
            other => panic!("no farewell but {other:?}"),
        }
        sub.expect_end();
        assert!(sub.connection.whole, "an end that looks like a break");
        ends.push(began.elapsed());
    }
    // A second's part is lost in the token's date; each may end when the next look is due.
    let earliest = Duration::from_millis(900 * (u64::from(left) - 1));
    assert!(ends[0] >= earliest, "{ends:?}");
    let expired = "sse_streams_ended_total{reason=\"expired\"}";
    server.wait_for_metric(expired, 20);
    assert_eq!(server.metric("sse_subscribers"), 0);
    assert!(!server.log().contains("stream cut"), "{}", server.log());
}

/// Where the application can give it a new one without a line of script.
#[test]
fn an_expired_token_is_sent_for_a_new_one_where_that_is_set() {
    let payload = topics_payload(&["news"]);
    for url in ["/events", "https://app.example/events?x=1", ""] {
        let metrics = ("SSE_METRICS_LISTEN", "127.0.0.1:0");
        let settings = [metrics, ("SSE_TOKEN_TTL", "60"), ("SSE_RENEW_URL", url)];
        let server = TestServer::start(&settings[..2 + usize::from(!url.is_empty())]);
        let ask = |token: &str, method: &str| {
            let target = format!("/events?token={token}");
            let fields = "Accept: text/event-stream\r\nOrigin: null\r\n";
            let mut connection = server.connect();
            connection.send(request(method, &target, fields, b""));
            connection.head()
        };
        let expired = server.mint_at(&payload, now() - 70);
        for method in ["GET", "HEAD"] {
            let answer = ask(&expired, method);
            let (status, location) = match url {
                "" => (401, None),
                _ => (307, Some(url)),
            };
            assert_eq!(answer.status, status);
            assert_eq!(answer.header("Location"), location);
            assert_eq!(answer.header("Access-Control-Allow-Origin"), Some("null"));
        }
        // Only what was once good leads there: else strangers could send browsers round.
        let foreign = mint(OTHER_SECRET, &payload, now() - 70);
        let ahead = server.mint_at(&payload, now() + 3600);
        for token in ["", "abc", &*foreign, &*ahead] {
            assert_eq!(ask(token, "GET").status, 401);
        }
        let old = server.mint_at(&events_payload(&[("news", "", "")]), now() - 400);
        assert_eq!(server.post("/submit", old.as_bytes()).status, 401);
        let status = [401, 307][usize::from(!url.is_empty())];
        let sample = format!("sse_answers_total{{status=\"{status}\"}}");
        assert!(server.metric(&sample) >= 2);
    }
}

/// A backend developer reads the answer, and knows what to mend.
#[test]
fn a_refusal_says_its_cause() {
    let settings = [
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
        ("SSE_MAX_TOPICS", "2"),
    ];
    let server = TestServer::start(&settings);
    let topics = topics_payload(&["news"]);
    let events = |event: &[(&str, Vec<u8>)]| map(&[("events", list(&[map(event)]))]);
    let misspelt = map(&[("topcis", list(&[pack("news")]))]);
    let number = map(&[("topics", list(&[pack(&5)]))]);
    let sealed = |payload: &[u8]| server.mint(payload);
    // The key as text, as if fromhex had been forgotten.
    let text_key: String = SECRET
        .bytes()
        .take(32)
        .map(|it| format!("{it:02x}"))
        .collect();
    let mut tampered = server.token(&["news"]);
    tampered.replace_range(70..71, if &tampered[70..71] == "a" { "b" } else { "a" });
    let good = |field, value| events(&[("topic", pack("a")), (field, value)]);
    let rows = [
        ("/events", "".into(), 401, "no token"),
        ("/events", "a%20b".into(), 401, "base62"),
        ("/events", "abc".into(), 401, "no Branca token"),
        ("/events", "z".repeat(100), 401, "no Branca token"),
        ("/events", "{\"topics\":[\"news\"]}".into(), 401, "JSON"),
        (
            "/events",
            mint(&text_key, &topics, now()),
            401,
            "64 hex digits",
        ),
        (
            "/events",
            mint(OTHER_SECRET, &topics, now()),
            401,
            "SSE_SECRET",
        ),
        ("/events", tampered, 401, "changed"),
        (
            "/events",
            server.mint_at(&topics, now() - 86_400 - 3600),
            401,
            "expired 3600 seconds ago",
        ),
        (
            "/events",
            server.mint_at(&topics, now() + 3600),
            401,
            "dated 3600 seconds ahead",
        ),
        ("/events", sealed(b"{\"topics\": [\"news\"]}"), 400, "JSON"),
        ("/events", sealed(b"[\"news\"]"), 400, "JSON"),
        ("/events", sealed(&[0xc1]), 400, "MessagePack"),
        ("/events", sealed(&pack(&5)), 400, "map"),
        ("/events", sealed(&misspelt), 400, "no topics"),
        (
            "/events",
            sealed(&number),
            400,
            "a topic has to be a string",
        ),
        (
            "/events",
            sealed(&map(&[("topics", pack("news"))])),
            400,
            "topics has to be a list",
        ),
        (
            "/events",
            sealed(&topics_payload(&[])),
            400,
            "SSE_MAX_TOPICS",
        ),
        (
            "/events",
            server.token(&["a", "b", "c"]),
            400,
            "SSE_MAX_TOPICS",
        ),
        ("/events", server.token(&[""]), 400, "1 to 256 bytes"),
        ("/events", "z".repeat(4097), 414, "4096"),
        ("/submit", "".into(), 401, "no token"),
        ("/submit", "[{\"topic\": \"news\"}]".into(), 401, "JSON"),
        ("/submit", server.token(&["news"]), 400, "no events"),
        (
            "/submit",
            sealed(&map(&[("events", list(&[pack("x")]))])),
            400,
            "an event has to be a map",
        ),
        (
            "/submit",
            sealed(&events(&[("event", pack("x"))])),
            400,
            "1 to 256 bytes",
        ),
        (
            "/submit",
            sealed(&events(&[("topic", pack(&5))])),
            400,
            "topic has to be a string",
        ),
        (
            "/submit",
            sealed(&good("event", pack(&5))),
            400,
            "event has to be a string",
        ),
        (
            "/submit",
            sealed(&good("data", pack(&5))),
            400,
            "data has to be a string",
        ),
        (
            "/submit",
            sealed(&good("event", pack("a\nb"))),
            400,
            "CR, LF or NUL",
        ),
        ("/submit", "z".repeat(16_385), 413, "SSE_MAX_BODY"),
    ];
    for (door, token, status, cause) in rows {
        let answer = match door {
            "/events" => server.get(&format!("/events?token={token}")),
            _ => server.post("/submit", token.as_bytes()),
        };
        let body = String::from_utf8(answer.body.clone()).unwrap();
        assert_eq!(answer.status, status, "{cause}: {body}");
        assert!(body.contains(cause), "{cause}: {body}");
        assert_eq!(body.lines().count(), 1, "{body}");
        let challenge = answer.header("WWW-Authenticate");
        assert_eq!(challenge.is_some(), status == 401, "{cause}");
    }
}

/// A browser asks first where a script sets header fields of its own; tracing libraries add theirs
/// to every request. HAProxy's health check asks so, too, and for no path of ours.
#[test]
fn options_is_answered_with_the_cors_headers_on_any_path() {
    let server = TestServer::start(&[("SSE_ALLOW_ORIGIN", "https://app.example")]);
    let wanted = "authorization,traceparent, Sentry-Trace ,baggage,x-requested-with";
    let fields = format!(
        "Origin: https://app.example\r\nAccess-Control-Request-Method: GET\r\n\
         Access-Control-Request-Headers: {wanted}\r\nAccess-Control-Request-Headers: x-more\r\n"
    );
    let mut connection = server.connect();
    for path in [
        "/events?token=x",
        "/submit",
        "/ping",
        "/",
        "*",
        "/other",
        "http://test/events",
        "http://test",
    ] {
        for fields in ["", "Content-Length: 0\r\n", &fields] {
            connection.send(request("OPTIONS", path, fields, b""));
            let answer = connection.answer();
            assert_eq!(answer.status, 204, "{path}");
            // Some clients and relays refuse a 204 that has either.
            for name in ["Content-Length", "Content-Type", "Transfer-Encoding"] {
                assert_eq!(answer.header(name), None, "{path}");
            }
            let field = |name| answer.header(name).unwrap_or_default().to_lowercase();
            let words = |name| -> BTreeSet<String> {
                let value = field(name);
                value.split(',').map(|word| word.trim().into()).collect()
            };
            assert_eq!(field("Access-Control-Allow-Origin"), "https://app.example");
            for method in ["get", "head", "post", "options"] {
                assert!(words("Access-Control-Allow-Methods").contains(method));
            }
            let allowed = words("Access-Control-Allow-Headers");
            for name in ["cache-control", "last-event-id", "content-type"] {
                assert!(allowed.contains(name), "{name}");
            }
            for name in wanted.to_lowercase().split(',').chain(["x-more"]) {
                let asked = fields.contains("x-more");
                assert_eq!(allowed.contains(name.trim()), asked, "{name}");
            }
        }
    }
    // No body: the connection is still in step.
    connection.send(request("GET", "/ping", "", b""));
    assert_eq!(connection.answer().status, 200);
    // The setting holds for everything else, too.
    let sub = server.subscribe(&["news"]);
    let origin = sub.head.header("Access-Control-Allow-Origin");
    assert_eq!(origin, Some("https://app.example"));
    let answer = server.get("/nothing");
    assert_eq!(
        answer.header("Access-Control-Allow-Origin"),
        Some("https://app.example")
    );
}

/// A publisher that had to connect anew for each submission would run out of ports.
#[test]
fn a_publisher_may_keep_its_connection() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let mut connection = server.connect();
    for number in 0..100 {
        let number = number.to_string();
        let body = server.submission(&[("news", "", &number)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("message", &number);
    }
    connection.send(request("GET", "/ping", "Connection: close\r\n", b""));
    assert_eq!(connection.answer().status, 200);
    connection.expect_closed();
}

/// Some proxies and health checks still speak it: each answer ends its connection.
#[test]
fn http_1_0_works() {
    let server = TestServer::start(&[]);
    let old = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        let mut connection = server.connect();
        connection.send(text.replace("HTTP/1.1\r\nHost: test", "HTTP/1.0"));
        connection
    };
    for (fields, target, status) in [
        ("", "/ping", 200),
        ("Connection: keep-alive\r\n", "/ping", 200),
        ("", "/nothing", 404),
    ] {
        let mut connection = old(request("GET", target, fields, b""));
        let answer = connection.answer();
        assert_eq!(answer.status, status);
        expect_as_said(fields, &mut connection, &answer, true);
    }
    let target = format!("/events?token={}", server.token(&["news"]));
    let mut sub = Subscriber::on(old(request("GET", &target, "", b"")));
    assert_eq!(sub.head.header("Transfer-Encoding"), None);
    assert_eq!(sub.head.header("Content-Length"), None);

    let body = server.submission(&[("news", "update", "hi")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let mut connection = old(request("POST", "/submit", &length, body.as_bytes()));
    assert_eq!(Submitted::from(connection.answer()).ok(), 1);
    connection.expect_closed();
    sub.expect_event("update", "hi");
}

/// Where a body ends is said by one number, or two readers could see two ends: what stands in
/// chunks is not read, whatever else is said of it.
#[test]
fn a_chunked_submission_is_refused_with_411() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let body = server.submission(&[("news", "forged", "")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let coding = "Transfer-Encoding: chunked\r\n";
    let smuggled = request("POST", "/submit", &length, body.as_bytes());
    for (fields, body) in [
        (coding.to_string(), chunked(&[body.as_bytes()])),
        (format!("{length}{coding}"), chunked(&[body.as_bytes()])),
        (format!("{coding}{length}"), body.clone().into_bytes()),
        ("Transfer-Encoding: identity\r\n".into(), vec![]),
        (format!("{coding}Content-Length: 0\r\n"), smuggled),
        (format!("{coding}Expect: 100-continue\r\n"), vec![]),
    ] {
        let (mut connection, asked) = (server.connect(), now());
        connection.send(request("POST", "/submit", &fields, &body));
        let answer = connection.answer();
        assert_eq!(answer.status, 411, "{fields}");
        expect_well_formed(&fields, &answer, asked);
        expect_as_said(&fields, &mut connection, &answer, true);
    }
    server.publish(&[("news", "after", "")]).ok();
    sub.expect_event("after", "");
}

/// curl sends it with every body over a kilobyte, and waits.
#[test]
fn expect_100_continue_works() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let mut connection = server.connect();
    let body = server.submission(&[("news", "update", &"x".repeat(2000))]);
    let expect = "Expect: 100-continue\r\n";
    let fields = format!("Content-Length: {}\r\n{expect}", body.len());
    for _ in 0..2 {
        connection.send(request("POST", "/submit", &fields, b""));
        let interim = connection.head();
        assert_eq!(interim.status, 100);
        assert_eq!(interim.header("Connection"), None);
        connection.send(&body);
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("update", &"x".repeat(2000));
    }
    // Whoever does not wait may be told nothing: then there is one answer less.
    connection.send(request("POST", "/submit", &fields, body.as_bytes()));
    let answer = connection.answer();
    let answer = match answer.status {
        100 => connection.answer(),
        _ => answer,
    };
    assert_eq!(Submitted::from(answer).ok(), 1);
    // HTTP/1.0 has no such answer, and no body no need of one.
    let old = format!("POST /submit HTTP/1.0\r\n{fields}\r\n");
    let mut older = server.connect();
    older.send(&old);
    older.send(&body);
    assert_eq!(Submitted::from(older.answer()).ok(), 1);
    connection.send(request("GET", "/ping", expect, b""));
    assert_eq!(connection.answer().status, 200);
    // Who would send too much is told before.
    let fields = format!("Content-Length: 16385\r\n{expect}");
    connection.send(request("POST", "/submit", &fields, b""));
    let answer = connection.answer();
    assert_eq!(answer.status, 413);
    expect_as_said("too much", &mut connection, &answer, true);
}

#[test]
fn a_body_just_at_the_limit_is_taken_and_one_over_it_is_not() {
    let data = "x".repeat(11_000);
    let body = mint(SECRET, &events_payload(&[("news", "", &data)]), now());
    // In base62 not every length occurs, so the limit is fitted to the body.
    for (limit, status) in [(body.len(), 200), (body.len() - 1, 413)] {
        let server = TestServer::start(&[("SSE_MAX_BODY", &limit.to_string())]);
        let mut sub = server.subscribe(&["news"]);
        assert_eq!(server.post("/submit", body.as_bytes()).status, status);
        if status == 200 {
            sub.expect_event("message", &data);
        }
    }
}

// ----------------------------------------------------------------------------------------- HTTP

/// One rule of HTTP: a request that keeps or breaks it, and what has to come of it.
struct Rule {
    /// Of RFC 9112 where it is a number alone.
    section: &'static str,
    what: &'static str,
    request: Vec<u8>,
    status: u16,
    /// No other request can follow.
    ends: bool,
}

/// What is as it should be: answered with this status, and the next request after it.
fn kept(section: &'static str, what: &'static str, status: u16, request: impl AsRef<[u8]>) -> Rule {
    Rule {
        section,
        what,
        request: request.as_ref().into(),
        status,
        ends: false,
    }
}

/// What can be the last of its connection only.
fn last(section: &'static str, what: &'static str, status: u16, request: impl AsRef<[u8]>) -> Rule {
    Rule {
        ends: true,
        ..kept(section, what, status, request)
    }
}

const PING: &str = "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n";

/// A request with this first line.
fn line(line: &str) -> String {
    format!("{line}\r\nHost: x\r\n\r\n")
}

/// A request with these fields, of which each has its end.
fn fields(fields: impl AsRef<[u8]>) -> Vec<u8> {
    [
        b"GET /ping HTTP/1.1\r\nHost: x\r\n",
        fields.as_ref(),
        b"\r\n",
    ]
    .concat()
}

/// A request with these hosts alone.
fn hosts(fields: &str) -> String {
    format!("GET /ping HTTP/1.1\r\n{fields}\r\n")
}

/// A request with a body of five bytes, and these fields that say so or do not.
fn with_body(fields: &str) -> String {
    format!("GET /ping HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\nhello")
}

#[rustfmt::skip] // One row a rule.
fn rules() -> Vec<Rule> {
    vec![
        // Parsing: the end of a line is CRLF and nothing else.
        kept("2.2", "a CRLF in front of a request", 200, format!("\r\n{PING}")),
        kept("2.2", "several of them", 200, format!("\r\n\r\n\r\n{PING}")),
        last("2.2", "LF alone behind the request line", 400, "GET /ping HTTP/1.1\nHost: x\r\n\r\n"),
        last("2.2", "LF alone behind a field", 400, "GET /ping HTTP/1.1\r\nHost: x\n\r\n"),
        last("2.2", "LF alone as the last line", 400, "GET /ping HTTP/1.1\r\nHost: x\r\n\n"),
        last("2.2", "LF alone everywhere", 400, "GET /ping HTTP/1.1\nHost: x\n\n"),
        last("2.2", "CR alone in the request line", 400, line("GET /ping\rHTTP/1.1")),
        last("2.2", "CR alone behind the version", 400, "GET /ping HTTP/1.1\rX: y\r\nHost: x\r\n\r\n"),
        last("2.2", "CR alone in a value", 400, fields("X: a\rb\r\n")),
        last("2.2", "CR alone that would begin a field", 400, fields("X: a\rContent-Length: 5\r\n")),
        last("2.2", "two CR at the end of a line", 400, fields("X: a\r\r\n")),
        last("2.2", "CR alone as the last line", 400, "GET /ping HTTP/1.1\r\nHost: x\r\n\r\r\n"),
        last("2.2", "space in front of the first field", 400, "GET /ping HTTP/1.1\r\n Host: x\r\n\r\n"),
        last("2.2", "a first field that is only space", 400, "GET /ping HTTP/1.1\r\n \r\nHost: x\r\n\r\n"),
        last("2.2", "no HTTP: a greeting of SSH", 400, "SSH-2.0-OpenSSH_9.2\r\n"),
        last("2.2", "no HTTP: a greeting of TLS", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        // The version: one digit, a full stop, one digit.
        last("2.3", "HTTP/1.2", 505, line("GET /ping HTTP/1.2")),
        last("2.3", "HTTP/2.0", 505, line("GET /ping HTTP/2.0")),
        last("2.3", "HTTP/3.0", 505, line("GET /ping HTTP/3.0")),
        last("2.3", "HTTP/0.9", 505, line("GET /ping HTTP/0.9")),
        last("2.3", "HTTP/9.9", 505, line("GET /ping HTTP/9.9")),
        last("2.3", "the preface of HTTP/2", 505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        last("2.3", "a version in lower case", 400, line("GET /ping http/1.1")),
        last("2.3", "half a version", 400, line("GET /ping HTTP/1")),
        last("2.3", "a version without its end", 400, line("GET /ping HTTP/1.")),
        last("2.3", "a version of two digits", 400, line("GET /ping HTTP/1.10")),
        last("2.3", "a version of two digits in front", 400, line("GET /ping HTTP/11.1")),
        last("2.3", "a version with a sign", 400, line("GET /ping HTTP/+1.1")),
        last("2.3", "a version with a comma", 400, line("GET /ping HTTP/1,1")),
        last("2.3", "a version with more behind it", 400, line("GET /ping HTTP/1.1x")),
        last("2.3", "a version of something else", 400, line("GET /ping HTTPS/1.1")),
        last("2.3", "a digit that is none of ASCII", 400, line("GET /ping HTTP/1.\u{661}")),
        // The request line: three words, one space between them.
        last("3", "two spaces behind the method", 400, line("GET  /ping HTTP/1.1")),
        last("3", "two spaces behind the target", 400, line("GET /ping  HTTP/1.1")),
        last("3", "a space in front", 400, line(" GET /ping HTTP/1.1")),
        last("3", "a space behind", 400, line("GET /ping HTTP/1.1 ")),
        last("3", "tabs for spaces", 400, line("GET\t/ping\tHTTP/1.1")),
        last("3", "a fourth word", 400, line("GET /ping x HTTP/1.1")),
        last("3", "no version, as in HTTP/0.9", 400, line("GET /ping")),
        last("3", "a method alone", 400, line("GET")),
        last("3", "no method", 400, line("/ping HTTP/1.1")),
        kept("3.1", "a method in lower case is another", 405, line("get /ping HTTP/1.1")),
        kept("3.1", "a method of all that a token may have", 405, line("!#$%&'*+-.^_`|~0aZ /ping HTTP/1.1")),
        last("3.1", "a method that is no token", 400, line("G(T) /ping HTTP/1.1")),
        last("3.1", "a method with a colon", 400, line("GET: /ping HTTP/1.1")),
        last("3.1", "a method not in ASCII", 400, line("G\u{c9}T /ping HTTP/1.1")),
        last("3.1", "a method with NUL", 400, line("G\0T /ping HTTP/1.1")),
        // The target, and the one host.
        last("3.2", "a target with NUL", 400, line("GET /ping?\0 HTTP/1.1")),
        last("3.2", "a target with DEL", 400, line("GET /ping?\x7f HTTP/1.1")),
        last("3.2", "a target not in ASCII", 400, line("GET /ping?caf\u{e9} HTTP/1.1")),
        last("3.2", "a target with a tab", 400, line("GET /ping?\t HTTP/1.1")),
        last("3.2", "no host", 400, hosts("")),
        last("3.2", "no host, but others", 400, hosts("X-Host: x\r\nHosts: x\r\n")),
        last("3.2", "two hosts", 400, hosts("Host: x\r\nHost: y\r\n")),
        last("3.2", "the same host twice", 400, hosts("Host: x\r\nX: y\r\nhost: x\r\n")),
        last("3.2", "two hosts in one field", 400, hosts("Host: x, y\r\n")),
        last("3.2", "a host with a space", 400, hosts("Host: x y\r\n")),
        last("3.2", "a host with a path", 400, hosts("Host: x/y\r\n")),
        last("3.2", "a host with a user", 400, hosts("Host: user@x\r\n")),
        last("3.2", "a host that is a URL", 400, hosts("Host: http://x\r\n")),
        kept("3.2", "an empty host", 200, hosts("Host:\r\n")),
        kept("3.2", "a host with a port", 200, hosts("Host: push.example:8000\r\n")),
        kept("3.2", "a host that is an address", 200, hosts("Host: [::1]:8000\r\n")),
        last("3.2", "no host in HTTP/1.0", 200, "GET /ping HTTP/1.0\r\n\r\n"),
        last("3.2", "two hosts in HTTP/1.0", 400, "GET /ping HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n"),
        kept("3.2.1", "an origin-form with a query", 200, line("GET /ping?a=b?c/d HTTP/1.1")),
        kept("3.2.1", "a path that is not ours", 404, line("GET //ping HTTP/1.1")),
        kept("3.2.2", "an absolute-form", 200, line("GET http://other/ping HTTP/1.1")),
        kept("3.2.2", "an absolute-form of TLS", 200, line("GET https://other:8443/ping?a=b HTTP/1.1")),
        kept("3.2.2", "an absolute-form in upper case", 200, line("GET HTTP://OTHER/ping HTTP/1.1")),
        kept("3.2.2", "an absolute-form without a path", 404, line("GET http://other?/ping HTTP/1.1")),
        kept("3.2.2", "one of another scheme", 404, line("GET ftp://other/ping HTTP/1.1")),
        last("3.2.2", "an absolute-form does not stand for the host", 400, "GET http://x/ping HTTP/1.1\r\n\r\n"),
        kept("3.2.3", "an authority-form: no tunnels here", 404, line("CONNECT other:443 HTTP/1.1")),
        kept("3.2.4", "an asterisk-form", 204, line("OPTIONS * HTTP/1.1")),
        kept("3.2.4", "an asterisk-form of GET", 404, line("GET * HTTP/1.1")),
        // Fields.
        last("5", "no colon", 400, fields("X\r\n")),
        last("5", "no name", 400, fields(": a\r\n")),
        last("5", "a name with a space", 400, fields("X Y: a\r\n")),
        last("5", "a name with a bracket", 400, fields("X(y): a\r\n")),
        last("5", "a name not in ASCII", 400, fields("X\u{e9}: a\r\n")),
        last("5", "a name with NUL", 400, fields("X\0: a\r\n")),
        kept("5", "names in any case", 200, "GET /ping HTTP/1.1\r\nhOsT: x\r\ncONTENT-lENGTH: 5\r\n\r\nhello"),
        last("5.1", "a space before a colon", 400, fields("X : a\r\n")),
        last("5.1", "a tab before a colon", 400, fields("X\t: a\r\n")),
        last("5.1", "a space before the colon of a length", 400, with_body("Content-Length : 5")),
        last("5.1", "a space before the colon of the host", 400, hosts("Host : x\r\n")),
        kept("5.1", "no space behind a colon", 200, with_body("Content-Length:5")),
        kept("5.1", "space and tabs around a value", 200, with_body("Content-Length: \t 5 \t")),
        kept("5.1", "an empty value", 200, fields("X:\r\n")),
        kept("5.1", "a colon in a value", 200, fields("X: a:b : c\r\n")),
        last("5.2", "a folded line", 400, fields("X: a\r\n b\r\n")),
        last("5.2", "a folded line with a tab", 400, fields("X: a\r\n\tb\r\n")),
        last("5.2", "a folded line that is empty", 400, fields("X: a\r\n \r\n")),
        last("5.2", "a folded length", 400, with_body("Content-Length:\r\n 5")),
        last("9110, 5.5", "NUL in a value", 400, fields("X: a\0b\r\n")),
        last("9110, 5.5", "another control character in a value", 400, fields("X: a\x1bb\r\n")),
        kept("9110, 5.5", "a tab in a value", 200, fields("X: a\tb\r\n")),
        kept("9110, 5.5", "a value in UTF-8", 200, fields("Cookie: name=Jos\u{e9}; \u{1f980}=\u{4f60}\u{2028}\r\n")),
        kept("9110, 5.5", "a value in Latin-1", 200, fields(b"Cookie: name=Jos\xe9\r\n")),
        kept("9110, 5.5", "a value of bytes that are no text", 200, fields(b"X: \x80\x85\x8d\x8a\xa0\xff\r\n")),
        // Where a body ends.
        last("6.1", "a body in chunks", 411, with_body("Transfer-Encoding: chunked")),
        last("6.1", "a coding in front of a length", 411, with_body("Transfer-Encoding: chunked\r\nContent-Length: 5")),
        last("6.1", "a coding behind a length", 411, with_body("Content-Length: 5\r\nTransfer-Encoding: chunked")),
        last("6.1", "a coding beside a length that is none", 411, with_body("Content-Length: abc\r\nTransfer-Encoding: chunked")),
        last("6.1", "two codings", 411, with_body("Transfer-Encoding: gzip, chunked")),
        last("6.1", "a coding that is none", 411, with_body("Transfer-Encoding: identity")),
        last("6.1", "a coding not in ASCII", 411, with_body("Transfer-Encoding: \u{e9}chunked")),
        last("6.1", "an empty coding", 411, with_body("Transfer-Encoding:")),
        last("6.1", "a coding in HTTP/1.0", 411, "GET /ping HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        kept("6.3", "a length", 200, with_body("Content-Length: 5")),
        kept("6.3", "a length with zeros in front", 200, with_body("Content-Length: 0005")),
        kept("6.3", "no length is no body", 401, line("POST /submit HTTP/1.1")),
        kept("6.3", "a length of nothing", 200, fields("Content-Length: 0\r\n")),
        last("6.3", "two lengths", 400, with_body("Content-Length: 5\r\nContent-Length: 50")),
        last("6.3", "the same length twice", 400, with_body("Content-Length: 5\r\nContent-Length: 5")),
        last("6.3", "two lengths in one field", 400, with_body("Content-Length: 5, 50")),
        last("6.3", "the same length twice in one field", 400, with_body("Content-Length: 5, 5")),
        last("6.3", "an empty length", 400, with_body("Content-Length:")),
        last("6.3", "a length that is a word", 400, with_body("Content-Length: abc")),
        last("6.3", "a length with a plus", 400, with_body("Content-Length: +5")),
        last("6.3", "a length below zero", 400, with_body("Content-Length: -5")),
        last("6.3", "a length with a space", 400, with_body("Content-Length: 5 5")),
        last("6.3", "a length in hex", 400, with_body("Content-Length: 0x5")),
        last("6.3", "a length with a full stop", 400, with_body("Content-Length: 5.0")),
        last("6.3", "a length with a parameter", 400, with_body("Content-Length: 5;a=b")),
        last("6.3", "a length in other digits", 400, with_body("Content-Length: \u{665}")),
        last("6.3", "a length over 64 bits", 413, line("POST /submit HTTP/1.1\r\nContent-Length: 99999999999999999999")),
        last("6.3", "a length of 2^64", 413, line("POST /submit HTTP/1.1\r\nContent-Length: 18446744073709551616")),
        last("6.3", "a length of 2^63", 413, line("POST /submit HTTP/1.1\r\nContent-Length: 9223372036854775808")),
        // How a connection goes on.
        kept("9.3", "a wish to keep it", 200, fields("Connection: keep-alive\r\n")),
        kept("9.3", "a value that only looks like it", 200, fields("Connection: closed, x-close\r\n")),
        last("9.3", "HTTP/1.0", 200, "GET /ping HTTP/1.0\r\nHost: x\r\n\r\n"),
        last("9.3", "HTTP/1.0 that would be kept", 200, "GET /ping HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
        last("9.6", "a wish to end it", 200, fields("Connection: close\r\n")),
        last("9.6", "the wish in any case", 200, fields("connection: Close\r\n")),
        last("9.6", "the wish among others", 200, fields("Connection: keep-alive ,CLOSE\r\n")),
        last("9.6", "the wish in a second field", 200, fields("Connection: x\r\nConnection: close\r\n")),
        last("9.6", "the wish of a refused request", 404, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        last("9.6", "the wish of a request without an answer's body", 204, "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        // Of RFC 9110, what concerns every server.
        kept("9110, 7.8", "an offer of HTTP/2", 200, fields("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n")),
        kept("9110, 7.8", "an offer of a WebSocket", 200, fields("Connection: Upgrade\r\nUpgrade: websocket\r\n")),
        kept("9110, 10.1.1", "an expectation of what nobody knows", 200, fields("Expect: the-unexpected\r\n")),
        kept("9110, 14.2", "a part of the whole", 200, fields("Range: bytes=0-0\r\n")),
        kept("9110, 13.1", "a condition", 200, fields("If-None-Match: *\r\nIf-Match: x\r\n")),
        kept("9110, 9.1", "a method that is not ours", 405, line("TRACE /ping HTTP/1.1")),
    ]
}

/// Two readers of one request, the proxy's and ours, must see the same request, or one of them
/// answers what the other never saw. So what can be read in two ways is refused and ends its
/// connection, and what is as it should be is served; each with another request right behind it,
/// and in pieces of any size.
#[test]
fn every_rule_of_http_holds() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let rules = rules();
    for Rule {
        section,
        what,
        request,
        status,
        ends,
    } in &rules
    {
        let section = match section.starts_with("9110") {
            true => format!("RFC {section}"),
            false => format!("RFC 9112, {section}"),
        };
        let shown = String::from_utf8_lossy(request);
        let what = format!("{section}: {what}: {shown:?}");
        let both = [request, PING.as_bytes()].concat();
        for pieces in [both.len(), 1, 7] {
            let (mut connection, asked) = (server.connect(), now());
            for piece in both.chunks(pieces) {
                // Whoever is refused may be closed before all is sent.
                if !connection.try_send(piece) {
                    assert!(ends, "{what}");
                    break;
                }
            }
            let answer = connection.answer();
            assert_eq!(answer.status, *status, "{what}: {}", answer.text());
            expect_well_formed(&what, &answer, asked);
            if *ends {
                // What stands behind it is never taken for a request.
                expect_as_said(&what, &mut connection, &answer, true);
                continue;
            }
            assert_eq!(answer.header("Connection"), None, "{what}");
            let behind = connection.answer();
            assert_eq!((behind.status, &*behind.text()), (200, "ok\n"), "{what}");
            expect_as_said(&what, &mut connection, &behind, false);
        }
    }
    println!("  {} rules", rules.len());
    // None of it was a fault of the server's.
    assert!(!server.log().contains("internal error"), "{}", server.log());
}

/// A head of 8 KiB is read, and one byte more is not, wherever in it the limit falls: an endless
/// one would be kept for as long as it is sent.
#[test]
fn a_head_has_at_most_8_kib() {
    const MOST: usize = 8192;
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    // One long field; many, of which the last are short; a long target.
    let one = |size: usize| {
        let head = "GET /ping HTTP/1.1\r\nHost: x\r\nX: ";
        format!("{head}{}\r\n\r\n", "x".repeat(size - head.len() - 4))
    };
    let many = |size: usize| {
        let head = "GET /ping HTTP/1.1\r\nHost: x\r\n";
        let (long, rest) = (format!("x:{}\r\n", "x".repeat(196)), size - head.len() - 2);
        let (longs, rest) = (long.repeat(rest / 200), rest % 200);
        let lines = (rest / 4).saturating_sub(3);
        let last = format!("y:{}\r\n", "y".repeat((rest - 4 * lines).saturating_sub(4)));
        format!("{head}{longs}{}{last}\r\n", "x:\r\n".repeat(lines))
    };
    let target = |size: usize| {
        let (before, behind) = ("GET /ping?", " HTTP/1.1\r\nHost: x\r\n\r\n");
        let rest = size - before.len() - behind.len();
        format!("{before}{}{behind}", "x".repeat(rest))
    };
    let mut heads = Vec::new();
    for head in [&one as &dyn Fn(usize) -> String, &many, &target] {
        // Every place at which the limit can fall in the last lines.
        heads.extend((MOST - 2..MOST + 30).map(head));
        heads.push(head(100_000));
    }
    // And a request line that has no end at all.
    heads.push(format!("GET /ping?{}", "x".repeat(100_000)));
    let rows = heads.into_iter().map(|head| {
        // Up to and with its end.
        let line = head.find("\n").map_or(usize::MAX, |at| at + 1);
        let status = match head.len() <= MOST {
            true => 200,
            false if line <= MOST => 431,
            false => 414,
        };
        (head, status)
    });
    for (head, status) in rows {
        let what = format!("{}… of {} bytes", &head[..20], head.len());
        let (mut connection, asked) = (server.connect(), now());
        connection.try_send(&head);
        let answer = connection.answer();
        assert_eq!(answer.status, status, "{what}");
        expect_well_formed(&what, &answer, asked);
        expect_as_said(&what, &mut connection, &answer, status != 200);
    }
}

/// Nobody could tell whether a request comes behind them; a thread that skips them waits for nobody,
/// and holds up those who have one.
#[test]
fn line_ends_in_front_of_a_request_are_not_skipped_for_ever() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    for times in [20, 1000] {
        let mut connection = server.connect();
        connection.try_send("\r\n".repeat(times));
        connection.expect_closed();
    }
    assert_eq!(server.get("/ping").status, 200);
}

/// Each field that is kept costs more memory than it has bytes.
#[test]
fn a_head_has_a_hundred_fields_at_most() {
    let server = TestServer::start(&[]);
    // Beside `Host`.
    for (times, status) in [(99, 200), (100, 431), (1900, 431)] {
        let answer = server.raw(request("GET", "/ping", &"x:\r\n".repeat(times), b""));
        assert_eq!(answer.status, status, "{times} more");
    }
}

/// `curl -x` and some proxies name the host in the target, and mean the same.
#[test]
fn an_absolute_target_is_served_like_its_path() {
    let server = TestServer::start(&[]);
    let token = server.token(&["news"]);
    let mut subs: Vec<_> = [
        "http://push.example",
        "https://push.example:8443",
        "http://[::1]:80",
    ]
    .map(|host| subscribe(server.addr, &format!("{host}/events?a=b&token={token}")))
    .into();
    let body = server.submission(&[("news", "update", "hi")]);
    let answer = server.post("http://push.example/submit", body.as_bytes());
    assert_eq!(Submitted::from(answer).ok(), 3);
    for sub in &mut subs {
        sub.expect_event("update", "hi");
    }
    assert_eq!(server.get("http://push.example/events?token=x").status, 401);
    assert_eq!(server.get("http://push.example/nothing").status, 404);
}

/// A cookie `name=José`, set by any page of the same host, came through nginx and kept that browser
/// from ever streaming.
#[test]
fn bytes_above_0x7f_in_a_header_value_harm_neither_streams_nor_submissions() {
    let server = TestServer::start(&[]);
    let body = server.submission(&[("news", "update", "hi")]);
    for value in [&b"name=Jos\xc3\xa9"[..], b"name=Jos\xe9", b"\x80\xff\xfe"] {
        let mut fields = b"Cookie: ".to_vec();
        fields.extend(value);
        fields.extend(b"\r\nReferer: http://x/\xe4\r\nUser-Agent: \xf0\x9f\xa6\x80\r\n");
        let send = |line: String, length: String, body: &str| {
            let mut connection = server.connect();
            let head = format!("{line} HTTP/1.1\r\nHost: test\r\n{length}");
            connection.send([head.as_bytes(), &fields, b"\r\n", body.as_bytes()].concat());
            connection
        };
        let line = format!("GET /events?token={}", server.token(&["news"]));
        let mut sub = Subscriber::on(send(line, String::new(), ""));
        let length = format!("Content-Length: {}\r\n", body.len());
        let mut publisher = send("POST /submit".into(), length, &body);
        assert!(Submitted::from(publisher.answer()).ok() >= 1);
        sub.expect_event("update", "hi");
    }
}

/// Answers of one connection come in the order of its requests, whatever they are, or a client
/// would take one for another.
#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    for round in 0..40 {
        let data = round.to_string();
        let body = server.submission(&[("news", "", &data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        for (request, status) in [
            (request("GET", "/ping", "", b""), 200),
            (request("POST", "/submit", &length, body.as_bytes()), 200),
            (
                request("GET", "/nothing", "Content-Length: 4\r\n", b"GET "),
                404,
            ),
            (request("OPTIONS", "*", "", b""), 204),
            (request("DELETE", "/ping", "", b""), 405),
            (
                request("POST", "/submit", "Content-Length: 3\r\n", b"abc"),
                401,
            ),
        ] {
            bytes.extend(request);
            expected.push((status, data.clone()));
        }
    }
    let mut connection = server.connect();
    let mut socket = connection.socket().try_clone().unwrap();
    // All at once, while nobody reads yet what is answered.
    let sender = in_background(move || socket.write_all(&bytes).unwrap());
    for (number, (status, data)) in expected.iter().enumerate() {
        let answer = connection.answer();
        assert_eq!(answer.status, *status, "{number}: {}", answer.text());
        if number % 6 == 1 {
            assert_eq!(Submitted::from(answer).ok(), 1);
            sub.expect_event("message", data);
        }
    }
    sender.join().unwrap();
    connection.send(request("GET", "/ping", "Connection: close\r\n", b""));
    assert_eq!(connection.answer().status, 200);
    connection.expect_closed();
}

/// Sends the beginning of a request, and then a byte now and then for as long as it is not
/// answered; how long that was.
#[track_caller]
fn drip(server: &TestServer, beginning: &[u8], byte: &'static [u8]) -> Duration {
    let start = Instant::now();
    let (mut connection, asked) = (server.connect(), now());
    connection.send(beginning);
    let answered = AtomicBool::new(false);
    let mut socket = connection.socket().try_clone().unwrap();
    let answer = thread::scope(|scope| {
        scope.spawn(|| {
            // Not for ever, or a reader that gave up would wait for this.
            let goes_on = || !answered.load(SeqCst) && start.elapsed() < 2 * DEADLINE;
            while goes_on() && socket.write_all(byte).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let answer = connection.answer();
        answered.store(true, SeqCst);
        answer
    });
    let took = start.elapsed();
    let what = format!("{:?}", String::from_utf8_lossy(beginning));
    assert_eq!(answer.status, 408, "{what}");
    expect_well_formed(&what, &answer, asked);
    expect_as_said(&what, &mut connection, &answer, true);
    took
}

/// A byte before each timeout kept a connection for ever: there is one deadline for a head and one
/// for a body, and however they drip, they are whole by then or answered.
#[test]
fn a_head_and_a_body_that_drip_are_answered_with_408() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "1")]);
    for (beginning, byte) in [
        (&b"G"[..], &b"E"[..]),
        (b"GET /ping?", b"x"),
        (b"GET /ping HTTP/1.1\r\n", b"X"),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nX: ", b"x"),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
        (
            b"POST /submit HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n",
            b"x",
        ),
        (
            b"GET /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n",
            b"x",
        ),
    ] {
        let took = drip(&server, beginning, byte);
        assert!(took >= Duration::from_secs(1), "{took:?}");
    }
    // Also behind a request that was whole.
    let mut first = request("GET", "/ping", "Content-Length: 2\r\n", b"hi");
    let mut connection = server.connect();
    connection.send(&first);
    assert_eq!(connection.answer().status, 200);
    first.truncate(30);
    connection.send(&first);
    let answer = connection.answer();
    assert_eq!(answer.status, 408);
    expect_as_said("the second request", &mut connection, &answer, true);
}

/// The time for a body begins when the head is there: a slow uplink has it whole.
#[test]
fn a_head_and_a_body_have_the_read_timeout_each() {
    const TIMEOUT: Duration = Duration::from_secs(6);
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "6")]);
    let body = server.submission(&[("news", "", "")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let head = request("POST", "/submit", &length, b"");
    for _ in 0..3 {
        let mut connection = server.connect();
        let mut begun = Instant::now();
        let mut slow = Duration::ZERO;
        for piece in [&head[..10], &head[10..], body.as_bytes()] {
            if piece.len() != 10 {
                // Longer than half of the time, so that both together are over it.
                thread::sleep(TIMEOUT * 2 / 3);
            }
            connection.try_send(piece);
            slow = slow.max(begun.elapsed());
            begun = Instant::now();
        }
        let answer = connection.try_head();
        // Where this machine took a nap, the request was late indeed.
        if slow < TIMEOUT * 5 / 6 {
            assert_eq!(answer.map(|answer| answer.status), Some(200));
            return;
        }
    }
    println!("  this machine is too busy to be on time");
}

/// A sender that breaks off has not said all that it had to say, though what came may look like it
/// (RFC 9112, section 8).
#[test]
fn a_request_that_is_cut_short_is_not_taken() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let mut sub = server.subscribe(&["news"]);
    let body = server.submission(&[("news", "cut short", "")]);
    let length = format!("Content-Length: {}\r\n", body.len() + 1);
    let whole = request("POST", "/submit", &length, body.as_bytes());
    let stream = format!("/events?token={}", server.token(&["news"]));
    let stream = request("GET", &stream, "", b"");
    let cuts = [1, 20, 40, 60, 150, whole.len()].map(|at| &whole[..at]);
    // A head of a stream, but for its last bytes.
    let heads = (1..20).map(|less| &stream[..stream.len() - less]);
    for cut in cuts.into_iter().chain(heads) {
        let mut connection = server.connect();
        connection.send(cut);
        connection.half_close();
        let what = String::from_utf8_lossy(cut);
        if let Some(answer) = connection.try_head() {
            assert_eq!(answer.status, 400, "{what}");
        }
        connection.rest();
    }
    assert_eq!(server.publish(&[("news", "after", "")]).ok(), 1);
    sub.expect_event("after", "");
}

/// An answer that no request asked for is taken for that to the next one: a publisher that posted
/// about as often as the timeout lost valid submissions to an unasked 400.
#[test]
fn an_idle_connection_is_closed_without_a_word() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "1")]);
    let good = server.submission(&[("news", "", "")]);
    let length = format!("Content-Length: {}\r\n", good.len());
    let mut connections = Vec::new();
    for (before, status) in [
        (request("GET", "/ping", "", b""), Some(200)),
        (
            request("POST", "/submit", &length, good.as_bytes()),
            Some(200),
        ),
        (request("OPTIONS", "*", "", b""), Some(204)),
        (request("GET", "/nothing", "", b""), Some(404)),
        (
            request("POST", "/submit", "Content-Length: 3\r\n", b"abc"),
            Some(401),
        ),
        (b"".to_vec(), None),
        (b"\r\n".to_vec(), None),
        (b"\r\n\r\n\r\n".to_vec(), None),
    ] {
        let (mut connection, begun) = (server.connect(), Instant::now());
        connection.send(&before);
        if status.is_some() {
            assert_eq!(Some(connection.answer().status), status);
        }
        connections.push((connection, begun));
    }
    for (connection, begun) in &mut connections {
        connection.expect_closed();
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(1), "{took:?}");
    }
}

/// A sender that is reset while it sends never learns why: its body is too long.
#[test]
fn the_sender_of_a_big_body_sees_the_413() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    for size in [16_385, 100_000, 1 << 20, 8 << 20] {
        for path in ["/submit", "/submit?x"] {
            let fields = format!("Content-Length: {size}\r\n");
            let head = request("POST", path, &fields, b"");
            let (mut connection, asked) = (server.connect(), now());
            // Most clients send all before they read anything.
            let begun = Instant::now();
            let sent = connection.try_send([head, vec![b'z'; size]].concat());
            // Who takes longer than the server waits for it may be reset.
            if begun.elapsed() < Duration::from_millis(900) {
                assert!(sent, "reset while it sent {size} bytes");
            }
            let answer = connection.answer();
            assert_eq!(answer.status, 413, "{size}");
            expect_well_formed("a big body", &answer, asked);
            expect_as_said("a big body", &mut connection, &answer, true);
        }
    }
    // And nobody waits for the rest to come.
    let fields = "Content-Length: 18446744073709551615\r\n";
    let answer = server.raw(request("POST", "/submit", fields, b""));
    assert_eq!(answer.status, 413);
}

// --------------------------------------------------------------------------------------- frames

/// Bytes on the wire and what a browser makes of them, for every shape of data. A data field that
/// lost a line, or a line that became a field of its own, would be another event.
#[test]
fn every_event_becomes_the_frame_that_means_it() {
    let server = TestServer::start(&[]);
    let mut raw = server.subscribe(&["news"]).connection;
    let mut sub = server.subscribe(&["news"]);
    raw.frame();
    let long = "0123456789abcde\u{20ac}".repeat(512);
    for (name, data, wire, parsed) in [
        ("update", "hi", "event: update\ndata: hi\n\n", "hi"),
        ("", "hi", "data: hi\n\n", "hi"),
        ("", "", "data: \n\n", ""),
        ("message", "", "event: message\ndata: \n\n", ""),
        ("", "a\nb", "data: a\ndata: b\n\n", "a\nb"),
        ("", "a\rb", "data: a\ndata: b\n\n", "a\nb"),
        ("", "a\r\nb", "data: a\ndata: b\n\n", "a\nb"),
        ("", "a\n\rb", "data: a\ndata: \ndata: b\n\n", "a\n\nb"),
        ("", "a\r\r\nb", "data: a\ndata: \ndata: b\n\n", "a\n\nb"),
        ("", "a\n", "data: a\ndata: \n\n", "a\n"),
        ("", "a\r\n", "data: a\ndata: \n\n", "a\n"),
        ("", "a\r", "data: a\ndata: \n\n", "a\n"),
        ("", "\n", "data: \ndata: \n\n", "\n"),
        ("", "\r\n\r\n", "data: \ndata: \ndata: \n\n", "\n\n"),
        ("", " hi", "data:  hi\n\n", " hi"),
        ("", ": hi", "data: : hi\n\n", ": hi"),
        ("", ":\n\n:", "data: :\ndata: \ndata: :\n\n", ":\n\n:"),
        (
            "",
            "data: x\n\nevent: y",
            "data: data: x\ndata: \ndata: event: y\n\n",
            "data: x\n\nevent: y",
        ),
        (
            "",
            "nul\0 in data",
            "data: nul\0 in data\n\n",
            "nul\0 in data",
        ),
        ("", "\u{feff}bom", "data: \u{feff}bom\n\n", "\u{feff}bom"),
        (
            "",
            "line\u{2028}separator\u{85}",
            "data: line\u{2028}separator\u{85}\n\n",
            "line\u{2028}separator\u{85}",
        ),
        (
            "gr\u{fc}\u{df}e",
            "\u{1f980} \u{4f60}\u{597d}",
            "event: gr\u{fc}\u{df}e\ndata: \u{1f980} \u{4f60}\u{597d}\n\n",
            "\u{1f980} \u{4f60}\u{597d}",
        ),
        (
            "",
            "e\u{301}\u{200d}",
            "data: e\u{301}\u{200d}\n\n",
            "e\u{301}\u{200d}",
        ),
        (" a: b ", "x", "event:  a: b \ndata: x\n\n", "x"),
        ("", &long, &format!("data: {long}\n\n"), &long),
    ] {
        assert_eq!(server.publish(&[("news", name, data)]).ok(), 2, "{data:?}");
        let frame = String::from_utf8(raw.frame()).unwrap();
        assert_eq!(frame, wire);
        sub.expect_event(if name.is_empty() { "message" } else { name }, parsed);
    }
}

/// Thousands of clients that lost a server together must not come back together.
#[test]
fn each_connection_is_told_a_delay_of_its_own() {
    let server = TestServer::start(&[("SSE_RETRY", "1000")]);
    let token = server.token(&["news"]);
    let mut delays = BTreeSet::new();
    for _ in 0..50 {
        let mut sub = server.stream(&token);
        match sub.item() {
            Some(Item::Retry(delay)) => delays.insert(delay),
            other => panic!("the first thing is no delay but {other:?}"),
        };
    }
    assert!(
        delays.iter().all(|delay| (1000..=2000).contains(delay)),
        "{delays:?}"
    );
    // Fifty equal ones would be no chance; nor would fifty in one half.
    assert!(delays.len() > 10, "{delays:?}");
    assert!(
        delays.first() < Some(&1500) && delays.last() > Some(&1500),
        "{delays:?}"
    );
}

/// Proxies close what is silent. No blank line stands behind the comment: clients that are not a
/// browser's make an empty message of one, and a page's `JSON.parse` fails on it.
#[test]
fn a_silent_stream_gets_heartbeats() {
    let server = TestServer::start(&[("SSE_HEARTBEAT", "1")]);
    let mut raw = server.subscribe(&["news"]).connection;
    raw.frame();
    assert_eq!(raw.frame(), b":\n");
    assert_eq!(raw.frame(), b":\n");
    server.publish(&[("news", "update", "hi")]).ok();
    while raw.frame() != b"event: update\ndata: hi\n\n" {}
    assert_eq!(raw.frame(), b":\n");
}

// ---------------------------------------------------------------------------------------- order

/// Several publishers, many subscribers of overlapping topics: everyone sees its part of one and
/// the same order, and what was submitted together stays together.
#[test]
fn all_subscribers_see_one_order_and_unbroken_submissions() {
    const PUBLISHERS: usize = 4;
    const SUBMISSIONS: usize = 60;
    const TOPICS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let server = TestServer::start(&[("SSE_QUEUE", "5000")]);
    // The first has them all; the others one to four each.
    let chosen = |number: usize| match number {
        0 => TOPICS.to_vec(),
        _ => (0..1 + number % 4)
            .map(|at| TOPICS[(number + at * at) % TOPICS.len()])
            .collect(),
    };
    let subs: Vec<_> = (0..24)
        .map(|number| (chosen(number), server.subscribe(&chosen(number))))
        .collect();
    let readers: Vec<_> = subs
        .into_iter()
        .map(|(topics, mut sub)| {
            in_background(move || {
                let mut seen = Vec::new();
                loop {
                    let message = sub.message();
                    if message.name == "end" {
                        return (topics, seen);
                    }
                    seen.push((message.name, message.data));
                }
            })
        })
        .collect();

    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let server = &server;
            scope.spawn(move || {
                let mut connection = server.connect();
                for submission in 0..SUBMISSIONS {
                    let size = 1 + (publisher + submission) % 5;
                    let topic =
                        |at| TOPICS[(publisher * 3 + submission * 5 + at * 7) % TOPICS.len()];
                    let data: Vec<_> = (0..size)
                        .map(|at| format!("{publisher} {submission} {at} {size}"))
                        .collect();
                    // The name of the event tells its topic.
                    let events: Vec<_> = (0..size)
                        .map(|at| (topic(at), topic(at), &*data[at]))
                        .collect();
                    let body = server.submission(&events);
                    let length = format!("Content-Length: {}\r\n", body.len());
                    connection.send(request("POST", "/submit", &length, body.as_bytes()));
                    let answer = Submitted::from(connection.answer());
                    assert_eq!((answer.status, answer.events), (200, size as u64));
                }
            });
        }
    });
    server.publish(&TOPICS.map(|topic| (topic, "end", ""))).ok();

    let mut seen: Vec<_> = readers
        .into_iter()
        .map(|reader| reader.join().unwrap())
        .collect();
    let (_, whole) = seen.remove(0);
    let sizes = (0..PUBLISHERS).flat_map(|p| (0..SUBMISSIONS).map(move |s| 1 + (p + s) % 5));
    assert_eq!(whole.len(), sizes.sum::<usize>());
    // In the whole order, each submission is unbroken and each publisher's are in its own order.
    let mut next = [0; PUBLISHERS];
    let mut rest = &whole[..];
    while let [(_, first), ..] = rest {
        let numbers: Vec<usize> = first.split(' ').map(|word| word.parse().unwrap()).collect();
        let [publisher, submission, _, size] = numbers[..] else {
            panic!("{first}")
        };
        assert_eq!(submission, next[publisher]);
        next[publisher] += 1;
        for (at, (_, data)) in rest[..size].iter().enumerate() {
            assert_eq!(*data, format!("{publisher} {submission} {at} {size}"));
        }
        rest = &rest[size..];
    }
    for (topics, part) in seen {
        let expected: Vec<_> = whole
            .iter()
            .filter(|(topic, _)| topics.contains(&&**topic))
            .cloned()
            .collect();
        assert!(!part.is_empty() && part == expected, "{topics:?}");
    }
}

// ------------------------------------------------------------------------------- keys and clocks

/// A secret is replaced without a moment in which some backend's tokens fail.
#[test]
fn two_secrets_both_open_and_the_first_mints() {
    let both = format!("{OTHER_SECRET},{SECRET}");
    let server = TestServer::start(&[("SSE_SECRET", &both)]);
    let third = "03".repeat(32);
    let mut subs = Vec::new();
    for secret in [OTHER_SECRET, SECRET] {
        subs.push(server.stream(&mint(secret, &topics_payload(&["news"]), now())));
        let body = mint(
            secret,
            &events_payload(&[("news", "update", secret)]),
            now(),
        );
        let answer = Submitted::from(server.post("/submit", body.as_bytes()));
        assert_eq!(answer.ok(), subs.len() as u64);
    }
    subs[0].expect_event("update", OTHER_SECRET);
    subs[0].expect_event("update", SECRET);
    subs[1].expect_event("update", SECRET);
    let foreign = mint(&third, &topics_payload(&["news"]), now());
    assert_eq!(server.get(&format!("/events?token={foreign}")).status, 401);
    // An old one of the second secret is old, not wrong.
    let old = mint(SECRET, &topics_payload(&["news"]), now() - 90_000);
    let answer = server.get(&format!("/events?token={old}"));
    assert_eq!(answer.status, 401);
    assert!(answer.text().contains("expired"), "{}", answer.text());

    let token = run(&[("SSE_SECRET", &both)], &["token", "news"]).stdout;
    let token = String::from_utf8(token).unwrap();
    let only_first = TestServer::start(&[("SSE_SECRET", OTHER_SECRET)]);
    assert_eq!(only_first.stream(token.trim()).head.status, 200);
    assert_eq!(
        TestServer::start(&[])
            .get(&format!("/events?token={}", token.trim()))
            .status,
        401
    );
}

/// The lifetimes bound what a stolen token is good for.
#[test]
fn a_token_is_refused_after_its_lifetime_and_not_before() {
    let subscription = topics_payload(&["news"]);
    let submission = events_payload(&[("news", "", "")]);
    for (settings, ttl, submit_ttl) in [
        (&[][..], 86_400, 300),
        (
            &[("SSE_TOKEN_TTL", "600"), ("SSE_SUBMIT_TTL", "900")],
            600,
            900,
        ),
    ] {
        let server = TestServer::start(settings);
        // A minute to spare on either side, for a busy machine.
        for (age, subscribed, submitted) in [
            (0, true, true),
            (ttl - 60, true, ttl - 60 < submit_ttl),
            (ttl + 60, false, ttl + 60 < submit_ttl),
            (submit_ttl - 60, submit_ttl - 60 < ttl, true),
            (submit_ttl + 60, submit_ttl + 60 < ttl, false),
            // Clocks differ; but what is dated far ahead could be replayed for as long again.
            (-240, true, true),
            (-420, false, false),
        ] {
            let date = |age: i64| (i64::from(now()) - age) as u32;
            let status = |permitted| if permitted { 200 } else { 401 };
            let token = server.mint_at(&subscription, date(age));
            let mut connection = server.connect();
            connection.send(request("GET", &format!("/events?token={token}"), "", b""));
            assert_eq!(
                connection.head().status,
                status(subscribed),
                "{age} of {ttl}"
            );
            let body = server.mint_at(&submission, date(age));
            let answer = server.post("/submit", body.as_bytes());
            assert_eq!(answer.status, status(submitted), "{age} of {submit_ttl}");
        }
    }
}

/// What somebody whose rights were withdrawn, or who found a token, can still hear ends with that.
#[test]
fn a_stream_ends_when_its_token_does() {
    let server = TestServer::start(&[
        ("SSE_TOKEN_TTL", "3"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ]);
    let asked = Instant::now();
    let mut sub = server.subscribe(&["news"]);
    server.publish(&[("news", "update", "hi")]).ok();
    sub.expect_event("update", "hi");
    // Its farewell, and an end that can be told from a break.
    assert!(matches!(sub.item(), Some(Item::Retry(_))));
    sub.expect_end();
    assert!(sub.connection.whole);
    // A token is dated in seconds, and looks come every two.
    let lived = asked.elapsed();
    let (least, most) = (Duration::from_millis(1600), Duration::from_secs(6));
    assert!(least < lived && lived < most, "{lived:?}");
    server.wait_for_metric(r#"sse_streams_ended_total{reason="expired"}"#, 1);
}

// ---------------------------------------------------------------------------------------- limits

/// Full streams never starve publishers, and a place is free as soon as someone leaves.
#[test]
fn the_subscriber_limit_is_answered_with_503_and_room_comes_back() {
    let server = TestServer::start(&[("SSE_MAX_SUBSCRIBERS", "3"), ("SSE_HEARTBEAT", "600")]);
    let mut subs: Vec<_> = (0..3).map(|_| server.subscribe(&["news"])).collect();
    let target = format!("/events?token={}", server.token(&["news"]));
    let (mut connection, asked) = (server.connect(), now());
    connection.send(request("GET", &target, "Accept: */*\r\n", b""));
    let answer = connection.answer();
    assert_eq!(answer.status, 503);
    expect_well_formed("full", &answer, asked);
    let seconds: u64 = answer
        .header("Retry-After")
        .expect("a hint")
        .parse()
        .expect("seconds");
    assert!((1..=3600).contains(&seconds));
    expect_as_said("full", &mut connection, &answer, false);
    // Who may not subscribe is told so first.
    assert_eq!(server.get("/events?token=abc").status, 401);
    assert_eq!(server.get("/ping").status, 200);
    assert_eq!(server.publish(&[("news", "update", "1")]).ok(), 3);
    drop(subs.remove(1));
    let status = || {
        let mut connection = server.connect();
        connection.send(request("GET", &target, "", b""));
        connection.head().status
    };
    assert!(wait_until(DEADLINE, || status() == 200), "no room");
    for sub in &mut subs {
        sub.expect_event("update", "1");
    }
}

/// By the HTML standard any answer but 200 ends an `EventSource` for good, while a connection that
/// breaks is tried again: temporary trouble must not end a page's stream.
#[test]
fn a_browser_is_closed_unanswered_where_others_are_told_503() {
    let server = TestServer::start(&[
        ("SSE_MAX_SUBSCRIBERS", "1"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ]);
    let sub = server.subscribe(&["news"]);
    let good = format!("/events?token={}", server.token(&["news"]));
    let mut turned_away = 0;
    for (fields, answered) in [
        ("", Some(503)),
        ("Accept: */*\r\n", Some(503)),
        ("Accept: text/html, text/*;q=0.8\r\n", Some(503)),
        ("X: text/event-stream\r\n", Some(503)),
        ("Accept: text/event-stream\r\n", None),
        ("accept:text/event-stream;q=0.9\r\n", None),
        (
            "Accept: application/json , text/event-stream, */*\r\n",
            None,
        ),
        ("Accept: text/html\r\nAccept: text/event-stream\r\n", None),
    ] {
        let mut connection = server.connect();
        connection.send(request("GET", &good, fields, b""));
        let answer = connection.try_head();
        assert_eq!(answer.map(|answer| answer.status), answered, "{fields}");
        turned_away += u64::from(answered.is_none());
        let sample = "sse_streams_turned_away_total";
        assert_eq!(server.metric(sample), turned_away, "{fields}");
    }
    server.wait_for_log("stream turned away: ");
    assert_eq!(server.metric(r#"sse_answers_total{status="503"}"#), 4);
    // What is wrong with the request itself will not be right a moment later: that is said.
    for (target, status) in [("/events?token=abc", 401), ("/nothing", 404)] {
        let mut connection = server.connect();
        let fields = "Accept: text/event-stream\r\n";
        connection.send(request("GET", target, fields, b""));
        assert_eq!(connection.answer().status, status);
    }
    drop(sub);
}

/// The same where the server is about to end: whoever waited for it comes back to the next one.
#[test]
fn an_ending_server_takes_no_stream() {
    let settings = [("SSE_QUEUE", "5000"), ("SSE_WRITE_TIMEOUT", "600")];
    let server = TestServer::start(&settings);
    // One that does not read keeps it from ending for 5 seconds.
    let stalled = server.subscribe(&["news"]);
    let mut publisher = server.connect();
    let body = server.submission(&[("news", "", &"\n".repeat(600))]);
    let length = format!("Content-Length: {}\r\n", body.len());
    for _ in 0..1500 {
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        assert_eq!(Submitted::from(publisher.answer()).ok(), 1);
    }
    let target = format!("/events?token={}", server.token(&["news"]));
    let mut kept = ["", "Accept: text/event-stream\r\n"].map(|fields| {
        let mut connection = server.connect();
        connection.send(request("GET", "/ping", "", b""));
        assert_eq!(connection.answer().status, 200);
        (connection, request("GET", &target, fields, b""))
    });
    let signalled = Instant::now();
    server.signal("TERM");
    let refused = || std::net::TcpStream::connect(server.addr).is_err();
    assert!(wait_until(DEADLINE, refused), "still accepting");
    for (connection, request) in &mut kept {
        connection.try_send(request);
    }
    let [told, browser] = kept.each_mut().map(|(connection, _)| connection.try_head());
    // On a machine so slow that the server has ended, nobody is told anything.
    if signalled.elapsed() < Duration::from_secs(4) {
        let told = told.expect("an answer before the end");
        assert_eq!(told.status, 503);
        assert!(told.header("Retry-After").is_some());
        assert_eq!(told.header("Connection"), Some("close"));
    }
    assert!(browser.is_none(), "{browser:?}");
    drop(stalled);
}

/// 60 of 100 pages reload at once where there is room for 100: their old streams must not keep
/// them out until the next heartbeat. Looked for is not the time it takes, but that no heartbeat
/// is needed.
#[test]
fn room_comes_back_soon_after_a_departure_and_without_a_heartbeat() {
    let server = TestServer::start(&[
        ("SSE_MAX_SUBSCRIBERS", "100"),
        ("SSE_HEARTBEAT", "600"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ]);
    let token = server.token(&["news"]);
    let mut subs: Vec<_> = (0..100).map(|_| server.stream(&token)).collect();
    let left = Instant::now();
    drop(subs.split_off(40));
    let fields = "Accept: text/event-stream\r\n";
    let again = request("GET", &format!("/events?token={token}"), fields, b"");
    for _ in 0..60 {
        let reloaded = wait_until(DEADLINE, || {
            let mut connection = server.connect();
            connection.send(&again);
            // Unanswered where there is no room yet: then a browser tries again.
            let streams = connection
                .socket()
                .peek(&mut [0])
                .is_ok_and(|size| size > 0);
            if streams {
                subs.push(Subscriber::on(connection));
            }
            streams
        });
        assert!(reloaded, "no room after {:?}", left.elapsed());
    }
    println!("  all back after {:.1?}", left.elapsed());
    // Those that stayed were not taken for gone.
    assert_eq!(server.publish(&[("news", "update", "hi")]).ok(), 100);
    for sub in &mut subs {
        sub.expect_event("update", "hi");
    }
    // However they leave: with a reset; with events unread; politely, by turns.
    for (number, sub) in subs.into_iter().enumerate() {
        match number % 3 {
            0 => {
                let socket = SockRef::from(sub.connection.socket());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
            1 => {
                let sent = (&mut sub.connection.socket()).write(b"goodbye");
                assert_eq!(sent.unwrap(), 7);
            }
            _ => {}
        }
    }
    server.wait_for_metric(r#"sse_streams_ended_total{reason="left"}"#, 160);
    assert_eq!(server.metric("sse_subscribers"), 0);
    // Leaving is no warning.
    assert!(!server.log().contains("stream cut"), "{}", server.log());
}

/// Some clients close the side on which they have no more to say. They are asked whether they are
/// there by a comment or two, and live on.
#[test]
fn a_client_that_only_stopped_sending_keeps_its_stream() {
    let server = TestServer::start(&[("SSE_HEARTBEAT", "600")]);
    let mut sub = server.subscribe(&["news"]);
    sub.connection.half_close();
    // The one behind the first retry, and two that ask.
    for _ in 0..3 {
        while !matches!(sub.item(), Some(Item::Comment(_))) {}
    }
    for round in 0..3 {
        let round = round.to_string();
        assert_eq!(server.publish(&[("news", "", &round)]).ok(), 1);
        sub.expect_event("message", &round);
    }
}

// --------------------------------------------------------------------------------------- metrics

const FAMILIES: [(&str, &str); 15] = [
    ("sse_build_info", "gauge"),
    ("sse_subscribers", "gauge"),
    ("sse_capacity", "gauge"),
    ("sse_topics", "gauge"),
    ("sse_events_total", "counter"),
    ("sse_deliveries_total", "counter"),
    ("sse_delivered_bytes_total", "counter"),
    ("sse_streams_opened_total", "counter"),
    ("sse_streams_ended_total", "counter"),
    ("sse_streams_turned_away_total", "counter"),
    ("sse_answers_total", "counter"),
    ("sse_connections_evicted_total", "counter"),
    ("sse_accept_failures_total", "counter"),
    ("sse_redis_failures_total", "counter"),
    ("sse_forged_entries_total", "counter"),
];

const REASONS: [&str; 7] = [
    "left",
    "queue_full",
    "write_timeout",
    "shutdown",
    "expired",
    "fault",
    "gap",
];

const STATUSES: [u16; 13] = [
    200, 204, 400, 401, 404, 405, 408, 411, 413, 414, 431, 503, 505,
];

#[test]
fn metrics_count_what_happened() {
    let server = TestServer::start(&[
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
        ("SSE_MAX_SUBSCRIBERS", "7"),
    ]);
    // Every counter is there from the start: a rate can be taken of what has not happened yet.
    let text = server.metrics_text();
    let ended = REASONS.map(|reason| format!("sse_streams_ended_total{{reason=\"{reason}\"}}"));
    let answers = STATUSES.map(|status| format!("sse_answers_total{{status=\"{status}\"}}"));
    for sample in ended.iter().chain(&answers) {
        assert!(
            text.contains(&format!("\n{sample} 0\n")),
            "{sample}: {text}"
        );
    }
    for (family, kind) in FAMILIES {
        assert!(
            format!("\n{text}").contains(&format!("\n# TYPE {family} {kind}\n")),
            "{family}: {text}"
        );
        let help = text
            .lines()
            .filter(|line| line.starts_with(&format!("# HELP {family} ")));
        assert_eq!(help.count(), 1, "{family}: {text}");
    }
    let families = text.lines().filter(|line| line.starts_with("# TYPE "));
    assert_eq!(families.count(), FAMILIES.len(), "{text}");
    let version = env!("CARGO_PKG_VERSION");
    let build = format!("sse_build_info{{version=\"{version}\"}}");
    assert_eq!(sample_in(&text, &build), 1);

    let mut sub = server.subscribe(&["news", "sport"]);
    let other = server.subscribe(&["news"]);
    server
        .publish(&[("news", "", "hi"), ("sport", "", "hi")])
        .ok();
    server.post("/submit", b"nonsense");
    server.get("/events?token=nonsense");
    server.get("/nothing");
    server.raw(request("OPTIONS", "*", "", b""));
    // And what never became a request.
    server.raw(b"nonsense\r\n\r\n");
    server.raw(b"GET / HTTP/2.0\r\n\r\n");
    sub.expect_event("message", "hi");

    let text = server.metrics_text();
    for (sample, value) in [
        ("sse_subscribers", 2),
        ("sse_capacity", 7),
        ("sse_topics", 2),
        ("sse_events_total", 2),
        ("sse_deliveries_total", 3),
        ("sse_delivered_bytes_total", 3 * "data: hi\n\n".len() as u64),
        ("sse_streams_opened_total", 2),
        ("sse_streams_turned_away_total", 0),
        ("sse_connections_evicted_total", 0),
        ("sse_accept_failures_total", 0),
        // Two streams, a submission, and the metrics of before.
        (r#"sse_answers_total{status="200"}"#, 4),
        (r#"sse_answers_total{status="204"}"#, 1),
        (r#"sse_answers_total{status="400"}"#, 1),
        (r#"sse_answers_total{status="401"}"#, 2),
        (r#"sse_answers_total{status="404"}"#, 1),
        (r#"sse_answers_total{status="505"}"#, 1),
    ] {
        assert_eq!(sample_in(&text, sample), value, "{sample} in {text}");
    }
    // Every line is a comment or a sample with a number.
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let value = line.rsplit(' ').next().unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    drop(other);
    server.wait_for_metric("sse_subscribers", 1);
    server.wait_for_metric(r#"sse_streams_ended_total{reason="left"}"#, 1);
    assert_eq!(server.metric("sse_topics"), 2);
    drop(sub);
    server.wait_for_metric("sse_subscribers", 0);
    server.wait_for_metric("sse_topics", 0);
}

/// What an operator sees is no business of whoever reaches the public address, and the other way.
#[test]
fn metrics_are_served_on_their_own_address_only() {
    let server = TestServer::start(&[("SSE_METRICS_LISTEN", "127.0.0.1:0")]);
    assert_eq!(server.get("/metrics").status, 404);
    let body = server.submission(&[("news", "", "")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    for bytes in [
        request("GET", "/ping", "", b""),
        request(
            "GET",
            &format!("/events?token={}", server.token(&["news"])),
            "",
            b"",
        ),
        request("POST", "/submit", &length, body.as_bytes()),
    ] {
        let mut connection = Connection::open(server.metrics.unwrap());
        connection.send(bytes);
        assert_eq!(connection.answer().status, 404);
    }
    let mut connection = Connection::open(server.metrics.unwrap());
    connection.send(request("GET", "/metrics", "", b""));
    let answer = connection.answer();
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .header("Content-Type")
            .unwrap()
            .starts_with("text/plain")
    );
}
