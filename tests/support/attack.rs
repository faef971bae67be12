//! What the tests that attack the server share: a witness, dice, rude clients, vital signs.
#![allow(dead_code)] // Each test file is a program of its own and needs a part of this.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::panic::resume_unwind;
use std::process::{Command, id};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use crate::support::*;

/// An attack with thousands of connections leaves no room for a second one beside it, and its
/// figures mean nothing then.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

// ------------------------------------------------------------------------------------- witness

/// A good subscriber, fed every few milliseconds by a good publisher on a connection of its own.
/// Whatever is done to the server meanwhile, every submission must be answered 200 and every
/// event arrive, once and in order.
pub struct Witness {
    stop: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
    publisher: JoinHandle<(u64, Duration)>,
    subscriber: JoinHandle<Duration>,
}

/// What a witness has to say in the end.
#[derive(Clone, Copy)]
pub struct Account {
    pub events: u64,
    pub worst_submission: Duration,
    /// From the moment an event was submitted to the moment it was read.
    pub worst_delivery: Duration,
}

const PACE: Duration = Duration::from_millis(4);
const LAST: &str = "last";

impl Witness {
    #[track_caller]
    pub fn start(server: &TestServer) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(AtomicU64::new(0));
        let started = Instant::now();
        let mut stream = server.subscribe(&["witness"]);
        let mut connection = server.connect();
        let secret = server.secret.clone();
        let publisher = {
            let stop = stop.clone();
            in_background(move || publish(&mut connection, &secret, started, &stop))
        };
        let subscriber = {
            let seen = seen.clone();
            in_background(move || follow(&mut stream, started, &seen))
        };
        let witness = Self {
            stop,
            seen,
            publisher,
            subscriber,
        };
        witness.expect_more();
        witness
    }

    /// Waits until a few more events have come, submitted from now on.
    #[track_caller]
    pub fn expect_more(&self) {
        let goal = self.seen.load(SeqCst) + 3;
        let ended = || self.publisher.is_finished() || self.subscriber.is_finished();
        let came = wait_until(DEADLINE, || self.seen.load(SeqCst) >= goal || ended());
        assert!(came && !ended(), "the witness gets no more events");
    }

    /// Ends it, fails where it has anything to complain of, and prints its account.
    #[track_caller]
    pub fn finish(self, row: &str) -> Account {
        self.expect_more();
        self.stop.store(true, SeqCst);
        let told = self.publisher.join();
        let (events, worst_submission) = told.unwrap_or_else(|panic| resume_unwind(panic));
        let told = self.subscriber.join();
        let worst_delivery = told.unwrap_or_else(|panic| resume_unwind(panic));
        let account = Account {
            events,
            worst_submission,
            worst_delivery,
        };
        println!("{row}: {account}");
        account
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (events, submission) = (self.events, self.worst_submission);
        let delivery = self.worst_delivery;
        write!(
            f,
            "witness: {events} events, worst submission {submission:.1?}, worst delivery {delivery:.1?}"
        )
    }
}

fn publish(
    connection: &mut Connection,
    secret: &str,
    started: Instant,
    stop: &AtomicBool,
) -> (u64, Duration) {
    let (mut count, mut worst) = (0, Duration::ZERO);
    loop {
        let last = stop.load(SeqCst);
        let name = if last { LAST } else { "tick" };
        let data = format!("{count} {}", started.elapsed().as_micros());
        let body = mint(secret, &events_payload(&[("witness", name, &data)]), now());
        let length = format!("Content-Length: {}\r\n", body.len());
        let begun = Instant::now();
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        let answer = connection.answer();
        worst = worst.max(begun.elapsed());
        assert!(Submitted::from(answer).ok() >= 1, "the witness listens");
        count += 1;
        if last {
            return (count, worst);
        }
        thread::sleep(PACE);
    }
}

fn follow(stream: &mut Subscriber, started: Instant, seen: &AtomicU64) -> Duration {
    let mut worst = Duration::ZERO;
    for expected in 0.. {
        let Message { name, data } = stream.message();
        let (number, submitted) = data.split_once(' ').expect("number and time");
        assert_eq!(number.parse(), Ok(expected), "in order, none missing");
        let submitted = Duration::from_micros(submitted.parse().unwrap());
        worst = worst.max(started.elapsed().saturating_sub(submitted));
        seen.store(expected + 1, SeqCst);
        if name == LAST {
            break;
        }
    }
    worst
}

// ---------------------------------------------------------------------------------------- dice

/// Random numbers that a seed brings back (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// The seed is `SSE_SEED`, or this one; printed, so that a failure can be repeated.
    pub fn new(default: u64) -> Self {
        let named = std::env::var("SSE_SEED").ok();
        let seed = named.map_or(default, |seed| seed.parse().expect("a number"));
        println!("SSE_SEED={seed}");
        Self(seed)
    }

    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub fn pick<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// Digits of base62, as a token has them.
    pub fn base62(&mut self, count: usize) -> String {
        let digits = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        (0..count).map(|_| digits[self.below(62)] as char).collect()
    }

    /// One to four changes of the kinds that parsers stumble over.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>, words: &[&[u8]]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            let end = (at + 1 + self.below(16)).min(bytes.len());
            let at = at.min(end);
            match self.below(8) {
                0 if at < end => bytes[at] ^= 1 << self.below(8),
                1 if at < end => bytes[at] = self.next() as u8,
                2 => drop(bytes.drain(at..end)),
                3 => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy);
                }
                4 => {
                    let noise = self.below(16);
                    let noise = self.bytes(noise);
                    bytes.splice(at..at, noise);
                }
                5 => bytes.truncate(at),
                _ => {
                    let word = self.pick(words).to_vec();
                    bytes.splice(at..at, word);
                }
            }
        }
    }
}

// -------------------------------------------------------------------------------- rude clients

/// Connects from any address of the loopback network: one address has only so many ports.
#[track_caller]
pub fn connect_from(host: Ipv4Addr, addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((host, 0)).into()).unwrap();
    socket.connect_timeout(&addr.into(), DEADLINE).unwrap();
    with_deadlines(socket.into())
}

#[track_caller]
pub fn connect(addr: SocketAddr) -> TcpStream {
    with_deadlines(TcpStream::connect_timeout(&addr, DEADLINE).expect("the server accepts"))
}

fn with_deadlines(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// A client that takes hardly anything before it makes its sender wait.
#[track_caller]
pub fn connect_narrow(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    // Before it connects: the window is agreed on then.
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect_timeout(&addr.into(), DEADLINE).unwrap();
    with_deadlines(socket.into())
}

/// Leaves with a reset instead of a farewell.
pub fn reset(stream: TcpStream) {
    let linger = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    linger.unwrap();
}

/// All that comes until the server ends the connection, politely or not.
#[track_caller]
pub fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return bytes,
            Ok(size) => bytes.extend_from_slice(&buffer[..size]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("not closed in time: {error}"),
        }
    }
}

/// What a stranger's connection came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// Ended by the server, with these statuses before, or none.
    Closed(Vec<u16>),
    /// Became a stream, which the client then left.
    Stream,
}

/// Reads until the server ends the connection or makes a stream of it; panics where neither
/// happens in time.
#[track_caller]
pub fn fate(stream: &mut TcpStream) -> Fate {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    let streaming = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.contains("Content-Type: text/event-stream")
    };
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Fate::Closed(statuses(&bytes)),
            Ok(size) => bytes.extend_from_slice(&buffer[..size]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                return Fate::Closed(statuses(&bytes));
            }
            Err(error) => panic!("neither closed nor a stream: {error}"),
        }
        if streaming(&bytes) {
            return Fate::Stream;
        }
    }
}

fn statuses(bytes: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(bytes);
    let heads = text.split("HTTP/1.").skip(1);
    heads
        .filter_map(|head| head.get(2..5)?.parse().ok())
        .collect()
}

/// Whether the server has read all that was sent to it on this connection so far.
pub fn is_read(connection: &Connection) -> bool {
    let (near, far) = (
        connection.socket().local_addr(),
        connection.socket().peer_addr(),
    );
    let (client, server) = (near.unwrap().port(), far.unwrap().port());
    let ends = [format!(":{server:04X}"), format!(":{client:04X}")];
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    sockets.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, local, remote, _, queues, ..] = words[..] else {
            return false;
        };
        let ours = local.ends_with(&ends[0]) && remote.ends_with(&ends[1]);
        ours && queues.ends_with(":00000000")
    })
}

/// Sends what the server takes. It may well close before it has read all.
pub fn send(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    stream.write_all(bytes).is_ok()
}

// -------------------------------------------------------------------------- newcomers, strangers

/// Publishers that open a connection for each submission, as cron jobs do. However many strangers
/// there are, each one must be answered 200.
pub struct Newcomers {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Duration>>,
}

impl Newcomers {
    /// This many of them at a time.
    pub fn start(server: &TestServer, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let threads = (0..count).map(|_| {
            let (stop, answered) = (stop.clone(), answered.clone());
            let (addr, secret) = (server.addr, server.secret.clone());
            in_background(move || {
                let mut worst = Duration::ZERO;
                while !stop.load(SeqCst) {
                    let begun = Instant::now();
                    let body = mint(&secret, &events_payload(&[("new", "", "one")]), now());
                    let fields = format!("Connection: close\r\nContent-Length: {}\r\n", body.len());
                    let mut connection = Connection::open(addr);
                    connection.send(request("POST", "/submit", &fields, body.as_bytes()));
                    Submitted::from(connection.answer()).ok();
                    worst = worst.max(begun.elapsed());
                    answered.fetch_add(1, SeqCst);
                    thread::sleep(PACE);
                }
                worst
            })
        });
        Self {
            threads: threads.collect(),
            stop,
            answered,
        }
    }

    /// Waits until a few more have been answered.
    #[track_caller]
    pub fn expect_more(&self) {
        let goal = self.answered.load(SeqCst) + 3;
        let failed = || self.threads.iter().any(JoinHandle::is_finished);
        let came = wait_until(DEADLINE, || self.answered.load(SeqCst) >= goal || failed());
        assert!(came && !failed(), "a new publisher is not answered");
    }

    /// Ends them, and fails where one has anything to complain of.
    #[track_caller]
    pub fn finish(self) {
        self.stop.store(true, SeqCst);
        let told = self.threads.into_iter().map(JoinHandle::join);
        let worst = told.map(|told| told.unwrap_or_else(|panic| resume_unwind(panic)));
        let worst = worst.max().unwrap_or_default();
        let answered = self.answered.load(SeqCst);
        println!("  {answered} new publishers answered, the slowest after {worst:.1?}");
    }
}

/// Strangers that hold as many connections as they can, and open another for each that is closed.
pub struct Strangers {
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Strangers {
    /// `count` connections at once; each sends these bytes, and again for each answer.
    pub fn start(addr: SocketAddr, count: usize, bytes: &[u8]) -> Self {
        const THREADS: usize = 4;
        let stop = Arc::new(AtomicBool::new(false));
        let opened = Arc::new(AtomicU64::new(0));
        let threads = (0..THREADS).map(|number| {
            let (stop, opened, bytes) = (stop.clone(), opened.clone(), bytes.to_vec());
            // One address has only so many ports.
            let host = Ipv4Addr::new(127, 0, 2, number as u8 + 1);
            in_background(move || {
                let mut held: Vec<_> = (0..count / THREADS).map(|_| None).collect();
                while !stop.load(SeqCst) {
                    for place in &mut held {
                        let gone = place.as_mut().is_none_or(|it| !goes_on(it, &bytes));
                        if gone && !stop.load(SeqCst) {
                            // The server may well close it at once.
                            let mut stream = connect_from(host, addr);
                            send(&mut stream, &bytes);
                            stream.set_nonblocking(true).unwrap();
                            *place = Some(stream);
                            opened.fetch_add(1, SeqCst);
                        }
                    }
                    // None was gone, perhaps: this is no test of polling.
                    thread::sleep(Duration::from_micros(100));
                }
            })
        });
        Self {
            threads: threads.collect(),
            stop,
            opened,
        }
    }

    pub fn opened(&self) -> u64 {
        self.opened.load(SeqCst)
    }

    /// Waits until they have opened this many.
    #[track_caller]
    pub fn expect_opened(&self, count: u64) {
        let came = wait_until(2 * DEADLINE, || self.opened() >= count);
        assert!(came, "{} connections opened, not {count}", self.opened());
    }

    /// They leave.
    #[track_caller]
    pub fn finish(self) {
        self.stop.store(true, SeqCst);
        let told = self.threads.into_iter().map(JoinHandle::join);
        told.for_each(|told| told.unwrap_or_else(|panic| resume_unwind(panic)));
    }
}

/// Whether a connection that never waits is still there. An answer is a reason to ask again.
fn goes_on(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    match stream.read(&mut [0; 4096]) {
        Ok(0) => false,
        Ok(_) => send(stream, bytes),
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// Another program that takes all cores for itself, until it is dropped.
pub struct BusyMachine {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl BusyMachine {
    pub fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let cores = thread::available_parallelism().map_or(2, usize::from);
        let threads = (0..3 * cores).map(|_| {
            let stop = stop.clone();
            thread::spawn(move || while !stop.load(SeqCst) {})
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }
}

impl Drop for BusyMachine {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

// --------------------------------------------------------------------------------- vital signs

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub struct Vitals {
    pub threads: u64,
    pub descriptors: usize,
    /// KiB of memory.
    pub resident: u64,
}

impl Vitals {
    #[track_caller]
    pub fn of(server: &TestServer) -> Self {
        Self {
            threads: server.status("Threads"),
            descriptors: server.descriptors(),
            resident: server.status("VmRSS"),
        }
    }

    /// Waits until threads and descriptors are back where they were, and memory is within
    /// `slack` KiB of it: an allocator gives back what it likes.
    #[track_caller]
    pub fn expect_back(self, server: &TestServer, slack: u64) {
        let back = |now: Vitals| {
            now.threads <= self.threads
                && now.descriptors <= self.descriptors
                && now.resident <= self.resident + slack
        };
        let came = wait_until(2 * DEADLINE, || back(Self::of(server)));
        let after = Self::of(server);
        println!("  before {self:?}, after {after:?}");
        assert!(came, "left behind: {self:?} became {after:?}");
    }
}

/// Lets this process and the servers it starts have this many descriptors.
#[track_caller]
pub fn need_descriptors(count: u64) {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().nth(3));
    let soft = soft.expect("a limit");
    if soft == "unlimited" || soft.parse::<u64>().unwrap() >= count {
        return;
    }
    let soft = format!("--nofile={count}:");
    let both = format!("--nofile={count}:{count}");
    let raise = |limit: &str| {
        let process = id().to_string();
        let status = Command::new("prlimit")
            .args(["--pid", &process, limit])
            .status();
        status.expect("prlimit of util-linux").success()
    };
    assert!(
        raise(&soft) || raise(&both),
        "this test needs {count} descriptors"
    );
}

/// Runs a program to its end; it must succeed.
#[track_caller]
pub fn run_program(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    let output = command.args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{line}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Says that a test cannot run here, even where the output of tests is kept; under `CI=true`,
/// where nothing is skipped, fails it.
#[track_caller]
pub fn missing(what: &str) {
    let skipped = std::env::var("CI").as_deref() != Ok("true");
    assert!(skipped, "under CI nothing is skipped: {what}");
    let name = thread::current().name().unwrap_or("a test").to_string();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {what}");
}

/// A line a second for each thing that can be complained of, whatever happens.
#[track_caller]
pub fn expect_few_lines(server: &TestServer, during: Duration) {
    let log = server.log();
    let mut counts = BTreeMap::new();
    for line in log.lines().skip(1) {
        // How many lines were not logged, which varies.
        let line = line.split(" suppressed=").next().unwrap();
        *counts.entry(line).or_insert(0) += 1;
    }
    println!("  lines in {during:.1?}: {counts:?}");
    for (line, count) in counts {
        // Two more: one at each end of the time.
        let most = during.as_secs() + 2;
        assert!(count <= most, "{count} times in {during:.1?}: {line}");
    }
}
