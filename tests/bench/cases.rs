//! What is measured. The names are stable: goals and the README refer to them.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::client::{PATIENCE, Shape};
use crate::publish::{Load, Sample};
use crate::redis;
use crate::report::BUSY;
use crate::servers::{Kind, Server, available_memory, resident, round_trip};

pub struct Case {
    pub name: &'static str,
    /// Who takes part.
    pub kinds: &'static [Kind],
    shape: Shape,
    work: Work,
}

enum Work {
    Connect,
    /// Flat out, with each of these windows.
    Flat(&'static [u64]),
    /// Events a second.
    Rate(f64),
    /// The same with three instances over Redis; and submissions to them that nobody hears.
    RedisFlat(&'static [u64]),
    RedisRate(f64),
    RedisSubmissions,
    RedisMany,
    Memory,
    Idle,
    Sizing,
    PublishCost,
    IdleSubmissions,
    Bodies,
}

/// One measured number: what, unit, value.
pub type Figure = (String, &'static str, f64);

const WINDOWS: Work = Work::Flat(&[8, 32]);

/// As many topics as a token may hold, less a few, and no two subscribers have one in common.
const OWN_TOPICS: Shape = Shape {
    topics: 9000,
    silent: 59,
    cycle: 9000,
    ..to(9000)
};
const TOPICS: Shape = Shape {
    topics: 1000,
    ..to(1000)
};
/// Few numbers: a submission of 8 KiB takes long to mint.
const BIG: Shape = Shape {
    size: 8192,
    cycle: 80,
    ..to(1000)
};
/// Ours: one submission of ten events. nchan has no batches: ten posts in one write.
const BATCHES: Shape = Shape {
    batch: 10,
    ..to(1000)
};

const ALONE: &[Kind] = &[Kind::Ours];
const BOTH: &[Kind] = &[Kind::Ours, Kind::Nchan];
/// What people would pick instead.
const PICKED: &[Kind] = &[Kind::Ours, Kind::Nchan, Kind::BetterSse];
const LIMIT: &[Kind] = &[Kind::Ours, Kind::Nchan, Kind::Reference];

pub const CASES: &[Case] = &[
    case("connect-5000", PICKED, to(5000), Work::Connect),
    case("flat-100", PICKED, to(100), WINDOWS),
    case("flat-1000", &Kind::ALL, to(1000), WINDOWS),
    case("flat-5000", LIMIT, to(5000), WINDOWS),
    case("flat-9000", BOTH, to(9000), WINDOWS),
    case("rate-1000x30", &Kind::ALL, to(1000), Work::Rate(30.0)),
    case("rate-5000x5", BOTH, to(5000), Work::Rate(5.0)),
    case("redis-3x1000", BOTH, to(3000), Work::RedisFlat(&[8, 32])),
    case("redis-3x3000", BOTH, to(9000), Work::RedisFlat(&[8, 32])),
    case(
        "redis-rate-3x1000x10",
        BOTH,
        to(3000),
        Work::RedisRate(10.0),
    ),
    case("redis-submissions", BOTH, to(0), Work::RedisSubmissions),
    case("redis-4x11250", ALONE, to(45_000), Work::RedisMany),
    case("topics-1000", BOTH, TOPICS, WINDOWS),
    case("big-8k", BOTH, BIG, WINDOWS),
    case("batch-10", BOTH, BATCHES, Work::Flat(&[40])),
    case("memory-5000", BOTH, to(5000), Work::Memory),
    case("memory-9000", BOTH, to(9000), Work::Memory),
    case("idle-10000", ALONE, to(10_000), Work::Idle),
    case("idle-9000x60", ALONE, OWN_TOPICS, Work::Idle),
    case("sizing", ALONE, to(0), Work::Sizing),
    case("publish-cost", ALONE, to(0), Work::PublishCost),
    case("idle-submissions", ALONE, to(0), Work::IdleSubmissions),
    case("bodies", ALONE, to(0), Work::Bodies),
];

const fn case(name: &'static str, kinds: &'static [Kind], shape: Shape, work: Work) -> Case {
    Case {
        name,
        kinds,
        shape,
        work,
    }
}

pub const fn to(subscribers: usize) -> Shape {
    Shape {
        subscribers,
        topics: 1,
        silent: 0,
        size: 64,
        batch: 1,
        cycle: 2000,
    }
}

impl Case {
    pub fn measure(&self, kind: Kind, time: Duration) -> Result<Vec<Figure>> {
        match self.work {
            Work::Connect => connect(kind, self.shape),
            Work::Flat(windows) => flat(Server::start(kind, &[])?, self.shape, windows, time),
            Work::Rate(rate) => at_rate(Server::start(kind, &[])?, self.shape, rate, time),
            Work::RedisFlat(windows) => flat(redis::start(kind)?, self.shape, windows, time),
            Work::RedisRate(rate) => at_rate(redis::start(kind)?, self.shape, rate, time),
            Work::RedisSubmissions => submissions(redis::start(kind)?, time),
            Work::Memory => memory(kind, self.shape),
            Work::Idle => idle(kind, self.shape),
            Work::Sizing => sizing(),
            Work::PublishCost => publish_cost(),
            Work::RedisMany => redis::many(),
            Work::IdleSubmissions => submissions(Server::start(Kind::Ours, &[])?, time),
            Work::Bodies => bodies(),
        }
    }
}

/// From the first connection attempt until the last response head.
fn connect(kind: Kind, shape: Shape) -> Result<Vec<Figure>> {
    let mut load = Load::start(Server::start(kind, &[])?, shape)?;
    // They count only if they do get events.
    load.at_rate(20.0, Duration::from_millis(100))?;
    let took = load.connecting.as_secs_f64() * 1000.0;
    Ok(vec![("connecting all".into(), "ms", took)])
}

fn flat(server: Server, shape: Shape, windows: &[u64], time: Duration) -> Result<Vec<Figure>> {
    let mut load = Load::start(server, shape)?;
    let mut figures = Vec::new();
    for window in windows {
        let sample = load.flat_out(*window, time)?;
        let figure = |name: &str, unit, value| (format!("{name}, {window} ahead"), unit, value);
        figures.push(figure("flat out", "/s", sample.rate()));
        figures.push(figure("CPU", "µs", sample.cpu_each()));
        figures.push(figure("load generator", BUSY, sample.own_share()));
    }
    Ok(figures)
}

fn at_rate(server: Server, shape: Shape, rate: f64, time: Duration) -> Result<Vec<Figure>> {
    let mut load = Load::start(server, shape)?;
    // The first events find cold caches and stacks.
    load.at_rate(rate, Duration::from_secs(1))?;
    let sample: Sample = load.at_rate(rate, 2 * time)?;
    let latency = |name: &str, share| (name.to_string(), "ms", sample.latency(share));
    Ok(vec![
        latency("p50", 0.5),
        latency("p99", 0.99),
        latency("max", 1.0),
        ("CPU".into(), "µs", sample.cpu_each()),
        ("load generator".into(), BUSY, sample.own_share()),
    ])
}

/// After ten events: what the first ones made resident stays so.
///
/// "Kernel included" is by how much the free memory fell, less what this process grew by itself.
/// It holds the server's pages, the kernel's stacks and structures for its threads, and both ends
/// of each connection: the client's end too, for both servers alike.
fn memory(kind: Kind, shape: Shape) -> Result<Vec<Figure>> {
    let [_, total, resident] = grown(kind, shape)?;
    let each = shape.subscribers as f64 / 1024.0;
    Ok(vec![
        ("memory, kernel included".into(), "KiB", total / each),
        ("memory, resident".into(), "KiB", resident / each),
    ])
}

/// What streams cost that nothing is published to; and how long a publish takes meanwhile, where
/// they have topics of their own.
fn idle(kind: Kind, shape: Shape) -> Result<Vec<Figure>> {
    // The publisher is idle too, and is not to be closed for that.
    let server = Server::start(kind, &[("SSE_READ_TIMEOUT", "60")])?;
    let mut load = Load::start(server, shape)?;
    // What connecting took has ended: threads of the pool are kept for 5 seconds.
    load.swarm.rest(Duration::from_secs(6))?;
    let (begin, before) = (Instant::now(), load.server.cpu());
    let mut share = |seconds| -> Result<f64> {
        load.swarm
            .rest(Duration::from_secs(seconds).saturating_sub(begin.elapsed()))?;
        let cpu = load.server.cpu() - before;
        Ok(100.0 * cpu.as_secs_f64() / begin.elapsed().as_secs_f64())
    };
    // All came at once, so that their heartbeats come at once, 15 seconds later.
    let mut figures = vec![
        ("CPU between heartbeats".into(), "%", share(8)?),
        ("CPU".into(), "%", share(15)?),
    ];
    if shape.topics == shape.subscribers {
        let sample = load.at_rate(200.0, Duration::from_secs(5))?;
        let latency = |name: &str, share| (name.to_string(), "ms", sample.latency(share));
        figures.extend([
            latency("p50", 0.5),
            latency("p99", 0.99),
            latency("max", 1.0),
        ]);
    }
    Ok(figures)
}

/// What the whole server takes with so many subscribers.
fn sizing() -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for subscribers in [100, 1000, 10_000] {
        let [before, total, _] = grown(Kind::Ours, to(subscribers))?;
        let name = format!("memory, {subscribers} subscribers");
        figures.push((name, "MiB", before + total));
    }
    Ok(figures)
}

/// MiB: resident memory of the server before any subscriber came; what they took of the machine's
/// memory, without the clients' own; what of that is resident in the server.
fn grown(kind: Kind, shape: Shape) -> Result<[f64; 3]> {
    let server = Server::start(kind, &[])?;
    let before = memory_now(&server);
    let mut load = Load::start(server, shape)?;
    load.at_rate(10.0, Duration::from_secs(1))?;
    let after = memory_now(&load.server);
    let total = (before[0] - after[0]) - (after[1] - before[1]);
    Ok([before[2], total, after[2] - before[2]])
}

/// MiB: what is free in the machine, what is resident here, and in the server.
pub fn memory_now(server: &Server) -> [f64; 3] {
    // The kernel takes back what was left a moment ago.
    thread::sleep(Duration::from_millis(500));
    let bytes = [available_memory(), resident("self"), server.resident()];
    bytes.map(|bytes| bytes as f64 / 1024.0 / 1024.0)
}

/// Median round trip of a submission, one every 20 ms, as subscribers grow.
fn publish_cost() -> Result<Vec<Figure>> {
    const SUBMISSIONS: usize = 40;
    let mut figures = Vec::new();
    for subscribers in [0, 10, 100, 1000, 5000] {
        let mut load = Load::start(Server::start(Kind::Ours, &[])?, to(subscribers))?;
        let mut stream = connection(&load.server)?;
        let requests: Vec<_> = (0..SUBMISSIONS).map(|n| load.publication(n)).collect();
        let publish = move || -> Result<Vec<Duration>> {
            let publish = |request: Vec<u8>| {
                thread::sleep(Duration::from_millis(20));
                round_trip(&mut stream, &request)
            };
            requests.into_iter().map(publish).collect()
        };
        load.swarm.tally.sending(SUBMISSIONS);
        // A thread of its own, so that reading the deliveries does not hide the answer's arrival.
        let publisher = thread::spawn(publish);
        let read = load.swarm.settle();
        let trips = publisher.join().expect("no panic")?;
        let name = format!("submission, {subscribers} subscribers");
        figures.push(read.map(|()| (name, "µs", median(trips)))?);
    }
    Ok(figures)
}

/// Submissions that nobody listens to, each sent once the one before is answered.
fn submissions(server: Server, time: Duration) -> Result<Vec<Figure>> {
    let request = server.publication(&[("nobody".into(), "x".repeat(64))]);
    let submit = || -> Result<f64> {
        let (mut stream, begin, mut count) = (connection(&server)?, Instant::now(), 0);
        while begin.elapsed() < time {
            round_trip(&mut stream, &request)?;
            count += 1;
        }
        Ok(f64::from(count) / begin.elapsed().as_secs_f64())
    };
    let on = |connections: usize| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..connections).map(|_| scope.spawn(submit)).collect();
            let rates = threads.into_iter().map(|t| t.join().expect("no panic"));
            rates.sum::<Result<f64>>()
        })
    };
    Ok(vec![
        ("submissions, 1 connection".into(), "/s", on(1)?),
        ("submissions, 4 connections".into(), "/s", on(4)?),
    ])
}

/// Median round trips without a subscriber. What a submission takes longer than a ping is the
/// opening of its token: base62 is quadratic.
fn bodies() -> Result<Vec<Figure>> {
    // 16 KiB of data make a token of 22 KiB: over the default limit, which is raised here only.
    let server = Server::start(Kind::Ours, &[("SSE_MAX_BODY", "32768")])?;
    let mut stream = connection(&server)?;
    let mut trip = |request: &[u8]| -> Result<f64> {
        let (begin, mut trips) = (Instant::now(), Vec::new());
        while trips.len() < 20 || begin.elapsed() < Duration::from_millis(300) {
            trips.push(round_trip(&mut stream, request)?);
        }
        Ok(median(trips))
    };
    let ping = b"GET /ping HTTP/1.1\r\nHost: bench\r\n\r\n";
    let mut figures = vec![("ping".to_string(), "µs", trip(ping)?)];
    for size in [64, 1024, 8192, 16384] {
        let request = server.publication(&[("nobody".into(), "x".repeat(size))]);
        let name = format!("submission of {size} bytes");
        figures.push((name, "µs", trip(&request)?));
    }
    Ok(figures)
}

pub fn connection(server: &Server) -> Result<TcpStream> {
    let stream = TcpStream::connect(server.address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Microseconds.
fn median(mut durations: Vec<Duration>) -> f64 {
    durations.sort_unstable();
    durations[durations.len() / 2].as_secs_f64() * 1e6
}
