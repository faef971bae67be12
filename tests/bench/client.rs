//! The subscribers: one thread, one epoll, one buffer. The same for both servers, and cheap: one
//! read for whatever has come to a socket, and each event is compared with what it must be.

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::Result;
use crate::servers::Server;

/// Digits at the start of an event's data: its number.
const DIGITS: usize = 12;
/// Whatever is waited for must come within this.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Sockets read in one turn, after which the publisher has its own.
const TURN: usize = 512;
/// Sleep after each turn that found fewer. Clients elsewhere cost a server no wake-up; here each
/// would, and nchan loses up to half of its speed to them.
const NAP: Duration = Duration::from_micros(50);
/// The publisher's connection.
pub const PUBLISHER: Token = Token(usize::MAX);

/// Who gets what. Event n goes to topic n % topics, subscriber n listens to topic n % topics.
#[derive(Clone, Copy)]
pub struct Shape {
    pub subscribers: usize,
    pub topics: usize,
    /// Topics of each subscriber besides, which nothing is published to.
    pub silent: usize,
    /// Bytes of an event's data.
    pub size: usize,
    /// Events in one submission.
    pub batch: usize,
    /// Numbers run from 0 to here and begin again, so that submissions can be minted beforehand.
    /// No number is used again before every subscriber has the event that had it.
    pub cycle: usize,
}

impl Shape {
    pub fn event(&self, number: usize) -> (String, String) {
        let filler = "x".repeat(self.size - DIGITS);
        (self.topic(number), format!("{number:0DIGITS$}{filler}"))
    }

    fn topic(&self, number: usize) -> String {
        format!("topic{}", number % self.topics)
    }

    /// What this subscriber listens to.
    fn subscription(&self, number: usize) -> Vec<String> {
        let topic = self.topic(number);
        let silent = (0..self.silent).map(|silent| format!("{topic}-{silent}"));
        [topic.clone()].into_iter().chain(silent).collect()
    }

    fn copies(&self) -> usize {
        self.subscribers / self.topics
    }
}

/// What has been sent and what has come.
pub struct Tally {
    shape: Shape,
    filler: Vec<u8>,
    pub sent: usize,
    /// Events that every one of their subscribers has.
    finished: usize,
    pub deliveries: usize,
    heads: usize,
    /// Microseconds from sending to reading, of each delivery; where they are wanted.
    pub latencies: Option<Vec<u32>>,
    sent_at: Vec<Instant>,
    /// Deliveries of each number that have not come.
    missing: Vec<usize>,
}

impl Tally {
    fn new(shape: Shape) -> Self {
        Self {
            shape,
            filler: vec![b'x'; shape.size - DIGITS],
            sent: 0,
            finished: 0,
            deliveries: 0,
            heads: 0,
            latencies: None,
            sent_at: vec![Instant::now(); shape.cycle],
            missing: vec![0; shape.cycle],
        }
    }

    /// Whether one more submission stays within the window.
    pub fn has_room(&self, window: usize) -> bool {
        let free = |number| self.missing[number % self.shape.cycle] == 0;
        self.sent - self.finished + self.shape.batch <= window
            && (self.sent..self.sent + self.shape.batch).all(free)
    }

    /// The next `count` events are being sent now.
    pub fn sending(&mut self, count: usize) {
        let now = Instant::now();
        for number in self.sent..self.sent + count {
            self.sent_at[number % self.shape.cycle] = now;
            self.missing[number % self.shape.cycle] = self.shape.copies();
        }
        self.sent += count;
        if self.shape.subscribers == 0 {
            self.finished = self.sent;
        }
    }

    fn delivered(&mut self, number: usize, now: Instant) -> Result<()> {
        let missing = self.missing[number].checked_sub(1);
        self.missing[number] = missing.ok_or(format!("event {number} was not sent"))?;
        self.finished += usize::from(missing == Some(0));
        self.deliveries += 1;
        if let Some(latencies) = &mut self.latencies {
            latencies.push((now - self.sent_at[number]).as_micros() as u32);
        }
        Ok(())
    }
}

/// All subscribers of one server.
pub struct Swarm {
    pub poll: Poll,
    ready: Events,
    subscribers: Vec<Subscriber>,
    buffer: Vec<u8>,
    pub tally: Tally,
}

impl Swarm {
    /// Connects all at once, as browsers do after a restart, and returns when each has its
    /// response head.
    pub fn connect(server: &Server, shape: Shape) -> Result<Self> {
        let mut swarm = Self {
            poll: Poll::new()?,
            ready: Events::with_capacity(TURN),
            subscribers: Vec::with_capacity(shape.subscribers),
            buffer: vec![0; 256 * 1024],
            tally: Tally::new(shape),
        };
        let request = |topic| server.subscription(&shape.subscription(topic));
        let requests: Vec<_> = (0..shape.topics).map(request).collect();
        for number in 0..shape.subscribers {
            let mut stream = TcpStream::connect(server.address_of(number))?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            let registry = swarm.poll.registry();
            registry.register(&mut stream, Token(number), interest)?;
            swarm.subscribers.push(Subscriber {
                stream,
                request: requests[number % shape.topics].clone(),
                body: Body::NotYet,
                rest: Vec::new(),
                next: number % shape.topics,
            });
            if number % 64 == 0 {
                swarm.turn(Duration::ZERO)?;
            }
        }
        swarm.until(|tally| tally.heads == shape.subscribers)?;
        Ok(swarm)
    }

    /// Waits for sockets to become ready, at most this long, and reads them.
    pub fn turn(&mut self, timeout: Duration) -> Result<()> {
        match self.poll.poll(&mut self.ready, Some(timeout)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in self.ready.iter().filter(|event| event.token() != PUBLISHER) {
            let Token(number) = event.token();
            let subscriber = &mut self.subscribers[number];
            let asked = match event.is_writable() {
                true => subscriber.ask(),
                false => Ok(()),
            };
            asked
                .and_then(|()| subscriber.read(&mut self.buffer, &mut self.tally))
                .map_err(|error| format!("subscriber {number}: {error}"))?;
        }
        if !timeout.is_zero() && (1..TURN).contains(&self.ready.iter().count()) {
            thread::sleep(NAP);
        }
        Ok(())
    }

    /// Reads until the condition holds.
    fn until(&mut self, done: impl Fn(&Tally) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(&self.tally) {
            self.turn(Duration::from_millis(100))?;
            if Instant::now() > deadline {
                let Tally {
                    heads, deliveries, ..
                } = self.tally;
                let expected = self.tally.sent * self.tally.shape.copies();
                let text = format!("{heads} heads, {deliveries} of {expected} deliveries");
                return Err(format!("{text} after {} s", PATIENCE.as_secs()).into());
            }
        }
        Ok(())
    }

    /// Waits until everything sent has come, and a moment for what must not come: one event too
    /// many is not the one that is due, and an error.
    pub fn settle(&mut self) -> Result<()> {
        self.until(|tally| tally.deliveries == tally.sent * tally.shape.copies())?;
        self.rest(Duration::from_millis(30))
    }

    /// Reads what comes in this time: heartbeats, and nothing else.
    pub fn rest(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn(Duration::from_millis(10))?;
        }
        Ok(())
    }
}

/// How the answer's body comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Body {
    /// The head has not come completely.
    NotYet,
    /// In chunks, each of whole lines.
    Chunked,
    /// As it is.
    Plain,
}

struct Subscriber {
    stream: TcpStream,
    /// Empty once it has been sent.
    request: Vec<u8>,
    body: Body,
    /// Bytes of an event that has not come completely.
    rest: Vec<u8>,
    /// The number of the event that must come next.
    next: usize,
}

impl Subscriber {
    fn ask(&mut self) -> Result<()> {
        if !self.request.is_empty() {
            let taken = self.stream.write(&self.request)?;
            self.request.drain(..taken);
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8], tally: &mut Tally) -> Result<()> {
        loop {
            let kept = self.rest.len();
            buffer[..kept].copy_from_slice(&self.rest);
            let came = match self.stream.read(&mut buffer[kept..]) {
                Ok(0) => return Err("closed by the server".into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            };
            let bytes = &buffer[..kept + came];
            let used = self.take(bytes, tally)?;
            self.rest.clear();
            self.rest.extend_from_slice(&bytes[used..]);
            // A short read has emptied the socket, and the next byte is announced anew.
            if bytes.len() < buffer.len() {
                return Ok(());
            }
        }
    }

    /// Checks what has come completely, and returns how many bytes that is.
    fn take(&mut self, bytes: &[u8], tally: &mut Tally) -> Result<usize> {
        let mut at = 0;
        if self.body == Body::NotYet {
            let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
                return Ok(0);
            };
            if !bytes.starts_with(b"HTTP/1.1 200 ") {
                return Err(String::from_utf8_lossy(bytes).into());
            }
            let fields = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
            self.body = match fields.contains("\r\ntransfer-encoding: chunked") {
                true => Body::Chunked,
                false => Body::Plain,
            };
            tally.heads += 1;
            at = head + 4;
        }
        let now = Instant::now();
        if self.body == Body::Plain {
            return Ok(at + self.take_lines(&bytes[at..], tally, now)?);
        }
        while let Some((lines, length)) = first_chunk(&bytes[at..])? {
            if self.take_lines(lines, tally, now)? < lines.len() {
                return Err("a chunk ends within a line or an event".into());
            }
            at += length;
        }
        Ok(at)
    }

    /// Checks the whole lines and events that these bytes begin with, and returns how many bytes
    /// that is.
    fn take_lines(&mut self, bytes: &[u8], tally: &mut Tally, now: Instant) -> Result<usize> {
        let (mut at, size) = (0, tally.shape.size);
        loop {
            let rest = &bytes[at..];
            if !rest.starts_with(b"data: ") {
                // What may yet become a line of data, or one of another kind.
                let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                    return Ok(at);
                };
                let line = &rest[..end];
                let known = [&b":"[..], b"id:", b"retry:", b"event:message"];
                if !line.is_empty() && !known.iter().any(|start| line.starts_with(start)) {
                    let line = String::from_utf8_lossy(line);
                    return Err(format!("a line that nobody sent: {line}").into());
                }
                at += end + 1;
                continue;
            }
            // The data has a known length; its line end and the empty line follow.
            let Some(data) = rest.get(6..6 + size + 2) else {
                return Ok(at);
            };
            let digit = |sum, digit: &u8| sum * 10 + usize::from(digit.wrapping_sub(b'0'));
            let number = data[..DIGITS].iter().fold(0, digit);
            if number != self.next {
                return Err(format!("event {number} came, {} was due", self.next).into());
            }
            if data[DIGITS..size] != tally.filler || !data.ends_with(b"\n\n") {
                return Err(format!("event {number} is damaged").into());
            }
            tally.delivered(number, now)?;
            self.next = (number + tally.shape.topics) % tally.shape.cycle;
            at += 6 + size + 2;
        }
    }
}

/// The chunk at the start of these bytes, where it has come completely: what is in it, and the
/// length of the whole.
fn first_chunk(bytes: &[u8]) -> Result<Option<(&[u8], usize)>> {
    let Some(line) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let digits = bytes[..line].strip_suffix(b"\r").unwrap_or_default();
    let digits = str::from_utf8(digits).unwrap_or_default();
    let size = usize::from_str_radix(digits, 16).map_err(|_| "a chunk without a size")?;
    if size == 0 {
        return Err("the stream was ended by the server".into());
    }
    let end = line + 1 + size;
    match bytes.get(end..end + 2) {
        Some(b"\r\n") => Ok(Some((&bytes[line + 1..end], end + 2))),
        Some(_) => Err("a chunk is longer than its size".into()),
        None => Ok(None),
    }
}
