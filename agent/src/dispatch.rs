//! What the coordinator asks, and who does it. Nothing here waits: slow work is spawned.

use std::sync::Arc;

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, MemberKey, PartKey};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{CaptureOptions, Frame, FromAgent, ToAgent};
use crcoord_common::wire::member::Replica;
use crcoord_store::StoreError;

use crate::capture::{self, Session, with_session};
use crate::node::{Node, blocking, locked};
use crate::outbox::Reply;
use crate::{check, members, restore};

/// Serves one request.
pub fn serve(node: &Arc<Node>, frame: Frame<ToAgent>) {
    let reply = node.outbox.reply(frame.request, frame.term);
    let node = node.clone();
    match frame.body {
        ToAgent::Alive => {}
        ToAgent::Welcome { .. } => tracing::warn!("a second welcome"),
        ToAgent::Start {
            key,
            capsule,
            command,
        } => answer(node, reply, async move |node| {
            members::start(&node, key, capsule, command).await
        }),
        ToAgent::Adopt { key, pid, caller } => answer(node, reply, async move |node| {
            members::adopt(&node, key, pid, caller).await
        }),
        ToAgent::Preflight {
            key,
            epoch,
            options,
        } => {
            tokio::spawn(async move { preflight(&node, &key, epoch, options, reply).await });
        }
        ToAgent::Hold {
            key,
            epoch,
            lease_ms,
        } => {
            in_session(&node, &key, epoch, reply, |session, reply| {
                session.hold(lease_ms, reply)
            });
        }
        ToAgent::Renew {
            key,
            epoch,
            lease_ms,
        } => {
            in_session(&node, &key, epoch, reply, |session, reply| {
                session.renew(lease_ms, reply)
            });
        }
        ToAgent::Capture { key, epoch } => {
            in_session(&node, &key, epoch, reply, |session, reply| {
                session.capture(reply)
            });
        }
        ToAgent::Release { key, epoch, copies } => {
            in_session(&node, &key, epoch, reply, |session, reply| {
                session.release(copies, reply)
            });
        }
        ToAgent::Abort { key, epoch } => answer(node, reply, async move |node| {
            abort(&node, &key, epoch).await;
            Ok(FromAgent::Done)
        }),
        ToAgent::Commit { part, record } => answer(node, reply, async move |node| {
            blocking(move || commit(&node, &part, &record)).await
        }),
        ToAgent::Retire { part } => answer(node, reply, async move |node| {
            blocking(move || retire(&node, &part)).await
        }),
        ToAgent::Kill { key } => answer(node, reply, async move |node| {
            members::kill(&node, &key).await.map(|()| FromAgent::Killed)
        }),
        ToAgent::Signal { key, signal } => answer(node, reply, async move |node| {
            members::signal(&node, &key, signal)
                .await
                .map(|()| FromAgent::Done)
        }),
        ToAgent::Build {
            key,
            capsule,
            restore,
        } => answer(node, reply, async move |node| {
            restore::build(&node, key, capsule, restore).await
        }),
        ToAgent::Resume { key } => {
            answer(node, reply, async move |node| {
                restore::resume(&node, &key).await
            });
        }
        ToAgent::RunLease { key, lease_ms } => {
            tokio::spawn(async move { members::renew_run_lease(&node, &key, lease_ms).await });
        }
        ToAgent::Listen { key, on } => node.members.listen(&key, on),
        ToAgent::Check => answer(node, reply, async move |node| {
            let findings = blocking(move || check::findings(&node)).await;
            Ok(FromAgent::Checked { findings })
        }),
        ToAgent::Forget { key } => {
            tokio::spawn(async move { members::forget(&node, &key).await });
        }
    }
}

fn answer<F>(node: Arc<Node>, reply: Reply, work: impl FnOnce(Arc<Node>) -> F)
where
    F: Future<Output = Result<FromAgent, Report>> + Send + 'static,
{
    let working = work(node.clone());
    tokio::spawn(async move {
        let outcome = working.await.map_err(|report| node.here(report));
        if let Err(report) = &outcome {
            tracing::warn!(%report, "a request failed");
        }
        reply.result(outcome);
    });
}

fn in_session(
    node: &Node,
    key: &MemberKey,
    epoch: Epoch,
    reply: Reply,
    work: impl FnOnce(&Session, Reply),
) {
    let told = reply.clone();
    let found = node
        .members
        .find(key)
        .and_then(|member| with_session(&member, epoch, |session| work(session, reply)));
    if let Err(report) = found {
        told.fail(node.here(report));
    }
}

async fn preflight(
    node: &Arc<Node>,
    key: &MemberKey,
    epoch: Epoch,
    options: CaptureOptions,
    reply: Reply,
) {
    let member = match node.members.find(key) {
        Ok(member) => member,
        Err(report) => return reply.fail(node.here(report)),
    };
    // An epoch that its coordinator has left behind ends before the next one begins.
    let earlier = {
        let session = locked(&member.session);
        match &*session {
            Some(session) if session.epoch >= epoch => Err(session.epoch),
            Some(session) if session.active() => Ok(Some(session.aborting())),
            _ => Ok(None),
        }
    };
    match earlier {
        Err(newer) => {
            let text = format!("epoch {newer} came already, {epoch} is stale");
            let report = Report::new("agent-epoch-stale", Class::Failure, text);
            return reply.fail(node.here(report));
        }
        Ok(Some(aborting)) => aborting.await,
        Ok(None) => {}
    }
    let mut session = locked(&member.session);
    // Two preflights at once: the newer epoch wins.
    if session
        .as_ref()
        .is_some_and(|session| session.epoch >= epoch)
    {
        let report = Report::new(
            "agent-epoch-stale",
            Class::Failure,
            "a newer epoch came first",
        );
        return reply.fail(node.here(report));
    }
    *session = Some(Session::begin(node, &member, epoch, options, reply));
}

async fn abort(node: &Arc<Node>, key: &MemberKey, epoch: Epoch) {
    if let Some(member) = node.members.get(key)
        && let Ok(aborting) = with_session(&member, epoch, |session| session.aborting())
    {
        aborting.await;
    }
    let part = PartKey {
        job: key.job.clone(),
        epoch,
        member: key.member,
    };
    capture::drop_part(node, part).await;
}

/// Puts the record beside every part of the epoch that is here.
fn commit(node: &Node, part: &PartKey, encoded: &[u8]) -> Result<FromAgent, Report> {
    let record = CommitRecord::decode(encoded)
        .map_err(|error| Report::new("agent-commit-damaged", Class::Failure, error.to_string()))?;
    if record.job != part.job || record.epoch != part.epoch {
        let text = format!("the record of epoch {} is not {part}'s", record.epoch);
        return Err(Report::new("agent-commit-foreign", Class::Failure, text));
    }
    let store = |error: StoreError| error.report();
    for member in &record.members {
        let part = PartKey {
            member: member.member,
            ..part.clone()
        };
        if node.store.part(&part).map_err(store)?.is_some() {
            node.store.commit(&part, encoded).map_err(store)?;
        }
        // In the shared store the node that wrote a part is the one that touches it.
        let ours = member.node == node.settings.node && member.replicas.contains(&Replica::Shared);
        if let Some(shared) = node.shared.as_ref().filter(|_| ours) {
            shared.commit(&part, encoded).map_err(store)?;
        }
    }
    Ok(FromAgent::Done)
}

/// Removes every part of the epoch that is here, and from the shared store what this node wrote.
fn retire(node: &Node, part: &PartKey) -> Result<FromAgent, Report> {
    let store = |error: StoreError| error.report();
    let parts = node.store.parts().map_err(store)?;
    for one in parts.iter().map(|summary| &summary.part) {
        if one.job != part.job || one.epoch != part.epoch {
            continue;
        }
        let record = node
            .store
            .commit_record(one)
            .map_err(store)?
            .unwrap_or_default();
        if let (Some(shared), Ok(record)) = (&node.shared, CommitRecord::decode(&record)) {
            let ours = record.members.iter().any(|member| {
                member.member == one.member
                    && member.node == node.settings.node
                    && member.replicas.contains(&Replica::Shared)
            });
            if ours {
                shared.remove(one).map_err(store)?;
            }
        }
        let freed = node.store.remove(one).map_err(store)?;
        tracing::info!(part = %one, freed, "retired");
    }
    Ok(FromAgent::Done)
}
