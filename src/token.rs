//! The door to Branca and MessagePack: bytes from outside become checked types here, or nothing.

use std::{collections::BTreeMap, fs::File, io, io::Read, str::FromStr};

use branca::{Branca, errors::Error};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned, de::IgnoredAny};

use crate::{config::Config, error::Refusal, event::Event, event::Topic, event::Topics};

/// Base62 is quadratic and comes before authentication (10 KB: 6 ms). Tokens from this length on
/// are opened one at a time, which keeps a flood of forged ones to one core; shorter ones take a
/// fifth of a millisecond at most and pass beside them.
const LONG_TOKEN: usize = 2048;
static LONG_TOKENS: Mutex<()> = Mutex::new(());

/// How deep a payload may nest; ours nests three deep. Deeper ones could exhaust a thread's stack.
const MAX_DEPTH: usize = 16;

/// The secret shared with the backends: 32 bytes, and while it is being replaced 32 more that
/// still open tokens. Has no way to be printed, not even for debugging.
#[derive(Clone)]
pub struct Key {
    current: [u8; 32],
    /// The same where there is only one.
    previous: [u8; 32],
}

/// Unknown keys are ignored. That each of these structs collects them, flattened, also keeps serde
/// from taking a list, or numbers for keys, in place of the map that is agreed.
#[derive(Deserialize)]
struct Subscription {
    topics: Vec<String>,
    #[serde(flatten)]
    _unknown: IgnoredAny,
}

#[derive(Deserialize)]
struct Submission {
    events: Vec<RawEvent>,
    #[serde(flatten)]
    _unknown: IgnoredAny,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawEvent {
    topic: String,
    event: String,
    data: String,
    #[serde(flatten)]
    _unknown: IgnoredAny,
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

    /// A token for `/events` that permits these topics, dated now.
    ///
    /// # Errors
    /// For a topic that is empty or too long.
    pub fn mint_subscription(&self, topics: &[&str]) -> Result<String, Refusal> {
        let checked: Result<Topics, _> = topics.iter().map(Topic::new).collect();
        checked.map(|_| self.mint(&BTreeMap::from([("topics", topics)])))
    }

    /// A body for `/submit` with one event, dated now.
    ///
    /// # Errors
    /// As [`Event::new`].
    pub fn mint_submission(&self, topic: &str, name: &str, data: &str) -> Result<String, Refusal> {
        let event = BTreeMap::from([("topic", topic), ("event", name), ("data", data)]);
        let checked = Event::new(topic, name, data);
        checked.map(|_| self.mint(&BTreeMap::from([("events", [event])])))
    }

    fn mint(&self, payload: &impl Serialize) -> String {
        let payload = rmp_serde::to_vec(payload).expect("strings and lists always encode");
        let mut branca = Branca::new(&self.current).expect("the key has 32 bytes");
        branca.encode(&payload).expect("far below 256 GiB")
    }

    /// The topics a token permits, each once.
    pub(crate) fn open_subscription(&self, token: &str, of: &Config) -> Result<Topics, Refusal> {
        let topics = self.open::<Subscription>(token, of.token_ttl)?.topics;
        let topics: Topics = topics.iter().map(Topic::new).collect::<Result<_, _>>()?;
        if (1..=of.max_topics as usize).contains(&topics.len()) {
            return Ok(topics);
        }
        Err(Refusal::new(400, "a token has 1 to SSE_MAX_TOPICS topics"))
    }

    /// The events of a submission, all of them checked.
    pub(crate) fn open_submission(&self, token: &str, of: &Config) -> Result<Vec<Event>, Refusal> {
        let events = self.open::<Submission>(token, of.submit_ttl)?.events;
        let checked = |raw: &RawEvent| Event::new(&raw.topic, &raw.event, &raw.data);
        events.iter().map(checked).collect()
    }

    fn open<T: DeserializeOwned>(&self, token: &str, ttl: u32) -> Result<T, Refusal> {
        let _one_at_a_time = (token.len() >= LONG_TOKEN).then(|| LONG_TOKENS.lock());
        let mut opened = branca::decode(token, &self.current, ttl);
        if matches!(opened, Err(Error::DecryptFailed)) && self.previous != self.current {
            opened = branca::decode(token, &self.previous, ttl);
        }
        let refused = |problem: &str| Err(Refusal::new(401, problem));
        match opened {
            Ok(payload) => decode(&payload).map_err(|problem| Refusal::new(400, problem)),
            Err(_) if token.is_empty() => refused("no token in the query or body"),
            Err(Error::ExpiredToken) => refused("the token has expired: mint a new one"),
            Err(_) => refused("not a token made with this server's SSE_SECRET"),
        }
    }
}

/// Reads a payload that is one MessagePack map and nothing behind it.
fn decode<T: DeserializeOwned>(mut payload: &[u8]) -> Result<T, String> {
    let mut decoder = rmp_serde::Deserializer::new(&mut payload);
    decoder.set_max_depth(MAX_DEPTH);
    let decoded = T::deserialize(&mut decoder);
    let value = decoded.map_err(|error| format!("wrong payload: {error}"))?;
    let whole = payload.is_empty().then_some(value);
    whole.ok_or("the payload is more than one MessagePack map".into())
}

impl FromStr for Key {
    type Err = ();

    /// 64 hex digits, or twice that with a comma between: the first mints, both open.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (current, previous) = text.split_once(',').unwrap_or((text, text));
        let current = parse_hex(current).ok_or(())?;
        let previous = parse_hex(previous).ok_or(())?;
        Ok(Self { current, previous })
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
