//! A stranger's bytes as a request target: a subscription comes of exactly those that name the
//! path and hold an authentic token, and it is the token's.
#![no_main]
#![allow(dead_code)] // The modules are the server's; this needs a part of them.

#[path = "../../../src/config.rs"]
mod config;
#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/event.rs"]
mod event;
#[path = "../../../src/hub.rs"]
mod hub;
#[path = "../../../src/journal.rs"]
mod journal;
#[path = "../../../src/routes.rs"]
mod routes;
#[path = "../../../src/server.rs"]
mod server;
#[path = "../../../src/subscriber.rs"]
mod subscriber;
#[path = "../../../src/token.rs"]
mod token;
#[path = "../../../src/writer.rs"]
mod writer;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use tiny_http::TestRequest;

/// In the fuzzer's bytes each of these stands for a token, which it could not find by itself.
const PLACES: [char; 3] = ['\u{1}', '\u{2}', '\u{3}'];

struct World {
    server: Arc<server::Server>,
    /// Authentic, by topic.
    tokens: BTreeMap<&'static str, String>,
    forged: String,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let mut config = config::Config::new(&"42".repeat(32)).unwrap();
    config.listen = ([127, 0, 0, 1], 0).into();
    let other = config::Config::new(&"43".repeat(32)).unwrap().key;
    let mint = |topic| (topic, config.key.mint_subscription(&[topic]).unwrap());
    World {
        tokens: [mint("a"), mint("b")].into(),
        forged: other.mint_subscription(&["a"]).unwrap(),
        server: server::Server::bind(config).unwrap(),
    }
});

fuzz_target!(|bytes: &[u8]| {
    let World {
        server,
        tokens,
        forged,
    } = &*WORLD;
    let mut target = String::from_utf8_lossy(bytes).into_owned();
    for (place, token) in PLACES.iter().zip(tokens.values().chain([forged])) {
        target = target.replace(*place, token);
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let token = query.split('&').find(|part| part.starts_with("token="));
    let token = token.map(|part| &part["token=".len()..]);
    let mut topics = tokens.iter().filter(|(_, it)| Some(&***it) == token);
    let expected = topics.next().filter(|_| path == "/events");

    let last = routes::respond(server, false, TestRequest::new().with_path(&target).into());
    let subscriber = server.hub.due.1.try_recv().ok();
    assert_eq!(subscriber.is_some(), expected.is_some(), "{target}");
    assert_eq!(
        server.hub.subscribers.load(SeqCst),
        usize::from(expected.is_some())
    );
    if let (Some(subscriber), Some((topic, _))) = (subscriber, expected) {
        assert!(last, "a stream is the last of its connection");
        assert_eq!(
            subscriber.topics,
            [event::Topic::new(topic).unwrap()].into()
        );
        server.hub.put_back(&subscriber);
        server.hub.cut(&subscriber, "fuzzed");
    }
});
