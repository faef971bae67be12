//! What happened, for the operator: counted for Prometheus, and now and then a line in the log.
//! Never a token, a payload or a query.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{fmt::Display, time::Duration, time::Instant};

use parking_lot::Mutex;

/// At most one line about a counter in this time: strangers can cause lines, and must not fill a
/// disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// The statuses of all answers there are.
const STATUSES: [u16; 14] = [
    200, 204, 307, 400, 401, 404, 405, 408, 411, 413, 414, 431, 503, 505,
];

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The client closed its connection, or the network did.
    Left,
    /// An event found no room in its queue, and its socket took nothing.
    QueueFull,
    /// Its socket took nothing for `SSE_WRITE_TIMEOUT`.
    WriteTimeout,
    /// The server ended, and told it so.
    Shutdown,
    /// A fault of the server.
    Fault,
}

/// In the order of [`Reason`].
const REASONS: [&str; 5] = ["left", "queue_full", "write_timeout", "shutdown", "fault"];

/// What is counted. Counting takes no lock.
#[derive(Default)]
pub struct Metrics {
    pub events: Counter,
    pub deliveries: Counter,
    pub delivered_bytes: Counter,
    pub opened: Counter,
    ended: [Counter; REASONS.len()],
    answered: [Counter; STATUSES.len()],
    /// Streams closed unanswered, since an answer would end a browser's stream for good.
    pub turned_away: Counter,
    /// Connections closed to make room for another.
    pub evicted: Counter,
    pub accept_failures: Counter,
}

/// A number that grows.
#[derive(Default)]
pub struct Counter {
    /// Relaxed: nothing else is read in the belief that this was counted.
    count: AtomicU64,
    /// When a line about it was last logged.
    logged: Mutex<Option<Instant>>,
}

impl Counter {
    pub fn add(&self, count: usize) {
        self.count.fetch_add(count as u64, Relaxed);
    }

    fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Counts one, and logs a line unless there was one a moment ago. Does not lock while it logs.
    pub fn warn(&self, line: impl Display) {
        self.add(1);
        let mut logged = self.logged.lock();
        if logged.is_some_and(|time| time.elapsed() < INTERVAL) {
            return;
        }
        *logged = Some(Instant::now());
        drop(logged);
        log::warn!("{line} count={}", self.count());
    }
}

impl Metrics {
    /// Counts the end of a stream; one that the client did not see coming is worth a line.
    pub fn ended(&self, reason: Reason) {
        let (counter, name) = (&self.ended[reason as usize], REASONS[reason as usize]);
        match reason {
            Reason::Left | Reason::Shutdown => counter.add(1),
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
        )
    }
}

/// A line for each value of a label.
fn by_label(label: &str, values: &[impl Display], counters: &[Counter]) -> String {
    let samples = values.iter().zip(counters);
    let line = |(value, it): (_, &Counter)| format!("{label}=\"{value}\"}} {}\n", it.count());
    samples.map(line).collect()
}
