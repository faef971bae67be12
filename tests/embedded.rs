//! The example of embedding, as its users run it: a process, its page, and the stream behind it.

mod support;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::{collections::BTreeMap, io::BufRead, io::BufReader, path::PathBuf};

use serde_json::Value;
use support::*;

/// The example in a process of its own, on ports the system chose. Killed when dropped.
struct Tool {
    child: Child,
    addr: SocketAddr,
}

/// Builds it, which takes a moment where `cargo test` has done so. A test run on its own would
/// else judge an old build.
fn program() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--example", "job_runner", "--message-format=json"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let built = cargo.stderr(Stdio::inherit()).output().unwrap();
    assert!(built.status.success());
    let messages = String::from_utf8(built.stdout).unwrap();
    let messages = messages
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let mut programs = messages.filter_map(|message: Value| {
        let path = message["executable"].as_str().map(PathBuf::from);
        path.filter(|_| message["target"]["name"] == "job_runner")
    });
    programs.next().expect("an example called job_runner")
}

impl Tool {
    #[track_caller]
    fn start() -> Self {
        let mut command = Command::new(program());
        command.arg("127.0.0.1:0").stdout(Stdio::piped());
        let mut child = command.spawn().expect("the example starts");
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("Open http://");
        let address = address.and_then(|it| it.strip_suffix('/'));
        let addr = address.expect(&line).parse().expect(&line);
        Self { child, addr }
    }

    #[track_caller]
    fn request(&self, method: &str, target: &str) -> Answer {
        let mut connection = Connection::open(self.addr);
        connection.send(request(method, target, "", b""));
        connection.answer()
    }

    /// Goes where a browser's `EventSource` is sent.
    #[track_caller]
    fn follow(&self) -> Subscriber {
        let answer = self.request("GET", "/events");
        assert_eq!(answer.status, 307);
        assert_eq!(answer.header("Cache-Control"), Some("no-store"));
        let location = answer.header("Location").expect("a Location");
        let (authority, path) = location
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .expect(location);
        // The name that was asked for, which need not be the address that it listens on.
        let push = authority.replace("test:", "127.0.0.1:");
        assert_ne!(push, authority);
        let push: SocketAddr = push.parse().expect(location);
        assert_ne!(push, self.addr);
        subscribe(push, &format!("/{path}"))
    }

    /// Changes so far, and percents by job.
    #[track_caller]
    fn state(&self) -> (u64, BTreeMap<String, u64>) {
        parsed(&self.request("GET", "/state").text())
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn parsed(state: &str) -> (u64, BTreeMap<String, u64>) {
    serde_json::from_str(state).expect(state)
}

/// What is copied has to work: the page opens, and the stream it is sent to tells all there is.
#[test]
fn the_example_shows_its_jobs_from_start_to_end() {
    let tool = Tool::start();
    let page = tool.request("GET", "/");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("Content-Type"), Some("text/html"));
    assert!(page.text().contains("live(\"events\""));
    let script = tool.request("GET", "/live.js");
    assert_eq!(script.header("Content-Type"), Some("text/javascript"));
    assert!(script.text().contains("export function live("));

    let mut subs = [tool.follow(), tool.follow()];
    let (mut changes, mut percents) = tool.state();
    assert_eq!(changes, 0);
    assert_eq!(percents.len(), 3);
    assert!(
        percents.values().all(|percent| *percent == 0),
        "{percents:?}"
    );
    // Two people press the button.
    let mut both = [0, 1].map(|_| Connection::open(tool.addr));
    for connection in &mut both {
        connection.send(request("PUT", "/start", "", b""));
    }
    let mut statuses = both.map(|mut connection| connection.answer().status);
    statuses.sort();
    assert_eq!(statuses, [202, 409]);
    let jobs: Vec<_> = percents.keys().cloned().collect();
    let mut seen = vec![Vec::new(); jobs.len()];
    while changes < 303 {
        let messages = subs.each_mut().map(Subscriber::message);
        assert_eq!(messages[0], messages[1]);
        assert_eq!(messages[0].name, "progress");
        let (number, now) = parsed(&messages[0].data);
        assert_eq!(number, changes + 1, "every change, once and in order");
        // The first report of a job changes nothing: it is at 0 already.
        let changed: Vec<_> = jobs
            .iter()
            .filter(|job| now[*job] != percents[*job])
            .collect();
        assert!(changed.len() <= 1, "{percents:?} became {now:?}");
        for job in changed {
            let index = jobs.iter().position(|other| other == job).unwrap();
            seen[index].push(now[job]);
        }
        (changes, percents) = (number, now);
    }
    let all: Vec<u64> = (1..=100).collect();
    assert!(seen.iter().all(|percents| *percents == all), "{seen:?}");
    // Who comes now, finds the end.
    assert_eq!(tool.state(), (changes, percents));
    let again = wait_until(DEADLINE, || tool.request("PUT", "/start").status == 202);
    assert!(again, "the jobs cannot be started again");
    let (number, now) = parsed(&subs[0].message().data);
    assert_eq!((number, now.values().min()), (304, Some(&0)));
}

/// A tool is restarted like any other service: those who listen are told, and come back.
#[test]
fn the_example_says_farewell_when_it_is_ended() {
    for signal in ["INT", "TERM"] {
        let mut tool = Tool::start();
        let mut sub = tool.follow();
        kill(tool.child.id(), signal);
        sub.expect_end();
        assert!(sub.connection.whole, "a break is no farewell");
        assert_eq!(tool.child.wait().unwrap().code(), Some(0));
    }
}

/// Whoever finds the push server by its port still needs a token, and finds nothing else.
#[test]
fn the_example_shows_nothing_without_its_token() {
    let tool = Tool::start();
    let sub = tool.follow();
    let push = sub.connection.socket().peer_addr().unwrap();
    let ask = |target: &str| {
        let mut connection = Connection::open(push);
        connection.send(request("GET", target, "", b""));
        connection.answer().status
    };
    let foreign = mint(SECRET, &topics_payload(&["jobs"]), now());
    assert_eq!(ask("/events"), 401);
    assert_eq!(ask(&format!("/events?token={foreign}")), 401);
    assert_eq!(tool.request("GET", "/other").status, 404);
    // A page of another site could make a browser send this one.
    assert_eq!(tool.request("POST", "/start").status, 404);
    assert_eq!(tool.state().0, 0);
}
