//! A job's ordinary life on real daemons: run, checkpoint, kill, restart, and what is told about it.

use crcoord_tests::cluster::{Site, until};
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

#[test]
fn a_killed_job_goes_on_from_the_newest_and_from_an_older_epoch() {
    let site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");

    let first = site.crcoord("checkpoint --job 42 --json").code(0);
    assert_eq!(first.data()["epoch"]["epoch"], 1);
    site.crcoord("checkpoint --job 42").code(0);
    assert_eq!(site.epochs("42"), [1, 2]);
    let checked = site.crcoord("check --job 42 --json").code(0);
    assert_eq!(checked.data().as_array().map(Vec::len), Some(3));

    site.crcoord("kill --job 42").code(0);
    run.end().code(137);
    work.await_end();
    work.assert_undisturbed();
    assert_eq!(site.job("42")["state"], "ended");

    for (flags, epoch) in [("--epoch 1", 1), ("", 2)] {
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
