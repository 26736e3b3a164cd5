//! `Job`: everything known of one job, and the one thing that is being done with it.
//!
//! ```text
//! Starting --> Idle <--> Checkpoint --> Committing --> Idle | Ending (--kill)
//!     |         | \<--> Survey              (until the commit is durable)
//!     |         +-----> Restart --> Idle
//!     +-------> Ending <-- Kill
//! ```

use std::collections::{BTreeMap, BTreeSet};

use crcoord_common::ids::{Epoch, Incarnation, JobKey, MemberId, MemberKey, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{CaptureOptions, Preflight, ToAgent};
use crcoord_common::wire::member::{
    CapsuleSpec, ExitStatus, JobSpec, MemberNetwork, NetworkMode, Placement, Stdio,
};

use crate::action::ClientId;
use crate::checkpoint::CheckpointRequest;
use crate::core::Core;
use crate::epoch::Checkpoint;
use crate::outbox::Sequence;
use crate::record::CommittedEpoch;
use crate::refusal;
use crate::replay::Unfinished;
use crate::restart::Restart;
use crate::time::Millis;
use crate::trees::{Life, Trees};

/// An epoch whose pages must be dropped by a member's agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct CleanUp {
    pub(crate) node: NodeName,
    pub(crate) key: MemberKey,
    pub(crate) epoch: Epoch,
}

/// What is being done with a job: one thing at a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Activity {
    Idle,
    Starting {
        client: Option<ClientId>,
        attach: bool,
        waiting: BTreeSet<MemberId>,
        deadline: Millis,
        /// The checkpoint for which a tree is adopted.
        then: Option<CheckpointRequest>,
    },
    Checkpoint(Box<Checkpointing>),
    Committing {
        sequence: Sequence,
        epoch: Box<CommittedEpoch>,
        notes: Vec<Report>,
        client: Option<ClientId>,
        kill: bool,
    },
    Restart(Box<Restarting>),
    /// All members are being ended; then the client is told.
    Ending {
        client: Option<ClientId>,
        last: Box<Event>,
        deadline: Millis,
    },
    Survey {
        client: Option<ClientId>,
        epoch: Epoch,
        found: BTreeMap<MemberId, Option<Preflight>>,
        deadline: Millis,
    },
}

/// A checkpoint with who asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Checkpointing {
    pub(crate) machine: Checkpoint,
    pub(crate) client: Option<ClientId>,
    pub(crate) kill: bool,
    pub(crate) options: CaptureOptions,
    pub(crate) opened: Millis,
    /// When all were held, in seconds since 1970-01-01 UTC.
    pub(crate) taken: u64,
    pub(crate) intent: Sequence,
    pub(crate) notes: Vec<Report>,
}

/// A restart with who asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Restarting {
    pub(crate) machine: Restart,
    pub(crate) client: Option<ClientId>,
    pub(crate) attach: bool,
    /// Nodes that an operator declared dead.
    pub(crate) confirmed: BTreeSet<NodeName>,
    pub(crate) lost_seconds: u64,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    pub(crate) key: JobKey,
    pub(crate) spec: JobSpec,
    /// The nodes of the first incarnation, whose names are the members' host names for life.
    pub(crate) first_nodes: Vec<NodeName>,
    pub(crate) incarnation: Incarnation,
    /// Highest incarnation ever journalled: failed restarts use numbers up, too.
    pub(crate) last_incarnation: Incarnation,
    pub(crate) placements: Vec<Placement>,
    pub(crate) trees: Trees,
    pub(crate) last_epoch: Epoch,
    pub(crate) committed: BTreeMap<Epoch, CommittedEpoch>,
    pub(crate) activity: Activity,
    pub(crate) watchers: BTreeSet<ClientId>,
    pub(crate) clean_ups: BTreeSet<CleanUp>,
    /// Last sign of life of the present incarnation, in seconds since 1970-01-01 UTC.
    pub(crate) last_sign: u64,
    /// While the journal is replayed: what it has begun and not ended.
    pub(crate) unfinished: Unfinished,
}

impl Job {
    pub(crate) fn new(key: JobKey, spec: JobSpec, placements: Vec<Placement>) -> Self {
        Job {
            key,
            spec,
            first_nodes: placements.iter().map(|at| at.node.clone()).collect(),
            incarnation: Incarnation(1),
            last_incarnation: Incarnation(1),
            placements,
            trees: Trees::default(),
            last_epoch: Epoch(0),
            committed: BTreeMap::new(),
            activity: Activity::Idle,
            watchers: BTreeSet::new(),
            clean_ups: BTreeSet::new(),
            last_sign: 0,
            unfinished: Unfinished::default(),
        }
    }

    pub(crate) fn member_key(&self, incarnation: Incarnation, member: MemberId) -> MemberKey {
        MemberKey {
            job: self.key.clone(),
            incarnation,
            member,
        }
    }

    /// The node of a member of the present incarnation.
    pub(crate) fn node_of(&self, member: MemberId) -> Option<&NodeName> {
        let placement = self.placements.iter().find(|at| at.member == member);
        placement.map(|at| &at.node)
    }

    pub(crate) fn is_adopted(&self) -> bool {
        self.spec.command.is_none()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.activity == Activity::Idle
    }

    /// True when all members of the present incarnation are proven dead and nothing is under way.
    pub(crate) fn is_over(&self) -> bool {
        let gone = self
            .trees
            .of(self.incarnation)
            .all(|(_, tree)| tree.is_gone());
        gone && !matches!(
            self.activity,
            Activity::Restart(_) | Activity::Starting { .. }
        )
    }

    /// How each member of the present incarnation ended, as far as known.
    pub(crate) fn statuses(&self) -> Vec<(MemberId, ExitStatus)> {
        let trees = self.trees.of(self.incarnation);
        trees
            .filter_map(|(member, tree)| match tree.life {
                Life::Gone { status, .. } => Some((member, status)),
                _ => None,
            })
            .collect()
    }

    /// What a member's capsule is made of in a given placement.
    pub(crate) fn capsule(
        &self,
        core: &Core,
        member: MemberId,
        placements: &[Placement],
    ) -> Option<CapsuleSpec> {
        let address = placements.iter().find(|at| at.member == member)?.address;
        let network = match self.spec.network {
            NetworkMode::Host => MemberNetwork::Host,
            NetworkMode::Virtual => MemberNetwork::Virtual {
                address,
                prefix: core.settings.pool.prefix(),
            },
        };
        Some(CapsuleSpec {
            owner: self.spec.owner.clone(),
            stdio: self.spec.stdio.clone(),
            network,
            hostname: self.first_nodes.get(member.0 as usize)?.to_string(),
            run_lease_ms: self.spec.run_lease_ms,
            placements: placements.to_vec(),
        })
    }

    /// Tells all who are attached.
    pub(crate) fn tell_watchers(&self, core: &mut Core, after: Sequence, event: &Event) {
        for watcher in &self.watchers {
            core.tell_after(after, Some(*watcher), event.clone(), false);
        }
    }

    /// Tells all who are attached that the job ended, if it has, and lets them go.
    pub(crate) fn tell_if_over(&mut self, core: &mut Core) {
        if !self.is_over() || self.watchers.is_empty() {
            return;
        }
        let statuses = self.statuses();
        for watcher in std::mem::take(&mut self.watchers) {
            let statuses = statuses.clone();
            let last = core.outbox.last();
            core.tell_after(last, Some(watcher), Event::JobEnded { statuses }, true);
        }
    }

    /// Attaches a command to the job's output.
    pub(crate) fn watch(&mut self, core: &mut Core, client: ClientId) {
        let first = self.watchers.is_empty();
        self.watchers.insert(client);
        if first {
            self.listen(core, None);
        }
    }

    /// A command went away.
    pub(crate) fn left(&mut self, core: &mut Core, gone: ClientId) {
        if self.watchers.remove(&gone) && self.watchers.is_empty() {
            self.listen(core, None);
        }
        let client = match &mut self.activity {
            Activity::Idle => return,
            Activity::Starting { client, .. }
            | Activity::Committing { client, .. }
            | Activity::Ending { client, .. }
            | Activity::Survey { client, .. } => client,
            Activity::Checkpoint(checkpoint) => &mut checkpoint.client,
            Activity::Restart(restart) => &mut restart.client,
        };
        if *client == Some(gone) {
            *client = None;
        }
    }

    /// Tells agents (or one of them) whether somebody takes the members' output.
    pub(crate) fn listen(&self, core: &mut Core, only: Option<&NodeName>) {
        if self.spec.stdio != Stdio::Caller {
            return;
        }
        let on = !self.watchers.is_empty();
        for (incarnation, member, tree) in self.trees.iter() {
            if tree.is_gone() || only.is_some_and(|only| *only != tree.node) {
                continue;
            }
            let key = self.member_key(incarnation, member);
            let last = core.outbox.last();
            core.order(last, &tree.node, None, ToAgent::Listen { key, on });
        }
    }

    /// Reports of members of the present incarnation that cannot take part in a checkpoint.
    pub(crate) fn absent(&self, core: &Core) -> Vec<Report> {
        let trees = self.trees.of(self.incarnation);
        trees
            .filter_map(|(member, tree)| match tree.life {
                Life::Gone { status, .. } => {
                    let ended = refusal::member_ended(member, &tree.node, status);
                    Some(Report {
                        class: Class::Obstacle,
                        ..ended
                    })
                }
                _ if !core.nodes.is_connected(&tree.node) => {
                    Some(refusal::not_connected(&tree.node))
                }
                Life::Missing => Some(refusal::member_missing(member, &tree.node)),
                _ => None,
            })
            .collect()
    }
}
