//! A push server for Server-Sent Events that its users can read.
//!
//! A publish is read in this order: `server` accepts a connection and gives it a thread; `routes`
//! answers its requests; `token` opens what came in and makes checked types of it; `event` frames
//! it, once; `hub` finds the subscribers and fills their queues, under the one lock there is;
//! `writer` threads go from subscriber to subscriber and write what waits. `config`, `error` and
//! `journal` (counters and log) are the ground.
//!
//! Who blocks on what: a connection's thread on that connection's requests; a publisher on nothing
//! but the topic map's lock; a writer on its lane of due subscribers, and on one socket for a
//! moment at most; nobody on a slow subscriber.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

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
