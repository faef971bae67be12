//! Bursts: however many publish, however much, and however short the queues are, a subscriber that
//! reads gets everything, and one that does not costs nobody anything.

#[path = "support/attack.rs"]
mod attack;
mod support;

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use sse_server::{Config, Event, Server};

use attack::{alone, connect_narrow, send};
use support::*;

/// How publishers reach the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `Server::publish` in a loop, in one process with the server.
    InProcess,
    /// A request, its answer, the next request.
    OneByOne,
    /// All requests at once, while another thread reads the answers.
    Pipelined,
}

use Way::{InProcess, OneByOne, Pipelined};

/// How many events are in a submission.
#[derive(Clone, Copy, Debug)]
enum Size {
    One,
    /// As many as a queue holds.
    Most,
    /// From one to as many as a queue holds; each publisher in a sequence of its own.
    Mixed,
    /// The first publisher as many as a queue holds, all others one.
    Unfair,
}

use Size::{Mixed, Most, One, Unfair};

/// Publishers, submissions of each, SSE_QUEUE, events in a submission, readers. All events together
/// are fewer than fit the socket of somebody who reads nothing at all (65,000 of this size, each
/// written by itself): on a busy machine a reader may well be put aside for all that time.
#[derive(Clone, Copy, Debug)]
struct Burst(usize, usize, usize, Size, usize);

impl Burst {
    fn size(&self, publisher: usize, number: usize) -> usize {
        let queue = self.2;
        match self.3 {
            One => 1,
            Most => queue,
            Mixed => 1 + (number * 7 + publisher) % queue,
            Unfair if publisher == 0 => queue,
            Unfair => 1,
        }
    }

    fn events(&self) -> usize {
        let submissions = (0..self.0).flat_map(|it| (0..self.1).map(move |number| (it, number)));
        submissions.map(|(it, number)| self.size(it, number)).sum()
    }

    /// The data of a submission's events.
    fn data(&self, publisher: usize, number: usize) -> Vec<String> {
        let size = self.size(publisher, number);
        let data = (0..size).map(|index| format!("{publisher} {number} {index} {size}"));
        data.collect()
    }
}

/// A server, in this process or in one of its own.
struct House {
    addr: SocketAddr,
    metrics: SocketAddr,
    home: Home,
}

enum Home {
    Here(Arc<Server>, Option<JoinHandle<()>>),
    There(#[allow(dead_code)] TestServer),
}

const TOPIC: &str = "burst";

fn event(topic: &str, name: &str, data: &str) -> Event {
    Event::new(topic, name, data).unwrap()
}

fn token(topics: &[&str]) -> String {
    mint(SECRET, &topics_payload(topics), now())
}

/// A request that submits these events.
fn submission(events: &[(&str, &str, &str)]) -> Vec<u8> {
    let body = mint(SECRET, &events_payload(events), now());
    let length = format!("Content-Length: {}\r\n", body.len());
    request("POST", "/submit", &length, body.as_bytes())
}

impl House {
    /// Whoever takes nothing is not cut for that as long as a test lasts: a publisher that waited
    /// for it would never end.
    fn build(way: Way, queue: usize) -> Self {
        if way != InProcess {
            let server = TestServer::start(&[
                ("SSE_QUEUE", &queue.to_string()),
                ("SSE_WRITE_TIMEOUT", "600"),
                ("SSE_METRICS_LISTEN", "127.0.0.1:0"),
            ]);
            let (addr, metrics) = (server.addr, server.metrics.expect("an address"));
            let home = Home::There(server);
            return Self {
                addr,
                metrics,
                home,
            };
        }
        let mut config = Config::new(SECRET).unwrap();
        config.listen = ([127, 0, 0, 1], 0).into();
        config.metrics_listen = Some(config.listen);
        config.queue = queue as u64;
        config.write_timeout = 600;
        let server = Server::bind(config).unwrap();
        let addr = server.local_addr().unwrap();
        let line = server.describe().unwrap();
        let (_, metrics) = line.split_once("metrics on ").expect("an address");
        let metrics = metrics.parse().unwrap();
        let running = server.clone();
        let thread = thread::spawn(move || running.run().expect("it starts"));
        let home = Home::Here(server, Some(thread));
        Self {
            addr,
            metrics,
            home,
        }
    }

    fn server(&self) -> &Arc<Server> {
        match &self.home {
            Home::Here(server, _) => server,
            Home::There(_) => panic!("in a process of its own"),
        }
    }

    fn metric(&self, sample: &str) -> u64 {
        let mut connection = Connection::open(self.metrics);
        let fields = "Connection: close\r\n";
        connection.send(request("GET", "/metrics", fields, b""));
        sample_in(&connection.answer().text(), sample)
    }

    fn ended(&self, reason: &str) -> u64 {
        self.metric(&format!("sse_streams_ended_total{{reason=\"{reason}\"}}"))
    }

    /// One submission with these events, in the way of the house; its deliveries, or the status of
    /// its refusal.
    fn publish(&self, events: &[(&str, &str, &str)]) -> Result<u64, u16> {
        if let Home::Here(server, _) = &self.home {
            let made = events
                .iter()
                .map(|(topic, name, data)| event(topic, name, data));
            let result = server.publish(&made.collect::<Vec<_>>());
            return result
                .map(|receipt| receipt.deliveries as u64)
                .map_err(|refusal| refusal.status);
        }
        let mut connection = Connection::open(self.addr);
        connection.send(submission(events));
        let answer = Submitted::from(connection.answer());
        match answer.status {
            200 => Ok(answer.deliveries),
            status => Err(status),
        }
    }

    fn subscribe(&self) -> Subscriber {
        subscribe(self.addr, &format!("/events?token={}", token(&[TOPIC])))
    }

    /// One that will never read, and hears what nobody else does besides.
    fn stalled(&self) -> TcpStream {
        let mut stream = connect_narrow(self.addr);
        let target = format!("/events?token={}", token(&[TOPIC, "big"]));
        send(&mut stream, &request("GET", &target, "", b""));
        let there = || self.publish(&[("big", "", "")]) == Ok(1);
        assert!(wait_until(DEADLINE, there));
        stream
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if let Home::Here(server, thread) = &mut self.home {
            server.shutdown();
            let thread = thread.take().expect("only taken here");
            let ended = wait_until(DEADLINE, || thread.is_finished());
            assert!(ended || thread::panicking(), "run() has not returned");
        }
    }
}

/// What a reader got, by publisher and number of the submissions, in their order.
type Order = Vec<(usize, usize)>;

/// Reads on and on until the end is told; each submission must come unbroken.
fn read(mut stream: Subscriber) -> Order {
    let mut order = Vec::new();
    loop {
        let Message { name, data } = stream.message();
        if name == "end" {
            return order;
        }
        let numbers = |data: &str| {
            let words = data.split(' ').map(|word| word.parse::<usize>().unwrap());
            <[usize; 4]>::try_from(words.collect::<Vec<_>>()).expect("four numbers")
        };
        let [publisher, number, first, size] = numbers(&data);
        assert_eq!(first, 0, "it begins in the midst of a submission");
        for index in 1..size {
            let next = numbers(&stream.message().data);
            assert_eq!(next, [publisher, number, index, size], "broken");
        }
        order.push((publisher, number));
    }
}

/// One publisher's part; each submission has to be accepted, and queued to at least as many.
fn publish_all(burst: Burst, way: Way, house: &House, own: usize) {
    let (addr, readers) = (house.addr, burst.4);
    let expect = |deliveries: usize, number: usize| {
        let least = burst.size(own, number) * readers;
        assert!(deliveries >= least, "{deliveries}, not {least}");
    };
    if way == InProcess {
        let server = house.server();
        for number in 0..burst.1 {
            let data = burst.data(own, number);
            let events = data.iter().map(|data| event(TOPIC, "", data));
            let receipt = server.publish(&events.collect::<Vec<_>>()).unwrap();
            expect(receipt.deliveries, number);
        }
        return;
    }
    let requests = (0..burst.1).map(|number| {
        let data = burst.data(own, number);
        let events: Vec<_> = data.iter().map(|data| (TOPIC, "", &**data)).collect();
        submission(&events)
    });
    let mut connection = Connection::open(addr);
    let answer = |connection: &mut Connection, number| {
        let deliveries = Submitted::from(connection.answer()).ok();
        expect(deliveries as usize, number);
    };
    if way == OneByOne {
        for (number, request) in requests.enumerate() {
            connection.send(request);
            answer(&mut connection, number);
        }
        return;
    }
    let bytes: Vec<u8> = requests.flatten().collect();
    let mut socket = connection.socket().try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || assert!(send(&mut socket, &bytes), "the server reads on"));
        (0..burst.1).for_each(|number| answer(&mut connection, number));
    });
}

/// Plays a burst; with a stalled subscriber beside it, which has to be cut meanwhile or afterwards.
#[track_caller]
fn play(burst: Burst, way: Way, with_stalled: bool) {
    let house = Arc::new(House::build(way, burst.2));
    let stalled = with_stalled.then(|| house.stalled());
    let readers: Vec<_> = (0..burst.4).map(|_| house.subscribe()).collect();
    let readers: Vec<_> = readers
        .into_iter()
        .map(|stream| in_background(move || read(stream)))
        .collect();
    let begun = Instant::now();
    let mut publishers: Vec<_> = (0..burst.0)
        .map(|own| {
            let house = house.clone();
            in_background(move || publish_all(burst, way, &house, own))
        })
        .collect();
    if with_stalled {
        let house = house.clone();
        publishers.push(in_background(move || {
            // Each end of a line takes one byte of its token, and seven of its frame.
            let big = "\n".repeat(1500);
            while house.publish(&[("big", "", &big)]).unwrap() > 0 {}
        }));
    }
    let done = || publishers.iter().all(JoinHandle::is_finished);
    assert!(wait_until(2 * DEADLINE, done), "a publisher waits");
    publishers.into_iter().for_each(|it| it.join().unwrap());
    let published = begun.elapsed();
    assert!(house.publish(&[(TOPIC, "end", "")]).is_ok());
    let orders: Vec<Order> = readers.into_iter().map(|it| it.join().unwrap()).collect();
    let took = begun.elapsed();
    let events = burst.events();
    println!(
        "  {burst:?} {way:?}{}: {events} events published in {published:.2?}, read in {took:.2?}: \
         {:.0} deliveries a second",
        if with_stalled {
            " with one stalled"
        } else {
            ""
        },
        (events * burst.4) as f64 / took.as_secs_f64()
    );
    for order in &orders {
        assert_eq!(order.len(), burst.0 * burst.1, "each submission once");
        for own in 0..burst.0 {
            let numbers = order.iter().filter(|it| it.0 == own).map(|it| it.1);
            assert!(numbers.eq(0..burst.1), "in the order of their publisher");
        }
        assert!(*order == orders[0], "another order");
    }
    if with_stalled {
        let cut = || house.ended("queue_full") == 1;
        assert!(wait_until(DEADLINE, cut), "the stalled one is not cut");
    }
    let cut = u64::from(with_stalled);
    assert_eq!(house.ended("queue_full"), cut, "nobody else is cut");
    assert_eq!(
        house.metric("sse_streams_opened_total"),
        burst.4 as u64 + cut
    );
    drop(stalled);
}

/// A tool that has a hundred things to say at once says them in a loop. None of them came, once.
#[test]
fn a_loop_of_a_hundred_publishes_delivers_all() {
    for _ in 0..20 {
        play(Burst(1, 100, 64, One, 1), InProcess, false);
    }
}

#[test]
fn bursts_in_process_reach_every_reader() {
    let _alone = alone();
    for burst in [
        Burst(1, 4000, 2, One, 1),
        Burst(1, 4000, 64, One, 5),
        Burst(3, 4000, 64, One, 3),
        Burst(3, 4000, 4, One, 3),
        Burst(8, 2000, 2, One, 2),
        Burst(8, 4000, 64, One, 1),
        Burst(8, 500, 3, Most, 5),
        Burst(1, 500, 64, Most, 2),
        Burst(3, 500, 64, Mixed, 3),
        Burst(8, 1000, 4, Mixed, 2),
        Burst(3, 2000, 2, Mixed, 4),
        Burst(8, 100, 64, Most, 1),
    ] {
        play(burst, InProcess, false);
    }
}

#[test]
fn bursts_over_http_reach_every_reader() {
    let _alone = alone();
    for burst in [
        Burst(1, 2000, 2, One, 1),
        Burst(1, 1000, 64, One, 5),
        Burst(3, 1000, 4, One, 3),
        Burst(8, 500, 3, One, 2),
        Burst(3, 300, 3, Most, 3),
        Burst(8, 200, 64, Mixed, 1),
        Burst(1, 100, 64, Most, 2),
    ] {
        play(burst, OneByOne, false);
    }
}

/// A queue worker that has fallen behind does not wait for answers.
#[test]
fn pipelined_bursts_over_http_reach_every_reader() {
    let _alone = alone();
    for burst in [
        Burst(3, 4000, 64, One, 3),
        Burst(3, 4000, 4, One, 3),
        Burst(1, 4000, 2, One, 1),
        Burst(8, 1000, 3, One, 5),
        Burst(8, 300, 4, Most, 2),
        Burst(3, 300, 64, Mixed, 1),
        Burst(1, 1000, 3, Mixed, 4),
    ] {
        play(burst, Pipelined, false);
    }
}

/// One that does not read is cut; meanwhile it costs no reader an event, and no publisher more than
/// the attempts to write to it: were it waited for, the burst would take ten minutes.
#[test]
fn a_stalled_subscriber_costs_a_burst_nothing() {
    let _alone = alone();
    for (burst, way) in [
        (Burst(1, 1000, 2, One, 1), InProcess),
        (Burst(3, 2000, 64, One, 3), InProcess),
        (Burst(8, 500, 4, Mixed, 2), InProcess),
        (Burst(3, 500, 4, One, 2), OneByOne),
        (Burst(1, 500, 64, Mixed, 1), OneByOne),
        (Burst(3, 2000, 64, One, 3), Pipelined),
        (Burst(3, 1000, 3, Most, 5), Pipelined),
    ] {
        play(burst, way, true);
    }
}

/// A submission that needs a queue for itself must find it empty at some time, however many small
/// ones are about to fill it again.
#[test]
fn long_submissions_come_through_among_short_ones() {
    let _alone = alone();
    play(Burst(3, 500, 64, Unfair, 1), InProcess, false);
    play(Burst(8, 500, 64, Unfair, 2), InProcess, false);
    play(Burst(8, 1000, 4, Unfair, 3), InProcess, false);
    play(Burst(8, 200, 64, Unfair, 2), Pipelined, false);
}

/// It could only cut its own listeners.
#[test]
fn a_submission_of_more_events_than_a_queue_is_refused_and_nothing_of_it_delivered() {
    for way in [InProcess, OneByOne] {
        for queue in [1, 2, 4, 64] {
            let house = House::build(way, queue);
            let mut stream = house.subscribe();
            let most = vec![(TOPIC, "", "much"); queue];
            let more = vec![(TOPIC, "", "too much"); queue + 1];
            assert_eq!(house.publish(&more), Err(413), "{way:?} {queue}");
            // Nor where only one of them has a listener.
            let mut elsewhere = vec![("nobody", "", ""); queue];
            elsewhere.push((TOPIC, "", "too much"));
            assert_eq!(house.publish(&elsewhere), Err(413), "{way:?} {queue}");
            assert_eq!(house.publish(&most), Ok(queue as u64), "{way:?} {queue}");
            for _ in 0..queue {
                stream.expect_event("message", "much");
            }
            assert_eq!(house.publish(&[(TOPIC, "end", "")]), Ok(1));
            stream.expect_event("end", "");
            assert_eq!(house.metric("sse_events_total"), queue as u64 + 1);
        }
    }
}

/// Events that may be on their way to a reader: fewer than its socket has room for, so that it can
/// lose its time slice and not its stream.
const AHEAD: usize = 20_000;

/// A server that ends in the midst of a burst: its publishers are told, wherever they are, and what
/// was accepted before arrives.
#[test]
fn publishers_in_a_burst_are_told_of_the_end() {
    let _alone = alone();
    for (queue, with_stalled) in [(2, false), (2, true), (64, false), (64, true)] {
        let house = House::build(InProcess, queue);
        let stalled = with_stalled.then(|| house.stalled());
        let published = Arc::new(AtomicUsize::new(0));
        let ended = Arc::new(AtomicBool::new(false));
        let counts: Vec<_> = (0..2).map(|_| Arc::new(AtomicUsize::new(0))).collect();
        let readers: Vec<_> = counts
            .iter()
            .map(|count| {
                let (count, mut stream) = (count.clone(), house.subscribe());
                in_background(move || {
                    let mut next = [0; 3];
                    while let Some(message) = stream.try_message() {
                        let (own, number) = message.data.split_once(' ').unwrap();
                        let own = &mut next[own.parse::<usize>().unwrap()];
                        assert_eq!(number.parse(), Ok(*own), "in order");
                        *own += 1;
                        count.fetch_add(1, SeqCst);
                    }
                    assert!(stream.connection.whole, "it was told of the end");
                    next
                })
            })
            .collect();
        let publishers: Vec<_> = (0..3)
            .map(|own| {
                let (server, published) = (house.server().clone(), published.clone());
                let (counts, ended) = (counts.clone(), ended.clone());
                in_background(move || {
                    for number in 0.. {
                        let read = || counts.iter().map(|it| it.load(SeqCst)).min().unwrap();
                        while published.load(SeqCst) > read() + AHEAD && !ended.load(SeqCst) {
                            thread::yield_now();
                        }
                        let data = format!("{own} {number}");
                        match server.publish(&[event(TOPIC, "", &data)]) {
                            Ok(receipt) => assert!(receipt.deliveries >= 2),
                            Err(refusal) => {
                                assert!(ended.load(SeqCst), "{refusal}");
                                assert_eq!(refusal.status, 503, "{refusal}");
                                return number;
                            }
                        }
                        published.fetch_add(1, SeqCst);
                    }
                    unreachable!("numbers do not end");
                })
            })
            .collect();
        let amid = || published.load(SeqCst) >= 5000;
        assert!(wait_until(DEADLINE, amid), "it does not get on");
        ended.store(true, SeqCst);
        house.server().shutdown();
        let accepted = publishers.into_iter().map(|publisher| {
            let told = wait_until(DEADLINE, || publisher.is_finished());
            assert!(told, "a publisher is not told");
            publisher.join().unwrap()
        });
        let accepted: Vec<usize> = accepted.collect();
        for reader in readers {
            let heard = reader.join().unwrap();
            assert_eq!(heard, accepted[..], "all that was accepted");
        }
        assert!(house.server().publish(&[event(TOPIC, "", "")]).is_err());
        drop(stalled);
    }
}
