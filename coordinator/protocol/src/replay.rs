//! From the journal to the state, and what a new term gives up of the life before.

use std::collections::BTreeSet;

use crcoord_common::ids::{Epoch, Incarnation, JobKey};
use crcoord_common::report::{Class, Report};

use crate::coordinator::Coordinator;
use crate::core::Core;
use crate::job::Job;
use crate::record::Record;
use crate::trees::{Life, Tree};

/// What a job's records have begun and not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Unfinished {
    starting: bool,
    epochs: BTreeSet<Epoch>,
    restart: Option<Incarnation>,
    /// Where the members of that restart are.
    placements: Vec<crcoord_common::wire::member::Placement>,
}

impl Coordinator {
    /// One record of the journal.
    pub(crate) fn replay(&mut self, record: Record) {
        match record {
            Record::TermBegan { term } => self.core.leadership.replay(term),
            Record::JobStarting {
                job,
                spec,
                placements,
            } => {
                let mut new = Job::new(job.clone(), spec, placements);
                for at in &new.placements {
                    let tree = Tree::new(at.node.clone(), Life::Ordered);
                    new.trees.insert(new.incarnation, at.member, tree);
                }
                new.unfinished.starting = true;
                self.jobs.insert(job, new);
            }
            Record::JobRunning { job, owner } => self.replay_job(&job, |job| {
                job.unfinished.starting = false;
                job.set_life(job.incarnation, Life::Running);
                if let Some(owner) = owner {
                    job.spec.owner = owner;
                }
            }),
            Record::JobFailed { job } => self.replay_job(&job, Job::replay_failed),
            Record::MemberGone {
                key,
                status,
                proof,
                at,
            } => self.replay_job(&key.job, |job| {
                if let Some(tree) = job.trees.tree_mut(key.incarnation, key.member) {
                    tree.life = Life::Gone { status, proof };
                    tree.doomed = false;
                }
                if key.incarnation == job.incarnation {
                    job.last_sign = job.last_sign.max(at);
                }
                job.trees.prune(job.incarnation);
            }),
            Record::Intent { job, epoch, .. } => self.replay_job(&job, |job| {
                job.last_epoch = job.last_epoch.max(epoch);
                job.unfinished.epochs.insert(epoch);
            }),
            Record::Commit(epoch) => self.replay_job(&epoch.record.job.clone(), |job| {
                job.unfinished.epochs.remove(&epoch.record.epoch);
                job.committed.insert(epoch.record.epoch, *epoch);
            }),
            Record::Abort { job, epoch, .. } => self.replay_job(&job, |job| {
                job.unfinished.epochs.remove(&epoch);
            }),
            Record::Retired { job, epoch } => self.replay_job(&job, |job| {
                job.committed.remove(&epoch);
            }),
            Record::ReplicaAdded {
                job,
                epoch,
                member,
                replica,
            } => self.replay_job(&job, |job| {
                let committed = job.committed.get_mut(&epoch);
                let parts = committed.map(|epoch| epoch.record.members.iter_mut());
                if let Some(part) = parts
                    .into_iter()
                    .flatten()
                    .find(|part| part.member == member)
                {
                    part.replicas.push(replica);
                }
            }),
            Record::Restarting {
                job,
                incarnation,
                placements,
                ..
            } => self.replay_job(&job, |job| {
                job.last_incarnation = incarnation;
                for at in &placements {
                    let tree = Tree::new(at.node.clone(), Life::Building);
                    job.trees.insert(incarnation, at.member, tree);
                }
                job.unfinished.restart = Some(incarnation);
                job.unfinished.placements = placements;
            }),
            Record::Resuming { job, incarnation } => self.replay_job(&job, |job| {
                job.set_life(incarnation, Life::Running);
            }),
            Record::Resumed { job, incarnation } => self.replay_job(&job, |job| {
                job.incarnation = incarnation;
                job.placements = std::mem::take(&mut job.unfinished.placements);
                job.unfinished.restart = None;
                job.trees.prune(incarnation);
            }),
            Record::RestartFailed { job, incarnation } => self.replay_job(&job, |job| {
                job.unfinished.restart = None;
                job.trees.doom(Some(incarnation));
            }),
        }
    }

    /// Ends what the life before has begun: journalled now, carried out as the agents connect.
    pub(crate) fn settle(&mut self) {
        for job in self.jobs.values_mut() {
            job.settle(&mut self.core);
        }
    }

    fn replay_job(&mut self, job: &JobKey, change: impl FnOnce(&mut Job)) {
        // Only a damaged journal has records of a job that it has not started.
        if let Some(job) = self.jobs.get_mut(job) {
            change(job);
        }
    }
}

impl Job {
    fn set_life(&mut self, incarnation: Incarnation, life: Life) {
        for (of, _, tree) in self.trees.iter_mut() {
            if of == incarnation && !tree.is_gone() {
                tree.life = life;
            }
        }
    }

    fn replay_failed(&mut self) {
        self.unfinished.starting = false;
        if self.is_adopted() {
            for at in &self.placements {
                self.trees.remove(self.incarnation, at.member);
            }
        } else {
            self.trees.doom(None);
        }
    }

    fn settle(&mut self, core: &mut Core) {
        let unfinished = std::mem::take(&mut self.unfinished);
        let job = self.key.clone();
        for epoch in unfinished.epochs {
            let job = job.clone();
            let reasons = vec![
                Report::new(
                    "coordinator-restarted",
                    Class::Aborted,
                    "the coordinator was restarted while the epoch was open",
                )
                .remedy("ask for another checkpoint"),
            ];
            core.warn(format!("unfinished epoch aborted job={job} epoch={epoch}"));
            core.persist(Record::Abort {
                job,
                epoch,
                reasons,
            });
        }
        if unfinished.starting {
            core.warn(format!("unfinished start given up job={job}"));
            core.persist(Record::JobFailed { job: job.clone() });
            self.replay_failed();
        }
        if let Some(incarnation) = unfinished.restart {
            core.warn(format!(
                "unfinished restart given up job={job} incarnation={incarnation}"
            ));
            core.persist(Record::RestartFailed { job, incarnation });
            self.trees.doom(Some(incarnation));
        }
        // The life before may have renewed a run lease up to this moment.
        let Some(lease_ms) = self.spec.run_lease_ms else {
            return;
        };
        for (_, _, tree) in self.trees.iter_mut() {
            if matches!(tree.life, Life::Running) {
                tree.lease.unknown_before(core.now, lease_ms);
            }
        }
    }
}
