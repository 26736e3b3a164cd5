//! Agents as they are, with a scripted coordinator and a scripted engine: members, epochs with a
//! partner's copy, restore from it, leases, faults, and a restart of the agent.
//!
//! Needs root. The test binary is its own capsule and engine.
#![allow(
    clippy::unwrap_used,
    reason = "tests, though not marked as such: see main"
)]

mod cluster;
mod engine;

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use cluster::{Cluster, Link, Node, key, shell, soon, spec};
use crcoord_agent::Settings;
use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, MemberKey, PartKey, Term};
use crcoord_common::report::Class;
use crcoord_common::wire::control::{
    CaptureOptions, CopyTarget, FromAgent, PartState, RestoreOrder, Source, ToAgent,
};
use crcoord_common::wire::member::{
    ExitStatus, JobSpec, MemberCommit, NetworkMode, Replica, Stdio,
};

const REAL_ENGINE: &str = "real-engine";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("capsule") => return crcoord_agent::capsule::main(),
        Some("engine") => {
            // A copy of this program under another name is the real engine.
            let name = std::fs::read_link("/proc/self/exe").unwrap();
            match name.ends_with(REAL_ENGINE) {
                true => crcoord_engine::serve::main().unwrap(),
                false => engine::serve(),
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let filter = arguments.iter().skip(1).find(|one| !one.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let outcome = catch_unwind(AssertUnwindSafe(test));
        println!(
            "test {name} ... {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        failed += u32::from(outcome.is_err());
    }
    ExitCode::from(u8::from(failed > 0))
}

const TESTS: &[(&str, fn())] = &[
    ("a_member_runs_and_its_output_and_end_are_told", || {
        run(a_member_runs())
    }),
    (
        "an_epoch_is_sealed_here_and_at_the_partner_and_restored_elsewhere",
        || run(an_epoch()),
    ),
    ("a_real_tree_goes_on_after_a_restore", || run(a_real_tree())),
    ("a_hold_ends_by_its_lease_and_poisons_its_epoch", || {
        run(a_hold_ends_by_its_lease())
    }),
    ("a_dead_engine_is_told_and_the_member_lives", || {
        run(a_dead_engine())
    }),
    (
        "an_unreachable_partner_fails_the_epoch_and_leaves_nothing",
        || run(no_partner()),
    ),
    ("an_abort_works_in_every_phase", || run(an_abort())),
    (
        "a_damaged_or_missing_image_is_refused_and_nothing_is_left",
        || run(a_missing_image()),
    ),
    ("an_agent_that_restarts_finds_its_members", || {
        run(a_restart())
    }),
    ("an_older_term_is_refused", || run(an_older_term())),
    ("a_check_finds_what_there_is", || run(a_check())),
];

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}

async fn start(link: &mut Link, key: &MemberKey, script: &str) -> i32 {
    let start = ToAgent::Start {
        key: key.clone(),
        capsule: spec(),
        command: shell(script),
    };
    match link.ask(start).await {
        FromAgent::Started { pid, owner } => {
            assert_eq!(owner.uid, 1234);
            pid
        }
        other => panic!("{other:?}"),
    }
}

fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z")
}

async fn kill(link: &mut Link, key: &MemberKey) {
    assert_eq!(
        link.ask(ToAgent::Kill { key: key.clone() }).await,
        FromAgent::Killed
    );
}

async fn a_member_runs() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = key("1", 1);
    link.tell(ToAgent::Listen {
        key: key.clone(),
        on: true,
    })
    .await;
    start(
        &mut link,
        &key,
        "echo $CRCOORD_JOB $CRCOORD_MEMBER $CRCOORD_NODES; exit 3",
    )
    .await;
    let output = link
        .event(|event| matches!(event, FromAgent::Output { .. }))
        .await;
    assert_eq!(
        output,
        FromAgent::Output {
            key: key.clone(),
            stream: 1,
            bytes: b"1 0 n1,n2\n".to_vec()
        }
    );
    let ended = link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    assert_eq!(
        ended,
        FromAgent::Ended {
            key: key.clone(),
            status: ExitStatus::Exited(3)
        }
    );
    // A request that comes twice is answered twice, and a second life is refused.
    start(&mut link, &key, "exit 4").await;
    link.tell(ToAgent::Forget { key: key.clone() }).await;

    let living = cluster::key("1", 2);
    let pid = start(&mut link, &living, "exec sleep 1000").await;
    assert!(alive(pid));
    let second = ToAgent::Start {
        key: cluster::key("1", 3),
        capsule: spec(),
        command: shell("true"),
    };
    let answer = link.ask(second).await;
    let FromAgent::Failed(report) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(report.code, "agent-member-alive");
    assert_eq!(report.place.node.as_ref().unwrap().as_str(), "n1");
    assert_eq!(
        link.ask(ToAgent::Signal {
            key: living.clone(),
            signal: 15
        })
        .await,
        FromAgent::Done
    );
    let ended = link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    assert_eq!(
        ended,
        FromAgent::Ended {
            key: living.clone(),
            status: ExitStatus::Signaled(15)
        }
    );
    kill(&mut link, &living).await;
    kill(&mut link, &cluster::key("unknown", 1)).await;
}

/// Takes a member up to the hold.
async fn hold(link: &mut Link, key: &MemberKey, epoch: u64, options: CaptureOptions, lease: u64) {
    let epoch = Epoch(epoch);
    let preflight = ToAgent::Preflight {
        key: key.clone(),
        epoch,
        options,
    };
    match link.ask(preflight).await {
        FromAgent::Preflighted(preflight) => assert_eq!(preflight.findings, []),
        other => panic!("{other:?}"),
    }
    let hold = ToAgent::Hold {
        key: key.clone(),
        epoch,
        lease_ms: lease,
    };
    assert_eq!(link.ask(hold).await, FromAgent::Held { freeze_us: 7 });
}

async fn capture(link: &mut Link, key: &MemberKey, epoch: u64) {
    let capture = ToAgent::Capture {
        key: key.clone(),
        epoch: Epoch(epoch),
    };
    assert!(matches!(link.ask(capture).await, FromAgent::Captured(_)));
}

/// A whole epoch up to its seal.
async fn epoch(
    link: &mut Link,
    key: &MemberKey,
    epoch: u64,
    options: CaptureOptions,
    copies: Vec<CopyTarget>,
) -> MemberCommit {
    hold(link, key, epoch, options, 60_000).await;
    let renew = ToAgent::Renew {
        key: key.clone(),
        epoch: Epoch(epoch),
        lease_ms: 60_000,
    };
    assert_eq!(link.ask(renew).await, FromAgent::Done);
    capture(link, key, epoch).await;
    let release = ToAgent::Release {
        key: key.clone(),
        epoch: Epoch(epoch),
        copies,
    };
    let request = link.tell(release).await;
    assert_eq!(
        link.answer(request).await,
        FromAgent::Released { frozen_us: 9 }
    );
    match link.answer(request).await {
        FromAgent::Sealed { commit } => commit,
        other => panic!("{other:?}"),
    }
}

fn record(key: &MemberKey, epoch: u64, commit: &MemberCommit) -> (PartKey, CommitRecord) {
    let part = PartKey {
        job: key.job.clone(),
        epoch: Epoch(epoch),
        member: key.member,
    };
    let record = CommitRecord {
        job: key.job.clone(),
        epoch: Epoch(epoch),
        incarnation: key.incarnation,
        term: Term(1),
        taken: 1,
        spec: JobSpec {
            owner: spec().owner,
            command: None,
            stdio: Stdio::Caller,
            network: NetworkMode::Host,
            run_lease_ms: None,
            members: 1,
        },
        placements: vec![],
        members: vec![commit.clone()],
    };
    (part, record)
}

fn bulk(link: &Link) -> std::net::SocketAddr {
    match &link.hello {
        FromAgent::Hello { bulk, .. } => *bulk,
        other => panic!("{other:?}"),
    }
}

fn partner(name: &str, link: &Link) -> CopyTarget {
    CopyTarget::Partner {
        node: name.parse().unwrap(),
        address: bulk(link),
    }
}

async fn an_epoch() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let mut two = cluster.agent("n2").await;
    let mut three = cluster.agent("n3").await;
    let key = key("2", 1);
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
async fn a_real_tree() {
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
    let key = key("11", 1);
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

async fn next_output(link: &mut Link) -> String {
    match link
        .event(|event| matches!(event, FromAgent::Output { .. }))
        .await
    {
        FromAgent::Output { bytes, .. } => String::from_utf8(bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn a_hold_ends_by_its_lease() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = key("3", 1);
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

async fn a_dead_engine() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let key = key("4", 1);
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

async fn no_partner() {
    let cluster = Cluster::new();
    let node = cluster.agent("n1").await;
    let mut link = node.link;
    let key = key("5", 1);
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

fn names_below(directory: &std::path::Path, part: &str) -> BTreeSet<std::path::PathBuf> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => names.extend(names_below(&path, part)),
            false if path.to_str().unwrap().contains(part) => drop(names.insert(path)),
            false => {}
        }
    }
    names
}

async fn an_abort() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let two = cluster.agent("n2").await;
    let key = key("6", 1);
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

async fn a_missing_image() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let old = key("7", 1);
    start(&mut link, &old, "exec sleep 1000").await;
    let commit = epoch(&mut link, &old, 1, CaptureOptions::default(), vec![]).await;
    kill(&mut link, &old).await;
    let (part, _) = record(&old, 1, &commit);
    let build = |incarnation, manifest, part: &PartKey| ToAgent::Build {
        key: key("7", incarnation),
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
    kill(&mut link, &key("7", 2)).await;
    let store = cluster.settings("n1").store_dir;
    for pack in names_below(&store, "pack") {
        let mut bytes = std::fs::read(&pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    link.tell(ToAgent::Forget { key: key("7", 2) }).await;
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

async fn a_restart() {
    let cluster = Cluster::new();
    let mut one = cluster.agent("n1").await;
    let (running, ended) = (key("8", 1), key("9", 1));
    let pid = start(&mut one.link, &running, "exec sleep 1000").await;
    start(&mut one.link, &ended, "exit 6").await;
    one.link
        .event(|event| matches!(event, FromAgent::Ended { .. }))
        .await;
    hold(
        &mut one.link,
        &running,
        1,
        CaptureOptions::default(),
        60_000,
    )
    .await;
    soon(one.stop()).await;
    assert!(alive(pid));
    let mut one = cluster.agent("n1").await;
    let FromAgent::Hello { members, .. } = &one.link.hello else {
        panic!()
    };
    let mut states: Vec<_> = members
        .iter()
        .map(|member| (member.key.clone(), member.ended, member.epoch))
        .collect();
    states.sort_by(|a, b| a.0.cmp(&b.0));
    let exited = Some(ExitStatus::Exited(6));
    assert_eq!(
        states,
        [(running.clone(), None, None), (ended.clone(), exited, None)]
    );
    one.link.tell(ToAgent::Forget { key: ended }).await;
    // The same member goes on: signals, epochs, its end.
    epoch(
        &mut one.link,
        &running,
        2,
        CaptureOptions::default(),
        vec![],
    )
    .await;
    assert!(matches!(
        one.link.ask(ToAgent::Start {
            key: running.clone(),
            capsule: spec(),
            command: shell("true")
        }).await,
        FromAgent::Started { pid: same, .. } if same == pid
    ));
    kill(&mut one.link, &running).await;
    assert!(!alive(pid));
    one.link.tell(ToAgent::Forget { key: running }).await;
    assert!(matches!(
        one.link.ask(ToAgent::Check).await,
        FromAgent::Checked { .. }
    ));
    one.stop().await;
    let one = cluster.agent("n1").await;
    let FromAgent::Hello { members, .. } = &one.link.hello else {
        panic!()
    };
    assert_eq!(*members, []);
}

async fn an_older_term() {
    let cluster = Cluster::new();
    let mut one = cluster.agent_with(cluster.settings("n1"), Term(5)).await;
    let checked = one.link.ask(ToAgent::Check).await;
    assert!(
        matches!(checked, FromAgent::Checked { .. }),
        "the welcome has arrived"
    );
    one.link.connection.close(
        crcoord_transport::CLOSE_SHUTDOWN,
        "the test wants a new link",
    );
    let stale = cluster.welcome(Term(4)).await;
    let lost = soon(stale.connection.closed()).await.to_string();
    assert!(lost.contains("term 4") && lost.contains("term 5"), "{lost}");
    let mut fresh = cluster.welcome(Term(6)).await;
    assert!(matches!(
        fresh.ask(ToAgent::Check).await,
        FromAgent::Checked { .. }
    ));
}

async fn a_check() {
    let cluster = Cluster::new();
    let Node { mut link, .. } = cluster.agent("n1").await;
    let answer = link.ask(ToAgent::Check).await;
    let FromAgent::Checked { findings } = answer else {
        panic!("{answer:?}")
    };
    assert!(
        findings
            .iter()
            .any(|finding| finding.code == "check-kernel")
    );
    let obstacles: Vec<_> = findings
        .iter()
        .filter(|finding| finding.class == Class::Obstacle)
        .collect();
    assert!(obstacles.is_empty(), "{obstacles:?}");
    assert!(findings.iter().all(|finding| finding.place.node.is_some()));
}
