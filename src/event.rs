//! What is published: a topic and one SSE frame. No payload forges another: a name has no line end,
//! and each line of the data becomes one of the frame. But for the ids of `relay`, the only place
//! that knows the syntax of a stream.

use std::hash::{BuildHasher, RandomState};
use std::{collections::BTreeSet, sync::Arc};

use crate::error::Refusal;

/// The topics of one subscription.
pub type Topics = BTreeSet<Topic>;

/// Bytes in the longest topic: a path or two UUIDs, and dozens of them still fit a URL.
const MAX_TOPIC: usize = 256;

/// The name of a topic: 1 to 256 bytes of UTF-8, compared byte by byte. Only made here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topic(Arc<str>);

/// Whole lines of a stream, and around them the HTTP chunk that carries them to whoever speaks
/// HTTP/1.1. Built once for each event and shared by every subscriber.
#[derive(Clone, Debug)]
pub struct Frame(Arc<[u8]>);

/// One event, checked and framed. Cloning is cheap: the frame is shared.
#[derive(Clone, Debug)]
pub struct Event {
    pub(crate) topic: Topic,
    pub(crate) frame: Frame,
}

impl Topic {
    pub fn new(name: impl AsRef<str>) -> Result<Self, Refusal> {
        match name.as_ref().len() {
            1..=MAX_TOPIC => Ok(Self(name.as_ref().into())),
            length => {
                let problem = format!("a topic has to have 1 to {MAX_TOPIC} bytes, not {length}");
                Err(Refusal::new(400, problem))
            }
        }
    }

    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Event {
    /// Frames `data` for `topic`. An empty `name` means the browser's default type `message`.
    /// CRLF, LF and CR each end a line of the data.
    ///
    /// # Errors
    /// For a topic that is empty or over 256 bytes, or a name with CR, LF or NUL: with one of
    /// them a name could forge the rest of a frame.
    pub fn new(topic: &str, name: &str, data: &str) -> Result<Self, Refusal> {
        let (topic, mut lines) = (Topic::new(topic)?, String::new());
        if name.contains(['\r', '\n', '\0']) {
            return Err(Refusal::new(400, "an event name has no CR, LF or NUL"));
        }
        if !name.is_empty() {
            lines.extend(["event: ", name, "\n"]);
        }
        for line in data.replace("\r\n", "\n").split(['\n', '\r']) {
            lines.extend(["data: ", line, "\n"]);
        }
        let frame = Frame::new(&(lines + "\n"));
        Ok(Self { topic, frame })
    }
}

impl Frame {
    /// Whole lines, each with its end.
    pub fn new(lines: &str) -> Self {
        let chunk = format!("{:x}\r\n{lines}\r\n", lines.len());
        Self(chunk.into_bytes().into())
    }

    /// The bytes on the wire.
    pub fn bytes(&self, chunked: bool) -> &[u8] {
        if chunked {
            return &self.0;
        }
        let size_line = self.0.iter().position(|byte| *byte == b'\n');
        let begin = size_line.expect("a chunk begins with a line for its size") + 1;
        &self.0[begin..self.0.len() - 2]
    }
}

/// What is sent on a silent stream, and no browser dispatches. No blank line behind it: widely
/// used readers make an empty message of one.
pub const COMMENT: &str = ":\n";

/// Tells a client how many milliseconds to wait before it reconnects: `least` to twice that, at
/// random, since clients that lost a server together must not all come back together.
pub fn retry(least: u64) -> String {
    format!("retry: {}\n", least + draw(least))
}

/// A number from 0 to `most`, at random, though not for secrets.
pub fn draw(most: u64) -> u64 {
    RandomState::new().hash_one(()) % (most + 1)
}
