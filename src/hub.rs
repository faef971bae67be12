//! The topic map and its one lock; membership; publish. Opens no token and reads no HTTP: whoever
//! holds a [`Hub`] may send to every topic; over HTTP only an opened token leads here.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{mem, sync::Arc, sync::Weak};

use crossbeam_channel::{bounded, unbounded};
use parking_lot::{Mutex, MutexGuard};

use crate::event::{Event, Topic, Topics};
use crate::metrics::{Metrics, Reason};
use crate::subscriber::{Lane, Stream, Subscriber, Turn};
use crate::{config::Config, error::Refusal, error::ensure};

/// The attempt of a publisher to make room from which on no other may take it. Two that need a part
/// of a queue rarely take more than one; one that needs all of it would be passed for ever.
const MAX_PASSED: u32 = 5;

/// Subscribers to whom a publisher writes itself, which is quicker than to wake a writer for them.
const MAX_OWN: usize = 2;

/// By id: leaving a topic of thousands is a step, not a search.
type Members = HashMap<u64, Arc<Subscriber>>;

/// What became of a submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Events in it.
    pub events: usize,
    /// Queue entries made: an event counts once for each subscriber of its topic.
    pub deliveries: usize,
}

/// What carries submissions between several instances: see `relay`.
pub trait Relay: Send + Sync {
    /// In place of [`Hub::publish`], to all instances. Without a token one is made of the events.
    fn submit(&self, hub: &Hub, token: Option<&str>, events: &[Event]) -> Result<Receipt, Refusal>;
    /// As [`Hub::subscribe`], behind what came after this id.
    fn subscribe(&self, hub: &Hub, topics: Topics, stream: Stream, last_event_id: &str);
    /// Publishes what all instances submit, until the server ends.
    fn run(&self, hub: &Hub);
}

/// Locks, in the order in which they may be taken: `gate`, then `map` or `circle`, then a stream's.
/// (With Redis `relay` takes its own before.) `stalled`, those of the connections and of idle ones
/// to Redis, and the queues' own are held for a step. With N subscribers of its topics, under
/// `map`: a submission of E events takes E x N looks and then as many steps of queuing, with a
/// write that does not wait to each whose queue is full; to come or to go takes a step for each
/// topic of the one; the end, or a gap, N steps. Under `gate`: besides those, up to E turns of each
/// of the N, by which a publisher makes room. Under `circle`: a turn of one of 85. Under a
/// stream's: a turn, which is at most one read of 64 KiB and a few writes, none of which waits.
pub struct Hub {
    pub relay: Option<Box<dyn Relay>>,
    pub metrics: Metrics,
    pub config: Config,
    /// Subscribers at once.
    pub capacity: usize,
    /// Publishers come in through here, one after the other. One that was passed too often by
    /// others keeps it while it makes room.
    gate: Mutex<()>,
    /// Under this lock a stream's may be taken, never the other way round. Held while queues are
    /// filled; whoever has it waits for no client.
    map: Mutex<Map>,
    /// Those that have something to be sent. Not bounded itself: each stands in it at most once.
    pub due: Lane<Arc<Subscriber>>,
    /// Those to be tried again, all `scheduled` still. Locked for a step.
    pub stalled: Mutex<Vec<Arc<Subscriber>>>,
    /// All of them, to be looked at one after the other. Weak: whoever has left drops out of it.
    /// Locked for looks at one of 85 of them, in turns that wait for no client.
    pub circle: Mutex<VecDeque<Weak<Subscriber>>>,
    /// No more events are taken. Set under the map's lock, as events are queued.
    pub closed: AtomicBool,
    /// The server has waited long enough: the writers end.
    pub over: AtomicBool,
}

#[derive(Default)]
struct Map {
    last_id: u64,
    all: Members,
    topics: HashMap<Topic, Members>,
}

impl Hub {
    pub fn new(config: Config, capacity: usize) -> Self {
        let (sender, receiver) = unbounded();
        Self {
            relay: None,
            metrics: Metrics::default(),
            config,
            capacity,
            gate: Mutex::default(),
            map: Mutex::default(),
            due: Lane { sender, receiver },
            stalled: Mutex::default(),
            circle: Mutex::default(),
            closed: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// Whether there may be another subscriber now: to be asked before [`Hub::subscribe`].
    pub fn room(&self) -> Result<(), Refusal> {
        ensure(!self.closed.load(SeqCst), 503, ENDING)?;
        let room = self.subscribers() < self.capacity;
        ensure(room, 503, "all streams are taken: try later")
    }

    /// From now on every event of the topics reaches the subscriber's queue. Registered before the
    /// head in the stream is written: whoever has seen it misses nothing. Where another took the
    /// last place since [`Hub::room`] was asked, or the server ends, the stream is dropped.
    pub fn subscribe(&self, topics: Topics, stream: Stream) {
        let (sender, receiver) = bounded(self.config.queue as usize);
        let mut map = self.map.lock();
        if map.all.len() >= self.capacity || self.closed.load(SeqCst) {
            drop(map);
            return self.metrics.turned_away.warn("stream turned away");
        }
        map.last_id += 1;
        let new = Arc::new(Subscriber {
            id: map.last_id,
            topics,
            queue: Lane { sender, receiver },
            scheduled: AtomicBool::new(false),
            behind: AtomicBool::new(false),
            stream: Mutex::new(stream),
        });
        for topic in &new.topics {
            let members = map.topics.entry(topic.clone()).or_default();
            members.insert(new.id, new.clone());
        }
        map.all.insert(new.id, new.clone());
        drop(map);
        self.metrics.opened(new.id, new.topics.len());
        self.circle.lock().push_back(Arc::downgrade(&new));
        self.schedule(&new);
    }

    /// Publishes, here or on all instances. Blocks where those do.
    pub fn submit(&self, token: Option<&str>, events: &[Event]) -> Result<Receipt, Refusal> {
        match &self.relay {
            Some(relay) => relay.submit(self, token, events),
            None => self.publish(events),
        }
    }

    /// Queues the events to every subscriber of their topics, in order and with no other
    /// submission's between them: the map's lock is held for all of them.
    ///
    /// Waits for no client. But where the queue of one that reads lacks room, this thread writes
    /// to streams until it has: a burst is as fast as its readers can be written to.
    ///
    /// # Errors
    /// For more events than a queue holds: they could only cut their own listeners. Where the
    /// server ends, at any time before the events are queued.
    pub fn publish(&self, events: &[Event]) -> Result<Receipt, Refusal> {
        let queue = self.config.queue as usize;
        let fits = events.len() <= queue;
        ensure(fits, 413, "these are more than SSE_QUEUE events")?;
        let (mut gate, mut attempts) = (self.gate.lock(), 0);
        let map = loop {
            let map = self.map.lock();
            ensure(!self.closed.load(SeqCst), 503, ENDING)?;
            // Reads, as far as is known, and may lack room.
            let is_crowded = |it: &&Arc<Subscriber>| {
                it.queue.sender.len() + events.len() > queue && !it.behind.load(SeqCst)
            };
            let members = events.iter().filter_map(|it| map.topics.get(&it.topic));
            let crowded = members.flat_map(HashMap::values).filter(is_crowded);
            let crowded: Members = crowded.map(|it| (it.id, it.clone())).collect();
            if crowded.is_empty() {
                break map;
            }
            drop(map);
            let make_room = || {
                for subscriber in crowded.values() {
                    // Besides its own turn, which may be with a writer that the kernel put aside.
                    if self.turn(subscriber, false) != Turn::Written {
                        self.schedule(subscriber);
                    }
                }
            };
            attempts += 1;
            match attempts {
                ..MAX_PASSED => MutexGuard::unlocked(&mut gate, make_room),
                _ => make_room(),
            }
        };
        let (mut deliveries, mut bytes, mut own) = (0, 0, Vec::new());
        for Event { topic, frame } in events {
            for subscriber in map.topics.get(topic).into_iter().flat_map(HashMap::values) {
                let queue = &subscriber.queue.sender;
                // Behind a full socket, as a rule, which may have been drained a moment ago.
                if queue.is_full() {
                    self.turn(subscriber, false);
                }
                // try_send, not send: under the map's lock one full queue would stall every
                // publisher. Whoever has no room misses an event, and is cut.
                if queue.try_send(frame.clone()).is_ok() {
                    deliveries += 1;
                    bytes += frame.bytes(false).len();
                } else {
                    subscriber.give_up(Reason::QueueFull);
                }
                if own.len() >= MAX_OWN {
                    self.schedule(subscriber);
                } else if !subscriber.scheduled.swap(true, SeqCst) {
                    own.push(subscriber.clone());
                }
            }
        }
        drop((map, gate));
        own.iter().for_each(|subscriber| self.take_turn(subscriber));
        self.metrics.events.add(events.len());
        self.metrics.deliveries.add(deliveries);
        self.metrics.delivered_bytes.add(bytes);
        let events = events.len();
        Ok(Receipt { events, deliveries })
    }

    /// Makes a subscriber due, unless it is.
    pub fn schedule(&self, subscriber: &Arc<Subscriber>) {
        if !subscriber.scheduled.swap(true, SeqCst) {
            let pushed = self.due.sender.send(subscriber.clone());
            pushed.expect("both ends of the lane live as long as the hub");
        }
    }

    /// The turn of a subscriber that was due.
    pub fn take_turn(&self, subscriber: &Arc<Subscriber>) {
        match self.turn(subscriber, false) {
            Turn::Ended(reason) => self.remove(subscriber, reason),
            Turn::Stalled => self.stalled.lock().push(subscriber.clone()),
            Turn::Written => {
                // In this order: see `Subscriber::scheduled`.
                subscriber.scheduled.store(false, SeqCst);
                let waiting = !subscriber.queue.receiver.is_empty();
                if waiting || subscriber.behind.load(SeqCst) || self.closed.load(SeqCst) {
                    self.schedule(subscriber);
                }
            }
        }
    }

    /// Looks after a subscriber, unless another thread has its turn just now.
    pub fn look(&self, subscriber: &Arc<Subscriber>) {
        if !subscriber.stream.is_locked() && self.turn(subscriber, true) != Turn::Written {
            self.schedule(subscriber);
        }
    }

    fn turn(&self, subscriber: &Subscriber, looking: bool) -> Turn {
        let closing = self.closed.load(SeqCst);
        subscriber.turn(looking, closing, &self.config)
    }

    /// Drops a subscriber, and with it its connection as soon as the last thread lets go of it. It
    /// stays `scheduled`, so that it stands in no lane again. Whoever comes second finds it gone.
    fn remove(&self, subscriber: &Subscriber, reason: Reason) {
        let mut map = self.map.lock();
        if map.all.remove(&subscriber.id).is_none() {
            return;
        }
        for topic in &subscriber.topics {
            let members = map.topics.get_mut(topic).expect("it is in all its topics");
            members.remove(&subscriber.id);
            if members.is_empty() {
                map.topics.remove(topic);
            }
        }
        drop(map);
        self.metrics.ended(subscriber.id, reason);
    }

    /// Ends all streams at once.
    #[cfg(feature = "redis")]
    pub fn cut_all(&self, reason: Reason) {
        for subscriber in self.map.lock().all.values() {
            subscriber.give_up(reason);
            self.schedule(subscriber);
        }
    }

    /// Takes no more events. Every stream writes what is queued for it and a farewell, and ends.
    pub fn close(&self) {
        let map = self.map.lock();
        self.closed.store(true, SeqCst);
        // Whoever has its turn just now sees that at the turn's end.
        map.all.values().for_each(|it| self.schedule(it));
    }

    /// Ends the writers, and cuts whoever has not taken its events by now.
    pub fn end(&self) {
        self.over.store(true, SeqCst);
        let left = mem::take(&mut *self.map.lock());
        for id in left.all.into_keys() {
            self.metrics.ended(id, Reason::WriteTimeout);
        }
        self.due.receiver.try_iter().for_each(drop);
        self.stalled.lock().clear();
    }

    pub fn subscribers(&self) -> usize {
        self.map.lock().all.len()
    }

    pub fn subscribers_of(&self, topic: &str) -> usize {
        let count = |topic| self.map.lock().topics.get(&topic).map_or(0, HashMap::len);
        // What cannot be a topic has no subscriber.
        Topic::new(topic).map_or(0, count)
    }

    /// The metrics as Prometheus reads them.
    pub fn print_metrics(&self) -> String {
        let map = self.map.lock();
        let (subscribers, topics) = (map.all.len(), map.topics.len());
        drop(map);
        self.metrics.print(subscribers, self.capacity, topics)
    }
}

const ENDING: &str = "the server is ending: try again in a moment";
