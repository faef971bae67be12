//! What a payload holds, by a reader of MessagePack that shares no code with the server's: the
//! oracle of the fuzz tests.
#![allow(dead_code)] // Each program of the fuzz tests needs a part of this.

/// The limits of a server with default settings.
const MAX_TOPICS: usize = 64;
const MAX_TOPIC: usize = 256;

/// Deeper than any valid payload needs, and where a reader may refuse one for its depth.
const DEEP: usize = 12;

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<T> {
    Valid(T),
    Wrong,
    /// Neither the protocol nor the README says: very deep, extension types, keys that are no
    /// strings. It may be taken or refused.
    Unsaid,
}

use Verdict::{Unsaid, Valid, Wrong};

/// Topic, name, data.
pub type Event = (String, String, String);

/// What a token for `/events` permits: its topics, sorted, each once.
pub fn subscription(payload: &[u8]) -> Verdict<Vec<String>> {
    with_fields(payload, |fields| {
        let mut topics = strings(fields.one("topics")??)?;
        topics.sort();
        topics.dedup();
        let fits = |topic: &String| (1..=MAX_TOPIC).contains(&topic.len());
        ((1..=MAX_TOPICS).contains(&topics.len()) && topics.iter().all(fits)).then_some(topics)
    })
}

/// The events of a submission.
pub fn submission(payload: &[u8]) -> Verdict<Vec<Event>> {
    with_fields(payload, |fields| {
        let Value::List(events) = fields.one("events")?? else {
            return None;
        };
        events.iter().map(event).collect()
    })
}

fn event(value: &Value) -> Option<Event> {
    let Value::Map(entries) = value else {
        return None;
    };
    let fields = Fields(entries);
    let text = |name| match fields.one(name)? {
        Some(value) => string(value),
        None => Some(String::new()),
    };
    let (topic, name, data) = (text("topic")?, text("event")?, text("data")?);
    let fits = (1..=MAX_TOPIC).contains(&topic.len()) && !name.contains(['\r', '\n', '\0']);
    fits.then_some((topic, name, data))
}

/// What a browser makes of an event.
pub fn dispatched((_, name, data): &Event) -> (String, String) {
    let name = if name.is_empty() { "message" } else { name };
    (name.into(), data.replace("\r\n", "\n").replace('\r', "\n"))
}

enum Value {
    Text(Vec<u8>),
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Other,
}

struct Fields<'a>(&'a [(Value, Value)]);

impl Fields<'_> {
    /// The value of a key; nothing where the key is there twice.
    fn one(&self, name: &str) -> Option<Option<&Value>> {
        let named =
            |(key, _): &&(Value, Value)| matches!(key, Value::Text(it) if it == name.as_bytes());
        let mut found = self.0.iter().filter(named).map(|(_, value)| value);
        let first = found.next();
        found.next().is_none().then_some(first)
    }
}

fn string(value: &Value) -> Option<String> {
    match value {
        Value::Text(bytes) => String::from_utf8(bytes.clone()).ok(),
        _ => None,
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::List(values) => values.iter().map(string).collect(),
        _ => None,
    }
}

fn with_fields<T>(payload: &[u8], judge: impl Fn(&Fields) -> Option<T>) -> Verdict<T> {
    let mut reader = Reader {
        rest: payload,
        unsaid: false,
    };
    let value = reader.value(0);
    match value {
        _ if reader.unsaid => Unsaid,
        Some(Value::Map(entries)) if reader.rest.is_empty() => {
            judge(&Fields(&entries)).map_or(Wrong, Valid)
        }
        _ => Wrong,
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    unsaid: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    /// A length of so many bytes.
    fn length(&mut self, bytes: usize) -> Option<usize> {
        let digits = self.take(bytes)?;
        Some(
            digits
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte)),
        )
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEEP {
            self.unsaid = true;
            return None;
        }
        let marker = self.take(1)?[0];
        let low = usize::from(marker);
        match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => Some(Value::Other),
            0x80..=0x8f => self.map(low & 0x0f, depth),
            0x90..=0x9f => self.list(low & 0x0f, depth),
            0xa0..=0xbf => self.text(low & 0x1f),
            0xc1 => None,
            // Binary is what some encoders make of strings: as good as a string where it is UTF-8.
            0xc4..=0xc6 => self.length(1 << (low - 0xc4)).and_then(|it| self.text(it)),
            0xc7..=0xc9 | 0xd4..=0xd8 => {
                self.unsaid = true;
                None
            }
            0xca | 0xce | 0xd2 => self.other(4),
            0xcb | 0xcf | 0xd3 => self.other(8),
            0xcc | 0xd0 => self.other(1),
            0xcd | 0xd1 => self.other(2),
            0xd9..=0xdb => self.length(1 << (low - 0xd9)).and_then(|it| self.text(it)),
            0xdc | 0xdd => self
                .length(2 << (low - 0xdc))
                .and_then(|it| self.list(it, depth)),
            0xde | 0xdf => self
                .length(2 << (low - 0xde))
                .and_then(|it| self.map(it, depth)),
        }
    }

    fn other(&mut self, bytes: usize) -> Option<Value> {
        self.take(bytes).map(|_| Value::Other)
    }

    fn text(&mut self, length: usize) -> Option<Value> {
        self.take(length).map(|bytes| Value::Text(bytes.into()))
    }

    fn list(&mut self, length: usize, depth: usize) -> Option<Value> {
        let values: Option<_> = (0..length).map(|_| self.value(depth + 1)).collect();
        values.map(Value::List)
    }

    fn map(&mut self, length: usize, depth: usize) -> Option<Value> {
        let mut entries = Vec::new();
        for _ in 0..length {
            let key = self.value(depth + 1)?;
            self.unsaid |= !matches!(key, Value::Text(_));
            entries.push((key, self.value(depth + 1)?));
        }
        Some(Value::Map(entries))
    }
}
