//! The publisher, and the two ways of driving it: as fast as a window allows, or at a rate.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use mio::Interest;
use mio::net::TcpStream;

use crate::Result;
use crate::client::{PATIENCE, PUBLISHER, Shape, Swarm};
use crate::servers::{Server, answer_length, process_cpu};

/// What is not measured at the start of a run flat out.
const WARM_UP: Duration = Duration::from_millis(300);

/// A server with its subscribers and one keep-alive connection to publish on. Requests are
/// pipelined: the window holds the publisher back, not the round trip, and order is defined on
/// one connection only.
pub struct Load {
    /// First, so that it ends before the subscribers leave.
    pub server: Server,
    pub swarm: Swarm,
    begin: Instant,
    /// How long it took until all subscribers had their response heads.
    pub connecting: Duration,
    shape: Shape,
    stream: TcpStream,
    /// The bytes of each submission of the cycle.
    prepared: Vec<Vec<u8>>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    /// Requests without an answer.
    unanswered: usize,
}

impl Load {
    pub fn start(server: Server, shape: Shape) -> Result<Self> {
        let begin = Instant::now();
        let swarm = Swarm::connect(&server, shape)?;
        let connecting = begin.elapsed();
        let mut stream = TcpStream::connect(server.address)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registry = swarm.poll.registry();
        registry.register(&mut stream, PUBLISHER, interest)?;
        let mut load = Self {
            server,
            swarm,
            begin,
            connecting,
            shape,
            stream,
            prepared: Vec::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            unanswered: 0,
        };
        let firsts = (0..shape.cycle).step_by(shape.batch);
        load.prepared = firsts.map(|first| load.publication(first)).collect();
        Ok(load)
    }

    /// The bytes that publish the batch that begins with this event.
    pub fn publication(&self, first: usize) -> Vec<u8> {
        let events = (first..first + self.shape.batch).map(|number| self.shape.event(number));
        self.server.publication(&events.collect::<Vec<_>>())
    }

    /// As fast as possible, with at most `window` events that not every subscriber has.
    pub fn flat_out(&mut self, window: u64, time: Duration) -> Result<Sample> {
        let (begin, mut start) = (Instant::now(), None);
        while begin.elapsed() < WARM_UP + time {
            if start.is_none() && begin.elapsed() >= WARM_UP {
                start = Some(Sample::now(self));
            }
            while self.swarm.tally.has_room(window as usize) {
                self.send();
            }
            self.pump()?;
            self.swarm.turn(Duration::from_millis(50))?;
        }
        let sample = start.ok_or("too short")?.until_now(self);
        self.finish()?;
        Ok(sample)
    }

    /// So many events a second, each sent when its time has come, however far behind others are.
    pub fn at_rate(&mut self, rate: f64, time: Duration) -> Result<Sample> {
        self.swarm.tally.latencies = Some(Vec::new());
        let (start, begin, mut published) = (Sample::now(self), Instant::now(), 0.0);
        while begin.elapsed() < time {
            let due = begin + Duration::from_secs_f64(published / rate);
            let wait = due.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                self.send();
                published += 1.0;
            }
            self.pump()?;
            self.swarm.turn(wait)?;
        }
        self.finish()?;
        let mut sample = start.until_now(self);
        sample.latencies = self.swarm.tally.latencies.take().unwrap_or_default();
        sample.latencies.sort_unstable();
        Ok(sample)
    }

    fn send(&mut self) {
        let place = self.swarm.tally.sent / self.shape.batch % self.prepared.len();
        self.outgoing.extend_from_slice(&self.prepared[place]);
        self.unanswered += self.server.answers(self.shape.batch);
        self.swarm.tally.sending(self.shape.batch);
    }

    /// Writes and reads what can be without waiting.
    fn pump(&mut self) -> Result<()> {
        // Not connected: its connection is still being made.
        let blocked = |kind| matches!(kind, ErrorKind::WouldBlock | ErrorKind::NotConnected);
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Err(error) if blocked(error.kind()) => break,
                taken => drop(self.outgoing.drain(..taken?)),
            }
        }
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err("the server closed the publisher's connection".into()),
            Err(error) if blocked(error.kind()) => {}
            came => self.incoming.extend_from_slice(&buffer[..came?]),
        }
        while let Some(length) = answer_length(&self.incoming)? {
            self.incoming.drain(..length);
            self.unanswered -= 1;
        }
        Ok(())
    }

    /// Waits until all is answered and everyone has everything.
    fn finish(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.unanswered > 0 {
            if Instant::now() > deadline {
                return Err(format!("{} submissions never answered", self.unanswered).into());
            }
            self.pump()?;
            self.swarm.turn(Duration::from_millis(5))?;
        }
        self.swarm.settle()
    }
}

/// What a run brought; also the state of all counters at its start.
pub struct Sample {
    at: Duration,
    deliveries: f64,
    /// CPU time of the server, and of this process.
    cpu: Duration,
    own_cpu: Duration,
    /// Microseconds, sorted.
    latencies: Vec<u32>,
}

impl Sample {
    fn now(load: &Load) -> Self {
        Self {
            at: load.begin.elapsed(),
            deliveries: load.swarm.tally.deliveries as f64,
            cpu: load.server.cpu(),
            own_cpu: process_cpu("self"),
            latencies: Vec::new(),
        }
    }

    fn until_now(self, load: &Load) -> Self {
        let mut now = Self::now(load);
        now.at -= self.at;
        now.deliveries -= self.deliveries;
        now.cpu -= self.cpu;
        now.own_cpu -= self.own_cpu;
        now
    }

    /// Deliveries a second.
    pub fn rate(&self) -> f64 {
        self.deliveries / self.at.as_secs_f64()
    }

    /// Microseconds of the server for each delivery.
    pub fn cpu_each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.deliveries
    }

    /// Percent of a core that this process used.
    pub fn own_share(&self) -> f64 {
        100.0 * self.own_cpu.as_secs_f64() / self.at.as_secs_f64()
    }

    /// Milliseconds within which this share of the deliveries came.
    pub fn latency(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1) as f64;
        let latency = self.latencies.get((last * share).round() as usize);
        f64::from(*latency.unwrap_or(&0)) / 1000.0
    }
}
