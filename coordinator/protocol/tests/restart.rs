//! Restarts in virtual time: proofs of death, placement, rollback.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use crcoord_common::ids::{Epoch, Incarnation};
use crcoord_common::report::Class;
use crcoord_common::wire::client::{Event, JobState, Phase, Request};
use crcoord_common::wire::control::{FromAgent, Source, ToAgent};
use crcoord_common::wire::member::MemberNetwork;
use crcoord_protocol::{Proof, Record};
use support::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const ALL: [&str; 4] = ["n1", "n2", "n3", "n4"];
const LEASE_MS: u64 = 10_000;

/// A job on n1, n2, n3 with one committed epoch, n4 being spare.
fn world(lease_ms: Option<u64>) -> World {
    let mut world = World::new(&ALL);
    world.run(&NODES, lease_ms);
    world.checkpoint();
    world
}

fn resumed(world: &World, client: crcoord_protocol::ClientId) -> Vec<String> {
    match world.result(client) {
        Some(Event::Resumed { placements, .. }) => {
            placements.iter().map(|at| at.node.to_string()).collect()
        }
        other => panic!("not resumed: {other:?}"),
    }
}

#[test]
fn the_old_incarnation_is_ended_before_the_new_one_is_built() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    let kills = world.take_orders();
    assert_eq!(names(&kills), ["kill"; 3]);
    for kill in &kills[..2] {
        world.answer(kill, FromAgent::Killed);
    }
    assert_eq!(count(&world.take_orders(), "build"), 0, "one may still run");
    world.answer(&kills[2], FromAgent::Killed);
    let builds = world.pump(|order| name_of(order) == "build");
    assert_eq!(builds.len(), 3);
    for build in &builds[..2] {
        world.answer(build, healthy(build).remove(0));
    }
    assert!(
        world.take_orders().is_empty(),
        "no resume before all are built"
    );
    world.answer(&builds[2], healthy(&builds[2]).remove(0));
    assert_eq!(world.pump(|order| name_of(order) == "resume").len(), 3);
    assert!(world.result(client).is_none());
}

#[test]
fn a_restart_ends_with_the_job_running_under_the_next_incarnation() {
    let mut world = world(None);
    world.advance(7_000);
    let client = world.ask(restart(&[], &[]));
    world.pump(|_| false);
    let Some(Event::Resumed {
        incarnation,
        epoch,
        lost_seconds,
        ..
    }) = world.result(client)
    else {
        panic!("not resumed");
    };
    assert_eq!(
        (*incarnation, *epoch, *lost_seconds),
        (Incarnation(2), Epoch(1), 7)
    );
    let phases: Vec<Phase> = world
        .events(client)
        .into_iter()
        .filter_map(|event| match event {
            Event::Phase { phase } => Some(*phase),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [Phase::Fence, Phase::Build, Phase::Resume]);
    assert_eq!(world.show().state, JobState::Running);
    assert_eq!(world.checkpoint(), Epoch(2));
}

#[test]
fn each_step_is_journalled_before_its_orders() {
    let mut world = world(None);
    world.ask(restart(&[], &[]));
    let kills = world.take_orders();
    world.writes = false;
    for kill in &kills {
        world.answer(kill, FromAgent::Killed);
    }
    assert!(matches!(
        world.unwritten.back(),
        Some((_, Record::Restarting { .. }))
    ));
    assert_eq!(count(&world.take_orders(), "build"), 0);
    world.write();
    let builds: Vec<Order> = world.take_orders();
    assert_eq!(count(&builds, "build"), 3);
    for build in builds.iter().filter(|order| name_of(order) == "build") {
        world.answer(build, healthy(build).remove(0));
    }
    assert_eq!(count(&world.take_orders(), "resume"), 0);
    world.write();
    assert_eq!(count(&world.take_orders(), "resume"), 3);
}

#[test]
fn a_lost_node_is_replaced_by_the_spare_once_its_run_lease_has_run_out() {
    for (numbered, leases) in [(true, 1), (false, 2)] {
        lost_node_is_replaced(numbered, leases);
    }
}

fn lost_node_is_replaced(numbered: bool, leases: u64) {
    let mut world = World::new(&ALL);
    world.numbered = numbered;
    world.run(&NODES, Some(LEASE_MS));
    world.checkpoint();
    world.advance(3_000);
    world.disconnect("n2");
    let lost = world.now;
    let client = world.ask(restart(&[], &[]));
    let builds = loop {
        let builds = world.pump(|order| name_of(order) == "build");
        if !builds.is_empty() {
            break builds;
        }
        let result = world.result(client);
        assert!(result.is_none(), "{result:?}");
        world.advance(100);
    };
    let waited = world.now.since(lost);
    let least = leases * LEASE_MS + world.settings.run_lease_margin_ms;
    assert!((least..least + 1_000).contains(&waited), "{waited} ms");
    let proofs = world.journal.iter().filter_map(|record| match record {
        Record::MemberGone { proof, .. } => Some(*proof),
        _ => None,
    });
    assert_eq!(proofs.filter(|proof| *proof == Proof::RunLease).count(), 1);
    let nodes: Vec<String> = builds.iter().map(|order| order.node.to_string()).collect();
    assert_eq!(nodes, ["n1", "n4", "n3"]);
    let ToAgent::Build {
        restore, capsule, ..
    } = &builds[1].body
    else {
        unreachable!()
    };
    assert!(
        matches!(&restore.sources[..], [Source::Partner { node, .. }] if node.as_str() == "n3")
    );
    assert_eq!(capsule.hostname, "n2", "the host name is kept for life");
    let ToAgent::Build { restore, .. } = &builds[0].body else {
        unreachable!()
    };
    assert_eq!(restore.sources.first(), Some(&Source::Own));
    for build in &builds {
        world.answer(build, healthy(build).remove(0));
    }
    world.pump(|_| false);
    assert_eq!(resumed(&world, client), ["n1", "n4", "n3"]);
}

#[test]
fn run_leases_are_renewed_with_every_heartbeat_but_not_for_the_doomed() {
    let mut world = world(Some(LEASE_MS));
    world.advance(1_000);
    assert_eq!(count(&world.take_orders(), "run-lease"), 3);
    world.disconnect("n2");
    world.ask(restart(&[], &[]));
    world.take_orders();
    world.advance(3_000);
    assert_eq!(count(&world.take_orders(), "run-lease"), 0);
}

#[test]
fn without_a_proof_the_restart_is_refused_and_nothing_is_touched() {
    let mut world = world(None);
    world.disconnect("n2");
    world.advance(1_000_000);
    let client = world.ask(restart(&[], &[]));
    assert_eq!(world.codes(client), ["restart-not-proven-dead"]);
    let Some(Event::Failed(reports)) = world.result(client) else {
        unreachable!()
    };
    assert_eq!(reports[0].class, Class::Obstacle);
    assert_eq!(reports[0].place.node, Some(node("n2")));
    assert!(
        reports[0].remedy.contains("--confirm-dead n2"),
        "{}",
        reports[0].remedy
    );
    assert_eq!(count(&world.take_orders(), "kill"), 0);
    assert_eq!(world.show().state, JobState::Unknown);
}

#[test]
fn an_operators_word_is_a_proof_and_a_users_is_not() {
    let mut world = world(None);
    world.disconnect("n2");
    let user = world.ask_as(1000, restart(&[], &["n2"]));
    assert_eq!(world.codes(user), ["restart-word-denied"]);
    let client = world.ask(restart(&[], &["n2"]));
    world.pump(|_| false);
    assert_eq!(resumed(&world, client), ["n1", "n4", "n3"]);
}

#[test]
fn a_word_does_not_replace_the_kill_where_the_agent_answers() {
    let mut world = world(None);
    world.ask(restart(&[], &["n1", "n2", "n3"]));
    assert_eq!(names(&world.take_orders()), ["kill"; 3]);
}

#[test]
fn a_member_that_comes_back_after_it_was_declared_dead_is_ended() {
    let mut world = world(None);
    world.disconnect("n2");
    let client = world.ask(restart(&[], &["n2"]));
    world.pump(|_| false);
    resumed(&world, client);
    let job = world.show().job;
    let key = crcoord_common::ids::MemberKey {
        job,
        incarnation: Incarnation(1),
        member: crcoord_common::ids::MemberId(1),
    };
    world.connect("n2", vec![running(&key)]);
    let kills = world.pump(|order| name_of(order) == "kill");
    assert_eq!(key_of(&kills[0]), Some(&key));
    assert_eq!(world.show().state, JobState::Running);
}

#[test]
fn a_failed_build_ends_the_half_built_and_a_second_try_works() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    let builds = world.pump(|order| name_of(order) == "build");
    world.answer(&builds[0], healthy(&builds[0]).remove(0));
    world.answer(&builds[1], refused());
    assert_eq!(world.codes(client), ["test-failed"]);
    let kills = world.pump(|order| name_of(order) == "kill");
    assert_eq!(kills.len(), 3);
    let second = world.ask(restart(&[], &[]));
    assert_eq!(
        count(&world.take_orders(), "build"),
        0,
        "half-built trees are ended first"
    );
    for kill in &kills {
        world.answer(kill, FromAgent::Killed);
    }
    world.pump(|_| false);
    let Some(Event::Resumed { incarnation, .. }) = world.result(second) else {
        panic!("not resumed");
    };
    assert_eq!(*incarnation, Incarnation(3), "numbers are not used again");
}

#[test]
fn an_agent_lost_while_building_rolls_back_and_needs_no_proof_for_what_never_ran() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    world.pump(|order| name_of(order) == "build");
    world.disconnect("n2");
    assert_eq!(world.codes(client), ["agent-lost"]);
    world.pump(|_| false);
    let second = world.ask(restart(&[], &[]));
    world.pump(|_| false);
    assert_eq!(resumed(&world, second), ["n1", "n4", "n3"]);
}

#[test]
fn an_agent_lost_while_resuming_needs_a_proof() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    world.pump(|order| name_of(order) == "resume");
    world.disconnect("n2");
    assert_eq!(world.codes(client), ["agent-lost"]);
    world.pump(|_| false);
    let second = world.ask(restart(&[], &[]));
    assert_eq!(world.codes(second), ["restart-not-proven-dead"]);
}

#[test]
fn a_member_that_ends_while_others_resume_fails_the_restart() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    let resumes = world.pump(|order| name_of(order) == "resume");
    let key = key_of(&resumes[0]).unwrap().clone();
    world.event("n1", ended(&key, 1));
    assert_eq!(world.codes(client), ["member-ended"]);
    assert_eq!(count(&world.take_orders(), "kill"), 2);
}

#[test]
fn a_build_that_shows_no_progress_fails() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    world.pump(|order| name_of(order) == "build");
    world.advance(world.settings.build_ms);
    assert_eq!(world.codes(client), ["restart-deadline"; 3]);
}

#[test]
fn a_kill_that_fails_ends_the_restart() {
    let mut world = world(None);
    let client = world.ask(restart(&[], &[]));
    let kills = world.take_orders();
    world.answer(&kills[0], refused());
    assert_eq!(world.codes(client), ["test-failed"]);
    // What was to be ended is told so again.
    world.advance(1_000);
    assert!(count(&world.take_orders(), "kill") > 0);
}

#[test]
fn without_a_commit_without_a_spare_or_with_wrong_nodes_it_is_refused_by_name() {
    let mut world = World::new(&NODES);
    world.run(&NODES, Some(LEASE_MS));
    let client = world.ask(restart(&[], &[]));
    assert_eq!(world.codes(client), ["epoch-not-committed"]);
    world.checkpoint();
    let client = world.ask(restart(&["n1", "n1", "n9"], &[]));
    assert_eq!(
        world.codes(client),
        ["placement-node-twice", "node-not-connected"]
    );
    world.disconnect("n2");
    let client = world.ask(restart(&[], &[]));
    assert_eq!(world.codes(client), ["restart-no-spare"]);
    let client = world.ask(Request::Restart {
        job: "43".parse().unwrap(),
        epoch: None,
        nodes: Vec::new(),
        confirmed_dead: Vec::new(),
        attach: false,
    });
    assert_eq!(world.codes(client), ["job-unknown"]);
}

#[test]
fn virtual_addresses_move_with_their_members() {
    let mut world = world(Some(LEASE_MS));
    let before: Vec<_> = world
        .show()
        .placements
        .iter()
        .map(|at| at.address)
        .collect();
    let client = world.ask(restart(&["n2", "n3", "n4"], &[]));
    let builds = world.pump(|order| name_of(order) == "build");
    let ToAgent::Build {
        capsule, restore, ..
    } = &builds[0].body
    else {
        unreachable!()
    };
    assert!(restore.addresses.is_empty());
    let expected = MemberNetwork::Virtual {
        address: before[0],
        prefix: 17,
    };
    assert_eq!(capsule.network, expected);
    for build in &builds {
        world.answer(build, healthy(build).remove(0));
    }
    world.pump(|_| false);
    resumed(&world, client);
    let after: Vec<_> = world
        .show()
        .placements
        .iter()
        .map(|at| at.address)
        .collect();
    assert_eq!(before, after);
}

#[test]
fn an_ended_job_is_restarted_after_a_kill_with_commit() {
    let mut world = World::new(&ALL);
    world.run(&NODES, None);
    world.ask(checkpoint(true));
    world.pump(|_| false);
    assert_eq!(world.show().state, JobState::Ended);
    let client = world.ask(restart(&[], &[]));
    world.pump(|_| false);
    resumed(&world, client);
    assert_eq!(world.show().state, JobState::Running);
}

#[test]
fn an_attached_command_sees_the_restarted_job_to_its_end() {
    let mut world = world(None);
    let Request::Restart {
        job,
        epoch,
        nodes,
        confirmed_dead,
        ..
    } = restart(&[], &[])
    else {
        unreachable!()
    };
    let client = world.ask(Request::Restart {
        job,
        epoch,
        nodes,
        confirmed_dead,
        attach: true,
    });
    let resumes = world.pump(|order| name_of(order) == "resume");
    for order in &resumes {
        world.answer(order, FromAgent::Done);
    }
    assert!(world.result(client).is_none());
    for (order, name) in resumes.iter().zip(NODES) {
        world.event(name, ended(key_of(order).unwrap(), 0));
    }
    assert!(
        matches!(world.result(client), Some(Event::JobEnded { statuses }) if statuses.len() == 3)
    );
}
