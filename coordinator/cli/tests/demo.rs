//! The whole demo, small: a job on three nodes loses one and ends with the same bits; nothing is left
//! behind when it is interrupted. Needs the right to make namespaces and says so.
#![allow(clippy::unwrap_used)]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SMALL: [&str; 3] = ["demo", "--size", "512"];

fn processes_of(session: u32) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap();
    let stats =
        entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok());
    // pid (name) state ppid pgrp ...: the name may hold anything, also parentheses.
    stats
        .filter(|stat| {
            let (_, fields) = stat.rsplit_once(')').unwrap();
            fields.split_whitespace().nth(2) == Some(&session.to_string())
        })
        .count()
}

/// Plays the demo and checks what it says of itself.
fn play(mut command: Command) {
    let output = command.args(SMALL).arg("--json").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the demo needs namespaces: {errors}"
    );
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["kind"], "demo");
    let data = &document["data"];
    assert_eq!(data["bits_different"], 0);
    assert_eq!(data["node_lost"], "n2");
    assert_eq!(data["nodes"], serde_json::json!(["n1", "n4", "n3"]));
    assert_eq!(data["epochs"].as_array().unwrap().len(), 2);
    assert!(data["longest_freeze_us"].as_u64().unwrap() > 0);
}

#[test]
fn a_job_that_lost_a_node_ends_with_the_same_bits() {
    play(Command::new(env!("CARGO_BIN_EXE_crcoord")));
}

#[test]
fn the_same_without_root_in_a_user_namespace() {
    const NOBODY: u32 = 65_534;
    // Nobody may not be allowed to look into the build's directory.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("crcoord");
    std::fs::copy(env!("CARGO_BIN_EXE_crcoord"), &program).unwrap();
    let mut command = Command::new(program);
    command.current_dir("/");
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    play(command);
}

#[test]
fn an_interrupted_demo_takes_everything_with_it() {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_crcoord"))
        .args(SMALL)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first line is written when the cluster runs.
    let mut lines = std::io::BufReader::new(demo.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
    assert!(
        line.starts_with("cluster "),
        "the demo needs namespaces: {line:?}"
    );

    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", demo.id()));
    let world: u32 = children
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        processes_of(world) > 10,
        "head, nodes and daemons are in the world's group"
    );
    let pid = rustix::process::Pid::from_raw(demo.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));

    let deadline = Instant::now() + Duration::from_secs(20);
    while processes_of(world) > 0 {
        assert!(Instant::now() < deadline, "processes of the demo are left");
        std::thread::yield_now();
    }
    assert!(!std::path::Path::new("/run/crcoord-demo").exists());
}
