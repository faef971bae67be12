//! One stream: its queue, its socket, what is unsent, and one turn of writing. Knows frames and
//! something that makes nobody wait, neither to be read nor to be written; no other stream.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{io, io::ErrorKind, io::Read, io::Write, time::Duration, time::Instant};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::event::{COMMENT, Frame, Topics, retry};
use crate::{config::Config, metrics::Reason};

/// Bytes after which no more events are added to the same write.
const MAX_BATCH: usize = 16 * 1024;

/// Comments sent to a client that says it will send nothing more, one at each retry: half a second.
/// One that has left answers the first with a reset, which a later one meets; one that has only
/// closed its sending side, as some do, lives on.
const PROBES: u8 = 25;

/// Bytes that are read at a look of what a client sends on its stream. Behind them stands its end.
const MAX_DROPPED: u64 = 64 * 1024;

/// What a stream is written to: a `TcpStream` that is set never to wait, or in tests a mock.
pub trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// A hand-over from one thread to another, in order.
pub struct Lane<T> {
    pub sender: Sender<T>,
    pub receiver: Receiver<T>,
}

/// It begins when the hub's map gets it, and ends when that lets go of it, which happens once:
/// `Hub::remove` does nothing for one that the map no longer has. Besides the map it is held by one
/// at most of the lane of those that are due, the list of the stalled ones, and a thread that has
/// its turn; and by publishers for as long as they make room. Its connection closes with the last.
pub struct Subscriber {
    /// No other subscriber of the hub has it.
    pub id: u64,
    pub topics: Topics,
    /// From publishers to writers: bounded, so that whoever does not read costs no more than this.
    /// Taken from under the stream's lock only, into `unsent`, so that there is one order; what
    /// leaves `unsent` is on the wire, or the stream is over.
    pub queue: Lane<Frame>,
    /// Stands in a lane, or has its turn: true from then on until the end of the turn, so that it
    /// stands in one lane at most, and once. Whoever leaves work (an event, unsent bytes) does so
    /// *before* looking here; whoever ends a turn clears this *before* looking for work. One of the
    /// two sees the other: that takes one order of all four steps, hence `SeqCst`, as the queue's
    /// own ends are.
    pub scheduled: AtomicBool,
    /// Needs a turn, whatever the queue holds: the last one did not come to [`Turn::Written`]. Set
    /// by whoever has, or had, the stream's lock. A publisher reads it without: it may come too
    /// late, but then finds the queue full, and asks the socket. `SeqCst`, since it is work that
    /// `scheduled` is about.
    pub behind: AtomicBool,
    /// Locked for a turn. Whoever has it waits for nobody.
    pub stream: Mutex<Stream>,
}

/// The client's side of a subscriber.
pub struct Stream {
    socket: Box<dyn Socket>,
    /// Each frame goes in a chunk of its own.
    chunked: bool,
    /// When it has to end, since its token expires.
    ends: Instant,
    /// Events that it may still take from its queue: any number, until its token has expired; from
    /// then on those that are queued at the first turn behind that.
    allowed: u64,
    /// Whole frames, of the first of which a part may have been sent. Comments and farewells are
    /// added where there are none: they never stand within a frame.
    unsent: Vec<u8>,
    /// When the socket last took something, or was first asked to.
    progress: Instant,
    /// Comments sent since the client closed its sending side.
    probes: u8,
    /// The last thing in `unsent` is the farewell. With it gone, the stream ends for this reason.
    farewell: Option<Reason>,
    /// Nothing more is read or written, for this reason, whoever asks.
    over: Option<Reason>,
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// What was taken from the queue was written.
    Written,
    /// The socket is full, or the client may have left: to be tried again in a moment.
    Stalled,
    /// The stream is over.
    Ended(Reason),
}

impl Subscriber {
    /// Writes what waits, in as few writes as can be; before that, where it is `looking`, sees
    /// whether the client is still there. Waits for nobody but another turn of this stream. Unless
    /// the socket is full, there is room for one in the queue afterwards. `closing`: whether the
    /// hub takes no more events, as read before this is called.
    pub fn turn(&self, looking: bool, closing: bool, config: &Config) -> Turn {
        let mut stream = self.stream.lock();
        if stream.over.is_none() {
            // The only use of the socket. A panic there ends this stream, and nothing else: what
            // it leaves half done is not looked at again.
            let act = AssertUnwindSafe(|| {
                if looking || stream.is_probed() {
                    stream.look(config)?;
                }
                stream.flush(config)?;
                let (queue, expired) = (&self.queue.receiver, Instant::now() >= stream.ends);
                if expired {
                    stream.allowed = stream.allowed.min(queue.len() as u64);
                }
                if stream.unsent.is_empty() {
                    stream.fill(queue);
                    // Closing was true before the queue was found empty: nothing can follow.
                    if closing && queue.is_empty() {
                        stream.bid_farewell(Reason::Shutdown, config);
                    } else if stream.allowed == 0 {
                        stream.bid_farewell(Reason::Expired, config);
                    }
                    stream.flush(config)?;
                }
                // It does not read: what it would read later it may hear no more.
                if expired && !stream.unsent.is_empty() {
                    return Err(Reason::Expired);
                }
                Ok(())
            });
            stream.over = catch_unwind(act).unwrap_or(Err(Reason::Fault)).err();
        }
        let turn = match stream.over {
            Some(reason) => Turn::Ended(reason),
            None if !stream.unsent.is_empty() || stream.is_probed() => Turn::Stalled,
            None => Turn::Written,
        };
        self.behind.store(turn != Turn::Written, SeqCst);
        turn
    }

    /// Has missed an event: ends, where it has not ended for another reason.
    pub fn give_up(&self, reason: Reason) {
        self.stream.lock().over.get_or_insert(reason);
        self.behind.store(true, SeqCst);
    }
}

impl Stream {
    /// Begins with the head of an answer; to an HTTP/1.1 client each frame is sent as a chunk. Ends
    /// at the first turn behind `ends`, two seconds later at most, when it is looked at.
    pub fn new(
        socket: Box<dyn Socket>,
        head: String,
        chunked: bool,
        delay: u64,
        ends: Instant,
    ) -> Self {
        let first = Frame::new(&(retry(delay) + COMMENT));
        Self {
            socket,
            chunked,
            ends,
            allowed: u64::MAX,
            unsent: [head.as_bytes(), first.bytes(chunked)].concat(),
            progress: Instant::now(),
            probes: 0,
            farewell: None,
            over: None,
        }
    }

    fn is_probed(&self) -> bool {
        (1..PROBES).contains(&self.probes)
    }

    /// Sees whether the client is still there, and whether it is time for a comment. What a client
    /// sends on its stream is dropped.
    fn look(&mut self, config: &Config) -> Result<(), Reason> {
        let dropped = io::copy(&mut (&mut self.socket).take(MAX_DROPPED), &mut io::sink());
        let half_closed = matches!(dropped, Ok(..MAX_DROPPED));
        dropped.or_else(bear)?;
        let probe = half_closed && self.probes < PROBES;
        let silent = self.progress.elapsed() >= Duration::from_secs(config.heartbeat);
        // Not through the queue, where it would take an event's place; and behind whole frames.
        if self.unsent.is_empty() && (probe || silent) {
            self.push(&Frame::new(COMMENT));
            self.probes += u8::from(probe);
        }
        Ok(())
    }

    /// Takes events from the queue for one write.
    fn fill(&mut self, queue: &Receiver<Frame>) {
        while self.allowed > 0
            && self.unsent.len() < MAX_BATCH
            && let Ok(frame) = queue.try_recv()
        {
            self.push(&frame);
            self.allowed -= 1;
        }
    }

    fn bid_farewell(&mut self, reason: Reason, config: &Config) {
        self.farewell = Some(reason);
        self.push(&Frame::new(&retry(config.retry)));
        // An empty one is the last chunk, which tells an end from a break.
        self.push(&Frame::new(""));
    }

    pub fn push(&mut self, frame: &Frame) {
        if self.unsent.is_empty() {
            self.progress = Instant::now();
        }
        self.unsent.extend_from_slice(frame.bytes(self.chunked));
    }

    fn flush(&mut self, config: &Config) -> Result<(), Reason> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent).or_else(bear)? {
                0 if self.progress.elapsed() < Duration::from_secs(config.write_timeout) => {
                    return Ok(());
                }
                0 => return Err(Reason::WriteTimeout),
                taken => self.unsent.drain(..taken),
            };
            self.progress = Instant::now();
        }
        // An idle stream keeps no buffer.
        self.unsent = Vec::new();
        self.farewell.map_or(Ok(()), Err)
    }
}

/// Takes for nothing what only says that there is no room, or nothing to read.
fn bear<T: Default>(error: io::Error) -> Result<T, Reason> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(T::default()),
        // The client's system has acknowledged nothing for too long: TCP_USER_TIMEOUT.
        ErrorKind::TimedOut => Err(Reason::WriteTimeout),
        _ => Err(Reason::Left),
    }
}
