//! The door to Branca and MessagePack: bytes from outside become checked types here, or nothing.

use std::time::{Duration, Instant, UNIX_EPOCH};
use std::{collections::BTreeMap, fmt, iter};

use branca::Branca;
use orion::hazardous::aead::xchacha20poly1305::{Nonce, SecretKey, open};
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};

use crate::event::{Event, Topic, Topics, draw};
use crate::{config::Key, error::Refusal, error::ensure};

/// Characters in the longest token of a query: 64 topics of 40 bytes.
pub const MAX_QUERY_TOKEN: usize = 4096;

/// Bytes of MessagePack in the longest body: 64 KiB of base62. To mint more takes branca's encoder
/// seconds, and minutes for a megabyte.
const MAX_PAYLOAD: usize = 48_700;

/// Digits of base62 that are read at once: the most whose value fits a limb of 64 bits.
const DIGITS: usize = 10;

/// What stands in front of the payload, in the clear: a version, the date, a nonce.
const HEADER: usize = 1 + 4 + 24;

/// What stands behind it, by which a change is seen.
const TAG: usize = 16;

type Opened<T> = Result<T, Refusal>;

/// How deep a payload may nest; ours nests three deep. Deeper ones could exhaust a thread's stack.
const MAX_DEPTH: usize = 16;

/// Seconds that the clock of a backend may be ahead of ours. A token dated further ahead could be
/// replayed for longer than its lifetime.
const MAX_AHEAD: u64 = 300;

/// What an events token permits, and until when.
pub struct Subscription {
    pub topics: Topics,
    pub ends: Instant,
}

/// A token whose maker had the secret.
struct Authentic {
    /// Seconds since 1970.
    dated: u64,
    /// Which key opened it, from 1.
    key: usize,
    payload: Vec<u8>,
}

/// What a payload may hold, as far as it is of use here. Printed for debugging it is JSON.
#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(untagged)]
enum Value {
    Text(String),
    List(Vec<Value>),
    Map(Fields),
    Other(#[serde(deserialize_with = "ignore")] ()),
}

/// Keys that are unknown, of whatever type, are ignored.
type Fields = BTreeMap<Value, Value>;

fn ignore<'de, D: Deserializer<'de>>(input: D) -> Result<(), D::Error> {
    IgnoredAny::deserialize(input).map(drop)
}

/// One key for both: what a token is good for is told by the list that it holds, `topics` or
/// `events`; one with both, which only somebody with the secret can make, is good for both.
impl Key {
    /// A token for `/events` that permits these topics, dated now.
    ///
    /// # Errors
    /// For no topics, one that is empty or too long, and more than a query may hold. How many
    /// topics a server takes is its setting, which is not known here.
    pub fn mint_subscription<T: AsRef<str>>(
        &self,
        topics: impl IntoIterator<Item = T>,
    ) -> Result<String, Refusal> {
        let topics: Opened<Vec<_>> = topics.into_iter().map(Topic::new).collect();
        let topics = topics?;
        ensure(!topics.is_empty(), 400, "a token needs a topic")?;
        let names: Vec<_> = topics.iter().map(Topic::name).collect();
        let token = self.mint(&BTreeMap::from([("topics", names)]))?;
        let fits = token.len() <= MAX_QUERY_TOKEN;
        ensure(fits, 414, "these topics are too many for one token")?;
        Ok(token)
    }

    /// A body for `/submit` with one event, dated now.
    ///
    /// # Errors
    /// As [`Event::new`], and for more than the longest body holds.
    pub fn mint_submission(&self, topic: &str, name: &str, data: &str) -> Result<String, Refusal> {
        let event = BTreeMap::from([("topic", topic), ("event", name), ("data", data)]);
        let checked = Event::new(topic, name, data);
        checked.and_then(|_| self.mint(&BTreeMap::from([("events", [event])])))
    }

    pub(crate) fn mint(&self, payload: &impl Serialize) -> Result<String, Refusal> {
        let payload = rmp_serde::to_vec(payload).expect("strings and lists always encode");
        let fits = payload.len() <= MAX_PAYLOAD;
        ensure(fits, 413, "this is more than a token of 64 KiB holds")?;
        let mut branca = Branca::new(&self.keys[0]).expect("the key has 32 bytes");
        Ok(branca.encode(&payload).expect("far below 256 GiB"))
    }

    /// The topics that a token of at most `ttl` seconds permits, each once, and until when: a
    /// moment drawn from the last tenth of the time it has left, so that not all end together.
    pub(crate) fn open_subscription(
        &self,
        token: &str,
        ttl: u64,
        max: u64,
    ) -> Opened<Subscription> {
        let token = self.open(token)?;
        let left = 1000 * token.left(ttl)?;
        let topics = list(&token.payload, "topics")?.into_iter();
        let topics: Opened<Topics> = topics.map(|it| Topic::new(it.text("a topic")?)).collect();
        let topics = topics?;
        let named = (1..=max).contains(&(topics.len() as u64));
        ensure(named, 400, "a token has 1 to SSE_MAX_TOPICS topics")?;
        let ends = Instant::now() + Duration::from_millis(left - draw(left / 10));
        Ok(Subscription { topics, ends })
    }

    /// The events of a submission of at most `ttl` seconds, all of them checked. Within that time
    /// it can be repeated, by whoever has seen it: nothing remembers what was taken. Without a
    /// `ttl` it may be of any date: another instance has looked at that.
    pub(crate) fn open_submission(
        &self,
        token: &str,
        ttl: impl Into<Option<u64>>,
    ) -> Opened<Vec<Event>> {
        let token = self.open(token)?;
        ttl.into().map_or(Ok(0), |ttl| token.left(ttl))?;
        let events = list(&token.payload, "events")?.into_iter();
        events.map(Value::event).collect()
    }

    /// As JSON: what a token holds, which key made it, how many seconds ago, and until when it is
    /// good, in seconds since 1970.
    ///
    /// # Errors
    /// Why a server with these settings refuses it.
    pub(crate) fn explain(
        &self,
        token: &str,
        token_ttl: u64,
        max_topics: u64,
        submit_ttl: u64,
    ) -> Result<String, Refusal> {
        let opened = self.open(token)?;
        let holds = decode(&opened.payload)?;
        let ttl = if holds.contains_key(&Value::Text("topics".into())) {
            self.open_subscription(token, token_ttl, max_topics)?;
            token_ttl
        } else {
            self.open_submission(token, submit_ttl)?;
            submit_ttl
        };
        let (holds, key, until) = (Value::Map(holds), opened.key, opened.dated + ttl);
        let age = now().saturating_sub(opened.dated);
        Ok(format!(
            r#"{{"holds": {holds:?}, "key": {key}, "age": {age}, "good_until": {until}}}"#
        ))
    }

    fn open(&self, token: &str) -> Opened<Authentic> {
        let refuse = |problem| Err(Refusal::new(401, problem));
        if token.is_empty() {
            return refuse("no token: it is what follows token= in the query, or the whole body");
        } else if token.starts_with(['{', '[']) {
            return refuse("this is JSON: a Branca token is wanted, around MessagePack");
        }
        let Some(bytes) = decode_base62(token) else {
            return refuse("no token: it is not base62, or begins with 0");
        };
        let [0xBA, a, b, c, d, ..] = bytes[..] else {
            return refuse("no Branca token: it begins otherwise");
        };
        if bytes.len() < HEADER + TAG {
            return refuse("no Branca token: it is too short");
        }
        let (header, sealed) = bytes.split_at(HEADER);
        let nonce = Nonce::from_slice(&header[5..]).expect("24 bytes");
        let mut payload = vec![0; sealed.len() - TAG];
        for (key, secret) in (1..).zip(&self.keys) {
            let secret = SecretKey::from_slice(secret).expect("32 bytes");
            if open(&secret, &nonce, sealed, Some(header), &mut payload).is_ok() {
                let dated = u32::from_be_bytes([a, b, c, d]).into();
                return Ok(Authentic {
                    key,
                    dated,
                    payload,
                });
            }
        }
        refuse(FOREIGN)
    }
}

const FOREIGN: &str = "made with another SSE_SECRET, or changed since: the key is the 32 bytes \
    for which the 64 hex digits stand";

/// The number that base62 stands for, as bytes, the most significant first. Takes time by the
/// square of the length: 0.9 ms for 16 KiB. A zero in front would only be another way to write it.
fn decode_base62(text: &str) -> Option<Vec<u8>> {
    // The least significant first.
    let mut limbs: Vec<u64> = Vec::new();
    let (first, rest) = text.as_bytes().split_at(text.len() % DIGITS);
    for digits in iter::once(first).chain(rest.chunks(DIGITS)) {
        let mut carry = 0;
        for digit in digits {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'A'..=b'Z' => digit - b'A' + 10,
                b'a'..=b'z' => digit - b'a' + 36,
                _ => return None,
            };
            carry = 62 * carry + u64::from(value);
        }
        for limb in &mut limbs {
            let wide = u128::from(*limb) * 62u128.pow(DIGITS as u32) + u128::from(carry);
            (*limb, carry) = (wide as u64, (wide >> 64) as u64);
        }
        limbs.extend((carry > 0).then_some(carry));
    }
    let bytes = limbs.iter().rev().flat_map(|limb| limb.to_be_bytes());
    (!text.starts_with('0')).then(|| bytes.skip_while(|byte| *byte == 0).collect())
}

/// Seconds since 1970. A clock that is set back makes what has expired good again, and what is new
/// dated ahead; set forward, it ends what is good. Streams that are open have a clock of their own.
fn now() -> u64 {
    UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}

impl Authentic {
    /// Seconds for which it is still good, of `ttl`.
    fn left(&self, ttl: u64) -> Opened<u64> {
        let now = now();
        let (age, ahead) = (
            now.saturating_sub(self.dated),
            self.dated.saturating_sub(now),
        );
        let problem = format!("dated {ahead} seconds ahead: the clocks of the machines differ");
        ensure(ahead <= MAX_AHEAD, 401, &problem)?;
        let ago = age.saturating_sub(ttl);
        let mut refusal = Refusal::new(401, format!("expired {ago} seconds ago: mint a new one"));
        refusal.expired = true;
        ttl.checked_sub(age).ok_or(refusal)
    }
}

/// Reads a payload that is one MessagePack map and nothing behind it.
fn decode(mut payload: &[u8]) -> Opened<Fields> {
    let mut decoder = rmp_serde::Deserializer::new(&mut payload);
    decoder.set_max_depth(MAX_DEPTH);
    match Value::deserialize(&mut decoder) {
        Ok(Value::Map(fields)) if payload.is_empty() => Ok(fields),
        // JSON begins with what to MessagePack is a number.
        Ok(_) => Err(wrong(
            "the payload has to be one map of MessagePack, not JSON",
        )),
        Err(error) => Err(wrong(&format!("the payload is not MessagePack: {error}"))),
    }
}

fn list(payload: &[u8], name: &str) -> Opened<Vec<Value>> {
    match decode(payload)?.remove(&Value::Text(name.into())) {
        Some(Value::List(list)) => Ok(list),
        Some(_) => Err(wrong(&format!("{name} has to be a list"))),
        None => Err(wrong(&format!("the payload has no {name}"))),
    }
}

fn wrong(problem: &str) -> Refusal {
    Refusal::new(400, problem)
}

impl Value {
    fn text(self, name: &str) -> Opened<String> {
        match self {
            Self::Text(text) => Ok(text),
            _ => Err(wrong(&format!("{name} has to be a string, in UTF-8"))),
        }
    }

    /// An event of a submission. What is left out is empty.
    fn event(self) -> Opened<Event> {
        let Self::Map(mut fields) = self else {
            return Err(wrong("an event has to be a map"));
        };
        let mut text = |name: &str| match fields.remove(&Value::Text(name.into())) {
            Some(value) => value.text(name),
            None => Ok(String::new()),
        };
        Event::new(&text("topic")?, &text("event")?, &text("data")?)
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(list) => f.debug_list().entries(list).finish(),
            Self::Map(fields) => {
                let named = fields
                    .iter()
                    .filter(|(name, _)| matches!(name, Self::Text(_)));
                f.debug_map().entries(named).finish()
            }
            Self::Text(text) => {
                let escape = |letter| match letter {
                    '"' | '\\' => format!("\\{letter}"),
                    ..' ' => format!("\\u{:04x}", u32::from(letter)),
                    _ => letter.into(),
                };
                let text: String = text.chars().map(escape).collect();
                write!(f, "\"{text}\"")
            }
            Self::Other(()) => f.write_str("\"?\""),
        }
    }
}
