//! The binary: environment to settings, commands, signals, the log to standard error. Uses the
//! library's public API only.

use std::io::{self, Read, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::{env, error::Error, net::TcpStream, panic, process, thread, time::Duration};

use signal_hook::{consts::SIGINT, consts::SIGTERM, iterator::Signals};
use sse_server::{Config, Key, Server};

const VERSION: &str = concat!("sse-server ", env!("CARGO_PKG_VERSION"));

/// Lines that may wait for whoever reads standard error; more are dropped. Nobody waits for that
/// reader, nor ends because there is none.
const MAX_LINES: usize = 256;

/// How long an ending process waits for it.
const LAST_LINES: Duration = Duration::from_millis(200);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() {
    let args = env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let args: Vec<String> = args.skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Err(error) = Log::start() {
        _ = writeln!(io::stderr(), "{VERSION}: cannot start a thread: {error}");
        process::exit(1);
    }
    let outcome = run(&args).and_then(|text| Ok(writeln!(io::stdout(), "{}", text.trim_end())?));
    let status = match &outcome {
        Ok(()) => 0,
        // Where the system refused something, 1; where the operator has to correct something, 2.
        Err(error) if error.is::<io::Error>() => 1,
        Err(_) => 2,
    };
    if let Err(error) = outcome {
        log::error!("{}", error.to_string().trim_end());
    }
    log::logger().flush();
    process::exit(status);
}

fn run(args: &[&str]) -> Outcome<String> {
    match args {
        [] => serve(),
        ["ping"] => ping(),
        ["secret"] => Ok(Key::fresh_secret()?),
        ["token", topics @ ..] if !topics.is_empty() => Ok(key()?.mint_subscription(topics)?),
        ["event", topic, name] => Ok(key()?.mint_submission(topic, name, "")?),
        ["event", topic, name, "-"] => {
            let data = io::read_to_string(io::stdin())?;
            Ok(key()?.mint_submission(topic, name, &data)?)
        }
        ["event", topic, name, data] => Ok(key()?.mint_submission(topic, name, data)?),
        ["--help" | "-h"] => Ok(include_str!("usage.help").into()),
        ["--version" | "-V"] => Ok(VERSION.into()),
        _ => Err(include_str!("usage.help").into()),
    }
}

fn serve() -> Outcome<String> {
    // One line for a panic, where the default hook writes several.
    panic::set_hook(Box::new(|info| {
        log::error!("internal error: {}", info.to_string().replace('\n', " "));
    }));
    // As many descriptors as may be had: each stream is one.
    _ = rlimit::increase_nofile_limit(u64::MAX);
    // vars_os: one variable that is not UTF-8, whosever it is, must not end the server.
    let vars = env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into()))
    });
    let server = Server::bind(Config::from_vars(vars)?)?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let stopping = server.clone();
    thread::Builder::new().spawn(move || {
        let _first = signals.wait();
        stopping.shutdown();
        // Whoever asks twice does not want to wait for the subscribers.
        let _second = signals.wait();
        process::exit(1);
    })?;
    log::info!("{VERSION}: {}", server.describe()?);
    server.run()?;
    log::info!("stopped");
    log::logger().flush();
    process::exit(0);
}

/// The health check of an image that has neither shell nor curl.
fn ping() -> Outcome<String> {
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

fn key() -> Result<Key, String> {
    let secret = env::var("SSE_SECRET").unwrap_or_default();
    Ok(Config::new(&secret)?.key)
}

/// What is logged, on its way to the thread that writes it.
enum Line {
    Text(String),
    /// All before it is written: say so.
    Flush(SyncSender<()>),
}

struct Log(SyncSender<Line>);

impl Log {
    fn start() -> io::Result<()> {
        let (sender, lines) = sync_channel(MAX_LINES);
        let write = move || {
            for line in lines {
                _ = match line {
                    Line::Text(text) => io::stderr().write_all(text.as_bytes()).ok(),
                    Line::Flush(written) => written.send(()).ok(),
                };
            }
        };
        thread::Builder::new().spawn(write)?;
        log::set_max_level(log::LevelFilter::Info);
        log::set_boxed_logger(Box::new(Self(sender))).map_err(io::Error::other)
    }
}

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        _ = self.0.try_send(Line::Text(format!("{}\n", record.args())));
    }

    fn flush(&self) {
        let (written, wait) = sync_channel(1);
        _ = self.0.try_send(Line::Flush(written));
        _ = wait.recv_timeout(LAST_LINES);
    }
}
