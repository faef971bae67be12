//! One subscriber: its queue, its socket, and the bytes between the two.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{io, io::ErrorKind, io::Write, time::Duration, time::Instant};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::event::{Frame, Topics};

/// Bytes after which what waits is written before more is added to the same write.
const MAX_BATCH: usize = 16 * 1024;

pub struct Subscriber {
    pub topics: Topics,
    /// The one hand-over, bounded, from publishers to writers.
    pub queue: (Sender<Frame>, Receiver<Frame>),
    /// Stands in a lane or is being written: must not be put into a lane again.
    pub scheduled: AtomicBool,
    /// Has missed an event, because its queue was full: gets no other and is cut.
    pub lagging: AtomicBool,
    /// Locked by the one writer whose turn it is, and for a moment to see how long it was silent.
    pub stream: Mutex<Stream>,
}

pub struct Stream {
    pub writer: Box<dyn Write + Send>,
    /// Bytes the socket has not taken yet.
    pub rest: Vec<u8>,
    /// The socket did not take all when it was last asked to.
    pub stalled: bool,
    /// When the socket last took something, or was first asked to.
    pub active: Instant,
}

impl Subscriber {
    /// Writes what waits, in as few writes as can be. Does not block: says whether the socket was
    /// full.
    ///
    /// # Errors
    /// Why the subscriber has to be cut: among others, `patience` without progress.
    pub fn write(&self, patience: Duration) -> Result<bool, &'static str> {
        let mut stream = self.stream.lock();
        if self.lagging.load(SeqCst) {
            return Err("queue_full");
        }
        while stream.rest.len() < MAX_BATCH
            && let Ok(frame) = self.queue.1.try_recv()
        {
            stream.rest.extend_from_slice(&frame);
        }
        if !stream.stalled {
            stream.active = Instant::now();
        }
        let written = stream.flush().map_err(|error| error.kind());
        stream.stalled = written.is_err();
        match written {
            Ok(()) => Ok(false),
            Err(ErrorKind::WouldBlock) if stream.active.elapsed() < patience => Ok(true),
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err("write_timeout"),
            Err(_) => Err("disconnected"),
        }
    }
}

impl Stream {
    fn flush(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            let taken = self.writer.write(&self.rest)?;
            self.rest.drain(..taken);
            self.active = Instant::now();
        }
        // An idle stream keeps no buffer.
        self.rest = Vec::new();
        self.writer.flush()
    }
}
