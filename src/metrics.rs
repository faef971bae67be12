//! What happened, for the operator: counted for Prometheus, and now and then a line in the log.
//! Never a topic, a token, a payload or a query.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{collections::HashMap, fmt::Display, time::UNIX_EPOCH};

/// The page of a server that has just started: every family, and every sample that there is. What
/// is 0 then is counted, or set, under the name in front of it.
const FIRST_PAGE: &str = include_str!("metrics.prom");

/// Why a stream ended, as the metrics and the log say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(&'static str);

impl Reason {
    /// The client closed its connection, or the network did.
    pub const LEFT: Self = Self("left");
    /// An event found no room in its queue, and its socket took nothing.
    pub const QUEUE_FULL: Self = Self("queue_full");
    /// Its socket took nothing for `SSE_WRITE_TIMEOUT`.
    pub const WRITE_TIMEOUT: Self = Self("write_timeout");
    /// The server ended, and told it so.
    pub const SHUTDOWN: Self = Self("shutdown");
    /// Its token did, and it was told so.
    pub const EXPIRED: Self = Self("expired");
    /// A fault of the server.
    pub const FAULT: Self = Self("fault");
}

/// What is counted. Counting takes no lock.
pub struct Metrics {
    samples: HashMap<&'static str, Sample>,
}

/// A number: a counter, or a gauge that is set when it is printed. Its atomics are relaxed, since
/// nothing else is read in the belief that this was counted.
#[derive(Default)]
struct Sample {
    value: AtomicU64,
    /// The second in which a line about it was last logged.
    logged: AtomicU64,
    /// Lines that were not logged since then.
    suppressed: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        let names = FIRST_PAGE
            .lines()
            .filter_map(|line| line.strip_suffix(" 0"));
        let samples = names.map(|name| (name, Sample::default())).collect();
        Self { samples }
    }
}

impl Metrics {
    /// By its name and label, as they stand in `metrics.prom`.
    fn sample(&self, name: &str) -> &Sample {
        let sample = self.samples.get(name);
        sample.expect("metrics.prom lists all samples")
    }

    pub fn add(&self, name: &str, count: usize) {
        let sample = self.sample(name);
        sample.value.fetch_add(count as u64, Relaxed);
    }

    pub fn set(&self, name: &str, value: usize) {
        self.sample(name).value.store(value as u64, Relaxed);
    }

    /// Counts one, and logs a line unless there was one about the same in this second: strangers
    /// can cause lines, and must not fill a disk.
    pub fn warn(&self, name: &str, line: impl Display) {
        self.add(name, 1);
        let sample = self.sample(name);
        let second = UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
        if sample.logged.swap(second, Relaxed) == second {
            sample.suppressed.fetch_add(1, Relaxed);
        } else {
            let suppressed = sample.suppressed.swap(0, Relaxed);
            log::warn!("{line} suppressed={suppressed}");
        }
    }

    /// Counts a stream that begins.
    pub fn opened(&self, id: u64, topics: usize) {
        self.add("sse_streams_opened_total", 1);
        log::debug!("stream opened: id={id} topics={topics}");
    }

    /// Counts the end of a stream; one that the client did not see coming is worth a warning.
    pub fn ended(&self, id: u64, reason: Reason) {
        let Reason(name) = reason;
        let sample = format!("sse_streams_ended_total{{reason=\"{name}\"}}");
        log::debug!("stream ended: id={id} reason={name}");
        match reason {
            Reason::LEFT | Reason::SHUTDOWN | Reason::EXPIRED => self.add(&sample, 1),
            _ => self.warn(&sample, format_args!("stream cut: reason={name}")),
        }
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn print(&self) -> String {
        let print = |line: &str| match line.strip_suffix(" 0") {
            Some(name) => format!("{name} {}\n", self.sample(name).value.load(Relaxed)),
            None => format!("{line}\n"),
        };
        let page: String = FIRST_PAGE.lines().map(print).collect();
        page.replace("VERSION", env!("CARGO_PKG_VERSION"))
    }
}

/// The name of the sample that counts answers of this status.
pub fn answers(status: u16) -> String {
    format!("sse_answers_total{{status=\"{status}\"}}")
}
