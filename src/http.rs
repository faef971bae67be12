//! One connection: requests are read within limits, answers written, until it ends or becomes a
//! stream. Knows no path and no token. What it takes of RFC 9112 is strict: what two readers could
//! understand differently is refused, and ends the connection.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Take, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};
use std::{str::FromStr, time::Duration, time::Instant};

use parking_lot::Mutex;
use tiny_http::{HTTPVersion, Header, Method, Response, StatusCode};

use crate::{config::Config, error::Refusal, error::ensure, token::Subscription};

// What is read of a stranger, on either address and for any path, before a token is opened: 32
// bytes of line ends, a head of 8 KiB, and a body of `SSE_MAX_BODY`, each within
// `SSE_READ_TIMEOUT`, on 4,096 connections at most. Opening then takes a millisecond for 16 KiB,
// and 15 for 64.
//
// Where could another reader see another end of a request? It cannot: lines end with CRLF alone,
// names are tokens, values have no control character but tabs (and DEL), chunks are refused, there
// is one length, a plain number, and whatever is no request ends the connection.

/// Bytes of a request line and its header fields together: what nginx takes of one line.
const MAX_HEAD: u64 = 8 * 1024;

/// Fields in a head: what Apache's server takes. A head could hold 2,000 empty ones, of which each
/// takes a hundred bytes.
const MAX_FIELDS: usize = 100;

/// Bytes of line ends in front of a request, and its first.
const MAX_LINE_ENDS: usize = 32;

/// Bytes that are read ahead: of a head, or of the requests behind this one.
const BUFFER: usize = 4 * 1024;

/// Seconds a client may take to read the last answer of a connection. To close while its bytes
/// are unread would reset it, and the answer would be lost. They are dropped, however many come.
const LINGER: u64 = 1;

/// A request that is whole and well-formed.
pub struct Request {
    pub method: Method,
    pub path: String,
    pub query: String,
    /// HTTP/1.1, whose clients understand chunks.
    pub modern: bool,
    /// A byte above 0x7F in a value, which browsers and proxies do send, stands here as 0x7F.
    pub fields: Vec<Header>,
    /// Nothing where it is longer than `SSE_MAX_BODY`: then it is left unread.
    pub body: Option<Vec<u8>>,
}

/// What came, or why it is no request, to be answered; or nothing, where the client left, was
/// silent for too long, or made room: then the connection has to be closed.
pub type Received<T> = Result<T, Option<Refusal>>;

pub struct Answer {
    pub status: u16,
    /// Whole lines, all but those that say how the connection goes on.
    pub fields: String,
    /// Empty where there cannot be one. Who asks for the head alone is told its length.
    pub body: String,
    /// The connection becomes this stream, which begins with this head.
    pub stream: Option<Subscription>,
    /// It was a submission, and was accepted.
    pub authentic: bool,
}

/// Connections whose threads wait for their clients, to read or to write, in the order in which
/// they are closed to make room. One whose request is being decided on is not among them. Weak, so
/// that a thread that panics lets go of its own. Locked for a step in the tree, and at the end of a
/// server while each is shut down.
pub type Waiting = Mutex<BTreeMap<Standing, Weak<TcpStream>>>;

/// Whether it has sent an authentic submission: those that have not go first. When it came, or was
/// last authentic: who came first goes first, so that neither dripping nor asking for `/ping` all
/// the time makes a connection young again. A stranger who floods chooses no one: what goes is the
/// oldest of all that never sent a submission, his own or that of an honest client on its way. And
/// what tells those of one moment apart.
type Standing = (bool, Instant, RawFd);

/// A socket that is read until a deadline, however slowly its bytes come.
struct DeadlineReader {
    stream: Arc<TcpStream>,
    deadline: Instant,
}

pub struct Connection<'a> {
    reader: BufReader<DeadlineReader>,
    config: &'a Config,
    waiting: &'a Waiting,
    standing: Standing,
    /// The next answer has no body.
    head_only: bool,
    /// The next answer ends it.
    last: bool,
}

impl Request {
    /// The values of a field, one for each comma and each line.
    pub fn values(&self, name: &'static str) -> impl Iterator<Item = &str> {
        let named = self.fields.iter().filter(move |it| it.field.equiv(name));
        let values = named.flat_map(|it| it.value.as_str().split(','));
        values.map(str::trim)
    }
}

impl Read for DeadlineReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.checked_duration_since(Instant::now());
        let left = left.ok_or(ErrorKind::WouldBlock)?;
        self.stream.set_read_timeout(Some(left))?;
        (&*self.stream).read(buffer)
    }
}

impl<'a> Connection<'a> {
    pub fn new(stream: TcpStream, config: &'a Config, waiting: &'a Waiting) -> Self {
        // For each write: an answer takes one, or where it does not fit the socket, a few.
        _ = stream.set_write_timeout(Some(Duration::from_secs(config.read_timeout)));
        let standing = (false, Instant::now(), stream.as_raw_fd());
        let (stream, deadline) = (Arc::new(stream), Instant::now());
        Self {
            reader: BufReader::with_capacity(BUFFER, DeadlineReader { stream, deadline }),
            config,
            waiting,
            standing,
            head_only: false,
            last: false,
        }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.reader.get_ref().stream
    }

    /// Reads or writes, for so many seconds at most. Meanwhile the connection may be closed to make
    /// room for another: then nothing is left but to let go of it.
    fn wait<T>(&mut self, time: u64, act: impl FnOnce(&mut Self) -> Received<T>) -> Received<T> {
        let socket = self.reader.get_mut();
        socket.deadline = Instant::now() + Duration::from_secs(time);
        let (standing, stream) = (self.standing, Arc::downgrade(&socket.stream));
        self.waiting.lock().insert(standing, stream);
        let result = act(self);
        let remained = self.waiting.lock().remove(&standing);
        remained.ok_or(None).and(result)
    }

    /// The next request. Waits for the client, but no longer than the settings say.
    pub fn receive(&mut self) -> Received<Request> {
        // What is no request has no end behind which the next could begin.
        (self.head_only, self.last) = (false, true);
        let patience = self.config.read_timeout;
        let first = self.wait(patience, |it| read_first(&mut it.reader))?;
        let mut request = self.wait(patience, |it| read_head(&mut it.reader, first))?;
        self.head_only = request.method == Method::Head;
        let length = content_length(&request)?;
        if length > self.config.max_body {
            return Ok(request);
        }
        let expects = request.values("Expect").next().is_some();
        if expects && request.modern && length > self.reader.buffer().len() as u64 {
            self.write("HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = vec![0; length as usize];
        let read = |it: &mut Self| it.reader.read_exact(&mut body).map_err(unread);
        self.wait(patience, read)?;
        request.body = Some(body);
        let is_close = |it: &str| it.eq_ignore_ascii_case("close");
        self.last = !request.modern || request.values("Connection").any(is_close);
        Ok(request)
    }

    fn write(&mut self, text: &str) -> Received<()> {
        let write = |it: &mut Self| it.socket().write_all(text.as_bytes()).map_err(unread);
        self.wait(self.config.read_timeout, write)
    }

    /// Answers what was received last. Nothing where no other request can follow: the answer said
    /// so, or the client did not take it, or made room. `crowded`: no connection is kept that never
    /// was authentic; `ending`: none at all.
    pub fn answer(mut self, answer: &Answer, crowded: bool, ending: bool) -> Option<Self> {
        if answer.authentic {
            self.standing = (true, Instant::now(), self.socket().as_raw_fd());
        }
        let (authentic, ..) = self.standing;
        self.last |= ending || (crowded && !authentic);
        let body = if self.head_only { "" } else { &answer.body };
        match self.write(&(answer.head(self.last) + body)) {
            Ok(()) if !self.last => return Some(self),
            // It left, or made room: it must not stand among those that wait once more.
            Err(None) => return None,
            _ => {}
        }
        _ = self.socket().shutdown(Shutdown::Write);
        let read = |it: &mut Self| io::copy(&mut it.reader, &mut io::sink()).map_err(unread);
        _ = self.wait(LINGER, read);
        None
    }

    /// The socket, which from now on never waits. What was read behind the request is dropped.
    ///
    /// # Errors
    /// Where the socket is gone.
    pub fn into_stream(self) -> io::Result<TcpStream> {
        let stream = self.reader.into_inner().stream;
        stream.set_nonblocking(true)?;
        Ok(Arc::into_inner(stream).expect("nobody else has a socket that does not wait"))
    }
}

impl Answer {
    /// The head, up to and with the blank line. `last`: no other answer can follow.
    pub fn head(&self, last: bool) -> String {
        let length = format!("Content-Length: {}\r\n", self.body.len());
        let length = if self.body.is_empty() { "" } else { &length };
        let close = if last { "Connection: close\r\n" } else { "" };
        status_and_date(self.status) + &self.fields + length + close + "\r\n"
    }
}

/// The status line and the `Date` field of now, of what the library prints: it knows the phrases
/// and the calendar.
fn status_and_date(status: u16) -> String {
    let (mut text, answer) = (Vec::new(), Response::empty(StatusCode(status)));
    let printed = answer.raw_print(&mut text, HTTPVersion(1, 1), &[], true, None);
    printed.expect("memory takes all");
    let text = String::from_utf8_lossy(&text);
    let lines = text.split_inclusive('\n');
    let is_wanted = |line: &&str| line.starts_with("HTTP/") || line.starts_with("Date: ");
    lines.filter(is_wanted).collect()
}

/// What to answer where no more can be read.
fn unread(error: io::Error) -> Option<Refusal> {
    let late = error.kind() == ErrorKind::WouldBlock;
    late.then(|| Refusal::new(408, "the request did not come whole in time"))
}

/// The first byte of a request. Some clients send a line end behind a body: RFC 9112, section 2.2.
fn read_first(reader: &mut impl BufRead) -> Received<[u8; 1]> {
    let is_line_end = |byte: &io::Result<u8>| matches!(byte, Ok(b'\r' | b'\n'));
    // A few at most: a stranger could send them for ever.
    let mut bytes = reader.bytes().take(MAX_LINE_ENDS).skip_while(is_line_end);
    Ok([bytes.next().and_then(Result::ok).ok_or(None)?])
}

/// A request without its body.
fn read_head(reader: &mut impl BufRead, first: [u8; 1]) -> Received<Request> {
    ensure(first[0].is_ascii_graphic(), 400, "this is no HTTP request")?;
    let mut head = first.as_slice().chain(reader).take(MAX_HEAD);
    // Judged before the rest has come: whoever speaks another protocol need not wait.
    let mut request = parse_request_line(&read_line(&mut head, 414)?)?;
    loop {
        let line = read_line(&mut head, 431)?;
        if line.is_empty() {
            return Ok(request);
        }
        let room = request.fields.len() < MAX_FIELDS;
        ensure(room, 431, "the head has over 100 fields")?;
        request.fields.push(parse_field(&line)?);
    }
}

/// A line of a head without its end, which is CRLF and nothing else. What is above 0x7F, and may
/// stand in a value, becomes a character that may not elsewhere.
fn read_line(head: &mut Take<impl BufRead>, too_long: u16) -> Received<String> {
    let mut line = Vec::new();
    head.read_until(b'\n', &mut line).map_err(unread)?;
    let last = line.pop();
    let cut_off = last != Some(b'\n') && head.limit() == 0;
    ensure(!cut_off, too_long, "the head is over 8 KiB")?;
    let whole = last.ok_or(None)? == b'\n' && line.pop() == Some(b'\r');
    ensure(whole, 400, "a line of the head has to end with CRLF")?;
    let text = line.into_iter().map(|byte| char::from(byte.min(0x7f)));
    Ok(text.collect())
}

/// RFC 9110, section 5.6.2: what methods and the names of fields are made of.
fn is_token(word: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !word.is_empty() && word.chars().all(allowed)
}

/// RFC 9112, section 3: a request that as yet has neither fields nor a body.
fn parse_request_line(line: &str) -> Result<Request, Refusal> {
    let malformed = "the request line is malformed";
    let (method, rest) = line.split_once(' ').unwrap_or_default();
    let (target, version) = rest.split_once(' ').unwrap_or_default();
    let is_target = !target.is_empty() && target.bytes().all(|it| it.is_ascii_graphic());
    ensure(is_token(method) && is_target, 400, malformed)?;
    // A proxy is told whose path it is, which does not matter here.
    let is_http = |scheme: &str| ["http", "https"].contains(&&*scheme.to_ascii_lowercase());
    let target = match target.split_once("://") {
        Some((scheme, rest)) if is_http(scheme) => rest.trim_start_matches(|c| !"/?".contains(c)),
        _ => target,
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let request = Request {
        // By case: `head` is no HEAD, here as for a proxy.
        method: method.parse().expect("a token is a method"),
        path: path.into(),
        query: query.into(),
        modern: version == "HTTP/1.1",
        fields: Vec::new(),
        body: None,
    };
    match version.strip_prefix("HTTP/").unwrap_or_default().as_bytes() {
        b"1.0" | b"1.1" => Ok(request),
        [b'0'..=b'9', b'.', b'0'..=b'9'] => Err(Refusal::new(505, "HTTP/1.0 and 1.1 only")),
        _ => Err(Refusal::new(400, malformed)),
    }
}

/// RFC 9112, section 5. No space before the colon, and no folded line: the name is a token. No
/// line end that another reader might see: of control characters a value holds only tabs.
fn parse_field(line: &str) -> Result<Header, Refusal> {
    let (name, value) = line.split_once(':').unwrap_or_default();
    let is_control = |c: char| c < ' ' && c != '\t';
    let well_formed = is_token(name) && !value.contains(is_control);
    ensure(well_formed, 400, "a header line is malformed")?;
    Ok(Header::from_str(line).expect("a token, a colon, and ASCII"))
}

/// How long a body is, and that everybody else sees it so: RFC 9112, sections 3.2 and 6.3.
fn content_length(request: &Request) -> Result<u64, Refusal> {
    let values = |name| request.values(name).collect::<Vec<_>>();
    let unchunked = values("Transfer-Encoding").is_empty();
    ensure(unchunked, 411, "send a Content-Length, not in chunks")?;
    let named = match values("Host")[..] {
        [host] => !host.contains(['/', '?', '#', '@', ' ', '\t']),
        [] => !request.modern,
        _ => false,
    };
    ensure(named, 400, "a request has one Host, a name")?;
    let is_number = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
    match values("Content-Length")[..] {
        [] => Ok(0),
        // Digits too many for a number are over every limit.
        [length] if is_number(length) => Ok(length.parse().unwrap_or(u64::MAX)),
        _ => Err(Refusal::new(400, "a Content-Length is one plain number")),
    }
}
