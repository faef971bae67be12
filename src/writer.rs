//! The threads that write the streams. They wait until one is due, and never for a client.
//!
//! A thread for each stream would be simpler to think of. It was tried first, and on two cores
//! with 1,000 streams cost 25 µs of CPU for each delivery where these threads take 9 (the kernel
//! keeps the waiting threads of a process in a few hash buckets, and searches them), delivered a
//! fifth as much flat out, and took 85 KiB for each stream (a thread that has ever sent holds
//! 32 KiB of kernel memory for its next packets).

use std::sync::{Arc, atomic::Ordering::SeqCst};
use std::{mem, thread, time::Duration};

use crate::hub::Hub;

/// How soon a full socket is tried again. That takes 2 µs: were all of 10,000 full, one core until
/// they are cut.
const TICK: Duration = Duration::from_millis(20);

/// Ticks in which every stream is looked at once, 1.7 s: a client that left is noticed within two.
/// Looks cost 2 µs each, half of it in the kernel; with 10,000 streams 1 % of a core.
const ROUND: u64 = 85;

/// Writes streams that are due, until the server is over.
pub fn run(hub: &Hub) {
    while !hub.over.load(SeqCst) {
        if let Ok(subscriber) = hub.due.receiver.recv_timeout(5 * TICK) {
            hub.take_turn(&subscriber);
        }
    }
}

/// Makes stalled streams due again, and looks at each stream once in a round, without the hub's
/// lock, until the server is over.
pub fn keep(hub: &Hub) {
    // A heartbeat is late by a quarter of its time at most.
    let round = ROUND.min(12 * hub.config.heartbeat) as usize;
    while !hub.over.load(SeqCst) {
        thread::sleep(TICK);
        let stalled = mem::take(&mut *hub.stalled.lock());
        for subscriber in stalled {
            // Where another thread is quicker than the next line, it is due all the same.
            subscriber.scheduled.store(false, SeqCst);
            hub.schedule(&subscriber);
        }
        let mut circle = hub.circle.lock();
        for _ in 0..circle.len().div_ceil(round) {
            if let Some(subscriber) = circle.pop_front().and_then(|it| it.upgrade()) {
                hub.look(&subscriber);
                circle.push_back(Arc::downgrade(&subscriber));
            }
        }
    }
}
