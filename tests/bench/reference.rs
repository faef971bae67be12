//! What the kernel allows: a server that does nothing but the writes. No token, no queue, no slow
//! readers, no guarantee. Two threads copy what was published since their last round to half of
//! the sockets each, with one write to each.
//!
//! It is a process of its own: this program, with the argument `reference`. Answers, heads and
//! frames have the bytes that ours have.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::{mem, thread};

use socket2::{Domain, Socket, Type};

use crate::Result;

const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\
    Content-Type: text/event-stream; charset=utf-8\r\n\
    Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\
    Transfer-Encoding: chunked\r\nAccess-Control-Allow-Origin: *\r\nVary: Origin\r\n\r\n\
    e\r\nretry: 4000\n:\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\
    Content-Type: application/json\r\nAccess-Control-Allow-Origin: *\r\nVary: Origin\r\n\
    Content-Length: 34\r\n\r\n{\"events\": 1, \"deliveries\": 1000}\n";

/// What one of the two threads has.
#[derive(Default)]
struct Half {
    sockets: Mutex<Vec<TcpStream>>,
    /// Since its last round.
    published: Mutex<Vec<u8>>,
    more: Condvar,
}

/// Serves until it is killed.
pub fn serve() -> Result<bool> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(4096)?;
    let listener = TcpListener::from(socket);
    eprintln!("listening on {}", listener.local_addr()?);
    let halves: [Arc<Half>; 2] = Default::default();
    for half in halves.clone() {
        thread::spawn(move || rounds(&half));
    }
    // Streams are asked for one after the other, and only then is anything published.
    for (number, stream) in listener.incoming().enumerate() {
        let mut reader = BufReader::new(stream?);
        reader.get_ref().set_nodelay(true)?;
        let line = read_line(&mut reader)?;
        if line.starts_with("GET ") {
            while !read_line(&mut reader)?.is_empty() {}
            reader.get_mut().write_all(STREAM)?;
            let mut sockets = halves[number % 2].sockets.lock().expect("no panic");
            sockets.push(reader.into_inner());
        } else {
            let halves = halves.clone();
            thread::spawn(move || publish(reader, &halves));
        }
    }
    Ok(true)
}

fn rounds(half: &Half) {
    loop {
        let published = half.published.lock().expect("no panic");
        let published = half.more.wait_while(published, |it| it.is_empty());
        let bytes = mem::take(&mut *published.expect("no panic"));
        for socket in half.sockets.lock().expect("no panic").iter_mut() {
            // Whoever has left is no concern of a reference.
            _ = socket.write_all(&bytes);
        }
    }
}

/// Each body is the data of an event. The first request line has been read.
fn publish(mut reader: BufReader<TcpStream>, halves: &[Arc<Half>]) -> Result<()> {
    loop {
        let mut length = 0;
        loop {
            let line = read_line(&mut reader)?;
            match line.strip_prefix("Content-Length: ") {
                Some(digits) => length = digits.parse()?,
                None if line.is_empty() => break,
                None => {}
            }
        }
        let mut data = vec![0; length];
        reader.read_exact(&mut data)?;
        let size = length + "data: \n\n".len();
        let frame = [format!("{size:x}\r\ndata: ").as_bytes(), &data, b"\n\n\r\n"].concat();
        for half in halves {
            half.published.lock().expect("no panic").extend(&frame);
            half.more.notify_one();
        }
        reader.get_mut().write_all(ANSWER)?;
        read_line(&mut reader)?;
    }
}

/// Without its end. Nothing comes any more: an error, since a client would be heard in vain.
fn read_line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    match reader.read_line(&mut line)? {
        0 => Err("the client left".into()),
        _ => Ok(line.trim_end().into()),
    }
}
