//! A push server for Server-Sent Events that its users can read.
//!
//! The modules below stand in the order in which they build on each other: each knows only those in
//! front of it. A publish goes the other way: `server` accepts a connection and gives it a thread
//! of its pool; `http` reads a request within limits; `routes` decides; `token` opens what came and
//! makes checked types of it, `event` among them, framed once; `hub` finds the subscribers and
//! fills their queues, under the lock of its map; `writer` threads go from `subscriber` to
//! subscriber and write what waits. `error`, `config` and `metrics` are the ground.
//!
//! Who waits for whom. A thread of the pool for its own client: `SSE_READ_TIMEOUT` for the first
//! byte, for the head, for the body and for each write of an answer, unless that client is closed
//! to make room; with Redis also for that, some seconds. Whoever accepts: for a connection to be
//! let go of that was closed to make room. A publisher: for the hub's lock, in a burst for the
//! kernel to take what it writes, with Redis two seconds. A writer: for a stream that is due.
//! Neither publishers nor writers wait for a client that does not read.
//!
//! ```
//! use sse_server::{Config, Event, Key, Server};
//!
//! let mut config = Config::new(&Key::fresh_secret()?)?;
//! config.listen = ([127, 0, 0, 1], 0).into(); // the system chooses the port
//! let key = config.key.clone();
//! let server = Server::bind(config)?;
//! let running = server.clone();
//! let thread = std::thread::spawn(move || running.run());
//!
//! // Where to send a browser that may read the topic:
//! let token = key.mint_subscription(["jobs"])?;
//! println!("http://{}/events?token={token}", server.local_addr()?);
//! // In-process: no HTTP, no token, the same guarantees.
//! let receipt = server.publish(&[Event::new("jobs", "progress", "50 %")?])?;
//! assert_eq!((receipt.events, receipt.deliveries), (1, 0));
//!
//! server.shutdown();
//! thread.join().expect("the server does not panic")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
compile_error!("sse-server runs on Linux and macOS: it needs their sockets and signals");

// In the order of the layers, lowest first; the blank lines keep the formatter from sorting them.

mod error;

mod config;

mod event;

mod token;

mod metrics;

mod subscriber;

mod hub;

mod writer;

mod http;

#[cfg(feature = "redis")]
mod relay;

mod routes;

mod server;

pub use config::{Config, Key, RedisUrl};
pub use {error::Refusal, event::Event, hub::Receipt, server::Server};
