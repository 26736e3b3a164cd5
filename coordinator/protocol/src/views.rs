//! What people are shown: jobs, epochs, the cluster.

use crcoord_common::wire::client::{EpochInfo, JobInfo, JobState, MemberFigures, NodeInfo};

use crate::coordinator::Coordinator;
use crate::core::Core;
use crate::job::{Activity, Job};
use crate::record::CommittedEpoch;
use crate::trees::Life;

/// A committed epoch.
pub(crate) fn epoch_info(epoch: &CommittedEpoch) -> EpochInfo {
    let record = &epoch.record;
    let figures = record
        .members
        .iter()
        .enumerate()
        .map(|(index, member)| MemberFigures {
            member: member.member,
            node: member.node.clone(),
            freeze_us: member.freeze_us,
            raw_bytes: member.raw_bytes,
            stored_bytes: member.stored_bytes,
            stream_ms: epoch.stream_ms.get(index).copied().unwrap_or(0),
        });
    EpochInfo {
        epoch: record.epoch,
        incarnation: record.incarnation,
        taken: record.taken,
        members: figures.collect(),
        total_ms: epoch.total_ms,
        notes: Vec::new(),
    }
}

/// A job.
pub(crate) fn job_info(core: &Core, job: &Job) -> JobInfo {
    JobInfo {
        job: job.key.clone(),
        uid: job.spec.owner.uid,
        state: state(core, job),
        incarnation: job.incarnation,
        placements: job.placements.clone(),
        ended: job.statuses(),
        epochs: job.committed.values().map(epoch_info).collect(),
        run_lease_ms: job.spec.run_lease_ms,
        open_epoch: match &job.activity {
            Activity::Checkpoint(open) => Some((open.machine.epoch, open.machine.phase())),
            Activity::Committing { epoch, .. } => Some((
                epoch.record.epoch,
                crcoord_common::wire::client::Phase::Commit,
            )),
            _ => None,
        },
    }
}

fn state(core: &Core, job: &Job) -> JobState {
    let unknown = job.trees.of(job.incarnation).any(|(_, tree)| {
        !tree.is_gone() && (tree.life == Life::Missing || !core.nodes.is_connected(&tree.node))
    });
    match &job.activity {
        Activity::Restart(_) => JobState::Restarting,
        _ if job.is_over() => JobState::Ended,
        _ if unknown => JobState::Unknown,
        _ => JobState::Running,
    }
}

impl Coordinator {
    /// All nodes seen in this term.
    pub(crate) fn node_infos(&self) -> Vec<NodeInfo> {
        let load = self.load();
        let nodes = self.core.nodes.iter();
        nodes
            .map(|(name, node)| NodeInfo {
                node: name.clone(),
                address: Some(node.bulk),
                connected: node.session.is_some(),
                silent_ms: self.core.now.since(node.heard),
                free_bytes: node.free_bytes,
                members: load.get(name).copied().unwrap_or(0),
            })
            .collect()
    }
}
