//! Several instances as one server, over a stream of Redis: what is submitted to any of them goes
//! there, sealed as it came, and comes back to all of them, in one order.
//!
//! An entry is known by its number *and* its seal. Numbers (`EPOCH-SEQ`) are without gaps within an
//! epoch, which begins when the stream does. The seal, which no two submissions share, tells
//! whether a number still means what it meant: after a flush, a restart from an old snapshot, or on
//! a replica that lacked the last writes, it does not. So every read begins with the entry that was
//! read last, and whoever finds another one there, or none, or a number left out behind it, has
//! missed something: all its streams end, and it goes on from the end of the stream. A client that
//! comes back is judged in the same way, by the id of what it heard last.
//!
//! Redis is trusted to keep and to order, and for nothing else: it has no key. Whoever can write to
//! it can end streams, stop submissions, fill memory with entries of any size, and repeat a
//! submission however old, but not make one.
//!
//! Locks, in the order in which they may be taken: `RESUMING`, then `at`, then the hub's; `idle`
//! for a step.

use std::{collections::BTreeMap, io, io::ErrorKind, sync::atomic::Ordering::SeqCst};
use std::{thread, time::Duration, time::Instant};

use parking_lot::{Mutex, MutexGuard};
use redis::{Client, Connection, RedisError, RedisResult, cmd};

use crate::{config::Key, config::RedisUrl, error::Refusal, error::ensure};
use crate::{event::Event, event::Frame, event::Topics, hub::Hub, hub::Receipt, hub::Relay};
use crate::{metrics::Reason, subscriber::Stream};

/// Where the stream is. Deployments that share a Redis each need a database of their own.
const STREAM: &str = "sse-server";

/// For a connection, and again for a command: a submission is answered within two seconds. To write
/// one on an idle connection waits for nothing, since it fits the socket.
const PATIENCE: Duration = Duration::from_millis(900);

/// Milliseconds that a read waits in Redis for the next entry, before it looks whether the last one
/// is still there.
const BLOCK: &str = "500";

/// Between two attempts to reach Redis, or two looks whether the reader has come so far.
const PAUSE: Duration = Duration::from_millis(20);

/// What stands between may have closed a connection that was idle for longer, and a submission
/// would be lost on it.
const IDLE: Duration = Duration::from_secs(5);

/// Entries read at once: at most 8 MiB of what servers put there.
const PAGE: &str = "128";

/// Characters in the longest token: as in the longest body. Opening one takes time by its square.
const MAX_TOKEN: usize = 1 << 16;

/// Bytes of events that a client can have missed: as many as may wait in its queue.
const MAX_MISSED: usize = 1 << 20;

/// One page at a time is read and opened for clients that come back, in turn: that bounds what
/// Redis is asked, and what is held of it; and none has to wait for all pages of another. What is
/// found then belongs to the stream, for as long as that one does not read it.
static RESUMING: Mutex<()> = Mutex::new(());

/// Answers with the last entry. Where there is none the stream begins, in one step, with an empty
/// submission: of several instances that find it gone, one does that. Redis' clock gives the epoch;
/// those of instances differ. Before version 7 there was no such constant.
const BEGIN: &str = "
    if not redis.REDIS_VERSION then return redis.error_reply('OLD Redis 7 or Valkey is needed') end
    local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
    if #last == 0 then redis.call('XADD', KEYS[1], '*', 't', ARGV[1]) end
    return redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)";

/// Adds a submission, and drops those beyond 10,000. It goes to the epoch that is there, whatever
/// this instance knows of it: one that has not heard of a flush does not bring the old one back.
const ADD: &str = "
    local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
    local next = last and string.match(last[1], '%d+') .. '-*' or '*'
    return redis.call('XADD', KEYS[1], 'MAXLEN', '~', 10000, next, 't', ARGV[1])";

/// Its mark, and the token in it. The mark is its number and its seal, of which the end will do,
/// backwards: `EPOCH-SEQ-SEAL`.
type Entry = (String, String);

struct Instance {
    client: Client,
    /// The mark of what was published last. Locked while the next is published, so that a stream
    /// registered under this lock hears exactly what comes behind. Taken before the hub's.
    at: Mutex<String>,
    /// Connections that nobody uses, and since when. Locked for a step.
    idle: Mutex<Vec<(Connection, Instant)>>,
}

/// What a client missed, unless that is no longer there; and where it ends, which stays so while it
/// is locked.
type Missed<'a> = (Option<Vec<Frame>>, MutexGuard<'a, String>);

/// The hub, whose submissions from now on go through Redis where the settings say so. Where they
/// begin is read here, before the first client is accepted.
///
/// # Errors
/// Where Redis cannot be used. [`ErrorKind::InvalidInput`] where somebody has to correct something.
pub fn connect(mut hub: Hub) -> io::Result<Hub> {
    let explain = |error: RedisError| {
        let kind = [ErrorKind::InvalidInput, ErrorKind::Other][usize::from(error.is_io_error())];
        io::Error::new(kind, format!("SSE_REDIS cannot be used: {error}"))
    };
    if let Some(RedisUrl(url)) = &hub.config.redis {
        let client = Client::open(url.as_str()).map_err(explain)?;
        let at = reach(&client).and_then(|mut redis| end(&mut redis, &hub.config.key));
        let (at, idle) = (at.map_err(explain)?.into(), Mutex::default());
        hub.relay = Some(Box::new(Instance { client, at, idle }));
    }
    Ok(hub)
}

fn text(event: &Event) -> &str {
    str::from_utf8(event.frame.bytes(false)).expect("frames are made of strings")
}

/// A submission of events that are framed already.
fn mint(key: &Key, events: &[Event]) -> Result<String, Refusal> {
    let fields = |event: &Event| {
        let lines = format!("\n{}", text(event).trim_end_matches('\n'));
        let (name, data) = lines.split_once("\ndata: ").expect("a frame has data");
        let name = name.replace("\nevent: ", "");
        let (topic, data) = (event.topic.name().into(), data.replace("\ndata: ", "\n"));
        BTreeMap::from([("topic", topic), ("event", name), ("data", data)])
    };
    let events: Vec<_> = events.iter().map(fields).collect();
    key.mint(&BTreeMap::from([("events", events)]))
}

/// The events of an entry, each with its id. However old: whoever accepted it has looked at that.
fn open(key: &Key, (mark, token): &Entry) -> Result<Vec<Event>, Refusal> {
    ensure(token.len() <= MAX_TOKEN, 413, "a token over 64 KiB")?;
    let mut events = key.open_submission(token, None)?;
    for (index, event) in events.iter_mut().enumerate() {
        event.frame = Frame::new(&format!("id: {mark}-{index}\n{}", text(event)));
    }
    Ok(events)
}

fn reach(client: &Client) -> RedisResult<Connection> {
    let redis = client.get_connection_with_timeout(PATIENCE)?;
    redis.set_read_timeout(Some(PATIENCE))?;
    redis.set_write_timeout(Some(PATIENCE))?;
    Ok(redis)
}

fn entries(redis: &mut Connection, name: &str, args: &[&str]) -> RedisResult<Vec<Entry>> {
    let found: Vec<(String, Vec<Vec<u8>>)> = cmd(name).arg(args).query(redis)?;
    let entry = |(number, fields): (String, Vec<Vec<u8>>)| {
        let token = String::from_utf8_lossy(fields.get(1).map_or(b"", |it| it));
        // It stands in frames, whoever wrote the entry.
        let seal = token.chars().rev().filter(char::is_ascii_alphanumeric);
        let seal: String = seal.take(12).collect();
        let number = number.replace(|it: char| !it.is_ascii_digit() && it != '-', "");
        (format!("{number}-{seal}"), token.into())
    };
    Ok(found.into_iter().map(entry).collect())
}

/// The entry of this mark, and those behind it. None where it, or one of them, is not there.
fn read(redis: &mut Connection, mark: &str) -> RedisResult<Vec<Entry>> {
    let mut parts = mark.split('-').map(|it| it.parse::<u64>().unwrap_or(0));
    let (epoch, seq) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let number = format!("{epoch}-{seq}");
    let found = entries(redis, "XRANGE", &[STREAM, &number, "+", "COUNT", PAGE])?;
    let mut numbered = found.iter().zip(u128::from(seq)..);
    let whole = numbered.all(|(it, seq)| it.0.starts_with(&format!("{epoch}-{seq}-")));
    let there = found.first().is_some_and(|it| it.0 == mark);
    Ok(if there && whole { found } else { Vec::new() })
}

/// The mark of the last entry. Where there is none a new epoch begins.
fn end(redis: &mut Connection, key: &Key) -> RedisResult<String> {
    let empty = mint(key, &[]).expect("it is short");
    let last = entries(redis, "EVAL", &[BEGIN, "1", STREAM, &empty])?;
    Ok(last.into_iter().map(|(mark, _)| mark).collect())
}

impl Instance {
    /// Lends a connection. One that failed is not used again.
    fn ask<T>(&self, ask: impl FnOnce(&mut Connection) -> RedisResult<T>) -> RedisResult<T> {
        let idle = self.idle.lock().pop();
        let mut redis = idle.map_or_else(|| reach(&self.client), |it| Ok(it.0))?;
        ask(&mut redis).inspect(|_| self.idle.lock().push((redis, Instant::now())))
    }

    /// Publishes what has come, or waits for it. Where something was missed, ends all streams.
    fn follow(&self, hub: &Hub, redis: &mut Connection) -> RedisResult<()> {
        let at = self.at.lock().clone();
        let found = read(redis, &at)?;
        if found.is_empty() {
            *self.at.lock() = end(redis, &hub.config.key)?;
            hub.cut_all(Reason::Gap);
        } else if found.len() == 1 {
            let (number, _) = at.rsplit_once('-').unwrap_or_default();
            let wait = ["BLOCK", BLOCK, "COUNT", "1", "STREAMS", STREAM, number];
            cmd("XREAD").arg(&wait).exec(redis)?;
        }
        found.iter().skip(1).for_each(|it| self.publish(hub, it));
        Ok(())
    }

    fn publish(&self, hub: &Hub, entry: &Entry) {
        let ignored = |it: &_| hub.metrics.forged.warn(format_args!("entry ignored: {it}"));
        let opened = open(&hub.config.key, entry).inspect_err(ignored);
        let events = opened.unwrap_or_default();
        let mut at = self.at.lock();
        // In parts, since instances may have queues of different lengths. Nobody else publishes, so
        // nothing comes between them. Refused only where the server ends, and its streams with it.
        let mut parts = events.chunks(hub.config.queue as usize);
        if parts.all(|part| hub.publish(part).is_ok()) {
            at.clone_from(&entry.0);
        }
    }

    /// Finds what came behind an id, up to where the reader is by then. Does not hold it up.
    fn missed(&self, key: &Key, topics: &Topics, id: &str) -> RedisResult<Missed<'_>> {
        if id.is_empty() {
            return Ok((Some(Vec::new()), self.at.lock()));
        }
        let (mark, index) = id.rsplit_once('-').unwrap_or_default();
        let index = index.parse::<usize>();
        let mut heard = index.as_ref().map_or(0, |it| it.saturating_add(1));
        let (mut last, mut found, mut size) = (mark.to_string(), Vec::new(), 0);
        let until = Instant::now() + PATIENCE;
        while let Some(one) = RESUMING.try_lock_for(PATIENCE)
            && Instant::now() < until
        {
            let page = self.ask(|redis| read(redis, &last))?;
            if page.is_empty() || size > MAX_MISSED || index.is_err() {
                return Ok((None, self.at.lock()));
            }
            for entry in page.iter().skip(found.len().min(1)) {
                // What cannot be opened was not published either.
                let events = open(key, entry).unwrap_or_default().into_iter();
                let wanted = events.skip(heard).filter(|it| topics.contains(&it.topic));
                let frames: Vec<_> = wanted.map(|it| it.frame).collect();
                size += frames.iter().map(|it| it.bytes(false).len()).sum::<usize>();
                (last, heard) = (entry.0.clone(), 0);
                found.push((entry.0.clone(), frames));
            }
            drop(one);
            let mut at = self.at.lock();
            if let Some(end) = found.iter().position(|(mark, _)| *mark == *at) {
                let frames = found.into_iter().take(end + 1).flat_map(|it| it.1);
                return Ok((Some(frames.collect()).filter(|_| size <= MAX_MISSED), at));
            }
            // At once where there is more. Else the reader has yet to come to what is here.
            MutexGuard::unlocked(&mut at, || thread::sleep(PAUSE / page.len() as u32));
        }
        // One from far behind would not come further at the next attempt; others wait for Redis.
        let (far, late) = (found.len() > 128, io::Error::from(ErrorKind::TimedOut));
        far.then(|| (None, self.at.lock())).ok_or(late.into())
    }
}

impl Relay for Instance {
    fn submit(&self, hub: &Hub, token: Option<&str>, events: &[Event]) -> Result<Receipt, Refusal> {
        // Of no events: is refused where the server ends.
        hub.publish(&[])?;
        let token = token.map_or_else(|| mint(&hub.config.key, events), |it| Ok(it.to_string()))?;
        let fits = events.len() <= hub.config.queue as usize && token.len() <= MAX_TOKEN;
        ensure(fits, 413, "these are more than SSE_QUEUE events, or 64 KiB")?;
        let added = self.ask(|redis| cmd("EVAL").arg(&[ADD, "1", STREAM, &token]).exec(redis));
        added.map_err(|error| {
            let why = error.code().unwrap_or("it may still arrive");
            Refusal::new(503, format!("Redis did not confirm it: {why:?}"))
        })?;
        let (events, deliveries) = (events.len(), 0);
        Ok(Receipt { events, deliveries })
    }

    fn subscribe(&self, hub: &Hub, topics: Topics, mut stream: Stream, id: &str) {
        let Ok((frames, at)) = self.missed(&hub.config.key, &topics, id) else {
            // Not answered, so that a browser tries again.
            return hub.metrics.turned_away.warn("stream turned away: no Redis");
        };
        let reset = ["", "event: stream-reset\ndata: \n"][usize::from(frames.is_none())];
        // No event by itself. A client that hears none still has an id to come back with: behind
        // the last event of an entry, of which no token holds so many.
        let place = Frame::new(&format!("id: {}-99999\n{reset}\n", *at));
        let frames = frames.iter().flatten();
        frames.chain([&place]).for_each(|it| stream.push(it));
        hub.subscribe(topics, stream);
    }

    fn run(&self, hub: &Hub) {
        while !hub.closed.load(SeqCst) {
            self.idle.lock().retain(|it| it.1.elapsed() < IDLE);
            if let Err(error) = self.ask(|redis| self.follow(hub, redis)) {
                self.idle.lock().clear();
                hub.metrics.redis_failures.warn(format!("Redis: {error}"));
                thread::sleep(5 * PAUSE);
            }
        }
    }
}
