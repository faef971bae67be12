//! A whole tool around the push server: it runs jobs, and every browser that has its page open sees
//! how far they are. `cargo run --example job_runner [ADDRESS]`; Ctrl-C or SIGTERM end it.
//!
//! To copy it, put this file, page.html, ../client/live.js and ../demo/static/style.css into one folder,
//! and change the three paths below. It needs `serde_json` and `signal-hook`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::{collections::BTreeMap, env, error::Error, process};
use std::{sync::Arc, sync::Mutex, thread, time::Duration};

use signal_hook::{consts::SIGINT, consts::SIGTERM, iterator::Signals};
use sse_server::{Config, Event, Key, Server};

const JOBS: [&str; 3] = ["Database backup", "Newsletter", "Pictures"];
const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("../client/live.js");
const STYLE: &str = include_str!("../demo/static/style.css");

struct Tool {
    push: Arc<Server>,
    key: Key,
    /// Held while the jobs run.
    running: Mutex<()>,
    /// How many changes there were, and how far each job is, in percent.
    state: Mutex<(u64, BTreeMap<&'static str, u64>)>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let address = env::args().nth(1).unwrap_or("127.0.0.1:8080".into());
    let pages = TcpListener::bind(address)?;
    // A secret that nobody else needs to know: this process mints the tokens and opens them.
    let mut config = Config::new(&Key::fresh_secret()?)?;
    config.listen = (pages.local_addr()?.ip(), 0).into(); // the system chooses the port
    let tool = &Tool {
        key: config.key.clone(),
        push: Server::bind(config)?,
        running: Mutex::default(),
        state: Mutex::new((0, JOBS.map(|name| (name, 0)).into())),
    };
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    println!("Open http://{}/", pages.local_addr()?);
    thread::scope(|scope| {
        scope.spawn(move || {
            _ = signals.forever().next();
            tool.push.shutdown();
        });
        scope.spawn(|| match tool.push.run() {
            // Every stream has been told.
            Ok(()) => process::exit(0),
            Err(error) => {
                eprintln!("cannot serve events: {error}");
                process::exit(1);
            }
        });
        // A thread for each: browsers also open connections on which they send nothing yet.
        for stream in pages.incoming().flatten() {
            scope.spawn(move || tool.answer(&stream));
        }
    });
    Ok(())
}

impl Tool {
    fn run_jobs(&self) {
        thread::scope(|scope| {
            for (name, pace) in JOBS.into_iter().zip([20, 30, 50]) {
                scope.spawn(move || {
                    for percent in 0..=100 {
                        thread::sleep(Duration::from_millis(pace)); // yours do something instead
                        self.report(name, percent);
                    }
                });
            }
        });
    }

    /// Publishes under the lock, so that the events come in the order of the changes. Each holds
    /// the whole state, small as it is: a page that has the latest one has all.
    fn report(&self, name: &'static str, percent: u64) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        state.1.insert(name, percent);
        let json = serde_json::json!(*state).to_string();
        let event = Event::new("jobs", "progress", &json).expect("a valid topic");
        let _refused_only_after_shutdown = self.push.publish(&[event]);
    }

    fn answer(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // The whole head: closing a connection with something unread can cost the answer.
        let (mut head, mut reader) = (String::new(), BufReader::new(stream.take(16 * 1024)));
        while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
        let reply = |head: &str, body: &str| {
            let fields = "Cache-Control: no-store\r\nConnection: close\r\nContent-Length:";
            let answer = format!("HTTP/1.1 {head}\r\n{fields} {}\r\n\r\n{body}", body.len());
            (&*stream).write_all(answer.as_bytes())
        };
        match head.split(' ').take(2).collect::<Vec<_>>()[..] {
            ["GET", "/"] => reply("200 OK\r\nContent-Type: text/html", PAGE),
            ["GET", "/live.js"] => reply("200 OK\r\nContent-Type: text/javascript", SCRIPT),
            ["GET", "/style.css"] => reply("200 OK\r\nContent-Type: text/css", STYLE),
            ["GET", "/state"] => {
                let json = serde_json::json!(*self.state.lock().unwrap()).to_string();
                reply("200 OK\r\nContent-Type: application/json", &json)
            }
            // Check here who asks. The page comes back for every stream: no token gets too old.
            ["GET", "/events"] => {
                let (push, token) = (&self.push, self.key.mint_subscription(["jobs"]));
                let token = token.expect("a valid topic");
                let (host, port) = (host(&head), push.local_addr()?.port());
                let url = format!("http://{host}:{port}/events?token={token}");
                reply(&format!("307 Temporary Redirect\r\nLocation: {url}"), "")
            }
            // PUT, which the pages of other sites cannot make a browser send.
            ["PUT", "/start"] => match self.running.try_lock() {
                Ok(_running) => reply("202 Accepted", "").map(|()| self.run_jobs()),
                Err(_) => reply("409 Conflict", ""),
            },
            _ => reply("404 Not Found", ""),
        }
    }
}

/// The name by which the browser reaches this machine, which is not always an address it listens on.
fn host(head: &str) -> &str {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let named = fields.find(|(name, _)| name.eq_ignore_ascii_case("host"));
    let host = named.map_or("127.0.0.1", |(_, value)| value.trim());
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => name,
        _ => host,
    }
}
