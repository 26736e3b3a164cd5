//! The benches work: each runs once with small sizes and gives every figure. No time is judged.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

use std::process::{Command, Stdio};

use serde_json::Value;

/// Runs a bench and gives its figures.
fn figures(program: &str, arguments: &[&str]) -> Vec<Value> {
    let output = Command::new(program)
        .args(["--quick", "--json"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program}: {}: {said}",
        output.status
    );
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["schema"], 1);
    let figures = document["data"]["figures"].as_array().unwrap().clone();
    for figure in &figures {
        assert!(figure["ratio"].as_f64().unwrap() > 0.0, "{figure}");
    }
    figures
}

#[test]
fn engine() {
    let figures = figures(env!("CARGO_BIN_EXE_bench-engine"), &[]);
    let subjects = ["32 MiB 4K", "32 MiB THP"];
    for subject in subjects {
        let of_subject = figures.iter().filter(|figure| figure["subject"] == subject);
        assert_eq!(of_subject.count(), 6, "{figures:?}");
    }
    let captures = figures
        .iter()
        .filter(|figure| !figure["freeze_ms"].is_null());
    assert_eq!(captures.count(), 8, "{figures:?}");
    for figure in &figures {
        // Everything but the program's own few pages is the specimen's memory.
        let bytes = figure["bytes"].as_u64().unwrap();
        assert!((32 << 20..36 << 20).contains(&bytes), "{figure}");
    }
}

#[test]
fn transport() {
    let figures = figures(env!("CARGO_BIN_EXE_bench-transport"), &[]);
    assert_eq!(figures.len(), 7, "{figures:?}");
}
