//! Daemons that are killed in each phase of a checkpoint: the job is never left frozen nor harmed, the
//! epoch is aborted, the one before stays, and the next one commits.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crcoord::failure::Failure;
use crcoord_common::exit::ExitCode;
use crcoord_common::wire::client::{EpochInfo, Phase};
use crcoord_tests::cluster::{Site, node, until};
use crcoord_tests::cluster_phase::{Still, engine_of, signal};
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

const SIGKILL: i32 = 9;

#[test]
fn an_agent_killed_in_any_phase_costs_only_the_epoch() {
    let mut site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);

    for phase in [Phase::Preflight, Phase::Hold, Phase::Capture, Phase::Stream] {
        // The third member's memory is the largest: it streams longest.
        let mut still = Still::in_phase(&site, "42", phase);
        site.must(|cluster| cluster.kill_agent(&node("n3")));
        still.go_on();
        aborted(still.end(), phase);
        work.await_thaw();
        work.assert_undisturbed();
        site.must(|cluster| cluster.start_agent(&node("n3")));
        site.until_connected(3);
        let epochs = site.epochs("42");
        assert_eq!(
            epochs.last(),
            Some(&(still.epoch - 1)),
            "{phase:?}: {epochs:?}"
        );
        site.crcoord("checkpoint --job 42").code(0);
    }
    work.assert_undisturbed();
    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    site.crcoord("restart --job 42").code(0);
    work.verify();
}

#[test]
fn an_engine_killed_in_a_hold_costs_only_the_epoch() {
    let site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);

    for phase in [Phase::Capture] {
        for (name, member) in [("n1", 0), ("n3", 2)] {
            let mut still = Still::in_phase(&site, "42", phase);
            let agent = site.agent_of(name);
            until("the member is held", || work.is_frozen(member));
            let engine = engine_of(agent).expect("a held member has an engine");
            signal(engine, SIGKILL);
            still.go_on();
            aborted(still.end(), phase);
            work.await_thaw();
            work.assert_undisturbed();
            site.crcoord("checkpoint --job 42").code(0);
        }
    }
    work.assert_undisturbed();
    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    site.crcoord("restart --job 42").code(0);
    work.verify();
}

#[test]
fn a_coordinator_killed_in_a_checkpoint_leaves_no_job_frozen_and_reuses_no_number() {
    let mut site = Site::start("n[1-3]", &["coordinator.hold_lease = \"2s\""]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);

    for phase in [Phase::Capture, Phase::Stream] {
        let still = Still::in_phase(&site, "42", phase);
        if phase == Phase::Capture {
            until("all members are held", || {
                (0..3).all(|member| work.is_frozen(member))
            });
        }
        site.must(|cluster| cluster.kill_coordinator());
        // Nobody renews the hold: it ends by its lease.
        work.await_thaw();
        work.assert_undisturbed();
        site.must(|cluster| cluster.start_coordinator());
        site.until_connected(3);
        let epochs = site.epochs("42");
        assert_eq!(
            epochs.last(),
            Some(&(still.epoch - 1)),
            "{phase:?}: {epochs:?}"
        );
        let next = site.crcoord("checkpoint --job 42 --json").code(0).data();
        let next = next["epoch"]["epoch"].as_u64();
        assert!(
            next > Some(still.epoch),
            "{phase:?}: {next:?} after {}",
            still.epoch
        );
    }
    // It was cut off from its coordinator: it failed, and the job runs on.
    run.end().code(125);
    work.assert_undisturbed();
    site.crcoord("kill --job 42").code(0);
    work.await_end();
    site.crcoord("restart --job 42").code(0);
    work.verify();
}

#[test]
fn a_store_that_fills_up_while_pages_are_streamed_costs_only_the_epoch() {
    let mut site = Site::build("n[1-3]", &[]);
    let store = site.path("private/store");
    let mounted = site
        .inside("n3", "mount")
        .args(["--mkdir", "-t", "tmpfs", "-o", "size=128M", "none"])
        .arg(&store)
        .status()
        .expect("nsenter (package util-linux) starts");
    assert!(mounted.success(), "mounting a small store: {mounted}");
    site.must(|cluster| cluster.start_all());
    site.until_connected(3);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);

    let mut still = Still::in_phase(&site, "42", Phase::Capture);
    // Not the store's own, like what every filesystem has in its root.
    let filler = site.path_in("n3", &store.join("lost+found"));
    std::fs::create_dir(&filler).expect("the store is there");
    let filler = filler.join("filler");
    fill(&filler);
    still.go_on();
    let failure = aborted(still.end(), Phase::Stream);
    assert!(
        failure.contains("agent-store-full") && failure.contains("n3"),
        "{failure}"
    );
    work.await_thaw();
    work.assert_undisturbed();
    assert_eq!(site.epochs("42").last(), Some(&(still.epoch - 1)));
    // With room again the next one commits; before, its obstacle is told and nothing is frozen.
    site.crcoord("checkpoint --job 42").code(3);
    std::fs::remove_file(&filler).expect("it was written");
    until("the agent sees the room", || {
        site.crcoord("checkpoint --job 42").code == 0
    });
    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    site.crcoord("restart --job 42").code(0);
    work.verify();
}

fn aborted(outcome: Result<EpochInfo, Failure>, phase: Phase) -> String {
    match outcome {
        Ok(info) => panic!("{phase:?}: epoch {} committed", info.epoch),
        Err(failure) => {
            assert_eq!(
                failure.exit_code(),
                ExitCode::Aborted,
                "{phase:?}: {failure}"
            );
            failure.to_string()
        }
    }
}

/// Writes a file until the filesystem is full.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("the store is there");
    let block = vec![0; 1 << 16];
    let error = loop {
        if let Err(error) = file.write_all(&block) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
}
