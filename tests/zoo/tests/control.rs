//! The control run: every program must pass without any checkpoint, or its failures say nothing.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crcoord_zoo::driver::Run;
use crcoord_zoo::{Entry, parse_listing};

const ZOO: &str = env!("CARGO_BIN_EXE_zoo");
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of its own for each run, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn start(scratch: &Scratch, run: &Run, more: &[&str]) -> Child {
    Command::new(ZOO)
        .args(run.arguments())
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(scratch.0.join("stderr")).unwrap())
        .spawn()
        .unwrap()
}

/// Lets a started program go on and returns why it failed, if it did.
fn finish(run: &Run, mut child: Child) -> Result<(), String> {
    let outcome = run
        .await_ready(PATIENCE)
        .and_then(|pid| {
            assert_eq!(pid, child.id() as i32, "pid in the ready file");
            run.go()
        })
        .and_then(|()| run.await_result(PATIENCE));
    if outcome.is_err() {
        // It may hang; a finished one is not harmed.
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    match outcome {
        Ok(()) if status.success() => Ok(()),
        Ok(()) => Err(format!("ok, but {status}")),
        Err(failure) => Err(format!("{failure} ({status})")),
    }
}

fn listing() -> Vec<Entry> {
    let output = Command::new(ZOO).arg("list").output().unwrap();
    assert!(output.status.success());
    parse_listing(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

#[test]
fn every_program_passes_without_a_checkpoint() {
    let entries = listing();
    assert!(!entries.is_empty());
    let mut failures = Vec::new();
    for entry in &entries {
        let scratch = Scratch::new(&entry.name);
        let run = Run::new(&scratch.0, &entry.name);
        let child = start(&scratch, &run, &[]);
        if let Err(reason) = finish(&run, child) {
            failures.push(format!("{}: {reason}", entry.name));
        }
    }
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn names_are_unique_and_wrong_usage_is_refused() {
    let mut names: Vec<String> = listing().into_iter().map(|entry| entry.name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
    for wrong in [
        &["no_such_noun"][..],
        &["pipes", "--ready", "relative"],
        &[],
    ] {
        let output = Command::new(ZOO).args(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn two_sides_of_tcp_peer_agree_over_a_network() {
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let address = address.to_string();
    let (first, second) = (Scratch::new("peer-listen"), Scratch::new("peer-connect"));
    let runs = [
        Run::new(&first.0, "tcp_peer"),
        Run::new(&second.0, "tcp_peer"),
    ];
    let listening = start(&first, &runs[0], &["--listen", &address]);
    let connecting = start(&second, &runs[1], &["--connect", &address]);
    for run in &runs {
        run.await_ready(PATIENCE).unwrap();
        run.go().unwrap();
    }
    finish(&runs[0], listening).unwrap();
    finish(&runs[1], connecting).unwrap();
}
