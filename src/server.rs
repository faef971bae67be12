//! Binding, accepting, the pool, the end. Whoever accepts reads nothing and waits for nobody but
//! the pool.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak, atomic::Ordering::SeqCst};
use std::{io, io::ErrorKind, thread, time::Duration, time::Instant};

use crossbeam_channel::bounded;
use rlimit::Resource;
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::http::{Connection, Waiting};
use crate::routes::{Door, last_event_id, reply};
use crate::{config::Config, error::Refusal, event::Event, hub::Hub, hub::Receipt};
use crate::{subscriber::Lane, subscriber::Stream, token::Subscription, writer};

/// Connections the kernel completes before we accept them. With std's 128, 5,000 clients that
/// reconnected at once took 20 s and more; with this, 0.2 s.
const BACKLOG: i32 = 4096;

/// Threads, and with them connections beside the streams: those that send a request, or keep
/// silent. When there are so many, each that comes takes the place of one that waits.
const MAX_THREADS: usize = 4096;

/// Connections above which none is kept for a stranger. Hundreds that send a thousand requests
/// at once wait for a core, not for their clients: whichever was closed to make room took a third
/// of a second to notice, and publishers stood in line behind all of them.
const CROWD: usize = 128;

/// How long a connection waits for a thread to be free, before another is started.
const MOMENT: Duration = Duration::from_micros(200);

/// How long at most it then waits for that one, or one that is made free, to be on its way. That
/// takes longer on a busy machine, and must not start thousands.
const HAND_OVER: Duration = Duration::from_millis(100);

/// How long a thread of the pool waits for its next connection before it ends.
const IDLE: Duration = Duration::from_secs(5);

/// Address space for each of them; what is touched of it, about 16 KiB, becomes memory.
const STACK: usize = 512 * 1024;

/// How long an ending server waits for its subscribers to take what is queued.
const DRAIN: Duration = Duration::from_secs(5);

/// No descriptor left in the system, or in the process: the same numbers on Linux and macOS.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// Descriptors below which nothing is served: what a process needs, and some connections.
const MIN_DESCRIPTORS: u64 = 32;

/// A bound server; the [`Arc`] is the handle to share. Several may live in one process.
pub struct Server {
    hub: Hub,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
    waiting: Waiting,
    /// Connections on their way to a thread. One that is given none ends.
    pool: Lane<Option<(TcpStream, Door)>>,
    /// Each thread that this server has started holds a clone until it ends, or panics.
    threads: Arc<()>,
    /// Each of the pool that has a connection holds a clone. Both counts are read relaxed: a moment
    /// too late costs a thread more, or a connection that is kept, or a look at the end.
    busy: Arc<()>,
}

impl Server {
    /// Binds the addresses. Connections wait in the kernel until [`Server::run`].
    ///
    /// # Errors
    /// Where a setting cannot be used ([`ErrorKind::InvalidInput`]), an address cannot be listened
    /// on, or the system allows too few descriptors.
    pub fn bind(mut config: Config) -> io::Result<Arc<Self>> {
        config.check()?;
        let (descriptors, _) = Resource::NOFILE.get()?;
        if descriptors < MIN_DESCRIPTORS {
            let problem = format!("{descriptors} descriptors are too few: raise ulimit -n");
            return Err(io::Error::other(problem));
        }
        // A part is left for requests, above all for those of publishers.
        let streams = descriptors - (descriptors / 4).min(MAX_THREADS as u64 + 64);
        let capacity = streams.min(config.max_subscribers) as usize;
        let ((sender, receiver), metrics) = (bounded(0), config.metrics_listen);
        let hub = Hub::new(config, capacity);
        #[cfg(feature = "redis")]
        let hub = crate::relay::connect(hub)?;
        Ok(Arc::new(Self {
            listener: listen(hub.config.listen, "SSE_LISTEN")?,
            metrics_listener: metrics
                .map(|at| listen(at, "SSE_METRICS_LISTEN"))
                .transpose()?,
            hub,
            waiting: Waiting::default(),
            pool: Lane { sender, receiver },
            threads: Arc::new(()),
            busy: Arc::new(()),
        }))
    }

    /// The address clients connect to, with the port the system chose where 0 was asked for.
    ///
    /// # Errors
    /// None that a bound listener has.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What an operator wants to know at start: the addresses, and how many streams there can be,
    /// fewer than [`Config::max_subscribers`] where the system allows too few descriptors.
    ///
    /// # Errors
    /// As [`Server::local_addr`].
    pub fn describe(&self) -> io::Result<String> {
        let (address, streams) = (self.local_addr()?, self.hub.capacity);
        let mut line = format!("listening on {address}, at most {streams} streams");
        if let Some(listener) = &self.metrics_listener {
            line += &format!(", metrics on {}", listener.local_addr()?);
        }
        Ok(line)
    }

    /// Streams that are open now. Takes the hub's lock for a moment.
    pub fn subscribers(&self) -> usize {
        self.hub.subscribers()
    }

    /// Those that hear this topic. Takes the hub's lock for a moment.
    pub fn subscribers_of(&self, topic: &str) -> usize {
        self.hub.subscribers_of(topic)
    }

    /// Queues the events to every subscriber of their topics, in order and with no other
    /// submission's between them. Takes the hub's lock, and waits for no client. In a burst it is
    /// as fast as the readers can be written to: where a queue has no room, the calling thread
    /// helps to write.
    ///
    /// Checks no token: whoever holds the server may send to every topic. With Redis it waits for
    /// that, and the deliveries are not known: 0.
    ///
    /// # Errors
    /// For more events than [`Config::queue`], and where the server is about to end. With
    /// Redis also for more than 64 KiB, and where Redis did not confirm that it has them.
    pub fn publish(&self, events: &[Event]) -> Result<Receipt, Refusal> {
        self.hub.submit(None, events)
    }

    /// Serves until [`Server::shutdown`], or until a thread of its own panics. Then lets every
    /// stream send what is queued for it, for at most 5 seconds, and cuts those that have not taken
    /// it. Blocks all that time: give it a thread of its own. The threads it started have ended
    /// when it returns.
    ///
    /// # Errors
    /// Where the system has too few threads left. Then nothing is served.
    pub fn run(self: &Arc<Self>) -> io::Result<()> {
        let threads: [fn(&Arc<Self>); 6] = [
            // Two, as the smallest machines have cores. More gain little, since they meet at the
            // hub's lock and in the kernel.
            |server| writer::run(&server.hub),
            |server| writer::run(&server.hub),
            |server| writer::keep(&server.hub),
            // One of the pool, without which there is no service, stays; more come as needed.
            |server| {
                while !server.hub.over.load(SeqCst) {
                    server.work();
                }
            },
            |server| server.hub.relay.iter().for_each(|it| it.run(&server.hub)),
            |server| server.accept(server.metrics_listener.as_ref(), Door::Metrics),
        ];
        let started = threads.into_iter().try_for_each(|work| self.spawn(work));
        match &started {
            Ok(()) => self.guard(|| self.accept(Some(&self.listener), Door::Public)),
            Err(_) => self.shutdown(),
        }
        let deadline = Instant::now() + DRAIN;
        while self.hub.subscribers() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        self.hub.end();
        // Whoever still waits for a connection, or for a client: to send, which ends now, and until
        // the deadline to take an answer, which may be that a submission was accepted. Besides
        // those only requests to Redis are waited for, which take some seconds at most.
        while Arc::strong_count(&self.threads) > 1 {
            let late = Instant::now() > deadline;
            let how = if late { Shutdown::Both } else { Shutdown::Read };
            for socket in self.waiting.lock().values().filter_map(Weak::upgrade) {
                _ = socket.shutdown(how);
            }
            _ = self.pool.sender.send_timeout(None, MOMENT);
        }
        // A writer may have put one back since.
        self.hub.end();
        started
    }

    /// Ends [`Server::run`], which takes no more connections, drains and returns. Does not wait for
    /// that; takes the hub's lock.
    pub fn shutdown(&self) {
        self.hub.close();
        for listener in [&self.listener].into_iter().chain(&self.metrics_listener) {
            // Wakes the thread that accepts: this on Linux, a connection where that is refused.
            if SockRef::from(listener).shutdown(Shutdown::Both).is_err() {
                _ = listener.local_addr().map(TcpStream::connect);
            }
        }
    }

    /// A panic ends a stream (see `Subscriber::turn`), or a connection (see [`Server::work`]), and
    /// nothing else. Anywhere else, where a thread would be missing from then on and nobody would
    /// notice, it ends the server. No lock is poisoned: what is held under one is left whole
    /// between any two steps that may panic.
    fn guard(&self, work: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            self.shutdown();
        }
    }

    fn spawn(self: &Arc<Self>, work: fn(&Arc<Self>)) -> io::Result<()> {
        let (server, running) = (self.clone(), self.threads.clone());
        let thread = thread::Builder::new().stack_size(STACK);
        let spawned = thread.spawn(move || {
            let _running = running;
            server.guard(|| work(&server));
        });
        spawned.map(drop)
    }

    /// Accepts until the server is closed. Whatever else fails is tried again, with a line in the
    /// log a second, however long that lasts.
    fn accept(self: &Arc<Self>, listener: Option<&TcpListener>, door: Door) {
        for accepted in listener.into_iter().flat_map(TcpListener::incoming) {
            match accepted {
                _ if self.hub.closed.load(SeqCst) => return,
                Ok(socket) => self.hand_over(socket, door),
                // It left before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                // Whoever connects waits in the kernel meanwhile. Linux also says here what the
                // network has reported of one that came, for which no other has to go.
                Err(error) => {
                    let line = format_args!("cannot accept connections: {error}");
                    self.hub.metrics.accept_failures.warn(line);
                    if matches!(error.raw_os_error(), Some(ENFILE | EMFILE)) {
                        self.make_room();
                    }
                    thread::sleep(MOMENT);
                }
            }
        }
    }

    /// Gives a connection to a thread that waits for one, or to a new one, or frees one.
    fn hand_over(self: &Arc<Self>, socket: TcpStream, door: Door) {
        let (mut arrival, mut patience) = (Some((socket, door)), MOMENT);
        while let Err(nobody) = self.pool.sender.send_timeout(arrival, patience)
            && !self.hub.closed.load(SeqCst)
        {
            if Arc::strong_count(&self.threads) > MAX_THREADS {
                self.make_room();
            } else if let Err(error) = self.spawn(|server| server.work()) {
                let line = format_args!("cannot start a thread: {error}");
                self.hub.metrics.accept_failures.warn(line);
                self.make_room();
            }
            (arrival, patience) = (nobody.into_inner(), HAND_OVER.min(10 * patience));
        }
    }

    /// Closes the connection that comes first among those that wait.
    fn make_room(&self) {
        let first = self.waiting.lock().pop_first();
        if let Some(socket) = first.and_then(|(_, socket)| socket.upgrade()) {
            _ = socket.shutdown(Shutdown::Both);
            let line = "connection closed to make room for another";
            self.hub.metrics.evicted.warn(line);
            // There is room when its thread has let go of it: until then no other is closed.
            let released = Arc::downgrade(&socket);
            drop(socket);
            while released.strong_count() > 0 {
                thread::sleep(MOMENT);
            }
        }
    }

    /// A thread of the pool: one connection after the other.
    fn work(&self) {
        while let Ok(Some((socket, door))) = self.pool.receiver.recv_timeout(IDLE) {
            _ = socket.set_nodelay(true);
            let _busy = self.busy.clone();
            let connection = Connection::new(socket, &self.hub.config, &self.waiting);
            let serve = AssertUnwindSafe(|| self.serve(connection, door));
            _ = catch_unwind(serve);
        }
    }

    /// Answers the requests of a connection until it ends or becomes a stream.
    fn serve(&self, mut connection: Connection, door: Door) -> Option<()> {
        loop {
            let received = connection.receive();
            let mut answer = reply(&self.hub, door, &received)?;
            if let (Some(opened), Ok(request)) = (answer.stream.take(), received) {
                let Subscription { topics, ends } = opened;
                let (socket, config) = (connection.into_stream().ok()?, &self.hub.config);
                end_if_vanished(&socket, Duration::from_secs(config.write_timeout));
                let (head, chunked) = (answer.head(true), request.modern);
                let stream = Stream::new(Box::new(socket), head, chunked, config.retry, ends);
                match &self.hub.relay {
                    Some(relay) => {
                        relay.subscribe(&self.hub, topics, stream, last_event_id(&request));
                    }
                    None => self.hub.subscribe(topics, stream),
                }
                return None;
            }
            let crowded = Arc::strong_count(&self.busy) > CROWD;
            let ending = self.hub.closed.load(SeqCst);
            connection = connection.answer(&answer, crowded, ending)?;
        }
    }
}

/// A peer that vanished acknowledges nothing: its stream ends after so long, at the latest of the
/// next comment. Where the system has no such option, its own limits hold: failing is no error.
fn end_if_vanished(socket: &TcpStream, patience: Duration) {
    let socket = SockRef::from(socket);
    _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(patience));
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(patience));
}

fn listen(address: SocketAddr, setting: &str) -> io::Result<TcpListener> {
    let refused = |error| {
        let problem =
            format!("cannot listen on {address}: {error}: change {setting} or what has it");
        io::Error::other(problem)
    };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).map_err(refused)?;
    socket.listen(BACKLOG).map_err(refused)?;
    Ok(socket.into())
}
