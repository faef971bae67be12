//! The binary: environment to settings, commands, signals. Uses the library's public API only.

use std::io::{self, Read, Write};
use std::{env, error::Error, net::TcpStream, panic, process, thread, time::Duration};

use signal_hook::{consts::SIGINT, consts::SIGTERM, iterator::Signals};
use sse_server::{Config, Key, Server};

const VERSION: &str = concat!("sse-server ", env!("CARGO_PKG_VERSION"));

fn main() {
    let args = env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let args: Vec<String> = args.skip(1).collect();
    match run(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(text) => println!("{}", text.trim_end()),
        Err(error) => {
            eprintln!("{}", error.to_string().trim_end());
            // 1 where the system refused something, 2 where the operator has to correct something.
            process::exit(if error.is::<io::Error>() { 1 } else { 2 });
        }
    }
}

fn run(args: &[&str]) -> Result<String, Box<dyn Error>> {
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

fn serve() -> Result<String, Box<dyn Error>> {
    // One line for a panic, where the default hook writes several.
    panic::set_hook(Box::new(|info| {
        let line = info.to_string().replace('\n', " ");
        let _unread = writeln!(io::stderr(), "internal error: {line}");
    }));
    // vars_os: one variable that is not UTF-8, whosever it is, must not end the server.
    let vars = env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into()))
    });
    let server = Server::bind(Config::from_vars(vars)?)?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    eprintln!("{VERSION}: {}", server.describe()?);
    let stopping = server.clone();
    thread::spawn(move || {
        let _first = signals.wait();
        stopping.shutdown();
        // Whoever asks twice does not want to wait for the subscribers.
        let _second = signals.wait();
        process::exit(1);
    });
    server.run();
    process::exit(0);
}

/// The health check of an image that has neither shell nor curl.
fn ping() -> Result<String, Box<dyn Error>> {
    let address = env::var("SSE_LISTEN").unwrap_or("127.0.0.1:8000".into());
    let (mut stream, mut answer) = (TcpStream::connect(&address)?, [0; 12]);
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /ping HTTP/1.0\r\n\r\n")?;
    stream.read_exact(&mut answer)?;
    let answers = answer.ends_with(b" 200").then_some(address + " answers");
    Ok(answers.ok_or(io::Error::other("not healthy"))?)
}

fn key() -> Result<Key, String> {
    let secret = env::var("SSE_SECRET").unwrap_or_default();
    Ok(Config::new(&secret)?.key)
}
