//! Epochs that are restored, by the scripted engine and by the real one.

use crcoord_agent::Settings;
use crcoord_common::ids::{Epoch, PartKey, Term};
use crcoord_common::report::Class;
use crcoord_common::wire::control::{
    CaptureOptions, FromAgent, PartState, RestoreOrder, Source, ToAgent,
};
use crcoord_common::wire::member::{ExitStatus, Replica};

use crate::cluster::{self, Cluster, Node, spec};
use crate::steps::{
    alive, bulk, capture, epoch, kill, names_below, next_output, partner, record, start,
};
use crate::{REAL_ENGINE, engine};

pub async fn an_epoch() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let mut two = cluster.agent("n2").await;
    let mut three = cluster.agent("n3").await;
    let key = cluster::key("2", 1);
    let pid = start(&mut one.link, &key, "exec sleep 1000").await;
    let copies = vec![partner("n2", &two.link)];
    let first = epoch(
        &mut one.link,
        &key,
        1,
        CaptureOptions::default(),
        copies.clone(),
    )
    .await;
    let nodes = ["n1", "n2"].map(|node| Replica::Node(node.parse().unwrap()));
    assert_eq!(first.replicas, nodes);
    assert!(
        first.raw_bytes > 30 << 20 && first.stored_bytes > first.raw_bytes / 2,
        "{first:?}"
    );
    assert_eq!((first.node.as_str(), first.freeze_us), ("n1", 9));
    let (part, committed) = record(&key, 1, &first);
    for link in [&mut one.link, &mut two.link] {
        let commit = ToAgent::Commit {
            part: part.clone(),
            record: committed.encode(),
        };
        assert_eq!(link.ask(commit).await, FromAgent::Done);
    }
    // A later epoch costs what has changed, here and at the partner.
    let options = CaptureOptions {
        members: vec![engine::CHANGED],
        ..CaptureOptions::default()
    };
    let second = epoch(&mut one.link, &key, 2, options, copies).await;
    assert_eq!(second.raw_bytes, first.raw_bytes);
    assert!(second.stored_bytes < first.stored_bytes / 5, "{second:?}");
    assert!(alive(pid));
    let (part, committed) = record(&key, 2, &second);
    for link in [&mut one.link, &mut two.link] {
        let commit = ToAgent::Commit {
            part: part.clone(),
            record: committed.encode(),
        };
        assert_eq!(link.ask(commit).await, FromAgent::Done);
    }
    // The first epoch goes; the second stays whole.
    let (old, _) = record(&key, 1, &first);
    for link in [&mut one.link, &mut two.link] {
        assert_eq!(
            link.ask(ToAgent::Retire { part: old.clone() }).await,
            FromAgent::Done
        );
    }
    kill(&mut one.link, &key).await;
    assert!(!alive(pid));
    let address = bulk(&two.link);
    one.stop().await; // the node is lost

    let new = cluster::key("2", 2);
    let restore = RestoreOrder {
        part: part.clone(),
        manifest: second.manifest,
        sources: vec![
            Source::Own,
            Source::Partner {
                node: "n2".parse().unwrap(),
                address,
            },
        ],
        connections: vec![],
        addresses: vec![],
    };
    let build = ToAgent::Build {
        key: new.clone(),
        capsule: spec(),
        restore,
    };
    match three.link.ask(build).await {
        FromAgent::Built {
            fetched_bytes,
            filled_bytes,
            replica,
        } => {
            assert_eq!(replica, Some(Replica::Node("n3".parse().unwrap())));
            assert_eq!(filled_bytes, second.raw_bytes);
            assert!(fetched_bytes > filled_bytes / 2);
        }
        other => panic!("{other:?}"),
    }
    three
        .link
        .tell(ToAgent::Listen {
            key: new.clone(),
            on: true,
        })
        .await;
    assert_eq!(
        three.link.ask(ToAgent::Resume { key: new.clone() }).await,
        FromAgent::Done
    );
    let output = three
        .link
        .event(|event| matches!(event, FromAgent::Output { .. }))
        .await;
    assert_eq!(
        output,
        FromAgent::Output {
            key: new.clone(),
            stream: 1,
            bytes: b"restored\n".to_vec()
        }
    );
    kill(&mut three.link, &new).await;
    // What was fetched is there for the next time.
    three.stop().await;
    let three = cluster.agent("n3").await;
    let FromAgent::Hello { parts, .. } = &three.link.hello else {
        panic!()
    };
    assert_eq!(
        *parts,
        [PartState {
            part,
            committed: true
        }]
    );
}

/// A shell and its child, captured and restored by the real engine on another node: the output goes
/// on where it stopped, and the exit status is known.
pub async fn a_real_tree() {
    let cluster = Cluster::new();
    let program = tempfile::tempdir().unwrap();
    let real = program.path().join(REAL_ENGINE);
    std::fs::copy("/proc/self/exe", &real).unwrap();
    let settings = |name| Settings {
        engine: Some(real.clone()),
        ..cluster.settings(name)
    };
    let mut one = cluster.agent_with(settings("n1"), Term(1)).await;
    let mut two = cluster.agent_with(settings("n2"), Term(1)).await;
    let key = cluster::key("11", 1);
    let go = program.path().join("go");
    std::fs::set_permissions(
        program.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let script = format!(
        "(n=0; while ! test -e {}; do n=$((n+1)); echo $n; sleep 0.02; done; echo last $n) & \
         wait; exit 7",
        go.display()
    );
    one.link
        .tell(ToAgent::Listen {
            key: key.clone(),
            on: true,
        })
        .await;
    let pid = start(&mut one.link, &key, &script).await;
    let mut output = String::new();
    while !output.contains("\n20\n") {
        output += &next_output(&mut one.link).await;
    }
    let epoch_1 = Epoch(1);
    let preflight = ToAgent::Preflight {
        key: key.clone(),
        epoch: epoch_1,
        options: CaptureOptions::default(),
    };
    let answer = one.link.ask(preflight).await;
    let FromAgent::Preflighted(found) = answer else {
        panic!("{answer:?}")
    };
    assert!(
        found.findings.iter().all(|one| one.class == Class::Note),
        "{:?}",
        found.findings
    );
    assert!(found.processes >= 2);
    let hold = ToAgent::Hold {
        key: key.clone(),
        epoch: epoch_1,
        lease_ms: 60_000,
    };
    let answer = one.link.ask(hold).await;
    assert!(matches!(answer, FromAgent::Held { .. }), "{answer:?}");
    capture(&mut one.link, &key, 1).await;
    let copies = vec![partner("n2", &two.link)];
    let release = ToAgent::Release {
        key: key.clone(),
        epoch: epoch_1,
        copies,
    };
    let request = one.link.tell(release).await;
    assert!(matches!(
        one.link.answer(request).await,
        FromAgent::Released { .. }
    ));
    let answer = one.link.answer(request).await;
    let FromAgent::Sealed { commit } = answer else {
        panic!("{answer:?}")
    };
    // The running one goes on, is ended, and so is its node.
    assert!(alive(pid));
    next_output(&mut one.link).await;
    kill(&mut one.link, &key).await;
    assert!(!alive(pid));

    let (part, _) = record(&key, 1, &commit);
    let new = cluster::key("11", 2);
    let restore = RestoreOrder {
        part,
        manifest: commit.manifest,
        sources: vec![Source::Own],
        connections: vec![],
        addresses: vec![],
    };
    let build = ToAgent::Build {
        key: new.clone(),
        capsule: spec(),
        restore,
    };
    let answer = two.link.ask(build).await;
    assert!(matches!(answer, FromAgent::Built { .. }), "{answer:?}");
    two.link
        .tell(ToAgent::Listen {
            key: new.clone(),
            on: true,
        })
        .await;
    assert_eq!(
        two.link.ask(ToAgent::Resume { key: new.clone() }).await,
        FromAgent::Done
    );
    let mut output = next_output(&mut two.link).await;
    let first: u32 = output.split('\n').next().unwrap().parse().unwrap();
    assert!(first > 20, "it goes on and does not begin anew: {output}");
    std::fs::write(&go, "").unwrap();
    while !output.contains("last") {
        output += &next_output(&mut two.link).await;
    }
    let numbers: Vec<u32> = output.lines().map_while(|line| line.parse().ok()).collect();
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
    let ended = two
        .link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    assert_eq!(
        ended,
        FromAgent::Ended {
            key: new.clone(),
            status: ExitStatus::Exited(7)
        }
    );
    kill(&mut two.link, &new).await;
}

pub async fn a_missing_image() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let old = cluster::key("7", 1);
    start(&mut link, &old, "exec sleep 1000").await;
    let commit = epoch(&mut link, &old, 1, CaptureOptions::default(), vec![]).await;
    kill(&mut link, &old).await;
    let (part, _) = record(&old, 1, &commit);
    let build = |incarnation, manifest, part: &PartKey| ToAgent::Build {
        key: cluster::key("7", incarnation),
        capsule: spec(),
        restore: RestoreOrder {
            part: part.clone(),
            manifest,
            sources: vec![Source::Own, Source::Shared],
            connections: vec![],
            addresses: vec![],
        },
    };
    let other = PartKey {
        epoch: Epoch(9),
        ..part.clone()
    };
    let answer = link.ask(build(2, commit.manifest, &other)).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert!(
        report.message.contains("no shared directory"),
        "all reasons are told: {report}"
    );
    let foreign = crcoord_common::image::ChunkId::of(b"another manifest");
    let answer = link.ask(build(2, foreign, &part)).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(report.code, "agent-restore-digest");
    // Nothing of the failed attempts is in the way.
    assert!(matches!(
        link.ask(build(2, commit.manifest, &part)).await,
        FromAgent::Built { .. }
    ));
    kill(&mut link, &cluster::key("7", 2)).await;
    let store = cluster.settings("n1").store_dir;
    for pack in names_below(&store, "pack") {
        let mut bytes = std::fs::read(&pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    link.tell(ToAgent::Forget {
        key: cluster::key("7", 2),
    })
    .await;
    let again = build(3, commit.manifest, &part);
    let answer = link.ask(again).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert!(report.message.contains("chunk"), "{report}");
    let capsules = cluster.settings("n1").run_dir.join("capsules");
    let left: Vec<_> = std::fs::read_dir(capsules)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("7-3-0"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}
