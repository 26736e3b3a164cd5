//! A job's ordinary life on real daemons: run, checkpoint, kill, restart, and what is told about it.

use crcoord_common::wire::client::Phase;
use crcoord_tests::cluster::{Site, until};
use crcoord_tests::cluster_phase::Still;
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

#[test]
fn a_killed_job_goes_on_from_the_newest_and_from_an_older_epoch() {
    let site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");

    let first = site.crcoord("checkpoint --job 42 --json").code(0);
    let first = first.data()["epoch"]["epoch"].as_u64().expect("a number");
    site.crcoord("checkpoint --job 42").code(0);
    let newest = site.epochs("42")[1];
    assert_eq!(site.epochs("42"), [first, newest]);
    let checked = site.crcoord("check --job 42 --json").code(0);
    assert_eq!(checked.data().as_array().map(Vec::len), Some(3));

    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    work.await_end();
    work.assert_undisturbed();
    assert_eq!(site.job("42")["state"], "ended");

    for (flags, epoch) in [(format!("--epoch {first}"), first), (String::new(), newest)] {
        let resumed = site
            .crcoord(&format!("restart --job 42 --json {flags}"))
            .code(0);
        assert_eq!(resumed.data()["epoch"], epoch);
        assert_eq!(site.job("42")["state"], "running");
        work.verify();
        work.await_end();
        work.forget_verdicts();
    }
    let status = site.crcoord("status --json").code(0).data();
    assert_eq!(status["jobs"][0]["incarnation"], 3);
    until("the job is listed as ended", || {
        site.crcoord("list").code(0).output.contains("ended")
    });
}

#[test]
fn run_returns_the_programs_status() {
    let site = Site::start("n1", &[]);
    for (job, program, status) in [
        ("1", "exit 0", 0),
        ("2", "exit 7", 7),
        ("3", "kill -TERM $$", 143),
        ("4", "kill -KILL $$", 137),
    ] {
        for network in ["host", "virtual"] {
            let words =
                format!("run --job {job}.{network} --nodes n1 --network {network} -- sh -c");
            let done = site.begin_with(
                &words,
                &[&format!("echo out; echo err >&2; {program}")],
                |_| {},
            );
            let done = done.end().code(status).says("err");
            assert_eq!(done.output, "out\n", "{network}: {program}");
        }
    }
    site.crcoord("run --job 5 --nodes n1 -- /does/not/exist")
        .code(125);
    site.crcoord("run --job 6 --nodes n9 -- true").code(125);
}

#[test]
fn kill_after_a_checkpoint_comes_after_its_commit() {
    let site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let mut run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    let mut still = Still::of_last_checkpoint(&site, "42", Phase::Stream);
    assert!(!run.has_ended());
    for member in 0..3 {
        assert!(
            !work.threads(member).is_empty(),
            "member {member} ended before the commit"
        );
    }
    still.go_on();
    still.end().unwrap_or_else(|failure| panic!("{failure}"));
    run.end().code(137);
    work.await_end();
    work.assert_undisturbed();
    assert_eq!(site.epochs("42"), [still.epoch]);
    site.crcoord("restart --job 42").code(0);
    work.verify();
}

/// What a test runner leaves open must not be shared with the tree.
const CLOSE_THE_TESTS_DESCRIPTORS: &str = "for entry in /proc/$$/fd/*; do number=${entry##*/}; \
    case $number in 0|1|2) ;; *) eval \"exec $number>&-\" ;; esac; done;";

#[test]
fn a_tree_that_was_started_by_hand_is_adopted() {
    let site = Site::start("n[1-2]", &[]);
    let work = Work::new(&site, "43", &["threads"]);
    let output = std::fs::File::create(site.path("by-hand")).expect("the directory is ours");
    let mut by_hand = site
        .inside("n1", "setsid")
        .args(["env", "CRCOORD_MEMBER=0", "bash", "-c"])
        .arg(format!("{CLOSE_THE_TESTS_DESCRIPTORS} {}", work.script()))
        .stdout(output.try_clone().expect("a descriptor"))
        .stderr(output)
        .spawn()
        .expect("nsenter (package util-linux) starts");
    let pid = work.await_ready()[0];
    site.crcoord(&format!("checkpoint --job 43 --node n1 --pid {pid}"))
        .code(0);
    work.assert_undisturbed();
    site.crcoord("kill --job 43").code(0);
    by_hand.wait().expect("a child");
    work.await_end();
    site.crcoord("restart --job 43").code(0);
    work.verify();
}
