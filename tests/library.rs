//! The server as a part of another program, through the crate's public API.

mod support;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use sse_server::{Config, Event, Key, Server};
use support::*;

const OTHER_SECRET: &str = "0101010101010101010101010101010101010101010101010101010101010101";

/// A server in this process. Shut down and joined when dropped.
struct Embedded {
    server: Arc<Server>,
    addr: SocketAddr,
    thread: Option<JoinHandle<io::Result<()>>>,
}

fn key(secret: &str) -> Key {
    Config::new(secret).unwrap().key
}

fn config(secret: &str) -> Config {
    let mut config = Config::new(secret).unwrap();
    config.listen = "127.0.0.1:0".parse().unwrap();
    config
}

impl Embedded {
    fn start(config: Config) -> Self {
        let server = Server::bind(config).unwrap();
        let addr = server.local_addr().unwrap();
        let running = server.clone();
        let thread = Some(thread::spawn(move || running.run()));
        Self {
            server,
            addr,
            thread,
        }
    }

    #[track_caller]
    fn subscribe(&self, key: &Key, topics: &[&str]) -> Subscriber {
        let token = key.mint_subscription(topics).unwrap();
        subscribe(self.addr, &format!("/events?token={token}"))
    }

    /// Submits over HTTP; how many streams the event was queued for.
    #[track_caller]
    fn submit(connection: &mut Connection, body: &str) -> u64 {
        let length = format!("Content-Length: {}\r\n", body.len());
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        Submitted::from(connection.answer()).ok()
    }

    #[track_caller]
    fn stop(&mut self) {
        self.server.shutdown();
        if let Some(thread) = self.thread.take() {
            let ended = wait_until(DEADLINE, || thread.is_finished());
            assert!(ended, "run() has not returned");
            let result = thread.join().expect("run() has not panicked");
            result.expect("run() had all it needed");
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.server.shutdown();
    }
}

fn event(topic: &str, name: &str, data: &str) -> Event {
    Event::new(topic, name, data).unwrap()
}

#[test]
fn the_defaults_are_those_of_the_protocol() {
    let config = Config::new(SECRET).unwrap();
    assert_eq!(config.listen, "127.0.0.1:8000".parse().unwrap());
    assert_eq!(config.token_ttl, 86_400);
    assert_eq!(config.submit_ttl, 300);
    assert_eq!(config.max_subscribers, 10_000);
    assert_eq!(config.max_topics, 64);
    assert_eq!(config.max_body, 16_384);
    assert_eq!(config.queue, 64);
    assert_eq!(config.heartbeat, 15);
    assert_eq!(config.retry, 3000);
    assert_eq!(config.read_timeout, 10);
    assert_eq!(config.write_timeout, 10);
    assert_eq!(config.allow_origin, "*");
    assert_eq!(config.metrics_listen, None);
}

/// An embedding program may have variables of its own, and reads ours as the binary does.
#[test]
fn settings_are_read_from_variables() {
    let read = |vars: &[(&str, &str)]| {
        let vars = vars
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()));
        Config::from_vars(vars)
    };
    let secret = ("SSE_SECRET", SECRET);
    let config = read(&[secret, ("PATH", "/"), ("QUEUE", "3"), ("SSE_QUEUE", "9")]).unwrap();
    assert_eq!((config.queue, config.retry), (9, 3000));
    for (vars, name) in [
        (&[][..], "SSE_SECRET"),
        (&[("SSE_SECRET", "abc")], "SSE_SECRET"),
        (&[secret, ("SSE_QUEUE", "0")], "SSE_QUEUE"),
    ] {
        let problem = read(vars).expect_err(name);
        assert!(problem.to_string().contains(name), "{problem}");
    }
}

/// What a program logs about its settings must not give its secret away: what cannot be printed
/// is not printed by mistake.
#[test]
fn a_secret_is_not_printed_by_mistake() {
    let shown = format!("{:?} {:#?}", config(SECRET), key(SECRET));
    let bytes = format!("{:?}", &bytes_of_hex(SECRET)[..4]);
    for secret in [&SECRET[..8], bytes.trim_matches(['[', ']'])] {
        assert!(!shown.contains(secret), "{shown}");
    }
    assert!(shown.contains("max_topics: 64"), "{shown}");
    let wrong = format!("{}x", &SECRET[..63]);
    let problem = Config::new(&wrong).unwrap_err().to_string();
    assert!(problem.contains("SSE_SECRET"), "{problem}");
    assert!(!problem.contains(&SECRET[..8]), "{problem}");
}

#[test]
fn a_fresh_secret_is_a_key() {
    let (one, two) = (Key::fresh_secret().unwrap(), Key::fresh_secret().unwrap());
    assert_ne!(one, two);
    assert!(Config::new(&one).is_ok());
}

/// An event that could forge a frame cannot be made, so nobody has to check it later.
#[test]
fn what_may_not_be_sent_cannot_be_made() {
    let long = "t".repeat(257);
    let key = key(SECRET);
    for (topic, name) in [
        ("", "a"),
        (&*long, "a"),
        ("t", "a\nb"),
        ("t", "a\rb"),
        ("t", "a\0b"),
    ] {
        assert!(Event::new(topic, name, "").is_err(), "{topic:?} {name:?}");
        assert!(
            key.mint_submission(topic, name, "").is_err(),
            "{topic:?} {name:?}"
        );
    }
    assert!(key.mint_subscription(["news", ""]).is_err());
    assert!(key.mint_subscription([&long]).is_err());
    // A token without topics, or longer than a query may be, is one that the server refuses.
    assert!(key.mint_subscription([""; 0]).is_err());
    let many: Vec<String> = (0..64)
        .map(|number| format!("{number}{}", &long[9..]))
        .collect();
    assert_eq!(key.mint_subscription(&many).unwrap_err().status, 414);
    assert!(key.mint_subscription(&many[..8]).is_ok());
    assert!(Event::new(&long[1..], "", "").is_ok());
}

/// An embedding program writes fields as it likes: none arrives unchecked.
#[test]
fn bind_checks_every_setting() {
    type Change = fn(&mut Config, u64);
    let numbers: [(&str, Change, u64); 10] = [
        ("SSE_TOKEN_TTL", |it, to| it.token_ttl = to, 1_000_000_000),
        ("SSE_SUBMIT_TTL", |it, to| it.submit_ttl = to, 1_000_000_000),
        (
            "SSE_MAX_SUBSCRIBERS",
            |it, to| it.max_subscribers = to,
            1_000_000,
        ),
        ("SSE_MAX_TOPICS", |it, to| it.max_topics = to, 4096),
        ("SSE_MAX_BODY", |it, to| it.max_body = to, 65_536),
        ("SSE_QUEUE", |it, to| it.queue = to, 65_536),
        ("SSE_HEARTBEAT", |it, to| it.heartbeat = to, 86_400),
        ("SSE_RETRY", |it, to| it.retry = to, 86_400_000),
        ("SSE_READ_TIMEOUT", |it, to| it.read_timeout = to, 86_400),
        ("SSE_WRITE_TIMEOUT", |it, to| it.write_timeout = to, 86_400),
    ];
    let refused = |config: Config| {
        let error = Server::bind(config).err().expect("refused");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        error.to_string()
    };
    for (name, change, most) in numbers {
        for value in [0, most + 1, u64::MAX] {
            let mut given = config(SECRET);
            change(&mut given, value);
            let problem = refused(given);
            assert!(problem.contains(&format!("{name} is {value}")), "{problem}");
        }
        let mut given = config(SECRET);
        change(&mut given, most);
        assert!(Server::bind(given).is_ok(), "{name}");
    }
    for origin in ["", "*\r\nX: y", "https://a/"] {
        let mut given = config(SECRET);
        given.allow_origin = origin.into();
        assert!(refused(given).contains("SSE_ALLOW_ORIGIN"));
    }
    let mut given = config(SECRET);
    given.renew_url = Some("/\r\nX: y".into());
    assert!(refused(given).contains("SSE_RENEW_URL"));
}

/// `?` in a function that returns any error takes all of ours, also across threads.
#[test]
fn every_error_is_one_for_the_standard_library() {
    fn all() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let key = Config::new(&Key::fresh_secret()?)?.key;
        let owned: Vec<String> = vec!["news".into()];
        key.mint_subscription(&owned)?;
        key.mint_subscription(["a", "b"])?;
        Event::new("news", "", "")?;
        let server = Server::bind(config(SECRET))?;
        server.publish(&[])?;
        Config::new("abc")?;
        Ok(())
    }
    let problem = all().unwrap_err().to_string();
    assert!(problem.contains("SSE_SECRET"), "{problem}");
}

/// What peers' users ask for: who is there?
#[test]
fn the_subscribers_can_be_counted() {
    let key = key(SECRET);
    let embedded = Embedded::start(config(SECRET));
    let server = &embedded.server;
    let count = || {
        (
            server.subscribers(),
            server.subscribers_of("a"),
            server.subscribers_of("b"),
        )
    };
    assert_eq!(count(), (0, 0, 0));
    let one = embedded.subscribe(&key, &["a"]);
    let both = embedded.subscribe(&key, &["a", "b"]);
    assert_eq!(count(), (2, 2, 1));
    assert_eq!(server.subscribers_of(""), 0);
    drop((one, both));
    assert!(wait_until(DEADLINE, || count() == (0, 0, 0)));
}

#[test]
fn an_event_published_in_process_reaches_a_client() {
    let key = key(SECRET);
    let mut embedded = Embedded::start(config(SECRET));
    assert_ne!(embedded.addr.port(), 0);
    let mut sub = embedded.subscribe(&key, &["news", "sport"]);
    let receipt = embedded
        .server
        .publish(&[event("news", "update", "a\nb"), event("other", "", "")]);
    let receipt = receipt.unwrap();
    assert_eq!((receipt.events, receipt.deliveries), (2, 1));
    sub.expect_event("update", "a\nb");
    embedded.stop();
    // Its farewell, and an end that can be told from a break.
    assert!(matches!(sub.item(), Some(Item::Retry(_))));
    sub.expect_end();
    assert!(sub.connection.whole);
}

/// What tests log, at every level.
struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let line = format!("{} {}", record.level(), record.args());
        self.0.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

static LINES: Lines = Lines(Mutex::new(Vec::new()));

/// Whoever looks for a stream that comes and goes finds it, but not what it is about.
#[test]
fn a_stream_is_logged_for_debugging_without_its_topics() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let embedded = Embedded::start(config(SECRET));
    let topics = ["unsaid 1", "unsaid 2", "unsaid 3", "unsaid 4", "unsaid 5"];
    assert_eq!(embedded.server.subscribers_of(topics[4]), 0);
    let sub = embedded.subscribe(&key(SECRET), &topics);
    assert_eq!(embedded.server.subscribers_of(topics[4]), 1);
    assert_eq!(embedded.server.subscribers_of(""), 0);
    let said = |line: &str| LINES.0.lock().unwrap().iter().any(|it| it == line);
    assert!(said("DEBUG stream opened: id=1 topics=5"));
    drop(sub);
    let ended = "DEBUG stream ended: id=1 reason=left";
    assert!(wait_until(DEADLINE, || said(ended)));
    assert_eq!(embedded.server.subscribers_of(topics[4]), 0);
    let lines = LINES.0.lock().unwrap().join("\n");
    assert!(!lines.contains("unsaid"), "{lines}");
}

/// A batch that no queue can hold could only cut its own listeners: it is refused whole, and
/// whoever listens neither loses its stream nor hears a part of it.
#[test]
fn more_events_than_a_queue_holds_are_refused_and_nothing_is_delivered() {
    let key = key(SECRET);
    let embedded = Embedded::start(Config {
        queue: 3,
        ..config(SECRET)
    });
    let mut sub = embedded.subscribe(&key, &["news"]);
    let batch = |size| vec![event("news", "batch", ""); size];
    let refusal = embedded.server.publish(&batch(4)).unwrap_err();
    assert_eq!(refusal.status, 413, "{refusal}");
    assert!(refusal.to_string().contains("SSE_QUEUE"), "{refusal}");
    // Whoever listens, and how many, makes no difference: a backend learns it at its first try.
    let unheard = vec![event("nobody", "", ""); 4];
    assert_eq!(embedded.server.publish(&unheard).unwrap_err().status, 413);
    for _ in 0..10 {
        let receipt = embedded.server.publish(&batch(3)).unwrap();
        assert_eq!((receipt.events, receipt.deliveries), (3, 3));
    }
    embedded
        .server
        .publish(&[event("news", "end", "")])
        .unwrap();
    for _ in 0..30 {
        sub.expect_event("batch", "");
    }
    sub.expect_event("end", "");
}

/// Nobody may believe that a server which has ended took its event, or find room for a stream.
#[test]
fn a_kept_connection_gets_nothing_after_run_has_returned() {
    let mut embedded = Embedded::start(config(SECRET));
    let mut connection = Connection::open(embedded.addr);
    connection.send(request("GET", "/ping", "", b""));
    assert_eq!(connection.answer().status, 200);
    embedded.stop();
    let body = mint(SECRET, &events_payload(&[("news", "", "")]), now());
    let length = format!("Content-Length: {}\r\n", body.len());
    connection.try_send(request("POST", "/submit", &length, body.as_bytes()));
    assert!(connection.try_head().is_none(), "an answer after the end");
}

/// A program that waits for its server to end must not wait for ever, and may start it again.
#[test]
fn shutdown_drains_and_run_returns() {
    let key = key(SECRET);
    let mut first = Embedded::start(Config {
        queue: 5000,
        ..config(SECRET)
    });
    // Not read until after the shutdown: some of it waits in the queue, not in the kernel.
    let mut sub = first.subscribe(&key, &["news"]);
    let frame = event("news", "", &"x".repeat(9000));
    for _ in 0..1000 {
        assert_eq!(
            first
                .server
                .publish(std::slice::from_ref(&frame))
                .unwrap()
                .deliveries,
            1
        );
    }
    first.server.shutdown();
    assert_eq!(sub.rest().len(), 1000);
    assert!(
        (3000..=6000).contains(&sub.retry.unwrap()),
        "{:?}",
        sub.retry
    );
    first.stop();
    assert!(TcpStream::connect(first.addr).is_err());
    // What nobody will be told is not taken.
    assert!(first.server.publish(&[frame]).is_err());
    let listen = first.addr;
    let second = Embedded::start(Config {
        listen,
        ..config(SECRET)
    });
    let mut sub = second.subscribe(&key, &["news"]);
    second
        .server
        .publish(&[event("news", "again", "")])
        .unwrap();
    sub.expect_event("again", "");
}

#[test]
fn a_server_that_never_ran_can_be_shut_down() {
    let server = Server::bind(config(SECRET)).unwrap();
    server.shutdown();
    let running = server.clone();
    let mut embedded = Embedded {
        addr: server.local_addr().unwrap(),
        server,
        thread: Some(thread::spawn(move || running.run())),
    };
    embedded.stop();
}

#[test]
fn an_address_that_is_taken_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let problem = Server::bind(Config {
        listen,
        ..config(SECRET)
    })
    .err()
    .unwrap();
    assert!(
        problem.to_string().contains(&listen.to_string()),
        "{problem}"
    );
}

/// No state is shared behind the servers' backs: neither topics, nor keys, nor limits, nor ends.
#[test]
fn several_servers_live_in_one_process() {
    let keys: Vec<Key> = [SECRET, OTHER_SECRET]
        .map(|text| text.parse().unwrap())
        .into();
    let mut one = Embedded::start(Config {
        max_subscribers: 1,
        ..config(SECRET)
    });
    let two = Embedded::start(config(OTHER_SECRET));
    let mut sub_one = one.subscribe(&keys[0], &["news"]);
    let mut subs_two: Vec<_> = (0..2).map(|_| two.subscribe(&keys[1], &["news"])).collect();
    assert_eq!(
        one.server
            .publish(&[event("news", "one", "")])
            .unwrap()
            .deliveries,
        1
    );
    assert_eq!(
        two.server
            .publish(&[event("news", "two", "")])
            .unwrap()
            .deliveries,
        2
    );
    sub_one.expect_event("one", "");
    let foreign = keys[0].mint_subscription(["news"]).unwrap();
    let mut connection = Connection::open(two.addr);
    connection.send(request("GET", &format!("/events?token={foreign}"), "", b""));
    assert_eq!(connection.answer().status, 401);
    one.stop();
    sub_one.expect_end();
    two.server.publish(&[event("news", "after", "")]).unwrap();
    for sub in &mut subs_two {
        sub.expect_event("two", "");
        sub.expect_event("after", "");
    }
}

/// Two ways in, one order: what a tool publishes itself and what its backends submit.
#[test]
fn publishing_in_process_and_over_http_keeps_one_order() {
    const EACH: usize = 300;
    let key = key(SECRET);
    let embedded = Embedded::start(Config {
        queue: 5000,
        ..config(SECRET)
    });
    let mut subs: Vec<_> = (0..8)
        .map(|_| embedded.subscribe(&key, &["news"]))
        .collect();
    thread::scope(|scope| {
        for publisher in ["p", "q"] {
            let server = &embedded.server;
            scope.spawn(move || {
                for number in 0..EACH {
                    let data = format!("{publisher} {number}");
                    let batch = ["first", "second"].map(|name| event("news", name, &data));
                    assert_eq!(server.publish(&batch).unwrap().deliveries, 16);
                }
            });
        }
        for publisher in ["r", "s"] {
            let addr = embedded.addr;
            scope.spawn(move || {
                let mut connection = Connection::open(addr);
                for number in 0..EACH {
                    let data = format!("{publisher} {number}");
                    let batch = ["first", "second"].map(|name| ("news", name, &*data));
                    let body = mint(SECRET, &events_payload(&batch), now());
                    assert_eq!(Embedded::submit(&mut connection, &body), 16);
                }
            });
        }
    });
    embedded
        .server
        .publish(&[event("news", "end", "")])
        .unwrap();
    let read = |sub: &mut Subscriber| {
        let next = || Some(sub.message()).filter(|message| message.name != "end");
        std::iter::from_fn(next).collect::<Vec<_>>()
    };
    let order = read(&mut subs[0]);
    assert_eq!(order.len(), 4 * EACH * 2);
    for pair in order.chunks(2) {
        assert_eq!((&*pair[0].name, &*pair[1].name), ("first", "second"));
        assert_eq!(pair[0].data, pair[1].data);
    }
    for publisher in ["p", "q", "r", "s"] {
        let own = order
            .iter()
            .filter(|message| message.data.starts_with(publisher));
        let numbers: Vec<_> = own
            .map(|message| message.data[2..].parse::<usize>().unwrap())
            .collect();
        assert!(
            numbers.is_sorted() && numbers.len() == 2 * EACH,
            "{publisher}"
        );
    }
    for sub in &mut subs[1..] {
        assert!(read(sub) == order, "another order");
    }
}

/// A publisher inside the program must not be held up by a client that does not read.
#[test]
fn publishing_never_waits_for_a_subscriber() {
    let key = key(SECRET);
    // No timeout that a wait for the client could end with comes before the test's own.
    let embedded = Embedded::start(Config {
        write_timeout: 600,
        ..config(SECRET)
    });
    let stalled = embedded.subscribe(&key, &["news"]);
    let frame = [event("news", "", &"x".repeat(9000))];
    let server = embedded.server.clone();
    let publisher = in_background(move || while server.publish(&frame).unwrap().deliveries > 0 {});
    let cut = wait_until(DEADLINE, || publisher.is_finished());
    assert!(cut, "nobody was cut, or somebody waited for");
    publisher.join().unwrap();
    drop(stalled);
}

#[test]
fn the_crate_mints_what_other_libraries_open() {
    let key = key(&format!("{SECRET},{OTHER_SECRET}"));
    let open = |token: &str| branca::decode(token, &bytes_of_hex(SECRET), 60).unwrap();
    let token = key.mint_subscription(["news", "caf\u{e9}"]).unwrap();
    type Subscription = BTreeMap<String, Vec<String>>;
    let opened: Subscription = rmp_serde::from_slice(&open(&token)).unwrap();
    let topics = ["news", "caf\u{e9}"].map(String::from).to_vec();
    assert_eq!(opened, BTreeMap::from([("topics".into(), topics)]));
    let body = key.mint_submission("news", "update", "hi").unwrap();
    type Submission = BTreeMap<String, Vec<BTreeMap<String, String>>>;
    let opened: Submission = rmp_serde::from_slice(&open(&body)).unwrap();
    let event = [("topic", "news"), ("event", "update"), ("data", "hi")];
    let event = event
        .map(|(name, value)| (name.into(), value.into()))
        .into();
    assert_eq!(opened, BTreeMap::from([("events".into(), vec![event])]));
}

/// To encode base62 takes time by the square of the length: a megabyte would take minutes, only to be
/// refused by every server.
#[test]
fn what_no_server_takes_is_not_minted() {
    let key = key(SECRET);
    let longest = "x".repeat(48_600);
    let token = key.mint_submission("t", "", &longest).unwrap();
    assert!((65_000..=65_536).contains(&token.len()), "{}", token.len());
    let refused = key.mint_submission("t", "", &"x".repeat(1 << 20));
    assert_eq!(refused.unwrap_err().status, 413);
}
