//! What happened, for the operator: counted for Prometheus, and now and then a line in the log.
//! Never a token, a payload or a query: lines are made of numbers, names that stand in this source,
//! and what the system, the reader of MessagePack and that of Redis say of errors, which quotes no
//! value.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{fmt::Display, time::UNIX_EPOCH};

/// The statuses of all answers there are.
const STATUSES: [u16; 14] = [
    200, 204, 307, 400, 401, 404, 405, 408, 411, 413, 414, 431, 503, 505,
];

/// Why a stream ended. With [`Reason::Expired`] and [`Reason::Shutdown`] its client sees a delay
/// and the last chunk, and with all others a break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The client closed its connection, or the network did.
    Left,
    /// An event found no room in its queue, and its socket took nothing.
    QueueFull,
    /// Its socket took nothing for `SSE_WRITE_TIMEOUT`, or not enough in the last 5 seconds of a
    /// server.
    WriteTimeout,
    /// Its token did. It was told so, unless its socket was full just then.
    Expired,
    /// The server ended, and told it so.
    Shutdown,
    /// A fault of the server.
    Fault,
    /// It may have missed an event that other instances have sent.
    #[cfg_attr(not(feature = "redis"), expect(dead_code))]
    Gap,
}

/// In the order of [`Reason`].
const REASONS: [&str; 7] = [
    "left",
    "queue_full",
    "write_timeout",
    "expired",
    "shutdown",
    "fault",
    "gap",
];

/// What is counted. Counting takes no lock.
#[derive(Default)]
pub struct Metrics {
    pub events: Counter,
    pub deliveries: Counter,
    pub delivered_bytes: Counter,
    opened: Counter,
    ended: [Counter; REASONS.len()],
    answered: [Counter; STATUSES.len()],
    /// Streams closed unanswered, since an answer would end a browser's stream for good.
    pub turned_away: Counter,
    /// Connections closed to make room for another.
    pub evicted: Counter,
    pub accept_failures: Counter,
    /// Times that the reader did not reach Redis, or was refused.
    pub redis_failures: Counter,
    /// Entries in Redis that are no submission under the secret.
    pub forged: Counter,
}

/// A number that grows. Its atomics are relaxed: nothing else is read in the belief that this was
/// counted.
#[derive(Default)]
pub struct Counter {
    count: AtomicU64,
    /// The second in which a line about it was last logged.
    logged: AtomicU64,
    /// Lines that were not logged since.
    suppressed: AtomicU64,
}

impl Counter {
    pub fn add(&self, count: usize) {
        self.count.fetch_add(count as u64, Relaxed);
    }

    fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Counts one, and logs a line unless there was one in this second: strangers can cause lines,
    /// of which a disk is to take one a second of each kind at most, a dozen in all. (At debug
    /// level each stream adds two.)
    pub fn warn(&self, line: impl Display) {
        self.add(1);
        let second = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        if self.logged.swap(second, Relaxed) == second {
            self.suppressed.fetch_add(1, Relaxed);
        } else {
            let suppressed = self.suppressed.swap(0, Relaxed);
            // One line, whatever the system or Redis said of an error.
            let line = line.to_string().replace(char::is_control, " ");
            log::warn!("{line} suppressed={suppressed}");
        }
    }
}

impl Metrics {
    /// Counts a stream that begins.
    pub fn opened(&self, id: u64, topics: usize) {
        self.opened.add(1);
        log::debug!("stream opened: id={id} topics={topics}");
    }

    /// Counts the end of a stream; one that the client did not see coming is worth a warning.
    pub fn ended(&self, id: u64, reason: Reason) {
        let (counter, name) = (&self.ended[reason as usize], REASONS[reason as usize]);
        log::debug!("stream ended: id={id} reason={name}");
        match reason {
            Reason::Left | Reason::Expired | Reason::Shutdown => counter.add(1),
            _ => counter.warn(format_args!("stream cut: reason={name}")),
        }
    }

    /// How often this status was answered.
    pub fn answered(&self, status: u16) -> &Counter {
        let index = STATUSES.iter().position(|known| *known == status);
        &self.answered[index.expect("STATUSES has all there are")]
    }

    /// The Prometheus text format, version 0.0.4, with these gauges.
    pub fn print(&self, subscribers: usize, capacity: usize, topics: usize) -> String {
        format!(
            include_str!("metrics.prom"),
            version = env!("CARGO_PKG_VERSION"),
            subscribers = subscribers,
            capacity = capacity,
            topics = topics,
            events = self.events.count(),
            deliveries = self.deliveries.count(),
            delivered_bytes = self.delivered_bytes.count(),
            opened = self.opened.count(),
            ended = by_label("sse_streams_ended_total{reason", &REASONS, &self.ended),
            turned_away = self.turned_away.count(),
            answers = by_label("sse_answers_total{status", &STATUSES, &self.answered),
            evicted = self.evicted.count(),
            accept_failures = self.accept_failures.count(),
            redis_failures = self.redis_failures.count(),
            forged = self.forged.count(),
        )
    }
}

/// A line for each value of a label.
fn by_label(label: &str, values: &[impl Display], counters: &[Counter]) -> String {
    let samples = values.iter().zip(counters);
    let line = |(value, it): (_, &Counter)| format!("{label}=\"{value}\"}} {}\n", it.count());
    samples.map(line).collect()
}
