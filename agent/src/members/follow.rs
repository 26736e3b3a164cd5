//! Following members: their output and end; and finding them again when the agent starts.

use std::sync::Arc;
use std::time::Duration;

use crcoord_common::ids::MemberKey;
use crcoord_common::wire::member::{ExitStatus, Owner};
use tokio::sync::oneshot;

use super::record::{Kind, Record};
use super::{Body, Member, note_end, short_name};
use crate::capsule::handle::{remove_remains, wait_readable};
use crate::capsule::protocol::Answer;
use crate::capsule::{Capsule, CapsuleError};
use crate::members::Adopted;
use crate::node::{Node, blocking, locked};

/// Pause before a capsule that lives but closed its connection is asked again.
const AGAIN: Duration = Duration::from_millis(500);
/// One wait of the thread that waits again and again.
const FOREVER: Duration = Duration::from_secs(86400);

/// Follows a member to its end and beyond: until it is forgotten its output may still be wanted.
pub fn follow(node: &Arc<Node>, member: &Arc<Member>) {
    let (here, followed) = (node.clone(), member.clone());
    let task = tokio::spawn(async move {
        match &followed.body {
            Body::Capsule { capsule, .. } => follow_capsule(&here, &followed, capsule).await,
            Body::Adopted(adopted) => {
                follow_adopted(adopted).await;
                // Only a parent learns an exit status.
                note_end(&here, &followed, ExitStatus::Lost).await;
            }
            Body::Gone => {}
        }
    });
    *locked(&member.follower) = Some(task.abort_handle());
}

async fn follow_capsule(node: &Arc<Node>, member: &Arc<Member>, capsule: &Capsule) {
    loop {
        if let Err(error) = follow_events(node, member, capsule).await {
            tracing::debug!(member = %member.key, %error, "not watched");
        }
        let gone = capsule.clone();
        if blocking(move || gone.ended()).await {
            return note_end(node, member, ExitStatus::Lost).await;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn follow_events(
    node: &Arc<Node>,
    member: &Arc<Member>,
    capsule: &Capsule,
) -> Result<(), CapsuleError> {
    let talk = |source| CapsuleError::Talk {
        id: capsule.id.clone(),
        source,
    };
    let mut listening = member.listening.subscribe();
    let wanted = *listening.borrow_and_update();
    let mut watch = capsule.watch(wanted).await?;
    loop {
        tokio::select! {
            event = watch.next() => match event.map_err(talk)? {
                Some(Answer::Output { stream, bytes }) => {
                    node.outbox.output(member.key.clone(), stream, bytes).await;
                }
                Some(Answer::Exited { status }) => note_end(node, member, status).await,
                Some(_) => {}
                None => return Ok(()),
            },
            Ok(()) = listening.changed() => {
                let wanted = *listening.borrow_and_update();
                watch.want_output(wanted).await.map_err(talk)?;
            }
        }
    }
}

/// Waits for the process's end on a thread of its own, which sleeps all that time and does not keep
/// the daemon from ending.
async fn follow_adopted(adopted: &Adopted) {
    let (ended, end) = oneshot::channel();
    let pidfd = adopted.pidfd.clone();
    let waiting = std::thread::Builder::new()
        .name("adopted".to_owned())
        .spawn(move || {
            while !wait_readable(&*pidfd, FOREVER) {}
            let _ = ended.send(()); // the member may have been forgotten
        });
    if waiting.is_err() || end.await.is_err() {
        tracing::error!(
            pid = adopted.pid,
            "an adopted process cannot be watched: no thread"
        );
        std::future::pending::<()>().await;
    }
}

/// Takes over what an earlier agent of this node left running.
///
/// # Errors
/// What the kernel said about the run directory.
pub async fn find_again(node: &Arc<Node>) -> std::io::Result<()> {
    let here = node.clone();
    let records = blocking(move || Record::read_all(&here.settings.run_dir)).await?;
    for record in records {
        let (here, key) = (node.clone(), record.key.clone());
        let Some(member) = blocking(move || find_one(&here, record)).await else {
            continue;
        };
        tracing::info!(member = %key, ended = ?member.ended(), "found again");
        node.members.insert(member.clone());
        follow(node, &member);
    }
    Ok(())
}

/// `None` where nothing is left that anybody could want to know of.
fn find_one(node: &Node, record: Record) -> Option<Arc<Member>> {
    let Record {
        key,
        kind,
        owner,
        ended,
    } = record;
    match kind {
        Kind::Adopted { pid, start } => match Adopted::find(pid, start) {
            Some(adopted) => Some(Member::new(key, Body::Adopted(adopted), owner, ended)),
            None => lost(key, owner, ended),
        },
        Kind::Capsule {
            spec,
            cgroup,
            hosts,
        } => {
            let id = short_name(&key);
            let socket = node.run_path("capsules", &format!("{id}.sock"));
            match Capsule::attach(&id, &socket, hosts.clone(), cgroup.clone()) {
                Ok(Some((capsule, status))) if status.root.is_some() => {
                    let ended = ended.or(status.ended);
                    Some(Member::new(
                        key,
                        Body::Capsule { capsule, spec },
                        owner,
                        ended,
                    ))
                }
                Ok(Some((capsule, _))) => {
                    // Its program was never started, or its tree never finished: nobody knows it.
                    if let Err(error) = capsule.kill(node.settings.kill_patience) {
                        tracing::error!(member = %key, %error, "an empty capsule is left");
                    }
                    remove(node, &key);
                    None
                }
                Ok(None) => {
                    remove_remains(&id, &socket, hosts.as_deref(), cgroup.as_deref());
                    lost(key, owner, ended)
                }
                Err(error) => {
                    tracing::error!(member = %key, %error, "a capsule does not answer");
                    None
                }
            }
        }
    }
}

/// A member whose processes ended while no agent ran: told until the coordinator has recorded it.
fn lost(key: MemberKey, owner: Owner, ended: Option<ExitStatus>) -> Option<Arc<Member>> {
    let status = ended.unwrap_or(ExitStatus::Lost);
    Some(Member::new(key, Body::Gone, owner, Some(status)))
}

fn remove(node: &Node, key: &MemberKey) {
    if let Err(error) = Record::remove(&node.settings.run_dir, key) {
        tracing::error!(member = %key, %error, "a member's state could not be removed");
    }
}
