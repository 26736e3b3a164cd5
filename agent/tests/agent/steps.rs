//! Steps that several tests take.

use std::collections::BTreeSet;

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, MemberKey, PartKey, Term};
use crcoord_common::wire::control::{CaptureOptions, CopyTarget, FromAgent, ToAgent};
use crcoord_common::wire::member::{JobSpec, MemberCommit, NetworkMode, Stdio};

use crate::cluster::{Link, shell, spec};

pub async fn start(link: &mut Link, key: &MemberKey, script: &str) -> i32 {
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

pub fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z")
}

pub async fn kill(link: &mut Link, key: &MemberKey) {
    assert_eq!(
        link.ask(ToAgent::Kill { key: key.clone() }).await,
        FromAgent::Killed
    );
}

/// Takes a member up to the hold.
pub async fn hold(
    link: &mut Link,
    key: &MemberKey,
    epoch: u64,
    options: CaptureOptions,
    lease: u64,
) {
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

pub async fn capture(link: &mut Link, key: &MemberKey, epoch: u64) {
    let capture = ToAgent::Capture {
        key: key.clone(),
        epoch: Epoch(epoch),
    };
    assert!(matches!(link.ask(capture).await, FromAgent::Captured(_)));
}

/// A whole epoch up to its seal.
pub async fn epoch(
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

pub fn record(key: &MemberKey, epoch: u64, commit: &MemberCommit) -> (PartKey, CommitRecord) {
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

pub fn bulk(link: &Link) -> std::net::SocketAddr {
    match &link.hello {
        FromAgent::Hello { bulk, .. } => *bulk,
        other => panic!("{other:?}"),
    }
}

pub fn partner(name: &str, link: &Link) -> CopyTarget {
    CopyTarget::Partner {
        node: name.parse().unwrap(),
        address: bulk(link),
    }
}

pub async fn next_output(link: &mut Link) -> String {
    match link
        .event(|event| matches!(event, FromAgent::Output { .. }))
        .await
    {
        FromAgent::Output { bytes, .. } => String::from_utf8(bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

pub fn names_below(directory: &std::path::Path, part: &str) -> BTreeSet<std::path::PathBuf> {
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
