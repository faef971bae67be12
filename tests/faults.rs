//! What the network, the machine or its operator can do to the server: peers that vanish, no more
//! descriptors, no more threads, a kill. As in the tests of what a stranger can do, a witness lives
//! through all but the last.

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::io::{BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio, id};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use attack::*;
use support::*;

const METRICS: (&str, &str) = ("SSE_METRICS_LISTEN", "127.0.0.1:0");

fn am_root() -> bool {
    run_program("id -u").trim() == "0"
}

// ------------------------------------------------------------------------- peers that vanish

/// A second machine: a network namespace, joined to this one by a cable. Removed when dropped.
struct Machine {
    name: String,
    /// Of this end of the cable.
    host: String,
    /// With their outputs: a client that cannot write hangs up.
    clients: Vec<(Child, BufReader<ChildStdout>)>,
}

impl Machine {
    /// Nothing where this process may not make one.
    fn plug_in() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, SeqCst);
        let name = format!("sse{}x{number}", id());
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        if !made.is_ok_and(|output| output.status.success()) {
            missing("a network namespace needs root, and ip of iproute2");
            return None;
        }
        // The network that is set aside for tests of network devices, four addresses a cable.
        let net = id().wrapping_mul(8).wrapping_add(number) % (1 << 15);
        let [high, low] = [18 + net / (1 << 14), net % (1 << 14) * 4];
        let address = |last| format!("198.{high}.{}.{}", low / 256, low % 256 + last);
        let (host, guest) = (address(1), address(2));
        for line in [
            format!("ip link add {name} type veth peer name cable netns {name}"),
            format!("ip addr add {host}/30 dev {name}"),
            format!("ip link set {name} up"),
            format!("ip -n {name} addr add {guest}/30 dev cable"),
            format!("ip -n {name} link set cable up"),
        ] {
            run_program(&line);
        }
        let clients = Vec::new();
        Some(Self {
            name,
            host,
            clients,
        })
    }

    /// Opens a stream from there, and waits until its head and first bytes have come.
    #[track_caller]
    fn subscribe(&mut self, server: &TestServer, topic: &str) {
        let port = server.addr.port();
        let url = format!(
            "http://{}:{port}/events?token={}",
            self.host,
            server.token(&[topic])
        );
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "curl", "-sN", &url]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut client = command.spawn().expect("curl");
        let output = client.stdout.take().unwrap();
        // On a thread, since reading a pipe has no deadline.
        let read = in_background(move || {
            let (mut output, mut first) = (BufReader::new(output), [0; 6]);
            let _ = output.read_exact(&mut first);
            assert_eq!(&first, b"retry:", "no stream, but an answer");
            output
        });
        assert!(wait_until(DEADLINE, || read.is_finished()), "no stream");
        self.clients.push((client, read.join().unwrap()));
    }

    /// From now on nothing comes from there nor arrives, and no farewell went before.
    fn unplug(&self) {
        run_program(&format!("ip -n {} link set cable down", self.name));
    }

    /// The same, but the machine's lower layers still answer, as a firewall's would.
    fn fall_silent(&self) -> bool {
        ["INPUT", "OUTPUT"].iter().all(|chain| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.name, "iptables", "-A", chain]);
            let output = command.args(["-p", "tcp", "-j", "DROP"]).output();
            output.is_ok_and(|output| output.status.success())
        })
    }

    /// Its clients know of nothing: they still hold their streams.
    #[track_caller]
    fn expect_clients_alive(&mut self) {
        for (client, _) in &mut self.clients {
            assert!(client.try_wait().unwrap().is_none(), "it hung up by itself");
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (client, _) in &mut self.clients {
            let _ = client.kill();
            let _ = client.wait();
        }
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// How the streams of two machines end that vanish in the two ways there are, without a farewell;
/// events are published to them meanwhile, or not. `promised`: within so many seconds, by the README.
fn vanish(row: &str, settings: &[(&str, &str)], busy: bool, promised: u64) {
    let Some(mut unplugged) = Machine::plug_in() else {
        return;
    };
    let mut silent = Machine::plug_in().expect("a second one");
    // Reachable from both, and from here.
    let settings = [settings, &[METRICS, ("SSE_LISTEN", "0.0.0.0:0")]].concat();
    let mut server = TestServer::start(&settings);
    server.addr.set_ip([127, 0, 0, 1].into());
    let witness = Witness::start(&server);
    let before = Vitals::of(&server);
    unplugged.subscribe(&server, "far");
    silent.subscribe(&server, "far");
    let mut near = server.subscribe(&["far"]);
    assert_eq!(server.publish(&[("far", "", "before")]).ok(), 3);
    near.expect_event("message", "before");

    unplugged.unplug();
    assert!(silent.fall_silent(), "iptables within the namespace");
    let (begun, mut times) = (Instant::now(), Vec::new());
    let mut published = 0;
    let mut gone = 0;
    let within = DEADLINE.max(3 * Duration::from_secs(promised));
    let noticed = wait_until(within, || {
        if busy {
            let data = published.to_string();
            // Whoever vanished delays nobody who has not.
            server.publish(&[("far", "", &data)]).ok();
            near.expect_event("message", &data);
            published += 1;
            thread::sleep(Duration::from_millis(50));
        }
        let left = server.metric("sse_subscribers");
        while gone < 4 - left {
            times.push(begun.elapsed());
            gone += 1;
        }
        gone == 2
    });
    println!("  {row}: noticed after {times:.1?}, {published} events meanwhile");
    assert!(noticed, "the streams of the vanished are still held");
    let reasons = ["write_timeout", "disconnected"].map(|reason| {
        let sample = format!("sse_subscribers_cut_total{{reason=\"{reason}\"}}");
        server.metric(&sample)
    });
    println!("  cut for the write timeout or as disconnected: {reasons:?}");
    assert_eq!(reasons.iter().sum::<u64>(), 2, "and not for another reason");
    unplugged.expect_clients_alive();
    silent.expect_clients_alive();
    assert_eq!(server.publish(&[("far", "", "after")]).ok(), 1);
    near.expect_event("message", "after");
    drop(near);
    let left = || server.publish(&[("far", "", "anybody?")]).ok() == 0;
    assert!(wait_until(DEADLINE, left), "not noticed");
    before.expect_back(&server, 4 * 1024);
    witness.finish(row);
}

/// A phone in a tunnel, a laptop put to sleep: no FIN ever comes. Nothing is published to them, so
/// the heartbeats have to find out.
#[test]
fn idle_streams_of_peers_that_vanished_are_ended_by_the_heartbeat() {
    let settings = [("SSE_HEARTBEAT", "2"), ("SSE_WRITE_TIMEOUT", "1")];
    vanish("idle, heartbeat 2, write timeout 1", &settings, false, 4);
}

/// The same while events are under way; no heartbeat comes in time to help, and the queues are
/// longer than the events.
#[test]
fn busy_streams_of_peers_that_vanished_are_ended_by_the_write_timeout() {
    let settings = [("SSE_HEARTBEAT", "600"), ("SSE_WRITE_TIMEOUT", "2")];
    let settings = [&settings[..], &[("SSE_QUEUE", "10000")]].concat();
    vanish("busy, write timeout 2", &settings, true, 2);
}

/// What the README promises of the defaults: the second heartbeat.
#[test]
fn at_default_settings_idle_streams_of_vanished_peers_are_ended() {
    vanish("idle, defaults", &[], false, 30);
}

#[test]
fn at_default_settings_busy_streams_of_vanished_peers_are_ended() {
    vanish("busy, defaults", &[], true, 10);
}

// ----------------------------------------------------------------- no more descriptors or threads

/// Sets the soft limit of a running server, which is this user's or that one's own.
fn limit(server: &TestServer, what: &str, count: usize) {
    let user = server.status("Uid");
    let same = format!("setpriv --reuid={user} --regid={user} --clear-groups ");
    let line = format!("prlimit --pid {} --{what}={count}:", server.pid());
    let line = if user == 0 || !am_root() {
        line
    } else {
        same + &line
    };
    run_program(&line);
}

/// Sets the limit so that the server can have this many descriptors more, beside the one that an
/// accept has from the time it begins to wait.
fn leave_descriptors(server: &TestServer, count: usize) {
    let path = format!("/proc/{}/fd", server.pid());
    let entries = fs::read_dir(path).unwrap().map(Result::unwrap);
    let used: Vec<usize> = entries
        .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
        .collect();
    let mut free = (0..).filter(|number| !used.contains(number));
    // The limit is on the numbers, and the lowest free one is taken first.
    let most = free.nth(count).unwrap();
    limit(server, "nofile", most);
}

/// Connections that come while there is no room: a ping on each.
fn knock(addr: SocketAddr, count: usize) -> Vec<TcpStream> {
    let ping = request("GET", "/ping", "Connection: close\r\n", b"");
    let knocking = (0..count).map(|_| {
        let mut stream = connect(addr);
        send(&mut stream, &ping);
        stream
    });
    knocking.collect()
}

/// Their answers: 200, or closed unanswered. How many were answered.
#[track_caller]
fn answered(streams: Vec<TcpStream>) -> usize {
    let mut count = 0;
    for mut stream in streams {
        match fate(&mut stream) {
            Fate::Closed(statuses) if statuses == [200] => count += 1,
            other => assert_eq!(other, Fate::Closed(vec![]), "unanswered, or answered well"),
        }
    }
    count
}

/// Streams, and a publisher with a connection of its own, that were there before.
struct Regulars {
    streams: Vec<Subscriber>,
    publisher: Connection,
    published: usize,
}

impl Regulars {
    fn of(server: &TestServer) -> Self {
        let mut publisher = server.connect();
        publisher.send(request("GET", "/ping", "", b""));
        assert_eq!(publisher.answer().status, 200);
        Self {
            streams: (0..5).map(|_| server.subscribe(&["regular"])).collect(),
            publisher,
            published: 0,
        }
    }

    #[track_caller]
    fn expect_service(&mut self, server: &TestServer) {
        let data = self.published.to_string();
        self.published += 1;
        let body = server.submission(&[("regular", "", &data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        let submit = request("POST", "/submit", &length, body.as_bytes());
        self.publisher.send(submit);
        assert_eq!(Submitted::from(self.publisher.answer()).ok(), 5);
        for stream in &mut self.streams {
            stream.expect_event("message", &data);
        }
    }
}

/// A server with no room for the next connection serves those it has for as long as that lasts,
/// then everybody again, without anybody's help.
#[track_caller]
fn starve(
    row: &str,
    server: &TestServer,
    started: Instant,
    take_room: impl Fn(usize),
    left: usize,
) {
    let witness = Witness::start(server);
    let mut regulars = Regulars::of(server);
    let before = Vitals::of(server);
    let crowd: Vec<_> = (0..20).map(|_| connect(server.addr)).collect();
    assert!(wait_until(DEADLINE, || {
        server.status("Threads") >= before.threads + 20
    }));
    take_room(left);
    // What is left goes to connections that say nothing, too.
    let holders: Vec<_> = (0..left).map(|_| connect(server.addr)).collect();
    let waiting = knock(server.addr, 20);
    let begun = Instant::now();
    // Long enough for a line a second to be told from a line each time.
    while begun.elapsed() < Duration::from_secs(3) {
        regulars.expect_service(server);
        witness.expect_more();
        thread::sleep(Duration::from_millis(20));
    }
    drop((crowd, holders));
    let freed = Instant::now();
    let back = wait_until(DEADLINE, || answered(knock(server.addr, 1)) == 1);
    assert!(back, "no service though there is room again");
    println!("  {row}: served again after {:.1?}", freed.elapsed());
    let served = answered(waiting);
    println!("  {row}: {served} of 20 that came meanwhile were answered");
    regulars.expect_service(server);
    assert_eq!(server.publish(&[("regular", "", "back")]).ok(), 5);
    before.expect_back(server, 4 * 1024);
    drop(regulars);
    assert!(wait_until(DEADLINE, || {
        server.publish(&[("regular", "", "left?")]).ok() == 0
    }));
    expect_few_lines(server, started.elapsed());
    witness.finish(row);
}

/// A connection takes two descriptors: with an even number left, the first is what it does not
/// get; with an odd one, the second, and then the library panics.
#[test]
fn out_of_descriptors_streams_go_on_and_service_comes_back_by_itself() {
    let _alone = alone();
    let settings = [("SSE_READ_TIMEOUT", "600")];
    let (server, started) = (TestServer::start(&settings), Instant::now());
    // As many as the tests around this one allow.
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let all = line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    for left in 0..4 {
        let row = format!("{left} descriptors left");
        starve(
            &row,
            &server,
            started,
            |left| leave_descriptors(&server, left),
            left,
        );
        limit(&server, "nofile", all.unwrap());
    }
    let log = server.log();
    assert!(log.contains("cannot accept connections"), "{log}");
    // The library's panic was met: else the odd numbers tell nothing.
    assert!(log.contains("internal error: "), "{log}");
}

/// As an ordinary user, whom the system limits. (It does not limit root.) Nothing where this
/// process may not become one; and the copy of the binary that such a user may read.
fn start_as_nobody(settings: &[(&str, &str)]) -> Option<(TestServer, Copy)> {
    if !am_root() {
        missing("a limit of threads needs root, who alone can become a user without others");
        return None;
    }
    // A user with no other process on this machine: the limit counts them all.
    let user = 100_000 + id() % 1_000_000;
    let copy = Copy(env::temp_dir().join(format!("sse-server-{user}")));
    fs::copy(env!("CARGO_BIN_EXE_sse-server"), &copy.0).unwrap();
    fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o755)).unwrap();
    let exec = format!("exec {}", copy.0.display());
    let [uid, gid] = ["reuid", "regid"].map(|kind| format!("--{kind}={user}"));
    let wrapper = ["setpriv", &uid, &gid, "--clear-groups", "sh", "-c", &exec];
    Some((TestServer::start_under(&wrapper, settings), copy))
}

/// Removed when dropped.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn out_of_threads_streams_go_on_and_service_comes_back_by_itself() {
    let _alone = alone();
    let settings = [("SSE_READ_TIMEOUT", "600")];
    let started = Instant::now();
    let Some((server, _copy)) = start_as_nobody(&settings) else {
        return;
    };
    for left in [0, 1, 4] {
        let row = format!("{left} threads left");
        let take_room = |left| {
            let threads = server.status("Threads") as usize;
            limit(&server, "nproc", threads + left);
        };
        starve(&row, &server, started, take_room, left);
        limit(&server, "nproc", 1000);
    }
    assert!(server.log().contains("too many connections"));
}

// --------------------------------------------------------------------------- kills and restarts

/// A port to listen on now, and again after a restart. Below the range from which the system
/// takes the ports of outgoing connections: one of those could otherwise sit on it meanwhile.
fn free_port() -> u16 {
    let mut dice = Dice::seeded(u64::from(id()) << 32 | u64::from(now()));
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(|| 20_000 + dice.below(12_000) as u16)
        .find(free)
        .unwrap()
}

/// The kernel ends the connections of a killed server in its name, and remembers them for a
/// minute: the next one must be able to listen all the same.
#[test]
fn a_killed_server_can_be_restarted_on_its_port_at_once() {
    let address = format!("127.0.0.1:{}", free_port());
    let settings = [("SSE_LISTEN", &*address)];
    let mut server = TestServer::start(&settings);
    for round in 0..5 {
        let topic = format!("round {round}");
        let mut streams: Vec<_> = (0..50).map(|_| server.subscribe(&[&topic])).collect();
        assert_eq!(server.publish(&[(&topic, "", "last words")]).ok(), 50);
        // Some in the middle of a request, and some that the server closed: every state there is.
        let half: Vec<_> = (0..5).map(|_| connect(server.addr)).collect();
        assert_eq!(server.get("/nothing").status, 404);
        let refused: Vec<_> = (0..5)
            .map(|_| {
                let mut connection = server.connect();
                connection.send(request("GET", "/nothing", "", b""));
                assert_eq!(connection.answer().status, 404);
                connection
            })
            .collect();
        server.signal("KILL");
        assert_eq!(server.wait_for_end().code(), None, "it was killed");
        let killed = Instant::now();
        server = TestServer::start(&settings);
        let again = server.subscribe(&[&topic]);
        println!("  streaming again {:.1?} after the kill", killed.elapsed());
        for stream in &mut streams {
            // What was in their sockets they still get, whole, and then know that it is over.
            stream.expect_event("message", "last words");
            stream.expect_end();
        }
        drop((again, half, refused));
    }
}

/// The worst moment for a restart: some queues are full, some clients read nothing, one has
/// vanished behind a full socket. Whoever reads gets all there is, and is told when to return.
#[test]
fn a_signal_amid_full_queues_and_stalled_subscribers_drains_whoever_reads() {
    const QUEUE: usize = 40;
    let settings = [
        ("SSE_QUEUE", "40"),
        ("SSE_WRITE_TIMEOUT", "600"),
        ("SSE_RETRY", "700"),
        METRICS,
    ];
    let mut server = TestServer::start(&settings);
    let mut idle = server.subscribe(&["nothing"]);
    let mut late: Vec<_> = (0..5).map(|_| server.subscribe(&["big"])).collect();
    let target = format!("/events?token={}", server.token(&["big"]));
    let stalled: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = connect(server.addr);
            send(&mut stream, &request("GET", &target, "", b""));
            stream
        })
        .collect();
    server.wait_for_metric("sse_subscribers", 11);
    // A line end costs its token one byte, and each frame seven.
    let data = "\n".repeat(9000);
    let mut publisher = server.connect();
    let mut queued = 0;
    let full = wait_until(2 * DEADLINE, || {
        let body = server.submission(&[("big", "", &data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        let deliveries = Submitted::from(publisher.answer()).ok();
        assert_eq!(deliveries, 10, "one was cut before its time");
        queued += 1;
        server.metric("sse_queue_high_water") == QUEUE as u64
    });
    assert!(full, "{queued} events, and no queue is full");

    let begun = Instant::now();
    server.signal("TERM");
    let readers: Vec<_> = late
        .drain(..)
        .map(|mut stream| {
            in_background(move || {
                let messages = stream.rest();
                (messages.len(), stream.retry)
            })
        })
        .collect();
    idle.expect_end();
    assert!((700..=1400).contains(&idle.retry.unwrap()));
    for reader in readers {
        let (received, retry) = reader.join().unwrap();
        assert_eq!(received, queued, "every event, also of the full queue");
        assert!((700..=1400).contains(&retry.expect("a farewell")));
    }
    let drained = begun.elapsed();
    assert_eq!(server.wait_for_end().code(), Some(0));
    println!(
        "  {queued} events; readers drained after {drained:.1?}, the end after {:.1?}",
        begun.elapsed()
    );
    drop(stalled);
}

/// Neither waits a server that cannot accept until it can, nor forgets its streams.
#[test]
fn a_server_without_descriptors_still_ends_on_its_signal() {
    let mut server = TestServer::start(&[]);
    let mut stream = server.subscribe(&["news"]);
    let before = stream.item();
    assert!(matches!(before, Some(Item::Retry(_))), "{before:?}");
    leave_descriptors(&server, 1);
    let knocking = knock(server.addr, 3);
    server.wait_for_log("cannot accept connections");
    server.signal("TERM");
    stream.retry = None;
    stream.expect_end();
    assert!(stream.retry.is_some(), "no farewell");
    assert_eq!(server.wait_for_end().code(), Some(0));
    drop(knocking);
}
