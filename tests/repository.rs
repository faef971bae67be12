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

/// A reviewer can read all of it.
#[test]
fn the_source_has_at_most_800_lines_of_code() {
    let source = files("src", ".rs");
    // The count would be wrong with comments that it does not know.
    assert!(
        source
            .iter()
            .all(|(_, text)| code(text).all(|line| !line.starts_with("/*")))
    );
    let counts: Vec<_> = source
        .iter()
        .map(|(name, text)| (name, code(text).count()))
        .collect();
    let total: usize = counts.iter().map(|(_, count)| count).sum();
    assert!(total <= 800, "{total} lines: {counts:?}");
    // Nor is the count kept down by lines that nobody wants to read.
    for (name, text) in &source {
        let long = text.lines().find(|line| line.chars().count() > 100);
        assert_eq!(long, None, "{name}");
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
        ("rmp_serde", &["src/token.rs"]),
        ("serde", &["src/token.rs"]),
        ("tiny_http", &["src/routes.rs", "src/server.rs"]),
        ("crossbeam_channel", &["src/hub.rs", "src/subscriber.rs"]),
        (
            "parking_lot",
            &[
                "src/hub.rs",
                "src/journal.rs",
                "src/subscriber.rs",
                "src/token.rs",
            ],
        ),
        ("nix", &["src/server.rs"]),
        ("socket2", &["src/server.rs"]),
        ("signal_hook", &["src/main.rs"]),
    ];
    for (crate_name, allowed) in doors {
        let uses = |text: &str| {
            let mut words = code(text).flat_map(|line| {
                line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
            });
            words.any(|word| word.split("::").next() == Some(crate_name))
        };
        let found: Vec<_> = files("src", ".rs")
            .into_iter()
            .filter(|(_, text)| uses(text))
            .collect();
        let found: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert!(!found.is_empty(), "{crate_name} is not used");
        assert!(
            found.iter().all(|name| allowed.contains(name)),
            "{crate_name} in {found:?}"
        );
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

/// Each one is code that its users have to trust.
#[test]
fn the_direct_dependencies_are_those_that_were_agreed() {
    let agreed = [
        "branca",
        "crossbeam-channel",
        "nix",
        "parking_lot",
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
    // The fork's patch releases change its API.
    assert!(manifest.contains(r#"package = "tiny_http_fork", version = "="#));
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
    let readme = fs::read_to_string(root().join("README.md")).expect("a README");
    let is_heading = |line: &&str| line.starts_with('#');
    let mut lines = readme
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
