//! Engines that are killed at every one of their traced stops: the tree never notices, nothing is left
//! behind, and a second try works.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use crcoord_tests::{DumpOptions, Random, Sandbox, Specimen};

/// How many stops of one flow are tried, spread evenly; `CRCOORD_TEST_EVERY_STOP=1` tries all.
const SAMPLES: u64 = 40;
/// How many killed engines one program must bear before it checks itself.
const KILLS_EACH: u64 = 20;

/// The stops to be killed at, for a flow that has fewer than `bound` of them.
struct Stops {
    next: u64,
    stride: u64,
}

impl Stops {
    fn below(bound: u64, flow: &str) -> Stops {
        let mut random = Random::announced(flow);
        let stride = match std::env::var_os("CRCOORD_TEST_EVERY_STOP") {
            Some(_) => 1,
            None => (bound / SAMPLES).max(1),
        };
        let next = 1 + random.below(stride);
        println!("{flow}: stops {next}, and every {stride} further up to {bound}");
        Stops { next, stride }
    }

    fn take(&mut self) -> u64 {
        let stop = self.next;
        self.next += self.stride;
        stop
    }
}

/// Doubles the number of a stop until `reaches` says that the flow ended before it.
fn bound(mut ends_before: impl FnMut(u64) -> bool) -> u64 {
    let mut stop = 64;
    while !ends_before(stop) {
        stop *= 2;
        assert!(stop < 1 << 24, "the flow has no end");
    }
    stop
}

/// Kills engines that dump `name`, one after the other, until one gets to its end.
fn dump_is_killed(name: &str, leave_running: bool) {
    let flow = format!("dump of {name}, leave running: {leave_running}");
    let options = |kill_at_stop| DumpOptions {
        leave_running,
        kill_at_stop,
        ..DumpOptions::default()
    };
    let bound = bound(|stop| {
        let (specimen, sandbox) = (Specimen::new(name), Sandbox::new());
        let pid = specimen.start(&sandbox);
        let ended = sandbox.dump(pid, &specimen.beside("image"), options(stop));
        !ended.was_killed()
    });
    let mut stops = Stops::below(bound, &flow);
    'programs: loop {
        let (specimen, sandbox) = (Specimen::new(name), Sandbox::new());
        let pid = specimen.start(&sandbox);
        let tree = sandbox.pids();
        for _ in 0..KILLS_EACH {
            let stop = stops.take();
            let what = format!("{flow}, stop {stop}");
            let image = specimen.beside(&format!("image-{stop}"));
            let ended = sandbox.dump(pid, &image, options(stop));
            if !ended.was_killed() {
                ended.done(&what);
                if leave_running {
                    specimen.verify(&what);
                    return;
                }
                sandbox.await_empty(&what);
                let second = Sandbox::new();
                second.restore(&image).done(&what);
                specimen.verify(&what);
                return;
            }
            if image.join("manifest").exists() {
                assert!(!leave_running, "{what}: ended by the seal");
                // It is sealed, hence the end of the tree was ordered, of all at once.
                sandbox.await_empty(&what);
                let second = Sandbox::new();
                second.restore(&image).done(&what);
                specimen.verify(&what);
                continue 'programs;
            }
            sandbox.assert_runs(&what);
            sandbox.await_pids(&format!("{what}: no copy is left"), &tree);
            assert_eq!(sandbox.firewall_tables(), "", "{what}");
            specimen.assert_waits(&what);
        }
        specimen.verify(&format!("{flow}, stops before {}", stops.next));
    }
}

/// Kills engines that restore `name`, one after the other, until one gets to its end.
fn restore_is_killed(name: &str) {
    let flow = format!("restore of {name}");
    let (specimen, sandbox) = (Specimen::new(name), Sandbox::new());
    let pid = specimen.start(&sandbox);
    let image = specimen.beside("image");
    sandbox
        .dump(pid, &image, DumpOptions::default())
        .done(&flow);
    let files = specimen.files();
    let bound = bound(|stop| {
        let sandbox = Sandbox::new();
        let ended = sandbox.restore_killed_at(&image, stop);
        !ended.was_killed()
    });
    specimen.put_back(&files);
    let mut stops = Stops::below(bound, &flow);
    let sandbox = Sandbox::new();
    loop {
        let stop = stops.take();
        let what = format!("{flow}, stop {stop}");
        let ended = sandbox.restore_killed_at(&image, stop);
        if !ended.was_killed() {
            ended.done(&what);
            break;
        }
        sandbox.await_empty(&format!("{what}: nothing half-built survives"));
        assert_eq!(sandbox.firewall_tables(), "", "{what}");
    }
    specimen.verify(&flow);
    sandbox.await_empty(&flow);
}

macro_rules! programs {
    ($($name:ident),*) => {
        mod dump_and_end { $(#[test] fn $name() { super::dump_is_killed(stringify!($name), false); })* }
        mod dump_and_go_on { $(#[test] fn $name() { super::dump_is_killed(stringify!($name), true); })* }
        mod restore { $(#[test] fn $name() { super::restore_is_killed(stringify!($name)); })* }
    };
}

programs!(
    threads,
    sleepers,
    signals,
    registers,
    tcp_pair,
    memory_private,
    tree,
    altstack,
    rseq
);
