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
#[path = "../../../src/http.rs"]
mod http;
#[path = "../../../src/hub.rs"]
mod hub;
#[path = "../../../src/metrics.rs"]
mod metrics;
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
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

/// In the fuzzer's bytes each of these stands for a token, which it could not find by itself.
const PLACES: [char; 3] = ['\u{1}', '\u{2}', '\u{3}'];

struct World {
    hub: hub::Hub,
    /// Authentic, by topic.
    tokens: BTreeMap<&'static str, String>,
    forged: String,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let config = config::Config::new(&"42".repeat(32)).unwrap();
    let other = config::Config::new(&"43".repeat(32)).unwrap().key;
    let mint = |topic| (topic, config.key.mint_subscription([topic]).unwrap());
    World {
        tokens: [mint("a"), mint("b")].into(),
        forged: other.mint_subscription(["a"]).unwrap(),
        hub: hub::Hub::new(config, 1),
    }
});

fuzz_target!(|bytes: &[u8]| {
    let World {
        hub,
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

    let request = Ok(http::Request {
        method: tiny_http::Method::Get,
        path: path.into(),
        query: query.into(),
        fields: Vec::new(),
        modern: true,
        body: Some(Vec::new()),
        last: false,
    });
    let answer = routes::reply(hub, routes::Door::Public, &request);
    let answer = answer.expect("only what asks for a stream, and is not let in, has none");
    assert_eq!(
        answer.status == 200 && path != "/ping",
        expected.is_some(),
        "{target}"
    );
    let topic = expected.map(|(topic, _)| [event::Topic::new(topic).unwrap()].into());
    assert_eq!(answer.stream, topic, "{target}");
    // What was asked is never repeated, so that it can forge no field.
    let head = answer.head(false);
    let end = head.find("\r\n\r\n").expect("an end of the head");
    assert_eq!(end + 4, head.len(), "{head}");
});
