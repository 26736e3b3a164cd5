//! The coordinator is killed and started again, jobs start and end: the journal and the agents'
//! Hellos give the state back.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use crcoord_common::ids::{Epoch, Incarnation, MemberId, MemberKey, PartKey, Term};
use crcoord_common::wire::client::{Event, JobState, Request};
use crcoord_common::wire::control::{FromAgent, MemberState, PartState, ToAgent};
use crcoord_protocol::{Hello, Input, Record, SessionId};
use support::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn key(world: &mut World, incarnation: u32, member: u32) -> MemberKey {
    MemberKey {
        job: world.show().job,
        incarnation: Incarnation(incarnation),
        member: MemberId(member),
    }
}

/// All agents come back with their members of this incarnation.
fn reconnect(world: &mut World, incarnation: u32, epoch: Option<Epoch>) {
    for (member, name) in NODES.iter().enumerate() {
        let key = key(world, incarnation, member as u32);
        let state = MemberState {
            epoch,
            ..running(&key)
        };
        world.connect(name, vec![state]);
    }
}

#[test]
fn an_open_epoch_is_aborted_by_the_next_life_and_committed_ones_stay() {
    for phase in ["preflight", "hold", "capture", "release"] {
        let mut world = World::new(&NODES);
        world.run(&NODES, None);
        world.checkpoint();
        world.ask(checkpoint(false));
        world.pump(|order| name_of(order) == phase);
        world.restart_coordinator();
        assert!(matches!(
            world.journal.last(),
            Some(Record::Abort {
                epoch: Epoch(2),
                ..
            })
        ));
        assert_eq!(world.show().epochs.len(), 1, "{phase}");
        assert_eq!(world.show().state, JobState::Unknown);
        reconnect(&mut world, 1, Some(Epoch(2)));
        assert_eq!(
            world.pump(|order| name_of(order) == "abort").len(),
            3,
            "{phase}"
        );
        assert_eq!(world.show().state, JobState::Running);
        assert_eq!(
            world.checkpoint(),
            Epoch(3),
            "{phase}: numbers are not used again"
        );
    }
}

#[test]
fn a_commit_that_was_not_durable_is_no_commit() {
    let mut world = World::new(&NODES);
    world.run(&NODES, None);
    world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    world.writes = false;
    for order in &releases {
        for body in healthy(order) {
            world.answer(order, body);
        }
    }
    assert!(matches!(
        world.unwritten.back(),
        Some((_, Record::Commit(_)))
    ));
    world.writes = true;
    world.restart_coordinator();
    assert!(world.show().epochs.is_empty());
}

#[test]
fn every_life_has_a_higher_term_and_a_newer_one_is_respected() {
    let mut world = World::new(&NODES);
    assert_eq!(world.machine.term(), Term(1));
    world.restart_coordinator();
    assert_eq!(world.machine.term(), Term(2));
    let hello = Hello {
        bulk: "10.0.0.1:7117".parse().unwrap(),
        term: Term(3),
        members: Vec::new(),
        parts: Vec::new(),
        free_bytes: 0,
    };
    world.input(Input::Connected {
        node: node("n1"),
        session: SessionId(77),
        hello,
    });
    assert!(world.dropped.contains(&SessionId(77)));
}

#[test]
fn a_half_done_start_is_given_up() {
    let mut world = World::new(&NODES);
    world.ask(run(&NODES, None));
    let starts = world.take_orders();
    world.answer(&starts[0], healthy(&starts[0]).remove(0));
    world.restart_coordinator();
    assert!(matches!(
        world.journal.last(),
        Some(Record::JobFailed { .. })
    ));
    reconnect(&mut world, 1, None);
    assert_eq!(world.pump(|order| name_of(order) == "kill").len(), 3);
}

#[test]
fn a_half_done_restart_is_rolled_back() {
    for (phase, may_run) in [("build", false), ("resume", true)] {
        let mut world = World::new(&NODES);
        world.run(&NODES, None);
        world.checkpoint();
        world.ask(restart(&[], &[]));
        world.pump(|order| name_of(order) == phase);
        world.restart_coordinator();
        assert!(
            matches!(world.journal.last(), Some(Record::RestartFailed { .. })),
            "{phase}"
        );
        let client = world.ask(restart(&["n1", "n2", "n3"], &[]));
        let codes = world.codes(client).join(" ");
        assert_eq!(
            codes.contains("restart-not-proven-dead"),
            may_run,
            "{phase}: {codes}"
        );
        reconnect(&mut world, 2, None);
        let kills = world.pump(|order| name_of(order) == "kill");
        assert_eq!(kills.len(), 3, "{phase}");
        for kill in &kills {
            world.answer(kill, FromAgent::Killed);
        }
        let client = world.ask(restart(&[], &[]));
        world.pump(|_| false);
        let Some(Event::Resumed { incarnation, .. }) = world.result(client) else {
            panic!("not resumed");
        };
        assert_eq!(*incarnation, Incarnation(3));
    }
}

#[test]
fn the_state_is_the_same_after_a_replay() {
    let mut world = World::new(&["n1", "n2", "n3", "n4"]);
    world.run(&NODES, Some(10_000));
    for _ in 0..3 {
        world.checkpoint();
    }
    world.ask(restart(&["n2", "n3", "n4"], &[]));
    world.pump(|_| false);
    world.checkpoint();
    let before = world.show();
    world.restart_coordinator();
    let after = world.show();
    assert_eq!(before.epochs, after.epochs);
    assert_eq!(before.placements, after.placements);
    assert_eq!(
        (before.incarnation, before.ended),
        (after.incarnation, after.ended)
    );
}

#[test]
fn a_run_lease_counts_from_the_start_of_the_next_life() {
    let mut world = World::new(&["n1", "n2", "n3", "n4"]);
    world.run(&NODES, Some(10_000));
    world.checkpoint();
    world.restart_coordinator();
    for (member, name) in [(0, "n1"), (2, "n3")] {
        let key = key(&mut world, 1, member);
        world.connect(name, vec![running(&key)]);
    }
    world.connect("n4", Vec::new());
    let client = world.ask(restart(&[], &[]));
    while world.result(client).is_none() {
        world.advance(100);
        world.pump(|_| false);
    }
    assert!(matches!(world.result(client), Some(Event::Resumed { .. })));
    assert!(world.now.0 >= 25_000, "{}", world.now);
}

#[test]
fn parts_are_compared_with_the_journal() {
    let mut world = World::new(&NODES);
    world.run(&NODES, None);
    for _ in 0..3 {
        world.checkpoint();
    }
    let job = world.show().job;
    let part = |epoch, committed| PartState {
        part: PartKey {
            job: job.clone(),
            epoch: Epoch(epoch),
            member: MemberId(0),
        },
        committed,
    };
    world.disconnect("n1");
    world.pump(|_| false);
    let hello = Hello {
        bulk: "10.0.0.1:7117".parse().unwrap(),
        term: Term(1),
        members: vec![running(&MemberKey {
            job: job.clone(),
            incarnation: Incarnation(1),
            member: MemberId(0),
        })],
        parts: vec![part(1, true), part(2, false), part(3, true), part(9, false)],
        free_bytes: 0,
    };
    world.input(Input::Connected {
        node: node("n1"),
        session: SessionId(77),
        hello,
    });
    let orders = world.take_orders();
    let told: Vec<(&str, u64)> = orders
        .iter()
        .map(|order| match &order.body {
            ToAgent::Retire { part } => ("retire", part.epoch.0),
            ToAgent::Commit { part, .. } => ("commit", part.epoch.0),
            other => panic!("{other:?}"),
        })
        .collect();
    // Epoch 1 is retired, 2 lacks its record, 3 is well, 9 is unknown and left alone.
    assert_eq!(told, [("retire", 1), ("commit", 2)]);
}

#[test]
fn a_silent_agent_is_dropped_after_the_heartbeat_timeout() {
    let mut world = World::new(&NODES);
    world.run(&NODES, None);
    let session = world.sessions[&node("n2")];
    // It is connected but sends nothing any more.
    world.sessions.remove(&node("n2"));
    world.advance(world.settings.heartbeat_timeout_ms + 1);
    assert!(world.dropped.contains(&session));
    assert_eq!(world.show().state, JobState::Unknown);
    assert_eq!(world.dropped.len(), 1);
}

#[test]
fn a_failed_start_ends_what_was_started_and_frees_the_id() {
    let mut world = World::new(&NODES);
    let client = world.ask(run(&NODES, None));
    let starts = world.take_orders();
    world.answer(&starts[0], healthy(&starts[0]).remove(0));
    world.answer(&starts[1], refused());
    assert_eq!(world.codes(client), ["test-failed"]);
    let kills = world.pump(|order| name_of(order) == "kill");
    assert_eq!(kills.len(), 2, "what was refused never was");
    for kill in &kills {
        world.answer(kill, FromAgent::Killed);
    }
    world.run(&NODES, None);
}

#[test]
fn bad_runs_are_refused_with_all_reasons() {
    let mut world = World::new(&NODES);
    let client = world.ask(run(&["n1", "n1", "n9"], Some(10)));
    let mut codes = world.codes(client);
    codes.sort_unstable();
    assert_eq!(
        codes,
        [
            "node-not-connected",
            "placement-node-twice",
            "run-lease-short"
        ]
    );
    world.run(&NODES, None);
    let again = world.ask(run(&NODES, None));
    assert_eq!(world.codes(again), ["job-exists"]);
}

#[test]
fn an_end_is_journalled_before_the_agent_may_forget_it() {
    let mut world = World::new(&NODES);
    world.run(&NODES, None);
    let attached = world.ask(Request::Attach {
        job: "42".parse().unwrap(),
    });
    for (member, name) in NODES.iter().enumerate() {
        let key = key(&mut world, 1, member as u32);
        world.writes = false;
        world.event(name, ended(&key, member as i32));
        assert_eq!(count(&world.take_orders(), "forget"), 0);
        world.write();
        assert_eq!(count(&world.take_orders(), "forget"), 1);
        world.writes = true;
        // Told again, it may be forgotten at once.
        world.event(name, ended(&key, member as i32));
        assert_eq!(count(&world.take_orders(), "forget"), 1);
    }
    let Some(Event::JobEnded { statuses }) = world.result(attached) else {
        panic!("not ended");
    };
    assert_eq!(statuses.len(), 3);
    assert_eq!(world.show().state, JobState::Ended);
}

#[test]
fn a_user_sees_his_own_jobs_only() {
    let mut world = World::new(&NODES);
    let mine = world.ask_as(1000, run(&NODES, None));
    world.pump(|_| false);
    assert!(world.result(mine).is_some());
    for (uid, count) in [(0, 1), (1000, 1), (1001, 0)] {
        let client = world.ask_as(uid, Request::List);
        let Some(Event::Jobs(jobs)) = world.result(client) else {
            panic!("not listed");
        };
        assert_eq!(jobs.len(), count, "uid {uid}");
    }
    assert_eq!(world.machine.job_owner(&"42".parse().unwrap()), Some(1000));
}

#[test]
fn output_goes_to_all_who_are_attached_and_to_nobody_else() {
    let mut world = World::new(&NODES);
    let runner = world.run(&NODES, None);
    let attached = world.ask(Request::Attach {
        job: "42".parse().unwrap(),
    });
    let listens = |world: &mut World| {
        let orders = std::mem::take(&mut world.orders);
        let on = orders.iter().filter_map(|order| match order.body {
            ToAgent::Listen { on, .. } => Some(on),
            _ => None,
        });
        on.collect::<Vec<bool>>()
    };
    assert_eq!(listens(&mut world), [true; 3]);
    let key = key(&mut world, 1, 0);
    let output = FromAgent::Output {
        key,
        stream: 1,
        bytes: b"hello".to_vec(),
    };
    world.event("n1", output);
    let of = |client| {
        let output = world
            .told
            .iter()
            .filter(|(to, event, _)| *to == client && matches!(event, Event::Output { .. }));
        output.count()
    };
    assert_eq!((of(attached), of(runner)), (1, 0));
    world.input(Input::Left { client: attached });
    assert_eq!(listens(&mut world), [false; 3]);
}

#[test]
fn a_check_names_nodes_that_do_not_answer() {
    let mut world = World::new(&NODES);
    let client = world.ask(Request::Check {
        nodes: ["n1", "n2", "n9"].map(node).to_vec(),
    });
    let checks = world.take_orders();
    assert_eq!(checks.len(), 2);
    world.answer(&checks[0], healthy(&checks[0]).remove(0));
    assert!(world.result(client).is_none());
    world.advance(10_000);
    let Some(Event::Findings(findings)) = world.result(client) else {
        panic!("not answered");
    };
    let found: Vec<_> = findings.iter().map(|one| one.code.as_str()).collect();
    assert_eq!(found, ["node-not-connected", "agent-lost"]);
}
