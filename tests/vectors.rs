//! Tokens that others minted, at our doors: each has one verdict, and none is skipped.

mod support;

use std::collections::HashMap;

use serde_json::Value;
use support::*;

/// The vectors of a file, which says itself how many there are.
fn vectors(text: &str, count: usize) -> Vec<Value> {
    let mut file: Value = serde_json::from_str(text).unwrap();
    assert_eq!(
        file["count"], count,
        "a vector came or went: change the count here too"
    );
    let vectors = file["vectors"].take();
    let vectors = vectors.as_array().unwrap().clone();
    assert_eq!(vectors.len(), count);
    vectors
}

fn text<'a>(vector: &'a Value, field: &str) -> &'a str {
    vector[field].as_str().expect(field)
}

fn number(vector: &Value, field: &str) -> u32 {
    vector[field]
        .as_u64()
        .expect(field)
        .try_into()
        .expect(field)
}

/// The specification's own vectors. What is forged must be told from what is only old, and the
/// payload must come out byte by byte.
#[test]
fn the_vectors_of_the_branca_specification_hold() {
    let mut servers = HashMap::new();
    for vector in vectors(include_str!("vectors/branca.json"), 25) {
        let (secret, token) = (text(&vector, "key"), text(&vector, "token"));
        let valid = vector["isValid"].as_bool().unwrap();
        let opened = branca::decode_with_timestamp(token, &bytes_of_hex(secret));
        match valid {
            true => {
                let (timestamp, payload) = opened.unwrap();
                assert_eq!(timestamp, number(&vector, "timestamp"), "{vector}");
                assert_eq!(payload, bytes_of_hex(text(&vector, "msg")), "{vector}");
            }
            false => assert!(opened.is_err(), "{vector}"),
        }

        // A key that is too short is refused before there is a door.
        if secret.len() != 64 {
            assert!(!valid);
            let output = run(
                &[("SSE_SECRET", secret), ("SSE_LISTEN", "127.0.0.1:0")],
                &[],
            );
            assert_eq!(output.status.code(), Some(2), "{vector}");
            continue;
        }
        let start = || TestServer::start(&[("SSE_SECRET", secret)]);
        let server = servers.entry(secret.to_string()).or_insert_with(start);
        for answer in [
            server.post("/submit", token.as_bytes()),
            server.get(&format!("/events?token={token}")),
        ] {
            assert_eq!(answer.status, 401, "{vector}");
            // All of them are decades old, but for those dated in 2106: no lifetime can be added
            // to the last second that there is.
            let old = valid && number(&vector, "timestamp") != u32::MAX;
            assert_eq!(
                answer.text().contains("expired"),
                old,
                "{vector}: {}",
                answer.text()
            );
        }
    }
}

/// The moment of our own vectors, and their lifetimes.
const CLOCK: u32 = 1_700_000_000;
const TOKEN_TTL: u32 = 86_400;
const SUBMIT_TTL: u32 = 300;

/// Our own, for what stands in the token: the map of topics, and the list of events.
#[test]
fn the_vectors_of_both_doors_hold() {
    let mut servers = HashMap::new();
    for vector in vectors(include_str!("vectors/door.json"), 90) {
        let secret = text(&vector, "secret");
        // The server cannot be given another clock. Instead the lifetimes are made longer by the
        // time that went by since the vector's moment.
        assert_eq!(number(&vector, "clock"), CLOCK);
        let server = servers.entry(secret.to_string()).or_insert_with(|| {
            let since = |ttl: u32| (now() - CLOCK + ttl).to_string();
            TestServer::start(&[
                ("SSE_SECRET", secret),
                ("SSE_TOKEN_TTL", &since(TOKEN_TTL)),
                ("SSE_SUBMIT_TTL", &since(SUBMIT_TTL)),
            ])
        });
        match text(&vector, "door") {
            "/events" => subscription(server, &vector),
            "/submit" => submission(server, &vector),
            other => panic!("no such door: {other}"),
        }
    }
}

fn subscription(server: &TestServer, vector: &Value) {
    assert_eq!(number(vector, "ttl"), TOKEN_TTL);
    let mut connection = server.connect();
    let target = format!("/events?token={}", text(vector, "token"));
    connection.send(request("GET", &target, "", b""));
    if vector["status"] != 200 {
        let answer = connection.answer();
        assert_eq!(
            vector["status"],
            answer.status,
            "{vector}: {}",
            answer.text()
        );
        return;
    }
    let mut sub = Subscriber::on(connection);
    for topic in vector["topics"].as_array().unwrap() {
        let topic = topic.as_str().unwrap();
        // Subscribers of earlier vectors may not have been noticed to be gone.
        assert!(
            server.publish(&[(topic, "for", topic)]).ok() > 0,
            "{vector}"
        );
        let message = sub.message();
        assert_eq!(message.name, "for", "{vector}");
        // What a browser makes of the ends of lines in it.
        assert_eq!(message.data, topic.replace('\r', "\n"), "{vector}");
    }
}

fn submission(server: &TestServer, vector: &Value) {
    assert_eq!(number(vector, "ttl"), SUBMIT_TTL);
    let mut sub = server.subscribe(&["news", "a", "caf\u{e9}"]);
    let answer = server.post("/submit", text(vector, "token").as_bytes());
    assert_eq!(
        vector["status"],
        answer.status,
        "{vector}: {}",
        answer.text()
    );
    if answer.status == 200 {
        let events = vector["delivers"].as_array().unwrap();
        assert_eq!(
            Submitted::from(answer).events,
            events.len() as u64,
            "{vector}"
        );
        for event in events {
            let message = sub.message();
            assert_eq!(
                (&event[1], &event[2]),
                (&message.name.into(), &message.data.into()),
                "{vector}"
            );
        }
    }
    // Nothing else came of it.
    server.publish(&[("news", "after", "")]).ok();
    sub.expect_event("after", "");
}
