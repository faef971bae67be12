//! Which connections stand among those that can be closed to make room, and when. How a server does
//! that under a flood is in hostile.rs.

// The server's own files, which are private to the library.
#[allow(dead_code)]
#[path = "../src/config.rs"]
mod config;
#[allow(dead_code)]
#[path = "../src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../src/event.rs"]
mod event;
#[allow(dead_code)]
#[path = "../src/http.rs"]
mod http;
#[allow(dead_code)]
#[path = "../src/token.rs"]
mod token;

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::thread;

use config::Config;
use http::{Answer, Connection, Waiting};
use support::*;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn answer(authentic: bool) -> Answer {
    Answer {
        status: 200,
        fields: String::new(),
        body: "ok\n".into(),
        stream: None,
        authentic,
    }
}

/// However long it takes to decide on a request, its connection is not closed meanwhile to make room:
/// it does not stand among those that wait for their clients.
#[test]
fn a_request_that_is_being_answered_is_never_evicted() {
    let (config, waiting) = (Config::new(SECRET).unwrap(), Waiting::default());
    let (mut client, socket) = pair();
    let (told, came) = channel();
    let (go, decided) = channel::<()>();
    thread::scope(|scope| {
        let (config, places) = (&config, &waiting);
        scope.spawn(move || {
            let mut connection = Connection::new(socket, config, places);
            loop {
                let received = connection.receive().is_ok();
                told.send(received).unwrap();
                if !received {
                    return;
                }
                decided.recv().unwrap();
                connection = connection.answer(&answer(false), false, false).unwrap();
            }
        });
        let is_waiting = || waiting.lock().len() == 1;
        for _ in 0..3 {
            assert!(
                wait_until(DEADLINE, is_waiting),
                "silent, and not among them"
            );
            client.write_all(b"POST /submit HTTP/1.1\r\n").unwrap();
            client
                .write_all(b"Host: x\r\nContent-Length: 3\r\n\r\n12")
                .unwrap();
            assert!(
                wait_until(DEADLINE, is_waiting),
                "half sent, and not among them"
            );
            client.write_all(b"3").unwrap();
            assert!(came.recv().unwrap());
            assert!(waiting.lock().is_empty(), "decided on, and among them");
            go.send(()).unwrap();
        }
        // Closed as a server does to make room: it is let go of, and stands there no more.
        assert!(wait_until(DEADLINE, is_waiting));
        let (_, evicted) = waiting.lock().pop_first().unwrap();
        evicted.upgrade().unwrap().shutdown(Shutdown::Both).unwrap();
        assert!(!came.recv().unwrap());
        assert!(waiting.lock().is_empty());
    });
}

/// Strangers make room first; among them, and among publishers, whoever came first.
#[test]
fn strangers_make_room_before_publishers() {
    let (config, waiting) = (Config::new(SECRET).unwrap(), Waiting::default());
    let pairs: Vec<_> = (0..3).map(|_| pair()).collect();
    thread::scope(|scope| {
        let (mut order, mut clients) = (Vec::new(), Vec::new());
        for (number, (mut client, socket)) in pairs.into_iter().enumerate() {
            order.push(socket.peer_addr().unwrap());
            client
                .write_all(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
            let (config, places, (answered, next)) = (&config, &waiting, channel());
            scope.spawn(move || {
                let mut connection = Connection::new(socket, config, places);
                assert!(connection.receive().is_ok());
                // The first of them is a publisher.
                let kept = connection.answer(&answer(number == 0), false, false);
                answered.send(()).unwrap();
                assert!(kept.unwrap().receive().is_err());
            });
            assert!(client.read(&mut [0; 1024]).unwrap() > 0);
            clients.push(client);
            // Until then it waits to write, which the client cannot see.
            next.recv().unwrap();
            let there = || waiting.lock().len() == number + 1;
            assert!(wait_until(DEADLINE, there));
        }
        for number in [1, 2, 0] {
            let (_, first) = waiting.lock().pop_first().unwrap();
            let first = first.upgrade().unwrap();
            assert_eq!(first.peer_addr().unwrap(), order[number]);
            first.shutdown(Shutdown::Both).unwrap();
        }
    });
}
