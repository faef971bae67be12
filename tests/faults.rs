//! What the network, the machine or its operator can do to the server: peers that vanish, no more
//! descriptors, no more threads, a log that nobody reads, a kill. As in the tests of what a stranger
//! can do, a witness lives through what the server is to live through.

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::fs::OpenOptions;
use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, ChildStdout, Command, Stdio, id};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use attack::*;
use support::*;

/// Of Linux, on the machines that tests run on.
const O_NONBLOCK: i32 = 0o4000;

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
    let reasons = ["write_timeout", "left"].map(|reason| {
        let sample = format!("sse_streams_ended_total{{reason=\"{reason}\"}}");
        server.metric(&sample)
    });
    println!("  cut for the write timeout or as left: {reasons:?}");
    assert_eq!(reasons.iter().sum::<u64>(), 2, "and not for another reason");
    unplugged.expect_clients_alive();
    silent.expect_clients_alive();
    assert_eq!(server.publish(&[("far", "", "after")]).ok(), 1);
    near.expect_event("message", "after");
    drop(near);
    server.wait_for_metric("sse_subscribers", 1);
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

/// Streams, and a publisher with a connection of its own, that were there before.
struct Regulars {
    streams: Vec<Subscriber>,
    publisher: Connection,
    published: usize,
}

impl Regulars {
    #[track_caller]
    fn of(server: &TestServer) -> Self {
        let mut regulars = Self {
            streams: (0..5).map(|_| server.subscribe(&["regular"])).collect(),
            publisher: server.connect(),
            published: 0,
        };
        regulars.expect_service(server);
        regulars
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

/// A server with no room for the next connection closes one that says nothing for it: whoever has a
/// request is answered, those who publish and stream notice nothing, and once there is room again
/// nothing is left behind.
#[track_caller]
fn starve(row: &str, server: &TestServer, take_room: impl Fn(usize), left: usize) {
    let started = Instant::now();
    let witness = Witness::start(server);
    let mut regulars = Regulars::of(server);
    let before = Vitals::of(server);
    let crowd: Vec<_> = (0..20).map(|_| connect(server.addr)).collect();
    assert!(wait_until(DEADLINE, || {
        server.descriptors() >= before.descriptors + 20
    }));
    take_room(left);
    // Whoever is to make room takes its time then, and is not the reason to close another one.
    let busy = BusyMachine::start();
    let newcomers = Newcomers::start(server, 1);
    // More than there is room for, whatever threads wait for a connection: they close each other.
    let more: Vec<_> = (0..100).map(|_| connect(server.addr)).collect();
    let knocking = knock(server.addr, 20);
    for mut stream in knocking {
        assert_eq!(fate(&mut stream), Fate::Closed(vec![200]), "{row}");
    }
    let begun = Instant::now();
    // Long enough for a line a second to be told from a line each time.
    while begun.elapsed() < Duration::from_secs(3) {
        regulars.expect_service(server);
        witness.expect_more();
        thread::sleep(Duration::from_millis(20));
    }
    newcomers.expect_more();
    newcomers.finish();
    drop((busy, crowd, more));
    for mut stream in knock(server.addr, 20) {
        assert_eq!(fate(&mut stream), Fate::Closed(vec![200]), "{row}");
    }
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

#[test]
fn out_of_descriptors_streams_go_on_and_service_comes_back_by_itself() {
    let _alone = alone();
    for left in 0..4 {
        // A new one each time: nothing of an earlier round is still about to end.
        let server = TestServer::start(&[("SSE_READ_TIMEOUT", "600")]);
        let row = format!("{left} descriptors left");
        starve(&row, &server, |left| leave_descriptors(&server, left), left);
        let log = server.log();
        assert!(log.contains("cannot accept connections"), "{log}");
        assert!(log.contains("to make room for another"), "{log}");
        assert!(!log.contains("internal error"), "{log}");
    }
}

/// There is nobody to be closed but who comes just now: streams never make room.
#[test]
fn out_of_descriptors_no_stream_makes_room() {
    let _alone = alone();
    let server = TestServer::start(&[]);
    let mut streams: Vec<_> = (0..20).map(|_| server.subscribe(&["stays"])).collect();
    leave_descriptors(&server, 1);
    let mut knocking = Vec::new();
    for _ in 0..10 {
        knocking.extend((0..10).map(|_| connect(server.addr)));
        server.wait_for_log("cannot accept connections");
        thread::sleep(Duration::from_millis(50));
    }
    drop(knocking);
    // Whoever is in the kernel's queue then has left, and goes first.
    let served = || {
        let mut connection = server.connect();
        let body = server.submission(&[("stays", "", "all")]);
        let length = format!("Content-Length: {}\r\n", body.len());
        connection.send(request("POST", "/submit", &length, body.as_bytes()));
        let head = connection.try_head();
        head.is_some_and(|head| head.status == 200)
    };
    assert!(wait_until(DEADLINE, served), "no service");
    for stream in &mut streams {
        stream.expect_event("message", "all");
    }
}

/// The binary for an ordinary user, whom the system limits. (It does not limit root.) Opened before
/// that user comes into being: the folders above it may be closed to others. Nothing where this
/// process may not become one. `limits`: what it is started by, as `prlimit --nproc=4:4`.
fn as_nobody(limits: &str) -> Option<[String; 3]> {
    if !am_root() {
        missing("a limit of threads needs root, who alone can become a user without others");
        return None;
    }
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // A user with no other process on this machine: the limit counts them all.
    let user = 100_000 + (id() * 64 + COUNT.fetch_add(1, SeqCst)) % 1_000_000_000;
    let [uid, gid] = ["reuid", "regid"].map(|kind| format!("--{kind}={user}"));
    let become_user = format!("setpriv {uid} {gid} --clear-groups {limits}");
    let line = format!("exec {become_user} sh -c 'exec /proc/self/fd/3' 3<\"$0\"");
    Some(["sh".into(), "-c".into(), line])
}

#[test]
fn out_of_threads_streams_go_on_and_service_comes_back_by_itself() {
    let _alone = alone();
    for left in [0, 1, 4] {
        let Some(wrapper) = as_nobody("") else {
            return;
        };
        let wrapper = wrapper.each_ref().map(String::as_str);
        let server = TestServer::start_under(&wrapper, &[("SSE_READ_TIMEOUT", "600")]);
        let row = format!("{left} threads left");
        let take_room = |left| {
            let threads = server.status("Threads") as usize;
            limit(&server, "nproc", threads + left);
        };
        starve(&row, &server, take_room, left);
        let log = server.log();
        assert!(log.contains("to make room for another"), "{log}");
        assert!(!log.contains("internal error"), "{log}");
    }
}

// ------------------------------------------------------------------------- half-failed starts

/// What became of a start.
#[derive(Debug)]
enum Start {
    /// It ended by itself, with this status and these words.
    Ended(Option<i32>, String),
    Serves,
}

/// Starts the binary and waits until it has ended, or serves all there is to be served; it may do
/// neither for ever, and nothing by halves.
#[track_caller]
fn start(wrapper: &[&str], settings: &[(&str, &str)]) -> Start {
    let port = free_port();
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    let mut command = binary_under(wrapper, settings);
    command.env("SSE_LISTEN", addr.to_string());
    let pipes = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Started(pipes.spawn().expect("the binary starts"));
    let mut errors = child.0.stderr.take().unwrap();
    let errors = in_background(move || {
        let mut text = String::new();
        let _ = errors.read_to_string(&mut text);
        text
    });
    let mut ended = None;
    let decided = wait_until(DEADLINE, || {
        ended = child.0.try_wait().unwrap();
        // Closed, or not answered, where the server ends just now.
        ended.is_some() || answers(addr)
    });
    assert!(decided, "neither serves nor ends: {wrapper:?}");
    if let Some(status) = ended {
        return Start::Ended(status.code(), errors.join().unwrap());
    }
    expect_all_served(addr);
    kill(child.0.id(), "TERM");
    assert!(wait_until(DEADLINE, || child
        .0
        .try_wait()
        .unwrap()
        .is_some()));
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    Start::Serves
}

/// Killed when dropped.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a ping is answered within a second.
fn answers(addr: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(addr) else {
        return false;
    };
    let second = Some(Duration::from_secs(1));
    stream.set_read_timeout(second).unwrap();
    let ping = request("GET", "/ping", "Connection: close\r\n", b"");
    send(&mut stream, &ping) && stream.read_exact(&mut [0; 12]).is_ok()
}

/// Streams, publishers with connections of their own and with new ones, pings: side by side.
#[track_caller]
fn expect_all_served(addr: SocketAddr) {
    let token = mint(SECRET, &topics_payload(&["start"]), now());
    let target = format!("/events?token={token}");
    let mut streams: Vec<_> = (0..3).map(|_| subscribe(addr, &target)).collect();
    for round in 0..5 {
        let data = round.to_string();
        let body = mint(SECRET, &events_payload(&[("start", "", &data)]), now());
        let length = format!("Content-Length: {}\r\n", body.len());
        let mut publisher = Connection::open(addr);
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        assert_eq!(Submitted::from(publisher.answer()).ok(), 3);
        for stream in &mut streams {
            stream.expect_event("message", &data);
        }
        assert!(wait_until(DEADLINE, || answers(addr)));
    }
}

/// A server without a descriptor for its second address went on without it, and one without any
/// waited for writers that nobody told to end. Whatever is missing: it says so, and ends.
#[test]
fn with_too_few_descriptors_the_start_fails_at_once_and_says_why() {
    for count in 6..=13 {
        let limit = format!("--nofile={count}:{count}");
        for settings in [&[][..], &[METRICS]] {
            match start(&["prlimit", &limit], settings) {
                Start::Ended(Some(1), words) => {
                    assert!(words.contains("ulimit -n"), "{count}: {words}");
                }
                other => panic!("{count} descriptors: {other:?}"),
            }
        }
    }
}

/// The same of threads, for each number of them from none on until all can be served.
#[test]
fn with_too_few_threads_the_start_fails_at_once_and_says_why() {
    const ENOUGH: usize = 40;
    for settings in [&[][..], &[METRICS]] {
        let mut failed = 0;
        let served = (1..ENOUGH).find(|count| {
            // The process itself is one.
            let limit = format!("prlimit --nproc={count}:{count}");
            let Some(wrapper) = as_nobody(&limit) else {
                return true;
            };
            match start(&wrapper.each_ref().map(String::as_str), settings) {
                Start::Serves => true,
                Start::Ended(status, words) => {
                    assert_eq!(status, Some(1), "{count} threads: {words}");
                    assert!(!words.trim().is_empty(), "{count} threads, and no word");
                    failed += 1;
                    false
                }
            }
        });
        println!("  {failed} numbers of threads are too few, {served:?} are enough");
        assert!(served.is_some(), "not even {ENOUGH} threads are enough");
    }
}

// ------------------------------------------------------------------------------ standard error

/// A server whose standard error is this, through all that it has to say: it serves, refuses, cuts
/// a stalled subscriber, closes a connection to make room, and ends on its signal.
#[track_caller]
fn expect_service_whoever_reads(wrapper: &[&str], errors: Stdio) {
    let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let settings = [("SSE_QUEUE", "4"), ("SSE_WRITE_TIMEOUT", "600")];
    let mut command = binary_under(wrapper, &settings);
    command.env("SSE_LISTEN", addr.to_string());
    // Means nothing here, so it is warned about before there is anybody to serve.
    command.env("SSE_NOTHING", "1");
    command.stdout(Stdio::null()).stderr(errors);
    let mut child = Started(command.spawn().expect("the binary starts"));
    // The descriptor that it was given is the child's alone now.
    drop(command);
    assert!(wait_until(DEADLINE, || answers(addr)), "it does not serve");
    let submit = |topic: &str, data: &str| {
        let body = mint(SECRET, &events_payload(&[(topic, "", data)]), now());
        let length = format!("Content-Length: {}\r\n", body.len());
        let mut publisher = Connection::open(addr);
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        Submitted::from(publisher.answer()).ok()
    };
    let target = |topic| {
        let token = mint(SECRET, &topics_payload(&[topic]), now());
        format!("/events?token={token}")
    };
    let mut stream = subscribe(addr, &target("news"));
    for round in 0..3 {
        let mut stalled = connect_narrow(addr);
        send(&mut stalled, &request("GET", &target("big"), "", b""));
        // A line end costs its token one byte, and each frame seven.
        let data = "\n".repeat(6000);
        assert!(
            wait_until(DEADLINE, || submit("big", &data) == 1),
            "no stream"
        );
        assert!(
            wait_until(DEADLINE, || submit("big", &data) == 0),
            "not cut"
        );
        let close = "Connection: close\r\n";
        for refused in [
            request("GET", "/nowhere", close, b""),
            request("GET", "/events?token=abc", close, b""),
            b"nonsense\r\n".to_vec(),
        ] {
            let mut stranger = connect(addr);
            send(&mut stranger, &refused);
            let Fate::Closed(statuses) = fate(&mut stranger) else {
                panic!("a stream without a token");
            };
            assert_eq!(statuses.len(), 1, "{statuses:?}");
        }
        let data = round.to_string();
        assert_eq!(submit("news", &data), 1);
        stream.expect_event("message", &data);
        // One line a second for each thing.
        thread::sleep(Duration::from_millis(1100));
    }
    kill(child.0.id(), "TERM");
    stream.expect_end();
    let ended = wait_until(DEADLINE, || child.0.try_wait().unwrap().is_some());
    assert!(ended, "it does not end");
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
}

/// A program that collects logs and hangs: two departures were enough to stop both writers for
/// ever. The pipe is full to the last byte before the server starts.
#[test]
fn nobody_needs_to_read_the_log() {
    let (unread, pipe) = io::pipe().unwrap();
    // The same pipe, through a door that does not wait.
    let mut door = OpenOptions::new();
    door.write(true).custom_flags(O_NONBLOCK);
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let mut filler = door.open(path).unwrap();
    for size in [4096, 1] {
        while filler.write(&vec![b'.'; size]).is_ok() {}
    }
    drop(filler);
    expect_service_whoever_reads(&[], pipe.into());
    drop(unread);
}

/// Its reader died.
#[test]
fn a_log_whose_reader_died_is_no_reason_to_end() {
    let (reader, pipe) = io::pipe().unwrap();
    drop(reader);
    expect_service_whoever_reads(&[], pipe.into());
}

/// There never was one: `2>&-`. What is opened next must not be taken for it, either.
#[test]
fn a_closed_standard_error_is_no_reason_to_end() {
    let wrapper = ["sh", "-c", "exec \"$0\" 2>&-"];
    expect_service_whoever_reads(&wrapper, Stdio::null());
    let wrapper = ["sh", "-c", "exec \"$0\" 0<&- 1>&- 2>&-"];
    expect_service_whoever_reads(&wrapper, Stdio::null());
}

/// A device that takes nothing: the disk that the log is on is full.
#[test]
fn a_full_disk_under_the_log_is_no_reason_to_end() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    expect_service_whoever_reads(&[], full.into());
}

// --------------------------------------------------------------------------- kills and restarts

/// A port to listen on now, and again after a restart. Below the range from which the system
/// takes the ports of outgoing connections: one of those could otherwise sit on it meanwhile.
/// Another one for each test of this program.
fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let given = GIVEN.fetch_add(1, SeqCst);
    let mut dice = Dice::seeded(u64::from(id()) << 32 | u64::from(given) << 16);
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

/// The worst moment for a restart: some queues are as good as full, some clients read nothing, one
/// has just been cut. Whoever reads gets all there is, and is told when to return.
#[test]
fn a_signal_amid_full_queues_and_stalled_subscribers_drains_whoever_reads() {
    const STALLED: u64 = 10;
    let settings = [
        ("SSE_QUEUE", "40"),
        ("SSE_WRITE_TIMEOUT", "600"),
        ("SSE_RETRY", "700"),
        METRICS,
    ];
    let mut server = TestServer::start(&settings);
    let mut idle = server.subscribe(&["nothing"]);
    let mut late: Vec<_> = (0..5).map(|_| server.subscribe(&["big"])).collect();
    // They take no more than their sockets hold, and so they are not cut first: these hold less.
    let target = format!("/events?token={}", server.token(&["big"]));
    let narrow: Vec<_> = (5..STALLED)
        .map(|_| {
            let mut stream = connect_narrow(server.addr);
            send(&mut stream, &request("GET", &target, "", b""));
            stream
        })
        .collect();
    server.wait_for_metric("sse_subscribers", STALLED + 1);
    // A line end costs its token one byte, and each frame seven.
    let data = "\n".repeat(9000);
    let mut publisher = server.connect();
    let mut submit = || {
        let body = server.submission(&[("big", "", &data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        publisher.send(request("POST", "/submit", &length, body.as_bytes()));
        Submitted::from(publisher.answer()).ok()
    };
    // As many as it takes for one of those to be cut: their queues are full then, and those of the
    // others hold what their sockets did not take.
    let mut queued = 0;
    let full = wait_until(2 * DEADLINE, || {
        queued += 1;
        submit() < STALLED
    });
    assert!(full, "{queued} events, and no queue is full");
    let cut = || server.metric("sse_streams_ended_total{reason=\"queue_full\"}");
    assert!(wait_until(DEADLINE, || cut() > 0), "a queue was full");
    let cut = cut();
    assert!(
        cut <= 5,
        "{cut} were cut, and all of the others read nothing"
    );

    let begun = Instant::now();
    server.signal("TERM");
    let readers: Vec<_> = late
        .drain(..)
        .map(|mut stream| {
            in_background(move || {
                let messages = stream.rest();
                (messages.len(), stream.retry, stream.connection.whole)
            })
        })
        .collect();
    idle.expect_end();
    assert!((700..=1400).contains(&idle.retry.unwrap()));
    for reader in readers {
        let (received, retry, whole) = reader.join().unwrap();
        assert_eq!(received, queued, "every event, also of the queue");
        assert!((700..=1400).contains(&retry.expect("a farewell")));
        assert!(whole, "no last chunk");
    }
    let drained = begun.elapsed();
    assert_eq!(server.wait_for_end().code(), Some(0));
    println!(
        "  {queued} events, {cut} cut; readers drained after {drained:.1?}, the end after {:.1?}",
        begun.elapsed()
    );
    drop(narrow);
}

/// A publisher with a connection of its own learns of the end by an answer or by its connection's
/// end, never by an acceptance that reaches nobody; and nobody is answered who comes later.
#[test]
fn requests_on_kept_connections_are_refused_while_the_server_ends_and_closed_after() {
    let mut server = TestServer::start(&[("SSE_WRITE_TIMEOUT", "600"), METRICS]);
    let submit = |on: &mut Connection, topic: &str, data: &str| {
        let body = server.submission(&[(topic, "", data)]);
        let length = format!("Content-Length: {}\r\n", body.len());
        on.send(request("POST", "/submit", &length, body.as_bytes()));
        on.answer()
    };
    let stall = |topic: &str| {
        let target = format!("/events?token={}", server.token(&[topic]));
        let mut stream = connect_narrow(server.addr);
        send(&mut stream, &request("GET", &target, "", b""));
        stream
    };
    // How much such a client's socket and queue hold together.
    let gauge = stall("gauge");
    server.wait_for_metric("sse_subscribers", 1);
    let big = "\n".repeat(9000);
    let mut publisher = server.connect();
    let mut publish = |topic| Submitted::from(submit(&mut publisher, topic, &big)).ok();
    let mut held = 0;
    assert!(wait_until(DEADLINE, || {
        held += 1;
        publish("gauge") == 0
    }));
    drop(gauge);
    // Takes no more than its socket holds: draining takes all the time there is for it.
    let stalled = stall("news");
    server.wait_for_metric("sse_subscribers", 1);
    for _ in 0..held - 30 {
        assert_eq!(publish("news"), 1);
    }
    let mut kept: Vec<_> = (0..40).map(|_| server.connect()).collect();
    for connection in &mut kept {
        Submitted::from(submit(connection, "nobody", "hears it")).ok();
    }
    let mut last = kept.split_off(30);
    server.signal("TERM");
    // Taken until the signal has come, then refused.
    let mut refused = 0;
    for connection in &mut kept {
        let answer = submit(connection, "nobody", "hears it");
        match answer.status {
            200 => assert_eq!(refused, 0, "accepted after the first refusal"),
            status => {
                assert_eq!(status, 503);
                assert!(answer.header("Retry-After").is_some());
                assert_eq!(answer.header("Connection"), Some("close"));
                connection.expect_closed();
                refused += 1;
            }
        }
        if refused == 3 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(refused, 3, "it still takes submissions");
    // Who wants a stream comes back by itself.
    let target = format!("/events?token={}", server.token(&["news"]));
    let mut browser = last.pop().unwrap();
    browser.send(request(
        "GET",
        &target,
        "Accept: text/event-stream\r\n",
        b"",
    ));
    browser.expect_closed();
    let mut other = last.pop().unwrap();
    other.send(request("GET", &target, "", b""));
    assert_eq!(other.answer().status, 503);
    other.expect_closed();
    let mut ping = last.pop().unwrap();
    ping.send(request("GET", "/ping", "", b""));
    assert_eq!(ping.answer().header("Connection"), Some("close"));
    assert!(TcpStream::connect(server.addr).is_err(), "it still accepts");
    assert!(!server.has_ended(), "it was to wait for the stalled one");
    assert_eq!(server.wait_for_end().code(), Some(0));
    for connection in &mut last {
        connection.expect_closed();
    }
    drop(stalled);
}

/// Neither waits a server that cannot accept until it can, nor forgets its streams.
#[test]
fn a_server_without_descriptors_still_ends_on_its_signal() {
    let mut server = TestServer::start(&[]);
    let mut stream = server.subscribe(&["news"]);
    let before = stream.item();
    assert!(matches!(before, Some(Item::Retry(_))), "{before:?}");
    leave_descriptors(&server, 0);
    // Nobody makes room for them.
    let knocking: Vec<_> = (0..3).map(|_| connect(server.addr)).collect();
    server.wait_for_log("cannot accept connections");
    server.signal("TERM");
    stream.retry = None;
    stream.expect_end();
    assert!(stream.retry.is_some(), "no farewell");
    assert_eq!(server.wait_for_end().code(), Some(0));
    drop(knocking);
}
