//! What grows with the streams of one process, up to what its descriptors allow, and whether
//! anything grows faster than they do: a table, and a plot in `target/bench/scale.svg`.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::Result;
use crate::cases::{connection, memory_now, to};
use crate::client::PATIENCE;
use crate::publish::Load;
use crate::report::{machine, number};
use crate::servers::{Kind, Server, answer_length};

const STREAMS: [usize; 5] = [1000, 2000, 5000, 10_000, 15_000];

/// As the streams is to the power of 1. What is measured is not exact.
const MOST: f64 = 1.1;

struct Row {
    name: &'static str,
    unit: &'static str,
    /// One for each of [`STREAMS`].
    values: Vec<f64>,
}

/// Measures, and prints. Nothing here can be missed: it is a report.
pub fn run() -> Result<bool> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    let mut rows: Vec<Row> = Vec::new();
    for streams in STREAMS {
        eprint!("{streams} streams");
        for (place, (name, unit, value)) in measure(streams)?.into_iter().enumerate() {
            eprint!("  {name} {} {unit}", number(value));
            if rows.len() == place {
                let values = Vec::new();
                rows.push(Row { name, unit, values });
            }
            rows[place].values.push(value);
        }
        eprintln!();
    }
    let text = table(&rows)?;
    println!("\n{text}");
    fs::create_dir_all("target/bench")?;
    fs::write("target/bench/scale.md", text)?;
    fs::write("target/bench/scale.svg", plot(&rows)?)?;
    Ok(true)
}

/// The same figures, in the same order, for any number.
fn measure(streams: usize) -> Result<Vec<(&'static str, &'static str, f64)>> {
    // Publishers are silent for long, and are not to be closed for that.
    let settings = [("SSE_MAX_SUBSCRIBERS", "20000"), ("SSE_READ_TIMEOUT", "60")];
    let server = Server::start(Kind::Ours, &settings)?;
    let mut probe = Probe::new(&server)?;
    let (descriptors, before) = (server.descriptors(), memory_now(&server));
    let cpu = server.cpu();
    let mut load = Load::start(server, to(streams))?;
    let (connecting, connecting_cpu) = (load.connecting, load.server.cpu() - cpu);
    load.at_rate(10.0, Duration::from_secs(1))?;
    let after = memory_now(&load.server);
    let kernel = (before[0] - after[0]) - (after[1] - before[1]) - (after[2] - before[2]);

    // Threads of the pool are kept for 5 seconds; heartbeats come each 15.
    load.swarm.rest(Duration::from_secs(6))?;
    let (begin, cpu) = (Instant::now(), load.server.cpu());
    load.swarm.rest(Duration::from_secs(16))?;
    let idle = (load.server.cpu() - cpu).as_secs_f64() / begin.elapsed().as_secs_f64();

    let beside_idle = probe.publish(200)?;
    let thread = thread::spawn(move || probe.publish(200));
    let all = load.at_rate(3.0, Duration::from_secs(5))?;
    let meanwhile = thread.join().expect("no panic")?;

    let Load { server, swarm, .. } = load;
    let (begin, cpu) = (Instant::now(), server.cpu());
    drop(swarm);
    while server.descriptors() > descriptors {
        if begin.elapsed() > PATIENCE {
            return Err("streams whose clients left stay open".into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let (leaving, leaving_cpu) = (begin.elapsed(), server.cpu() - cpu);

    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let share = |sorted: &[f64], share: usize| sorted[sorted.len() * share / 100];
    Ok(vec![
        ("connecting all", "ms", ms(connecting)),
        ("CPU of connecting", "ms", ms(connecting_cpu)),
        ("memory, resident", "MiB", after[2] - before[2]),
        ("memory, kernel, both ends", "MiB", kernel),
        ("idle, CPU", "%", 100.0 * idle),
        ("publish to all, p50", "ms", all.latency(0.5)),
        ("publish to all, p99", "ms", all.latency(0.99)),
        (
            "CPU of a publish to all",
            "µs",
            all.cpu_each() * streams as f64,
        ),
        ("topic of one, p50", "µs", share(&beside_idle, 50)),
        ("topic of one, p99", "µs", share(&beside_idle, 99)),
        ("beside publishes to all, p50", "µs", share(&meanwhile, 50)),
        ("beside publishes to all, p99", "µs", share(&meanwhile, 99)),
        ("leaving of all", "ms", ms(leaving)),
        ("CPU of leaving", "ms", ms(leaving_cpu)),
    ])
}

/// A stream of a topic of its own, and who publishes to it. Both block.
struct Probe {
    subscriber: TcpStream,
    publisher: TcpStream,
    request: Vec<u8>,
}

impl Probe {
    fn new(server: &Server) -> Result<Self> {
        let mut subscriber = connection(server)?;
        subscriber.write_all(&server.subscription(&["one".into()]))?;
        let mut probe = Self {
            subscriber,
            publisher: connection(server)?,
            request: server.publication(&[("one".into(), "x".repeat(64))]),
        };
        // The head, without which it is not known to be subscribed.
        probe.hear("\nretry: ")?;
        probe.publish(10)?;
        Ok(probe)
    }

    /// Microseconds from sending to hearing, sorted.
    fn publish(&mut self, count: usize) -> Result<Vec<f64>> {
        let mut took = Vec::new();
        for _ in 0..count {
            thread::sleep(Duration::from_millis(20));
            let begin = Instant::now();
            self.publisher.write_all(&self.request)?;
            self.hear("\n\n")?;
            took.push(begin.elapsed().as_secs_f64() * 1e6);
            let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
            while answer_length(&answer)?.is_none() {
                let came = self.publisher.read(&mut buffer)?;
                answer.extend_from_slice(&buffer[..came]);
            }
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }

    /// Reads until this has come, behind which nothing else is due.
    fn hear(&mut self, end: &str) -> Result<()> {
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.contains(end) {
            match self.subscriber.read(&mut buffer)? {
                0 => return Err("the probe's stream has ended".into()),
                came => text += &String::from_utf8_lossy(&buffer[..came]),
            }
        }
        Ok(())
    }
}

impl Row {
    /// By which power of the number of streams it grows: the slope of its line in the plot.
    fn power(&self) -> f64 {
        let points = STREAMS.iter().zip(&self.values);
        let points = points.map(|(streams, value)| ((*streams as f64).ln(), value.max(1e-3).ln()));
        let points: Vec<_> = points.collect();
        let mean =
            |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
        let (x, y) = (mean(|it| it.0), mean(|it| it.1));
        let along = points.iter().map(|it| (it.0 - x) * (it.1 - y)).sum::<f64>();
        along / points.iter().map(|it| (it.0 - x).powi(2)).sum::<f64>()
    }
}

fn table(rows: &[Row]) -> Result<String> {
    let mut text = format!("One run on {}.\n\n| streams | |", machine());
    for streams in STREAMS {
        write!(text, " {} |", number(streams as f64))?;
    }
    text += " for each of the least | of the most | grows as streams to the power of |\n";
    text += &format!("|---|---|{}\n", "--:|".repeat(STREAMS.len() + 3));
    for row in rows {
        write!(text, "| {} | {} |", row.name, row.unit)?;
        for value in &row.values {
            write!(text, " {} |", number(*value))?;
        }
        for place in [0, STREAMS.len() - 1] {
            let each = 1000.0 * row.values[place] / STREAMS[place] as f64;
            let unit = match row.unit {
                "ms" => "µs",
                "µs" => "ns",
                "MiB" => "KiB",
                _ => "m%",
            };
            // 1,024 KiB, but a thousandth of anything else.
            let each = each * if row.unit == "MiB" { 1.024 } else { 1.0 };
            write!(text, " {} {unit} |", number(each))?;
        }
        let power = row.power();
        let verdict = if power > MOST {
            " **faster than they do**"
        } else {
            ""
        };
        writeln!(text, " {power:.2}{verdict} |")?;
    }
    let faster: Vec<_> = rows.iter().filter(|row| row.power() > MOST).collect();
    let names: Vec<_> = faster.iter().map(|row| row.name).collect();
    match names[..] {
        [] => text += "\nNothing grows faster than the streams do.\n",
        _ => writeln!(
            text,
            "\nGrows faster than the streams do: {}.",
            names.join("; ")
        )?,
    }
    Ok(text)
}

/// Each figure as a multiple of what it is with the fewest streams, both axes logarithmic: whatever
/// rises above the dashed line grows faster than the streams do.
fn plot(rows: &[Row]) -> Result<String> {
    let least = STREAMS[0] as f64;
    let x = |streams: f64| 60.0 + 160.0 * (streams / least).ln();
    let y = |times: f64| 420.0 - 110.0 * times.clamp(0.3, 30.0).ln();
    let mut svg = String::from(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="900" height="580" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="24" font-size="16">Growth with the streams of one process (dashed: as they do)</text>
"#,
    );
    for times in [0.5, 1.0, 2.0, 5.0, 10.0, 15.0] {
        let at = y(times);
        writeln!(svg, r##"<path d="M60 {at}H495" stroke="#ddd"/>"##)?;
        writeln!(
            svg,
            r#"<text x="52" y="{at}" text-anchor="end">{times}×</text>"#
        )?;
    }
    for streams in STREAMS {
        let (at, name) = (x(streams as f64), number(streams as f64));
        writeln!(
            svg,
            r#"<text x="{at}" y="565" text-anchor="middle">{name}</text>"#
        )?;
    }
    let most = STREAMS[STREAMS.len() - 1] as f64;
    let ends = [x(least), y(1.0), x(most), y(most / least)];
    let [x0, y0, x1, y1] = ends;
    writeln!(
        svg,
        r#"<path d="M{x0} {y0}L{x1} {y1}" stroke="black" stroke-dasharray="6 4"/>"#
    )?;
    for (place, row) in rows.iter().enumerate() {
        let points = STREAMS.iter().zip(&row.values);
        let points = points.map(|(streams, value)| {
            format!(
                "{},{}",
                x(*streams as f64),
                y(value / row.values[0].max(1e-3))
            )
        });
        let points: Vec<_> = points.collect();
        let colour = format!("hsl({} 70% 40%)", 360 * place / rows.len());
        let (top, middle, name, power) = (60 + 24 * place, 64 + 24 * place, row.name, row.power());
        writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>
<path d="M520 {top}h24" stroke="{colour}" stroke-width="3"/>
<text x="552" y="{middle}">{name}: to the power of {power:.2}</text>"#,
            points.join(" ")
        )?;
    }
    Ok(svg + "</svg>\n")
}
