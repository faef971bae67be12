//! The binary: environment to settings, commands, signals, the log to standard error. Uses the
//! library's public API only.

use std::io::{self, ErrorKind::InvalidInput, Read, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::{env, error::Error, net::TcpStream, panic, process, thread, time::Duration};

use signal_hook::{consts::SIGHUP, consts::SIGINT, consts::SIGTERM, iterator::Signals};
use sse_server::{Config, Key, Server};

const VERSION: &str = concat!("sse-server ", env!("CARGO_PKG_VERSION"));

const USAGE: &str = include_str!("usage.help");

/// Lines that may wait for whoever reads standard error; more are dropped. Nobody waits for that
/// reader, nor ends because there is none.
const MAX_LINES: usize = 256;

/// How long an ending process waits for it.
const LAST_LINES: Duration = Duration::from_millis(200);

type Outcome = Result<String, Box<dyn Error>>;

fn main() {
    let args = env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let args: Vec<String> = args.skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = run(&args).and_then(|text| Ok(writeln!(io::stdout(), "{}", text.trim_end())?));
    // Where the system refused something, 1; where somebody has to correct something, 2.
    let by_system = |error: &io::Error| error.kind() != InvalidInput;
    let status = match &outcome {
        Ok(()) => 0,
        Err(error) if error.downcast_ref().is_some_and(by_system) => 1,
        Err(_) => 2,
    };
    log::logger().flush();
    if let Err(error) = outcome {
        _ = writeln!(io::stderr(), "{}", error.to_string().trim_end());
    }
    process::exit(status);
}

fn run(args: &[&str]) -> Outcome {
    match args {
        _ if args == ["help"] || args.contains(&"--help") || args == ["-h"] => Ok(USAGE.into()),
        ["--version" | "-V"] => Ok(VERSION.into()),
        [] => serve(),
        ["ping"] => ping(),
        ["secret"] => Ok(Key::fresh_secret()?),
        ["token", _, ..] => Ok(config()?.key.mint_subscription(&args[1..])?),
        ["event", topic, name] => run(&["event", topic, name, ""]),
        ["event", topic, name, data] => {
            let data = read(data)?;
            Ok(config()?.key.mint_submission(topic, name, &data)?)
        }
        ["open", token] => Ok(config()?.explain(&read(token)?)),
        [command, ..] => {
            let known = USAGE.contains(&format!("sse-server {command} "));
            let problem = ["no such command", "too few arguments, or too many"][usize::from(known)];
            Err(format!("{command}: {problem}\n{USAGE}").into())
        }
    }
}

/// An argument, or what comes on standard input.
fn read(arg: &str) -> io::Result<String> {
    if arg != "-" {
        return Ok(arg.into());
    }
    io::read_to_string(io::stdin())
}

fn serve() -> Outcome {
    Log::start()?;
    // One line for a panic, where the default hook writes several.
    panic::set_hook(Box::new(|info| {
        log::error!("internal error: {}", info.to_string().replace('\n', " "));
    }));
    // As many descriptors as may be had: each stream is one.
    _ = rlimit::increase_nofile_limit(u64::MAX);
    let level = env::var("SSE_LOG").unwrap_or("info".into());
    let wrong = |_| format!("SSE_LOG is {level:?}: it has to be off, error, warn, info or debug");
    log::set_max_level(level.parse().map_err(wrong)?);
    let server = Server::bind(config()?)?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let stopping = server.clone();
    thread::Builder::new().spawn(move || {
        _ = signals.forever().next();
        stopping.shutdown();
        // Whoever asks twice does not want to wait for the subscribers.
        _ = signals.forever().next();
        process::exit(1);
    })?;
    log::info!("{VERSION}: {}", server.describe()?);
    server.run()?;
    log::info!("stopped");
    log::logger().flush();
    process::exit(0);
}

/// The health check of an image that has neither shell nor curl.
fn ping() -> Outcome {
    let address = env::var("SSE_LISTEN").unwrap_or("127.0.0.1:8000".into());
    let (mut stream, mut answer) = (TcpStream::connect(&address)?, [0; 12]);
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /ping HTTP/1.0\r\n\r\n")?;
    stream.read_exact(&mut answer)?;
    if !answer.ends_with(b" 200") {
        return Err(io::Error::other(address + " is not healthy").into());
    }
    Ok(address + " answers")
}

fn config() -> io::Result<Config> {
    // vars_os: one variable that is not UTF-8, whosever it is, must not end the server.
    let vars = env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into()))
    });
    Config::from_vars(vars.filter(|(name, _)| name != "SSE_LOG"))
}

/// Where lines wait for the thread that writes them, each with what it lets go of once it has.
struct Log(SyncSender<(String, Option<SyncSender<()>>)>);

impl Log {
    fn start() -> io::Result<()> {
        let (sender, lines) = sync_channel(MAX_LINES);
        thread::Builder::new().spawn(move || {
            for (line, _written) in lines {
                _ = io::stderr().write_all(String::as_bytes(&line));
            }
        })?;
        log::set_boxed_logger(Box::new(Self(sender))).map_err(io::Error::other)
    }
}

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        _ = self.0.try_send((format!("{}\n", record.args()), None));
    }

    /// Waits until all before it is written, or for [`LAST_LINES`].
    fn flush(&self) {
        let (written, wait) = sync_channel(0);
        _ = self.0.try_send((String::new(), Some(written)));
        _ = wait.recv_timeout(LAST_LINES);
    }
}
