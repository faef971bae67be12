//! Three instances over one Redis, of either kind. Each subscriber is at the next instance, and what
//! is published to the first reaches those of all.

use std::io::{BufRead, BufReader, ErrorKind, Lines, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::{Events, Interest, Poll, Token};

use crate::Result;
use crate::cases::Figure;
use crate::servers::{Kind, Server, available_memory, resident, round_trip};

const INSTANCES: usize = 3;

/// Where `make bench` leaves the server with the feature.
const BINARY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/redis/release/sse-server"
);

/// A running Redis that keeps nothing on disk; ended when dropped.
pub struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn binary() -> String {
    std::env::var("SSE_REDIS_BIN").unwrap_or(BINARY.into())
}

fn start_redis() -> Result<(Redis, String)> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let child = Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--save", "", "--port"])
        .arg(port.to_string())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("redis-server: {error}"))?;
    let redis = Redis(child);
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            return Err("redis-server does not answer".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok((redis, format!("redis://127.0.0.1:{port}")))
}

pub fn start(kind: Kind) -> Result<Server> {
    let (redis, url) = start_redis()?;
    let deadline = Instant::now() + Duration::from_secs(5);
    let instance = || Server::start(kind, &[("SSE_REDIS", &url)]);
    let mut first = instance()?;
    first.others = (1..INSTANCES).map(|_| instance()).collect::<Result<_>>()?;
    first.redis = Some(redis);
    // nchan answers 503 for as long as it connects to Redis.
    let request = first.publication(&[("nobody".into(), "ready?".into())]);
    for number in 0..INSTANCES {
        let asked = || {
            let mut stream = TcpStream::connect(first.address_of(number))?;
            round_trip(&mut stream, &request)
        };
        while let Err(error) = asked() {
            if Instant::now() > deadline {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(first)
}

// ---------------------------------------------------------------------------- more than a process

/// What one process of clients holds.
const HERD: usize = 15_000;
const HERDS: usize = 3;
const EVENTS: usize = 10;
/// Between two events: on 2 cores, one a second is more than servers and clients can take.
const PAUSE: Duration = Duration::from_secs(3);
const HERD_REQUEST: &str = "SSE_BENCH_REQUEST";

fn now() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_micros()
}

/// 45,000 streams of four instances, whose clients are processes of their own: one may have 20,000
/// descriptors.
pub fn many() -> Result<Vec<Figure>> {
    let mut settings = vec![
        ("SSE_MAX_SUBSCRIBERS", "12000"),
        ("SSE_READ_TIMEOUT", "120"),
    ];
    let (redis, url) = start_redis()?;
    settings.push(("SSE_REDIS", &url));
    let mut server = Server::start(Kind::Ours, &settings)?;
    let instance = |_| Server::start(Kind::Ours, &settings);
    server.others = (1..4).map(instance).collect::<Result<_>>()?;
    server.redis = Some(redis);
    let servers = || server.others.iter().chain([&server]);
    let resident_all = || servers().map(Server::resident).sum::<u64>() as f64;
    thread::sleep(Duration::from_millis(500));
    let before = [available_memory() as f64, resident_all()];
    let addresses: Vec<_> = servers().map(|it| it.address.to_string()).collect();
    let request = server.subscription(&["topic".into()]);
    let begin = Instant::now();
    let herd = |_| {
        Command::new(std::env::current_exe()?)
            .args(["herd", &addresses.join(",")])
            .env(HERD_REQUEST, String::from_utf8_lossy(&request).as_ref())
            .stdout(Stdio::piped())
            .spawn()
    };
    let mut herds = (0..HERDS).map(herd).collect::<std::io::Result<Vec<_>>>()?;
    let outputs = herds.iter_mut().map(|it| it.stdout.take().expect("piped"));
    let mut lines: Vec<_> = outputs.map(|it| BufReader::new(it).lines()).collect();
    let mut next = || -> Result<Vec<String>> {
        let line = |it: &mut Lines<_>| it.next().ok_or("a herd has ended")?.map_err(Into::into);
        lines.iter_mut().map(line).collect()
    };
    next()?;
    let connecting = begin.elapsed().as_secs_f64() * 1000.0;
    let clients = herds.iter().map(|it| resident(&it.id().to_string()));
    let clients = clients.sum::<u64>() as f64;
    let after = [available_memory() as f64, resident_all()];
    let mut stream = TcpStream::connect(server.address)?;
    let mut trips = Vec::new();
    for _ in 0..EVENTS {
        let data = format!("{:020}", now());
        trips.push(round_trip(
            &mut stream,
            &server.publication(&[("topic".into(), data)]),
        )?);
        thread::sleep(PAUSE);
    }
    let mut worst = [0f64; 3];
    for line in next()? {
        for (worst, word) in worst.iter_mut().zip(line.split(' ')) {
            *worst = worst.max(word.parse::<f64>()? / 1000.0);
        }
    }
    for mut herd in herds {
        herd.wait()?;
    }
    trips.sort_unstable();
    let each = (HERD * HERDS) as f64 * 1024.0;
    let [p50, p99, most] = worst;
    Ok(vec![
        ("connecting all".into(), "ms", connecting),
        (
            "memory, kernel included".into(),
            "KiB",
            (before[0] - after[0] - clients) / each,
        ),
        (
            "memory, resident".into(),
            "KiB",
            (after[1] - before[1]) / each,
        ),
        ("p50 of the slowest third".into(), "ms", p50),
        ("p99 of the slowest third".into(), "ms", p99),
        ("max".into(), "ms", most),
        (
            "submission, median".into(),
            "ms",
            trips[trips.len() / 2].as_secs_f64() * 1e3,
        ),
    ])
}

/// A process of clients. Says when all have their response heads, and then, once each has every
/// event, within which times these came.
pub fn herd(addresses: &str) -> Result<()> {
    let request = std::env::var(HERD_REQUEST)?;
    let addresses = addresses.split(',').map(str::parse);
    let addresses: Vec<SocketAddr> = addresses.collect::<std::result::Result<_, _>>()?;
    let (mut poll, mut ready) = (Poll::new()?, Events::with_capacity(1024));
    let mut streams = Vec::new();
    for number in 0..HERD {
        let mut stream = TcpStream::connect(addresses[number % addresses.len()])?;
        stream.write_all(request.as_bytes())?;
        stream.set_nonblocking(true)?;
        let mut stream = mio::net::TcpStream::from_std(stream);
        poll.registry()
            .register(&mut stream, Token(number), Interest::READABLE)?;
        streams.push((stream, Vec::new(), 0));
    }
    let (mut heads, mut buffer, mut latencies) = (0, vec![0; 65536], Vec::new());
    let mut last = vec![0; HERD];
    while latencies.len() < HERD * EVENTS {
        poll.poll(&mut ready, Some(Duration::from_secs(60)))?;
        for event in &ready {
            let Token(number) = event.token();
            let (stream, rest, begun) = &mut streams[number];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => return Err("a stream has ended".into()),
                    Ok(size) => rest.extend_from_slice(&buffer[..size]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if line.starts_with("HTTP/1.1 200 ") && *begun == 0 {
                    *begun = 1;
                    heads += 1;
                    if heads == HERD {
                        println!("ready");
                    }
                } else if let Some(sent) = line.strip_prefix("data: ") {
                    let sent: u128 = sent.trim().parse()?;
                    if sent <= last[number] {
                        return Err("an event came twice, or late".into());
                    }
                    last[number] = sent;
                    latencies.push(now().saturating_sub(sent));
                }
            }
        }
    }
    latencies.sort_unstable();
    let share = |share: usize| latencies[(latencies.len() - 1) * share / 100];
    println!("{} {} {}", share(50), share(99), share(100));
    Ok(())
}
