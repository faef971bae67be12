//! Every limit and timeout, with unit, default and reason, and how they are read.

use std::{collections::BTreeMap, fs::File, io, io::Read, net::SocketAddr, str::FromStr};

/// The secret shared with the backends: 32 bytes, and while it is being replaced 32 more that
/// still open tokens. Has no way to be printed, not even for debugging.
#[derive(Clone)]
pub struct Key {
    /// One or two, of which the first mints.
    pub(crate) keys: Vec<[u8; 32]>,
}

/// The settings of one server. None of the numbers may be zero; none means unlimited.
#[derive(Clone)]
pub struct Config {
    /// The secret shared with the backends.
    pub key: Key,
    /// Address for clients and backends. Default 127.0.0.1:8000; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Seconds an events token lives, checked at connect only. Default 86400: a day.
    pub token_ttl: u32,
    /// Seconds a submission lives, which bounds its replay. Default 300: clocks may differ.
    pub submit_ttl: u32,
    /// Streams at once. Default 10000.
    pub max_subscribers: u32,
    /// Topics in one token. Default 64: about as many as fit the longest token.
    pub max_topics: u32,
    /// Bytes of a submission. Default 16384, which takes about 15 ms to open; at most 65536, which
    /// takes 0.4 s: base62 is quadratic.
    pub max_body: u32,
    /// Events that may wait for one subscriber before it is cut. Default 64: as a rule at
    /// most 1 MiB; of events that are nothing but line ends, 5 MiB.
    pub queue: u32,
    /// Seconds of silence before a comment is sent. Default 15: proxies give up after 60, the
    /// address translation of mobile networks after 30.
    pub heartbeat: u64,
    /// Milliseconds a client is told to wait before it reconnects; each is told between this and
    /// twice this. Default 3000: the clients of a restarted server come back over 3 seconds.
    pub retry: u32,
    /// Seconds for the head of a request, from its first byte on, and again for its body; also for
    /// an idle connection, and for a client to take an answer. Default 10.
    pub read_timeout: u64,
    /// Seconds after which a stream that takes nothing is cut. Default 10.
    pub write_timeout: u64,
    /// Value of `Access-Control-Allow-Origin`. Default `*`: what protects a stream is its token.
    pub allow_origin: String,
    /// A second address that serves `GET /metrics` and nothing else. Default none.
    pub metrics_listen: Option<SocketAddr>,
}

type Vars = BTreeMap<String, String>;

impl Config {
    /// The defaults, under this secret.
    ///
    /// # Errors
    /// Where the secret is not one, or two, of 64 hex digits.
    pub fn new(secret: &str) -> Result<Self, String> {
        Self::from_vars([("SSE_SECRET".into(), secret.into())].into_iter())
    }

    /// Reads the `SSE_` variables among `vars`. One that means nothing here is warned about, not
    /// refused: orchestrators inject such names.
    ///
    /// # Errors
    /// The name of a variable that is missing or cannot be used, and why.
    pub fn from_vars(vars: impl Iterator<Item = (String, String)>) -> Result<Self, String> {
        let mut vars: Vars = vars.filter(|(name, _)| name.starts_with("SSE_")).collect();
        let config = Self {
            key: parsed(&mut vars, "SSE_SECRET", "", "64 hex digits, or two keys")?,
            listen: parsed(&mut vars, "SSE_LISTEN", "127.0.0.1:8000", ADDRESS)?,
            // More could overflow the 32 bits of a token's date.
            token_ttl: number(&mut vars, "SSE_TOKEN_TTL", 86_400, 1_000_000_000)?,
            submit_ttl: number(&mut vars, "SSE_SUBMIT_TTL", 300, 1_000_000_000)?,
            max_subscribers: number(&mut vars, "SSE_MAX_SUBSCRIBERS", 10_000, 1_000_000)?,
            max_topics: number(&mut vars, "SSE_MAX_TOPICS", 64, 4096)?,
            max_body: number(&mut vars, "SSE_MAX_BODY", 16_384, 1 << 16)?,
            queue: number(&mut vars, "SSE_QUEUE", 64, 1 << 16)?,
            heartbeat: number(&mut vars, "SSE_HEARTBEAT", 15, 86_400)?.into(),
            retry: number(&mut vars, "SSE_RETRY", 3000, 86_400_000)?,
            read_timeout: number(&mut vars, "SSE_READ_TIMEOUT", 10, 86_400)?.into(),
            write_timeout: number(&mut vars, "SSE_WRITE_TIMEOUT", 10, 86_400)?.into(),
            allow_origin: vars.remove("SSE_ALLOW_ORIGIN").unwrap_or("*".into()),
            metrics_listen: match vars.contains_key("SSE_METRICS_LISTEN") {
                true => Some(parsed(&mut vars, "SSE_METRICS_LISTEN", "", ADDRESS)?),
                false => None,
            },
        };
        // It goes into every response head as it stands: a line break would forge headers.
        let origin = &config.allow_origin;
        if origin.is_empty() || !origin.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("SSE_ALLOW_ORIGIN must be * or an origin: https://app.example".into());
        }
        for name in vars.keys() {
            log::warn!("warning: {name} is no setting of this server");
        }
        Ok(config)
    }
}

const ADDRESS: &str = "an address such as 127.0.0.1:8000 or [::]:8000";

fn parsed<T: FromStr>(vars: &mut Vars, name: &str, default: &str, what: &str) -> Result<T, String> {
    let value = vars.remove(name).unwrap_or(default.into());
    value.parse().map_err(|_| format!("{name} must be {what}"))
}

fn number(vars: &mut Vars, name: &str, or: u32, largest: u32) -> Result<u32, String> {
    let what = format!("a whole number from 1 to {largest}");
    let number = parsed(vars, name, &or.to_string(), &what)?;
    if (1..=largest).contains(&number) {
        return Ok(number);
    }
    Err(format!("{name} must be {what}"))
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

impl FromStr for Key {
    type Err = ();

    /// 64 hex digits, or twice that with a comma between: the first mints, both open.
    fn from_str(text: &str) -> Result<Self, ()> {
        let keys: Option<Vec<_>> = text.split(',').map(parse_hex).collect();
        let keys = keys.filter(|keys| keys.len() <= 2).ok_or(())?;
        Ok(Self { keys })
    }
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut digits = text.chars().map(|digit| digit.to_digit(16));
    let mut key = [0; 32];
    for byte in &mut key {
        *byte = (digits.next()?? * 16 + digits.next()??) as u8;
    }
    digits.next().is_none().then_some(key)
}
