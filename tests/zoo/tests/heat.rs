//! The heat solver gives the same field, bit for bit, however it is cut up.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const HEAT: &str = env!("CARGO_BIN_EXE_crcoord-heat");

/// Free ports on loopback, all held at once so that they differ.
fn addresses(count: usize) -> Vec<String> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    listeners
        .iter()
        .map(|listener| listener.local_addr().unwrap().to_string())
        .collect()
}

/// Runs all ranks as processes and returns rank 0's hash line and the field.
fn field(ranks: usize, threads: usize) -> (String, Vec<u8>) {
    let output = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("field-{ranks}-{threads}-{}", std::process::id()));
    let progress = output.with_extension("progress");
    let peers = addresses(ranks).join(",");
    let children: Vec<_> = (0..ranks)
        .map(|rank| {
            let mut command = Command::new(HEAT);
            command.args(["--rank", &rank.to_string(), "--peers", &peers]);
            command.args([
                "--size",
                "61",
                "--steps",
                "200",
                "--threads",
                &threads.to_string(),
            ]);
            command.arg("--output").arg(&output);
            if rank == 0 {
                command.arg("--progress").arg(&progress);
            }
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let outputs: Vec<Output> = children
        .into_iter()
        .map(|child| child.wait_with_output().unwrap())
        .collect();
    assert!(
        outputs.iter().all(|output| output.status.success()),
        "{outputs:?}"
    );
    let text = String::from_utf8(outputs[0].stdout.clone()).unwrap();
    let hash = text
        .lines()
        .find(|line| line.starts_with("hash="))
        .unwrap()
        .to_owned();
    let field = fs::read(&output).unwrap();
    assert_eq!(fs::read_to_string(&progress).unwrap(), "step 200\n");
    fs::remove_file(&output).unwrap();
    fs::remove_file(&progress).unwrap();
    (hash, field)
}

#[test]
fn ranks_and_threads_do_not_change_a_bit() {
    let alone = field(1, 1);
    assert_eq!(alone.1.len(), 61 * 61 * 8);
    // Not the initial field: heat has come down from the hot border.
    assert_ne!(alone.1[61 * 8..], vec![0; 60 * 61 * 8][..]);
    assert_eq!(field(3, 2), alone);
    assert_eq!(field(2, 3), alone);
}

#[test]
fn members_are_found_in_the_environment() {
    let output = Command::new(HEAT)
        .args(["--size", "16", "--steps", "3", "--port", "0"])
        .env("CRCOORD_MEMBER", "0")
        .env("CRCOORD_MEMBERS", "1")
        .env("CRCOORD_ADDRESSES", "127.0.0.1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let refused = Command::new(HEAT)
        .args(["--size", "16", "--steps", "3"])
        .env("CRCOORD_MEMBER", "1")
        .env("CRCOORD_ADDRESSES", "127.0.0.1")
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
