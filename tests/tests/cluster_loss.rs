//! Nodes that are lost: no restart without a proof of death, and then on a spare, with every byte.

use crcoord_tests::cluster::{Site, node, until};
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

#[test]
fn a_lost_node_needs_a_proof_and_then_a_spare_takes_its_member_again_and_again() {
    let mut site = Site::start("n[1-4]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY);
    let run = work.run(&site, "--nodes n1,n2,n3 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);

    site.must(|cluster| cluster.lose_node(&node("n2")));
    site.until_connected(3);
    site.crcoord("restart --job 42")
        .code(3)
        .says("confirm-dead");
    let resumed = site
        .crcoord("restart --job 42 --json --confirm-dead n2")
        .code(0);
    assert_eq!(resumed.data()["placements"][1]["node"], "n4");
    drop(run);
    work.verify();
    work.await_end();

    work.forget_verdicts();
    until("the job is over", || site.job("42")["state"] == "ended");
    let epoch = site.epochs("42")[0];
    site.crcoord(&format!("restart --job 42 --epoch {epoch}"))
        .code(0);
    work.verify();
}

#[test]
fn a_run_lease_is_proof_enough() {
    let mut site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY[..2]);
    let _run = work.run(&site, "--nodes n1,n2 --network virtual --run-lease 3s");
    site.crcoord("checkpoint --job 42").code(0);
    // Cut off it still runs, until its lease is over.
    site.must(|cluster| cluster.cut_cable(&node("n2")));
    site.until_connected(2);
    until("the lease is over", || {
        let done = site.crcoord("restart --job 42");
        assert!([0, 3].contains(&done.code), "{done:?}");
        done.code == 0
    });
    assert_eq!(site.job("42")["placements"][1]["node"], "n3");
    work.verify();
}

#[test]
fn addresses_of_nodes_are_rewritten_on_both_ends() {
    let mut site = Site::start("n[1-3]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY[..2]);
    let _run = work.run(&site, "--nodes n1,n2 --network host");
    site.crcoord("checkpoint --job 42").code(0);
    work.assert_undisturbed();
    site.must(|cluster| cluster.lose_node(&node("n2")));
    site.until_connected(2);
    let resumed = site
        .crcoord("restart --job 42 --json --confirm-dead n2")
        .code(0);
    assert_eq!(resumed.data()["placements"][1]["node"], "n3");
    work.verify();
}

#[test]
fn a_shared_directory_replaces_copies_on_other_nodes() {
    let settings = ["coordinator.copies = 0", "agent.shared_dir = \"@/shared\""];
    let mut site = Site::build("n[1-3]", &settings);
    std::fs::create_dir(site.path("shared")).expect("the directory is ours");
    site.must(|cluster| cluster.start_all());
    site.until_connected(3);
    let work = Work::new(&site, "42", &["threads", "memory_private"]);
    let _run = work.run(&site, "--nodes n1,n2 --network virtual");
    site.crcoord("checkpoint --job 42").code(0);
    site.must(|cluster| cluster.lose_node(&node("n2")));
    site.until_connected(2);
    site.crcoord("restart --job 42 --confirm-dead n2").code(0);
    work.verify();
}
