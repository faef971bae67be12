//! Three instances over one Redis, of either kind. Each subscriber is at the next instance, and what
//! is published to the first reaches those of all.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::servers::{Kind, Server, round_trip};

const INSTANCES: usize = 3;

/// Where `make bench` leaves the server with the feature.
const BINARY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/redis/release/sse-server"
);

/// A running Redis that keeps nothing on disk; ended when dropped.
pub struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn binary() -> String {
    std::env::var("SSE_REDIS_BIN").unwrap_or(BINARY.into())
}

pub fn start(kind: Kind) -> Result<Server> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let child = Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--save", "", "--port"])
        .arg(port.to_string())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("redis-server: {error}"))?;
    let redis = Redis(child);
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            return Err("redis-server does not answer".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let url = format!("redis://127.0.0.1:{port}");
    let instance = || Server::start(kind, &[("SSE_REDIS", &url)]);
    let mut first = instance()?;
    first.others = (1..INSTANCES).map(|_| instance()).collect::<Result<_>>()?;
    first.redis = Some(redis);
    // nchan answers 503 for as long as it connects to Redis.
    let request = first.publication(&[("nobody".into(), "ready?".into())]);
    for number in 0..INSTANCES {
        let asked = || {
            let mut stream = TcpStream::connect(first.address_of(number))?;
            round_trip(&mut stream, &request)
        };
        while let Err(error) = asked() {
            if Instant::now() > deadline {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(first)
}
