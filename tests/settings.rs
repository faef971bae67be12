//! Settings, commands, start and end, as an operator meets them.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::*;

/// Bytes in the frame of one submission by [`fill`].
const FRAME: usize = 601 * "data: \n".len() + 1;

/// How many of them are more than the system keeps for a connection that nobody reads.
const MANY: u64 = 1500;

/// Neither limit cuts a stalled subscriber while a test goes on.
const PATIENT: [(&str, &str); 2] = [("SSE_QUEUE", "5000"), ("SSE_WRITE_TIMEOUT", "100")];

/// Submits an event as often as told on one connection; says how many of them were queued. Its
/// frame is much longer than its token: every line end of the data becomes a line of the frame.
fn fill(server: &TestServer, topic: &str, times: u64) -> u64 {
    let body = server.submission(&[(topic, "", &"\n".repeat(600))]);
    let length = format!("Content-Length: {}\r\n", body.len());
    let mut connection = server.connect();
    let mut post = || {
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        Submitted::from(connection.answer()).ok()
    };
    (0..times).map(|_| post()).sum()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The server refuses to start, says why on one line, and shows no secret.
#[track_caller]
fn expect_refusal(output: &Output, name: &str, what: &str) {
    let problem = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{what}: {problem}");
    assert!(problem.contains(name), "{what}: {problem}");
    assert_eq!(problem.lines().count(), 1, "{what}: {problem}");
    assert!(output.stdout.is_empty(), "{what}");
}

// -------------------------------------------------------------------------------------- refusals

/// A limit that was mistyped must not become no limit.
#[test]
fn a_number_that_cannot_be_meant_ends_the_start_with_status_2() {
    let names = [
        "SSE_TOKEN_TTL",
        "SSE_SUBMIT_TTL",
        "SSE_MAX_SUBSCRIBERS",
        "SSE_MAX_TOPICS",
        "SSE_MAX_BODY",
        "SSE_QUEUE",
        "SSE_HEARTBEAT",
        "SSE_RETRY",
        "SSE_READ_TIMEOUT",
        "SSE_WRITE_TIMEOUT",
    ];
    let values = [
        "",
        "0",
        "-1",
        "ten",
        "1.5",
        "10s",
        " 10",
        "1_000",
        "99999999999999999999",
    ];
    for name in names {
        for value in values {
            let output = run(&[("SSE_LISTEN", "127.0.0.1:0"), (name, value)], &[]);
            expect_refusal(&output, name, &format!("{name}={value:?}"));
        }
    }
}

/// Base62 takes four times as long for twice as much, and comes before authentication: 256 KiB of
/// garbage kept a core for six seconds.
#[test]
fn a_body_limit_over_64_kib_ends_the_start_with_status_2() {
    for value in ["65537", "262144", "1048576", "4294967295"] {
        let settings = [("SSE_LISTEN", "127.0.0.1:0"), ("SSE_MAX_BODY", value)];
        let output = run(&settings, &[]);
        expect_refusal(&output, "SSE_MAX_BODY", value);
        let problem = text(&output.stderr);
        assert!(problem.contains("from 1 to 65536"), "{problem}");
    }
    let server = TestServer::start(&[("SSE_MAX_BODY", "65536")]);
    assert_eq!(server.post("/submit", &[b'z'; 65_536]).status, 401);
    assert_eq!(server.post("/submit", &[b'z'; 65_537]).status, 413);
}

#[test]
fn an_address_that_is_none_ends_the_start_with_status_2() {
    for name in ["SSE_LISTEN", "SSE_METRICS_LISTEN"] {
        for value in [
            "",
            "0",
            "8000",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "127.0.0.1:-1",
            "off",
        ] {
            let settings = [("SSE_LISTEN", "127.0.0.1:0"), (name, value)];
            expect_refusal(&run(&settings, &[]), name, &format!("{name}={value:?}"));
        }
    }
}

/// It stands in the head of every answer: a line break in it would forge header fields. And one that
/// no browser sends would shut out the page that it was meant for, without a word.
#[test]
fn an_origin_that_is_none_ends_the_start_with_status_2() {
    for value in [
        "",
        " ",
        "a b",
        "*\r\nSet-Cookie: x=y",
        "*\n",
        "https://\u{e4}.example",
        "\u{7f}",
        "https://a/",
        "https://a/path",
        "https://a?x",
        "a.example",
        "//a.example",
        "https://",
        "https://*.a",
        "*.a",
        "HTTPS://A",
        "https://A",
        "https://a:443",
        "http://a:80",
        "http://[::1]:80",
        "https://a:0x1f",
        "https://a:65536",
        "https://a:+8443",
        "http://a:080",
        "https://a:",
        "https://user@a",
        "*,https://a",
        "https://a,",
        "https://a,,https://b",
        "https://a https://b",
        "https://a;https://b",
        "Null",
    ] {
        let settings = [("SSE_LISTEN", "127.0.0.1:0"), ("SSE_ALLOW_ORIGIN", value)];
        let output = run(&settings, &[]);
        expect_refusal(&output, "SSE_ALLOW_ORIGIN", &format!("{value:?}"));
        let problem = text(&output.stderr);
        assert!(problem.contains("https://app.example"), "{problem}");
    }
}

/// So does a `Location`; and a relative one would depend on where the server is mounted.
#[test]
fn a_url_that_is_none_ends_the_start_with_status_2() {
    for value in [
        "",
        " ",
        "events",
        "ftp://a/",
        "/a b",
        "/\r\nX: y",
        "/\u{e4}",
        "javascript:x",
    ] {
        let settings = [("SSE_LISTEN", "127.0.0.1:0"), ("SSE_RENEW_URL", value)];
        let output = run(&settings, &[]);
        expect_refusal(&output, "SSE_RENEW_URL", &format!("{value:?}"));
    }
}

/// A binary that cannot do it would be an instance that hears a part of the events.
#[cfg(not(feature = "redis"))]
#[test]
fn a_feature_that_the_binary_lacks_ends_the_start_with_status_2() {
    let settings = [
        ("SSE_LISTEN", "127.0.0.1:0"),
        ("SSE_REDIS", "redis://127.0.0.1:6379"),
    ];
    expect_refusal(&run(&settings, &[]), "SSE_REDIS", "no feature");
}

/// A server without its secret, or with half of one, would refuse every token; with an empty one
/// it would take anyone's.
#[test]
fn a_secret_that_is_none_ends_the_start_with_status_2() {
    let listen = ("SSE_LISTEN", "127.0.0.1:0");
    let output = binary(&[listen]).env_remove("SSE_SECRET").output().unwrap();
    expect_refusal(&output, "SSE_SECRET", "none");
    let two = format!("{SECRET},{SECRET}");
    for value in [
        "",
        ",",
        &SECRET[1..],
        &format!("{SECRET}0"),
        &format!("{}g", &SECRET[1..]),
        &format!("{}\u{e9}", &SECRET[2..]),
        &format!("0x{}", &SECRET[2..]),
        &format!(" {}", &SECRET[1..]),
        &format!("{SECRET},"),
        &format!(",{SECRET}"),
        &format!("{SECRET} {SECRET}"),
        &format!("{two},{SECRET}"),
        &format!("{SECRET},{}", &SECRET[2..]),
        &format!("{SECRET}{SECRET}"),
        "supersecretkeyyoushouldnotcommit",
    ] {
        let output = run(&[listen, ("SSE_SECRET", value)], &[]);
        expect_refusal(&output, "SSE_SECRET", &format!("{value:?}"));
        let shown = text(&output.stderr);
        // The log of a start that failed is what people paste into bug reports.
        assert!(value.len() < 9 || !shown.contains(&value[..8]), "{shown}");
    }
}

/// Whoever reads the message knows what to do, without a look into the README.
#[test]
fn a_secret_that_is_none_says_what_is_wrong_with_it() {
    let listen = ("SSE_LISTEN", "127.0.0.1:0");
    let unset = binary(&[listen]).env_remove("SSE_SECRET").output().unwrap();
    let with = |value: &str| run(&[listen, ("SSE_SECRET", value)], &[]);
    for (output, cause) in [
        (unset, "is not set"),
        (with(""), "is empty"),
        (with("  "), "is empty"),
        (with(&format!("\"{SECRET}\"")), "quotes"),
        (with(&format!("'{SECRET}'")), "quotes"),
        (with(&format!("{}g", &SECRET[1..])), "no hex digit"),
        (with("supersecretkeyyoushouldnotcommit"), "no hex digit"),
        (with(&SECRET[2..]), "too few hex digits"),
        (with(&format!("{SECRET}00")), "too many"),
        (with(&[SECRET, SECRET, SECRET].join(",")), "too many"),
    ] {
        expect_refusal(&output, "SSE_SECRET", cause);
        let problem = text(&output.stderr);
        for part in [cause, "sse-server secret", "64 hex digits"] {
            assert!(problem.contains(part), "{part}: {problem}");
        }
    }
}

/// Files, shells and templates leave white space around what they hold.
#[test]
fn white_space_around_a_key_is_ignored() {
    let other = "01".repeat(32);
    for secret in [
        format!(" {SECRET} "),
        format!("{SECRET}\n"),
        format!("\t{other} ,\r\n{SECRET}\r\n"),
    ] {
        let server = TestServer::start(&[("SSE_SECRET", &secret)]);
        let token = mint(SECRET, &topics_payload(&["news"]), now());
        drop(server.stream(&token));
    }
}

/// Kubernetes and systemd hand secrets over as files.
#[test]
fn the_secret_may_stand_in_a_file() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join("secret_in_a_file");
    fs::write(&path, format!("{SECRET}\n")).unwrap();
    let path = path.to_str().unwrap();
    let command = |settings: &[(&str, &str)], args: &[&str]| {
        let mut command = binary(settings);
        command
            .env_remove("SSE_SECRET")
            .args(args)
            .output()
            .unwrap()
    };
    let token = command(&[("SSE_SECRET_FILE", path)], &["token", "news"]);
    let token = stdout_of(token);
    let server = TestServer::start(&[]);
    drop(server.stream(token.trim()));
    // The right key serves, so a file is no way to serve without one.
    let listen = ("SSE_LISTEN", "127.0.0.1:0");
    for (name, content) in [("empty", ""), ("wrong", "abc"), ("other", "\0")] {
        let path = folder.join(format!("secret_{name}"));
        fs::write(&path, content).unwrap();
        let path = path.to_str().unwrap();
        expect_refusal(
            &command(&[listen, ("SSE_SECRET_FILE", path)], &[]),
            "SSE_SECRET",
            name,
        );
    }
    let absent = command(&[listen, ("SSE_SECRET_FILE", "/nonexistent")], &[]);
    expect_refusal(&absent, "SSE_SECRET_FILE", "absent");
    // A secret that was put there by mistake is not shown.
    assert!(!text(&absent.stderr).contains("/nonexistent"));
    let both = run(&[listen, ("SSE_SECRET_FILE", path)], &[]);
    expect_refusal(&both, "SSE_SECRET_FILE", "both");
}

/// Who writes localhost means this machine, and most often 127.0.0.1.
#[test]
fn an_address_may_be_a_host_name() {
    let server = TestServer::start(&[("SSE_LISTEN", "localhost:0")]);
    assert_eq!(server.addr.ip().to_string(), "127.0.0.1");
    assert_eq!(server.get("/ping").status, 200);
}

/// At debug level the log tells the life of each stream: but neither its topics nor its token.
#[test]
fn sse_log_says_what_is_logged() {
    let listen = ("SSE_LISTEN", "127.0.0.1:0");
    expect_refusal(&run(&[listen, ("SSE_LOG", "loud")], &[]), "SSE_LOG", "loud");
    let metrics = ("SSE_METRICS_LISTEN", "127.0.0.1:0");
    let server = TestServer::start(&[("SSE_LOG", "debug")]);
    let token = server.token(&["first-topic", "second-topic"]);
    drop(server.stream(&token));
    let opened = server.wait_for_log("stream opened: ");
    assert!(opened.contains(" topics=2"), "{opened}");
    let ended = server.wait_for_log("stream ended: ");
    assert!(ended.contains("reason=left"), "{ended}");
    for secret in [&*token, "first-topic", "second-topic"] {
        assert!(!server.log().contains(secret), "{secret}");
    }
    assert!(!server.log().contains("no setting of this server"));
    let quiet = TestServer::start(&[metrics]);
    drop(quiet.subscribe(&["news"]));
    quiet.wait_for_metric("sse_streams_ended_total{reason=\"left\"}", 1);
    assert_eq!(quiet.log().lines().count(), 1, "{}", quiet.log());
}

#[test]
fn a_setting_that_is_not_utf8_ends_the_start_with_status_2() {
    for name in ["SSE_QUEUE", "SSE_LISTEN", "SSE_SECRET", "SSE_ALLOW_ORIGIN"] {
        let mut command = binary(&[("SSE_LISTEN", "127.0.0.1:0")]);
        command.env(name, OsStr::from_bytes(b"64\xff"));
        expect_refusal(&command.output().unwrap(), name, name);
    }
}

/// Kubernetes gives a pod `SSE_PORT` and the like for each service of that name; and a variable
/// that is not this server's business may hold any bytes.
#[test]
fn an_unknown_setting_is_warned_about_and_the_server_serves() {
    let server = TestServer::start(&[("SSE_SERVICE_HOST", "10.0.0.1"), ("SSE_QEUE", "4")]);
    for name in ["SSE_SERVICE_HOST", "SSE_QEUE"] {
        assert!(server.wait_for_log(name).contains("warning"), "{name}");
    }
    assert!(!server.log().contains("10.0.0.1"));
    assert_eq!(server.get("/ping").status, 200);
    let mut command = binary(&[]);
    command
        .env("OTHER", OsStr::from_bytes(b"\xff"))
        .arg("--version");
    assert!(command.output().unwrap().status.success());
}

// -------------------------------------------------------------------------------------- settings

#[test]
fn hex_digits_may_be_upper_case() {
    let secret = "AbCdEf01".repeat(8);
    let server = TestServer::start(&[("SSE_SECRET", &secret)]);
    let mut sub = server.subscribe(&["news"]);
    server.publish(&[("news", "update", "hi")]).ok();
    sub.expect_event("update", "hi");
}

/// Port 8000 may be taken where the tests run: the reason then names the same address.
#[test]
fn the_default_address_is_port_8000_of_this_machine() {
    let mut command = binary(&[]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = Vec::new();
    let mut stderr = child.stderr.take().unwrap();
    let mut byte = [0];
    while stderr.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(text(&line).contains("127.0.0.1:8000"), "{}", text(&line));
}

#[test]
fn the_server_listens_where_it_is_told() {
    let server = TestServer::start(&[("SSE_LISTEN", "127.0.0.2:0")]);
    assert_eq!(server.addr.ip().to_string(), "127.0.0.2");
    assert_eq!(server.get("/ping").status, 200);
    if TcpListener::bind("[::1]:0").is_ok() {
        let server = TestServer::start(&[("SSE_LISTEN", "[::1]:0")]);
        assert!(server.addr.is_ipv6());
        assert_eq!(server.get("/ping").status, 200);
    } else {
        // Not a failure under CI: a machine without IPv6 has nothing to test here.
        eprintln!("SKIPPED: no IPv6 on this machine");
    }
}

#[test]
fn a_token_names_at_most_sse_max_topics() {
    for (settings, limit) in [(&[][..], 64), (&[("SSE_MAX_TOPICS", "2")], 2)] {
        let server = TestServer::start(settings);
        let topics: Vec<_> = (0..=limit).map(|number| number.to_string()).collect();
        let topics: Vec<_> = topics.iter().map(String::as_str).collect();
        let mut sub = server.subscribe(&topics[..limit]);
        server.publish(&[(topics[limit - 1], "", "hi")]).ok();
        sub.expect_event("message", "hi");
        let answer = server.get(&format!("/events?token={}", server.token(&topics)));
        assert_eq!(answer.status, 400);
    }
}

/// A subscriber that stops reading must cost a bounded amount of memory, and no publisher a wait.
#[test]
fn a_subscriber_is_cut_when_sse_queue_events_wait_for_it() {
    for (settings, limit) in [(&[][..], 64), (&[("SSE_QUEUE", "7")], 7)] {
        let mut settings = settings.to_vec();
        settings.push(("SSE_METRICS_LISTEN", "127.0.0.1:0"));
        settings.push(PATIENT[1]);
        let server = TestServer::start(&settings);
        // What fits into the queue is never lost, however it comes.
        let mut witness = server.subscribe(&["burst"]);
        let burst = vec![("burst", "", ""); limit];
        assert_eq!(server.publish(&burst).ok(), limit as u64);
        for _ in 0..limit {
            witness.expect_event("message", "");
        }
        let mut stalled = server.subscribe(&["news"]);
        let mut queued = 0;
        let cut = r#"sse_streams_ended_total{reason="queue_full"}"#;
        let over = wait_until(DEADLINE, || {
            queued += fill(&server, "news", 20);
            server.metric(cut) == 1
        });
        assert!(over, "{queued} events queued, and still not cut");
        server.wait_for_log("stream cut: reason=queue_full suppressed=0");
        server.wait_for_metric("sse_subscribers", 1);
        // What was sent is whole and without a gap. Its last frame may be cut short by the end.
        let received = stalled.connection.rest();
        assert!(received.len() as u64 <= queued * FRAME as u64 + 100);
        // It broke off: nothing says that this was the end.
        assert!(!stalled.connection.whole);
        let received = text(&received);
        let (first, frames) = received.split_once("\n:\n").unwrap();
        assert!(first.starts_with("retry: "), "{first:?}");
        assert!(
            frames
                .split("\n\n")
                .all(|frame| frame.bytes().all(|byte| b"data: \n".contains(&byte)))
        );
    }
}

/// The same for one that fills no queue: its socket takes nothing any more.
#[test]
fn a_stream_without_progress_is_cut_after_sse_write_timeout() {
    let cases = [(&[][..], 9), (&[("SSE_WRITE_TIMEOUT", "2")], 1)];
    let server = TestServer::start(&[PATIENT[0], ("SSE_WRITE_TIMEOUT", "600")]);
    let mut patient = server.subscribe(&["news"]);
    assert_eq!(fill(&server, "news", MANY), MANY);
    let cases = cases.map(|(settings, least)| {
        let mut settings = settings.to_vec();
        settings.extend([("SSE_QUEUE", "5000"), ("SSE_METRICS_LISTEN", "127.0.0.1:0")]);
        in_background(move || {
            let server = TestServer::start(&settings);
            let mut stalled = server.subscribe(&["news"]);
            let start = Instant::now();
            assert!(fill(&server, "news", MANY) > 0);
            let sample = r#"sse_streams_ended_total{reason="write_timeout"}"#;
            server.wait_for_metric(sample, 1);
            let took = start.elapsed();
            assert!(took >= Duration::from_secs(least), "{took:?}");
            server.wait_for_log("stream cut: reason=write_timeout suppressed=0");
            server.wait_for_metric("sse_subscribers", 0);
            stalled.connection.rest();
            assert!(!stalled.connection.whole, "a cut that looks like an end");
        })
    });
    for case in cases {
        case.join().unwrap();
    }
    // Whoever is given longer is still there when the others are gone.
    for _ in 0..MANY {
        patient.expect_event("message", &"\n".repeat(600));
    }
}

/// Connections that say nothing, or stop in the middle, would use up what is there for others.
/// Whoever has begun to ask is told; whoever has not, or has its answer, is not: a word that no
/// request asked for would be taken for the answer to the next one.
#[test]
fn a_request_without_progress_is_closed_after_sse_read_timeout() {
    let cases = [(&[][..], 10), (&[("SSE_READ_TIMEOUT", "2")], 2)];
    let patient = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
    let mut waiting = patient.connect();
    waiting.send(b"GET /pi");
    let cases = cases.map(|(settings, least)| {
        in_background(move || {
            let server = TestServer::start(settings);
            let beginnings = [
                &b"G"[..],
                b"GET /pi",
                b"GET /ping HTTP/1.1\r\nHost: x",
                b"GET /ping HTTP/1.1\r\nHost: x\r\n",
                b"GET /ping HTTP/1.1\r\nHost: x\r\n\r",
                b"POST /submit HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n",
                b"POST /submit HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nabc",
                b"POST /submit HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc",
            ];
            let start = Instant::now();
            let connections: Vec<_> = beginnings
                .iter()
                .map(|beginning| {
                    let mut connection = server.connect();
                    connection.send(beginning);
                    connection
                })
                .collect();
            let silent = server.connect();
            // A line end in front of a request is no part of one.
            let mut line_end = server.connect();
            line_end.send(b"\r\n");
            // One that has had its answer, and keeps silent since.
            let mut idle = server.connect();
            idle.send(request("GET", "/ping", "", b""));
            assert_eq!(idle.answer().status, 200);
            let least = Duration::from_secs(least);
            for (beginning, mut connection) in beginnings.iter().zip(connections) {
                let answer = connection.answer();
                let took = start.elapsed();
                let beginning = text(beginning);
                assert_eq!(answer.status, 408, "{beginning:?}");
                assert_eq!(answer.header("Connection"), Some("close"), "{beginning:?}");
                connection.expect_closed();
                assert!(took >= least, "{beginning:?} after {took:?}");
            }
            for (what, mut connection) in
                [("silent", silent), ("a line end", line_end), ("idle", idle)]
            {
                let rest = text(&connection.rest());
                assert_eq!(rest, "", "{what}");
                assert!(start.elapsed() >= least, "{what}");
            }
        })
    });
    for case in cases {
        case.join().unwrap();
    }
    // Whoever is given longer may still finish.
    waiting.send(b"ng HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(waiting.answer().status, 200);
}

#[test]
fn the_default_heartbeat_comes_after_15_seconds() {
    let server = TestServer::start(&[]);
    let start = Instant::now();
    let mut raw = server.subscribe(&["news"]).connection;
    raw.frame();
    assert_eq!(raw.frame(), b":\n");
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(15), "{took:?}");
}

// ------------------------------------------------------------------------------------------ start

/// An operator learns from one line where it listens and what it can carry.
#[test]
fn the_start_line_says_where_and_how_many() {
    let version = concat!(
        "sse-server ",
        env!("CARGO_PKG_VERSION"),
        ": listening on 127.0.0.1:"
    );
    let streams = |line: &str| -> u64 {
        let words = line.split("at most ").nth(1).expect(line);
        let number = words.split(' ').next().and_then(|word| word.parse().ok());
        number.expect(line)
    };
    let limit = &["sh", "-c", "ulimit -n 1000; exec \"$0\" \"$@\""];
    let server = TestServer::start_under(limit, &[("SSE_MAX_SUBSCRIBERS", "10")]);
    let line = &server.start_line;
    assert!(line.starts_with(version), "{line}");
    assert_eq!(streams(line), 10);
    assert!(!line.contains("metrics"), "{line}");
    assert_eq!(server.log().lines().count(), 1);

    // Fewer than were asked for: that is what it says, and what it does. Each stream is one
    // descriptor; a part is left for publishers.
    let settings = [("SSE_METRICS_LISTEN", "127.0.0.1:0")];
    let server = TestServer::start_under(limit, &settings);
    let line = &server.start_line;
    assert!((500..1000).contains(&streams(line)), "{line}");
    assert_eq!(server.metric("sse_capacity"), streams(line));
    assert!(
        line.contains(&format!("metrics on {}", server.metrics.unwrap())),
        "{line}"
    );
    // And keeps to: the next one is refused, not accepted and left to starve.
    let few = &["sh", "-c", "ulimit -n 100; exec \"$0\" \"$@\""];
    let server = TestServer::start_under(few, &[]);
    let allowed = streams(&server.start_line);
    let token = server.token(&["news"]);
    let subs: Vec<_> = (0..allowed).map(|_| server.stream(&token)).collect();
    assert_eq!(server.get(&format!("/events?token={token}")).status, 503);
    let heard = server.publish(&[("news", "", "")]).ok();
    assert_eq!(heard, subs.len() as u64);
}

/// A shell's limit of 1,024 is for programs that count descriptors in a small set, and this one
/// does not: the soft limit is raised as far as the system lets it.
#[test]
fn the_soft_descriptor_limit_is_raised_to_the_hard_one() {
    let hard = &[
        "sh",
        "-c",
        "ulimit -Sn 200 && ulimit -Hn 900 && exec \"$0\" \"$@\"",
    ];
    let server = TestServer::start_under(hard, &[]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = line.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers, ["900", "900"]);
}

#[test]
fn a_port_that_is_taken_ends_the_start_with_status_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for name in ["SSE_LISTEN", "SSE_METRICS_LISTEN"] {
        let output = run(&[("SSE_LISTEN", "127.0.0.1:0"), (name, &address)], &[]);
        let problem = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{problem}");
        // The setting that has to be changed is named.
        for part in [&address, "in use", &format!("{name} ")] {
            assert!(problem.contains(part), "{part}: {problem}");
        }
    }
    // An address of another machine.
    let output = run(&[("SSE_LISTEN", "192.0.2.1:8000")], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("192.0.2.1:8000"));
}

// -------------------------------------------------------------------------------------------- end

/// A restart must cost no event that was accepted: all that is queued is sent, and each client is
/// told when to come back.
#[test]
fn a_signal_drains_every_stream_and_ends_with_status_0() {
    for signal in ["TERM", "INT", "HUP"] {
        let settings = [PATIENT[0], PATIENT[1], ("SSE_RETRY", "500")];
        let mut server = TestServer::start(&settings);
        let mut quick: Vec<_> = (0..5).map(|_| server.subscribe(&["small"])).collect();
        // It does not read until the signal has come: most of its events wait in the server.
        let mut late = server.subscribe(&["news"]);
        let (idle, mut metrics) = (server.connect(), server.connect());
        metrics.send(b"GET /pi");
        assert_eq!(fill(&server, "news", MANY), MANY);
        server
            .publish(&[("small", "last", "1"), ("small", "last", "2")])
            .ok();
        server.signal(signal);
        for sub in &mut quick {
            sub.expect_event("last", "1");
            sub.expect_event("last", "2");
            let delay = match sub.item() {
                Some(Item::Retry(delay)) => delay,
                other => panic!("no farewell but {other:?}"),
            };
            assert!((500..=1000).contains(&delay), "{delay}");
            sub.expect_end();
            assert!(sub.connection.whole, "an end that looks like a break");
        }
        let messages = late.rest();
        assert_eq!(messages.len() as u64, MANY, "{signal}");
        assert!(late.connection.whole, "{signal}");
        let whole = "\n".repeat(600);
        assert!(messages.iter().all(|message| message.data == whole));
        assert_eq!(server.wait_for_end().code(), Some(0), "{signal}");
        assert!(TcpStream::connect(server.addr).is_err());
        drop(idle);
    }
}

/// Nor may the client with the longest queue be the one that is not told when to come back.
#[test]
fn a_long_queue_is_drained_and_told_farewell() {
    let mut server = TestServer::start(&[("SSE_QUEUE", "20"), PATIENT[1]]);
    // Two that do not read. When the first of them is cut, the other's queue is as good as full;
    // where one event is too much for both, it is tried with two new ones.
    let (mut late, mut queued) = (Vec::new(), 0);
    let one_left = wait_until(DEADLINE, || {
        late = vec![server.subscribe(&["news"]), server.subscribe(&["news"])];
        let mut heard = (1..20_000).map(|number| (number, fill(&server, "news", 1)));
        let cut = heard.find(|(_, deliveries)| *deliveries < 2);
        let (number, left) = cut.expect("somebody is cut");
        queued = number;
        left == 1
    });
    assert!(one_left, "whenever one is cut, so is the other");
    server.signal("TERM");
    assert!(wait_until(DEADLINE, || TcpStream::connect(server.addr).is_err()));
    let mut told = 0;
    for mut sub in late {
        let messages = sub.rest().len();
        if sub.connection.whole {
            told += 1;
            assert_eq!(messages, queued, "events of the one that was not cut");
        }
    }
    assert_eq!(told, 1, "the other one is told farewell");
    assert_eq!(server.wait_for_end().code(), Some(0));
}

/// A subscriber that takes nothing must not hold up a restart for ever.
#[test]
fn a_stalled_subscriber_is_cut_off_5_seconds_after_the_signal() {
    let mut server = TestServer::start(&PATIENT);
    let mut good = server.subscribe(&["small"]);
    let mut stalled = server.subscribe(&["news"]);
    assert_eq!(fill(&server, "news", MANY), MANY);
    server.publish(&[("small", "", "last")]).ok();
    let start = Instant::now();
    server.signal("TERM");
    good.expect_event("message", "last");
    good.expect_end();
    assert!(good.connection.whole);
    assert_eq!(server.wait_for_end().code(), Some(0));
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(5), "{took:?}");
    stalled.connection.rest();
    assert!(!stalled.connection.whole, "a cut that looks like an end");
}

/// Whoever asks twice does not want to wait.
#[test]
fn a_second_signal_ends_at_once_with_status_1() {
    for (first, second) in [("TERM", "TERM"), ("INT", "INT"), ("TERM", "INT")] {
        let mut server = TestServer::start(&PATIENT);
        let stalled = server.subscribe(&["news"]);
        assert_eq!(fill(&server, "news", MANY), MANY);
        server.signal(first);
        let refused = || TcpStream::connect(server.addr).is_err();
        assert!(wait_until(DEADLINE, refused), "still accepting");
        server.signal(second);
        // Without the second, the end would come later and with status 0.
        assert_eq!(server.wait_for_end().code(), Some(1));
        drop(stalled);
    }
}

/// Between the signal and the end nobody may believe that an event was taken.
#[test]
fn a_draining_server_takes_no_submission() {
    let mut server = TestServer::start(&PATIENT);
    let mut late = server.subscribe(&["news"]);
    let mut publisher = server.connect();
    publisher.send(request("GET", "/ping", "", b""));
    publisher.answer();
    assert_eq!(fill(&server, "news", MANY), MANY);
    let body = server.submission(&[("news", "lost", "")]);
    server.signal("TERM");
    let refused = || TcpStream::connect(server.addr).is_err();
    assert!(wait_until(DEADLINE, refused), "still accepting");
    // On a connection from before: either it is closed, or the answer says so.
    let length = format!("Content-Length: {}\r\n", body.len());
    let sent = publisher.try_send(request("POST", "/submit", &length, body.as_bytes()));
    let answer = if sent { publisher.try_head() } else { None };
    let accepted = answer.as_ref().is_some_and(|answer| answer.status == 200);
    let seen = late.rest().iter().any(|message| message.name == "lost");
    assert_eq!(accepted, seen, "{answer:?}");
    assert_eq!(server.wait_for_end().code(), Some(0));
}

// --------------------------------------------------------------------------------------- commands

#[track_caller]
fn stdout_of(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    let line = text(&output.stdout);
    assert!(
        line.ends_with('\n') && line.lines().count() == 1,
        "{line:?}"
    );
    line.trim_end().to_string()
}

#[test]
fn secret_prints_a_fresh_secret_that_the_server_takes() {
    let secret = || {
        let mut command = binary(&[]);
        stdout_of(
            command
                .env_remove("SSE_SECRET")
                .arg("secret")
                .output()
                .unwrap(),
        )
    };
    let (one, two) = (secret(), secret());
    assert_eq!(one.len(), 64);
    assert!(
        one.bytes()
            .all(|digit| b"0123456789abcdef".contains(&digit)),
        "{one}"
    );
    assert_ne!(one, two);
    let server = TestServer::start(&[("SSE_SECRET", &one)]);
    assert_eq!(server.subscribe(&["news"]).head.status, 200);
}

#[test]
fn token_prints_a_token_for_the_topics() {
    let server = TestServer::start(&[]);
    let token = stdout_of(run(&[], &["token", "news", "caf\u{e9} \u{1f980}"]));
    let mut sub = server.stream(&token);
    for topic in ["news", "caf\u{e9} \u{1f980}"] {
        assert_eq!(server.publish(&[(topic, "update", topic)]).ok(), 1);
        sub.expect_event("update", topic);
    }
    assert_eq!(server.publish(&[("other", "", "")]).ok(), 0);
}

#[test]
fn event_prints_a_submission() {
    let server = TestServer::start(&[]);
    let mut sub = server.subscribe(&["news"]);
    let lines = b"one\ntwo\r\n\xe2\x82\xac\n";
    for (args, input, name, data) in [
        (
            &["event", "news", "update", "21 C"][..],
            &b""[..],
            "update",
            "21 C",
        ),
        (&["event", "news", "update", ""], b"", "update", ""),
        (&["event", "news", "update"], b"ignored", "update", ""),
        (&["event", "news", "", "hi"], b"", "message", "hi"),
        (
            &["event", "news", "update", "-"],
            lines,
            "update",
            "one\ntwo\n\u{20ac}\n",
        ),
        (&["event", "news", "update", "-"], b"", "update", ""),
        (&["event", "news", "update", "--"], b"", "update", "--"),
    ] {
        let body = stdout_of(run_with_input(&[], args, input));
        // As the shell pipes it, with the line end.
        let answer = server.post("/submit", format!("{body}\n").as_bytes());
        assert_eq!(Submitted::from(answer).ok(), 1, "{args:?}");
        sub.expect_event(name, data);
    }
}

#[test]
fn a_command_that_cannot_do_what_it_is_told_says_why() {
    let long = "t".repeat(257);
    for args in [
        &["token", ""][..],
        &["token", "news", &long],
        &["event", "", "update", "hi"],
        &["event", "news", "up\ndate", "hi"],
        &["event", "news", "up\rdate"],
    ] {
        let output = run(&[], args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
    let output = run_with_input(&[], &["event", "news", "update", "-"], b"\xff");
    assert!(!output.status.success() && output.stdout.is_empty());
    for args in [&["token", "news"][..], &["event", "news", "update", "hi"]] {
        for command in [
            binary(&[]).env_remove("SSE_SECRET").args(args),
            binary(&[("SSE_SECRET", &SECRET[1..])]).args(args),
        ] {
            expect_refusal(
                &command.output().unwrap(),
                "SSE_SECRET",
                &format!("{args:?}"),
            );
        }
    }
}

/// The answer to "why is this a 401", as JSON.
#[test]
fn open_says_what_a_token_holds_or_why_it_is_refused() {
    let open = |settings: &[(&str, &str)], token: &str| -> serde_json::Value {
        let output = stdout_of(run(settings, &["open", token]));
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
    };
    let topics = ["news", "caf\u{e9} \u{1f980}", "a\"b\\c\n\0\u{7f}\u{2028}"];
    let payload = topics_payload(&topics);
    let told = open(&[], &mint(SECRET, &payload, now() - 10));
    assert_eq!(told["holds"], serde_json::json!({ "topics": topics }));
    assert_eq!(told["key"], 1);
    let age = told["age"].as_u64().unwrap();
    assert!((10..60).contains(&age), "{told}");
    let until = told["good_until"].as_u64().unwrap();
    assert_eq!(until + age, u64::from(now()) + 86_400, "{told}");
    let events = events_payload(&[("news", "update", "21 \u{b0}C"), ("news", "", "")]);
    let other = "01".repeat(32);
    let two = [("SSE_SECRET", &*format!("{other},{SECRET}"))];
    let told = open(&two, &mint(SECRET, &events, now()));
    assert_eq!(told["holds"]["events"][0]["data"], "21 \u{b0}C");
    assert_eq!(told["key"], 2);
    let output = run_with_input(
        &[],
        &["open", "-"],
        format!("{}\n", mint(SECRET, &events, now())).as_bytes(),
    );
    assert!(stdout_of(output).contains("\"update\""));
    for (token, cause) in [
        (mint(&other, &payload, now()), "another SSE_SECRET"),
        (
            mint(SECRET, &payload, now() - 90_000),
            "expired 3600 seconds ago",
        ),
        (mint(SECRET, &events, now() - 310), "expired 10 seconds ago"),
        (
            mint(SECRET, &payload, now() + 3600),
            "dated 3600 seconds ahead",
        ),
        (mint(SECRET, &topics_payload(&[]), now()), "SSE_MAX_TOPICS"),
        (mint(SECRET, b"{\"topics\": [\"news\"]}", now()), "JSON"),
        ("{\"topics\": [\"news\"]}".into(), "JSON"),
        ("".into(), "no token"),
        ("abc".into(), "Branca"),
    ] {
        let told = open(&[], &token);
        let refused = told["refused"].as_str().unwrap();
        assert!(refused.contains(cause), "{cause}: {refused}");
    }
}

/// Wherever it stands: whoever asks for help gets it.
#[test]
fn help_is_given_anywhere() {
    for args in [
        &["help"][..],
        &["--help"],
        &["token", "--help"],
        &["--help", "x"],
        &["-h"],
    ] {
        let output = binary(&[])
            .env_remove("SSE_SECRET")
            .args(args)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(text(&output.stdout).starts_with("usage: "), "{args:?}");
    }
}

/// What a container without a shell uses as its health check: a server that hangs is not healthy.
#[test]
fn ping_tells_a_live_server_from_a_dead_one() {
    let server = TestServer::start(&[]);
    let ping = |address: &str| run(&[("SSE_LISTEN", address)], &["ping"]).status.code();
    assert_eq!(ping(&server.addr.to_string()), Some(0));
    // As in a container that listens on every address.
    let everywhere = TestServer::start(&[("SSE_LISTEN", "0.0.0.0:0")]);
    assert_eq!(
        ping(&format!("0.0.0.0:{}", everywhere.addr.port())),
        Some(0)
    );
    let dead = server.addr.to_string();
    drop(server);
    assert_eq!(ping(&dead), Some(1));
    // Accepts in the kernel, and never answers.
    let hung = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(ping(&hung.local_addr().unwrap().to_string()), Some(1));
    // Answers something else.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        let _ = stream.read(&mut [0; 1000]);
        let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.0 503 No\r\n\r\n");
    });
    assert_eq!(ping(&address), Some(1));
}

#[test]
fn help_and_version_need_no_secret() {
    for (arg, expected) in [
        ("--help", "usage"),
        (
            "--version",
            concat!("sse-server ", env!("CARGO_PKG_VERSION")),
        ),
    ] {
        let mut command = binary(&[]);
        let output = command.env_remove("SSE_SECRET").arg(arg).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arg}");
        assert!(text(&output.stdout).contains(expected), "{arg}");
        assert!(output.stderr.is_empty(), "{arg}");
    }
    let help = text(&run(&[], &["--help"]).stdout);
    for command in ["secret", "token TOPIC", "event TOPIC EVENT [DATA]", "ping"] {
        assert!(help.contains(command), "{command}: {help}");
    }
}

/// A mistyped command must not start a server.
#[test]
fn anything_else_prints_the_usage_and_ends_with_status_2() {
    for args in [
        &[""][..],
        &["serve"],
        &["--serve"],
        &["Secret"],
        &["secret", "x"],
        &["token"],
        &["event"],
        &["event", "news"],
        &["event", "news", "update", "21", "C"],
        &["ping", "x"],
        &["open"],
        &["open", "x", "y"],
        &["--version", "x"],
    ] {
        let output = run(&[("SSE_LISTEN", "127.0.0.1:0")], args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(text(&output.stderr).contains("usage"), "{args:?}");
    }
    let mut command = binary(&[]);
    let output = command.arg(OsStr::from_bytes(b"\xff")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}
