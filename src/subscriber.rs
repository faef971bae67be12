//! One stream: its queue, its socket, what is unsent, and one turn of writing. Knows frames and
//! something that makes nobody wait, neither to be read nor to be written; no other stream.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{io, io::ErrorKind, io::Read, io::Write, time::Duration, time::Instant};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::event::{COMMENT, Frame, Topics, retry};
use crate::{config::Config, metrics::Reason};

/// Bytes after which what waits is written before more is added to the same write.
const MAX_BATCH: usize = 16 * 1024;

/// Comments sent to a client that says it will send nothing more, one at each retry: half a second.
/// One that has left answers the first with a reset, which a later one meets; one that has only
/// closed its sending side, as some do, lives on.
const PROBES: u8 = 25;

/// KiB that are read at a look of what a client sends on its stream. Behind them stands its end.
const MAX_DROPPED: usize = 64;

/// What a stream is written to: a `TcpStream` that is set never to wait, or in tests a mock.
pub trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// A hand-over from one thread to another, in order.
pub struct Lane<T> {
    pub sender: Sender<T>,
    pub receiver: Receiver<T>,
}

pub struct Subscriber {
    /// No other subscriber of the hub has it.
    pub id: u64,
    pub topics: Topics,
    /// From publishers to writers: bounded, so that whoever does not read costs no more than this.
    pub queue: Lane<Frame>,
    /// Stands in a lane, or has its turn: true from then on until the end of the turn, so that it
    /// stands in one lane at most, and once. Whoever leaves work (an event, unsent bytes) does so
    /// *before* looking here; whoever ends a turn clears this *before* looking for work. One of the
    /// two sees the other: that takes one order of all four steps, hence `SeqCst`.
    pub scheduled: AtomicBool,
    /// Needs a turn, whatever the queue holds: the socket did not take all when it was last asked
    /// to, or there is a comment or an end. Set under the stream's lock.
    pub behind: AtomicBool,
    /// Locked for a turn. Whoever has it waits for nobody.
    pub stream: Mutex<Stream>,
}

/// The client's side of a subscriber.
pub struct Stream {
    socket: Box<dyn Socket>,
    /// Each frame goes in a chunk of its own.
    chunked: bool,
    /// Whole frames, of the first of which a part may have been sent.
    unsent: Vec<u8>,
    /// When the socket last took something, or was first asked to.
    progress: Instant,
    /// Comments sent since the client closed its sending side.
    probes: u8,
    /// The farewell is in `unsent`, or sent: nothing may follow it.
    told: bool,
    /// Nothing more is read or written, for this reason, whoever asks. While the socket is used it
    /// stands at a fault, and stays there if that panics: which ends this stream, and nothing else.
    over: Option<Reason>,
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// What was taken from the queue was written.
    Written,
    /// The same, but the client may have left: to be looked at again in a moment.
    Probed,
    /// The socket is full: to be tried again in a moment.
    Full,
    /// The stream is over.
    Ended(Reason),
}

impl Subscriber {
    /// Writes what waits, in as few writes as can be. Waits for nobody but another turn of this
    /// stream. `closing`: whether the hub takes no more events, as read before this is called.
    pub fn turn(&self, closing: bool, config: &Config) -> Turn {
        let (queue, mut stream) = (&self.queue.receiver, self.stream.lock());
        if stream.is_probed() {
            stream.look(config);
        }
        if stream.over.is_none() {
            while stream.unsent.len() < MAX_BATCH
                && let Ok(frame) = queue.try_recv()
            {
                stream.push(&frame);
            }
            // Closing was true before the queue was found empty: nothing can follow.
            if closing && queue.is_empty() {
                stream.tell_farewell(config);
            }
            if !self.behind.load(SeqCst) && !stream.unsent.is_empty() {
                stream.progress = Instant::now();
            }
            stream.over = Some(Reason::Fault);
            stream.over = stream.flush(config).err();
            self.behind.store(!stream.unsent.is_empty(), SeqCst);
        }
        match stream.over {
            Some(reason) => Turn::Ended(reason),
            None if !stream.unsent.is_empty() => Turn::Full,
            None if stream.is_probed() => Turn::Probed,
            None => Turn::Written,
        }
    }

    /// Sees whether the client is still there, and whether it is time for a comment; whether a turn
    /// is needed. Leaves alone whoever has a turn just now. Reading takes the pending error of the
    /// socket with it: what it was is kept for that turn.
    pub fn look(&self, config: &Config) -> bool {
        let stream = self.stream.try_lock();
        stream.is_some_and(|mut stream| stream.look(config))
    }

    /// Has missed an event: ends, where it has not ended for another reason.
    pub fn give_up(&self) {
        self.stream.lock().over.get_or_insert(Reason::QueueFull);
        self.behind.store(true, SeqCst);
    }
}

impl Stream {
    /// Begins with the head of an answer; to an HTTP/1.1 client each frame is sent as a chunk.
    pub fn new(socket: Box<dyn Socket>, head: String, chunked: bool, delay: u64) -> Self {
        let mut stream = Self {
            socket,
            chunked,
            unsent: head.into(),
            progress: Instant::now(),
            probes: 0,
            told: false,
            over: None,
        };
        stream.push(&Frame::new(&(retry(delay) + COMMENT)));
        stream
    }

    fn push(&mut self, frame: &Frame) {
        if !self.told {
            self.unsent.extend_from_slice(frame.bytes(self.chunked));
        }
    }

    fn tell_farewell(&mut self, config: &Config) {
        self.push(&Frame::new(&retry(config.retry)));
        if self.chunked && !self.told {
            // The last chunk tells an end from a break.
            self.unsent.extend_from_slice(b"0\r\n\r\n");
        }
        self.told = true;
    }

    fn is_probed(&self) -> bool {
        (1..PROBES).contains(&self.probes)
    }

    /// Whether there is an end, or a comment to be sent. What a client sends on its stream is
    /// dropped.
    fn look(&mut self, config: &Config) -> bool {
        if self.over.is_some() {
            return true;
        }
        self.over = Some(Reason::Fault);
        let mut read = self.socket.read(&mut [0; 1024]);
        for _ in 1..MAX_DROPPED {
            if let Ok(1..) = read {
                read = self.socket.read(&mut [0; 1024]);
            }
        }
        let probe = matches!(read, Ok(0)) && self.probes < PROBES;
        self.over = read.or_else(bear).err();
        let silent = self.progress.elapsed() >= Duration::from_secs(config.heartbeat);
        // Not through the queue, where it would take an event's place; and behind whole frames.
        let comment = self.unsent.is_empty() && (probe || silent);
        if comment {
            self.push(&Frame::new(COMMENT));
            self.probes += u8::from(probe);
            self.progress = Instant::now();
        }
        comment || self.over.is_some()
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
        if self.told {
            Err(Reason::Shutdown)
        } else {
            Ok(())
        }
    }
}

/// Takes for nothing what only says that there is no room, or nothing to read.
fn bear(error: io::Error) -> Result<usize, Reason> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(0),
        // The client's system has acknowledged nothing for too long: TCP_USER_TIMEOUT.
        ErrorKind::TimedOut => Err(Reason::WriteTimeout),
        _ => Err(Reason::Left),
    }
}
