//! What the protocol promises, rule by rule, told by the bytes on the wire.

mod support;

use std::collections::BTreeSet;
use std::thread;

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
}

fn refused(what: &str, status: u16, request: Vec<u8>, token: &str) -> Refused {
    Refused {
        what: what.into(),
        request,
        status,
        allow: "",
        token: token.into(),
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
    // After a 413 the connection is closed when the rest of the body came, or did not.
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "2")]);
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
        submit_with("a subscription's token", 400, good.as_bytes()),
        submit_with("a body over the limit", 413, &[b'z'; 16_385]),
        refused(
            "a declared length over the limit, and no body",
            413,
            request("POST", "/submit", "Content-Length: 16385\r\n", b""),
            "",
        ),
        refused(
            "chunks over the limit",
            413,
            {
                let body = chunked(&[&[b'z'; 10_000], &[b'z'; 6385]]);
                request("POST", "/submit", "Transfer-Encoding: chunked\r\n", &body)
            },
            "",
        ),
        with_method("POST", "/events", "GET"),
        with_method("PUT", "/events?token=abc", "GET"),
        with_method("DELETE", "/events", "GET"),
        with_method("GET", "/submit", "POST"),
        with_method("PUT", "/submit", "POST"),
        with_method("PATCH", "/submit", "POST"),
        with_method("POST", "/ping", "GET"),
        with_method("DELETE", "/ping", "GET"),
        with_method("BREW", "/ping", "GET"),
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
    } in &rows
    {
        let what = format!(
            "{what}: {}",
            String::from_utf8_lossy(&request[..request.len().min(60)])
        );
        let mut connection = server.connect();
        connection.send(request);
        let answer = connection.answer();
        let text = answer.text();
        assert_eq!(answer.status, *status, "{what}: {text}");
        assert_eq!(
            answer.header("Access-Control-Allow-Origin"),
            Some("*"),
            "{what}"
        );
        let kind = answer.header("Content-Type").unwrap_or_default();
        assert!(kind.starts_with("text/plain"), "{what}: {kind:?}");
        // A sentence on one line.
        assert!(
            text.ends_with('\n') && text.lines().count() == 1 && text.len() > 10,
            "{what}: {text:?}"
        );
        assert!(!text.contains(SECRET), "{what}: {text}");
        let repeated = token.len() > 15
            && (0..token.len() - 15).any(|at| {
                token
                    .get(at..at + 15)
                    .is_some_and(|piece| text.contains(piece))
            });
        assert!(!repeated, "{what}: {text}");
        let allowed = answer.header("Allow").unwrap_or_default();
        match allow.is_empty() {
            true => assert_eq!(allowed, "", "{what}"),
            false => assert!(
                allowed.split(", ").any(|method| method == *allow),
                "{what}: {allowed}"
            ),
        }
        assert_eq!(answer.header("Retry-After"), None, "{what}");
        if *status == 413 {
            connection.expect_closed();
        }
    }
    // None of it has cost the server anything, and its log is as discreet as its answers.
    assert_eq!(server.publish(&[("news", "", "")]).ok(), 0);
    let log = server.log();
    assert!(
        !log.contains(SECRET) && !log.contains(&good[..20]) && !log.contains("forged"),
        "{log}"
    );
}

/// Java's HTTP client and curl's --http2 offer an upgrade with each request. It is declined, and the
/// body ends where it was said to.
#[test]
fn an_offered_upgrade_is_declined_and_the_submission_taken() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let mut sub = server.subscribe(&["news"]);
    for size in [1, 9000] {
        let data = "x".repeat(size);
        let body = server.submission(&[("news", "", &data)]);
        let fields = format!(
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\
             Content-Length: {}\r\n",
            body.len()
        );
        let mut connection = server.connect();
        connection.send(request("POST", "/submit", &fields, body.as_bytes()));
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("message", &data);
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
        server.wait_for_log("/submit 400: wrong payload");
    }
    let log = server.log();
    assert!(!log.contains("alice") && !log.contains("4111111"), "{log}");
}

/// A HEAD request has no body to be answered with, on an error neither: the bytes would be taken
/// for the next answer.
#[test]
fn head_is_answered_without_a_body() {
    let server = TestServer::start(&[]);
    let mut connection = server.connect();
    connection.send(request("HEAD", "/ping", "", b""));
    assert_eq!(connection.head().status, 200);
    connection.send(request("GET", "/ping", "", b""));
    assert_eq!(connection.answer().status, 200);
    connection.send(request("HEAD", "/events", "", b""));
    let answer = connection.head();
    assert_eq!(answer.status, 405);
    assert!(answer.header("Allow").unwrap().contains("GET"));
    connection.expect_closed();
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

/// What proxies and browsers need to see: no caching, no buffering, no length, no chunks.
#[test]
fn a_stream_begins_as_the_protocol_says() {
    let server = TestServer::start(&[]);
    let mut connection = server.connect();
    let target = format!("/events?token={}", server.token(&["news"]));
    connection.send(request("GET", &target, "", b""));
    let head = connection.head();
    assert_eq!((head.version.as_str(), head.status), ("HTTP/1.1", 200));
    assert_eq!(head.header("Content-Type"), Some("text/event-stream"));
    assert_eq!(head.header("Cache-Control"), Some("no-store"));
    assert_eq!(head.header("X-Accel-Buffering"), Some("no"));
    assert_eq!(head.header("Access-Control-Allow-Origin"), Some("*"));
    assert_eq!(head.header("Content-Length"), None);
    assert_eq!(head.header("Transfer-Encoding"), None);
    let first = String::from_utf8(connection.frame()).unwrap();
    let delay = first
        .strip_prefix("retry: ")
        .and_then(|rest| rest.strip_suffix("\n:\n\n"));
    let delay: u64 = delay.and_then(|delay| delay.parse().ok()).expect(&first);
    assert!((3000..=6000).contains(&delay), "{first:?}");
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

/// A browser asks first where a script sets header fields of its own.
#[test]
fn a_preflight_is_answered_with_the_cors_headers() {
    let server = TestServer::start(&[("SSE_ALLOW_ORIGIN", "https://app.example")]);
    let fields = "Origin: https://app.example\r\nAccess-Control-Request-Method: GET\r\n\
                  Access-Control-Request-Headers: cache-control,last-event-id\r\n";
    for (path, method) in [
        ("/events?token=x", "GET"),
        ("/submit", "POST"),
        ("/ping", "GET"),
    ] {
        let mut connection = server.connect();
        connection.send(request("OPTIONS", path, fields, b""));
        let answer = connection.answer();
        assert_eq!(answer.status, 204, "{path}");
        let field = |name| answer.header(name).unwrap_or_default().to_ascii_lowercase();
        assert_eq!(field("Access-Control-Allow-Origin"), "https://app.example");
        assert!(
            field("Access-Control-Allow-Methods")
                .to_uppercase()
                .contains(method)
        );
        for name in ["cache-control", "last-event-id", "content-type"] {
            assert!(
                field("Access-Control-Allow-Headers").contains(name),
                "{name}"
            );
        }
        // No body: the connection is still in step.
        connection.send(request("GET", "/ping", "", b""));
        assert_eq!(connection.answer().status, 200);
    }
    assert_eq!(
        server.raw(request("OPTIONS", "/other", fields, b"")).status,
        404
    );
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

/// Some proxies and health checks still speak it: no chunks, and the end is the close.
#[test]
fn http_1_0_works() {
    let server = TestServer::start(&[]);
    let old = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        let mut connection = server.connect();
        connection.send(text.replace("HTTP/1.1\r\nHost: test", "HTTP/1.0"));
        connection
    };
    let mut connection = old(request("GET", "/ping", "", b""));
    assert_eq!(connection.answer().status, 200);
    connection.expect_closed();

    let target = format!("/events?token={}", server.token(&["news"]));
    let mut sub = Subscriber::on(old(request("GET", &target, "", b"")));
    assert_eq!(sub.head.header("Transfer-Encoding"), None);

    let body = server.submission(&[("news", "update", "hi")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let mut connection = old(request("POST", "/submit", &length, body.as_bytes()));
    assert_eq!(Submitted::from(connection.answer()).ok(), 1);
    connection.expect_closed();
    sub.expect_event("update", "hi");
}

#[test]
fn a_chunked_submission_is_taken() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let body = server.submission(&[("news", "update", &"x".repeat(3000))]);
    let (one, two) = body.as_bytes().split_at(700);
    let mut connection = server.connect();
    for pieces in [&[body.as_bytes()][..], &[one, two], &[one, two, b"\n"]] {
        let fields = "Transfer-Encoding: chunked\r\n";
        connection.send(request("POST", "/submit", fields, &chunked(pieces)));
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("update", &"x".repeat(3000));
    }
}

/// curl sends it with every body over a kilobyte, and waits.
#[test]
fn expect_100_continue_works() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let body = server.submission(&[("news", "update", &"x".repeat(2000))]);
    for fields in [
        format!("Content-Length: {}\r\n", body.len()),
        "Transfer-Encoding: chunked\r\n".into(),
    ] {
        let mut connection = server.connect();
        let expect = format!("{fields}Expect: 100-continue\r\n");
        connection.send(request("POST", "/submit", &expect, b""));
        assert_eq!(connection.head().status, 100);
        match fields.contains("chunked") {
            true => connection.send(chunked(&[body.as_bytes()])),
            false => connection.send(&body),
        }
        assert_eq!(Submitted::from(connection.answer()).ok(), 1);
        sub.expect_event("update", &"x".repeat(2000));
    }
    // Who would send too much is told before.
    let fields = "Content-Length: 16385\r\nExpect: 100-continue\r\n";
    let answer = server.raw(request("POST", "/submit", fields, b""));
    assert_eq!(answer.status, 413);
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
        let fields = "Transfer-Encoding: chunked\r\n";
        let chunks = chunked(&[&body.as_bytes()[..5000], &body.as_bytes()[5000..]]);
        let answer = server.raw(request("POST", "/submit", fields, &chunks));
        assert_eq!(answer.status, status, "{}", answer.text());
        if status == 200 {
            sub.expect_event("message", &data);
            sub.expect_event("message", &data);
        }
    }
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

/// Proxies close what is silent; and a departed client is noticed only when it is written to.
#[test]
fn a_silent_stream_gets_heartbeats() {
    let server = TestServer::start(&[("SSE_HEARTBEAT", "1")]);
    let mut raw = server.subscribe(&["news"]).connection;
    raw.frame();
    assert_eq!(raw.frame(), b":\n\n");
    assert_eq!(raw.frame(), b":\n\n");
    server.publish(&[("news", "update", "hi")]).ok();
    while raw.frame() != b"event: update\ndata: hi\n\n" {}
    assert_eq!(raw.frame(), b":\n\n");
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
        ] {
            let status = |permitted| if permitted { 200 } else { 401 };
            let token = server.mint_at(&subscription, now() - age);
            let mut connection = server.connect();
            connection.send(request("GET", &format!("/events?token={token}"), "", b""));
            assert_eq!(
                connection.head().status,
                status(subscribed),
                "{age} of {ttl}"
            );
            let body = server.mint_at(&submission, now() - age);
            let answer = server.post("/submit", body.as_bytes());
            assert_eq!(answer.status, status(submitted), "{age} of {submit_ttl}");
        }
    }
}

/// A stream that ended with its token would make all clients of a page load reconnect at once.
#[test]
fn a_stream_outlives_its_token() {
    let server = TestServer::start(&[("SSE_TOKEN_TTL", "2"), ("SSE_HEARTBEAT", "1")]);
    let token = server.token(&["news"]);
    let mut sub = server.stream(&token);
    let target = format!("/events?token={token}");
    let status = || {
        let mut connection = server.connect();
        connection.send(request("GET", &target, "", b""));
        connection.head().status
    };
    assert!(
        wait_until(DEADLINE, || status() == 401),
        "the token expires"
    );
    server.publish(&[("news", "update", "hi")]).ok();
    sub.expect_event("update", "hi");
}

// ---------------------------------------------------------------------------------------- limits

/// Full streams never starve publishers, and a place is free as soon as someone leaves.
#[test]
fn the_subscriber_limit_is_answered_with_503_and_room_comes_back() {
    let server = TestServer::start(&[("SSE_MAX_SUBSCRIBERS", "3"), ("SSE_HEARTBEAT", "1")]);
    let mut subs: Vec<_> = (0..3).map(|_| server.subscribe(&["news"])).collect();
    let target = format!("/events?token={}", server.token(&["news"]));
    let answer = server.get(&target);
    assert_eq!(answer.status, 503);
    let seconds: u64 = answer
        .header("Retry-After")
        .expect("a hint")
        .parse()
        .expect("seconds");
    assert!((1..=3600).contains(&seconds));
    assert_eq!(answer.header("Access-Control-Allow-Origin"), Some("*"));
    assert!(answer.text().ends_with('\n') && answer.text().lines().count() == 1);
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

// --------------------------------------------------------------------------------------- metrics

const FAMILIES: [(&str, &str); 10] = [
    ("sse_subscribers", "gauge"),
    ("sse_topics", "gauge"),
    ("sse_events_total", "counter"),
    ("sse_deliveries_total", "counter"),
    ("sse_delivered_bytes_total", "counter"),
    ("sse_queue_high_water", "gauge"),
    ("sse_answers_total", "counter"),
    ("sse_subscribers_cut_total", "counter"),
    ("sse_connections_refused_total", "counter"),
    ("process_start_time_seconds", "gauge"),
];

#[test]
fn metrics_count_what_happened() {
    let server = TestServer::start(&[
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
        ("SSE_HEARTBEAT", "1"),
    ]);
    let mut sub = server.subscribe(&["news", "sport"]);
    let other = server.subscribe(&["news"]);
    server
        .publish(&[("news", "", "hi"), ("sport", "", "hi")])
        .ok();
    server.post("/submit", b"nonsense");
    server.get("/events?token=nonsense");
    server.get("/nothing");
    sub.expect_event("message", "hi");

    let text = server.metrics_text();
    for (family, kind) in FAMILIES {
        assert!(
            text.contains(&format!("\n# TYPE {family} {kind}\n")),
            "{family}: {text}"
        );
        let help = text
            .lines()
            .filter(|line| line.starts_with(&format!("# HELP {family} ")));
        assert_eq!(help.count(), 1, "{family}: {text}");
    }
    for (sample, value) in [
        ("sse_subscribers", 2),
        ("sse_topics", 2),
        ("sse_events_total", 2),
        ("sse_deliveries_total", 3),
        ("sse_delivered_bytes_total", 3 * "data: hi\n\n".len() as u64),
        (r#"sse_answers_total{path="/submit",status="200"}"#, 1),
        (r#"sse_answers_total{path="/submit",status="401"}"#, 1),
        (r#"sse_answers_total{path="/events",status="401"}"#, 1),
        (r#"sse_answers_total{path="other",status="404"}"#, 1),
    ] {
        assert_eq!(sample_in(&text, sample), value, "{sample} in {text}");
    }
    assert!((1..=2).contains(&sample_in(&text, "sse_queue_high_water")));
    let started = sample_in(&text, "process_start_time_seconds");
    assert!(
        (now() - 3600..=now()).contains(&(started as u32)),
        "{started}"
    );
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
    server.wait_for_metric(r#"sse_subscribers_cut_total{reason="disconnected"}"#, 1);
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
