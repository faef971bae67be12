//! What a stranger can do to the server without breaking the network or the machine. Each test
//! attacks the real binary while a witness (a good subscriber, a good publisher) lives through it.
//!
//! Where a test gives the server a short timeout, it is to end sooner: none asserts how long
//! anything took, beyond what no busy machine can exceed.

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use attack::*;
use socket2::{Domain, SockRef, Socket, Type};
use support::*;

/// KiB that a process may have grown by after an attack of a few thousand connections.
const SLACK: u64 = 16 * 1024;

// ------------------------------------------------------------------- 1: lies, greetings, garbage

/// One request with a length of 70 TB ended the process of a server built on an HTTP library as it
/// was published. Every length that is none, or is over the limit, on every path.
#[test]
fn a_lying_content_length_costs_its_sender_the_connection_and_nobody_else_anything() {
    let _alone = alone();
    // Longer than a test may take: none of these is to be waited for.
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let huge = [
        "16385",
        "1000000",
        "2147483648",
        "4294967296",
        "70000000000000",
        "9007199254740993",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "99999999999999999999999999",
    ];
    let none = [
        "-1",
        "+1",
        "-9223372036854775808",
        "5, 5",
        "5,500",
        "0x10",
        "1e3",
        "1.5",
        "five",
        " ",
        "\t",
    ];
    let mut sent = Vec::new();
    for length in huge.iter().chain(&none) {
        let lengths = format!("Content-Length: {length}\r\n");
        let expecting = format!("{lengths}Expect: 100-continue\r\n");
        let twice = format!("Content-Length: 3\r\n{lengths}");
        for fields in [&lengths, &expecting, &twice] {
            for (method, target, refused) in [
                ("POST", "/submit", 413),
                ("POST", "/ping", 405),
                ("POST", "/events", 405),
                ("POST", "/nothing", 404),
                ("GET", "/events", 401),
                ("GET", "/ping", 200),
            ] {
                for body in ["", "abc"] {
                    let mut stream = connect(server.addr);
                    let bytes = request(method, target, fields, body.as_bytes());
                    assert!(send(&mut stream, &bytes));
                    let case = format!("{method} {target} {fields:?} {body:?}");
                    // No number, or one among two: then it is the head that is refused.
                    let wrong = none.contains(length) || fields.starts_with(&twice);
                    sent.push((stream, case, if wrong { 400 } else { refused }));
                }
            }
        }
    }
    let cases = sent.len();
    for (mut stream, case, expected) in sent {
        assert_eq!(fate(&mut stream), Fate::Closed(vec![expected]), "{case}");
    }
    before.expect_back(&server, SLACK);
    witness.finish(&format!("1 lying lengths ({cases})"));
}

/// RFC 9112, section 6.3: who reads a body by the one header, where a proxy reads it by the
/// other, serves one client's bytes as another one's request. A length that is none was overlooked
/// beside a transfer encoding.
#[test]
fn a_length_beside_a_transfer_encoding_is_refused_and_the_connection_closed() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let both = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n";
    let swapped = "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n";
    let no_length = "Content-Length: abc\r\nTransfer-Encoding: chunked\r\n";
    let no_length_swapped = "Transfer-Encoding: chunked\r\nContent-Length: abc\r\n";
    let unknown = "Transfer-Encoding: sideways\r\n";
    let doubled = "Transfer-Encoding: chunked, chunked\r\n";
    let not_last = "Transfer-Encoding: chunked, gzip\r\n";
    let identity = "Transfer-Encoding: identity\r\nContent-Length: 4\r\n";
    let other_case = "tRANSFER-eNCODING: cHUNKED\r\n";
    for fields in [
        both,
        swapped,
        no_length,
        no_length_swapped,
        unknown,
        doubled,
        not_last,
        identity,
        other_case,
    ] {
        for (method, target) in [("POST", "/submit"), ("GET", "/ping"), ("POST", "/nothing")] {
            let mut bytes = request(method, target, fields, b"0\r\n\r\n");
            // Were the body taken for a request, this would be answered too.
            bytes.extend(request("GET", "/ping", "", b""));
            let mut stream = connect(server.addr);
            send(&mut stream, &bytes);
            let case = format!("{method} {target} {fields}");
            assert_eq!(fate(&mut stream), Fate::Closed(vec![411]), "{case}");
        }
    }
    witness.finish("1 conflicting lengths");
}

/// A body that its request had no use for must not be read as the next request: behind a proxy
/// that shares its connections, that request would be answered to somebody else. What does come
/// behind the body is served.
#[test]
fn a_body_that_nobody_reads_is_never_taken_for_a_request() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let inner = request("GET", "/nothing", "", b"");
    let chunked = chunked(&[&inner]);
    let length = format!("Content-Length: {}\r\n", inner.len());
    let long = format!("Content-Length: {}\r\n", inner.len() + 2000);
    let mut padded = inner.clone();
    padded.resize(inner.len() + 2000, b' ');
    let expecting = format!("{length}Expect: 100-continue\r\n");
    let upgrade = format!("{length}Connection: upgrade\r\nUpgrade: h2c\r\n");
    let negative = "Content-Length: -7\r\n".to_string();
    let too_long = "Content-Length: 16385\r\n".to_string();
    let encoded = "Transfer-Encoding: chunked\r\n".to_string();
    for (fields, body, closed) in [
        (&encoded, &chunked, Some(411)),
        (&negative, &inner, Some(400)),
        (&too_long, &inner, None),
        (&length, &inner, None),
        (&long, &padded, None),
        (&expecting, &inner, None),
        (&upgrade, &inner, None),
    ] {
        for (method, target, answer) in [
            ("GET", "/ping", 200),
            ("OPTIONS", "/ping", 204),
            ("OPTIONS", "/submit", 204),
            ("POST", "/submit", 401),
        ] {
            let mut bytes = request(method, target, fields, body);
            bytes.extend(request("GET", "/ping", "Connection: close\r\n", b""));
            let mut stream = connect(server.addr);
            send(&mut stream, &bytes);
            let Fate::Closed(mut statuses) = fate(&mut stream) else {
                panic!("a stream without a token");
            };
            // Whether it says so depends on how much came at once.
            statuses.retain(|status| *status != 100);
            let expected = match closed {
                Some(status) => vec![status],
                None if *fields == too_long && method == "POST" => vec![413],
                None if *fields == too_long => vec![answer],
                None => vec![answer, 200],
            };
            assert_eq!(statuses, expected, "{method} {target} {fields:?}");
        }
    }
    witness.finish("1 unread bodies");
}

/// What was declared does come, as fast as the network takes it: it is thrown away, never kept.
#[test]
fn a_body_without_end_is_not_kept_and_starves_nobody() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "2")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let endless = "Content-Length: 9223372036854775807\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    let chunk = [&b"4000\r\n"[..], &[b'A'; 0x4000], b"\r\n"].concat();
    let mut senders = Vec::new();
    for number in 0..8 {
        let target = ["/submit", "/ping", "/events", "/nothing"][number % 4];
        let (fields, block) = match number / 4 {
            0 => (endless, vec![b'A'; 0x4000]),
            _ => (chunked, chunk.clone()),
        };
        let mut stream = connect(server.addr);
        send(&mut stream, &request("POST", target, fields, b""));
        senders.push(in_background(move || {
            let mut taken = 0;
            // 256 MiB each, or until the server has had enough.
            while taken < (1 << 28) && send(&mut stream, &block) {
                taken += block.len();
            }
            taken
        }));
    }
    let mut peak = 0;
    while !senders.iter().all(|sender| sender.is_finished()) {
        peak = peak.max(server.status("VmRSS"));
        thread::sleep(Duration::from_millis(5));
    }
    let taken: usize = senders
        .into_iter()
        .map(|sender| sender.join().unwrap())
        .sum();
    println!("  {} MiB sent, {peak} KiB resident at most", taken >> 20);
    assert!(
        peak < before.resident + SLACK,
        "it keeps what it should not"
    );
    before.expect_back(&server, SLACK);
    witness.finish("1 endless bodies");
}

/// Chunks that lie, overflow, never end, end too early, or are right: nothing of them is read, since
/// each reader of them that there is was fooled once.
#[test]
fn malformed_and_endless_chunked_bodies_are_refused() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let big = [b'A'; 20_000];
    let submission = server.submission(&[("chunks", "", "good")]);
    let cases: &[(&str, Vec<u8>)] = &[
        ("good", chunked(&[submission.as_bytes()])),
        ("nothing yet", Vec::new()),
        ("no size", b"\r\n\r\n".to_vec()),
        ("not hex", b"xyz\r\nabc\r\n0\r\n\r\n".to_vec()),
        ("negative", b"-1\r\nabc\r\n0\r\n\r\n".to_vec()),
        ("2^64", b"10000000000000000\r\nabc\r\n".to_vec()),
        ("2^64-1", b"ffffffffffffffff\r\nabc\r\n".to_vec()),
        ("2^63", b"8000000000000000\r\nabc\r\n".to_vec()),
        ("no line end", b"3\r\nabcd\r\n0\r\n\r\n".to_vec()),
        ("bare line feed", b"3\nabc\n0\n\n".to_vec()),
        ("never ends", b"3\r\nabc\r\n".to_vec()),
        ("no last line", b"3\r\nabc\r\n0\r\n".to_vec()),
        ("a trailer", b"3\r\nabc\r\n0\r\nX: y\r\n\r\n".to_vec()),
        ("binary size", vec![0xff; 64]),
        ("long size", vec![b'0'; 100_000]),
        ("long extension", [b"3;", &big[..]].concat()),
        ("too big", chunked(&[&big])),
        ("too many", chunked(&[&b"A"[..]; 17_000])),
    ];
    let mut sent = Vec::new();
    for (case, body) in cases {
        for ends in [false, true] {
            let mut stream = connect(server.addr);
            let fields = "Transfer-Encoding: chunked\r\n";
            send(&mut stream, &request("POST", "/submit", fields, body));
            if ends {
                let _ = stream.shutdown(Shutdown::Write);
            }
            sent.push((stream, case));
        }
    }
    for (mut stream, case) in sent {
        assert_eq!(fate(&mut stream), Fate::Closed(vec![411]), "{case}");
    }
    before.expect_back(&server, SLACK);
    witness.finish("1 chunked bodies");
}

/// KiB by which a process may grow while 30 connections send what has no end: the thread and the
/// 12 KiB of each, and what an allocator takes at a time.
const BOUNDED: u64 = 8 * 1024;

/// Sends `start` and then `block` again and again, on 30 connections, until each is answered with
/// this status and closed: nothing of it may be kept.
#[track_caller]
fn pour(row: &str, start: Vec<u8>, block: &[u8], refused: u16) {
    const COUNT: usize = 30;
    // Each sends so much, unless the server has had enough before.
    const MOST: usize = 32 << 20;
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let highest = server.status("VmHWM");
    let block = Arc::new(block.repeat((64 << 10) / block.len()));
    let senders: Vec<_> = (0..COUNT)
        .map(|_| {
            let (mut stream, start, block) = (connect(server.addr), start.clone(), block.clone());
            in_background(move || {
                let mut taken = start.len();
                let mut more = send(&mut stream, &start);
                while more && taken < MOST {
                    more = send(&mut stream, &block);
                    taken += block.len();
                }
                (fate(&mut stream), taken)
            })
        })
        .collect();
    let finished = || senders.iter().all(|sender| sender.is_finished());
    let came = wait_until(2 * DEADLINE, finished);
    let grown = server.status("VmHWM") - highest;
    println!("  {row}: grown by {grown} KiB");
    assert!(grown < BOUNDED, "it keeps what it should not: {grown} KiB");
    assert!(came, "neither closed nor had enough");
    let mut taken = 0;
    for sender in senders {
        let (fate, sent) = sender.join().unwrap_or_else(|panic| resume_unwind(panic));
        assert_eq!(fate, Fate::Closed(vec![refused]), "{row}");
        taken += sent;
    }
    println!("  {row}: {} MiB sent", taken >> 20);
    before.expect_back(&server, SLACK);
    witness.finish(row);
}

/// 30 connections that each sent one header line without an end took 1.9 GiB in 6 seconds.
#[test]
fn an_endless_header_line_costs_no_memory() {
    let start = b"GET /ping HTTP/1.1\r\nHost: test\r\nX: ".to_vec();
    pour("1 endless header line", start, b"A", 431);
}

/// The same of many lines, each of them short, and of one that never comes to its colon.
#[test]
fn endless_header_lines_and_names_cost_no_memory() {
    let start = b"GET /ping HTTP/1.1\r\nHost: test\r\n".to_vec();
    pour("1 endless header", start.clone(), b"X: y\r\n", 431);
    pour("1 endless header name", start, b"A", 431);
}

#[test]
fn an_endless_request_line_costs_no_memory() {
    pour("1 endless target", b"GET /".to_vec(), b"A", 414);
    pour("1 endless method", b"G".to_vec(), b"A", 414);
}

/// The size of a chunk, in as many digits as the network takes: 400 MiB were kept of 400 MiB sent.
#[test]
fn an_endless_chunk_size_line_costs_no_memory() {
    let fields = "Transfer-Encoding: chunked\r\n";
    let start = request("POST", "/submit", fields, b"");
    pour("1 endless chunk size", start, b"0", 411);
    let start = request("POST", "/submit", fields, b"3;");
    pour("1 endless chunk extension", start, b"x", 411);
}

/// What browsers and scanners send to a port that they take for HTTPS or another service. It is
/// known for what it is from its first line or byte: nobody waits for the rest.
#[test]
fn greetings_of_other_protocols_are_closed() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let mut dice = Dice::new(0x7155);
    let mut hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    hello.extend(dice.bytes(32));
    hello.push(32);
    hello.extend(dice.bytes(32));
    hello.extend_from_slice(b"\x00\x06\x13\x01\x13\x02\x13\x03\x01\x00");
    hello.resize(517, 0);
    let greetings = [
        ("TLS", hello, 400),
        ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(), 400),
        ("SMTP", b"EHLO there\r\n".to_vec(), 400),
        ("Redis", b"*1\r\n$4\r\nPING\r\n".to_vec(), 400),
        ("PROXY", b"PROXY TCP4 1.2.3.4 1.2.3.5 6 7\r\n".to_vec(), 400),
        ("SOCKS", b"\x05\x01\x00".to_vec(), 400),
        (
            "PostgreSQL",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f".to_vec(),
            400,
        ),
        ("RTSP", b"OPTIONS * RTSP/1.0\r\n".to_vec(), 400),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), 505),
    ];
    let mut sent = Vec::new();
    for (name, bytes, expected) in &greetings {
        for _ in 0..25 {
            let mut stream = connect(server.addr);
            send(&mut stream, bytes);
            sent.push((stream, name, *expected));
        }
    }
    for (mut stream, name, expected) in sent {
        let statuses = fate(&mut stream);
        assert_eq!(statuses, Fate::Closed(vec![expected]), "{name}");
    }
    before.expect_back(&server, SLACK);
    witness.finish("1 greetings");
}

/// Java's client offers it with every request, and goes on as before where nobody takes it.
#[test]
fn an_offer_to_upgrade_is_ignored_and_ends_nothing() {
    let server = TestServer::start(&[]);
    let upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
                   HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n";
    let socket = "Connection: Upgrade\r\nUpgrade: websocket\r\n\
                  Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n";
    let mut connection = server.connect();
    for fields in [upgrade, socket, upgrade, ""] {
        connection.send(request("GET", "/ping", fields, b""));
        let answer = connection.answer();
        assert_eq!((answer.status, &*answer.text()), (200, "ok\n"), "{fields}");
        assert_eq!(answer.header("Connection"), None, "{fields}");
    }
}

/// Every way to write a head wrongly that a parser was ever fooled by.
#[test]
fn a_malformed_head_is_refused_and_its_connection_closed() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let long = "x".repeat(1 << 20);
    let many = "X: y\r\n".repeat(20_000);
    let line = |line: &str| format!("{line}\r\nHost: test\r\n\r\n").into_bytes();
    let head = |lines: &str| line(&format!("GET /ping HTTP/1.1\r\n{lines}"));
    let without_host = |line: &str| format!("{line}\r\n\r\n").into_bytes();
    let refused = [
        (400, head("no colon")),
        (400, head(": no name")),
        (400, head("X : space before the colon")),
        (400, head("X\t: tab before the colon")),
        (400, head(" X: space before the name")),
        (400, head("X y: space within the name")),
        (400, head("X: y\r\n folded: line")),
        (400, head("X: y\r\n\tfolded")),
        (400, head("X: \0")),
        (400, head("X: \x01\x02\x7f")),
        (400, head("bare: line\nfeed: here")),
        (400, head("bare: carriage\rreturn: here")),
        (400, head("\u{fc}ber: the name")),
        (400, head("Host: two")),
        (400, without_host("GET /ping HTTP/1.1")),
        (400, line("GET /ping")),
        (400, line("GET  /ping HTTP/1.1")),
        (400, line("GET /ping HTTP/1.1 ")),
        (400, line(" GET /ping HTTP/1.1")),
        (400, line("GET /ping http/1.1")),
        (400, line("GET /ping HTTP/1.10")),
        (400, line("GET /ping HTTP/1")),
        (400, line("GET /ping HTTPS/1.1")),
        (400, line("GET\t/ping\tHTTP/1.1")),
        (400, line("G\u{e9}T /ping HTTP/1.1")),
        (400, line("GET /p\u{ef}ng HTTP/1.1")),
        (400, line("GET /p\0ng HTTP/1.1")),
        (400, b"GET /ping HTTP/1.1 \xff\r\n\r\n".to_vec()),
        (400, b"GET /ping HTTP/1.1\n\n".to_vec()),
        (400, b"GET /ping HTTP/1.1\nHost: test\r\n\r\n".to_vec()),
        (400, b"\0\0\0\0\r\n\r\n".to_vec()),
        (505, line("GET /ping HTTP/0.9")),
        (505, line("GET /ping HTTP/1.2")),
        (505, line("GET /ping HTTP/9.9")),
        (414, format!("{long} /ping HTTP/1.1").into_bytes()),
        (414, line(&format!("GET /{long} HTTP/1.1"))),
        (414, line(&format!("GET /events?token={long} HTTP/1.1"))),
        (414, line(&format!("{} /ping HTTP/1.1", "A".repeat(9000)))),
        (431, head(&format!("X: {long}"))),
        (431, head(many.trim_end())),
    ];
    // Strange, but not wrong.
    let answered = [
        (200, head("Expect: a miracle")),
        (200, head("X: \u{fc}ber")),
        (200, head("X: tab\tand more")),
        (200, head("X:")),
        (200, head("X:no space")),
        (200, head("TE: chunked;q=NaN, identity;q=-inf, gzip;q=1e99")),
        (200, head("Connection: upgrade, keep-alive")),
        (200, line("\r\n\r\nGET /ping HTTP/1.1")),
        (200, line("GET http://other/ping HTTP/1.1")),
        (404, line("GET //ping HTTP/1.1")),
        (404, line("GET /ping%00 HTTP/1.1")),
        (404, line("GET /../../etc/passwd HTTP/1.1")),
        (404, line("GET ?token= HTTP/1.1")),
        (404, line(&format!("GET /{} HTTP/1.1", "x".repeat(8000)))),
        (204, line("OPTIONS * HTTP/1.1")),
        (404, line("CONNECT host:443 HTTP/1.1")),
        (405, line("TRACE /ping HTTP/1.1")),
        (405, line(&format!("{} /ping HTTP/1.1", "A".repeat(8000)))),
    ];
    let mut sent = Vec::new();
    for (status, bytes) in &refused {
        let mut stream = connect(server.addr);
        send(&mut stream, bytes);
        sent.push((stream, bytes, vec![*status]));
    }
    for (status, bytes) in &answered {
        let mut stream = connect(server.addr);
        send(&mut stream, bytes);
        // And the connection goes on.
        let last = request("GET", "/ping", "Connection: close\r\n", b"");
        send(&mut stream, &last);
        sent.push((stream, bytes, vec![*status, 200]));
    }
    for (mut stream, bytes, expected) in sent {
        let case = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
        assert_eq!(fate(&mut stream), Fate::Closed(expected), "{case:?}");
    }
    before.expect_back(&server, SLACK);
    witness.finish("1 malformed heads");
}

/// Nobody thinks of every attack: so chance does.
#[test]
fn two_thousand_mutations_of_valid_requests_leave_nothing_behind() {
    let _alone = alone();
    let settings = [("SSE_READ_TIMEOUT", "2"), ("SSE_HEARTBEAT", "1")];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let mut dice = Dice::new(20_26);
    let token = server.token(&["mutant"]);
    let body = server.submission(&[("mutant", "name", "data")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let expecting = format!("{length}Expect: 100-continue\r\n");
    let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let chunked = "Transfer-Encoding: chunked\r\n";
    let valid = [
        request("GET", &format!("/events?token={token}"), "", b""),
        request("GET", &format!("/events?a=b&token={token}&c"), "", b""),
        request("POST", "/submit", &length, body.as_bytes()),
        request("POST", "/submit", &expecting, body.as_bytes()),
        request("POST", "/submit", chunked, chunks.as_bytes()),
        request("GET", "/ping", "Connection: keep-alive\r\n", b""),
        request("OPTIONS", "/submit", "Origin: https://a.example\r\n", b""),
    ];
    let words: &[&[u8]] = &[
        b"\r\n",
        b"\r",
        b"\n",
        b"\r\n\r\n",
        b"\0",
        b" ",
        b":",
        b"?",
        b"&",
        b"%00",
        b"token=",
        b"\xff\xfe",
        b"HTTP/1.0",
        b"HTTP/1.1\r\n",
        b"HTTP/2.0\r\n",
        b"Content-Length: 0\r\n",
        b"Content-Length: 18446744073709551615\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: upgrade\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
        b"TE: chunked;q=NaN\r\n",
        b"ffffffffffffffff\r\n",
        b"0\r\n\r\n",
        b"GET /ping HTTP/1.1\r\n\r\n",
    ];
    let (mut streams, mut closed) = (0, 0);
    for _ in 0..4 {
        let mut sent = Vec::new();
        while sent.len() < 500 {
            let mut bytes = valid[dice.below(valid.len())].clone();
            dice.mutate(&mut bytes, words);
            let mut stream = connect(server.addr);
            send(&mut stream, &bytes);
            // Three leave it at that, the fourth waits for the timeout.
            if dice.below(4) > 0 {
                let _ = stream.shutdown(Shutdown::Write);
            }
            sent.push((stream, bytes));
        }
        for (mut stream, bytes) in sent {
            match fate(&mut stream) {
                Fate::Stream => streams += 1,
                Fate::Closed(statuses) => {
                    closed += 1;
                    let failed = statuses.iter().any(|it| *it >= 500 && *it != 505);
                    let case = String::from_utf8_lossy(&bytes);
                    assert!(!failed, "{statuses:?} for {case:?}");
                }
            }
        }
    }
    println!("  {closed} refused or answered, {streams} still became streams");
    assert!(!server.log().contains("internal error"), "a panic");
    before.expect_back(&server, SLACK);
    witness.finish("1 mutations (2000)");
}

/// A thread and two descriptors for each, for ever, was the cost of a request line that says
/// HTTP/2.0, since the library waited for itself: some thousands of them stopped all others.
#[test]
fn an_http2_request_line_is_refused_and_leaves_nothing_behind() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let lines: [&[u8]; 4] = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET /ping HTTP/2.0\r\nHost: test\r\n\r\n",
        b"GET /ping HTTP/3.0\r\n\r\n",
    ];
    let mut sent: Vec<TcpStream> = Vec::new();
    for number in 0..100 {
        let mut stream = connect(server.addr);
        send(&mut stream, lines[number % lines.len()]);
        sent.push(stream);
    }
    for stream in &mut sent {
        assert_eq!(fate(stream), Fate::Closed(vec![505]));
    }
    // Whatever these clients do: they are all still there.
    before.expect_back(&server, SLACK);
    drop(sent);
    witness.finish("1 HTTP/2.0 request lines (100)");
}

// ------------------------------------------------------------------------- 2: those who dawdle

/// 2,000 connections that say nothing, or not all. Half a request is answered that it was late; who
/// has said nothing, or nothing since the last answer, is told nothing either.
#[test]
fn idle_and_half_sent_requests_are_closed_while_others_are_served() {
    let _alone = alone();
    need_descriptors(20_000);
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "5")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let token = server.token(&["a"]);
    let body = server.submission(&[("a", "b", "c")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let expecting = format!("{length}Expect: 100-continue\r\n");
    let long = "Content-Length: 9000\r\n";
    let head = request("GET", &format!("/events?token={token}"), "", b"");
    let parts = [
        (head[..1].to_vec(), vec![408]),
        (head[..head.len() / 2].to_vec(), vec![408]),
        (head[..head.len() - 1].to_vec(), vec![408]),
        (
            request("POST", "/submit", &length, &body.as_bytes()[..9]),
            vec![408],
        ),
        (request("POST", "/submit", long, &[b'A'; 8000]), vec![408]),
        (request("POST", "/submit", &expecting, b""), vec![100, 408]),
        (request("GET", "/ping", "", b""), vec![200]),
        (b"\r\n".to_vec(), vec![]),
    ];
    let mut idle: Vec<(TcpStream, &[u16])> = Vec::new();
    for number in 0..2000 {
        let mut stream = connect(server.addr);
        let (part, statuses) = &parts[number / 2 % parts.len()];
        if number % 2 == 0 {
            send(&mut stream, part);
            idle.push((stream, statuses));
        } else {
            idle.push((stream, &[]));
        }
    }
    // If the first have gone already, the machine is too slow for a comparison, not for the test.
    let during = Vitals::of(&server);
    assert_eq!(server.get("/ping").status, 200);
    server.publish(&[("a", "b", "c")]).ok();
    witness.expect_more();
    println!("  with all of them: {during:?}");
    for (mut stream, statuses) in idle {
        assert_eq!(fate(&mut stream), Fate::Closed(statuses.to_vec()));
    }
    before.expect_back(&server, 2 * SLACK);
    witness.finish("2 idle and half sent (2000)");
}

/// A byte now and then never let a timeout fire that is for the next byte: 2,000 of 2,000 such
/// connections were held for as long as they dripped. The deadline is for the whole.
#[test]
fn dripping_requests_end_within_the_read_timeout() {
    let length = "Content-Length: 9000\r\n";
    let expecting = format!("{length}Expect: 100-continue\r\n");
    let starts = [
        (request("GET", "/ping", "", b"")[..8].to_vec(), vec![408]),
        (b"GET /ping HTTP/1.1\r\nX: ".to_vec(), vec![408]),
        (
            request("POST", "/submit", "Content-Length: 1000\r\n", b"A"),
            vec![408],
        ),
        (request("POST", "/submit", length, b"A"), vec![408]),
        (request("POST", "/nothing", length, b"A"), vec![408]),
        (request("POST", "/submit", &expecting, b""), vec![100, 408]),
    ];
    expect_drips_end("2 dripping (240)", &starts, b"A");
}

/// A CRLF in front of a request is skipped, and no first byte of one; so it wins no time either.
#[test]
fn dripping_line_ends_end_within_the_read_timeout() {
    let ping = request("GET", "/ping", "", b"");
    let starts = [(b"\r\n".to_vec(), vec![]), (ping, vec![200])];
    expect_drips_end("2 dripping line ends (240)", &starts, b"\r\n");
}

/// Begins 240 requests and goes on with these bytes, five times a second, until all have been
/// ended with these statuses.
#[track_caller]
fn expect_drips_end(row: &str, starts: &[(Vec<u8>, Vec<u16>)], drip: &[u8]) {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "2")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let mut drippers: Vec<TcpStream> = Vec::new();
    for number in 0..240 {
        let mut stream = connect(server.addr);
        send(&mut stream, &starts[number % starts.len()].0);
        drippers.push(stream);
    }
    let begun = Instant::now();
    let mut left: Vec<_> = drippers.iter_mut().enumerate().collect();
    while !left.is_empty() {
        // Nothing but the server ends them: they would drip for ever.
        let late = begun.elapsed() > DEADLINE;
        assert!(!late, "{} of 240 still drip", left.len());
        left.retain_mut(|(number, stream)| {
            if send(stream, drip) {
                return true;
            }
            let statuses = &starts[*number % starts.len()].1;
            assert_eq!(fate(stream), Fate::Closed(statuses.clone()), "{number}");
            false
        });
        witness.expect_more();
        thread::sleep(Duration::from_millis(200));
    }
    println!("  {row}: all ended after {:.1?}", begun.elapsed());
    before.expect_back(&server, SLACK);
    witness.finish(row);
}

/// The operator's address is served by the same threads: whoever reaches it and dawdles is no more
/// welcome there, and costs no publisher anything.
#[test]
fn those_who_dawdle_on_the_metrics_address_are_ended_too() {
    let _alone = alone();
    let settings = [
        ("SSE_READ_TIMEOUT", "2"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let metrics = server.metrics.unwrap();
    let long = "Content-Length: 9000\r\n";
    let starts = [
        (Vec::new(), vec![]),
        (b"GET /metrics HTTP/1.1\r\nX: ".to_vec(), vec![408]),
        (request("GET", "/metrics", long, b""), vec![408]),
        (b"GET /metrics HTTP/2.0\r\n".to_vec(), vec![505]),
        (request("GET", "/metrics", "", b""), vec![200]),
    ];
    let mut sent = Vec::new();
    for number in 0..200 {
        let (bytes, statuses) = &starts[number % starts.len()];
        let mut stream = connect(metrics);
        send(&mut stream, bytes);
        sent.push((stream, statuses));
    }
    assert!(server.metrics_text().contains("sse_events_total"));
    for (mut stream, statuses) in sent {
        assert_eq!(fate(&mut stream), Fate::Closed(statuses.clone()));
    }
    before.expect_back(&server, SLACK);
    witness.finish("2 dawdling at the metrics (200)");
}

/// A publisher that posts about as often as the read timeout took the `400` that nobody had asked
/// for as the answer to its next submission: 3 of 360 were lost. An idle connection is closed
/// without a word, and whoever was about to post sees that nothing was answered, and posts again.
#[test]
fn a_publisher_that_pauses_for_the_read_timeout_loses_nothing() {
    const PUBLISHERS: usize = 40;
    const POSTS: usize = 10;
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "1"), ("SSE_QUEUE", "1000")]);
    let mut stream = server.subscribe(&["paced"]);
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let (addr, secret) = (server.addr, server.secret.clone());
            in_background(move || {
                let (mut connection, mut again) = (Connection::open(addr), 0);
                let mut dice = Dice::seeded(publisher as u64);
                for post in 0..POSTS {
                    let data = format!("{publisher} {post}");
                    let payload = events_payload(&[("paced", "", &data)]);
                    let body = mint(&secret, &payload, now());
                    let length = format!("Content-Length: {}\r\n", body.len());
                    let bytes = request("POST", "/submit", &length, body.as_bytes());
                    // Whatever comes is taken for the answer, as every client takes it.
                    let answers = |on: &Connection| matches!(on.socket().peek(&mut [0]), Ok(1));
                    if !connection.try_send(&bytes) || !answers(&connection) {
                        again += 1;
                        connection = Connection::open(addr);
                        connection.send(&bytes);
                    }
                    Submitted::from(connection.answer()).ok();
                    thread::sleep(Duration::from_millis(980 + dice.below(40) as u64));
                }
                again
            })
        })
        .collect();
    let mut heard = BTreeSet::new();
    for _ in 0..PUBLISHERS * POSTS {
        let data = stream.message().data;
        assert!(heard.insert(data.clone()), "twice: {data}");
    }
    let again = publishers.into_iter().map(|it| it.join().unwrap());
    let again: usize = again.sum();
    println!("  {again} of {} posted again", PUBLISHERS * POSTS);
}

/// The same, looked at from close by: a connection that was idle for too long ends, and no byte
/// comes before the end, whatever it was used for.
#[test]
fn an_idle_connection_is_closed_in_silence() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "3")]);
    let body = server.submission(&[("a", "b", "c")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let requests = [
        Vec::new(),
        request("GET", "/ping", "", b""),
        request("GET", "/nothing", "", b""),
        request("POST", "/submit", &length, body.as_bytes()),
        request("POST", "/submit", "Content-Length: 3\r\n", b"abc"),
        request("OPTIONS", "*", "", b""),
    ];
    let mut idle = Vec::new();
    for bytes in &requests {
        let mut connection = server.connect();
        if !bytes.is_empty() {
            connection.send(bytes);
            let answer = connection.answer();
            assert_eq!(answer.header("Connection"), None, "it says that it ends");
        }
        idle.push(connection);
    }
    for mut connection in idle {
        connection.expect_closed();
    }
}

/// A client that reuses a connection that its server is about to close meets a broken pipe; so
/// every answer says whether it is the last, and keeps its word.
#[test]
fn answers_that_end_their_connection_say_so_and_no_others() {
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let hasty = TestServer::start(&[("SSE_READ_TIMEOUT", "1")]);
    let body = server.submission(&[("a", "b", "c")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let close = "Connection: keep-alive, Close\r\n";
    let old = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        text.replace("HTTP/1.1", "HTTP/1.0").into_bytes()
    };
    let ping = request("GET", "/ping", "", b"");
    let submit = request("POST", "/submit", &length, body.as_bytes());
    let ends = [
        (200, request("GET", "/ping", close, b"")),
        (404, request("GET", "/nothing", close, b"")),
        (200, old(&ping)),
        (200, old(&submit)),
        (400, request("GET", "/ping", "wrong\r\n", b"")),
        (408, ping[..9].to_vec()),
        (
            411,
            request("GET", "/ping", "Transfer-Encoding: chunked\r\n", b""),
        ),
        (
            413,
            request("POST", "/submit", "Content-Length: 16385\r\n", b""),
        ),
        (
            404,
            request("POST", "/nothing", "Content-Length: 16385\r\n", b""),
        ),
        (414, vec![b'A'; 9000]),
        (431, request("GET", "/ping", &"X: y\r\n".repeat(2000), b"")),
        (505, b"GET / HTTP/2.0\r\n\r\n".to_vec()),
    ];
    for (status, bytes) in ends {
        let server = if status == 408 { &hasty } else { &server };
        let mut connection = server.connect();
        connection.try_send(&bytes);
        let answer = connection.answer();
        let told = (answer.status, answer.header("Connection"));
        assert_eq!(told, (status, Some("close")), "{}", answer.text());
        connection.expect_closed();
    }
    let goes_on = [
        (200, ping),
        (200, submit),
        (
            401,
            request("POST", "/submit", "Content-Length: 0\r\n", b""),
        ),
        (
            401,
            request("POST", "/submit", "Content-Length: 3\r\n", b"abc"),
        ),
        (401, request("GET", "/events?token=abc", "", b"")),
        (
            404,
            request("POST", "/nothing", "Content-Length: 3\r\n", b"abc"),
        ),
        (
            405,
            request("PUT", "/submit", "Content-Length: 3\r\n", b"abc"),
        ),
        (204, request("OPTIONS", "/submit", "", b"")),
        (
            200,
            request("GET", "/ping", "Connection: keep-alive\r\n", b""),
        ),
    ];
    let mut connection = server.connect();
    for (status, bytes) in goes_on {
        connection.send(&bytes);
        let answer = connection.answer();
        let told = (answer.status, answer.header("Connection"));
        assert_eq!(told, (status, None), "{}", answer.text());
    }
}

/// Any page of a host can set `name=José`, and nginx passes it on: no stream could be opened by
/// that browser any more.
#[test]
fn a_browser_whose_fields_hold_other_than_ascii_can_stream() {
    let server = TestServer::start(&[]);
    let target = format!("/events?token={}", server.token(&["news"]));
    let fields: [&[u8]; 4] = [
        "Cookie: name=Jos\u{e9}; a=\u{8fdb}\r\n".as_bytes(),
        b"Cookie: name=Jos\xe9\r\n",
        b"Referer: http://test/caf\xe9?\x80\xff\r\nUser-Agent: \xfe\r\n",
        b"X-Forwarded-For: \xa0 1.2.3.4\r\n",
    ];
    let mut streams: Vec<_> = fields
        .iter()
        .map(|fields| {
            let mut bytes = format!("GET {target} HTTP/1.1\r\nHost: test\r\n").into_bytes();
            bytes.extend_from_slice(fields);
            bytes.extend_from_slice(b"Accept: text/event-stream\r\n\r\n");
            let mut connection = server.connect();
            connection.send(&bytes);
            Subscriber::on(connection)
        })
        .collect();
    assert_eq!(server.publish(&[("news", "", "hello")]).ok(), 4);
    for stream in &mut streams {
        stream.expect_event("message", "hello");
    }
}

// ----------------------------------------------------------------------- 3: bad manners at HTTP

/// What stands behind the request for a stream must neither be executed nor answered: its answer
/// would lie in the midst of the events.
#[test]
fn requests_pipelined_behind_a_stream_are_ignored_and_the_stream_goes_on() {
    let _alone = alone();
    let server = TestServer::start(&[]);
    let witness = Witness::start(&server);
    let mut bystander = server.subscribe(&["piped"]);
    let body = server.submission(&[("piped", "", "from behind a stream")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let submit = request("POST", "/submit", &length, body.as_bytes());
    let ping = request("GET", "/ping", "", b"");
    let target = format!("/events?token={}", server.token(&["piped"]));

    let mut bytes = ping.clone();
    bytes.extend(request("POST", "/submit", &length, body.as_bytes()));
    bytes.extend(request("GET", &target, "", b""));
    for _ in 0..100 {
        bytes.extend_from_slice(&submit);
        bytes.extend_from_slice(&ping);
    }
    let mut connection = server.connect();
    connection.send(&bytes);
    // In front of it they are served, in order.
    assert_eq!(connection.answer().text(), "ok\n");
    assert_eq!(Submitted::from(connection.answer()).ok(), 1);
    bystander.expect_event("message", "from behind a stream");
    let mut stream = Subscriber::on(connection);
    for number in 0..100 {
        // More of them, while the stream runs.
        stream.connection.try_send(&submit);
        let data = number.to_string();
        assert_eq!(server.publish(&[("piped", "", &data)]).ok(), 2);
        stream.expect_event("message", &data);
        bystander.expect_event("message", &data);
    }
    witness.finish("3 pipelined behind a stream");
}

/// Some clients close their sending side once they have sent the request. They are told a few
/// comments early, to see whether they are still there, and that is all.
#[test]
fn half_closed_clients_are_answered_and_their_streams_go_on() {
    let _alone = alone();
    let settings = [("SSE_READ_TIMEOUT", "2"), ("SSE_HEARTBEAT", "1")];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let (mut streams, begun) = (Vec::new(), Instant::now());
    for _ in 0..50 {
        let mut connection = server.connect();
        let target = format!("/events?token={}", server.token(&["half"]));
        connection.send(request("GET", &target, "", b""));
        connection.half_close();
        streams.push(Subscriber::on(connection));
    }
    let body = server.submission(&[("half", "", "one")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let mut connection = server.connect();
    connection.send(request("POST", "/submit", &length, body.as_bytes()));
    connection.half_close();
    assert_eq!(Submitted::from(connection.answer()).ok(), 50);
    // The end of the requests is the end of the connection, and nothing to be answered.
    connection.expect_closed();
    for stream in &mut streams {
        stream.expect_event("message", "one");
        // Later than both timeouts; there is a heartbeat each second, or something earlier.
        while begun.elapsed() < Duration::from_secs(5) {
            assert_eq!(stream.item(), Some(Item::Comment(String::new())));
        }
    }
    assert_eq!(server.publish(&[("half", "", "two")]).ok(), 50);
    for stream in &mut streams {
        stream.expect_event("message", "two");
    }
    witness.finish("3 half closed");
}

/// The early comments are few: a client that is there, and silent, is not written to for ever.
#[test]
fn a_half_closed_client_gets_a_few_early_comments_and_then_heartbeats_alone() {
    let server = TestServer::start(&[("SSE_HEARTBEAT", "600")]);
    let mut connection = server.connect();
    let target = format!("/events?token={}", server.token(&["half"]));
    connection.send(request("GET", &target, "", b""));
    connection.half_close();
    let mut stream = Subscriber::on(connection);
    // It could be told hundreds in this time.
    thread::sleep(Duration::from_secs(5));
    assert_eq!(server.publish(&[("half", "", "last")]).ok(), 1);
    let until_last = std::iter::from_fn(|| match stream.item() {
        Some(Item::Message(message)) if message.data == "last" => None,
        item => item,
    });
    let comments = until_last.filter(|item| matches!(item, Item::Comment(_)));
    let comments = comments.count();
    println!("  {comments} comments, the first of the stream among them");
    assert!(comments <= 40, "{comments} comments in five seconds");
}

/// A page that is closed or reloaded has to make room at once, in whatever way its connection
/// ended: 60 of 100 pages that reloaded together were turned away for half a minute. No event and
/// no heartbeat comes to find them out.
#[test]
fn clients_that_left_are_noticed_without_an_event_or_a_heartbeat() {
    const COUNT: usize = 100;
    let _alone = alone();
    let settings = [
        ("SSE_HEARTBEAT", "600"),
        ("SSE_WRITE_TIMEOUT", "600"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let left = "sse_streams_ended_total{reason=\"left\"}";
    let mut stays = server.subscribe(&["half"]);
    let mut half = server.subscribe(&["half"]);
    half.connection.half_close();
    let before = Vitals::of(&server);
    type Leave = fn(Vec<Subscriber>);
    let ways: [(&str, Leave); 4] = [
        ("politely", drop),
        ("with a reset", |streams| {
            for stream in streams {
                let socket = SockRef::from(stream.connection.socket());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
        }),
        ("half closed before", |streams| {
            for stream in &streams {
                stream.connection.half_close();
            }
            // Some have been seen as such, and then they go.
            thread::sleep(Duration::from_millis(100));
        }),
        ("behind bytes that nobody asked for", |streams| {
            for mut stream in streams {
                stream.connection.try_send(vec![b'x'; 48 * 1024]);
            }
        }),
    ];
    for (round, (way, leave)) in ways.into_iter().enumerate() {
        let streams: Vec<_> = (0..COUNT).map(|_| server.subscribe(&["gone"])).collect();
        let gone = Instant::now();
        leave(streams);
        server.wait_for_metric("sse_subscribers", 2);
        println!("  {way}: all noticed after {:.1?}", gone.elapsed());
        assert_eq!(server.metric(left), (COUNT * (round + 1)) as u64);
    }
    before.expect_back(&server, SLACK);
    assert_eq!(server.publish(&[("half", "", "still here")]).ok(), 2);
    stays.expect_event("message", "still here");
    half.expect_event("message", "still here");
    // Leaving is no warning.
    assert!(!server.log().contains("stream cut"), "{}", server.log());
}

/// After each byte of each request, and after each byte of what comes back, with a farewell or
/// with a reset.
#[test]
fn clients_may_leave_at_every_point_of_the_exchange() {
    let _alone = alone();
    let settings = [("SSE_READ_TIMEOUT", "2"), ("SSE_HEARTBEAT", "1")];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    // The witness's own topic: these streams are written to while they are left.
    let target = format!("/events?token={}", server.token(&["witness"]));
    let body = server.submission(&[("left", "name", "data")]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let whole = [
        request("GET", "/ping", "", b""),
        request("GET", &target, "", b""),
        request("POST", "/submit", &length, body.as_bytes()),
        request(
            "POST",
            "/submit",
            "Transfer-Encoding: chunked\r\n",
            chunks.as_bytes(),
        ),
    ];
    let leave = |stream: TcpStream, politely: bool| {
        if !politely {
            reset(stream);
        }
    };
    let mut exchanges = 0;
    for bytes in &whole {
        for end in 0..=bytes.len() {
            for politely in [true, false] {
                let mut stream = connect(server.addr);
                send(&mut stream, &bytes[..end]);
                leave(stream, politely);
                exchanges += 1;
            }
        }
        for taken in 1..200 {
            let mut stream = connect(server.addr);
            send(&mut stream, bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let mut taken = vec![0; taken];
            let _ = stream.read_exact(&mut taken);
            leave(stream, taken.len() % 2 == 0);
            exchanges += 1;
        }
    }
    before.expect_back(&server, SLACK);
    witness.finish(&format!("3 leaving at every point ({exchanges})"));
}

// ----------------------------------------------------------------------- 4: who does not read

const BIG: usize = 12_000;

/// Opens streams of a topic that nobody reads; every other one speaks HTTP/1.0.
fn stall(server: &TestServer, topic: &str, count: usize) -> Vec<TcpStream> {
    let target = format!("/events?token={}", server.token(&[topic]));
    let opened = (0..count).map(|number| {
        let mut stream = connect_narrow(server.addr);
        let version = number % 2;
        let get = format!("GET {target} HTTP/1.{version}\r\nHost: test\r\n\r\n");
        send(&mut stream, get.as_bytes());
        stream
    });
    opened.collect()
}

/// What a stalled client finds in its socket at last: whole events, in order, from the first on,
/// and nothing that looks like an end.
#[track_caller]
fn expect_clean_prefix(stream: TcpStream, published: usize) -> usize {
    let mut stream = Subscriber::on(Connection::over(stream));
    let mut received = 0;
    while let Some(message) = stream.try_message() {
        let number = message.data.trim_start_matches('.');
        assert_eq!(number.parse(), Ok(received), "not the next event");
        assert_eq!(message.data.len(), BIG, "not all of it");
        received += 1;
    }
    assert!(received < published, "it was cut, so it missed some");
    assert!(!stream.connection.whole, "it was told that it has all");
    received
}

fn kernel_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").unwrap();
    let line = text.lines().find(|line| line.starts_with("TCP:"));
    let pages = line.and_then(|line| line.split_whitespace().last());
    4 * pages
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0)
}

/// Fifty that stopped reading, and big events: they are cut for their full queues. Their write
/// timeout is longer than this test may take: were a submission to wait for one of them, the
/// test would not end in time.
#[test]
fn stalled_subscribers_are_cut_for_full_queues_and_no_submission_waits() {
    let _alone = alone();
    let settings = [
        ("SSE_WRITE_TIMEOUT", "600"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let kernel = kernel_memory();
    let stalled = stall(&server, "big", 50);
    server.wait_for_metric("sse_subscribers", 51);

    let cut = "sse_streams_ended_total{reason=\"queue_full\"}";
    let mut connection = server.connect();
    let (mut published, mut worst, mut peak, mut kernel_peak) = (0, Duration::ZERO, 0, 0);
    let begun = Instant::now();
    while server.metric(cut) < 50 {
        assert!(begun.elapsed() < 4 * DEADLINE, "not cut");
        let data = format!("{published:.>BIG$}");
        let body = server.submission(&[("big", "", &data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        let sent = Instant::now();
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        Submitted::from(connection.answer()).ok();
        worst = worst.max(sent.elapsed());
        published += 1;
        peak = peak.max(server.status("VmRSS"));
        kernel_peak = kernel_peak.max(kernel_memory());
    }
    let grown = peak.saturating_sub(before.resident);
    let kernel_grown = kernel_peak.saturating_sub(kernel);
    println!(
        "  {published} events of {BIG} bytes, slowest submission {worst:.1?}; memory of the \
         server grew by {grown} KiB, of the kernel's sockets by {kernel_grown} KiB"
    );
    let received: Vec<_> = stalled
        .into_iter()
        .map(|stream| expect_clean_prefix(stream, published))
        .collect();
    println!("  each had received {:?}", received.iter().max());
    // The events that wait are shared; each stream has a copy of a few that it is writing.
    assert!(
        grown < 32 * 1024,
        "memory is not bounded as the README says"
    );
    assert_eq!(server.metric("sse_subscribers"), 1);
    before.expect_back(&server, SLACK);
    witness.finish("4 fifty stalled, full queues");
}

/// The same where their queues never fill: then the write timeout cuts them.
#[test]
fn stalled_subscribers_are_cut_after_the_write_timeout() {
    let _alone = alone();
    let settings = [
        ("SSE_WRITE_TIMEOUT", "2"),
        ("SSE_QUEUE", "10000"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let stalled = stall(&server, "big", 50);
    server.wait_for_metric("sse_subscribers", 51);
    let cut = "sse_streams_ended_total{reason=\"write_timeout\"}";
    let mut published = 0;
    let begun = Instant::now();
    while server.metric(cut) < 50 {
        assert!(begun.elapsed() < 4 * DEADLINE, "not cut");
        let data = format!("{published:.>BIG$}");
        server.publish(&[("big", "", &data)]).ok();
        published += 1;
    }
    println!(
        "  all cut after {:.1?}, {published} events",
        begun.elapsed()
    );
    for stream in stalled {
        expect_clean_prefix(stream, published);
    }
    before.expect_back(&server, SLACK);
    witness.finish("4 fifty stalled, write timeout");
}

// ----------------------------------------------------------------------------------- 7: limits

/// All streams taken: then whoever wants one is told so, or, where an answer would end its stream
/// for good as it does a browser's, is closed. Publishers do not notice.
#[test]
fn full_streams_never_starve_publishers_and_a_departure_makes_room() {
    let _alone = alone();
    let settings = [
        ("SSE_MAX_SUBSCRIBERS", "200"),
        // Nobody is found gone by a heartbeat.
        ("SSE_HEARTBEAT", "600"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let witness = Witness::start(&server);
    let mut streams: Vec<_> = (0..199).map(|_| server.subscribe(&["full"])).collect();
    let target = format!("/events?token={}", server.token(&["full"]));
    for round in 1..=3 {
        for _ in 0..100 {
            let refused = server.get(&target);
            assert_eq!(refused.status, 503);
            assert!(refused.header("Retry-After").is_some());
            let mut browser = server.connect();
            let accept = "Accept: text/event-stream\r\n";
            browser.send(request("GET", &target, accept, b""));
            browser.expect_closed();
        }
        let turned_away = server.metric("sse_streams_turned_away_total");
        assert_eq!(turned_away, 100 * round);
        assert_eq!(server.get("/ping").status, 200);
        assert_eq!(server.publish(&[("full", "", "still here")]).ok(), 199);
        // One leaves, politely or not, and nothing is sent to its topic any more.
        let gone = streams.remove(0).connection;
        if round == 2 {
            let linger = SockRef::from(gone.socket()).set_linger(Some(Duration::ZERO));
            linger.unwrap();
        }
        drop(gone);
        let left = Instant::now();
        server.wait_for_metric("sse_subscribers", 199);
        println!("  room again after {:.1?}", left.elapsed());
        streams.push(server.subscribe(&["full"]));
    }
    for stream in &mut streams[..190] {
        stream.expect_event("message", "still here");
    }
    witness.finish("7 subscriber limit");
}

/// How a flood of strangers goes that never ends by itself, at a limit of this server: neither a
/// publisher's kept connection nor those who come anew notice anything, though each of these needs
/// the place of a stranger.
#[track_caller]
fn flood(row: &str, server: &TestServer, strangers: usize, opened: u64, bytes: &[u8]) {
    let witness = Witness::start(server);
    let before = Vitals::of(server);
    let evicted = "sse_connections_evicted_total";
    let evicted_before = server.metric(evicted);
    let begun = Instant::now();
    let strangers = Strangers::start(server.addr, strangers, bytes);
    let full = || server.metric(evicted) > evicted_before;
    assert!(wait_until(2 * DEADLINE, full), "no connection was closed");
    let newcomers = Newcomers::start(server, 2);
    newcomers.expect_more();
    strangers.expect_opened(opened);
    newcomers.expect_more();
    witness.expect_more();
    let during = Vitals::of(server);
    println!(
        "  {row}: {} connections opened in {:.1?}, {} evicted; {during:?}",
        strangers.opened(),
        begun.elapsed(),
        server.metric(evicted) - evicted_before
    );
    newcomers.finish();
    strangers.finish();
    before.expect_back(server, 4 * SLACK);
    witness.finish(row);
    let log = server.log();
    assert!(log.contains("connection closed to make room for another"));
    assert!(!log.contains("internal error"), "{log}");
    expect_few_lines(server, begun.elapsed());
}

const FLOODED: [(&str, &str); 2] = [
    // No timeout makes room: only whoever is closed does.
    ("SSE_READ_TIMEOUT", "600"),
    ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
];

/// 4,094 connections that said nothing shut every publisher out, for as long as they liked.
#[test]
fn at_the_connection_limit_those_who_wait_longest_make_room() {
    let _alone = alone();
    need_descriptors(20_000);
    let server = TestServer::start(&FLOODED);
    flood(
        "7 silent, 5,000 at 4,096 threads",
        &server,
        5000,
        10_000,
        b"",
    );
}

/// The same where descriptors run out first, as they do at the limits that systems come with.
#[test]
fn at_the_descriptor_limit_those_who_wait_longest_make_room() {
    let _alone = alone();
    need_descriptors(20_000);
    for limit in ["--nofile=1024:1024", "--nofile=600:600"] {
        let server = TestServer::start_under(&["prlimit", limit], &FLOODED);
        let row = format!("7 silent, 2,000 at {limit}");
        flood(&row, &server, 2000, 5000, b"");
    }
}

/// Strangers that begin a request, or that have had an answer, are no better than silent ones.
#[test]
fn strangers_who_keep_asking_win_no_place() {
    let _alone = alone();
    need_descriptors(20_000);
    let wrapper = ["prlimit", "--nofile=600:600"];
    let ping = request("GET", "/ping", "", b"");
    let forged = request("POST", "/submit", "Content-Length: 3\r\n", b"abc");
    let expecting = "Expect: 100-continue\r\nContent-Length: 3000\r\n";
    let expecting = request("POST", "/submit", expecting, b"");
    let left = request("GET", "/ping", "Connection: close\r\n", b"");
    let cases: [(&str, &[u8]); 5] = [
        ("ping", &ping),
        ("ping and come again", &left),
        ("forged", &forged),
        ("half a head", b"GET /ping HTTP/1.1\r\n"),
        ("100-continue", &expecting),
    ];
    for (case, bytes) in cases {
        let server = TestServer::start_under(&wrapper, &FLOODED);
        flood(&format!("7 strangers: {case}"), &server, 1000, 2500, bytes);
    }
}

/// Whoever sends a thousand requests at once is not waited for: the next is there already. Hundreds
/// of them wait for a core, and notice late that they are to make room: a new publisher was not
/// answered within 30 s.
#[test]
fn strangers_who_pipeline_requests_keep_no_publisher_waiting() {
    let _alone = alone();
    need_descriptors(20_000);
    let wrapper = ["prlimit", "--nofile=600:600"];
    let server = TestServer::start_under(&wrapper, &FLOODED);
    let pings = request("GET", "/ping", "", b"").repeat(1000);
    flood("7 strangers: pipelined", &server, 1000, 2000, &pings);
}

/// A publisher that had to connect anew for each submission would stand in line with the strangers.
#[test]
fn in_a_crowd_only_publishers_keep_their_connections() {
    let _alone = alone();
    let server = TestServer::start(&FLOODED);
    let silent: Vec<_> = (0..200).map(|_| connect(server.addr)).collect();
    assert!(wait_until(DEADLINE, || server.status("Threads") > 200));
    let mut publisher = server.connect();
    for _ in 0..3 {
        let body = server.submission(&[("a", "b", "c")]);
        let length = format!("Content-Length: {}\r\n", body.len());
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        let answer = publisher.answer();
        assert_eq!(answer.header("Connection"), None, "it is kept");
        assert_eq!(Submitted::from(answer).ok(), 0);
    }
    let mut stranger = server.connect();
    stranger.send(request("GET", "/ping", "", b"").repeat(2));
    assert_eq!(stranger.answer().header("Connection"), Some("close"));
    stranger.expect_closed();
    drop(silent);
}

/// Both accepting threads close connections to make room. A connection that was closed while its
/// answer was on the way stood among the waiting once more, and the second thread took it too: each
/// then waited for the other to let go of it, for ever.
#[test]
fn two_who_make_room_do_not_wait_for_each_other() {
    let _alone = alone();
    let settings = [("SSE_METRICS_LISTEN", "127.0.0.1:0")];
    let mut server = TestServer::start_under(&["prlimit", "--nofile=64:64"], &settings);
    let wanted = format!("Access-Control-Request-Headers: {}\r\n", "x".repeat(7000));
    let burst = request("OPTIONS", "/", &wanted, b"").repeat(25);
    let stop = Arc::new(AtomicBool::new(false));
    let metrics = server.metrics.expect("it was set");
    let doors = [(server.addr, 90), (server.addr, 90), (metrics, 5)];
    let attackers: Vec<_> = doors
        .into_iter()
        .map(|(addr, kept)| {
            let (stop, burst) = (stop.clone(), burst.clone());
            in_background(move || {
                let mut silent = VecDeque::new();
                while !stop.load(SeqCst) {
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                    socket.set_recv_buffer_size(2048).unwrap();
                    socket.set_tcp_mss(536).unwrap();
                    let _ = socket.connect_timeout(&addr.into(), Duration::from_secs(1));
                    let stream = TcpStream::from(socket);
                    stream.set_nonblocking(true).unwrap();
                    let _ = (&stream).write(&burst);
                    silent.push_back(stream);
                    if silent.len() > kept {
                        silent.pop_front();
                    }
                    thread::sleep(Duration::from_micros(500));
                }
            })
        })
        .collect();
    thread::sleep(Duration::from_secs(6));
    stop.store(true, SeqCst);
    attackers.into_iter().for_each(|it| it.join().unwrap());
    assert!(wait_until(DEADLINE, || server.descriptors() < 60));
    assert_eq!(server.get("/ping").status, 200);
    server.signal("TERM");
    assert_eq!(server.wait_for_end().code(), Some(0));
}

/// To see that a long token is forged takes the server a millisecond: whoever has it do that all the
/// time may not keep a place from a publisher.
#[test]
fn strangers_with_long_forged_tokens_win_no_place() {
    let _alone = alone();
    need_descriptors(20_000);
    let mut dice = Dice::new(0xf0);
    let body = dice.base62(16_384);
    let length = "Content-Length: 16384\r\n";
    let submission = request("POST", "/submit", length, body.as_bytes());
    let target = format!("/events?token={}", dice.base62(4096));
    let subscription = request("GET", &target, "", b"");
    for (case, bytes) in [("submissions", submission), ("subscriptions", subscription)] {
        let wrapper = ["prlimit", "--nofile=600:600"];
        let server = TestServer::start_under(&wrapper, &FLOODED);
        flood(
            &format!("7 long forged {case}"),
            &server,
            1000,
            3000,
            &bytes,
        );
    }
}

// ------------------------------------------------------------------------- 8: costly forgeries

/// Base62 takes quadratic time, and comes before authentication: a forged token of the longest
/// length costs the server far more than its sender.
#[test]
fn a_flood_of_the_longest_garbage_tokens_delays_no_submission_for_long() {
    let _alone = alone();
    let server = TestServer::start(&[]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let stop = Arc::new(AtomicBool::new(false));
    let refused = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let mut attackers = Vec::new();
    for number in 0..64 {
        let (stop, refused, addr) = (stop.clone(), refused.clone(), server.addr);
        attackers.push(in_background(move || {
            let mut dice = Dice::seeded(number);
            let kind = number as usize % 2;
            let bytes = if kind == 0 {
                let body = dice.base62(16_384);
                let length = "Content-Length: 16384\r\n";
                request("POST", "/submit", length, body.as_bytes())
            } else {
                let target = format!("/events?token={}", dice.base62(4096));
                request("GET", &target, "", b"")
            };
            while !stop.load(SeqCst) {
                let mut stream = connect(addr);
                send(&mut stream, &bytes);
                let _ = stream.shutdown(Shutdown::Write);
                assert_eq!(fate(&mut stream), Fate::Closed(vec![401]));
                refused[kind].fetch_add(1, SeqCst);
            }
        }));
    }
    // A good publisher whose submissions are as long as the forged ones.
    let data = "x".repeat(BIG);
    let (begun, mut worst, mut long) = (Instant::now(), Duration::ZERO, 0);
    while begun.elapsed() < Duration::from_secs(6) || long == 0 {
        let body = server.submission(&[("long", "", &data)]);
        let sent = Instant::now();
        assert_eq!(server.post("/submit", body.as_bytes()).status, 200);
        worst = worst.max(sent.elapsed());
        long += 1;
    }
    stop.store(true, SeqCst);
    attackers.into_iter().for_each(|it| it.join().unwrap());
    let [bodies, queries] = [0, 1].map(|kind| refused[kind].load(SeqCst));
    println!(
        "  {bodies} bodies and {queries} queries refused; {long} long submissions, the slowest {worst:.1?}"
    );
    before.expect_back(&server, SLACK);
    let account = witness.finish("8 flood of garbage tokens");
    // Under a second on two idle cores; a machine that does other work too may take longer.
    assert!(account.worst_submission < DEADLINE / 3);
}

/// An answer that does not fit the socket any more is lost with its connection: the next one may
/// not follow half of it, where the client would take it for the lost one. Nor may a million of
/// answers that nobody takes hold their connection for longer than a request may take.
#[test]
fn answers_that_a_client_does_not_take_end_its_connection() {
    let _alone = alone();
    let server = TestServer::start(&[("SSE_READ_TIMEOUT", "2")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let pings = request("GET", "/ping", "", b"").repeat(1000);
    let senders: Vec<_> = (0..10)
        .map(|_| {
            let (mut stream, pings) = (connect_narrow(server.addr), pings.clone());
            in_background(move || {
                let closed = wait_until(DEADLINE, || !send(&mut stream, &pings));
                assert!(closed, "all answers went somewhere");
                stream
            })
        })
        .collect();
    let streams: Vec<_> = senders.into_iter().map(|it| it.join().unwrap()).collect();
    // Nobody has read a byte, and nobody has left.
    before.expect_back(&server, SLACK);
    for mut stream in streams {
        let bytes = read_to_end(&mut stream);
        let text = String::from_utf8_lossy(&bytes);
        let answers: Vec<_> = text.split("HTTP/1.1 200 OK\r\n").skip(1).collect();
        let (_cut_short, whole) = answers.split_last().expect("answers");
        assert!(!whole.is_empty());
        for answer in whole {
            assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
        }
    }
    witness.finish("3 answers not taken");
}

/// A queue has room for SSE_QUEUE events also at the moment when a heartbeat is due.
#[test]
fn a_heartbeat_takes_no_events_place() {
    const COUNT: usize = 2000;
    let _alone = alone();
    need_descriptors(20_000);
    let settings = [
        ("SSE_QUEUE", "1"),
        ("SSE_HEARTBEAT", "1"),
        ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
    ];
    let server = TestServer::start(&settings);
    let target = format!("/events?token={}", server.token(&["news"]));
    // The first to have a heartbeat: those of all others are on their way then.
    let mut one = server.subscribe(&["news"]);
    assert!(matches!(one.item(), Some(Item::Retry(_))));
    one.expect_heartbeat();
    let (streams, _) = storm(COUNT, server.addr, request("GET", &target, "", b""));
    assert_eq!(
        server.publish(&[("news", "first", "")]).ok(),
        COUNT as u64 + 1
    );
    assert_eq!(one.message().name, "first");
    for _ in 0..5 {
        one.expect_heartbeat();
        assert_eq!(
            server.publish(&[("news", "now", "")]).ok(),
            COUNT as u64 + 1
        );
        one.expect_event("now", "");
    }
    drop(streams);
}

/// Whoever was just being written when the signal came is told when to come back, like the others.
#[test]
fn every_stream_of_thousands_gets_its_event_and_its_farewell() {
    const COUNT: usize = 2000;
    let _alone = alone();
    need_descriptors(20_000);
    for _ in 0..3 {
        let mut server = TestServer::start(&[]);
        let token = server.token(&["news"]);
        let mut streams: Vec<_> = (0..COUNT).map(|_| server.stream(&token)).collect();
        assert_eq!(server.publish(&[("news", "last", "")]).ok(), COUNT as u64);
        server.signal("TERM");
        for stream in &mut streams {
            stream.expect_event("last", "");
            stream.retry = None;
            assert_eq!(stream.rest().len(), 0);
            assert!(stream.retry.is_some(), "no farewell");
        }
        assert_eq!(server.wait_for_end().code(), Some(0));
    }
}

// ------------------------------------------------------------------------ 9, 10: by the thousand

/// 20,000 streams, opened and left, half of them with a reset.
#[test]
fn twenty_thousand_connections_come_and_go_and_leave_nothing_behind() {
    let _alone = alone();
    need_descriptors(20_000);
    let server = TestServer::start(&[("SSE_HEARTBEAT", "1")]);
    let witness = Witness::start(&server);
    let come_and_go = |cycles: usize| {
        let comers: Vec<_> = (0..4)
            .map(|number| {
                let target = format!("/events?token={}", server.token(&["brief"]));
                let addr = server.addr;
                let host = Ipv4Addr::new(127, 0, 1, number as u8 + 1);
                in_background(move || {
                    for cycle in 0..cycles / 4 {
                        // Where the departed, noticed a second later, still take all places, a
                        // client is told to try later.
                        let stream = loop {
                            let mut stream = connect_from(host, addr);
                            send(&mut stream, &request("GET", &target, "", b""));
                            match fate(&mut stream) {
                                Fate::Stream => break stream,
                                fate => assert_eq!(fate, Fate::Closed(vec![503])),
                            }
                            thread::sleep(Duration::from_millis(50));
                        };
                        if cycle % 2 == 0 {
                            reset(stream);
                        }
                    }
                })
            })
            .collect();
        comers.into_iter().for_each(|it| it.join().unwrap());
    };
    let start = Vitals::of(&server);
    // What an allocator takes once, for as many at a time as there will be, it keeps: a leak is
    // what a second round adds to that.
    come_and_go(20_000);
    start.expect_back(&server, 4 * SLACK);
    let before = Vitals {
        resident: server.status("VmRSS"),
        ..start
    };
    let begun = Instant::now();
    come_and_go(20_000);
    println!("  20,000 in {:.1?}", begun.elapsed());
    before.expect_back(&server, SLACK / 2);
    witness.finish("9 come and go (20000)");
}

/// Opens this many streams at once, and waits until each has its head and the first of its body.
fn storm(count: usize, addr: SocketAddr, request: Vec<u8>) -> (Vec<TcpStream>, Duration) {
    const THREADS: usize = 8;
    let (barrier, request) = (Arc::new(Barrier::new(THREADS + 1)), Arc::new(request));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (barrier, request) = (barrier.clone(), request.clone());
            in_background(move || {
                barrier.wait();
                let mut sockets = Vec::new();
                for _ in 0..count / THREADS {
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                    socket.set_nonblocking(true).unwrap();
                    // In progress: all of them are on their way before one is waited for.
                    let _ = socket.connect(&addr.into());
                    socket.set_nonblocking(false).unwrap();
                    socket.set_write_timeout(Some(2 * DEADLINE)).unwrap();
                    socket.set_read_timeout(Some(2 * DEADLINE)).unwrap();
                    sockets.push(TcpStream::from(socket));
                }
                for socket in &mut sockets {
                    // Blocks until it is connected.
                    socket.write_all(&request).expect("connected");
                }
                for socket in &mut sockets {
                    let (mut bytes, mut buffer) = (Vec::new(), [0; 1024]);
                    let head = b"\r\n\r\n";
                    let body = |bytes: &[u8]| {
                        let end = bytes.windows(4).position(|part| part == head);
                        end.is_some_and(|end| bytes.len() > end + 4)
                    };
                    while !body(&bytes) {
                        let size = socket.read(&mut buffer).expect("a head in time");
                        assert!(size > 0, "closed: {}", String::from_utf8_lossy(&bytes));
                        bytes.extend_from_slice(&buffer[..size]);
                    }
                    assert!(bytes.starts_with(b"HTTP/1.1 200"));
                }
                sockets
            })
        })
        .collect();
    barrier.wait();
    let begun = Instant::now();
    let streams = threads.into_iter().flat_map(|it| it.join().unwrap());
    let streams: Vec<_> = streams.collect();
    (streams, begun.elapsed())
}

/// The clients of a server that was restarted, all at once; and the same storm against nginx
/// with nchan on the same machine, for comparison.
#[test]
fn five_thousand_clients_that_reconnect_at_once_all_stream() {
    const COUNT: usize = 5000;
    let _alone = alone();
    need_descriptors(20_000);
    let server = TestServer::start(&[("SSE_METRICS_LISTEN", "127.0.0.1:0")]);
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    let target = format!("/events?token={}", server.token(&["storm"]));
    for _ in 0..2 {
        let get = request("GET", &target, "Accept: text/event-stream\r\n", b"");
        let (mut streams, time) = storm(COUNT, server.addr, get);
        let held = Vitals::of(&server);
        println!("  all {COUNT} streamed after {time:.2?}; {held:?}");
        let all = server.publish(&[("storm", "", "who is there?")]).ok();
        assert_eq!(all, COUNT as u64);
        for stream in &mut streams {
            let mut bytes = Vec::new();
            while !bytes.ends_with(b"who is there?\n\n\r\n") {
                let mut buffer = [0; 512];
                let size = stream.read(&mut buffer).expect("the event");
                assert!(size > 0, "closed");
                bytes.extend_from_slice(&buffer[..size]);
            }
        }
        // All leave, and nothing is sent to them any more.
        drop(streams);
        let left = || server.metric("sse_subscribers") == 1;
        assert!(wait_until(2 * DEADLINE, left), "not noticed");
    }
    before.expect_back(&server, 8 * SLACK);
    witness.finish("10 reconnect storm (5000)");

    if !Path::new(NCHAN).exists() {
        return missing("nginx and libnginx-mod-nchan, for comparison");
    }
    let nginx = Nginx::start();
    for _ in 0..2 {
        let get = request("GET", "/sub", "Accept: text/event-stream\r\n", b"");
        let (streams, time) = storm(COUNT, nginx.addr, get);
        println!("  nginx with nchan: all {COUNT} streamed after {time:.2?}");
        drop(streams);
    }
}

const NCHAN: &str = "/usr/lib/nginx/modules/ngx_nchan_module.so";

/// nginx with its nchan module, on a port of its own.
struct Nginx {
    addr: SocketAddr,
    child: Child,
    home: PathBuf,
}

impl Nginx {
    fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = free.local_addr().unwrap();
        drop(free);
        let home = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let home = home.join(format!("storm-{}", std::process::id()));
        std::fs::create_dir_all(&home).unwrap();
        let settings = format!(
            "load_module {NCHAN};\n\
             daemon off; pid nginx.pid; error_log stderr error;\n\
             worker_processes 2; worker_rlimit_nofile 20000;\n\
             events {{ worker_connections 9000; }}\n\
             http {{ access_log off; server {{ listen {addr} backlog=4096;\n\
             location /sub {{ nchan_subscriber eventsource; nchan_channel_id storm;\n\
             nchan_eventsource_ping_interval 15; }} }} }}\n"
        );
        std::fs::write(home.join("nginx.conf"), settings).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-p").arg(&home).args(["-c", "nginx.conf"]);
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.expect("nginx and libnginx-mod-nchan of Debian");
        let mut nginx = Self { addr, child, home };
        let up = wait_until(DEADLINE, || {
            assert!(nginx.child.try_wait().unwrap().is_none(), "nginx ended");
            TcpStream::connect(addr).is_ok()
        });
        assert!(up, "nginx does not listen");
        nginx
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers end with it; killed, it would leave them behind.
        kill(self.child.id(), "TERM");
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.home);
    }
}
