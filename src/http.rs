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

use crate::{config::Config, error::Refusal, error::ensure, token::Subscription};

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
    /// HTTP/1.1, whose clients understand chunks.
    pub modern: bool,
    /// Nothing where it is longer than `SSE_MAX_BODY`: then it is left unread.
    pub body: Option<Vec<u8>>,
    /// No other request can follow.
    pub last: bool,
}

pub struct Answer {
    pub status: u16,
    /// Whole lines, all but those that say how the connection goes on.
    pub fields: String,
    pub body: String,
    /// The connection becomes this stream, which begins with this head.
    pub stream: Option<Subscription>,
}

/// Connections whose threads wait for their clients, in the order in which they are closed to make
/// room. One that is being answered is not among them. Locked for a step in the tree.
pub type Waiting = Mutex<BTreeMap<Standing, Arc<TcpStream>>>;

/// Whether it has sent an authentic submission: those that have not go first. When it came, or was
/// last authentic: who came first goes first, so that neither dripping nor asking for `/ping` all
/// the time makes a connection young again. And what tells those of one moment apart.
type Standing = (bool, Instant, RawFd);

/// A socket that its thread waits for until the deadline, unless another one needs its place.
struct Socket<'a> {
    stream: Arc<TcpStream>,
    waiting: &'a Waiting,
    standing: Standing,
    deadline: Instant,
}

pub struct Connection<'a> {
    reader: BufReader<Socket<'a>>,
    /// For silence, a head, a body, or until an answer is taken.
    patience: Duration,
    max_body: u64,
}

impl Request {
    /// The values of a field, one for each comma and each line.
    pub fn values(&self, name: &'static str) -> impl Iterator<Item = &str> {
        let named = self.fields.iter().filter(move |it| it.field.equiv(name));
        named
            .flat_map(|it| it.value.as_str().split(','))
            .map(str::trim)
    }
}

impl Socket<'_> {
    fn wait<T>(&self, act: impl FnOnce(&TcpStream) -> io::Result<T>) -> io::Result<T> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::WouldBlock.into());
        }
        let stream = self.stream.clone();
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        self.waiting.lock().insert(self.standing, stream);
        let result = act(&self.stream);
        match self.waiting.lock().remove(&self.standing) {
            Some(_) => result,
            None => Err(ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.wait(|mut stream| stream.read(buffer)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl<'a> Connection<'a> {
    pub fn new(stream: TcpStream, config: &Config, waiting: &'a Waiting) -> Self {
        let now = Instant::now();
        let socket = Socket {
            standing: (false, now, stream.as_raw_fd()),
            stream: Arc::new(stream),
            waiting,
            deadline: now,
        };
        Self {
            reader: BufReader::with_capacity(BUFFER, socket),
            patience: Duration::from_secs(config.read_timeout),
            max_body: config.max_body.into(),
        }
    }

    fn wait_until(&mut self, deadline: Instant) {
        self.reader.get_mut().deadline = deadline;
    }

    /// The next request. Waits for the client, but no longer than the settings say.
    ///
    /// # Errors
    /// Why what came is no request, to be answered; or nothing, where the client left, was silent
    /// for too long, or made room. Either way the connection has to be closed.
    pub fn receive(&mut self) -> Result<Request, Option<Refusal>> {
        self.wait_until(Instant::now() + self.patience);
        // Some clients send a line end behind a body: RFC 9112, section 2.2.
        while let [b'\r' | b'\n', ..] = self.reader.fill_buf().map_err(|_| None)? {
            self.reader.consume(1);
        }
        self.wait_until(Instant::now() + self.patience);
        let mut request = self.receive_head()?;
        let length = content_length(&request)?;
        if length > self.max_body {
            request.last = true;
            return Ok(request);
        }
        self.wait_until(Instant::now() + self.patience);
        let (expects, came) = (
            request.values("Expect").count() > 0,
            self.reader.buffer().len(),
        );
        if expects && request.modern && (came as u64) < length {
            self.write("HTTP/1.1 100 Continue\r\n\r\n")
                .map_err(unread)?;
        }
        let mut body = vec![0; length as usize];
        self.reader.read_exact(&mut body).map_err(unread)?;
        request.body = Some(body);
        Ok(request)
    }

    fn receive_head(&mut self) -> Result<Request, Option<Refusal>> {
        let come = self.reader.fill_buf().map_err(unread)?;
        let first = come.first().ok_or(None)?;
        let begins = is_token(&char::from(*first).to_string());
        ensure(begins, 400, "this is no HTTP request")?;
        let mut head = self.reader.by_ref().take(MAX_HEAD);
        // Judged before the rest has come: whoever speaks another protocol need not wait.
        let line = read_line(&mut head, 414)?;
        let (method, target, modern) = parse_request_line(&line)?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut request = Request {
            method: method.parse().expect("a token is a method"),
            path: path.into(),
            query: query.into(),
            fields: Vec::new(),
            modern,
            body: None,
            last: !modern,
        };
        loop {
            let line = read_line(&mut head, 431)?;
            if line.is_empty() {
                break;
            }
            request.fields.push(parse_field(&line)?);
        }
        let options = request.values("Connection");
        let closing = options.filter(|it| it.eq_ignore_ascii_case("close"));
        request.last |= closing.count() > 0;
        Ok(request)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.wait_until(Instant::now() + self.patience);
        let socket = self.reader.get_ref();
        socket.wait(|mut stream| stream.write_all(text.as_bytes()))
    }

    /// Answers a request, or what was none. `last`: no other can follow.
    ///
    /// # Errors
    /// Where the client does not take the answer, or made room: no other can follow.
    pub fn answer(&mut self, answer: &Answer, head_only: bool, last: bool) -> io::Result<()> {
        let body = if head_only { "" } else { &answer.body };
        self.write(&(answer.head(last) + body))
    }

    /// What came last was made with the secret.
    pub fn is_authentic(&mut self) {
        let socket = self.reader.get_mut();
        let (_, _, descriptor) = socket.standing;
        socket.standing = (true, Instant::now(), descriptor);
    }

    /// Ends the connection so that the client sees the last answer.
    pub fn close(mut self) {
        _ = self.reader.get_ref().stream.shutdown(Shutdown::Write);
        self.wait_until(Instant::now() + LINGER);
        _ = io::copy(self.reader.get_mut(), &mut io::sink());
    }

    /// The socket, which from now on never waits. What was read behind the request is dropped.
    ///
    /// # Errors
    /// Where the socket is gone.
    pub fn into_stream(self) -> io::Result<TcpStream> {
        let stream = self.reader.into_inner().stream;
        stream.set_nonblocking(true)?;
        Ok(Arc::into_inner(stream).expect("only a socket that waits is there twice"))
    }
}

impl Answer {
    /// The head, up to and with the blank line. `last`: no other answer can follow.
    pub fn head(&self, last: bool) -> String {
        let phrase = StatusCode(self.status).default_reason_phrase();
        let (status, fields, date) = (self.status, &self.fields, date());
        let close = if last { "Connection: close\r\n" } else { "" };
        format!("HTTP/1.1 {status} {phrase}\r\n{date}\r\n{fields}{close}\r\n")
    }
}

/// The `Date` field of now. The library's own printer knows the calendar.
fn date() -> String {
    let (mut text, nothing) = (Vec::new(), Response::empty(200));
    let printed = nothing.raw_print(&mut text, HTTPVersion(1, 1), &[], true, None);
    printed.expect("memory takes all");
    let text = String::from_utf8_lossy(&text);
    let date = text.lines().find(|line| line.starts_with("Date: "));
    date.expect("it prints one").into()
}

/// What to answer where no more can be read.
fn unread(error: io::Error) -> Option<Refusal> {
    let late = error.kind() == ErrorKind::WouldBlock;
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
    let (words, wrong) = (
        line.split(' ').collect::<Vec<_>>(),
        "the request line is malformed",
    );
    let [method, target, version] = words[..] else {
        return Err(Refusal::new(400, wrong));
    };
    let is_target = !target.is_empty() && target.bytes().all(|it| it.is_ascii_graphic());
    ensure(is_token(method) && is_target, 400, wrong)?;
    // A proxy is told whose path it is, which does not matter here.
    let is_http = |scheme: &str| ["http", "https"].contains(&&*scheme.to_ascii_lowercase());
    let target = match target.split_once("://") {
        Some((scheme, rest)) if is_http(scheme) => {
            rest.find(['/', '?']).map_or("", |begin| &rest[begin..])
        }
        _ => target,
    };
    match version.strip_prefix("HTTP/").unwrap_or_default().as_bytes() {
        b"1.1" => Ok((method, target, true)),
        b"1.0" => Ok((method, target, false)),
        [b'0'..=b'9', b'.', b'0'..=b'9'] => Err(Refusal::new(505, "HTTP/1.0 and 1.1 only")),
        _ => Err(Refusal::new(400, wrong)),
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
    let declared = values("Transfer-Encoding").is_empty();
    ensure(declared, 411, "send a Content-Length, not in chunks")?;
    let (hosts, lengths) = (values("Host"), values("Content-Length"));
    let is_host = |host: &&str| !host.contains(['/', '?', '#', '@', ' ', '\t']);
    let named = hosts.len() == 1 || hosts.is_empty() && !request.modern;
    let named = named && hosts.iter().all(is_host);
    ensure(named, 400, "a request has one Host, a name")?;
    let is_number = |it: &&str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
    let counted = lengths.len() <= 1 && lengths.iter().all(is_number);
    ensure(counted, 400, "a Content-Length is one plain number")?;
    // Digits too many for a number are over every limit.
    let parsed = |digits: &&str| digits.parse().unwrap_or(u64::MAX);
    Ok(lengths.first().map_or(0, parsed))
}
