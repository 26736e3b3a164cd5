//! A process that writes a store and a journal is killed with -9 at many points: what it was promised
//! is there afterwards, and nothing half.

// Helpers outside of test functions unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crcoord_store::{DirectoryStore, ImageStore, Journal, Kind, PartState};
use support::*;

const DIRECTORY: &str = "CRCOORD_TEST_STORE";

fn say(what: &str, number: u64) {
    // The test harness's own capture would keep `println!` back.
    let mut out = std::io::stdout();
    writeln!(out, "\nstep {what} {number}")
        .and_then(|()| out.flush())
        .unwrap();
}

fn memory_of(epoch: u64) -> Memory {
    let mut memory = memory(30);
    for n in 0..5 {
        memory.insert((epoch * 5 + n) % 30, window(epoch * 100 + n));
    }
    memory
}

#[test]
#[ignore = "the body of the child that the other test kills"]
fn child() {
    let root = std::env::var(DIRECTORY).expect("only the other test starts this one");
    let root = Path::new(&root);
    let store = DirectoryStore::open(&root.join("store"), Kind::Local).unwrap();
    let journal = Journal::open(&root.join("journal")).unwrap();
    for epoch in journal.last().unwrap().0 + 1.. {
        let staged = store.stage(&part(epoch, 0)).unwrap();
        say("staged", epoch);
        let entries = write(staged.clone(), &memory_of(epoch)).unwrap();
        say("written", epoch);
        staged.seal(&encode(entries, None)).unwrap();
        say("sealed", epoch);
        journal.append(&[epoch]).unwrap();
        say("journalled", epoch);
        store.commit(&part(epoch, 0), b"record").unwrap();
        say("committed", epoch);
        if epoch > 2 {
            store.remove(&part(epoch - 2, 0)).unwrap();
            say("removed", epoch - 2);
        }
    }
}

#[test]
fn what_was_promised_is_there_after_a_kill() {
    for kill_after in (1..60).step_by(2) {
        let root = tempfile::tempdir().unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .env(DIRECTORY, root.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut steps = lines
            .map(Result::unwrap)
            .filter_map(|line| line.strip_prefix("step ").map(str::to_owned));
        let mut seen: Vec<String> = steps.by_ref().take(kill_after).collect();
        process.kill().unwrap();
        process.wait().unwrap();
        // Steps said between the last one read and the kill count as well.
        seen.extend(steps);
        assert!(seen.len() >= kill_after, "{seen:?}");
        let last = |what: &str| {
            let numbers = seen
                .iter()
                .filter_map(|step| step.strip_prefix(what)?.trim().parse().ok());
            numbers.max().unwrap_or(0u64)
        };
        let (sealed, committed, removed) = (last("sealed"), last("committed"), last("removed"));
        let journal = Journal::open(&root.path().join("journal"));
        if last("journalled") > 0 {
            let count = journal.unwrap().verify().unwrap();
            assert!(
                (last("journalled")..=sealed).contains(&count),
                "{count} {seen:?}"
            );
        }
        let store: Arc<dyn ImageStore> =
            Arc::new(DirectoryStore::open(&root.path().join("store"), Kind::Local).unwrap());
        let parts = store.parts().unwrap();
        for epoch in removed + 2..=sealed {
            let state = &parts
                .iter()
                .find(|p| p.part.epoch.0 == epoch)
                .unwrap()
                .state;
            if epoch <= committed {
                assert_eq!(state, &PartState::Committed, "{epoch} {seen:?}");
            }
        }
        for found in &parts {
            assert!(found.part.epoch.0 > removed, "{found:?} {seen:?}");
            assert_eq!(load(&store, &found.part), memory_of(found.part.epoch.0));
        }
        assert!(
            !files(root.path())
                .iter()
                .any(|file| file.contains(".staging"))
        );
        let next = part(sealed + 2, 0);
        save(&*store, &next, &memory_of(sealed + 2)).unwrap();
        assert_eq!(load(&store, &next), memory_of(sealed + 2));
    }
}
