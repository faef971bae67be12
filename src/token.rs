//! The door to Branca and MessagePack: bytes from outside become checked types here, or nothing.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::{collections::BTreeMap, time::UNIX_EPOCH};

use branca::{Branca, decode_with_timestamp, errors::Error};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned, de::IgnoredAny};

use crate::event::{Event, Topic, Topics};
use crate::{config::Key, error::Refusal, error::ensure};

/// Base62 is quadratic and comes before authentication (10 KB: 6 ms). Tokens from this length on
/// are opened one at a time, which keeps a flood of forged ones to one core; shorter ones take a
/// fifth of a millisecond at most and pass beside them.
const LONG_TOKEN: usize = 2048;

/// Threads at most that wait for one another with such tokens. With each waits its connection,
/// which then cannot make room for another.
const MAX_WAITING: usize = 48;

/// Forged submissions hold up no subscription, nor the other way round.
static LONG_SUBSCRIPTIONS: Queue = Queue::new();
static LONG_SUBMISSIONS: Queue = Queue::new();

/// Lets one thread through at a time.
struct Queue {
    turn: Mutex<()>,
    waiting: AtomicUsize,
}

type Opened<T> = Result<T, Refusal>;

/// How deep a payload may nest; ours nests three deep. Deeper ones could exhaust a thread's stack.
const MAX_DEPTH: usize = 16;

/// Seconds that the clock of a backend may be ahead of ours. A token dated further ahead could be
/// replayed for longer than its lifetime.
const MAX_AHEAD: u64 = 300;

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
        let mut branca = Branca::new(&self.keys[0]).expect("the key has 32 bytes");
        branca.encode(&payload).expect("far below 256 GiB")
    }

    /// The topics that a token of at most `ttl` seconds permits, each once.
    pub(crate) fn open_subscription(&self, token: &str, ttl: u32, max: u32) -> Opened<Topics> {
        let subscription: Subscription = self.open(token, ttl, &LONG_SUBSCRIPTIONS)?;
        let topics: Result<Topics, _> = subscription.topics.iter().map(Topic::new).collect();
        let (topics, max) = (topics?, max as usize);
        let named = (1..=max).contains(&topics.len());
        ensure(named, 400, "a token has 1 to SSE_MAX_TOPICS topics")?;
        Ok(topics)
    }

    /// The events of a submission of at most `ttl` seconds, all of them checked.
    pub(crate) fn open_submission(&self, token: &str, ttl: u32) -> Opened<Vec<Event>> {
        let submission: Submission = self.open(token, ttl, &LONG_SUBMISSIONS)?;
        let checked = |raw: &RawEvent| Event::new(&raw.topic, &raw.event, &raw.data);
        submission.events.iter().map(checked).collect()
    }

    fn open<T: DeserializeOwned>(&self, token: &str, ttl: u32, long: &Queue) -> Opened<T> {
        ensure(!token.is_empty(), 401, "no token in the query or body")?;
        let open = || {
            let mut attempts = self
                .keys
                .iter()
                .map(|key| decode_with_timestamp(token, key));
            // What is no token at all is none under the next key either.
            attempts.find(|it| !matches!(it, Err(Error::DecryptFailed)))
        };
        let opened = match token.len() {
            ..LONG_TOKEN => open(),
            _ => long.pass(open)?,
        };
        let foreign = Refusal::new(401, "not a token made with this server's SSE_SECRET");
        let (dated, payload) = opened.and_then(Result::ok).ok_or(foreign)?;
        let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        let dated = u64::from(dated);
        let expired = now > dated + u64::from(ttl);
        ensure(!expired, 401, "the token has expired: mint a new one")?;
        let problem = "the token is dated ahead: the clocks of backend and server differ";
        ensure(dated <= now + MAX_AHEAD, 401, problem)?;
        decode(&payload)
    }
}

impl Queue {
    const fn new() -> Self {
        Self {
            turn: Mutex::new(()),
            waiting: AtomicUsize::new(0),
        }
    }

    /// # Errors
    /// Where too many wait already.
    fn pass<T>(&self, act: impl FnOnce() -> T) -> Opened<T> {
        let before = self.waiting.fetch_add(1, SeqCst);
        let result = (before < MAX_WAITING).then(|| {
            let _turn = self.turn.lock();
            act()
        });
        self.waiting.fetch_sub(1, SeqCst);
        result.ok_or_else(|| Refusal::new(503, "too many long tokens: try later"))
    }
}

/// Reads a payload that is one MessagePack map and nothing behind it.
fn decode<T: DeserializeOwned>(mut payload: &[u8]) -> Opened<T> {
    let mut decoder = rmp_serde::Deserializer::new(&mut payload);
    decoder.set_max_depth(MAX_DEPTH);
    let decoded = T::deserialize(&mut decoder);
    let wrong = |error| Refusal::new(400, format!("wrong payload: {error}"));
    let value = decoded.map_err(wrong)?;
    ensure(payload.is_empty(), 400, "wrong payload: more than one map")?;
    Ok(value)
}
