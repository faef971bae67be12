//! What happened, for the operator: counted for Prometheus, and now and then a line on standard
//! error. Never a token, a payload or a query.

use std::{collections::BTreeMap, io, io::Write, time::Duration, time::Instant, time::UNIX_EPOCH};

use parking_lot::Mutex;

/// At most one line about a sample in this time: strangers can cause lines, and must not fill a
/// disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// Help and type of each family; its samples go behind its type.
const FAMILIES: &str = include_str!("metrics.prom");

/// Samples by name and labels: the value, and when a line about it was last written. Locked a few
/// times for a submission or a request, never for a delivery.
pub struct Journal(Mutex<BTreeMap<String, (usize, Option<Instant>)>>);

impl Journal {
    pub fn new() -> Self {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        let first = ("process_start_time_seconds".into(), (now as usize, None));
        Self(Mutex::new([first].into()))
    }

    pub fn add(&self, sample: &str, count: usize) {
        self.0.lock().entry(sample.into()).or_default().0 += count;
    }

    /// Counts one, and writes a line unless there was one a moment ago.
    pub fn warn(&self, sample: &str, line: &str) {
        let mut samples = self.0.lock();
        let (count, written) = samples.entry(sample.into()).or_default();
        *count += 1;
        if written.is_none_or(|time| time.elapsed() >= INTERVAL) {
            *written = Some(Instant::now());
            // Nobody may wait for whoever reads the log, nor end because nobody does.
            drop(samples);
            let _unread = writeln!(io::stderr(), "{line}");
        }
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self, gauges: &[(&str, usize)]) -> String {
        let (mut samples, mut text) = (self.0.lock(), String::new());
        for (name, value) in gauges {
            samples.insert(name.to_string(), (*value, None));
        }
        for line in FAMILIES.lines() {
            text += &format!("{line}\n");
            let kind = line.strip_prefix("# TYPE ");
            let name = kind.and_then(|it| it.split(' ').next());
            for (sample, (value, _)) in samples.iter() {
                if sample.split('{').next() == name {
                    text += &format!("{sample} {value}\n");
                }
            }
        }
        text
    }
}
