//! One connection: requests are read within limits, answers written, until it ends or becomes a
//! stream. Knows no path and no token. What it takes of RFC 9112 is strict: what two readers could
//! understand differently is refused, and ends the connection.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Take, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::{str::FromStr, sync::Arc, time::Duration, time::Instant};

use parking_lot::Mutex;
use tiny_http::{HTTPVersion, Header, Method, Response, StatusCode};

use crate::{config::Config, error::Refusal, error::ensure, event::Topics, subscriber::Stream};

/// Bytes of a request line and its header fields together: what nginx takes of one line.
const MAX_HEAD: u64 = 8 * 1024;

/// Bytes that are read ahead: of a head, or of the requests behind this one.
const BUFFER: usize = 4 * 1024;

/// How long a client may take to read the last answer of a connection. To close while its bytes
/// are unread would reset it, and the answer would be lost.
const LINGER: Duration = Duration::from_secs(1);

/// A request that is whole and well-formed.
pub struct Request {
    pub method: Method,
    pub path: String,
    pub query: String,
    /// A byte above 0x7F in a value, which browsers and proxies do send, stands here as 0x7F.
    pub fields: Vec<Header>,
    /// Nothing where it is longer than `SSE_MAX_BODY`: then it is left unread.
    pub body: Option<Vec<u8>>,
}

pub struct Answer {
    pub status: u16,
    /// Whole lines, all but those that say where the body ends and how the connection goes on.
    pub fields: String,
    pub body: Body,
    /// To a request that was made with the secret.
    pub authentic: bool,
}

pub enum Body {
    Nothing,
    Text(String),
    /// The connection becomes a stream of these topics, unless only the head was asked for.
    Stream(Topics),
}

/// Connections whose threads wait for their clients, in the order in which they are closed to make
/// room. One that is being answered is not among them. Locked for a step in the tree.
pub type Waiting = Mutex<BTreeMap<Standing, Arc<TcpStream>>>;

/// Whether it was authentic: those that never were go first. Since when: who came first goes first,
/// so that neither dripping nor asking for `/ping` all the time makes a connection young again. And
/// what tells those of one moment apart.
type Standing = (bool, Instant, RawFd);

/// What is read until a deadline, however it drips.
struct Socket {
    stream: Arc<TcpStream>,
    deadline: Instant,
}

pub struct Connection<'a> {
    reader: BufReader<Socket>,
    config: &'a Config,
    waiting: &'a Waiting,
    /// Has sent an authentic submission.
    authentic: bool,
    /// When it came, or was last authentic.
    since: Instant,
    /// The client speaks HTTP/1.1, and understands chunks.
    modern: bool,
    /// Only the head of the next answer is sent.
    pub head_only: bool,
    /// The next answer ends the connection.
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

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // No time left is an error here.
        self.stream.set_read_timeout(Some(left))?;
        (&*self.stream).read(buffer)
    }
}

impl<'a> Connection<'a> {
    /// # Errors
    /// Where the socket is gone.
    pub fn new(stream: TcpStream, config: &'a Config, waiting: &'a Waiting) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(Duration::from_secs(config.read_timeout)))?;
        let (stream, deadline) = (Arc::new(stream), Instant::now());
        let socket = Socket { stream, deadline };
        Ok(Self {
            reader: BufReader::with_capacity(BUFFER, socket),
            config,
            waiting,
            authentic: false,
            since: Instant::now(),
            modern: false,
            head_only: false,
            last: false,
        })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.reader.get_ref().stream
    }

    /// Does what depends on the client. Nothing where the connection was closed meanwhile, to make
    /// room for another: then it has to be let go of at once.
    fn wait<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let stream = self.reader.get_ref().stream.clone();
        let standing = (self.authentic, self.since, stream.as_raw_fd());
        self.waiting.lock().insert(standing, stream);
        let result = act(self);
        let remained = self.waiting.lock().remove(&standing);
        remained.map(|_| result)
    }

    fn grant(&mut self, time: Duration) {
        self.reader.get_mut().deadline = Instant::now() + time;
    }

    /// The next request. Waits for the client, but no longer than the settings say.
    ///
    /// # Errors
    /// Why what came is no request, to be answered; or nothing, where the client left, was silent
    /// for too long, or made room: then the connection has to be closed.
    pub fn receive(&mut self) -> Result<Request, Option<Refusal>> {
        self.wait(Self::read_request).unwrap_or(Err(None))
    }

    fn read_request(&mut self) -> Result<Request, Option<Refusal>> {
        let patience = Duration::from_secs(self.config.read_timeout);
        // What is no request has no end behind which the next could begin.
        (self.last, self.head_only) = (true, false);
        self.grant(patience);
        // Some clients send a line end behind a body: RFC 9112, section 2.2.
        let is_line_end = |byte: &io::Result<u8>| matches!(byte, Ok(b'\r' | b'\n'));
        let mut bytes = self.reader.by_ref().bytes().skip_while(is_line_end);
        let first = [bytes.next().and_then(Result::ok).ok_or(None)?];
        self.grant(patience);
        let begins = is_token(&char::from(first[0]).to_string());
        ensure(begins, 400, "this is no HTTP request")?;
        let mut head = first.as_slice().chain(&mut self.reader).take(MAX_HEAD);
        // Judged before the rest has come: whoever speaks another protocol need not wait.
        let line = read_line(&mut head, 414)?;
        let (method, target, modern) = parse_request_line(&line)?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut request = Request {
            method: method.parse().expect("a token is a method"),
            path: path.into(),
            query: query.into(),
            fields: Vec::new(),
            body: None,
        };
        let mut line = read_line(&mut head, 431)?;
        while !line.is_empty() {
            request.fields.push(parse_field(&line)?);
            line = read_line(&mut head, 431)?;
        }
        (self.modern, self.head_only) = (modern, request.method == Method::Head);
        let length = content_length(&request, modern)?;
        if length > self.config.max_body.into() {
            return Ok(request);
        }
        self.grant(patience);
        let come = self.reader.buffer().len() as u64;
        if modern && come < length && request.values("Expect").next().is_some() {
            let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
            self.socket().write_all(go_on).map_err(unread)?;
        }
        let mut body = vec![0; length as usize];
        self.reader.read_exact(&mut body).map_err(unread)?;
        request.body = Some(body);
        let is_close = |it: &str| it.eq_ignore_ascii_case("close");
        self.last = !modern || request.values("Connection").any(is_close);
        Ok(request)
    }

    /// Answers what was received last. Nothing where no other request can follow: the answer said
    /// so, or the client did not take it, or made room. `ending`: whether the server is.
    pub fn answer(mut self, answer: &Answer, ending: bool) -> Option<Self> {
        if answer.authentic {
            (self.authentic, self.since) = (true, Instant::now());
        }
        self.last |= ending;
        let mut text = self.head(answer);
        if let Body::Text(body) = &answer.body
            && !self.head_only
        {
            text += body;
        }
        let written = self.wait(|it| it.socket().write_all(text.as_bytes()))?;
        if written.is_ok() && !self.last {
            return Some(self);
        }
        _ = self.socket().shutdown(Shutdown::Write);
        self.grant(LINGER);
        _ = self.wait(|it| io::copy(it.reader.get_mut(), &mut io::sink()));
        None
    }

    /// The stream that begins with this answer. What was read behind the request is dropped.
    ///
    /// # Errors
    /// Where the socket is gone.
    pub fn into_stream(mut self, answer: &Answer) -> io::Result<Stream> {
        self.last = true;
        let (head, chunked, retry) = (self.head(answer), self.modern, self.config.retry);
        let socket = Arc::into_inner(self.reader.into_inner().stream);
        let socket = socket.expect("only a socket that waits is there twice");
        socket.set_nonblocking(true)?;
        Ok(Stream::new(Box::new(socket), head, chunked, retry))
    }

    /// The head, up to and with the blank line.
    fn head(&self, answer: &Answer) -> String {
        let begin = status_and_date(answer.status);
        let framing = match &answer.body {
            Body::Text(text) => format!("Content-Length: {}\r\n", text.len()),
            Body::Stream(_) if self.modern => "Transfer-Encoding: chunked\r\n".into(),
            Body::Stream(_) | Body::Nothing => String::new(),
        };
        let close = if self.last {
            "Connection: close\r\n"
        } else {
            ""
        };
        format!("{begin}{}{framing}{close}\r\n", answer.fields)
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
    let late = matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::InvalidInput
    );
    late.then(|| Refusal::new(408, "the request did not come whole in time"))
}

/// A line of a head without its end, which is CRLF and nothing else. What is above 0x7F, and may
/// stand in a value, becomes a character that may not elsewhere.
fn read_line(head: &mut Take<impl BufRead>, too_long: u16) -> Result<String, Option<Refusal>> {
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

/// Method, target, and whether it is HTTP/1.1: RFC 9112, section 3.
fn parse_request_line(line: &str) -> Result<(&str, &str, bool), Refusal> {
    let malformed = "the request line is malformed";
    let (method, rest) = line.split_once(' ').unwrap_or_default();
    let (target, version) = rest.split_once(' ').unwrap_or_default();
    let is_target = !target.is_empty() && target.bytes().all(|it| it.is_ascii_graphic());
    ensure(is_token(method) && is_target, 400, malformed)?;
    // A proxy is told whose path it is, which does not matter here.
    let is_http = |scheme: &str| ["http", "https"].contains(&&*scheme.to_ascii_lowercase());
    let path = match target.split_once("://") {
        Some((scheme, rest)) if is_http(scheme) => rest.find(['/', '?']).map(|at| &rest[at..]),
        _ => Some(target),
    };
    let modern = match version.as_bytes() {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => {
            return Err(Refusal::new(505, "HTTP/1.0 and 1.1 only"));
        }
        _ => return Err(Refusal::new(400, malformed)),
    };
    Ok((method, path.unwrap_or_default(), modern))
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
fn content_length(request: &Request, modern: bool) -> Result<u64, Refusal> {
    let values = |name| request.values(name).collect::<Vec<_>>();
    let declared = values("Transfer-Encoding").is_empty();
    ensure(declared, 411, "send a Content-Length, not in chunks")?;
    let named = match values("Host")[..] {
        [host] => !host.contains(['/', '?', '#', '@', ' ', '\t']),
        [] => !modern,
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
