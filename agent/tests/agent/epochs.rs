//! Epochs that do not come to their seal: leases, dead engines, lost partners, aborts.

use std::collections::BTreeSet;

use crcoord_common::ids::Epoch;
use crcoord_common::report::Class;
use crcoord_common::wire::control::{CaptureOptions, CopyTarget, FromAgent, ToAgent};
use crcoord_common::wire::member::Replica;

use crate::cluster::{self, Cluster, Node};
use crate::engine;
use crate::steps::{alive, capture, epoch, hold, kill, names_below, partner, record, start};

pub async fn a_hold_ends_by_its_lease() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = cluster::key("3", 1);
    let pid = start(&mut link, &key, "exec sleep 1000").await;
    hold(&mut link, &key, 1, CaptureOptions::default(), 100).await;
    match link
        .event(|event| matches!(event, FromAgent::HoldLost { .. }))
        .await
    {
        FromAgent::HoldLost { epoch, report, .. } => {
            assert_eq!(
                (epoch, report.code.as_str()),
                (Epoch(1), "agent-hold-lease")
            );
        }
        _ => unreachable!(),
    }
    let capture = ToAgent::Capture {
        key: key.clone(),
        epoch: Epoch(1),
    };
    let answer = link.ask(capture).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(report.class, Class::Aborted);
    // The number is spent; the next one works.
    let preflight = |epoch| ToAgent::Preflight {
        key: key.clone(),
        epoch: Epoch(epoch),
        options: CaptureOptions::default(),
    };
    let answer = link.ask(preflight(1)).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(report.code, "agent-epoch-stale");
    let commit = epoch(&mut link, &key, 2, CaptureOptions::default(), vec![]).await;
    assert_eq!(commit.replicas, [Replica::Node("n1".parse().unwrap())]);
    assert!(alive(pid));
    kill(&mut link, &key).await;
}

pub async fn a_dead_engine() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = cluster::key("4", 1);
    let pid = start(&mut link, &key, "exec sleep 1000").await;
    let options = CaptureOptions {
        members: vec![engine::DIES_HOLDING],
        ..CaptureOptions::default()
    };
    hold(&mut link, &key, 1, options, 60_000).await;
    match link
        .event(|event| matches!(event, FromAgent::HoldLost { .. }))
        .await
    {
        FromAgent::HoldLost { report, .. } => assert_eq!(report.code, "agent-engine-gone"),
        _ => unreachable!(),
    }
    assert!(alive(pid));
    epoch(&mut link, &key, 2, CaptureOptions::default(), vec![]).await;
    kill(&mut link, &key).await;
}

pub async fn no_partner() {
    let cluster = Cluster::new();
    let node = cluster.agent("n1").await;
    let mut link = node.link;
    let key = cluster::key("5", 1);
    let pid = start(&mut link, &key, "exec sleep 1000").await;
    hold(&mut link, &key, 1, CaptureOptions::default(), 60_000).await;
    capture(&mut link, &key, 1).await;
    // Somebody is there, but it is not who is expected.
    let copies = vec![CopyTarget::Partner {
        node: "n9".parse().unwrap(),
        address: link.connection.remote_address(),
    }];
    let release = ToAgent::Release {
        key: key.clone(),
        epoch: Epoch(1),
        copies,
    };
    let request = link.tell(release).await;
    assert_eq!(
        link.answer(request).await,
        FromAgent::Released { frozen_us: 9 }
    );
    let answer = link.answer(request).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert!(report.code.starts_with("transport-"), "{report}");
    assert!(alive(pid));
    let settings = cluster.settings("n1");
    assert_eq!(
        names_below(&settings.store_dir, "manifest"),
        BTreeSet::new()
    );
    epoch(&mut link, &key, 2, CaptureOptions::default(), vec![]).await;
    assert_ne!(
        names_below(&settings.store_dir, "manifest"),
        BTreeSet::new()
    );
    kill(&mut link, &key).await;
}

pub async fn an_abort() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let two = cluster.agent("n2").await;
    let key = cluster::key("6", 1);
    let pid = start(&mut one.link, &key, "exec sleep 1000").await;
    let link = &mut one.link;
    let abort = |epoch| ToAgent::Abort {
        key: key.clone(),
        epoch: Epoch(epoch),
    };
    assert_eq!(link.ask(abort(1)).await, FromAgent::Done, "nothing there");
    // Held.
    hold(link, &key, 2, CaptureOptions::default(), 60_000).await;
    assert_eq!(link.ask(abort(2)).await, FromAgent::Done);
    // Captured.
    hold(link, &key, 3, CaptureOptions::default(), 60_000).await;
    capture(link, &key, 3).await;
    assert_eq!(link.ask(abort(3)).await, FromAgent::Done);
    // Streaming, or sealed already: nothing is left in either case.
    hold(link, &key, 4, CaptureOptions::default(), 60_000).await;
    capture(link, &key, 4).await;
    let copies = vec![partner("n2", &two.link)];
    let release = ToAgent::Release {
        key: key.clone(),
        epoch: Epoch(4),
        copies,
    };
    let request = link.tell(release).await;
    assert_eq!(
        link.answer(request).await,
        FromAgent::Released { frozen_us: 9 }
    );
    assert_eq!(link.ask(abort(4)).await, FromAgent::Done);
    assert_eq!(
        names_below(&cluster.settings("n1").store_dir, "manifest"),
        BTreeSet::new()
    );
    assert!(alive(pid));
    // A committed epoch is not touched by an abort that comes too late.
    let commit = epoch(link, &key, 5, CaptureOptions::default(), vec![]).await;
    let (part, committed) = record(&key, 5, &commit);
    let committing = ToAgent::Commit {
        part,
        record: committed.encode(),
    };
    assert_eq!(link.ask(committing).await, FromAgent::Done);
    assert_eq!(link.ask(abort(5)).await, FromAgent::Done);
    assert_ne!(
        names_below(&cluster.settings("n1").store_dir, "manifest"),
        BTreeSet::new()
    );
    kill(link, &key).await;
}
