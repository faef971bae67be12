//! What keeps the repository readable: its size, its doors, its top level, its threat table.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// Every file under a folder, with its path from the root.
fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let skipped = ["node_modules", "target", "__pycache__"].map(Path::new);
            if path.is_dir() && !skipped.contains(&Path::new(path.file_name().unwrap())) {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                let text = fs::read_to_string(&path).unwrap();
                let name = path.strip_prefix(root()).unwrap();
                found.push((name.to_string_lossy().into_owned(), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing under {folder}");
    found
}

/// What `cloc` counts as code: neither blank nor a comment.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with("//"))
}

/// The files of the library in the order of its layers: each knows only those in front of it.
const LAYERS: [&str; 12] = [
    "error",
    "config",
    "event",
    "token",
    "metrics",
    "subscriber",
    "hub",
    "writer",
    "http",
    "relay",
    "routes",
    "server",
];

/// Lines of code in the layer that only the feature `redis` compiles. It is not counted with the
/// library: who does not want it need not read it.
const RELAY_LINES: usize = 200;

/// Lines of code in the library: `src/` without the binary. More than the 1,000 it is to have: see
/// SECURITY.md, under "What is to be trusted".
const LIBRARY_LINES: usize = 1_719;

/// Lines of code in the binary.
const BINARY_LINES: usize = 120;

/// A reviewer can read all of it.
#[test]
fn the_source_has_few_lines_of_code() {
    let source = files("src", ".rs");
    // The count would be wrong with comments that it does not know.
    assert!(
        source
            .iter()
            .all(|(_, text)| code(text).all(|line| !line.starts_with("/*")))
    );
    let counts: Vec<_> = source
        .iter()
        .map(|(name, text)| (name.as_str(), code(text).count()))
        .collect();
    let (binary, others): (Vec<_>, Vec<_>) = counts
        .into_iter()
        .partition(|(name, _)| *name == "src/main.rs");
    let (relay, library): (Vec<_>, Vec<_>) = others
        .into_iter()
        .partition(|(name, _)| *name == "src/relay.rs");
    for (what, counts, most) in [
        ("relay", relay, RELAY_LINES),
        ("library", library, LIBRARY_LINES),
        ("binary", binary, BINARY_LINES),
    ] {
        let total: usize = counts.iter().map(|(_, count)| count).sum();
        println!("  {what}: {total} lines of {most}");
        assert!(total <= most, "{what}: {total} lines: {counts:?}");
        // What is said of it is true.
        for page in ["README.md", ".github/SECURITY.md"] {
            let text = fs::read_to_string(root().join(page)).unwrap();
            let said = what != "library" || text.contains(&format!("{total} lines"));
            assert!(said, "{page} does not say {total} lines");
        }
    }
    // Nor is the count kept down by lines that nobody wants to read.
    for (name, text) in &source {
        let long = text.lines().find(|line| line.chars().count() > 100);
        assert_eq!(long, None, "{name}");
    }
}

/// The files that a file uses: `crate::x`, `crate::{x::…, y}`, and the same from `main.rs`' side.
fn uses(text: &str) -> BTreeSet<String> {
    let text: String = code(text).collect::<Vec<_>>().join(" ");
    let mut used = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            used.extend(first_word(rest));
            continue;
        };
        // The first word behind the brace, and behind each comma that stands in no inner brace.
        let mut depth = 0;
        used.extend(first_word(list));
        for (at, letter) in list.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => used.extend(first_word(&list[at + 1..])),
                _ => {}
            }
        }
    }
    used
}

fn first_word(text: &str) -> Option<String> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let word = &text[..end.unwrap_or(text.len())];
    (!word.is_empty()).then(|| word.to_string())
}

#[test]
fn the_reader_of_uses_sees_every_form() {
    let text = "use crate::config::Config;\nuse crate::{error::Refusal, event::{Event, Topic},\n\
                hub};\nlet x = crate::token::open(); // crate::none\n// crate::routes\n\
                use {crate::writer, std::fmt};\n";
    let text = text.replace(" // crate::none", "");
    let expected = ["config", "error", "event", "hub", "token", "writer"];
    assert_eq!(uses(&text), expected.map(String::from).into());
}

/// What stands in a circle can only be understood as a whole.
#[test]
fn each_file_knows_only_the_layers_in_front_of_it() {
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules: Vec<_> = code(&library)
        .filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            line.strip_prefix("mod ")?.strip_suffix(';')
        })
        .collect();
    assert_eq!(modules, LAYERS);
    for (number, layer) in LAYERS.iter().enumerate() {
        let text = fs::read_to_string(root().join(format!("src/{layer}.rs"))).unwrap();
        let below: BTreeSet<_> = LAYERS[..number].iter().map(ToString::to_string).collect();
        let above: Vec<_> = uses(&text).difference(&below).cloned().collect();
        assert!(above.is_empty(), "src/{layer}.rs uses {above:?}");
        // Then nothing else leads from one file to another.
        for other in ["super::", "mod ", "include!(", "extern crate"] {
            assert!(
                !code(&text).any(|line| line.contains(other)),
                "{other} in src/{layer}.rs"
            );
        }
    }
    // There is no other file, and the binary is no part of the library.
    let names = files("src", ".rs").into_iter().map(|(name, _)| name);
    let known = LAYERS.iter().chain(&["lib", "main"]);
    let known: BTreeSet<_> = known.map(|name| format!("src/{name}.rs")).collect();
    assert_eq!(names.collect::<BTreeSet<_>>(), known);
    let binary = fs::read_to_string(root().join("src/main.rs")).unwrap();
    assert!(uses(&binary).is_empty(), "{:?}", uses(&binary));
}

/// An alert is written from the README.
#[test]
fn the_readme_says_what_each_family_of_metrics_means() {
    let page = fs::read_to_string(root().join("src/metrics.prom")).unwrap();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, table) = readme.split_once("\n## Metrics\n").expect("a section");
    let (table, _) = table.split_once("\n## ").expect("another one");
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let families: Vec<_> = families.filter_map(first_word).collect();
    assert!(families.len() > 10);
    for family in families {
        let named = [format!("`{family}`"), format!("`{family}{{")];
        assert!(named.iter().any(|it| table.contains(it)), "{family}");
    }
}

#[test]
fn the_source_has_no_unsafe_code_and_no_tests_inside() {
    for (name, text) in files("src", ".rs") {
        for word in [
            "unsafe {",
            "unsafe fn",
            "unsafe impl",
            "cfg(test)",
            "#[test]",
            "#[allow(",
        ] {
            assert!(
                !code(&text).any(|line| line.contains(word)),
                "{word} in {name}"
            );
        }
    }
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    assert!(code(&library).any(|line| line == "#![forbid(unsafe_code)]"));
}

/// Who looks for what a library does here has one place to look.
#[test]
fn each_dependency_has_one_door() {
    let doors = [
        ("branca", &["src/token.rs"][..]),
        (
            "crossbeam-channel",
            &["src/hub.rs", "src/server.rs", "src/subscriber.rs"],
        ),
        ("log", &["src/config.rs", "src/main.rs", "src/metrics.rs"]),
        (
            "parking_lot",
            &[
                "src/http.rs",
                "src/hub.rs",
                "src/relay.rs",
                "src/subscriber.rs",
            ],
        ),
        ("orion", &["src/token.rs"]),
        ("redis", &["src/relay.rs"]),
        ("rlimit", &["src/main.rs", "src/server.rs"]),
        ("rmp-serde", &["src/token.rs"]),
        ("serde", &["src/token.rs"]),
        ("signal-hook", &["src/main.rs"]),
        ("socket2", &["src/server.rs"]),
        ("tiny_http", &["src/http.rs", "src/routes.rs"]),
    ];
    // Every dependency has a row.
    let known = doors.iter().map(|(name, _)| name.to_string());
    assert_eq!(names_in("dependencies"), known.collect());
    for (name, allowed) in doors {
        let crate_name = name.replace('-', "_");
        // A path into the crate, or a use of all of it.
        let uses = |text: &str| {
            let mut words = code(text).flat_map(|line| {
                line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
            });
            let path = format!("{crate_name}::");
            words.any(|word| word.starts_with(&path))
                || code(text).any(|line| line == format!("use {crate_name};"))
        };
        let found: Vec<_> = files("src", ".rs")
            .into_iter()
            .filter(|(_, text)| uses(text))
            .collect();
        let found: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(found, allowed, "{crate_name}");
        // Beside the name in Cargo.toml stands what it is for, and where.
        let comment = comment_of(name);
        assert!(comment.len() > 20, "{crate_name}: {comment:?}");
    }
}

/// Whoever clones it sees what it is; everything else has its place under tests.
#[test]
fn the_top_level_holds_only_what_was_agreed() {
    let agreed = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "Makefile",
        "README.md",
        "src",
        "tests",
    ];
    // Built, and ignored by git.
    let built = ["target"];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = agreed.contains(&&*name) || built.contains(&&*name);
        assert!(known || name.starts_with('.'), "{name}");
    }
    for name in agreed {
        assert!(root().join(name).exists(), "{name} is missing");
    }
}

/// The names in one table of Cargo.toml.
fn names_in(table: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let lines = manifest
        .lines()
        .skip_while(|line| *line != format!("[{table}]"))
        .skip(1);
    let lines = lines.take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split_once(" = "));
    names
        .filter(|(name, _)| !name.starts_with('#'))
        .map(|(name, _)| name.into())
        .collect()
}

/// The comment in front of a dependency in Cargo.toml, or of the group that it stands in.
fn comment_of(name: &str) -> String {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let before = manifest.lines().collect::<Vec<_>>();
    let at = before
        .iter()
        .position(|line| line.starts_with(&format!("{name} = ")));
    let before = before[..at.expect(name)].iter().rev();
    let is_comment = |line: &&&str| line.starts_with('#');
    let comment = before.skip_while(|line| !is_comment(line) && !line.is_empty());
    let mut lines: Vec<_> = comment.take_while(is_comment).copied().collect();
    lines.reverse();
    lines.join("\n")
}

/// Each one is code that its users have to trust.
#[test]
fn the_direct_dependencies_are_those_that_were_agreed() {
    let agreed = [
        "branca",
        "crossbeam-channel",
        "log",
        "orion",
        "parking_lot",
        "redis",
        "rlimit",
        "rmp-serde",
        "serde",
        "signal-hook",
        "socket2",
        "tiny_http",
    ];
    assert_eq!(names_in("dependencies"), agreed.map(String::from).into());
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for other in ["[build-dependencies", "[target.", "[dependencies."] {
        assert!(!manifest.contains(other), "{other}");
    }
    // The default build has no part in what is optional.
    let optional: Vec<_> = manifest
        .lines()
        .filter(|line| line.contains("optional"))
        .filter_map(first_word)
        .collect();
    assert_eq!(optional, ["redis"]);
    assert!(!manifest.contains("\ndefault = "), "a default feature");
    // Each as it was published, from the registry.
    for other in ["package =", "git =", "path = \"../", "[patch", "[replace"] {
        assert!(!manifest.contains(other), "{other}");
    }
}

/// The crate's own copy is compiled and run as a test.
#[test]
fn the_readme_shows_the_embedding_example_of_the_crate() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("```rust\n").expect("a block in Rust");
    let (shown, _) = rest.split_once("```").unwrap();
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let lines = library.lines().filter_map(|line| line.strip_prefix("//!"));
    let lines = lines.map(|line| line.strip_prefix(' ').unwrap_or(line));
    let example = lines.skip_while(|line| *line != "```").skip(1);
    let example = example.take_while(|line| *line != "```");
    // A line that only the test needs is hidden in the crate's documentation.
    let example: Vec<_> = example.filter(|line| !line.starts_with("# ")).collect();
    assert_eq!(shown.trim_end(), example.join("\n"));
}

/// A defence that no test shows is a claim. The table's last column names the tests.
#[test]
fn every_test_that_the_threat_table_names_exists() {
    let mut tests = BTreeSet::new();
    for (_, text) in [files("tests", ".rs"), files("tests", ".py")].concat() {
        for line in text.lines().map(str::trim_start) {
            let rest = line.strip_prefix("fn ").or(line.strip_prefix("def "));
            tests.extend(
                rest.and_then(|rest| rest.split(['(', '<']).next())
                    .map(String::from),
            );
        }
    }
    let security = fs::read_to_string(root().join(".github/SECURITY.md")).unwrap();
    let is_heading = |line: &&str| line.starts_with('#');
    let mut lines = security
        .lines()
        .skip_while(|line| !is_heading(line) || !line.to_lowercase().contains("threat"));
    lines.next().expect("a heading with the word threat");
    let rows = lines
        .take_while(|line| !is_heading(line))
        .filter(|line| line.starts_with('|'));
    let mut named = 0;
    // Without the table's own head and the line under it.
    for row in rows.skip(2) {
        let cell = row
            .trim_end()
            .trim_end_matches('|')
            .rsplit('|')
            .next()
            .unwrap();
        let names: Vec<_> = cell.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test in the row {row}");
        for name in names {
            assert!(tests.contains(name), "no test is called {name}: {row}");
            named += 1;
        }
    }
    assert!(named >= 10, "only {named} tests are named");
}
