//! What a panic ends, where it comes from a program that embeds the server: from its logger. One at a
//! time, since there is one logger for all.

mod support;

use std::{panic, sync::Mutex, thread};

use sse_server::{Config, Server};
use support::*;

/// Panics once, at a line that begins so.
struct Broken(Mutex<Option<&'static str>>);

static LOGGER: Broken = Broken(Mutex::new(None));

impl log::Log for Broken {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let line = record.args().to_string();
        let fatal = LOGGER
            .0
            .lock()
            .unwrap()
            .take_if(|begin| line.starts_with(*begin));
        if fatal.is_some() {
            panic::resume_unwind(Box::new("the logger is broken"));
        }
    }

    fn flush(&self) {}
}

fn break_at(line: &'static str) {
    *LOGGER.0.lock().unwrap() = Some(line);
}

fn has_broken() -> bool {
    LOGGER.0.lock().unwrap().is_none()
}

#[test]
fn a_panic_ends_its_connection_or_the_server_and_is_never_unnoticed() {
    log::set_logger(&LOGGER).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let mut config = Config::new(SECRET).unwrap();
    config.listen = "127.0.0.1:0".parse().unwrap();
    let key = config.key.clone();
    let server = Server::bind(config).unwrap();
    let (running, addr) = (server.clone(), server.local_addr().unwrap());
    let running = thread::spawn(move || running.run());
    let subscribe = || {
        let token = key.mint_subscription(["t"]).unwrap();
        subscribe(addr, &format!("/events?token={token}"))
    };
    let mut stays = subscribe();

    // In a thread of the pool: a request that is refused. Its connection ends; nothing else does.
    break_at("request refused");
    let mut connection = Connection::open(addr);
    connection.send(request("GET", "/nothing", "", b""));
    connection.expect_closed();
    assert!(has_broken(), "closed for another reason");
    let mut connection = Connection::open(addr);
    connection.send(request("GET", "/ping", "", b""));
    assert_eq!(connection.answer().status, 200);

    // In a writer. Without one a server would be there, and say nothing to anybody for ever.
    break_at("stream ended");
    drop(subscribe());
    let ended = wait_until(DEADLINE, || running.is_finished());
    assert!(ended && has_broken());
    running.join().unwrap().unwrap();
    stays.expect_end();
}
