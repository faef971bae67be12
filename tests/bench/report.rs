//! Medians, goals, the table and the plot.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::Result;
use crate::cases::Figure;
use crate::servers::{Kind, NGINX};

/// The unit of the load generator's own share of a core, which is told in one line only.
pub const BUSY: &str = "% busy";

enum Goal {
    /// Ours divided by the other's.
    AtLeast(f64),
    AtMost(f64),
    /// In the figure's own unit, whatever others do.
    Below(f64),
}

fn goal(other: Kind, case: &str, figure: &str) -> Option<Goal> {
    let is = |start: &str| figure.starts_with(start);
    match (other, case) {
        (Kind::Reference, _) if is("flat out") => Some(Goal::AtLeast(0.8)),
        (Kind::Reference, _) if is("CPU") => Some(Goal::AtMost(1.3)),
        (Kind::Reference, _) if is("p99") => Some(Goal::AtMost(1.5)),
        (Kind::Nchan, "flat-100") if is("flat out, 8 ") => Some(Goal::AtLeast(3.0)),
        (Kind::Nchan, "flat-1000") if is("flat out, 8 ") => Some(Goal::AtLeast(5.0)),
        (Kind::Nchan, "flat-5000") if is("flat out, 8 ") => Some(Goal::AtLeast(5.0)),
        (Kind::Nchan, "flat-9000") if is("flat out, 8 ") => Some(Goal::AtLeast(6.0)),
        (Kind::Nchan, "redis-3x1000" | "redis-3x3000") if is("flat out") => {
            Some(Goal::AtLeast(3.0))
        }
        (Kind::Nchan, "redis-rate-3x1000x10") if is("p99") => Some(Goal::AtMost(1.0)),
        (Kind::Nchan, "topics-1000") if is("flat out") => Some(Goal::AtLeast(2.0)),
        (Kind::Nchan, "rate-1000x30" | "rate-5000x5") if is("p99") => Some(Goal::AtMost(0.7)),
        (Kind::Nchan, "rate-1000x30" | "rate-5000x5") if is("CPU") => Some(Goal::AtMost(1.0)),
        (Kind::Nchan, "connect-5000") => Some(Goal::AtMost(1.5)),
        (Kind::Nchan, "memory-5000" | "memory-9000") if is("memory, kernel") => {
            Some(Goal::Below(10.0))
        }
        (Kind::Ours, "idle-10000") if figure == "CPU" => Some(Goal::Below(1.0)),
        (Kind::Ours, "idle-9000x60") if figure == "CPU" => Some(Goal::Below(3.0)),
        (Kind::Ours, "idle-9000x60") if is("p99") => Some(Goal::Below(10.0)),
        _ => None,
    }
}

/// One figure of one case, of each server in all runs.
struct Row {
    case: &'static str,
    figure: String,
    unit: &'static str,
    values: [Vec<f64>; Kind::ALL.len()],
}

#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    failures: String,
}

impl Report {
    pub fn add(&mut self, case: &'static str, kind: Kind, outcome: Result<Vec<Figure>>) {
        let figures = outcome.unwrap_or_else(|error| {
            eprint!("  FAILED: {error}");
            self.failures += &format!("- **FAILED** {case}, {}: {error}\n", kind.name());
            Vec::new()
        });
        for (figure, unit, value) in figures {
            eprint!("  {figure} {} {unit}", number(value));
            let known = |row: &Row| row.case == case && row.figure == figure;
            let place = self.rows.iter().position(known).unwrap_or(self.rows.len());
            if place == self.rows.len() {
                self.rows.push(Row {
                    case,
                    figure,
                    unit,
                    values: Default::default(),
                });
            }
            self.rows[place].values[kind as usize].push(value);
        }
        eprintln!();
    }

    /// Prints and writes the table and the plot. False if a case has failed.
    pub fn finish(&self, runs: usize) -> Result<bool> {
        let (busy, rows): (Vec<_>, Vec<_>) = self.rows.iter().partition(|row| row.unit == BUSY);
        let mut text = format!("Medians of {runs} runs on {}.\n", machine());
        // A table for each other server, and one for the figures that only ours has.
        for other in Kind::ALL.into_iter().skip(1).chain([Kind::Ours]) {
            let mut lines = rows.iter().filter(|row| row.belongs_to(other)).peekable();
            if lines.peek().is_some() {
                let name = if other == Kind::Ours {
                    ""
                } else {
                    other.name()
                };
                writeln!(
                    text,
                    "\n| case | figure | sse-server | {name} | ratio | goal | met |"
                )?;
                writeln!(text, "|---|---|--:|--:|--:|---|---|")?;
            }
            for row in lines {
                writeln!(text, "{}", row.line(other))?;
            }
        }
        let busiest = busy.iter().flat_map(|row| row.values.iter().flatten());
        let busiest = busiest.fold(0.0, |most: f64, share| most.max(*share));
        write!(text, "\nRatio: ours divided by the other's. ")?;
        write!(
            text,
            "The load generator used at most {busiest:.0} % of a core. "
        )?;
        match self.failures.as_str() {
            "" => writeln!(text, "Every subscriber got every event once and in order.")?,
            failures => write!(text, "Failures:\n\n{failures}")?,
        }
        println!("\n{text}");
        let directory = Path::new("target/bench");
        fs::create_dir_all(directory)?;
        fs::write(directory.join("results.md"), text)?;
        fs::write(directory.join("results.svg"), plot(&rows)?)?;
        Ok(self.failures.is_empty())
    }
}

/// How many times better than nchan, a bar for each figure, on a logarithmic scale from a
/// quarter to sixteen times. A mark shows the goal.
fn plot(rows: &[&Row]) -> Result<String> {
    let x = |times: f64| 360.0 + 60.0 * (times.clamp(0.25, 16.0).log2() + 2.0);
    let bars = rows.iter().filter_map(|row| Some((row, row.better()?)));
    let bottom = 60 + 22 * bars.clone().count();
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="24" font-size="16">Times better than nginx with nchan (black mark: goal)</text>
"#,
        bottom + 20
    );
    for times in [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0] {
        let (at, colour) = (x(times), if times == 1.0 { "black" } else { "#ddd" });
        writeln!(svg, r#"<path d="M{at} 54V{bottom}" stroke="{colour}"/>"#)?;
        writeln!(
            svg,
            r#"<text x="{at}" y="48" text-anchor="middle">{times}×</text>"#
        )?;
    }
    for (place, (row, better)) in bars.enumerate() {
        let (top, from, to) = (60 + 22 * place, x(better.min(1.0)), x(better.max(1.0)));
        let (middle, width, after) = (top + 13, to - from, to + 6.0);
        let colour = if better >= 1.0 { "#2a9d5c" } else { "#c8553d" };
        let (case, figure) = (row.case, &row.figure);
        writeln!(
            svg,
            r#"<rect x="{from}" y="{top}" width="{width}" height="17" fill="{colour}"/>
<text x="20" y="{middle}">{case}: {figure}</text><text x="{after}" y="{middle}">{better:.2}×</text>"#
        )?;
        let mark = match goal(Kind::Nchan, row.case, &row.figure) {
            Some(Goal::AtLeast(times)) => x(times),
            Some(Goal::AtMost(times)) => x(1.0 / times),
            _ => continue,
        };
        writeln!(
            svg,
            r#"<path d="M{mark} {top}v17" stroke="black" stroke-width="3"/>"#
        )?;
    }
    Ok(svg + "</svg>\n")
}

impl Row {
    /// Whether the other server has this figure; of ours, whether no other has it.
    fn belongs_to(&self, other: Kind) -> bool {
        match other {
            Kind::Ours => self.values[1..].iter().all(Vec::is_empty),
            _ => !self.values[other as usize].is_empty(),
        }
    }

    fn ratio(&self, other: Kind) -> Option<f64> {
        let [ours, others] = [Kind::Ours, other].map(|kind| median(&self.values[kind as usize]));
        Some(ours? / others?).filter(|_| other != Kind::Ours)
    }

    /// How many times better than nchan: more of a rate, less of anything else.
    fn better(&self) -> Option<f64> {
        let ratio = self.ratio(Kind::Nchan)?;
        Some(if self.unit == "/s" {
            ratio
        } else {
            1.0 / ratio
        })
    }

    fn line(&self, other: Kind) -> String {
        let Self {
            case, figure, unit, ..
        } = self;
        let medians = [Kind::Ours, other].map(|kind| median(&self.values[kind as usize]));
        let show = |value| number(value) + " " + unit;
        let [ours, others] = medians.map(|value| value.map_or("–".into(), show));
        let others = if other == Kind::Ours { "" } else { &others };
        let ratio = self.ratio(other);
        let (goal, met) = match goal(other, case, figure) {
            Some(Goal::AtLeast(least)) => (format!("≥ {least}×"), ratio.map(|r| r >= least)),
            Some(Goal::AtMost(most)) => (format!("≤ {most}×"), ratio.map(|r| r <= most)),
            Some(Goal::Below(most)) => (format!("≤ {most} {unit}"), medians[0].map(|o| o <= most)),
            None => (String::new(), None),
        };
        let met = met.map_or("", |met| if met { "yes" } else { "**no**" });
        let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}×"));
        format!("| {case} | {figure} | {ours} | {others} | {ratio} | {goal} | {met} |")
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Three digits that matter, and a comma between thousands.
pub fn number(value: f64) -> String {
    match value {
        _ if value.abs() < 10.0 => format!("{value:.2}"),
        _ if value.abs() < 100.0 => format!("{value:.1}"),
        _ if value.abs() < 1000.0 => format!("{value:.0}"),
        _ => {
            let digits = format!("{value:.0}");
            let groups = digits.as_bytes().rchunks(3).rev();
            let groups: Vec<_> = groups.map(String::from_utf8_lossy).collect();
            groups.join(",")
        }
    }
}

/// What the figures were measured on.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, |cores| cores.get());
    let version =
        |output: Output| String::from_utf8_lossy(&output.stderr).replace("nginx version: ", "");
    let nginx = Command::new(NGINX)
        .arg("-v")
        .output()
        .map_or("no nginx".into(), version);
    let (kernel, nginx) = (kernel.trim(), nginx.trim());
    format!("{cores} cores, Linux {kernel}, {nginx} with one worker")
}
