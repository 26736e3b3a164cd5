//! Checkpoints in virtual time: the commit, every way to an abort, leases, retention.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use crcoord_common::ids::Epoch;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, Phase, Request};
use crcoord_common::wire::control::{CopyTarget, FromAgent, Preflight, ToAgent};
use crcoord_common::wire::member::{ExitStatus, MemberCommit, Replica};
use crcoord_protocol::{Input, Record};
use support::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn world() -> World {
    let mut world = World::new(&NODES);
    world.run(&NODES, None);
    world
}

/// The orders of each phase, and whether an abort in it has frozen anything.
const PHASES: [&str; 4] = ["preflight", "hold", "capture", "release"];

#[test]
fn all_members_go_through_all_phases_and_only_then_it_is_committed() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    for phase in PHASES {
        let orders = world.take_orders();
        assert_eq!(names(&orders), [phase; 3]);
        for (index, order) in orders.iter().enumerate() {
            assert!(
                world.orders.is_empty(),
                "{phase}: nobody goes on before all have answered"
            );
            if index == 2 {
                assert!(world.result(client).is_none());
            }
            for body in healthy(order) {
                world.answer(order, body);
            }
        }
    }
    let Some(Event::Committed(info)) = world.result(client) else {
        panic!("not committed");
    };
    assert_eq!((info.epoch, info.members.len()), (Epoch(1), 3));
    assert_eq!(info.members[0].freeze_us, 5);
    let phases: Vec<Phase> = world
        .events(client)
        .into_iter()
        .filter_map(|event| match event {
            Event::Phase { phase } => Some(*phase),
            _ => None,
        })
        .collect();
    use Phase::*;
    assert_eq!(phases, [Preflight, Hold, Capture, Stream, Commit]);
    assert_eq!(
        names(&world.take_orders()),
        ["commit"; 3],
        "a copy beside every part"
    );
}

#[test]
fn a_part_is_copied_to_the_next_node_of_the_ring() {
    let mut world = world();
    world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    let partners: Vec<String> = releases
        .iter()
        .map(|order| match &order.body {
            ToAgent::Release { copies, .. } => match &copies[..] {
                [CopyTarget::Partner { node, .. }] => node.to_string(),
                other => panic!("{other:?}"),
            },
            _ => unreachable!(),
        })
        .collect();
    assert_eq!(partners, ["n2", "n3", "n1"]);
}

#[test]
fn a_job_on_one_node_is_committed_with_a_note() {
    let mut world = World::new(&NODES);
    world.run(&["n1"], None);
    let client = world.ask(checkpoint(false));
    world.pump(|_| false);
    let Some(Event::Committed(info)) = world.result(client) else {
        panic!("not committed");
    };
    assert_eq!(info.notes[0].code, "epoch-single-copy");
}

#[test]
fn the_shared_directory_is_a_second_place() {
    let mut settings = settings();
    settings.shared = true;
    let mut world = World::with(settings, &NODES);
    world.run(&["n1"], None);
    let client = world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    let ToAgent::Release { copies, .. } = &releases[0].body else {
        unreachable!()
    };
    assert_eq!(copies[..], [CopyTarget::Shared]);
    for body in healthy(&releases[0]) {
        world.answer(&releases[0], body);
    }
    let Some(Event::Committed(info)) = world.result(client) else {
        panic!("not committed");
    };
    assert!(info.notes.is_empty());
}

#[test]
fn nothing_is_sent_or_told_before_its_record_is_durable() {
    let mut world = world();
    world.writes = false;
    let client = world.ask(checkpoint(false));
    assert!(
        world.take_orders().is_empty(),
        "no preflight before the intent"
    );
    assert!(world.events(client).is_empty());
    world.write();
    let preflights = world.take_orders();
    assert_eq!(names(&preflights), ["preflight"; 3]);
    let mut orders = preflights;
    while names(&orders) != ["release"; 3] {
        for order in &orders {
            for body in healthy(order) {
                world.answer(order, body);
            }
        }
        orders = world.take_orders();
    }
    for order in &orders {
        for body in healthy(order) {
            world.answer(order, body);
        }
    }
    assert!(matches!(
        world.unwritten.back(),
        Some((_, Record::Commit(_)))
    ));
    assert!(
        world.take_orders().is_empty(),
        "no commit copy before the commit"
    );
    assert!(world.result(client).is_none());
    let (sequence, _) = world.unwritten.back().unwrap();
    let later = crcoord_protocol::Sequence(sequence.0 + 1);
    world.input(Input::Persisted(later));
    assert!(
        world.result(client).is_none(),
        "a number that was never given out confirms nothing"
    );
    world.write();
    assert!(matches!(world.result(client), Some(Event::Committed(_))));
    assert_eq!(names(&world.take_orders()), ["commit"; 3]);
}

#[test]
fn a_failure_in_any_phase_aborts_for_all() {
    for phase in PHASES {
        let mut world = world();
        let client = world.ask(checkpoint(false));
        let orders = world.pump(|order| name_of(order) == phase);
        assert_eq!(orders.len(), 3, "{phase}");
        world.answer(&orders[1], refused());
        for order in [&orders[0], &orders[2]] {
            for body in healthy(order) {
                world.answer(order, body);
            }
        }
        let codes = world.codes(client);
        assert_eq!(codes, ["epoch-aborted", "test-failed"], "{phase}");
        let aborts = world.pump(|order| name_of(order) == "abort");
        assert_eq!(aborts.len(), 3, "{phase}");
        assert!(
            world
                .journal
                .iter()
                .any(|record| matches!(record, Record::Abort { .. }))
        );
        assert!(world.show().epochs.is_empty());
    }
}

#[test]
fn a_lost_agent_in_any_phase_aborts_for_all_and_is_told_when_it_comes_back() {
    for phase in PHASES {
        let mut world = world();
        let client = world.ask(checkpoint(false));
        let orders = world.pump(|order| name_of(order) == phase);
        let key = key_of(&orders[1]).unwrap().clone();
        world.disconnect("n2");
        assert_eq!(
            world.codes(client),
            ["epoch-aborted", "agent-lost"],
            "{phase}"
        );
        let aborts = world.pump(|order| name_of(order) == "abort");
        assert_eq!(aborts.len(), 2, "{phase}");
        world.connect("n2", vec![running(&key)]);
        let aborts = world.pump(|order| name_of(order) == "abort");
        assert_eq!(aborts.len(), 1, "{phase}");
        assert_eq!(world.checkpoint(), Epoch(2), "numbers are not used again");
    }
}

#[test]
fn a_member_that_ends_in_any_phase_aborts_with_that_as_the_reason() {
    for phase in PHASES {
        let mut world = world();
        let client = world.ask(checkpoint(false));
        let orders = world.pump(|order| name_of(order) == phase);
        let key = key_of(&orders[1]).unwrap().clone();
        world.event("n2", ended(&key, 3));
        assert_eq!(
            world.codes(client),
            ["epoch-aborted", "member-ended"],
            "{phase}"
        );
        let Some(Event::Failed(reports)) = world.result(client) else {
            unreachable!()
        };
        assert_eq!(reports[0].class, Class::Aborted);
        assert!(
            reports[1].message.contains("exited with code 3"),
            "{}",
            reports[1]
        );
        let rest = world.pump(|order| name_of(order) == "abort");
        assert_eq!(rest.len(), 3);
    }
}

#[test]
fn all_obstacles_of_all_members_are_told_at_once_and_nothing_is_frozen() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    let orders = world.take_orders();
    for order in &orders[..2] {
        let findings = vec![Report::new("test-obstacle", Class::Obstacle, "io_uring")];
        let preflight = Preflight {
            findings,
            ..Preflight::default()
        };
        world.answer(order, FromAgent::Preflighted(preflight));
    }
    assert!(
        world.result(client).is_none(),
        "the third may have some, too"
    );
    world.answer(&orders[2], FromAgent::Preflighted(Preflight::default()));
    assert_eq!(world.codes(client), ["test-obstacle"; 2]);
    assert_eq!(count(&world.take_orders(), "hold"), 0);
}

#[test]
fn answers_of_an_aborted_epoch_do_not_move_the_next_one() {
    let mut world = world();
    world.ask(checkpoint(false));
    let old = world.pump(|order| name_of(order) == "hold");
    world.answer(&old[0], refused());
    world.pump(|_| false);
    let client = world.ask(checkpoint(false));
    let new = world.pump(|order| name_of(order) == "hold");
    assert_eq!(new.len(), 3);
    world.answer(&new[0], FromAgent::Held { freeze_us: 1 });
    for order in &old {
        world.answer(order, FromAgent::Held { freeze_us: 1 });
    }
    // A repeated answer counts once as well.
    world.answer(&new[0], FromAgent::Held { freeze_us: 1 });
    assert!(world.take_orders().is_empty(), "two members are not held");
    for order in &new[1..] {
        world.answer(order, FromAgent::Held { freeze_us: 1 });
    }
    world.pump(|_| false);
    assert!(matches!(world.result(client), Some(Event::Committed(_))));
}

#[test]
fn answers_from_the_wrong_node_or_term_are_not_believed() {
    let mut world = world();
    world.ask(checkpoint(false));
    let holds = world.pump(|order| name_of(order) == "hold");
    let mut forged = holds[0].clone();
    forged.node = node("n2");
    forged.session = holds[1].session;
    world.answer(&forged, FromAgent::Held { freeze_us: 1 });
    let mut stale = holds[0].clone();
    stale.term.0 -= 1;
    world.answer(&stale, FromAgent::Held { freeze_us: 1 });
    for order in &holds[1..] {
        world.answer(order, FromAgent::Held { freeze_us: 1 });
    }
    assert!(world.take_orders().is_empty(), "member 0 has not answered");
}

#[test]
fn holds_are_renewed_while_members_wait_for_a_slow_one() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    let captures = world.pump(|order| name_of(order) == "capture");
    for _ in 0..30 {
        world.advance(1_000);
        let rest = world.pump(|_| false);
        assert!(rest.is_empty());
    }
    assert!(world.result(client).is_none(), "30 s are three leases");
    for order in &captures {
        world.answer(order, healthy(order).remove(0));
    }
    world.pump(|_| false);
    assert!(matches!(world.result(client), Some(Event::Committed(_))));
}

#[test]
fn a_renewal_that_is_not_answered_ends_the_epoch_before_the_lease_does() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    world.pump(|order| name_of(order) == "capture");
    let begun = world.now;
    while world.result(client).is_none() {
        world.advance(100);
        world.pump(|order| name_of(order) == "renew" && order.node == node("n2"));
    }
    assert_eq!(world.codes(client), ["epoch-aborted", "epoch-hold-lost"]);
    assert!(world.now.since(begun) <= world.settings.hold_lease_ms);
}

#[test]
fn no_job_is_held_beyond_the_maximum() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    world.pump(|order| name_of(order) == "capture");
    let begun = world.now;
    while world.result(client).is_none() {
        world.advance(100);
        world.pump(|_| false);
    }
    assert!(world.now.since(begun) <= world.settings.hold_maximum_ms + 100);
    assert_eq!(world.codes(client)[0], "epoch-aborted");
    assert!(!world.codes(client).contains(&"agent-lost"));
}

#[test]
fn a_hold_lost_poisons_the_epoch_even_after_the_capture() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    let captures = world.pump(|order| name_of(order) == "capture");
    world.answer(&captures[0], healthy(&captures[0]).remove(0));
    let key = key_of(&captures[0]).unwrap().clone();
    let report = Report::new("agent-hold-expired", Class::Aborted, "the lease ended");
    let lost = FromAgent::HoldLost {
        key,
        epoch: Epoch(1),
        report,
    };
    world.event("n1", lost.clone());
    assert_eq!(world.codes(client), ["epoch-aborted", "agent-hold-expired"]);
    world.pump(|_| false);
    let client = world.ask(checkpoint(false));
    world.pump(|order| name_of(order) == "capture");
    world.event("n1", lost);
    assert!(world.result(client).is_none(), "it was of the epoch before");
}

#[test]
fn a_stalled_stream_is_aborted_and_a_slow_one_is_not() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    for order in &releases {
        world.answer(order, FromAgent::Released { frozen_us: 1 });
    }
    for step in 1..10 {
        world.advance(world.settings.seal_ms / 2);
        for (order, name) in releases.iter().zip(NODES) {
            let progress = FromAgent::Progress {
                key: key_of(order).unwrap().clone(),
                epoch: Epoch(1),
                done_bytes: step,
                total_bytes: 100,
            };
            world.event(name, progress);
        }
        assert!(world.result(client).is_none());
    }
    world.advance(world.settings.seal_ms);
    let codes = world.codes(client);
    assert_eq!(codes[1..], ["epoch-stream-stalled"; 3]);
}

#[test]
fn a_seal_without_the_copies_asked_for_is_no_seal() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    let member = key_of(&releases[0]).unwrap().member;
    let commit = MemberCommit {
        replicas: vec![Replica::Node(node("n1"))],
        ..sealed(member, &node("n1"), &[])
    };
    world.answer(&releases[0], FromAgent::Sealed { commit });
    assert_eq!(world.codes(client), ["epoch-aborted", "epoch-copy-missing"]);
    let orders = world.take_orders();
    assert_eq!((count(&orders, "abort"), count(&orders, "retire")), (3, 3));
}

#[test]
fn a_second_checkpoint_is_refused_while_one_is_open() {
    let mut world = world();
    world.ask(checkpoint(false));
    let second = world.ask(checkpoint(false));
    assert_eq!(world.codes(second), ["epoch-open"]);
    world.pump(|_| false);
    assert_eq!(world.checkpoint(), Epoch(2));
}

#[test]
fn a_checkpoint_needs_all_members() {
    let mut world = world();
    world.disconnect("n3");
    let client = world.ask(checkpoint(false));
    assert_eq!(world.codes(client), ["node-not-connected"]);
    assert!(world.take_orders().is_empty());
}

#[test]
fn kill_waits_for_the_commit() {
    let mut world = world();
    world.writes = false;
    let client = world.ask(checkpoint(true));
    world.write();
    let mut orders = world.take_orders();
    while !orders.is_empty() {
        assert_eq!(count(&orders, "kill"), 0);
        for order in &orders {
            for body in healthy(order) {
                world.answer(order, body);
            }
        }
        orders = world.take_orders();
    }
    world.write();
    let kills = world.pump(|order| name_of(order) == "kill");
    assert_eq!(kills.len(), 3);
    assert!(world.result(client).is_none(), "the end is waited for");
    for kill in &kills {
        world.answer(kill, FromAgent::Killed);
    }
    world.write();
    assert!(matches!(world.result(client), Some(Event::Committed(_))));
    assert!(
        world
            .show()
            .ended
            .iter()
            .all(|(_, status)| *status == ExitStatus::Signaled(9))
    );
}

#[test]
fn kill_is_not_carried_out_when_the_epoch_is_aborted() {
    let mut world = world();
    world.ask(checkpoint(true));
    let releases = world.pump(|order| name_of(order) == "release");
    world.answer(&releases[0], refused());
    let rest = world.pump(|order| name_of(order) == "kill");
    assert!(rest.is_empty());
}

#[test]
fn the_two_newest_epochs_are_kept() {
    let mut world = world();
    for number in 1..=4 {
        assert_eq!(world.checkpoint(), Epoch(number));
    }
    let kept: Vec<Epoch> = world
        .show()
        .epochs
        .iter()
        .map(|epoch| epoch.epoch)
        .collect();
    assert_eq!(kept, [Epoch(3), Epoch(4)]);
    // A retirement is journalled before any store hears of it.
    world.ask(checkpoint(false));
    let releases = world.pump(|order| name_of(order) == "release");
    world.writes = false;
    for order in &releases {
        for body in healthy(order) {
            world.answer(order, body);
        }
    }
    world.write();
    assert_eq!(count(&world.take_orders(), "retire"), 0);
    world.write();
    assert_eq!(count(&world.take_orders(), "retire"), 3);
}

#[test]
fn an_abort_by_request_lets_the_job_go() {
    let mut world = world();
    let client = world.ask(checkpoint(false));
    world.pump(|order| name_of(order) == "capture");
    let abort = world.ask(Request::Abort {
        job: "42".parse().unwrap(),
    });
    assert_eq!(world.codes(client), ["epoch-aborted", "job-stopped"]);
    assert_eq!(world.result(abort), Some(&Event::Done));
    assert_eq!(count(&world.take_orders(), "abort"), 3);
}

#[test]
fn no_wait_tells_the_number_and_goes_on() {
    let mut world = world();
    let client = world.ask(Request::Checkpoint {
        job: "42".parse().unwrap(),
        adopt: None,
        kill: false,
        wait: false,
        reset_external_tcp: false,
    });
    assert_eq!(
        world.result(client),
        Some(&Event::Opened { epoch: Epoch(1) })
    );
    world.pump(|_| false);
    assert_eq!(world.show().epochs.len(), 1);
}

#[test]
fn a_survey_freezes_nothing_and_gives_its_number_up() {
    let mut world = world();
    let client = world.ask(Request::CheckJob {
        job: "42".parse().unwrap(),
    });
    let orders = world.pump(|order| !matches!(name_of(order), "preflight"));
    assert_eq!(names(&orders), ["abort"; 3]);
    assert!(matches!(world.result(client), Some(Event::Preflights(all)) if all.len() == 3));
    assert_eq!(world.checkpoint(), Epoch(2));
}

#[test]
fn an_adopted_tree_is_checkpointed_as_its_owner() {
    let mut world = World::new(&NODES);
    let client = world.ask_as(
        7,
        Request::Checkpoint {
            job: "42".parse().unwrap(),
            adopt: Some((node("n1"), 4711)),
            kill: false,
            wait: true,
            reset_external_tcp: false,
        },
    );
    world.pump(|_| false);
    assert!(matches!(world.result(client), Some(Event::Committed(_))));
    let info = world.show();
    assert_eq!((info.uid, info.placements.len()), (7, 1));
}

#[test]
fn a_job_on_500_nodes_goes_the_same_way() {
    let names: Vec<String> = (1..=501).map(|number| format!("n{number:03}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = World::new(&names);
    world.run(&names[..500], None);
    for number in 1..=3 {
        assert_eq!(world.checkpoint(), Epoch(number));
    }
    world.disconnect("n007");
    let client = world.ask(restart(&[], &["n007"]));
    world.pump(|_| false);
    let Some(Event::Resumed { placements, .. }) = world.result(client) else {
        panic!("not resumed");
    };
    assert_eq!(placements[6].node, node("n501"));
}
