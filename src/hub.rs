//! The topic map and its one lock. Knows neither HTTP nor tokens: whoever holds a [`Hub`] may
//! send to every topic; over HTTP only an opened token leads here.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::{collections::HashMap, io::Write, sync::Arc, time::Duration, time::Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;

use crate::event::{Event, Frame, HEARTBEAT, Topic, Topics};
use crate::{error::Refusal, journal::Journal, subscriber::Stream, subscriber::Subscriber};

/// Subscribers that wait for a writer. Not bounded itself: each subscriber stands in one lane at
/// most, and once.
pub type Lane = (Sender<Arc<Subscriber>>, Receiver<Arc<Subscriber>>);

/// What became of a submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Events in it.
    pub events: usize,
    /// Queue entries made: an event counts once for each subscriber of its topic.
    pub deliveries: usize,
    /// Bytes in those entries.
    pub bytes: usize,
}

pub struct Hub {
    /// Subscribers that have something to be sent.
    pub due: Lane,
    /// Those whose socket was full: they are due again in a moment.
    pub stalled: Lane,
    pub journal: Journal,
    /// Subscribers at once, and events that may wait for each.
    pub capacity: usize,
    queue: usize,
    /// Under this lock a stream's and the journal's are taken, never the other way round.
    topics: Mutex<HashMap<Topic, Vec<Arc<Subscriber>>>>,
    pub subscribers: AtomicUsize,
    longest_queue: AtomicUsize,
    pub closed: AtomicBool,
    /// Set by the server when it has waited long enough: the writers end.
    pub over: AtomicBool,
}

impl Hub {
    pub fn new(capacity: usize, queue: usize) -> Self {
        Self {
            due: unbounded(),
            stalled: unbounded(),
            journal: Journal::new(),
            capacity,
            queue,
            topics: Mutex::default(),
            subscribers: AtomicUsize::new(0),
            longest_queue: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// Takes a place for one subscriber, which then has to be given to [`Hub::subscribe`].
    pub fn admit(&self) -> Result<(), Refusal> {
        let next = |count| (count < self.capacity).then_some(count + 1);
        let taken = self.subscribers.fetch_update(SeqCst, SeqCst, next);
        let full = |_| Refusal::new(503, "all streams are taken: try later");
        taken.map(drop).map_err(full)
    }

    /// From now on every event of the topics reaches the subscriber's queue; its stream begins
    /// with `head`. Registered before the head is written, whoever has seen it misses nothing.
    pub fn subscribe(&self, topics: Topics, head: Vec<u8>, writer: Box<dyn Write + Send>) {
        let new = Arc::new(Subscriber {
            topics,
            // One place more than events may take: for the farewell.
            queue: bounded(self.queue + 1),
            scheduled: AtomicBool::new(false),
            lagging: AtomicBool::new(false),
            stream: Mutex::new(Stream {
                writer,
                rest: head,
                stalled: false,
                active: Instant::now(),
            }),
        });
        let mut map = self.topics.lock();
        for topic in &new.topics {
            map.entry(topic.clone()).or_default().push(new.clone());
        }
        self.schedule(&new);
    }

    /// Queues the events to every subscriber of their topics. The lock is held for all of them:
    /// hence one order everywhere, and no other submission's events between these. Never waits
    /// for a subscriber.
    pub fn publish(&self, events: &[Event]) -> Result<Receipt, Refusal> {
        let mut receipt = Receipt::default();
        let map = self.topics.lock();
        if self.closed.load(SeqCst) {
            return Err(Refusal::new(503, "the server is shutting down"));
        }
        for Event { topic, frame } in events {
            receipt.events += 1;
            for subscriber in map.get(topic).into_iter().flatten() {
                let waiting = subscriber.queue.0.len();
                if waiting < self.queue && !subscriber.lagging.load(SeqCst) {
                    // try_send, not send: nothing may ever wait under this lock.
                    let _has_room = subscriber.queue.0.try_send(frame.clone());
                    receipt.deliveries += 1;
                    receipt.bytes += frame.len();
                    self.longest_queue.fetch_max(waiting + 1, SeqCst);
                } else {
                    subscriber.lagging.store(true, SeqCst);
                }
                self.schedule(subscriber);
            }
        }
        self.journal.add("sse_events_total", receipt.events);
        self.journal.add("sse_deliveries_total", receipt.deliveries);
        self.journal.add("sse_delivered_bytes_total", receipt.bytes);
        Ok(receipt)
    }

    /// Makes a subscriber due, unless it is or its socket is full.
    fn schedule(&self, subscriber: &Arc<Subscriber>) {
        if !subscriber.scheduled.swap(true, SeqCst) {
            let _never_fails = self.due.0.send(subscriber.clone());
        }
    }

    /// Ends a subscriber's turn. What was queued during the turn was not scheduled: it is now.
    /// Where nothing was, and nothing more will be, the subscriber has had its farewell and goes.
    pub fn put_back(&self, subscriber: &Arc<Subscriber>) {
        subscriber.scheduled.store(false, SeqCst);
        // Read before the queue, in which the farewell was before this was set.
        let closed = self.closed.load(SeqCst);
        if !subscriber.queue.1.is_empty() || subscriber.lagging.load(SeqCst) {
            self.schedule(subscriber);
        } else if closed && !subscriber.scheduled.swap(true, SeqCst) {
            self.remove(subscriber);
        }
    }

    /// Adds a heartbeat to every stream whose socket was silent for so long.
    pub fn beat(&self, silence: Duration) {
        for subscriber in self.topics.lock().values().flatten() {
            let (idle, mut stream) = (!subscriber.scheduled.load(SeqCst), subscriber.stream.lock());
            // Not through the queue, where it would take an event's place.
            if idle && stream.active.elapsed() >= silence {
                stream.rest.extend_from_slice(HEARTBEAT);
                self.schedule(subscriber);
            }
        }
    }

    /// Ends a subscriber before the server does.
    pub fn cut(&self, subscriber: &Arc<Subscriber>, reason: &str) {
        let sample = format!("sse_subscribers_cut_total{{reason=\"{reason}\"}}");
        let line = format!("subscriber cut: {reason}");
        self.journal.warn(&sample, &line);
        self.remove(subscriber);
    }

    /// Drops a subscriber, and with it its connection.
    fn remove(&self, subscriber: &Arc<Subscriber>) {
        let mut map = self.topics.lock();
        for topic in &subscriber.topics {
            let subscribers = map.entry(topic.clone()).or_default();
            subscribers.retain(|other| !Arc::ptr_eq(other, subscriber));
            if subscribers.is_empty() {
                map.remove(topic);
            }
        }
        self.subscribers.fetch_sub(1, SeqCst);
    }

    /// Takes no more events. Every stream writes what is queued for it and a `farewell`, and ends.
    pub fn close(&self, farewell: impl Fn() -> Frame) {
        let map = self.topics.lock();
        for (topic, subscribers) in map.iter() {
            // A subscriber of several topics is met several times, and told once.
            let once = |it: &&Arc<Subscriber>| it.topics.first() == Some(topic);
            for subscriber in subscribers.iter().filter(once) {
                let _has_room = subscriber.queue.0.try_send(farewell());
            }
        }
        // In this order: whoever is found idle and closed has its farewell, and has its turn.
        self.closed.store(true, SeqCst);
        map.values().flatten().for_each(|it| self.schedule(it));
    }

    /// What the journal does not count, under its names.
    pub fn gauges(&self) -> [(&'static str, usize); 3] {
        let topics = ("sse_topics", self.topics.lock().len());
        let subscribers = ("sse_subscribers", self.subscribers.load(SeqCst));
        let longest_queue = self.longest_queue.load(SeqCst);
        [topics, subscribers, ("sse_queue_high_water", longest_queue)]
    }
}
