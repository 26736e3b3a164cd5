//! The members of this node: the table, starting, finding again, watching and ending them.

mod adopted;
mod follow;
mod record;
mod start;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use crcoord_common::ids::MemberKey;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{FromAgent, MemberState};
use crcoord_common::wire::engine::{LeftOut, Scope};
use crcoord_common::wire::member::{CapsuleSpec, ExitStatus, MemberNetwork, Owner};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::capsule::Capsule;
use crate::capsule::protocol::Ask;
use crate::capture::Session;
use crate::node::{Node, blocking, locked};
use crate::restore::Built;

pub use adopted::Adopted;
pub use follow::{find_again, follow};
pub use record::{Kind, Record, short_name, write_durably};
pub(crate) use start::discard;
pub use start::{adopt, make_capsule, start};

/// What a member is made of on this node.
#[derive(Clone, Debug)]
pub enum Body {
    /// A capsule.
    Capsule {
        /// The capsule.
        capsule: Capsule,
        /// What it was made with.
        spec: Box<CapsuleSpec>,
    },
    /// An adopted tree.
    Adopted(Adopted),
    /// Nothing any more: it ended while no agent ran.
    Gone,
}

/// One member.
pub struct Member {
    /// Which.
    pub key: MemberKey,
    /// Its processes.
    pub body: Body,
    /// Credentials of its processes.
    pub owner: Owner,
    ended: Mutex<Option<ExitStatus>>,
    /// Somebody takes its output.
    listening: watch::Sender<bool>,
    follower: Mutex<Option<AbortHandle>>,
    /// The epoch that is going on.
    pub session: Mutex<Option<Session>>,
    /// A tree that was built and waits for the word to run.
    pub built: Mutex<Option<Built>>,
}

impl Member {
    fn new(key: MemberKey, body: Body, owner: Owner, ended: Option<ExitStatus>) -> Arc<Self> {
        Arc::new(Member {
            key,
            body,
            owner,
            ended: Mutex::new(ended),
            listening: watch::Sender::new(false),
            follower: Mutex::default(),
            session: Mutex::default(),
            built: Mutex::default(),
        })
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        *locked(&self.ended)
    }

    /// Its capsule, unless it was adopted.
    pub fn capsule(&self) -> Option<&Capsule> {
        match &self.body {
            Body::Capsule { capsule, .. } => Some(capsule),
            Body::Adopted(_) | Body::Gone => None,
        }
    }

    /// The tree as an engine is told it; `None` when it has ended.
    pub fn scope(&self) -> Option<Scope> {
        match &self.body {
            _ if self.ended().is_some() => None,
            Body::Capsule { capsule, .. } => Some(Scope::Capsule(capsule.init)),
            Body::Adopted(adopted) => Some(Scope::Tree(adopted.pid)),
            Body::Gone => None,
        }
    }

    /// True when its network is a namespace of its own.
    pub fn own_network(&self) -> bool {
        matches!(&self.body, Body::Capsule { spec, .. }
            if matches!(spec.network, MemberNetwork::Virtual { .. }))
    }

    /// What a capture leaves out: the pipes that PID 1 holds the other end of. Blocks.
    ///
    /// # Errors
    /// When PID 1 does not answer.
    pub fn left_out(&self) -> Result<Vec<LeftOut>, Report> {
        let Some(capsule) = self.capsule() else {
            return Ok(Vec::new());
        };
        let status = capsule.status().map_err(|error| error.report())?;
        let left_out = |one: crate::capsule::protocol::StreamIdentity| LeftOut {
            device: one.device,
            inode: one.inode,
            name: one.name,
        };
        Ok(status.streams.into_iter().map(left_out).collect())
    }

    /// Nobody is told its output and end any more; its capsule keeps both.
    pub fn stop_following(&self) {
        if let Some(follower) = locked(&self.follower).take() {
            follower.abort();
        }
    }

    fn record(&self) -> Option<Record> {
        let kind = match &self.body {
            Body::Capsule { capsule, spec } => Kind::Capsule {
                spec: spec.clone(),
                cgroup: capsule.cgroup().map(Into::into),
                hosts: capsule.hosts().map(Into::into),
            },
            Body::Adopted(adopted) => Kind::Adopted {
                pid: adopted.pid,
                start: adopted.start,
            },
            Body::Gone => return None,
        };
        let (key, owner) = (self.key.clone(), self.owner.clone());
        Some(Record {
            key,
            kind,
            owner,
            ended: self.ended(),
        })
    }

    fn state(&self) -> MemberState {
        let epoch = locked(&self.session)
            .as_ref()
            .filter(|s| s.active())
            .map(|s| s.epoch);
        MemberState {
            key: self.key.clone(),
            ended: self.ended(),
            epoch,
        }
    }
}

/// All members of this node that were not forgotten.
#[derive(Default)]
pub struct Members {
    table: Mutex<HashMap<MemberKey, Arc<Member>>>,
    /// One at a time for each member of a job, whatever its incarnation.
    gates: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Whose output somebody takes; may be told before the member is here.
    listened: Mutex<HashSet<MemberKey>>,
}

impl Members {
    /// The member of this name.
    ///
    /// # Errors
    /// `agent-member-unknown`.
    pub fn find(&self, key: &MemberKey) -> Result<Arc<Member>, Report> {
        self.get(key).ok_or_else(|| {
            Report::new(
                "agent-member-unknown",
                Class::NotFound,
                format!("no member {key} here"),
            )
        })
    }

    /// The member of this name, if there is one.
    pub fn get(&self, key: &MemberKey) -> Option<Arc<Member>> {
        locked(&self.table).get(key).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Member>> {
        locked(&self.table).values().cloned().collect()
    }

    /// As a Hello tells them; not those that are only built.
    pub fn states(&self) -> Vec<MemberState> {
        let built = |member: &Member| locked(&member.built).is_some();
        self.all()
            .iter()
            .filter(|member| !built(member))
            .map(|member| member.state())
            .collect()
    }

    /// Holds starting, building, ending and forgetting of one member apart.
    pub async fn gate(&self, key: &MemberKey) -> tokio::sync::OwnedMutexGuard<()> {
        let name = format!("{}.{}", key.job, key.member);
        let gate = locked(&self.gates).entry(name).or_default().clone();
        gate.lock_owned().await
    }

    /// Another incarnation of the same member that still lives here.
    fn living_other(&self, key: &MemberKey) -> Option<MemberKey> {
        self.all()
            .into_iter()
            .find(|other| {
                other.key.job == key.job
                    && other.key.member == key.member
                    && other.key.incarnation != key.incarnation
                    && other.ended().is_none()
            })
            .map(|other| other.key.clone())
    }

    /// Refuses a second life beside the first one: at most one incarnation can run.
    fn refuse_second_life(&self, key: &MemberKey) -> Result<(), Report> {
        match self.living_other(key) {
            None => Ok(()),
            Some(other) => Err(Report::new(
                "agent-member-alive",
                Class::Obstacle,
                format!(
                    "incarnation {} of member {key} still lives here",
                    other.incarnation
                ),
            )
            .remedy("end it first")),
        }
    }

    /// Notes whether somebody takes a member's output.
    pub fn listen(&self, key: &MemberKey, on: bool) {
        let mut listened = locked(&self.listened);
        match on {
            true => listened.insert(key.clone()),
            false => listened.remove(key),
        };
        if let Some(member) = self.get(key) {
            member.listening.send_replace(on);
        }
    }

    /// Nobody takes any output: the link is gone.
    pub fn listen_to_none(&self) {
        locked(&self.listened).clear();
        for member in self.all() {
            member.listening.send_replace(false);
        }
    }

    fn insert(&self, member: Arc<Member>) {
        let listened = locked(&self.listened);
        member
            .listening
            .send_replace(listened.contains(&member.key));
        locked(&self.table).insert(member.key.clone(), member);
    }

    fn remove(&self, key: &MemberKey) {
        locked(&self.listened).remove(key);
        if let Some(member) = locked(&self.table).remove(key) {
            member.stop_following();
        }
    }
}

/// Notes a member's end, durably, and tells it. The first word counts.
pub async fn note_end(node: &Arc<Node>, member: &Arc<Member>, status: ExitStatus) {
    {
        let mut ended = locked(&member.ended);
        if ended.is_some() {
            return;
        }
        *ended = Some(status);
    }
    if let Err(error) = write_record(node, member).await {
        // The capsule keeps the status as well.
        tracing::error!(member = %member.key, %error, "a member's end could not be written down");
    }
    tracing::info!(member = %member.key, ?status, "ended");
    node.outbox.event(FromAgent::Ended {
        key: member.key.clone(),
        status,
    });
}

/// Writes a member's state down.
async fn write_record(node: &Arc<Node>, member: &Arc<Member>) -> std::io::Result<()> {
    let (node, record) = (node.clone(), member.record());
    blocking(move || match record {
        Some(record) => record.write(&node.settings.run_dir),
        None => Ok(()),
    })
    .await
}

/// Ends a member's processes and proves it. Also right for a member that nobody here knows: then
/// nothing of its name may be running.
///
/// # Errors
/// A report when the proof does not come.
pub async fn kill(node: &Arc<Node>, key: &MemberKey) -> Result<(), Report> {
    let _gate = node.members.gate(key).await;
    let patience = node.settings.kill_patience;
    let Some(member) = node.members.get(key) else {
        let (node, key) = (node.clone(), key.clone());
        return blocking(move || kill_unknown(&node, &key)).await;
    };
    // A half-built tree and a hold go first, so that the engine does not work on what dies.
    drop(locked(&member.built).take());
    let session = locked(&member.session).take();
    if let Some(session) = session {
        session.abort().await;
    }
    let body = member.body.clone();
    blocking(move || match body {
        Body::Capsule { capsule, .. } => capsule.kill(patience).map_err(|error| error.report()),
        Body::Adopted(adopted) => adopted.kill(patience),
        Body::Gone => Ok(()),
    })
    .await?;
    note_end(
        node,
        &member,
        ExitStatus::Signaled(rustix::process::Signal::KILL.as_raw()),
    )
    .await;
    Ok(())
}

/// A capsule of this name may be left from an agent whose state was lost.
fn kill_unknown(node: &Node, key: &MemberKey) -> Result<(), Report> {
    let name = short_name(key);
    let socket = node.run_path("capsules", &format!("{name}.sock"));
    let found = Capsule::attach(&name, &socket, None, None).map_err(|error| error.report())?;
    match found {
        None => Ok(()),
        Some((capsule, _)) => capsule
            .kill(node.settings.kill_patience)
            .map_err(|error| error.report()),
    }
}

/// Forgets a member whose end the coordinator has recorded; one that lives is kept.
pub async fn forget(node: &Arc<Node>, key: &MemberKey) {
    let _gate = node.members.gate(key).await;
    let Some(member) = node.members.get(key) else {
        return;
    };
    if member.ended().is_none() {
        tracing::warn!(member = %key, "a living member is not forgotten");
        return;
    }
    node.members.remove(key);
    drop_remains(node, &member).await;
}

/// Ends what may be left of a member's capsule and removes its state. Of one that ended by itself the
/// kernel still delivers what it wrote last; any other must not say another word.
async fn drop_remains(node: &Arc<Node>, member: &Arc<Member>) {
    let (node, member) = (node.clone(), member.clone());
    blocking(move || {
        let patience = node.settings.kill_patience;
        let ended = match (member.capsule(), member.ended()) {
            (Some(capsule), Some(_)) => capsule.end(patience),
            (Some(capsule), None) => capsule.kill(patience),
            (None, _) => Ok(()),
        };
        if let Err(error) = ended {
            tracing::error!(member = %member.key, %error, "a capsule could not be removed");
        }
        if let Err(error) = Record::remove(&node.settings.run_dir, &member.key) {
            tracing::error!(member = %member.key, %error, "a member's state could not be removed");
        }
    })
    .await;
}

/// Sends a signal to a member's root process.
///
/// # Errors
/// A report when there is none or the signal cannot be sent.
pub async fn signal(node: &Arc<Node>, key: &MemberKey, signal: i32) -> Result<(), Report> {
    let member = node.members.find(key)?;
    blocking(move || match &member.body {
        Body::Capsule { capsule, .. } => capsule
            .ask(&Ask::Signal { signal })
            .map(|_| ())
            .map_err(|error| error.report()),
        Body::Adopted(adopted) => {
            crcoord_kernel::process_control::signal_process(&*adopted.pidfd, signal).map_err(
                |error| {
                    Report::new("agent-signal", Class::Failure, error.to_string())
                        .pid(adopted.pid)
                        .errno(error.raw_os_error())
                },
            )
        }
        Body::Gone => Err(Report::new(
            "agent-signal",
            Class::NotFound,
            "the member has ended",
        )),
    })
    .await
}

/// Renews a member's run lease; adopted trees have none.
pub async fn renew_run_lease(node: &Arc<Node>, key: &MemberKey, lease_ms: u64) {
    let Some(member) = node
        .members
        .get(key)
        .filter(|member| member.ended().is_none())
    else {
        return;
    };
    let renewed = blocking(move || match member.capsule() {
        Some(capsule) => capsule.ask(&Ask::RenewLease { lease_ms }).map(|_| ()),
        None => Ok(()),
    })
    .await;
    if let Err(error) = renewed {
        tracing::warn!(member = %key, %error, "a run lease was not renewed");
    }
}
