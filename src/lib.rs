//! A push server for Server-Sent Events that its users can read.
//!
//! A publish is read in this order: `server` accepts a connection and gives it a thread; `routes`
//! answers its requests; `token` opens what came in and makes checked types of it; `event` frames
//! it, once; `hub` finds the subscribers and fills their queues, under the one lock there is;
//! `writer` threads go from subscriber to subscriber and write what waits. `config`, `error` and
//! `journal` (counters and log) are the ground.
//!
//! Who blocks on what: a connection's thread on that connection's requests; a publisher on nothing
//! but the locks of the topic map and the counters; a writer on the lane of due subscribers; nobody
//! on a slow subscriber.
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
//! let token = key.mint_subscription(&["jobs"])?;
//! println!("http://{}/events?token={token}", server.local_addr()?);
//! // In-process: no HTTP, no token, the same guarantees.
//! let receipt = server.publish(&[Event::new("jobs", "progress", "50 %")?])?;
//! assert_eq!((receipt.events, receipt.deliveries), (1, 0));
//!
//! server.shutdown();
//! thread.join().expect("the server does not panic");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod config;
mod error;
mod event;
mod hub;
mod journal;
mod routes;
mod server;
mod subscriber;
mod token;
mod writer;

pub use {config::Config, error::Refusal, event::Event, hub::Receipt, server::Server, token::Key};
