//! Tokens are opened by our own reader of base62, which is many times faster than branca's. Branca,
//! which mints them, is the oracle: on every input both say the same.
//!
//! `SSE_OPENINGS=1000000` for as many random tokens, `SSE_SEED` for others. In a release build,
//! `-- --nocapture` shows what either takes.

// The server's own files, which are private to the library.
#[allow(dead_code)]
#[path = "../src/config.rs"]
mod config;
#[allow(dead_code)]
#[path = "../src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../src/event.rs"]
mod event;
#[allow(dead_code)]
#[path = "../src/token.rs"]
mod token;

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::time::{Duration, Instant};

use attack::Dice;
use support::*;

const BASE62: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Seconds: none of these tokens is too old.
const TTL: u64 = 1_000_000_000;

struct Judges {
    key: config::Key,
    bytes: Vec<u8>,
}

impl Judges {
    fn new() -> Self {
        Self {
            key: SECRET.parse().unwrap(),
            bytes: bytes_of_hex(SECRET),
        }
    }

    /// Both judge a token; whether it is authentic, and was read as branca reads it.
    #[track_caller]
    fn agree(&self, token: &str) -> bool {
        let theirs = branca::decode_with_timestamp(token, &self.bytes);
        let ours = self.key.open_submission(token, TTL);
        match (theirs, ours) {
            (Err(_), Err(refusal)) => assert_eq!(refusal.status, 401, "{token}"),
            // Dated by a mutation that is authentic all the same there cannot be.
            (Ok((_, payload)), Ok(events)) => {
                let topics = events.iter().map(|event| event.topic.name());
                let expected = payload_of(&topics.collect::<Vec<_>>());
                assert!(payload == expected, "{token}");
                return true;
            }
            (Ok(_), Err(refusal)) => {
                assert_eq!(refusal.status, 400, "{token}");
                return true;
            }
            (Err(error), Ok(_)) => panic!("opened, where branca says {error}: {token}"),
        }
        false
    }
}

/// One event for each of the topics.
fn payload_of(topics: &[&str]) -> Vec<u8> {
    events_payload(
        &topics
            .iter()
            .map(|topic| (*topic, "", ""))
            .collect::<Vec<_>>(),
    )
}

fn digits(dice: &mut Dice, length: usize) -> String {
    let digit = |_| char::from(BASE62[dice.below(BASE62.len())]);
    (0..length).map(digit).collect()
}

/// A token that both take, or whose payload is garbage under the right key.
fn sealed(dice: &mut Dice) -> String {
    let length = 1 + dice.below(200);
    let payload = match dice.below(3) {
        0 => payload_of(&[&digits(dice, length)]),
        1 => payload_of(&[&digits(dice, length), "second"]),
        _ => (0..length).map(|_| dice.below(256) as u8).collect(),
    };
    mint(SECRET, &payload, now() - dice.below(1000) as u32)
}

fn mutated(dice: &mut Dice) -> String {
    let mut token = sealed(dice).into_bytes();
    for _ in 0..1 + dice.below(2) {
        let at = dice.below(token.len());
        match dice.below(6) {
            0 => token[at] = BASE62[dice.below(62)],
            1 => drop(token.remove(at)),
            2 => token.insert(at, BASE62[dice.below(62)]),
            3 => token.insert(0, b'0'),
            4 => token[at] = dice.below(128) as u8,
            _ => token.truncate(at + 1),
        }
    }
    String::from_utf8(token).unwrap()
}

/// A token that only one of the two took would be a way in, or a way to lose an event.
#[test]
fn both_say_the_same_of_random_and_mutated_tokens() {
    let (judges, mut dice) = (Judges::new(), Dice::new(9));
    let count = std::env::var("SSE_OPENINGS").map_or(60_000, |it| it.parse().unwrap());
    let (mut authentic, mut foreign) = (0, 0);
    for _ in 0..count {
        let length = dice.below(160);
        let token = match dice.below(4) {
            0 => sealed(&mut dice),
            1 => digits(&mut dice, length),
            _ => mutated(&mut dice),
        };
        match judges.agree(&token) {
            true => authentic += 1,
            false => foreign += 1,
        }
    }
    println!("  {authentic} authentic, {foreign} not");
    // Both kinds came up, or this says nothing.
    assert!(authentic > count / 8 && foreign > count / 4);
}

/// Each length of the number, and of its last limb; and the longest that a body may have.
#[test]
fn both_say_the_same_at_every_length() {
    let judges = Judges::new();
    let lengths = (0..700).chain([1000, 1024, 2000, 4000, 8000, 16_000, 32_000, 48_000]);
    for length in lengths {
        let topic = "t".repeat(length.clamp(1, 256));
        let topics = vec![&*topic; length / 256 + 1];
        let token = mint(SECRET, &payload_of(&topics), now());
        assert!(judges.agree(&token), "{length}");
        // The last digit, and the first: the smallest change and the largest.
        let (start, end) = (&token[1..], &token[..token.len() - 1]);
        for changed in [
            format!("{end}{}", if token.ends_with('a') { 'b' } else { 'a' }),
            format!("0{token}"),
            start.into(),
            end.into(),
        ] {
            assert!(!judges.agree(&changed), "{length}");
        }
    }
}

/// Said, not judged: a busy machine would judge otherwise.
#[test]
fn what_either_takes_is_shown() {
    let judges = Judges::new();
    for length in [64, 1024, 8192, 16_384, 65_536] {
        let token = digits(&mut Dice::new(3), length);
        let time = |act: &dyn Fn()| -> Duration {
            let times = (0..5).map(|_| {
                let begun = Instant::now();
                act();
                begun.elapsed()
            });
            times.min().unwrap()
        };
        let theirs = time(&|| drop(branca::decode_with_timestamp(&token, &judges.bytes)));
        let ours = time(&|| drop(judges.key.open_submission(&token, TTL)));
        let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
        println!("  {length} characters: {ours:.1?}, branca {theirs:.1?}, {ratio:.1} times");
    }
}
