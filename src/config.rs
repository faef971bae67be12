//! Every limit and timeout, with unit, default and reason, how they are read, and what they may be.

use std::io::{self, ErrorKind::InvalidInput, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::{array, collections::BTreeMap, fmt, fs, fs::File, str::FromStr};

/// The secret shared with the backends: 32 bytes, and while it is being replaced 32 more that
/// still open tokens. Has no way to be printed, not even for debugging.
#[derive(Clone)]
pub struct Key {
    /// One or two, of which the first mints.
    pub(crate) keys: Vec<[u8; 32]>,
}

/// The settings of one server, which [`Server::bind`](crate::Server::bind) checks. None of the
/// numbers may be zero; none means unlimited. Printed for debugging it hides the secret.
///
/// They bound the memory, as a sum: for each stream its topics, 24 bytes for each place in its
/// queue, `queue` events (shared by all who hear them), an event and 16 KiB that are being written,
/// and with Redis 1 MiB that it missed; for each of at most 4,096 other connections a head of 8
/// KiB, 4 KiB read ahead, `max_body` (and where it has the secret tens of times as much while that
/// is read) and a thread's stack. At the defaults, where no stream is read: 1 MiB for each that has
/// a topic of its own, 10 GiB in all, or five times that of events that are nothing but line ends;
/// 1 MiB together where all have the same; and 200 MiB for the other connections. With Redis
/// besides, 8 MiB for each of two readings and its connections. What the kernel holds for sockets
/// is its own setting: 4 MiB for one that does not read. Events of the embedding program are as
/// long as it makes them.
///
/// What is legal and can be unsafe, and no check sees: an address that strangers reach where there
/// is no TLS in front, or that of the metrics; a secret that was not drawn at random; a
/// `submit_ttl`, and with it a replay, of years; timeouts of hours, in which strangers keep their
/// connections; a `queue` of 65,536 places, 1.5 MiB for each idle stream.
#[derive(Clone, Debug)]
pub struct Config {
    /// The secret shared with the backends.
    pub key: Key,
    /// Address for clients and backends. Default 127.0.0.1:8000; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Seconds an events token lives, and a stream at most with it, but for two seconds, within
    /// which it is looked at, and for 300 by which the backend's clock may be ahead. Default 86400:
    /// a day.
    pub token_ttl: u64,
    /// Where a client with an expired events token is sent for a new one: a path of the same host,
    /// or a URL (so is what begins with two slashes). Default none: it is refused.
    pub renew_url: Option<String>,
    /// Seconds a submission lives, which bounds its replay; to this comes by how much the backend's
    /// clock is ahead, at most 300. Default 300: clocks may differ.
    pub submit_ttl: u64,
    /// Streams at once. Default 10000. Fewer where the process may not have so many descriptors, of
    /// which each server takes three quarters for itself: several in one process have to share.
    pub max_subscribers: u64,
    /// Topics in one token. Default 64: about as many as fit the longest token.
    pub max_topics: u64,
    /// Bytes of a submission. Default 16384, which takes a millisecond to open; at most 65536,
    /// which takes fifteen: base62 is quadratic.
    pub max_body: u64,
    /// Events that may wait for one subscriber before it is cut. Default 64: as a rule at
    /// most 1 MiB; of events that are nothing but line ends, 5 MiB.
    pub queue: u64,
    /// Seconds of silence before a comment is sent. Default 15: proxies give up after 60, the
    /// address translation of mobile networks after 30.
    pub heartbeat: u64,
    /// Milliseconds a client is told to wait before it reconnects; each is told between this and
    /// twice this. Default 3000: the clients of a restarted server come back over 3 seconds.
    pub retry: u64,
    /// Seconds for the head of a request, from its first byte on, and again for its body; also for
    /// an idle connection, and for each write of an answer. Default 10.
    pub read_timeout: u64,
    /// Seconds after which a stream that takes nothing is cut. Default 10.
    pub write_timeout: u64,
    /// Origins whose pages may read answers, with a comma between, or `*`, the default, for all:
    /// what protects a stream is its token, and no cookie is read.
    pub allow_origin: String,
    /// A second address that serves `GET /metrics` and nothing else. Default none.
    pub metrics_listen: Option<SocketAddr>,
    /// The Redis that makes several instances one server. Default none. Needs the feature `redis`.
    pub redis: Option<RedisUrl>,
}

/// `redis://[user:password@]host:port[/db]`. Has no way to be printed: it may hold a password.
#[derive(Clone)]
pub struct RedisUrl(pub String);

type Vars = BTreeMap<String, String>;

impl Config {
    /// The defaults, under this secret.
    ///
    /// # Errors
    /// Where the secret is not one, or two, of 64 hex digits.
    pub fn new(secret: &str) -> io::Result<Self> {
        Self::from_vars([("SSE_SECRET".into(), secret.into())])
    }

    /// Reads the `SSE_` variables among `vars`. One that means nothing here is warned about, not
    /// refused: orchestrators inject such names. Blocks where a file is read, or a name looked up.
    ///
    /// # Errors
    /// [`InvalidInput`]: the variable that is missing or cannot be used, what was seen (but of the
    /// secret), and what is wanted.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> io::Result<Self> {
        let vars = vars.into_iter();
        let mut vars: Vars = vars.filter(|(name, _)| name.starts_with("SSE_")).collect();
        let mut config = Self {
            key: read_secret(&mut vars)?.parse()?,
            listen: take_address(&mut vars, "SSE_LISTEN")?.unwrap_or(DEFAULT_LISTEN),
            token_ttl: 86_400,
            renew_url: vars.remove("SSE_RENEW_URL"),
            submit_ttl: 300,
            max_subscribers: 10_000,
            max_topics: 64,
            max_body: 16_384,
            queue: 64,
            heartbeat: 15,
            retry: 3000,
            read_timeout: 10,
            write_timeout: 10,
            allow_origin: vars.remove("SSE_ALLOW_ORIGIN").unwrap_or("*".into()),
            metrics_listen: take_address(&mut vars, "SSE_METRICS_LISTEN")?,
            redis: vars.remove("SSE_REDIS").map(RedisUrl),
        };
        for (name, number, most) in config.numbers() {
            if let Some(text) = vars.remove(name) {
                *number = text.parse().map_err(|_| wrong_number(name, &text, most))?;
            }
        }
        for name in vars.keys() {
            log::warn!("warning: a variable is no setting of this server: name={name}");
        }
        config.check()?;
        Ok(config)
    }

    /// Every number, with its name as a variable and the most that it may be.
    fn numbers(&mut self) -> [(&'static str, &mut u64, u64); 10] {
        [
            // Thirty years: no more is meant, and a token's date has 32 bits.
            ("SSE_TOKEN_TTL", &mut self.token_ttl, 1_000_000_000),
            ("SSE_SUBMIT_TTL", &mut self.submit_ttl, 1_000_000_000),
            ("SSE_MAX_SUBSCRIBERS", &mut self.max_subscribers, 1_000_000),
            ("SSE_MAX_TOPICS", &mut self.max_topics, 4096),
            ("SSE_MAX_BODY", &mut self.max_body, 1 << 16),
            ("SSE_QUEUE", &mut self.queue, 1 << 16),
            ("SSE_HEARTBEAT", &mut self.heartbeat, 86_400),
            ("SSE_RETRY", &mut self.retry, 86_400_000),
            ("SSE_READ_TIMEOUT", &mut self.read_timeout, 86_400),
            ("SSE_WRITE_TIMEOUT", &mut self.write_timeout, 86_400),
        ]
    }

    /// The one check of all settings, whoever made them.
    pub(crate) fn check(&mut self) -> io::Result<()> {
        for (name, number, most) in self.numbers() {
            if !(1..=most).contains(number) {
                return Err(wrong_number(name, number, most));
            }
        }
        if self.redis.is_some() && cfg!(not(feature = "redis")) {
            let problem = "SSE_REDIS needs a binary with the feature redis, which this is not";
            return Err(invalid(problem.into()));
        }
        // These two go into the heads of answers: a line end in one would forge fields.
        let mut origins = self.allow_origin.split(',').map(str::trim);
        if self.allow_origin != "*" && !origins.all(is_origin) {
            return Err(wrong("SSE_ALLOW_ORIGIN", &self.allow_origin, ORIGIN));
        }
        match &self.renew_url {
            Some(url) if !is_url(url) => Err(wrong("SSE_RENEW_URL", url, URL)),
            _ => Ok(()),
        }
    }
}

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

const ADDRESS: &str = "an address such as 127.0.0.1:8000, [::]:8000 or localhost:8000";

const ORIGIN: &str = "* or, with commas between, origins as browsers send them, such as \
    https://app.example,http://localhost:3000: no path, no capitals, no default port";

const URL: &str = "a path that begins with /, or a URL that begins with http:// or https://";

const SECRET: &str = "64 hex digits, which `sse-server secret` prints, or two such keys with a \
    comma between";

fn invalid(problem: String) -> io::Error {
    io::Error::new(InvalidInput, problem)
}

fn wrong(name: &str, seen: impl fmt::Debug, wanted: &str) -> io::Error {
    invalid(format!("{name} is {seen:?}: it has to be {wanted}"))
}

fn wrong_number(name: &str, seen: impl fmt::Debug, most: u64) -> io::Error {
    wrong(name, seen, &format!("a whole number from 1 to {most}"))
}

/// Of a name with several addresses the first of IPv4: who writes localhost means 127.0.0.1.
fn take_address(vars: &mut Vars, name: &str) -> io::Result<Option<SocketAddr>> {
    let Some(text) = vars.remove(name) else {
        return Ok(None);
    };
    let found = text.to_socket_addrs().into_iter().flatten();
    let first = found.min_by_key(SocketAddr::is_ipv6);
    first.map(Some).ok_or_else(|| wrong(name, &text, ADDRESS))
}

fn read_secret(vars: &mut Vars) -> io::Result<String> {
    match (vars.remove("SSE_SECRET"), vars.remove("SSE_SECRET_FILE")) {
        (Some(secret), None) => Ok(secret),
        // Not shown: it might be the secret, by mistake.
        (None, Some(path)) => fs::read_to_string(path)
            .map_err(|error| invalid(format!("SSE_SECRET_FILE cannot be read: {error}"))),
        (None, None) => Err(invalid(format!("SSE_SECRET is not set: it is {SECRET}"))),
        _ => Err(invalid(
            "SSE_SECRET and SSE_SECRET_FILE are both set".into(),
        )),
    }
}

/// Whether a browser could send it, which writes scheme and host small, and no default port.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else {
        return text == "null";
    };
    let port = match host.rsplit_once(':') {
        // An address of IPv6 has colons of its own.
        Some((_, port)) if !host.ends_with(']') => port,
        _ => "1",
    };
    let is_port = port.parse::<u16>().is_ok_and(|it| it.to_string() == port);
    let is_default = [("http", "80"), ("https", "443")].contains(&(scheme, port));
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-._:[]".contains(c);
    let named =
        !scheme.is_empty() && !host.is_empty() && text.replace("://", "").chars().all(allowed);
    named && is_port && !is_default
}

fn is_url(text: &str) -> bool {
    let begins = ["/", "http://", "https://"]
        .iter()
        .any(|it| text.starts_with(it));
    begins && text.bytes().all(|byte| byte.is_ascii_graphic())
}

impl Key {
    /// A fresh secret, 64 hex digits, from the system's random source.
    ///
    /// # Errors
    /// Where `/dev/urandom` cannot be read.
    pub fn fresh_secret() -> io::Result<String> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(hidden)")
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RedisUrl(hidden)")
    }
}

impl FromStr for Key {
    type Err = io::Error;

    /// 64 hex digits, or twice that with a comma between: the first mints, both open. White space
    /// around each is ignored. What is wrong is said without a character of it.
    fn from_str(text: &str) -> io::Result<Self> {
        let keys: Vec<_> = text.split(',').map(str::trim).collect();
        let digits = keys.concat();
        let problem = if digits.is_empty() {
            "is empty"
        } else if digits.contains(['"', '\'']) {
            "has quotes in it, which belong to a shell"
        } else if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            "has a character that is no hex digit"
        } else if keys.len() > 2 || keys.iter().any(|key| key.len() != 64) {
            "has too few hex digits, or too many"
        } else {
            let byte = |at| u8::from_str_radix(&digits[2 * at..][..2], 16).expect("hex digits");
            let keys = (0..keys.len()).map(|key| array::from_fn(|at| byte(32 * key + at)));
            return Ok(Self {
                keys: keys.collect(),
            });
        };
        Err(invalid(format!(
            "SSE_SECRET {problem}: it has to be {SECRET}"
        )))
    }
}
