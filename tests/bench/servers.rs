//! The servers under test, each a child process with a port of its own, and how they are asked.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Result;
use crate::redis::{self, Redis};

const KEY: [u8; 32] = [0x5e; 32];
pub const NGINX: &str = "/usr/sbin/nginx";
const NCHAN_MODULE: &str = "/usr/lib/nginx/modules/ngx_nchan_module.so";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Ours,
    Nchan,
    /// The npm package, in node.
    BetterSse,
    /// See `reference.rs`.
    Reference,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Ours, Kind::Nchan, Kind::BetterSse, Kind::Reference];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::Nchan => "nchan",
            Kind::BetterSse => "better-sse",
            Kind::Reference => "reference",
        }
    }
}

/// A running server; ended when dropped.
pub struct Server {
    pub kind: Kind,
    pub address: SocketAddr,
    /// Instances beside this one, and the Redis over which they are one server.
    pub others: Vec<Server>,
    pub redis: Option<Redis>,
    child: Child,
    /// nginx's configuration and working files.
    directory: Option<PathBuf>,
}

impl Server {
    pub fn start(kind: Kind, settings: &[(&str, &str)]) -> Result<Self> {
        match kind {
            Kind::Ours => start_ours(settings),
            Kind::Nchan => start_nchan(settings),
            Kind::BetterSse => start_better_sse(),
            Kind::Reference => start_reference(),
        }
    }

    /// Where this subscriber connects to.
    pub fn address_of(&self, subscriber: usize) -> SocketAddr {
        match subscriber % (1 + self.others.len()) {
            0 => self.address,
            number => self.others[number - 1].address,
        }
    }

    /// The request of a subscriber to these topics; to others, to the first of them.
    pub fn subscription(&self, topics: &[String]) -> Vec<u8> {
        #[derive(Serialize)]
        struct Payload<'a> {
            topics: &'a [String],
        }
        let path = match self.kind {
            Kind::Ours => format!("/events?token={}", token(&Payload { topics })),
            _ => format!("/sub/{}", topics[0]),
        };
        // nchan answers 403 without this Accept.
        format!("GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n").into()
    }

    /// The bytes that publish these (topic, data): one submission to ours, and as many posts to
    /// others, which have no batches.
    pub fn publication(&self, events: &[(String, String)]) -> Vec<u8> {
        #[derive(Serialize)]
        struct Event<'a> {
            topic: &'a str,
            data: &'a str,
        }
        #[derive(Serialize)]
        struct Payload<'a> {
            events: Vec<Event<'a>>,
        }
        if self.kind != Kind::Ours {
            let post = |(topic, data): &(_, String)| post(&format!("/pub/{topic}"), data);
            return events.iter().flat_map(post).collect();
        }
        let events = events.iter().map(|(topic, data)| Event { topic, data });
        let events = events.collect();
        post("/submit", &token(&Payload { events }))
    }

    /// Answers that the publication of so many events brings.
    pub fn answers(&self, events: usize) -> usize {
        match self.kind {
            Kind::Ours => 1,
            _ => events,
        }
    }

    /// User and system time that the server's processes have used, exact to 10 ms.
    pub fn cpu(&self) -> Duration {
        let of = |pid: &u32| process_cpu(&pid.to_string());
        let others: Duration = self.others.iter().map(Server::cpu).sum();
        others + self.processes().iter().map(of).sum::<Duration>()
    }

    /// Bytes resident in user space. nginx's shared memory counts once: only its worker counts.
    pub fn resident(&self) -> u64 {
        let worker = self.processes().pop().expect("at least the child");
        resident(&worker.to_string())
    }

    /// How many descriptors its first process has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_or(0, Iterator::count)
    }

    fn processes(&self) -> Vec<u32> {
        let pid = self.child.id();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        let children = children.split_whitespace().flat_map(str::parse);
        [pid].into_iter().chain(children).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &self.directory {
            None => drop(self.child.kill()),
            // Killing nginx's master would leave its worker behind.
            Some(directory) => drop(nginx(directory).args(["-s", "stop"]).status()),
        }
        let _ = self.child.wait();
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

fn start_ours(settings: &[(&str, &str)]) -> Result<Server> {
    let built = option_env!("CARGO_BIN_EXE_sse-server").map(String::from);
    let binary = std::env::var("SSE_SERVER_BIN").ok().or(built);
    let shared = settings.iter().any(|(name, _)| *name == "SSE_REDIS");
    let binary = binary.map(|it| if shared { redis::binary() } else { it });
    let binary = binary.ok_or("SSE_SERVER_BIN must name the server")?;
    let secret: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut command = Command::new(&binary);
    command
        .env_clear()
        .env("SSE_SECRET", secret)
        .env("SSE_LISTEN", "127.0.0.1:0")
        .env("SSE_MAX_SUBSCRIBERS", "10000")
        .envs(settings.iter().copied());
    listening(Kind::Ours, command)
}

fn start_better_sse() -> Result<Server> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = root.join("target/bench/node_modules/better-sse/build/index.mjs");
    if !package.exists() {
        return Err("better-sse is missing: sh tests/tools.sh, with npm".into());
    }
    let mut command = Command::new("node");
    command.arg(root.join("tests/bench/better-sse.mjs"));
    command.arg(package);
    listening(Kind::BetterSse, command)
}

fn start_reference() -> Result<Server> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("reference");
    listening(Kind::Reference, command)
}

/// Starts a server that says in its first line where it listens.
fn listening(kind: Kind, mut command: Command) -> Result<Server> {
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))?;
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let line = lines.next().ok_or("the server said nothing")??;
    let address = line.split("listening on ").nth(1);
    let address = address.and_then(|rest| rest.split([',', ' ']).next()?.parse().ok());
    // What else it says is worth seeing, and a full pipe would block it.
    let rest = lines.map_while(|line| line.ok());
    thread::spawn(move || rest.for_each(|line| eprintln!("    {}: {line}", kind.name())));
    let Some(address) = address else {
        let _ = child.kill();
        return Err(format!("no start line but: {line}").into());
    };
    Ok(Server {
        kind,
        address,
        others: Vec::new(),
        redis: None,
        child,
        directory: None,
    })
}

fn start_nchan(settings: &[(&str, &str)]) -> Result<Server> {
    if !Path::new(NCHAN_MODULE).exists() {
        return Err("nchan is missing: apt-get install nginx libnginx-mod-nchan".into());
    }
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let directory = directory.join(format!("fanout-{}", address.port()));
    fs::create_dir_all(&directory)?;
    let configuration = nginx_configuration(address, &directory, settings);
    fs::write(directory.join("nginx.conf"), configuration)?;
    let child = nginx(&directory).spawn()?;
    let mut server = Server {
        kind: Kind::Nchan,
        address,
        others: Vec::new(),
        redis: None,
        child,
        directory: Some(directory.clone()),
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(address).is_err() {
        if Instant::now() > deadline || server.child.try_wait()?.is_some() {
            let log = fs::read_to_string(directory.join("error.log")).unwrap_or_default();
            return Err(format!("nginx does not answer: {log}").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(server)
}

fn nginx(directory: &Path) -> Command {
    let mut command = Command::new(NGINX);
    command.arg("-p").arg(directory);
    command.arg("-c").arg(directory.join("nginx.conf"));
    command.stderr(Stdio::null());
    command
}

/// One worker, as quick as nchan gets: no access log, nothing on disk, as deep a backlog as ours,
/// and a buffer that outlasts the publisher's window, so that nothing is lost.
fn nginx_configuration(address: SocketAddr, directory: &Path, settings: &[(&str, &str)]) -> String {
    let url = settings.iter().find(|(name, _)| *name == "SSE_REDIS");
    let over = |(_, url): &(_, _)| format!("nchan_redis_url \"{url}\"; nchan_use_redis on;");
    let over = url.map(over).unwrap_or_default();
    let at = directory.display();
    format!(
        "daemon off; user root; pid {at}/pid; error_log {at}/error.log warn;
        worker_processes 1; worker_rlimit_nofile 20000; load_module {NCHAN_MODULE};
        events {{ worker_connections 20000; multi_accept on; }}
        http {{
            access_log off; keepalive_requests 1000000000; nchan_shared_memory_size 256M;
            client_body_buffer_size 64k; client_body_temp_path {at}/body;
            proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
            uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
            server {{
                listen {address} backlog=4096;
                location ~ ^/pub/(\\w+)$ {{
                    nchan_publisher; nchan_channel_id $1; {over}
                    nchan_message_buffer_length 128; nchan_message_timeout 10m;
                }}
                location ~ ^/sub/(\\w+)$ {{
                    nchan_subscriber eventsource; nchan_channel_id $1; {over}
                    nchan_subscriber_first_message newest;
                }}
            }}
        }}\n"
    )
}

fn token(payload: &impl Serialize) -> String {
    let payload = rmp_serde::to_vec_named(payload).expect("strings always encode");
    let mut branca = branca::Branca::new(&KEY).expect("32 bytes");
    branca.encode(&payload).expect("small")
}

fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n\r\n{body}").into()
}

/// A complete answer at the start of `bytes`: its length.
pub fn answer_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if !text.starts_with("http/1.1 20") {
        return Err(format!("refused: {}", String::from_utf8_lossy(bytes)).into());
    }
    let length = text.split_once("content-length:");
    let (_, length) = length.ok_or("an answer without length")?;
    let length: usize = length.lines().next().unwrap_or_default().trim().parse()?;
    Ok((bytes.len() >= head + 4 + length).then_some(head + 4 + length))
}

/// Sends a request on a blocking connection and waits for its answer.
pub fn round_trip(stream: &mut TcpStream, request: &[u8]) -> Result<Duration> {
    let begin = Instant::now();
    stream.write_all(request)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while answer_length(&answer)?.is_none() {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
            n => answer.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(begin.elapsed())
}

pub fn process_cpu(pid: &str) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field, a name in parentheses, may hold spaces. Ticks are 10 ms for all of /proc.
    let (_, fields) = stat.rsplit_once(") ").unwrap_or_default();
    let ticks = fields.split(' ').skip(11).take(2);
    Duration::from_millis(10 * ticks.flat_map(str::parse::<u64>).sum::<u64>())
}

pub fn resident(pid: &str) -> u64 {
    kilobytes(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// What MemAvailable says, and the free pages it leaves out: those in the lists that each core
/// keeps, hundreds of MiB for half a minute after a large process has ended. The highest of some
/// samples, because pages are taken aside for moments, to be reported to a hypervisor as free.
pub fn available_memory() -> u64 {
    let sample = || {
        thread::sleep(Duration::from_millis(50));
        let zones = fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
        let counts = zones.split("count:").skip(1);
        let counts = counts.flat_map(|rest| rest.split_whitespace().next());
        let pages: u64 = counts.flat_map(str::parse::<u64>).sum();
        kilobytes("/proc/meminfo", "MemAvailable:") + pages * 4096
    };
    (0..20).map(|_| sample()).max().expect("20 samples")
}

fn kilobytes(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}
