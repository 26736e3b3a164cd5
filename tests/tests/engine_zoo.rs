//! Every program of the zoo through the engine: ended and restored, twice; left running; restored
//! from an image of a program that ran on. What is refused so far is refused by name and unharmed.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use crcoord_tests::{DumpOptions, Sandbox, Specimen, specimen};
use crcoord_zoo::Fate;

const LEAVE_RUNNING: DumpOptions = DumpOptions {
    leave_running: true,
    reset_external_tcp: false,
    kill_at_stop: 0,
};

/// Dumps and restores twice over, each time in a fresh namespace, the first time after a dump that
/// left it running; the program then checks itself.
fn survives(specimen: &Specimen) {
    let mut sandbox = Sandbox::new();
    let pid = specimen.start(&sandbox);
    let image = specimen.beside("image-0");
    sandbox.dump(pid, &image, LEAVE_RUNNING).done("round 0");
    for round in 1..=2 {
        let image = specimen.beside(&format!("image-{round}"));
        let what = format!("round {round}");
        sandbox
            .dump(pid, &image, DumpOptions::default())
            .done(&what);
        sandbox.await_empty(&what);
        assert_eq!(sandbox.firewall_tables(), "", "{what}");
        sandbox = Sandbox::new();
        sandbox.restore(&image).done(&what);
        assert!(sandbox.proc(pid).exists(), "{what}: pid {pid} is back");
    }
    sandbox.assert_runs("restored");
    specimen.verify("restored twice");
    sandbox.await_empty("verified");
}

/// Dumps a program that runs on: it must see nothing. Its image is restored afterwards, unless what
/// the program did to its files since makes that meaningless.
fn runs_on(specimen: &Specimen, restorable: bool) {
    let image = specimen.beside("image");
    let sandbox = Sandbox::new();
    let pid = specimen.start(&sandbox);
    sandbox
        .dump(pid, &image, LEAVE_RUNNING)
        .done("left running");
    sandbox.assert_runs("left running");
    assert_eq!(sandbox.firewall_tables(), "");
    let files = specimen.files();
    specimen.verify("left running");
    sandbox.await_empty("left running");
    if !restorable {
        return;
    }
    specimen.put_back(&files);
    let second = Sandbox::new();
    second.restore(&image).done("second life");
    specimen.verify("second life");
    second.await_empty("second life");
}

/// An engine that does not support the noun must say so by name and leave the program alone.
fn refused(specimen: &Specimen) {
    let image = specimen.beside("image");
    let sandbox = Sandbox::new();
    let pid = specimen.start(&sandbox);
    let ended = sandbox.dump(pid, &image, DumpOptions::default());
    ended.refused("later noun", &format!("pid {pid}"));
    assert!(!image.join("manifest").exists());
    sandbox.assert_runs("refused");
    specimen.verify("refused");
}

macro_rules! zoo {
    (
        supported: $($supported:ident $(($unrestorable:literal))?),*;
        later: $($later:ident),*;
        unprivileged: $($unprivileged:ident),*;
    ) => {
        mod ended_and_restored {
            $(#[test] fn $supported() {
                super::survives(&super::Specimen::new(stringify!($supported)));
            })*
        }

        mod left_running {
            $(#[test] fn $supported() {
                let reasons: &[&str] = &[$($unrestorable)?];
                super::runs_on(&super::Specimen::new(stringify!($supported)), reasons.is_empty());
            })*
        }

        mod later {
            $(#[test] fn $later() {
                super::refused(&super::Specimen::new(stringify!($later)));
            })*
        }

        /// Programs of an ordinary user; the engine is root.
        mod unprivileged {
            $(#[test] fn $unprivileged() {
                for user in [1000, 65534] {
                    super::survives(&super::Specimen::of_user(stringify!($unprivileged), Some(user)));
                }
            })*
        }

        #[test]
        fn the_lists_here_are_those_of_the_zoo() {
            let mut here = vec![
                $((stringify!($supported), Fate::Supported),)*
                $((stringify!($later), Fate::Later),)*
            ];
            let listing = specimen::listing();
            let mut there: Vec<_> = listing
                .iter()
                .map(|entry| (entry.name.as_str(), entry.fate))
                .collect();
            here.sort_by_key(|(name, _)| *name);
            there.sort_by_key(|(name, _)| *name);
            assert_eq!(here, there);
        }
    };
}

zoo! {
    supported:
        memory_private, memory_shared, memory_file("it counts in its file while it waits"), memory_fork_cow,
        threads, registers, altstack, rseq, signals, sleepers, tree,
        files, file_rollback,
        char_devices, pipes, tcp_listen, tcp_pair, tcp_half_closed, tcp_peer, eventfd, epoll,
        itimers, cwd_umask_exe, vdso, timerfd, signalfd;
    later: fifo, unix_socketpair;
    unprivileged: memory_private, threads, signals, pipes, tcp_pair, tree;
}
