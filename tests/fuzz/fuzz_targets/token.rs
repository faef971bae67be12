//! A stranger's bytes as a token, and as the payload of an authentic one, against a reader of
//! MessagePack that shares no code with the server's.
#![no_main]
#![allow(dead_code)] // The modules are the server's; this needs a part of them.

#[path = "../../../src/config.rs"]
mod config;
#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/event.rs"]
mod event;
#[path = "../../support/shape.rs"]
mod shape;
#[path = "../../../src/token.rs"]
mod token;

use std::sync::LazyLock;
use std::time::UNIX_EPOCH;

use libfuzzer_sys::fuzz_target;
use shape::Verdict;

/// Lifetime of either token, and topics in one.
const TTL: u32 = 300;
const MAX_TOPICS: u32 = 64;

static KEY: LazyLock<config::Key> = LazyLock::new(|| "42".repeat(32).parse().unwrap());

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    let subscription = |token: &str| KEY.open_subscription(token, TTL, MAX_TOPICS);
    let submission = |token: &str| KEY.open_submission(token, TTL);
    if kind % 2 == 0 {
        // Nobody without the key gets past authentication.
        let token = String::from_utf8_lossy(bytes);
        assert_eq!(subscription(&token).unwrap_err().status, 401);
        assert_eq!(submission(&token).unwrap_err().status, 401);
        return;
    }
    let now = UNIX_EPOCH.elapsed().unwrap().as_secs() as u32;
    let token = branca::encode(bytes, &[0x42; 32], now).unwrap();

    let opened = subscription(&token);
    match shape::subscription(bytes) {
        Verdict::Valid(topics) => {
            let topics: Result<event::Topics, _> = topics.iter().map(event::Topic::new).collect();
            assert_eq!(opened, topics);
        }
        Verdict::Wrong => assert_eq!(opened.unwrap_err().status, 400),
        Verdict::Unsaid => {}
    }
    let opened = submission(&token);
    match shape::submission(bytes) {
        Verdict::Valid(events) => {
            let opened = opened.expect("valid by the other reader");
            assert_eq!(opened.len(), events.len());
            for (opened, event) in opened.iter().zip(&events) {
                assert_eq!(Ok(&opened.topic), event::Topic::new(&event.0).as_ref());
                let text = std::str::from_utf8(opened.frame.bytes(false)).unwrap();
                assert_eq!(parsed(text), shape::dispatched(event));
            }
        }
        Verdict::Wrong => assert_eq!(opened.unwrap_err().status, 400),
        Verdict::Unsaid => {}
    }
});

/// A frame as a browser reads it: only line feeds end lines, and one blank line the frame.
fn parsed(frame: &str) -> (String, String) {
    assert!(!frame.contains('\r'));
    let lines = frame.strip_suffix("\n\n").expect("a blank line at the end");
    let (mut name, mut data) = ("message", Vec::new());
    for line in lines.split('\n') {
        match line.split_once(": ") {
            Some(("event", value)) if data.is_empty() => name = value,
            Some(("data", value)) => data.push(value),
            _ => panic!("a line that is none of ours: {line:?}"),
        }
    }
    (name.into(), data.join("\n"))
}
