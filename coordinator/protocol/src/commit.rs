//! The commit: journalled first; then the epoch is visible, copied to the stores, older ones are
//! retired and, where asked, the job is ended.

use std::collections::{BTreeMap, BTreeSet};

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, MemberId, NodeName, PartKey};
use crcoord_common::wire::client::{EpochInfo, Event};
use crcoord_common::wire::control::ToAgent;
use crcoord_common::wire::member::{MemberCommit, Replica};

use crate::core::Core;
use crate::epoch::Sealed;
use crate::job::{Activity, Job};
use crate::outbox::Sequence;
use crate::record::{CommittedEpoch, Record};
use crate::requests::Purpose;
use crate::retention;
use crate::views;

impl Job {
    /// Every member sealed: hands the commit to the journal. Nothing else happens before it is
    /// durable.
    pub(crate) fn commit(&mut self, core: &mut Core, sealed: Sealed) {
        let Activity::Checkpoint(open) = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        let node = |commit: MemberCommit| MemberCommit {
            node: self.node_of(commit.member).cloned().unwrap_or(commit.node),
            ..commit
        };
        let record = CommitRecord {
            job: self.key.clone(),
            epoch: open.machine.epoch,
            incarnation: self.incarnation,
            term: core.leadership.term(),
            taken: open.taken,
            spec: self.spec.clone(),
            placements: self.placements.clone(),
            members: sealed.members.into_iter().map(node).collect(),
        };
        let epoch = CommittedEpoch {
            record,
            stream_ms: sealed.stream_ms,
            total_ms: core.now.since(open.opened),
        };
        core.close_epoch(&self.key, open.machine.epoch);
        let sequence = core.persist(Record::Commit(Box::new(epoch.clone())));
        self.activity = Activity::Committing {
            sequence,
            epoch: Box::new(epoch),
            notes: open.notes,
            client: open.client,
            kill: open.kill,
        };
    }

    /// Goes on after a commit once its record is durable.
    pub(crate) fn finish_commit(&mut self, core: &mut Core) {
        match &self.activity {
            Activity::Committing { sequence, .. } if core.outbox.is_persisted(*sequence) => {}
            _ => return,
        }
        let Activity::Committing {
            epoch,
            notes,
            client,
            kill,
            ..
        } = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        let number = epoch.record.epoch;
        let info = EpochInfo {
            notes,
            ..views::epoch_info(&epoch)
        };
        self.committed.insert(number, *epoch);
        self.copy_commit(core, number, None);
        self.retire_surplus(core);
        core.log(format!("epoch committed job={} epoch={number}", self.key));
        if kill {
            self.end_all(core, client, Event::Committed(info));
        } else {
            core.tell(client, Event::Committed(info), true);
            self.tell_if_over(core);
        }
    }

    /// Puts the commit record beside the parts: on every node that holds one, or on one node.
    pub(crate) fn copy_commit(&self, core: &mut Core, number: Epoch, only: Option<&NodeName>) {
        let Some(epoch) = self.committed.get(&number) else {
            return;
        };
        let bytes = epoch.record.encode();
        for (node, member) in holders(&epoch.record) {
            if only.is_some_and(|only| *only != node) {
                continue;
            }
            let part = PartKey {
                job: self.key.clone(),
                epoch: number,
                member,
            };
            let record = bytes.clone();
            core.order(
                Sequence(0),
                &node,
                Some(Purpose::Store),
                ToAgent::Commit { part, record },
            );
        }
    }

    /// Gives up what retention does not keep.
    fn retire_surplus(&mut self, core: &mut Core) {
        let committed: BTreeSet<Epoch> = self.committed.keys().copied().collect();
        let open = matches!(
            self.activity,
            Activity::Checkpoint(_) | Activity::Committing { .. }
        );
        let in_use = match &self.activity {
            Activity::Restart(restart) => Some(restart.machine.epoch),
            _ => None,
        };
        for epoch in retention::surplus(&committed, core.settings.keep_epochs, open, in_use) {
            let Some(old) = self.committed.remove(&epoch) else {
                continue;
            };
            let job = self.key.clone();
            let sequence = core.persist(Record::Retired { job, epoch });
            for node in holders(&old.record).into_keys() {
                self.retire_on(core, sequence, &node, epoch);
            }
            core.log(format!("epoch retired job={} epoch={epoch}", self.key));
        }
    }
}

/// The nodes that hold parts of an epoch, each with one of the members whose part it holds.
fn holders(record: &CommitRecord) -> BTreeMap<NodeName, MemberId> {
    let mut holders = BTreeMap::new();
    for commit in &record.members {
        for replica in &commit.replicas {
            if let Replica::Node(node) = replica {
                holders.entry(node.clone()).or_insert(commit.member);
            }
        }
        // Its own part is what a member's agent knows best.
        if commit
            .replicas
            .contains(&Replica::Node(commit.node.clone()))
        {
            holders.insert(commit.node.clone(), commit.member);
        }
    }
    holders
}
