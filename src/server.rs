//! Binding, accepting, ending. One thread accepts; it reads nothing and waits for nobody.

use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::Ordering::SeqCst;
use std::{io, io::Write, panic::catch_unwind, sync::Arc, thread, time::Duration, time::Instant};

use nix::sys::{resource, resource::getrlimit, socket::setsockopt, socket::sockopt, time::TimeVal};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tiny_http::{Listener, SslContextWrap};

use crate::{config::Config, error::Refusal, event, event::Event, hub::Hub, hub::Receipt};
use crate::{routes, writer};

/// Connections the kernel completes before we accept them. With std's 128, 5,000 clients that
/// reconnected at once took 20 s and more; with this, 0.2 s.
const BACKLOG: i32 = 4096;
/// Connections beside the streams: those that send a request, or keep silent until the timeout.
/// Streams have a cap of their own, so that neither kind can starve the other.
const MAX_CONNECTIONS: usize = 4096;
/// Connections at once from which on the next one waits a moment for another to end: a burst of
/// good clients then does not reach the limit, while silent ones cannot keep the others out.
const EAGER: usize = 512;
/// Address space for each of them; what is touched of it, about 16 KiB, becomes memory.
const STACK: usize = 512 * 1024;
/// Threads that write: as many as the cores of the smallest machines. More gain little, since
/// they meet at the topic map's lock and in the kernel.
const WRITERS: usize = 2;
/// How long an ending server waits for its subscribers to take what is queued.
const DRAIN: Duration = Duration::from_secs(5);

/// A bound server; the [`Arc`] is the handle to share. Several may live in one process.
pub struct Server {
    pub(crate) config: Config,
    pub(crate) hub: Hub,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
}

impl Server {
    /// Binds the addresses. Connections wait in the kernel until [`Server::run`].
    ///
    /// # Errors
    /// Where an address cannot be listened on.
    pub fn bind(config: Config) -> io::Result<Arc<Self>> {
        let metrics_address = config.metrics_listen;
        let capacity = limits().2.min(config.max_subscribers as usize);
        Ok(Arc::new(Self {
            hub: Hub::new(capacity, config.queue as usize),
            listener: listen(&config, config.listen)?,
            metrics_listener: metrics_address.map(|it| listen(&config, it)).transpose()?,
            config,
        }))
    }

    /// The address clients connect to, with the port the system chose where 0 was asked for.
    ///
    /// # Errors
    /// None that a bound listener has.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What an operator wants to know at start: the addresses, and how many streams there can be.
    ///
    /// # Errors
    /// As [`Server::local_addr`].
    pub fn describe(&self) -> io::Result<String> {
        let (address, streams) = (self.local_addr()?, self.hub.capacity);
        let (limit, _, allowed) = limits();
        let mut line = format!("listening on {address}, at most {streams} streams");
        line += &format!(" (the descriptor limit of {limit} allows {allowed})");
        if streams < self.config.max_subscribers as usize {
            line += ", fewer than SSE_MAX_SUBSCRIBERS: raise ulimit -n";
        }
        if let Some(listener) = &self.metrics_listener {
            line += &format!(", metrics on {}", listener.local_addr()?);
        }
        Ok(line)
    }

    /// Queues the events to every subscriber of their topics, in order and with no other
    /// submission's between them. Takes the topic map's lock; waits for no subscriber.
    ///
    /// Checks no token: whoever holds the server may send to every topic.
    ///
    /// # Errors
    /// Where the server is about to end.
    pub fn publish(&self, events: &[Event]) -> Result<Receipt, Refusal> {
        self.hub.publish(events)
    }

    /// Serves until [`Server::shutdown`], then lets every stream send what is queued for it, for
    /// at most 5 seconds. Blocks all that time: give it a thread of its own. Streams that have
    /// not ended by then are cut when the server is dropped.
    pub fn run(self: &Arc<Self>) {
        thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(move || writer::run(&self.hub, self.config.write_timeout));
            }
            scope.spawn(move || writer::keep(&self.hub, self.config.heartbeat));
            if let Some(listener) = &self.metrics_listener {
                scope.spawn(|| self.accept(listener, true));
            }
            self.accept(&self.listener, false);
            let deadline = Instant::now() + DRAIN;
            while self.hub.subscribers.load(SeqCst) > 0 && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
            self.hub.over.store(true, SeqCst);
            let _unread = writeln!(io::stderr(), "stopped");
        });
    }

    /// Ends [`Server::run`], which takes no more connections, drains and returns. Does not wait.
    pub fn shutdown(&self) {
        self.hub.close(|| event::retry(self.config.retry));
        for listener in [&self.listener].into_iter().chain(&self.metrics_listener) {
            // Wakes the thread that accepts. Where it fails, the listener's timeout does.
            let _ = SockRef::from(listener).shutdown(Shutdown::Both);
        }
    }

    /// Gives each connection a thread of its own until it ends or becomes a stream.
    fn accept(self: &Arc<Self>, listener: &TcpListener, metrics: bool) {
        let listener = Listener::from(listener.try_clone().expect("a descriptor at start"));
        let no_tls = SslContextWrap::build_ssl_capabilities(None).expect("nothing to load");
        let (journal, (_, most, _)) = (&self.hub.journal, limits());
        // Each thread holds a clone, and drops it however it ends: the count is that of threads.
        let threads = Arc::new(());
        while !self.hub.closed.load(SeqCst) {
            if Arc::strong_count(&threads) > EAGER {
                thread::sleep(Duration::from_micros(200));
            }
            // The library panics where a connection has taken the last descriptor.
            match catch_unwind(|| tiny_http::Server::accept_connection(&listener, &no_tls)) {
                Ok(Ok(Some(connection))) => {
                    let (server, held) = (self.clone(), threads.clone());
                    let serve = move || {
                        let mut requests = connection.map_while(Result::ok);
                        requests.any(|request| routes::respond(&server, metrics, request));
                        drop(held);
                    };
                    let thread = thread::Builder::new().stack_size(STACK);
                    if Arc::strong_count(&threads) > most || thread.spawn(serve).is_err() {
                        journal.warn("sse_connections_refused_total", "too many connections");
                    }
                }
                // The listener's own timeout.
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ if self.hub.closed.load(SeqCst) => {}
                // Out of descriptors, as a rule. Whoever connects waits in the kernel meanwhile.
                _ => {
                    journal.warn("sse_accept_failures_total", "cannot accept connections");
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }
}

/// A listener whose options every accepted connection inherits, as Linux has it: the library
/// keeps a connection's socket to itself.
fn listen(config: &Config, address: SocketAddr) -> io::Result<TcpListener> {
    let [read, write] = [config.read_timeout, config.write_timeout].map(Duration::from_secs);
    let refused = |error| io::Error::other(format!("cannot listen on {address}: {error}"));
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_read_timeout(Some(read))?;
    // Linux takes less than no time for no wait: a write that a full socket makes wait for one
    // tick, the least that std can set, holds up all others for 8 ms here; this one takes 2 µs.
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(-1, 0))?;
    // A peer that vanished acknowledges nothing. Its connection ends after this time, and the
    // next heartbeat's write reports it.
    socket.set_tcp_user_timeout(Some(write))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(write))?;
    socket.bind(&address.into()).map_err(refused)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Open files the system allows. Of those, what connections may be, a seventh, since each has two
/// until it becomes a stream; and what streams may be, two thirds. The rest is for the process.
fn limits() -> (usize, usize, usize) {
    let files = getrlimit(resource::Resource::RLIMIT_NOFILE)
        .map_or(usize::MAX, |(soft, _hard)| soft as usize);
    (files, MAX_CONNECTIONS.min(files / 7), files / 3 * 2)
}
