//! The threads that write the streams. Each blocks on its lane until a stream is due, and on that
//! stream's socket for a moment at most.
//!
//! A thread for each stream would be simpler to think of. It was tried first, and on two cores
//! with 1,000 streams cost 25 µs of CPU for each delivery where these threads take 9 (the kernel
//! keeps the waiting threads of a process in a few hash buckets, and searches them), delivered a
//! fifth as much flat out, and took 85 KiB for each stream (a thread that has ever sent holds
//! 32 KiB of kernel memory for its next packets).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use crate::hub::Hub;

/// How often silent streams are looked for, and whether the server is over.
pub const TICK: Duration = Duration::from_millis(50);

/// Writes the streams of a lane until the server is over. A stream that takes
/// nothing for `patience` is cut.
pub fn run(hub: &Hub, lane: usize, patience: Duration) {
    while !hub.over.load(SeqCst) {
        if let Ok(subscriber) = hub.lanes[lane].1.recv_timeout(TICK) {
            // A panic ends its own stream and nothing else.
            let write = AssertUnwindSafe(|| subscriber.write(patience));
            match catch_unwind(write).unwrap_or(Err("panicked")) {
                Ok(stalled) => hub.put_back(&subscriber, stalled),
                Err(reason) => hub.cut(&subscriber, reason),
            }
        }
    }
}
