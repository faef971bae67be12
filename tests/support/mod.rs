//! Helpers in sentences, for tests that drive the real server through sockets.
//!
//! Tokens are minted with the libraries themselves and streams are read by a parser of their own
//! (after the WHATWG's rules), so that no test judges the server by the server's code.
#![allow(dead_code)] // Each test file is a program of its own and needs a part of this.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Within this time whatever a test waits for has happened, on the busiest machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The secret of every test server that is not given another.
pub const SECRET: &str = "73757065727365637265746b6579796f7573686f756c646e6f74636f6d6d6974";

// ---------------------------------------------------------------------------------- the server

/// The real binary, in a process of its own, on a port the system chose. Killed when dropped.
pub struct TestServer {
    pub addr: SocketAddr,
    /// The address for metrics, where `SSE_METRICS_LISTEN` was set.
    pub metrics: Option<SocketAddr>,
    pub start_line: String,
    pub secret: String,
    child: Child,
    log: Log,
}

/// What a process wrote to standard error, collected while it runs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

/// The binary with these settings and no other `SSE_` variable. Has [`SECRET`] unless the settings
/// name another.
pub fn binary(settings: &[(&str, &str)]) -> Command {
    binary_under(&[], settings)
}

/// As [`binary`], started by another program: `&["prlimit", "--nofile=64"]`.
pub fn binary_under(wrapper: &[&str], settings: &[(&str, &str)]) -> Command {
    let program = env!("CARGO_BIN_EXE_sse-server");
    let mut words = wrapper.iter().copied().chain([program]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SSE_") {
            command.env_remove(name);
        }
    }
    command.env("SSE_SECRET", SECRET);
    command.envs(settings.iter().copied());
    command
}

/// Runs the binary with arguments to its end.
#[track_caller]
pub fn run(settings: &[(&str, &str)], args: &[&str]) -> Output {
    run_with_input(settings, args, b"")
}

#[track_caller]
pub fn run_with_input(settings: &[(&str, &str)], args: &[&str], input: &[u8]) -> Output {
    let mut command = binary(settings);
    command.args(args).stdin(Stdio::piped());
    let pipes = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("the binary starts");
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    thread::spawn(move || stdin.write_all(&input));
    // A server that starts where it should have refused would run for ever.
    let id = child.id();
    let output = thread::spawn(move || child.wait_with_output().unwrap());
    let ended = wait_until(DEADLINE, || output.is_finished());
    if !ended {
        kill(id, "KILL");
        let output = output.join().unwrap();
        panic!(
            "still running: {args:?} with {settings:?}; it wrote {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    output.join().unwrap()
}

impl TestServer {
    /// Starts the server on a port of the system's choice: `start(&[("SSE_QUEUE", "4")])`.
    #[track_caller]
    pub fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_under(&[], settings)
    }

    /// As [`TestServer::start`], started by another program that replaces itself with the server,
    /// as `prlimit` does.
    #[track_caller]
    pub fn start_under(wrapper: &[&str], settings: &[(&str, &str)]) -> Self {
        let mut command = binary_under(wrapper, &[("SSE_LISTEN", "127.0.0.1:0")]);
        command.envs(settings.iter().copied());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let log = Log::collect(child.stderr.take().unwrap());
        let start_line = log.wait_for_line("listening on ", || {
            child.try_wait().expect("a child").is_some()
        });
        let secret = settings.iter().find(|(name, _)| *name == "SSE_SECRET");
        let secret = secret.map_or(SECRET, |(_, value)| value).to_string();
        Self {
            addr: address_after(&start_line, "listening on ").expect("an address"),
            metrics: address_after(&start_line, "metrics on "),
            start_line,
            secret,
            child,
            log,
        }
    }

    /// A stream of these topics whose head has been read.
    #[track_caller]
    pub fn subscribe(&self, topics: &[&str]) -> Subscriber {
        self.stream(&self.token(topics))
    }

    /// A stream opened with this token.
    #[track_caller]
    pub fn stream(&self, token: &str) -> Subscriber {
        subscribe(self.addr, &format!("/events?token={token}"))
    }

    /// Submits events (topic, name, data). Does not judge the answer: see [`Submitted::ok`].
    #[track_caller]
    pub fn publish(&self, events: &[(&str, &str, &str)]) -> Submitted {
        Submitted::from(self.post("/submit", self.submission(events).as_bytes()))
    }

    /// A token for `/events`, dated now.
    pub fn token(&self, topics: &[&str]) -> String {
        self.mint(&topics_payload(topics))
    }

    /// A body for `/submit`, dated now.
    pub fn submission(&self, events: &[(&str, &str, &str)]) -> String {
        self.mint(&events_payload(events))
    }

    /// A token with any payload, dated now, under this server's (first) secret.
    pub fn mint(&self, payload: &[u8]) -> String {
        self.mint_at(payload, now())
    }

    pub fn mint_at(&self, payload: &[u8], timestamp: u32) -> String {
        mint(self.secret.split(',').next().unwrap(), payload, timestamp)
    }

    #[track_caller]
    pub fn get(&self, target: &str) -> Answer {
        self.raw(request("GET", target, "", b""))
    }

    #[track_caller]
    pub fn post(&self, target: &str, body: &[u8]) -> Answer {
        let length = format!("Content-Length: {}\r\n", body.len());
        self.raw(request("POST", target, &length, body))
    }

    /// Sends these bytes on a fresh connection and reads one answer.
    #[track_caller]
    pub fn raw(&self, bytes: impl AsRef<[u8]>) -> Answer {
        let mut connection = self.connect();
        connection.send(bytes);
        connection.answer()
    }

    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(self.addr)
    }

    /// The text of `GET /metrics`.
    #[track_caller]
    pub fn metrics_text(&self) -> String {
        let mut connection = Connection::open(self.metrics.expect("SSE_METRICS_LISTEN was set"));
        connection.send(request("GET", "/metrics", "", b""));
        let answer = connection.answer();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text()
    }

    /// One sample by its full name with labels; 0 where it was not counted yet.
    #[track_caller]
    pub fn metric(&self, sample: &str) -> u64 {
        sample_in(&self.metrics_text(), sample)
    }

    /// Waits until a sample has this value.
    #[track_caller]
    pub fn wait_for_metric(&self, sample: &str, value: u64) {
        let reached = wait_until(DEADLINE, || self.metric(sample) == value);
        assert!(reached, "{sample} is {}, not {value}", self.metric(sample));
    }

    /// All that the server wrote to standard error so far.
    pub fn log(&self) -> String {
        self.log.0.lock().unwrap().clone()
    }

    /// Waits for a line of the log that contains this text, and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        self.log.wait_for_line(text, || false)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `TERM`, `INT`, `KILL`, `STOP`, `CONT`.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        kill(self.pid(), name);
    }

    #[track_caller]
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let ended = wait_until(DEADLINE, || self.child.try_wait().unwrap().is_some());
        assert!(ended, "the server still runs");
        self.child.wait().unwrap()
    }

    /// A number from `/proc/PID/status`: `Threads`, `VmRSS` (KiB), `VmHWM`.
    #[track_caller]
    pub fn status(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let text = std::fs::read_to_string(path).expect("a running server");
        let line = text.lines().find(|line| line.starts_with(field));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.and_then(|word| word.parse().ok())
            .expect("a number in /proc")
    }

    /// How many descriptors the server has open.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid());
        std::fs::read_dir(path).expect("a running server").count()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the server wrote:\n{}---", self.log());
        }
    }
}

impl Log {
    fn collect(source: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let text = log.0.clone();
        thread::spawn(move || {
            for line in BufReader::new(source).lines().map_while(Result::ok) {
                *text.lock().unwrap() += &format!("{line}\n");
            }
        });
        log
    }

    #[track_caller]
    fn wait_for_line(&self, text: &str, mut ended: impl FnMut() -> bool) -> String {
        let end = Instant::now() + DEADLINE;
        loop {
            let over = ended() || Instant::now() > end;
            let log = self.0.lock().unwrap().clone();
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return line.to_string();
            }
            assert!(!over, "no line with {text:?} in the log:\n{log}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn address_after(line: &str, words: &str) -> Option<SocketAddr> {
    let rest = line.split(words).nth(1)?;
    let end = rest.find([',', ' ']).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// Waits for a condition; whether it came true in time.
pub fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
pub fn kill(pid: u32, signal: &str) {
    let line = format!("kill -{signal} {pid}");
    let status = Command::new("sh").args(["-c", &line]).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Runs the job on a thread; joining it passes its panic on.
pub fn in_background<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::spawn(job)
}

// -------------------------------------------------------------------------------------- tokens

pub fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs() as u32
}

/// A Branca token around these bytes.
#[track_caller]
pub fn mint(secret: &str, payload: &[u8], timestamp: u32) -> String {
    branca::encode(payload, &bytes_of_hex(secret), timestamp).expect("a key of 32 bytes")
}

/// A value as MessagePack.
pub fn pack(value: &(impl Serialize + ?Sized)) -> Vec<u8> {
    rmp_serde::to_vec(value).unwrap()
}

/// A MessagePack list of values that are packed already, so that tests can make wrong ones.
pub fn list(values: &[Vec<u8>]) -> Vec<u8> {
    let length = (values.len() as u32).to_be_bytes();
    [&[0xdd], &length[..], &values.concat()].concat()
}

/// As [`list`], a map.
pub fn map(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0xdf];
    bytes.extend((entries.len() as u32).to_be_bytes());
    for (name, value) in entries {
        bytes.extend(pack(*name));
        bytes.extend(value);
    }
    bytes
}

pub fn topics_payload(topics: &[&str]) -> Vec<u8> {
    map(&[("topics", pack(topics))])
}

pub fn events_payload(events: &[(&str, &str, &str)]) -> Vec<u8> {
    let event = |&(topic, event, data): &(&str, &str, &str)| {
        map(&[
            ("topic", pack(topic)),
            ("event", pack(event)),
            ("data", pack(data)),
        ])
    };
    map(&[(
        "events",
        list(&events.iter().map(event).collect::<Vec<_>>()),
    )])
}

#[track_caller]
pub fn bytes_of_hex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2), "whole bytes");
    let pairs = (0..digits.len()).step_by(2).map(|at| &digits[at..at + 2]);
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).expect("hex digits"))
        .collect()
}

// ---------------------------------------------------------------------------------------- HTTP

/// A body in chunks, for `Transfer-Encoding: chunked`.
pub fn chunked(pieces: &[&[u8]]) -> Vec<u8> {
    let chunk =
        |piece: &&[u8]| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
    let mut body: Vec<u8> = pieces.iter().flat_map(chunk).collect();
    body.extend(b"0\r\n\r\n");
    body
}

/// The bytes of a request; `fields` are whole header lines with their ends.
pub fn request(method: &str, target: &str, fields: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes =
        format!("{method} {target} HTTP/1.1\r\nHost: test\r\n{fields}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A client's connection. Every read and write has a deadline.
pub struct Connection {
    reader: BufReader<TcpStream>,
    /// Where the answer being read comes in chunks: how much of this one is still to come.
    chunk: Option<usize>,
    /// The last chunk has come: the server ended the answer, it did not break off.
    pub whole: bool,
}

#[derive(Debug)]
pub struct Answer {
    /// `HTTP/1.1`, say.
    pub version: String,
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Connection {
    #[track_caller]
    pub fn open(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&addr, DEADLINE).expect("the server accepts");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    /// On a socket that is connected, and has its deadlines.
    pub fn over(stream: TcpStream) -> Self {
        Self {
            reader: BufReader::new(stream),
            chunk: None,
            whole: false,
        }
    }

    /// The socket itself.
    pub fn socket(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = self.reader.get_mut().write_all(bytes.as_ref());
        sent.expect("the server reads on");
    }

    /// Sends as much as the server takes; whether it took all.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.reader.get_mut().write_all(bytes.as_ref()).is_ok()
    }

    /// No more requests come; answers are still read.
    pub fn half_close(&self) {
        let _ = self.socket().shutdown(Shutdown::Write);
    }

    /// One whole answer to a request that was not HEAD; of a stream, which has no end, its head.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        let mut answer = self.head();
        if answer.is_stream() {
            return answer;
        }
        let length = answer.header("Content-Length").map(str::to_string);
        if answer.header("Transfer-Encoding").is_some() {
            answer.body = self.chunks();
        } else if let Some(length) = length {
            answer.body = vec![0; length.parse().expect("a length")];
            self.reader
                .read_exact(&mut answer.body)
                .expect("the whole body");
        } else if answer.status >= 200 && answer.status != 204 {
            answer.body = self.rest();
        }
        answer
    }

    /// The head of an answer, and nothing behind it.
    #[track_caller]
    pub fn head(&mut self) -> Answer {
        self.try_head().expect("an answer before the end")
    }

    /// As [`Connection::head`]; nothing where the server closes or resets without an answer.
    #[track_caller]
    pub fn try_head(&mut self) -> Option<Answer> {
        let first = self.line()?;
        let mut words = first.splitn(3, ' ');
        let version = words.next().unwrap().to_string();
        assert!(version.starts_with("HTTP/1."), "no status line: {first:?}");
        let status = words.next().and_then(|word| word.parse().ok());
        let mut fields = Vec::new();
        loop {
            let line = self.line().expect("the whole head");
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').expect("a header line");
            fields.push((name.to_string(), value.trim().to_string()));
        }
        let answer = Answer {
            version,
            status: status.expect("a status"),
            fields,
            body: Vec::new(),
        };
        if answer.is_stream() && answer.header("Transfer-Encoding") == Some("chunked") {
            self.chunk = Some(0);
        }
        Some(answer)
    }

    /// All that comes until the server closes; of an answer in chunks, what is in them.
    #[track_caller]
    pub fn rest(&mut self) -> Vec<u8> {
        let (mut bytes, end) = (Vec::new(), Instant::now() + DEADLINE);
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.try_read(&mut buffer) {
                Ok(0) => return bytes,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return bytes,
                Ok(size) => bytes.extend_from_slice(&buffer[..size]),
                Err(error) => panic!("not closed in time: {error}"),
            }
            assert!(Instant::now() < end, "not closed in time");
        }
    }

    /// The server closes, and sends nothing before.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        let rest = self.rest();
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }

    /// Bytes as they come, without the chunks around them: 0 at the end.
    #[track_caller]
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        self.try_read(buffer).expect("bytes in time")
    }

    fn try_read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let Some(left) = self.chunk else {
            return self.reader.read(buffer);
        };
        if left > 0 {
            let most = left.min(buffer.len());
            let size = self.reader.read(&mut buffer[..most])?;
            self.chunk = Some(left - size);
            if left == size {
                // A stream may break off anywhere.
                let _end = self.reader.read_exact(&mut [0; 2]);
            }
            return Ok(size);
        }
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\r\n") {
            return Ok(0);
        }
        let size = String::from_utf8_lossy(&line[..line.len() - 2]).into_owned();
        let size = usize::from_str_radix(&size, 16).expect("a chunk's size");
        self.chunk = Some(size);
        if size == 0 {
            self.reader.read_exact(&mut [0; 2])?;
            self.whole = true;
            self.chunk = None;
            assert_eq!(
                self.reader.read(buffer)?,
                0,
                "something follows the last chunk"
            );
            return Ok(0);
        }
        self.try_read(buffer)
    }

    /// What is in the next chunk of a stream: one frame, as the server framed it.
    #[track_caller]
    pub fn frame(&mut self) -> Vec<u8> {
        assert_eq!(self.chunk, Some(0), "not at the beginning of a chunk");
        let mut buffer = [0; 64 * 1024];
        let mut size = self.read(&mut buffer);
        assert!(size > 0, "the stream ended");
        while self.chunk != Some(0) {
            size += self.read(&mut buffer[size..]);
        }
        buffer[..size].to_vec()
    }

    #[track_caller]
    fn line(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        match self.reader.read_until(b'\n', &mut bytes) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("no line in time: {error}"),
        }
        let line = String::from_utf8(bytes).expect("a head in ASCII");
        Some(line.trim_end_matches(['\r', '\n']).to_string())
    }

    #[track_caller]
    fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let size = self.line().expect("a chunk's size");
            let size = usize::from_str_radix(&size, 16).expect("a chunk's size");
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).expect("a whole chunk");
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return body;
            }
        }
    }
}

impl Answer {
    /// The value of a header field; its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let named = |(field, _): &&(String, String)| field.eq_ignore_ascii_case(name);
        self.fields
            .iter()
            .find(named)
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn is_stream(&self) -> bool {
        let kind = self.header("Content-Type").unwrap_or_default();
        kind.starts_with("text/event-stream")
    }
}

/// The answer to a submission.
#[derive(Clone, Debug)]
pub struct Submitted {
    pub status: u16,
    /// 0 unless the status is 200.
    pub events: u64,
    pub deliveries: u64,
    pub body: String,
}

impl From<Answer> for Submitted {
    fn from(answer: Answer) -> Self {
        let body = answer.text();
        let number = |name: &str| {
            let digits = body.split(&format!("\"{name}\":")).nth(1)?.trim_start();
            let end = digits.find(|c: char| !c.is_ascii_digit())?;
            digits[..end].parse().ok()
        };
        Self {
            status: answer.status,
            events: number("events").unwrap_or(0),
            deliveries: number("deliveries").unwrap_or(0),
            body: body.clone(),
        }
    }
}

impl Submitted {
    /// The submission was accepted. Returns its deliveries.
    #[track_caller]
    pub fn ok(self) -> u64 {
        assert_eq!(self.status, 200, "{}", self.body);
        self.deliveries
    }
}

/// The value of one sample in the Prometheus text format; 0 where it is absent.
#[track_caller]
pub fn sample_in(text: &str, sample: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample));
    let value = line.and_then(|rest| rest.strip_prefix(' '));
    value.map_or(0, |value| value.trim().parse().expect("a whole number"))
}

// ------------------------------------------------------------------------------------- streams

/// A stream of events, read as a browser reads it.
pub struct Subscriber {
    pub head: Answer,
    /// The last delay the server told.
    pub retry: Option<u64>,
    pub connection: Connection,
    parser: Parser,
    waiting: VecDeque<Item>,
}

/// What a browser would dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `message` where the frame names none.
    pub name: String,
    pub data: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Message(Message),
    Retry(u64),
    Comment(String),
}

/// Opens a stream with any request target and reads its head, which must be 200.
#[track_caller]
pub fn subscribe(addr: SocketAddr, target: &str) -> Subscriber {
    let mut connection = Connection::open(addr);
    connection.send(request("GET", target, "Accept: text/event-stream\r\n", b""));
    Subscriber::on(connection)
}

impl Subscriber {
    /// On a connection whose request was sent.
    #[track_caller]
    pub fn on(mut connection: Connection) -> Self {
        let head = connection.head();
        if head.status != 200 {
            let body = connection.rest();
            panic!("{} {}", head.status, String::from_utf8_lossy(&body));
        }
        Self {
            head,
            retry: None,
            connection,
            parser: Parser::default(),
            waiting: VecDeque::new(),
        }
    }

    /// The next message; panics where the stream ends or nothing comes in time.
    #[track_caller]
    pub fn message(&mut self) -> Message {
        self.try_message().expect("a message before the end")
    }

    /// The next message, or nothing where the stream ends first.
    #[track_caller]
    pub fn try_message(&mut self) -> Option<Message> {
        let end = Instant::now() + DEADLINE;
        while let Some(item) = self.item() {
            if let Item::Message(message) = item {
                return Some(message);
            }
            assert!(Instant::now() < end, "no message in time, only {item:?}");
        }
        None
    }

    #[track_caller]
    pub fn expect_event(&mut self, name: &str, data: &str) {
        let message = self.message();
        assert_eq!((&*message.name, &*message.data), (name, data));
    }

    #[track_caller]
    pub fn expect_heartbeat(&mut self) {
        let item = self.item();
        assert_eq!(item, Some(Item::Comment(String::new())));
    }

    /// The next retry, message or comment; nothing at the end of the stream.
    #[track_caller]
    pub fn item(&mut self) -> Option<Item> {
        let mut buffer = [0; 16 * 1024];
        while self.waiting.is_empty() {
            let size = match self.connection.try_read(&mut buffer) {
                Ok(0) => return None,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Ok(size) => size,
                Err(error) => panic!("nothing came in time: {error}"),
            };
            for byte in &buffer[..size] {
                self.waiting.extend(self.parser.take(*byte));
            }
        }
        let item = self.waiting.pop_front();
        if let Some(Item::Retry(delay)) = item {
            self.retry = Some(delay);
        }
        item
    }

    /// The messages until the stream ends.
    #[track_caller]
    pub fn rest(&mut self) -> Vec<Message> {
        std::iter::from_fn(|| self.try_message()).collect()
    }

    /// The stream ends, with no message before.
    #[track_caller]
    pub fn expect_end(&mut self) {
        assert_eq!(self.try_message(), None);
    }
}

/// The stream format, section "parsing an event stream" of the HTML standard.
#[derive(Default)]
pub struct Parser {
    line: Vec<u8>,
    /// The last line ended with CR: an LF right behind it belongs to that end.
    after_cr: bool,
    lines: usize,
    name: String,
    data: String,
}

impl Parser {
    /// Takes a byte; what is complete with it.
    pub fn take(&mut self, byte: u8) -> Option<Item> {
        let second_half = byte == b'\n' && self.after_cr;
        self.after_cr = byte == b'\r';
        match byte {
            _ if second_half => None,
            b'\r' | b'\n' => {
                let bytes = std::mem::take(&mut self.line);
                let line = String::from_utf8(bytes).expect("a stream in UTF-8");
                let first = self.lines == 0;
                self.lines += 1;
                let bom = line.strip_prefix('\u{feff}').filter(|_| first);
                self.line(bom.unwrap_or(&line))
            }
            byte => {
                self.line.push(byte);
                None
            }
        }
    }

    fn line(&mut self, line: &str) -> Option<Item> {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                let mut name = std::mem::take(&mut self.name);
                let data = std::mem::take(&mut self.data);
                // Without a data field nothing is dispatched; each one ended with a line feed.
                let data = data.strip_suffix('\n')?.to_string();
                if name.is_empty() {
                    name = "message".into();
                }
                return Some(Item::Message(Message { name, data }));
            }
            "" => return Some(Item::Comment(line[1..].to_string())),
            "event" => self.name = value.to_string(),
            "data" => self.data += &format!("{value}\n"),
            "retry" if value.bytes().all(|byte| byte.is_ascii_digit()) => {
                return value.parse().ok().map(Item::Retry);
            }
            _ => {}
        }
        None
    }
}
