//! Several instances as one server, over a real `redis-server` that each test starts.
//!
//! What every test asserts of every client: no hole, no duplicate and no other order within what
//! it was sent, unless its stream ended and the next began with `stream-reset`. The events say
//! which submission they belong to and how many it has, and the ids are numbers without gaps, so
//! that each stream can be judged by itself.
#![cfg(feature = "redis")]

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, path::PathBuf};

use attack::Dice;
use support::{
    DEADLINE, SECRET, TestServer, events_payload, kill, mint, now, run, topics_payload, wait_until,
};

const KEY: &str = "sse-server";

// ------------------------------------------------------------------------------------------ Redis

static NUMBER: AtomicUsize = AtomicUsize::new(0);

struct Redis {
    port: u16,
    folder: PathBuf,
    extra: Vec<String>,
    child: Child,
}

/// Whether the tests can run. Without Debian's package they say so; in CI they fail.
fn is_there() -> bool {
    let there = Command::new("redis-server")
        .arg("--version")
        .output()
        .is_ok();
    let ci = std::env::var("CI").is_ok_and(|it| it == "true");
    assert!(
        there || !ci,
        "in CI nothing is skipped: redis-server is missing"
    );
    if !there {
        eprintln!("SKIPPED: redis-server is missing (Debian: apt-get install redis-server)");
    }
    there
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Redis {
    fn start(extra: &[&str]) -> Self {
        let number = NUMBER.fetch_add(1, SeqCst);
        let name = format!("redis-{}-{number}", std::process::id());
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&folder).unwrap();
        let extra = extra.iter().map(ToString::to_string).collect();
        let port = free_port();
        let child = Self::spawn(port, &folder, &extra);
        let redis = Self {
            port,
            folder,
            extra,
            child,
        };
        redis.wait();
        redis
    }

    fn spawn(port: u16, folder: &PathBuf, extra: &Vec<String>) -> Child {
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
        ]);
        command
            .arg("--dir")
            .arg(folder)
            .args(extra)
            .stdout(Stdio::null());
        command.spawn().expect("redis-server starts")
    }

    fn wait(&self) {
        let up = wait_until(DEADLINE, || {
            let mut answer = [0; 5];
            let asked = TcpStream::connect(("127.0.0.1", self.port)).and_then(|mut it| {
                it.set_read_timeout(Some(Duration::from_secs(1)))?;
                it.write_all(b"PING\r\n")?;
                it.read_exact(&mut answer)
            });
            asked.is_ok() && matches!(&answer, b"+PONG" | b"-NOAU")
        });
        assert!(up, "redis-server does not come up");
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::spawn(self.port, &self.folder, &self.extra);
        self.wait();
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn connection(&self) -> redis::Connection {
        redis::Client::open(self.url())
            .unwrap()
            .get_connection()
            .unwrap()
    }

    fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::cmd(words[0]);
        command
            .arg(&words[1..])
            .query(&mut self.connection())
            .unwrap()
    }

    /// The number of the last entry.
    fn last(&self) -> (u64, u64) {
        type Entries = Vec<(String, Vec<String>)>;
        let last: Entries = self.ask(&["XREVRANGE", KEY, "+", "-", "COUNT", "1"]);
        let (epoch, seq) = last[0].0.split_once('-').unwrap();
        (epoch.parse().unwrap(), seq.parse().unwrap())
    }

    fn instance(&self) -> TestServer {
        instance(&self.url(), 0)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn instance(url: &str, port: u16) -> TestServer {
    TestServer::start(&[
        ("SSE_REDIS", url),
        ("SSE_LISTEN", &format!("127.0.0.1:{port}")),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
        ("SSE_HEARTBEAT", "1"),
    ])
}

/// Stands between instances and Redis, and does to the connections what a test wants.
#[derive(Clone)]
struct Proxy {
    port: u16,
    backend: Arc<AtomicU16>,
    /// Answers to submissions are lost, though they are carried out.
    swallows: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// `older`: lacks a constant that came with Redis 7.
    fn start(backend: u16, older: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            backend: Arc::new(backend.into()),
            swallows: Arc::default(),
            open: Arc::default(),
        };
        let serving = proxy.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let address = ("127.0.0.1", serving.backend.load(SeqCst));
                if let Ok(redis) = TcpStream::connect(address) {
                    serving.carry(client, redis, older);
                }
            }
        });
        proxy
    }

    fn carry(&self, client: TcpStream, redis: TcpStream, older: bool) {
        for socket in [&client, &redis] {
            socket.set_nodelay(true).unwrap();
            self.open.lock().unwrap().push(socket.try_clone().unwrap());
        }
        let (mut from, mut to) = (client.try_clone().unwrap(), redis.try_clone().unwrap());
        let (adds, swallows) = (Arc::new(AtomicBool::new(false)), self.swallows.clone());
        let seen = adds.clone();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(size @ 1..) = from.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..size]);
                seen.fetch_or(text.contains("MAXLEN"), SeqCst);
                // Redis 6 has no such constant, nor this one has one of another name.
                let text = match older {
                    true => text.replace("REDIS_VERSION", "REDIS_VERSIOX"),
                    false => text.into(),
                };
                if to.write_all(text.as_bytes()).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
        let (mut from, mut to) = (redis, client);
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(size @ 1..) = from.read(&mut buffer) {
                if adds.load(SeqCst) && swallows.load(SeqCst) {
                    continue;
                }
                let bytes = &buffer[..size];
                if to.write_all(bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }

    /// Everything from now on goes elsewhere.
    fn switch(&self, backend: u16) {
        self.backend.store(backend, SeqCst);
        for socket in self.open.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

// ---------------------------------------------------------------------------------------- clients

/// `EPOCH-SEQ-SEAL-INDEX`, as numbers and what tells two entries of one number apart.
type Id = (u64, u64, String, usize);

#[derive(Clone, Debug)]
struct Heard {
    id: Id,
    data: String,
}

/// What came without a `stream-reset` between.
type Segment = Vec<Heard>;

#[derive(Default)]
struct History {
    segments: Vec<Segment>,
    /// Streams that it opened.
    streams: usize,
    last_id: String,
}

fn parse(id: &str) -> Id {
    let parts: Vec<_> = id.split('-').collect();
    let number = |at: usize| parts[at].parse().expect("a number in the id");
    (number(0), number(1), parts[2].into(), number(3) as usize)
}

/// One stream, line by line. HTTP/1.0, so that no chunks stand between.
struct Stream {
    reader: BufReader<TcpStream>,
}

impl Stream {
    fn open(address: SocketAddr, topic: &str, last_id: &str) -> Option<Self> {
        let token = mint(SECRET, &topics_payload(&[topic]), now());
        let mut socket = TcpStream::connect(address).ok()?;
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .ok()?;
        let field = match last_id {
            "" => String::new(),
            id => format!("Last-Event-ID: {id}\r\n"),
        };
        let head = format!("GET /events?token={token} HTTP/1.0\r\n{field}\r\n");
        socket.write_all(head.as_bytes()).ok()?;
        let mut stream = Self {
            reader: BufReader::new(socket),
        };
        let status = stream.line()?;
        assert!(status.contains(" 200 "), "{status}");
        while !stream.line()?.is_empty() {}
        Some(stream)
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).ok()?;
        Some(line.strip_suffix('\n')?.trim_end_matches('\r').into())
    }

    /// The next block that a browser would take: its id, type and data.
    fn block(&mut self) -> Option<(String, String, Option<String>)> {
        let (mut id, mut name, mut data) = (String::new(), String::new(), None);
        loop {
            let line = self.line()?;
            if let Some(value) = line.strip_prefix("id: ") {
                id = value.into();
            } else if let Some(value) = line.strip_prefix("event: ") {
                name = value.into();
            } else if let Some(value) = line.strip_prefix("data: ") {
                data = Some(value.to_string());
            } else if line.is_empty() {
                return Some((id, name, data));
            }
        }
    }
}

type Addresses = Arc<Mutex<Vec<SocketAddr>>>;

/// A client as a browser is one: comes back with the last id, to the next instance, until it has
/// heard `END`.
fn client(addresses: &Addresses, mut turn: usize) -> JoinHandle<History> {
    let addresses = addresses.clone();
    let (ready, wait) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        let mut history = History::default();
        history.segments.push(Vec::new());
        let end = Instant::now() + 4 * DEADLINE;
        while Instant::now() < end {
            let address = {
                let all = addresses.lock().unwrap();
                all[turn % all.len()]
            };
            turn += 1;
            if let Some(stream) = Stream::open(address, "t", &history.last_id) {
                history.streams += 1;
                let _ = ready.send(());
                if listen(stream, &mut history) {
                    return history;
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!(
            "a client never heard the end: {:?}",
            history.segments.last()
        );
    });
    wait.recv_timeout(DEADLINE)
        .expect("the client gets a stream");
    thread
}

/// Whether the end came.
fn listen(stream: Stream, history: &mut History) -> bool {
    listen_for(usize::MAX, stream, history)
}

/// The same, to so many blocks.
fn listen_for(blocks: usize, mut stream: Stream, history: &mut History) -> bool {
    for _ in 0..blocks {
        let Some((id, name, data)) = stream.block() else {
            return false;
        };
        if name == "stream-reset" {
            history.segments.push(Vec::new());
        }
        if let Some(data) = data.filter(|_| name != "stream-reset") {
            let ended = data.starts_with("END.");
            let heard = Heard {
                id: parse(&id),
                data,
            };
            history.segments.last_mut().unwrap().push(heard);
            if ended {
                return true;
            }
        }
        if !id.is_empty() {
            history.last_id = id;
        }
    }
    false
}

/// The one judgement of what a client was sent: see the top of this file.
#[track_caller]
fn judge(histories: &[History]) -> BTreeMap<Id, String> {
    let mut all: BTreeMap<Id, String> = BTreeMap::new();
    for (number, history) in histories.iter().enumerate() {
        let mut seen = BTreeSet::new();
        for segment in &history.segments {
            for heard in segment {
                let known = all.entry(heard.id.clone()).or_insert(heard.data.clone());
                assert_eq!(known, &heard.data, "one id, two events");
                assert!(
                    seen.insert(&heard.data),
                    "client {number} heard twice: {heard:?}"
                );
            }
            for pair in segment.windows(2) {
                let [before, after] = pair else {
                    unreachable!()
                };
                let (index, size) = before
                    .data
                    .rsplit_once('.')
                    .unwrap()
                    .1
                    .split_once('/')
                    .unwrap();
                let is_last = index.parse::<usize>().unwrap() + 1 == size.parse().unwrap();
                let (was, is) = (&before.id, &after.id);
                let right = if is_last {
                    (is.0, is.1, is.3) == (was.0, was.1 + 1, 0)
                } else {
                    (is.0, is.1, &is.2, is.3) == (was.0, was.1, &was.2, was.3 + 1)
                };
                assert!(right, "client {number}: {before:?}, then {after:?}");
            }
        }
    }
    // No submission came twice, under whatever number.
    let events: BTreeSet<_> = all.values().collect();
    assert_eq!(
        events.len(),
        all.len(),
        "a submission came under two numbers"
    );
    all
}

// ------------------------------------------------------------------------------------- publishers

struct Posted {
    status: Option<u16>,
    took: Duration,
    retry_after: bool,
    body: String,
}

fn post(address: SocketAddr, token: &str) -> Posted {
    let begin = Instant::now();
    let mut text = String::new();
    let _ = TcpStream::connect(address).and_then(|mut socket| {
        socket.set_read_timeout(Some(DEADLINE))?;
        let length = token.len();
        let head = format!("POST /submit HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{token}");
        socket.write_all(head.as_bytes())?;
        socket.read_to_string(&mut text)
    });
    Posted {
        status: text.split(' ').nth(1).and_then(|it| it.parse().ok()),
        took: begin.elapsed(),
        retry_after: text.contains("Retry-After: "),
        body: text.split("\r\n\r\n").nth(1).unwrap_or_default().into(),
    }
}

fn submission(name: &str, size: usize) -> String {
    let data: Vec<_> = (0..size)
        .map(|index| format!("{name}.{index}/{size}"))
        .collect();
    let events: Vec<_> = data.iter().map(|data| ("t", "", &**data)).collect();
    mint(SECRET, &events_payload(&events), now())
}

struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<(String, usize, Posted)>>>,
    sent: Arc<AtomicUsize>,
}

impl Load {
    /// So many publishers, each to one instance after the other, until stopped.
    fn start(addresses: &Addresses, publishers: usize, pause: u64) -> Self {
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let threads = (0..publishers).map(|publisher| {
            let (addresses, stop, sent) = (addresses.clone(), stop.clone(), sent.clone());
            thread::spawn(move || {
                let mut log = Vec::new();
                for number in 0.. {
                    if stop.load(SeqCst) {
                        break;
                    }
                    let (name, size) = (format!("{publisher}.{number}"), 1 + number % 3);
                    let address = {
                        let all = addresses.lock().unwrap();
                        all[(publisher + number) % all.len()]
                    };
                    let posted = post(address, &submission(&name, size));
                    log.push((name, size, posted));
                    sent.fetch_add(1, SeqCst);
                    thread::sleep(Duration::from_millis(pause));
                }
                log
            })
        });
        let threads = threads.collect();
        Self {
            stop,
            threads,
            sent,
        }
    }

    #[track_caller]
    fn wait_for(&self, more: usize) {
        let want = self.sent.load(SeqCst) + more;
        assert!(wait_until(2 * DEADLINE, || self.sent.load(SeqCst) >= want));
    }

    fn stop(self) -> Vec<(String, usize, Posted)> {
        self.stop.store(true, SeqCst);
        let logs = self.threads.into_iter().map(|it| it.join().unwrap());
        logs.flatten().collect()
    }
}

/// Submits last events until every client has heard one: a client that was away and was told to
/// begin anew hears only what comes then.
#[track_caller]
fn finish(addresses: &Addresses, clients: Vec<JoinHandle<History>>) -> Vec<History> {
    let address = addresses.lock().unwrap()[0];
    let mut number = 0;
    let finished = wait_until(5 * DEADLINE, || {
        post(address, &submission(&format!("END.{number}"), 1));
        number += 1;
        let soon = Duration::from_millis(500);
        wait_until(soon, || clients.iter().all(JoinHandle::is_finished))
    });
    assert!(finished, "a client hears nothing");
    clients.into_iter().map(|it| it.join().unwrap()).collect()
}

/// What was accepted has come, all of it.
#[track_caller]
fn nothing_is_lost(all: &BTreeMap<Id, String>, log: &[(String, usize, Posted)]) {
    let events: BTreeSet<_> = all.values().map(String::as_str).collect();
    let mut accepted = 0;
    for (name, size, posted) in log {
        if posted.status == Some(200) {
            accepted += 1;
            for index in 0..*size {
                let event = format!("{name}.{index}/{size}");
                assert!(
                    events.contains(&*event),
                    "{event} was accepted, and never came"
                );
            }
        }
    }
    assert!(accepted > 0, "nothing was accepted");
}

#[track_caller]
fn refusals_are_quick(log: &[(String, usize, Posted)]) -> usize {
    let refused = log.iter().filter(|(.., it)| it.status == Some(503));
    let count = refused.clone().count();
    for (name, _, posted) in refused {
        let (took, body) = (posted.took, &posted.body);
        assert!(
            took < Duration::from_millis(2_500),
            "{name}: {took:?} {body}"
        );
        assert!(posted.retry_after, "{name} {body}");
    }
    count
}

struct Group {
    instances: Vec<TestServer>,
    addresses: Addresses,
}

impl Group {
    fn start(url: &str) -> Self {
        let instances: Vec<_> = (0..3).map(|_| instance(url, 0)).collect();
        let addresses = instances.iter().map(|it| it.addr).collect();
        Self {
            instances,
            addresses: Arc::new(Mutex::new(addresses)),
        }
    }

    /// Two on each.
    fn clients(&self) -> Vec<JoinHandle<History>> {
        (0..6).map(|turn| client(&self.addresses, turn)).collect()
    }

    fn gaps(&self) -> u64 {
        let sample = r#"sse_streams_ended_total{reason="gap"}"#;
        self.instances.iter().map(|it| it.metric(sample)).sum()
    }
}

#[track_caller]
fn no_stream_ended(histories: &[History]) {
    for history in histories {
        assert_eq!((history.streams, history.segments.len()), (1, 1));
    }
}

#[track_caller]
fn nobody_was_reset(histories: &[History]) {
    assert!(histories.iter().all(|it| it.segments.len() == 1));
}

// ------------------------------------------------------------------------------------------ cases

/// Case 1: An event that overtakes another on one instance only shows two clients two truths.
#[test]
fn three_instances_have_one_order_and_unbroken_batches() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 4, 0);
    load.wait_for(600);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    let all = judge(&histories);
    nothing_is_lost(&all, &log);
    no_stream_ended(&histories);
    assert!(log.iter().all(|(.., posted)| posted.status == Some(200)));
    for history in &histories {
        let heard = history.segments[0]
            .iter()
            .filter(|it| !it.data.starts_with("END."));
        assert_eq!(
            heard.count(),
            log.iter().map(|(_, size, _)| size).sum::<usize>()
        );
    }
    let body = &log[0].2.body;
    assert_eq!(body, "{\"events\": 1}\n", "deliveries are not known");
}

/// Case 2: A client of a dead instance misses nothing: another one has it all.
#[test]
fn an_instance_killed_and_all_restarted_in_turn_cost_no_client_an_event() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let mut group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(100);
    for (number, signal) in [(1, "KILL"), (0, "TERM"), (1, "TERM"), (2, "TERM")] {
        group.instances[number].signal(signal);
        group.instances[number].wait_for_end();
        load.wait_for(50);
        let port = group.instances[number].addr.port();
        group.instances[number] = instance(&redis.url(), port);
        load.wait_for(50);
    }
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    nothing_is_lost(&judge(&histories), &log);
    nobody_was_reset(&histories);
    assert!(histories.iter().all(|it| it.streams > 1));
}

/// Case 3: Redis is away for a while: publishers are told at once, listeners notice nothing. It writes
/// each submission before it answers: `everysec` lost one that was accepted in the moment of the
/// kill, seen in one of four runs.
#[test]
fn redis_killed_and_restarted_with_its_file_loses_nothing_and_ends_no_stream() {
    if !is_there() {
        return;
    }
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(100);
    redis.kill();
    load.wait_for(30);
    redis.restart();
    load.wait_for(100);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    nothing_is_lost(&judge(&histories), &log);
    no_stream_ended(&histories);
    assert!(refusals_are_quick(&log) > 0);
    assert_eq!(group.gaps(), 0);
}

/// Case 4: What Redis has forgotten nobody can be told: every stream ends, and says so.
#[track_caller]
fn a_loss_ends_streams(redis: &mut Redis, group: &Group, lose: impl FnOnce(&mut Redis)) {
    let clients = group.clients();
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(100);
    let (epoch, _) = redis.last();
    lose(redis);
    let begun = wait_until(DEADLINE, || {
        let count: u64 = redis.ask(&["XLEN", KEY]);
        count > 0 && redis.last().0 > epoch
    });
    assert!(begun, "no new epoch");
    assert!(
        wait_until(DEADLINE, || group.gaps() >= 6),
        "{}",
        group.gaps()
    );
    load.wait_for(100);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    judge(&histories);
    for history in &histories {
        assert!(history.streams > 1 && history.segments.len() > 1);
    }
    // And service goes on by itself.
    let last = log.iter().rev().take(10);
    assert!(last.map(|(.., it)| it.status).all(|it| it == Some(200)));
}

#[test]
fn redis_flushed_ends_streams_with_gap_and_a_new_epoch_begins() {
    if !is_there() {
        return;
    }
    let mut redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    a_loss_ends_streams(&mut redis, &group, |redis| redis.ask(&["FLUSHALL"]));
}

#[test]
fn redis_restarted_empty_ends_streams_with_gap_and_a_new_epoch_begins() {
    if !is_there() {
        return;
    }
    let mut redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    a_loss_ends_streams(&mut redis, &group, |redis| {
        redis.kill();
        redis.restart();
    });
}

/// Case 4: Its numbers go on, and have passed ours before we are back: only the bytes differ.
#[test]
fn a_promoted_replica_without_the_last_writes_ends_streams_with_gap() {
    if !is_there() {
        return;
    }
    let mut first = Redis::start(&[]);
    let port = first.port.to_string();
    let second = Redis::start(&["--replicaof", "127.0.0.1", &port]);
    let proxy = Proxy::start(first.port, false);
    let group = Group::start(&proxy.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(60);
    let in_sync = wait_until(DEADLINE, || {
        second
            .ask::<String>(&["INFO", "replication"])
            .contains("master_link_status:up")
    });
    assert!(in_sync);
    load.wait_for(60);
    let _: () = second.ask(&["REPLICAOF", "NO", "ONE"]);
    // The last writes, which it lacks.
    load.wait_for(60);
    let log = load.stop();
    let (epoch, seq) = first.last();
    assert!(second.last().1 < seq, "the replica lacks nothing");
    // Wait for all to have heard the last, so that their numbers are in use.
    let heard = |it: &TestServer| it.metric("sse_events_total");
    let level = || {
        let heard: BTreeSet<_> = group.instances.iter().map(heard).collect();
        heard.len() == 1
    };
    assert!(wait_until(DEADLINE, level));
    first.kill();
    let mut other = 0;
    while second.last().1 < seq + 20 {
        let (id, token) = (
            format!("{epoch}-*"),
            submission(&format!("other.{other}"), 1),
        );
        let _: String = second.ask(&["XADD", KEY, &id, "t", &token]);
        other += 1;
    }
    proxy.switch(second.port);
    assert!(
        wait_until(DEADLINE, || group.gaps() >= 6),
        "{}",
        group.gaps()
    );
    let histories = finish(&group.addresses, clients);
    for history in &histories {
        let mut seen: Vec<_> = history
            .segments
            .iter()
            .flatten()
            .map(|it| it.id.1)
            .collect();
        seen.dedup();
        assert!(
            history.streams > 1 && history.segments.len() > 1,
            "{seen:?}"
        );
        for segment in &history.segments {
            for pair in segment.windows(2) {
                assert!((pair[1].id.0, pair[1].id.1) >= (pair[0].id.0, pair[0].id.1));
                assert!(pair[1].id.1 <= pair[0].id.1 + 1, "a hole: {pair:?}");
            }
        }
    }
    assert!(!log.is_empty());
}

/// Case 4: A reader that slept for too long has missed what nobody keeps.
#[test]
fn trimming_past_a_stopped_instance_ends_its_streams_with_gap_and_no_others() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let all = group.addresses.clone();
    let load = Load::start(&all, 3, 1);
    load.wait_for(60);
    let stopped = &group.instances[1];
    // Publishers would wait for it.
    let others: Vec<_> = [0, 2].map(|it| group.instances[it].addr).into();
    *all.lock().unwrap() = others;
    thread::sleep(Duration::from_millis(100));
    stopped.signal("STOP");
    load.wait_for(300);
    let _: () = redis.ask(&["XTRIM", KEY, "MAXLEN", "10"]);
    stopped.signal("CONT");
    let sample = r#"sse_streams_ended_total{reason="gap"}"#;
    stopped.wait_for_metric(sample, 2);
    load.wait_for(60);
    load.stop();
    let histories = finish(&group.addresses, clients);
    judge(&histories);
    let resets = histories.iter().filter(|it| it.segments.len() > 1).count();
    assert_eq!((resets, group.gaps()), (2, 2));
}

/// Case 5: A Redis that says nothing at all, under load.
#[test]
fn redis_stopped_for_thirty_seconds_ends_no_stream_and_loses_nothing() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 6, 2);
    load.wait_for(100);
    kill(redis.child.id(), "STOP");
    thread::sleep(Duration::from_secs(30));
    kill(redis.child.id(), "CONT");
    load.wait_for(100);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    nothing_is_lost(&judge(&histories), &log);
    no_stream_ended(&histories);
    assert!(refusals_are_quick(&log) > 10);
}

/// Case 5: Connections break at any moment.
#[test]
fn connections_cut_a_hundred_times_end_no_stream_and_lose_nothing() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 4, 1);
    for round in 0..100u64 {
        thread::sleep(Duration::from_millis(round * 7919 % 61));
        let _: u64 = redis.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
    }
    load.wait_for(100);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    nothing_is_lost(&judge(&histories), &log);
    no_stream_ended(&histories);
    let cut = refusals_are_quick(&log);
    println!("  {cut} of {} submissions were answered 503", log.len());
}

/// Case 5: Nobody can know what became of it: it says so, and it comes once, or not at all.
#[test]
fn a_submission_whose_answer_was_lost_is_answered_503_and_comes_once() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port, false);
    let group = Group::start(&proxy.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(50);
    proxy.swallows.store(true, SeqCst);
    load.wait_for(9);
    proxy.swallows.store(false, SeqCst);
    load.wait_for(50);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    let all = judge(&histories);
    nothing_is_lost(&all, &log);
    no_stream_ended(&histories);
    assert!(refusals_are_quick(&log) > 5);
    let refused = log.iter().filter(|(.., it)| it.status == Some(503));
    for (name, size, posted) in refused {
        assert!(posted.body.contains("may still arrive"), "{}", posted.body);
        let event = format!("{name}.0/{size}");
        assert!(
            all.values().any(|it| *it == event),
            "this proxy loses answers only"
        );
    }
}

/// Case 6: What is wrong is said at start, with the status that says who has to do something.
#[test]
fn a_redis_that_cannot_be_used_ends_the_start_and_says_why() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&["--requirepass", "right"]);
    let open = Redis::start(&[]);
    let _: () = open.ask(&["SELECT", "0"]);
    let _: () = open.ask(&["SET", KEY, "a string"]);
    let full = Redis::start(&["--maxmemory", "1", "--maxmemory-policy", "noeviction"]);
    let older = Proxy::start(Redis::start(&[]).port, true);
    let six = Redis::start(&[]);
    older.switch(six.port);
    let host = format!("127.0.0.1:{}", redis.port);
    for (url, status, text) in [
        (format!("redis://:wrong@{host}"), 2, "Password"),
        (format!("redis://{host}"), 2, "NOAUTH"),
        ("http://127.0.0.1".into(), 2, "URL"),
        (open.url(), 2, "WRONGTYPE"),
        (older.url(), 2, "Redis 7 or Valkey"),
        (full.url(), 2, "OOM"),
        (format!("redis://127.0.0.1:{}", free_port()), 1, "refused"),
    ] {
        eprintln!("{url} {text}");
        let output = run(&[("SSE_REDIS", &url), ("SSE_LISTEN", "127.0.0.1:0")], &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        println!("  {url} {said}");
        assert_eq!(output.status.code(), Some(status), "{url}: {said}");
        assert!(
            said.contains("SSE_REDIS") && said.contains(text),
            "{url}: {said}"
        );
        assert!(
            !said.contains("wrong@") && !said.contains(":wrong"),
            "{said}"
        );
    }
    let url = format!("redis://:right@{host}/3");
    let server = instance(&url, 0);
    assert!(!server.log().contains("right@"));
}

/// Case 6: Memory that runs out later refuses submissions, and ends nothing.
#[test]
fn a_full_redis_refuses_submissions_and_ends_no_stream() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]);
    let group = Group::start(&redis.url());
    let clients = group.clients();
    let load = Load::start(&group.addresses, 2, 2);
    load.wait_for(30);
    let _: () = redis.ask(&["CONFIG", "SET", "maxmemory", "1"]);
    load.wait_for(30);
    let refused = post(group.instances[0].addr, &submission("full.0", 1));
    assert_eq!(refused.status, Some(503));
    assert!(refused.body.contains("OOM"), "{}", refused.body);
    let _: () = redis.ask(&["CONFIG", "SET", "maxmemory", "0"]);
    load.wait_for(30);
    let log = load.stop();
    let histories = finish(&group.addresses, clients);
    nothing_is_lost(&judge(&histories), &log);
    no_stream_ended(&histories);
}

/// Case 7: Whoever can write to Redis has no key.
#[test]
fn forged_entries_are_ignored_counted_and_logged() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let server = redis.instance();
    let mut stream = Stream::open(server.addr, "t", "").unwrap();
    let (id, _, _) = stream.block().unwrap();
    let (epoch, ..) = parse(&id);
    let other = "11".repeat(32);
    let foreign = mint(&other, &events_payload(&[("t", "", "forged")]), now());
    let topics = mint(SECRET, &topics_payload(&["t"]), now());
    let long = "7".repeat(300_000);
    let next = format!("{epoch}-*");
    for value in ["", "garbage", &foreign, &topics, &long] {
        let _: String = redis.ask(&["XADD", KEY, &next, "t", value]);
    }
    let _: String = redis.ask(&["XADD", KEY, &next, "a", "1", "b", "2", "c", "3"]);
    let mut command = redis::cmd("XADD");
    command.arg(KEY).arg(&next).arg("t").arg(&b"\xff\xfe"[..]);
    command.exec(&mut redis.connection()).unwrap();
    server.wait_for_metric("sse_forged_entries_total", 7);
    assert_eq!(
        post(server.addr, &submission("good.0", 1)).status,
        Some(200)
    );
    let (id, _, data) = stream.block().unwrap();
    assert_eq!((parse(&id).1, data.as_deref()), (8, Some("good.0.0/1")));
    server.wait_for_log("entry ignored: ");
    assert!(!server.log().contains("garbage"));
    // Resumption passes over them too.
    let mut again = Stream::open(
        server.addr,
        "t",
        &format!("{epoch}-0-{}", &seal(&redis, epoch)),
    );
    let (_, _, data) = again.as_mut().unwrap().block().unwrap();
    assert_eq!(data.as_deref(), Some("good.0.0/1"));
}

/// An entry's end stands in the ids of frames, whoever wrote it: here it would be an event, or a
/// line of another kind. Instances that begin behind it take it as it is as well.
#[test]
fn an_entry_that_ends_with_lines_of_a_stream_forges_none() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let server = redis.instance();
    let (epoch, _) = redis.last();
    for (count, lines) in [(1, "\ndata:hi\n\n"), (2, "\nretry:1\n"), (3, "a-b-c-d-e")] {
        let value: String = lines.chars().rev().collect();
        let next = format!("{epoch}-*");
        let _: String = redis.ask(&["XADD", KEY, &next, "t", &value]);
        server.wait_for_metric("sse_forged_entries_total", count);
        let other = redis.instance();
        let streams = [&server, &other].map(|it| Stream::open(it.addr, "t", "").unwrap());
        // And both go on from there.
        let (status, good) = (Some(200), format!("good{count}.0"));
        assert_eq!(post(other.addr, &submission(&good, 1)).status, status);
        for mut stream in streams {
            let (id, name, data) = stream.block().unwrap();
            assert_eq!(
                (parse(&id).1, name.as_str(), data),
                (2 * count - 1, "", None)
            );
            let (_, _, data) = stream.block().unwrap();
            assert_eq!(data, Some(format!("{good}.0/1")));
        }
    }
}

/// A Redis that lies, or whoever stands between: it answers whatever it is asked for entries with one
/// whose number holds lines of a stream.
fn lying_redis() -> SocketAddr {
    fn bulk(text: &str) -> String {
        format!("${}\r\n{text}\r\n", text.len())
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let number = bulk("1-1-\n\nevent: update\ndata: forged\n\n");
    let fields = format!("*2\r\n{}{}", bulk("t"), bulk("abcdefabcdef"));
    let entry = format!("*1\r\n*2\r\n{number}{fields}");
    let answer = move |client: TcpStream| {
        let mut reader = BufReader::new(&client);
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|size| size > 0) {
            let count: usize = line.trim()[1..].parse().unwrap();
            let mut words = Vec::new();
            for _ in 0..count {
                line.clear();
                reader.read_line(&mut line).unwrap();
                let size: usize = line.trim()[1..].parse().unwrap();
                let mut word = vec![0; size + 2];
                reader.read_exact(&mut word).unwrap();
                words.push(word);
            }
            line.clear();
            let answer = match &words[0][..] {
                b"EVAL\r\n" | b"XRANGE\r\n" => &entry,
                b"XREAD\r\n" => "*-1\r\n",
                _ => "+OK\r\n",
            };
            if (&client).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    };
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let answer = answer.clone();
            thread::spawn(move || answer(client));
        }
    });
    address
}

/// Redis has no key: not even Redis itself can make an event.
#[test]
fn a_redis_that_lies_forges_no_event() {
    let server = instance(&format!("redis://{}", lying_redis()), 0);
    let mut stream = Stream::open(server.addr, "t", "").unwrap();
    let (id, name, data) = stream.block().unwrap();
    assert!(id.starts_with("1-1-"), "{id}");
    assert_eq!((name.as_str(), data), ("", None));
    // What follows is a heartbeat.
    assert_eq!(stream.line().as_deref(), Some(":"));
}

/// After an outage in which thousands of submissions passed, clients come back with old ids, all at
/// once. They get what they missed, or are told to begin anew; they are not turned away, since as long
/// as they come back with the same id they would be again and again.
#[test]
fn clients_from_far_behind_are_all_answered() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let server = redis.instance();
    let mut first = Stream::open(server.addr, "t", "").unwrap();
    let (old, ..) = first.block().unwrap();
    let (epoch, ..) = parse(&old);
    let token = mint(SECRET, &events_payload(&[("t", "", "missed")]), now());
    let mut all = redis::pipe();
    for _ in 0..9000 {
        let add = all.cmd("XADD").arg(KEY).arg(format!("{epoch}-*"));
        add.arg("t").arg(&token).ignore();
    }
    all.exec(&mut redis.connection()).unwrap();
    server.wait_for_metric("sse_events_total", 9000);
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let (address, old) = (server.addr, old.clone());
            thread::spawn(move || Stream::open(address, "t", &old).map(|mut it| it.block()))
        })
        .collect();
    for client in clients {
        let answered = client.join().unwrap();
        let (_, name, data) = answered.flatten().expect("turned away");
        assert!(name == "stream-reset" || data.as_deref() == Some("missed"));
    }
    assert_eq!(server.metric("sse_streams_turned_away_total"), 0);
}

/// The seal of the entry that an epoch begins with, as an id holds it, with the last index.
fn seal(redis: &Redis, epoch: u64) -> String {
    let id = format!("{epoch}-0");
    let found: Vec<(String, Vec<String>)> = redis.ask(&["XRANGE", KEY, &id, &id]);
    let token = &found[0].1[1];
    token.chars().rev().take(12).collect::<String>() + "-99999"
}

/// The blocks of a stream until this event.
fn until(stream: &mut Stream, last: &str) -> Vec<(String, String, Option<String>)> {
    let mut blocks = Vec::new();
    while blocks
        .last()
        .is_none_or(|(.., data): &(_, _, Option<String>)| data.as_deref() != Some(last))
    {
        blocks.push(stream.block().expect("the stream goes on"));
    }
    blocks
}

/// Case 8: At every position, on every instance, while others publish.
#[test]
fn a_client_that_comes_back_gets_what_it_missed_and_goes_on_live() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let first = client(&group.addresses, 0);
    let load = Load::start(&group.addresses, 3, 2);
    load.wait_for(50);
    // Come back at whatever position this one has seen, again and again.
    let mut seen = Stream::open(group.instances[0].addr, "t", "").unwrap();
    let (place, ..) = seen.block().unwrap();
    let mut ids = vec![place];
    while ids.len() < 40 {
        ids.extend(seen.block().map(|(id, ..)| id));
    }
    let returning = ids.iter().enumerate().map(|(number, id)| {
        let (id, address) = (id.clone(), group.instances[number % 3].addr);
        thread::spawn(move || {
            let mut history = History {
                last_id: id.clone(),
                streams: 1,
                ..History::default()
            };
            history.segments.push(Vec::new());
            let stream = Stream::open(address, "t", &id).expect("a stream");
            assert!(listen(stream, &mut history), "the stream ended");
            history
        })
    });
    let returning: Vec<_> = returning.collect();
    load.wait_for(100);
    let log = load.stop();
    let returning = [first].into_iter().chain(returning).collect();
    let histories = finish(&group.addresses, returning);
    let all = judge(&histories);
    nothing_is_lost(&all, &log);
    no_stream_ended(&histories);
    let order: Vec<_> = all.keys().cloned().collect();
    for (id, history) in ids.iter().zip(&histories[1..]) {
        let (epoch, seq, seal, index) = parse(id);
        let heard = (epoch, seq, seal.clone(), index);
        let missed = order
            .iter()
            .filter(|it| (it.0, it.1, it.3) > (heard.0, heard.1, heard.3));
        let missed: Vec<_> = missed.cloned().collect();
        let came: Vec<_> = history.segments[0].iter().map(|it| it.id.clone()).collect();
        assert_eq!(came, missed[..came.len()], "behind {id}");
    }
}

/// Case 8: What cannot be told is said: first a reset, then live.
#[test]
fn an_id_that_is_no_longer_held_begins_with_a_reset() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let group = Group::start(&redis.url());
    let address = group.instances[0].addr;
    let mut seen = Stream::open(address, "t", "").unwrap();
    let (begin, ..) = seen.block().unwrap();
    let mut ids = vec![begin];
    for number in 0..30 {
        let token = submission(&format!("a.{number}"), 2);
        assert_eq!(post(address, &token).status, Some(200));
        ids.extend((0..2).map(|_| seen.block().unwrap().0));
    }
    let _: () = redis.ask(&["XTRIM", KEY, "MAXLEN", "10"]);
    // Entries 21 to 30 are left: event 2 × 21 - 1 is the first that is held.
    let (epoch, _, seal, _) = parse(ids.last().unwrap());
    let edge = 2 * 21 - 1;
    let resets = [
        ids[0].clone(),
        ids[edge - 1].clone(),
        format!("{epoch}-31-{seal}-0"),
        format!("{epoch}-9999999-{seal}-0"),
        format!("{epoch}-30-{seal}x-0"),
        format!("{epoch}-30-{seal}-x"),
        format!("{}-5-{seal}-0", epoch - 1),
        format!("{}-5-{seal}-0", epoch + 1),
        format!("{}-{}-{seal}-{}", u64::MAX, u64::MAX, u64::MAX),
        "0".into(),
        "0-0".into(),
        "-".into(),
        "----".into(),
        "garbage".into(),
        "x".repeat(3000),
    ];
    for (number, id) in resets.iter().enumerate() {
        let address = group.instances[number % 3].addr;
        let mut stream = Stream::open(address, "t", id).expect("a stream");
        let (next, name, data) = stream.block().unwrap();
        assert_eq!(
            (&*name, data.as_deref()),
            ("stream-reset", Some("")),
            "{id}"
        );
        let token = submission(&format!("live.{number}"), 1);
        assert_eq!(post(address, &token).status, Some(200));
        let (.., data) = stream.block().unwrap();
        assert_eq!(data, Some(format!("live.{number}.0/1")), "{id}");
        // And has an id to come back with.
        let mut stream = Stream::open(address, "t", &next).expect("a stream");
        let (_, name, _) = stream.block().unwrap();
        assert_eq!(name, "", "{next}");
    }
    for at in edge..ids.len() {
        let address = group.instances[at % 3].addr;
        let mut stream = Stream::open(address, "t", &ids[at]).expect("a stream");
        let blocks = until(&mut stream, "live.14.0/1");
        let came: Vec<_> = blocks.iter().map(|(id, ..)| id.clone()).collect();
        let missed = came.len() - resets.len();
        assert_eq!(came[..missed], ids[at + 1..], "behind {}", ids[at]);
        assert!(blocks.iter().all(|(_, name, _)| name.is_empty()));
    }
    // In the query, for those that cannot set a field; the field of a reconnect goes first.
    let token = mint(SECRET, &topics_payload(&["t"]), now());
    let mut socket = TcpStream::connect(address).unwrap();
    let id = &ids[ids.len() - 2];
    let head = format!("GET /events?token={token}&last_event_id={id} HTTP/1.0\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    let mut stream = Stream {
        reader: BufReader::new(socket),
    };
    while !stream.line().unwrap().is_empty() {}
    assert_eq!(stream.block().unwrap().0, *ids.last().unwrap());
}

/// Case 8: More than a stream may hold is not kept in memory for whoever asks.
#[test]
fn a_client_that_missed_too_much_begins_with_a_reset() {
    if !is_there() {
        return;
    }
    let redis = Redis::start(&[]);
    let server = redis.instance();
    let mut seen = Stream::open(server.addr, "t", "").unwrap();
    let (begin, ..) = seen.block().unwrap();
    let big = "x".repeat(10_000);
    for number in 0..130 {
        let token = mint(SECRET, &events_payload(&[("t", "", &big)]), now());
        assert_eq!(post(server.addr, &token).status, Some(200), "{number}");
        seen.block().unwrap();
    }
    let mut stream = Stream::open(server.addr, "t", &begin).unwrap();
    assert_eq!(stream.block().unwrap().1, "stream-reset");
    // Of another topic none of it counts.
    let mut stream = Stream::open(server.addr, "other", &begin).unwrap();
    let (_, name, data) = stream.block().unwrap();
    assert_eq!((&*name, data), ("", None));
}

/// In-process publishing goes the same way: an event's topic, name and data arrive as they were.
#[test]
fn events_published_in_process_reach_every_instance() {
    if !is_there() {
        return;
    }
    use sse_server::{Config, Event, RedisUrl, Server};
    let redis = Redis::start(&[]);
    let other = redis.instance();
    let mut stream = other.subscribe(&["t"]);
    let mut config = Config::new(SECRET).unwrap();
    config.listen = ([127, 0, 0, 1], 0).into();
    config.redis = Some(RedisUrl(redis.url()));
    assert!(!format!("{config:?}").contains("redis://"));
    let server = Server::bind(config).unwrap();
    let running = server.clone();
    let thread = thread::spawn(move || running.run());
    let data = "a\nevent: b\n\n data: ü\n";
    let events = [
        Event::new("t", "", data).unwrap(),
        Event::new("t", "named", "").unwrap(),
    ];
    let receipt = server.publish(&events).unwrap();
    assert_eq!(receipt.events, 2);
    stream.expect_event("message", data);
    stream.expect_event("named", "");
    // Before it is sealed, which would take minutes.
    let huge = Event::new("t", "", &"x".repeat(1 << 20)).unwrap();
    assert_eq!(server.publish(&[huge]).unwrap_err().status, 413);
    let begin = Instant::now();
    server.shutdown();
    thread.join().unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(3));
    let refused = server.publish(&events).unwrap_err();
    assert_eq!(refused.status, 503);
}

// ------------------------------------------------------------------------------------ a long run

/// How long one round of a long run lasts, before what was heard in it is judged.
const ROUND: Duration = Duration::from_secs(7);

/// A client that leaves by itself as well, and comes back with the last id to another instance.
fn wanderer(addresses: &Addresses, mut turn: usize) -> JoinHandle<History> {
    let addresses = addresses.clone();
    thread::spawn(move || {
        let mut dice = Dice::seeded(turn as u64);
        let mut history = History::default();
        history.segments.push(Vec::new());
        let end = Instant::now() + 4 * DEADLINE;
        while Instant::now() < end {
            let address = {
                let all = addresses.lock().unwrap();
                all[turn % all.len()]
            };
            turn += 1 + dice.below(2);
            if let Some(stream) = Stream::open(address, "t", &history.last_id) {
                history.streams += 1;
                if listen_for(dice.below(200), stream, &mut history) {
                    return history;
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("a client never heard the end");
    })
}

/// What is done to Redis and to the instances, and how often it was.
#[derive(Default, Debug)]
struct Harm {
    instances_killed: usize,
    instances_ended: usize,
    redis_killed: usize,
    redis_stopped: usize,
    connections_cut: usize,
    redis_flushed: usize,
}

impl Harm {
    /// Does something at random, and makes good what was killed.
    fn next(&mut self, dice: &mut Dice, redis: &mut Redis, group: &mut Group, may_lose: bool) {
        let pause = Duration::from_millis(dice.below(1500) as u64);
        match dice.below(if may_lose { 12 } else { 11 }) {
            choice @ 0..5 => {
                let number = dice.below(group.instances.len());
                let server = &mut group.instances[number];
                let count = [&mut self.instances_killed, &mut self.instances_ended];
                *count[usize::from(choice > 2)] += 1;
                server.signal(["KILL", "TERM"][usize::from(choice > 2)]);
                server.wait_for_end();
                thread::sleep(pause);
                let port = group.instances[number].addr.port();
                group.instances[number] = instance(&redis.url(), port);
            }
            5..8 => {
                self.redis_killed += 1;
                redis.kill();
                thread::sleep(pause);
                redis.restart();
            }
            8..9 => {
                self.redis_stopped += 1;
                kill(redis.child.id(), "STOP");
                thread::sleep(2 * pause);
                kill(redis.child.id(), "CONT");
            }
            9..11 => {
                self.connections_cut += 1;
                let _: u64 = redis.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
            }
            _ => {
                self.redis_flushed += 1;
                let _: () = redis.ask(&["FLUSHALL"]);
            }
        }
        thread::sleep(pause / 2);
    }
}

/// Everything at random, for as long as one likes: 15 seconds in the suite, `SSE_SOAK_SECONDS=600`
/// for the long form, which `make soak REDIS=1` runs. In every second round Redis may be emptied too,
/// and only there may a client be told to begin anew, or what was accepted be lost.
#[test]
fn streams_stay_whole_while_redis_and_instances_are_killed_in_a_long_run() {
    if !is_there() {
        return;
    }
    let seconds = std::env::var("SSE_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(15, |it| it.parse().expect("SSE_SOAK_SECONDS: a number"));
    let mut dice = Dice::new(21);
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let mut group = Group::start(&redis.url());
    let begin = Instant::now();
    let (mut harm, mut slowest, mut rounds) = (Harm::default(), Duration::ZERO, 0);
    let (mut accepted, mut refused, mut unanswered) = (0, 0, 0);
    let (mut events, mut heard, mut streams, mut resets) = (0, 0, 0, 0);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let round = Instant::now();
        let residents = group.clients();
        let wanderers = (0..6).map(|turn| wanderer(&group.addresses, turn + rounds));
        let clients = residents.into_iter().chain(wanderers).collect();
        let load = Load::start(&group.addresses, 4, 5);
        let flushed = harm.redis_flushed;
        while round.elapsed() < ROUND {
            harm.next(&mut dice, &mut redis, &mut group, rounds % 2 == 1);
        }
        load.wait_for(50);
        let log = load.stop();
        let histories = finish(&group.addresses, clients);
        let all = judge(&histories);
        if harm.redis_flushed == flushed {
            nothing_is_lost(&all, &log);
            nobody_was_reset(&histories);
        }
        rounds += 1;
        for (.., posted) in &log {
            let count = match posted.status {
                Some(200) => &mut accepted,
                Some(503) => &mut refused,
                _ => &mut unanswered,
            };
            *count += 1;
            slowest = slowest.max(posted.took);
        }
        events += all.len();
        for history in &histories {
            streams += history.streams;
            resets += history.segments.len() - 1;
            heard += history.segments.iter().map(Vec::len).sum::<usize>();
        }
    }
    println!("  {rounds} rounds in {:.0?}: {harm:?}", begin.elapsed());
    println!(
        "  submissions: {accepted} accepted, {refused} answered 503, {unanswered} not answered, the \
         slowest took {slowest:.1?}"
    );
    println!("  {events} events, heard {heard} times in {streams} streams; {resets} resets");
}
