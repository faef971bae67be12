//! Fan-out benchmark: this server against others, on one machine, in one run.
//!
//! This process is the load generator, the same for all servers; each server is a child process,
//! started afresh for each case. Every delivery is checked: each subscriber gets every event once
//! and in order, or the case has failed and the benchmark with it.
//!
//! `cargo bench --bench fanout -- [--case NAME,…] [--runs 3] [--only ours,nchan,…] [--seconds 2]`;
//! a NAME that is no case stands for those that begin with it. Or `-- scale`: see `scale.rs`.

mod cases;
mod client;
mod publish;
mod redis;
mod reference;
mod report;
mod scale;
mod servers;

use std::process::ExitCode;
use std::time::Duration;

use cases::{CASES, Case};
use report::Report;
use servers::Kind;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Options {
    cases: Vec<&'static Case>,
    runs: usize,
    kinds: Vec<Kind>,
    time: Duration,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).peekable();
    let outcome = match arguments.peek().map(String::as_str) {
        Some("reference") => reference::serve(),
        Some("scale") => scale::run(),
        Some("herd") => redis::herd(&arguments.nth(1).expect("addresses")).map(|()| true),
        _ => options(arguments).and_then(run),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
            eprintln!("{error}\ncases: {}", names.join(" "));
            ExitCode::from(2)
        }
    }
}

/// False if a case has failed. A goal that is missed is no failure.
fn run(options: Options) -> Result<bool> {
    let mut report = Report::default();
    for run in 0..options.runs {
        for case in &options.cases {
            let mut kinds = options.kinds.clone();
            kinds.retain(|kind| case.kinds.contains(kind));
            if run % 2 == 1 {
                kinds.reverse();
            }
            for kind in kinds {
                eprint!("run {} {:<16} {:<9}", run + 1, case.name, kind.name());
                report.add(case.name, kind, case.measure(kind, options.time));
            }
        }
    }
    report.finish(options.runs)
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        cases: CASES.iter().collect(),
        runs: 3,
        kinds: Kind::ALL.into(),
        time: Duration::from_secs(2),
    };
    while let Some(name) = arguments.next() {
        // cargo adds it.
        if name == "--bench" {
            continue;
        }
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        match (name.as_str(), value.as_str()) {
            ("--case", names) => options.cases = names.split(',').flat_map(named).collect(),
            ("--runs", number) => options.runs = number.parse()?,
            ("--seconds", number) => options.time = Duration::from_secs_f64(number.parse()?),
            ("--only", only) => {
                let named = |kind: &Kind| only.split(',').any(|name| name == kind.name());
                options.kinds.retain(named);
            }
            _ => return Err(format!("unknown: {name} {value}").into()),
        }
    }
    match options.cases.is_empty() || options.kinds.is_empty() {
        true => Err("no such case, or no such server".into()),
        false => Ok(options),
    }
}

fn named(name: &str) -> Vec<&'static Case> {
    let exactly = CASES.iter().find(|case| case.name == name);
    let beginning = || CASES.iter().filter(|case| case.name.starts_with(name));
    exactly.map_or_else(|| beginning().collect(), |case| vec![case])
}
