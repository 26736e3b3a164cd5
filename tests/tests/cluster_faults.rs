//! Daemons that are killed in each phase of a checkpoint: the job is never left frozen nor harmed, the
//! epoch is aborted, the one before stays, and the next one commits.

use crcoord_common::exit::ExitCode;
use crcoord_common::wire::client::Phase;
use crcoord_tests::cluster::{Site, node};
use crcoord_tests::cluster_phase::Still;
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

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
        match still.end() {
            Err(failure) => assert_eq!(
                failure.exit_code(),
                ExitCode::Aborted,
                "{phase:?}: {failure}"
            ),
            Ok(info) => panic!("{phase:?}: epoch {} committed without an agent", info.epoch),
        }
        work.await_thaw();
        work.assert_undisturbed();
        site.must(|cluster| cluster.start_agent(&node("n3")));
        site.until_connected(3);
        let epochs = site.epochs("42");
        assert_eq!(epochs.last(), Some(&(still.epoch - 1)), "{phase:?}: {epochs:?}");
        site.crcoord("checkpoint --job 42").code(0);
    }
    work.assert_undisturbed();
    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    site.crcoord("restart --job 42").code(0);
    work.verify();
}
