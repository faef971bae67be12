//! A long run: subscribers come and go, publishers publish, and every stream is checked for order
//! and completeness, while the server's threads, descriptors and memory are watched.
//!
//! 30 seconds in the suite; `SSE_SOAK_SECONDS=600` for the long form, which `make soak` runs.

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use attack::*;
use support::*;

const TOPICS: usize = 24;
const PUBLISHERS: usize = 4;
/// Clients that stay for a moment, one stream after another.
const GUESTS: usize = 300;
/// Clients that stay to the end and hear every topic.
const RESIDENTS: usize = 3;

/// What the publishers of a topic have done so far: a number is begun, submitted, then acked.
#[derive(Default)]
struct Progress {
    begun: AtomicU64,
    acked: AtomicU64,
}

type Board = Arc<Vec<Progress>>;

fn topic(number: usize) -> String {
    format!("soak/{number}")
}

/// Publishes to the topics that are its own, numbers in sequence, one to four in a submission.
fn publisher(own: usize, addr: SocketAddr, board: &Board, stop: &AtomicBool) -> (u64, Duration) {
    let mut dice = Dice::seeded(1000 + own as u64);
    let mut connection = Connection::open(addr);
    let topics: Vec<_> = (0..TOPICS).filter(|it| it % PUBLISHERS == own).collect();
    let (mut events, mut worst) = (0, Duration::ZERO);
    while !stop.load(SeqCst) {
        let mut batch = Vec::new();
        for _ in 0..=dice.below(4) {
            let number = topics[dice.below(topics.len())];
            let count = board[number].begun.fetch_add(1, SeqCst) + 1;
            let filling = "x".repeat(dice.below(200));
            batch.push((number, topic(number), format!("{number} {count} {filling}")));
        }
        let fields = batch.iter().map(|(_, topic, data)| (&**topic, "", &**data));
        let payload = events_payload(&fields.collect::<Vec<_>>());
        let body = mint(SECRET, &payload, now());
        let length = format!("Content-Length: {}\r\n", body.len());
        let sent = Instant::now();
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        let answer = Submitted::from(connection.answer());
        worst = worst.max(sent.elapsed());
        answer.ok();
        events += batch.len() as u64;
        for (number, ..) in batch {
            board[number].acked.fetch_add(1, SeqCst);
        }
        thread::sleep(Duration::from_millis(5 + dice.below(15) as u64));
    }
    (events, worst)
}

/// Takes the chunks of an answer apart, byte by byte: a read may end anywhere.
#[derive(Default)]
struct Chunks {
    /// The line of a chunk's size, as far as it has come.
    line: Vec<u8>,
    /// Bytes of this chunk that are still to come, with the line end behind them.
    left: usize,
}

impl Chunks {
    /// Takes a byte; gives it back where it is a part of what was sent in chunks.
    #[track_caller]
    fn take(&mut self, byte: u8) -> Option<u8> {
        if self.left > 0 {
            self.left -= 1;
            match self.left {
                0 => assert_eq!(byte, b'\n', "the end of a chunk"),
                1 => assert_eq!(byte, b'\r', "the end of a chunk"),
                _ => return Some(byte),
            }
            return None;
        }
        self.line.push(byte);
        if let Some(digits) = self.line.strip_suffix(b"\r\n") {
            let digits = std::str::from_utf8(digits).expect("a chunk's size");
            let size = usize::from_str_radix(digits, 16).expect("a chunk's size");
            assert!(size > 0, "the last chunk of a good stream");
            self.left = size + 2;
            self.line.clear();
        }
        None
    }
}

/// One stream's reader, which checks every event as it comes.
struct Reader {
    stream: TcpStream,
    /// Nothing to a client of HTTP/1.0.
    chunks: Option<Chunks>,
    parser: Parser,
    /// By topic: the last number seen, or the last that had been begun when the head had come.
    last: BTreeMap<usize, u64>,
    first_seen: BTreeMap<usize, bool>,
    events: u64,
    /// Of all events in their order, for the comparison with another reader.
    digest: u64,
}

impl Reader {
    fn open(addr: SocketAddr, topics: &[usize], board: &Board, old: bool) -> Self {
        let names: Vec<_> = topics.iter().map(|it| topic(*it)).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let token = mint(SECRET, &topics_payload(&names), now());
        let mut stream = connect(addr);
        let version = if old { "HTTP/1.0" } else { "HTTP/1.1" };
        let request = format!("GET /events?token={token} {version}\r\nHost: test\r\n\r\n");
        assert!(send(&mut stream, request.as_bytes()));
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a head in time");
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 200"), "not a stream");
        // Whatever is begun from now on must come.
        let begun = |it: &usize| (*it, board[*it].begun.load(SeqCst));
        let mut reader = Self {
            stream,
            chunks: (!old).then(Chunks::default),
            parser: Parser::default(),
            last: topics.iter().map(begun).collect(),
            first_seen: topics.iter().map(|it| (*it, false)).collect(),
            events: 0,
            digest: 0,
        };
        reader.patience(Duration::from_millis(200));
        reader
    }

    fn patience(&mut self, time: Duration) {
        self.stream.set_read_timeout(Some(time)).unwrap();
    }

    /// Reads what is there, or comes soon; whether the stream goes on.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(size) => {
                for byte in &buffer[..size] {
                    let byte = match &mut self.chunks {
                        Some(chunks) => chunks.take(*byte),
                        None => Some(*byte),
                    };
                    let item = byte.and_then(|byte| self.parser.take(byte));
                    if let Some(Item::Message(message)) = item {
                        self.check(&message.data);
                    }
                }
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        true
    }

    fn check(&mut self, data: &str) {
        let mut words = data.splitn(3, ' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (topic, count) = (number().unwrap() as usize, number().unwrap());
        let last = self.last.get_mut(&topic).expect("a topic of this stream");
        let seen = self.first_seen.get_mut(&topic).unwrap();
        // The first may have been begun before the head came; from then on each follows.
        let fits = count == *last + 1 || (!*seen && count <= *last);
        assert!(fits, "topic {topic}: {count} after {last}");
        (*last, *seen) = (count, true);
        self.events += 1;
        let word = (topic as u64) << 48 ^ count;
        self.digest = (self.digest ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// Reads on until all is there that had been acked by now.
    fn catch_up(&mut self, board: &Board) {
        let acked = |it: &usize| (*it, board[*it].acked.load(SeqCst));
        let goal: BTreeMap<_, _> = self.last.keys().map(acked).collect();
        let end = Instant::now() + DEADLINE;
        while goal.iter().any(|(topic, count)| self.last[topic] < *count) {
            assert!(self.read(), "the server ended a good stream");
            let missing = || format!("{goal:?} but {:?}", self.last);
            assert!(Instant::now() < end, "events are missing: {}", missing());
        }
    }
}

/// Streams of a few topics for a random time each, left in various ways.
fn guest(seed: u64, addr: SocketAddr, board: &Board, stop: &AtomicBool) -> (u64, u64) {
    let mut dice = Dice::seeded(seed);
    let (mut streams, mut events) = (0, 0);
    while !stop.load(SeqCst) {
        let from = dice.below(TOPICS);
        let topics: Vec<_> = (from..TOPICS.min(from + 1 + dice.below(4))).collect();
        let mut reader = Reader::open(addr, &topics, board, dice.below(4) == 0);
        let stay = Duration::from_millis(dice.below(8000) as u64);
        let opened = Instant::now();
        while opened.elapsed() < stay && !stop.load(SeqCst) {
            assert!(reader.read(), "the server ended a good stream");
        }
        reader.catch_up(board);
        streams += 1;
        events += reader.events;
        match dice.below(3) {
            0 => reset(reader.stream),
            1 => drop(reader.stream.write_all(b"goodbye")),
            _ => {}
        }
    }
    (streams, events)
}

/// A client that stops reading now and then and is cut: it may lose its stream, nobody else may.
fn sluggard(addr: SocketAddr, stop: &AtomicBool) -> u64 {
    let names: Vec<_> = (0..TOPICS).map(topic).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let mut streams = 0;
    while !stop.load(SeqCst) {
        let token = mint(SECRET, &topics_payload(&names), now());
        let mut stream = connect_narrow(addr);
        let target = format!("/events?token={token}");
        send(&mut stream, &request("GET", &target, "", b""));
        let opened = Instant::now();
        while opened.elapsed() < Duration::from_secs(4) && !stop.load(SeqCst) {
            thread::sleep(Duration::from_millis(50));
        }
        streams += 1;
    }
    streams
}

#[test]
fn streams_stay_whole_and_nothing_grows_in_a_long_run() {
    need_descriptors(4096);
    let seconds = std::env::var("SSE_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(30, |it| it.parse().expect("SSE_SOAK_SECONDS: a number"));
    let settings = [
        ("SSE_HEARTBEAT", "2"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let empty = Vitals::of(&server);
    let board: Board = Arc::new((0..TOPICS).map(|_| Progress::default()).collect());
    let [no_guests, no_publishers] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let addr = server.addr;

    let all: Vec<_> = (0..TOPICS).collect();
    let readers: Vec<_> = (0..RESIDENTS)
        .map(|number| Reader::open(addr, &all, &board, number == 0))
        .collect();
    let gone = Arc::new(AtomicUsize::new(0));
    let residents: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            let (board, ended, gone) = (board.clone(), no_publishers.clone(), gone.clone());
            in_background(move || {
                while !ended.load(SeqCst) {
                    assert!(reader.read(), "the server ended a good stream");
                }
                reader.catch_up(&board);
                gone.fetch_add(1, SeqCst);
                (reader.events, reader.digest)
            })
        })
        .collect();
    let begun = Instant::now();
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|own| {
            let (board, stop) = (board.clone(), no_publishers.clone());
            in_background(move || publisher(own, addr, &board, &stop))
        })
        .collect();
    let seed = Dice::new(12).next();
    let guests: Vec<_> = (0..GUESTS as u64)
        .map(|number| {
            let (board, stop) = (board.clone(), no_guests.clone());
            in_background(move || guest(seed ^ number, addr, &board, &stop))
        })
        .collect();
    let sluggards: Vec<_> = (0..5)
        .map(|_| {
            let stop = no_guests.clone();
            in_background(move || sluggard(addr, &stop))
        })
        .collect();

    let mut samples = Vec::new();
    let failed = || {
        let ended = |it: &thread::JoinHandle<_>| it.is_finished();
        guests.iter().any(ended) || residents.iter().any(thread::JoinHandle::is_finished)
    };
    while begun.elapsed() < Duration::from_secs(seconds) && !failed() {
        thread::sleep(Duration::from_millis(250));
        samples.push(Vitals::of(&server));
    }
    no_guests.store(true, SeqCst);
    let (mut streams, mut events) = (0, 0);
    for guest in guests {
        let (opened, read) = guest.join().expect("a guest has no complaint");
        streams += opened;
        events += read;
    }
    let slow: u64 = sluggards.into_iter().map(|it| it.join().unwrap()).sum();
    no_publishers.store(true, SeqCst);
    let mut published = 0;
    let mut worst = Duration::ZERO;
    for publisher in publishers {
        let (events, slowest) = publisher.join().expect("every submission answered 200");
        published += events;
        worst = worst.max(slowest);
    }
    let heard = residents.into_iter().map(|it| it.join().unwrap());
    let heard: Vec<_> = heard.collect();
    println!(
        "  {published} events published, slowest submission {worst:.1?}; {streams} streams read \
         {events} events; {slow} streams that nobody read"
    );
    for (count, digest) in &heard {
        assert_eq!(*count, published, "a resident hears everything");
        assert_eq!(*digest, heard[0].1, "and all hear it in one order");
    }
    let [early, late] = [1, 3].map(|quarter| {
        let from = samples.len() * quarter / 4;
        let to = samples.len() * (quarter + 1) / 4;
        let most = |of: fn(&Vitals) -> u64| samples[from..to].iter().map(of).max().unwrap();
        let descriptors = most(|it| it.descriptors as u64);
        [most(|it| it.threads), descriptors, most(|it| it.resident)]
    });
    println!("  threads, descriptors, KiB: {early:?} in the second quarter, {late:?} in the last");
    assert!(late[0] <= early[0] + 50, "threads grow");
    assert!(late[1] <= early[1] + 100, "descriptors grow");
    assert!(late[2] <= early[2] * 5 / 4 + 2048, "memory grows");
    let calm = Vitals {
        // What hundreds of streams once needed, an allocator keeps.
        resident: late[2],
        ..empty
    };
    // And a few pages more may be touched after the last look.
    calm.expect_back(&server, 1024);
    server.wait_for_metric("sse_subscribers", 1);
    witness.finish(&format!("12 soak ({seconds} s)"));
}
