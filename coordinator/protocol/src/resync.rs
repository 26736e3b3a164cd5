//! Agents come and go: what a Hello says is compared with what is known, both ways.

use std::collections::BTreeSet;

use crcoord_common::ids::{Epoch, JobKey, MemberKey, NodeName, RequestId};
use crcoord_common::wire::control::{MemberState, PartState, ToAgent};

use crate::action::{Action, Hello, SessionId};
use crate::coordinator::Coordinator;
use crate::core::Core;
use crate::job::{Activity, CleanUp, Job};
use crate::refusal;
use crate::trees::{Life, Proof, Tree};

impl Coordinator {
    /// An agent connected.
    pub(crate) fn connected(&mut self, node: &NodeName, session: SessionId, hello: Hello) {
        if let Err(report) = self.core.leadership.admit(node, hello.term) {
            self.core
                .warn(format!("agent refused node={node} reason={report}"));
            let reason = report.to_string();
            let node = node.clone();
            self.core.outbox.send(Action::Drop {
                node,
                session,
                reason,
            });
            return;
        }
        if let Some(old) = self.core.nodes.session(node) {
            self.drop_session(node, old, "the agent connected anew");
        }
        self.core
            .nodes
            .connect(self.core.now, node, session, &hello);
        self.core
            .log(format!("agent connected node={node} bulk={}", hello.bulk));
        let welcome = ToAgent::Welcome {
            heartbeat_ms: self.core.settings.heartbeat_ms,
            cluster: self.core.settings.cluster.to_string(),
        };
        self.core.answer(node, RequestId(0), welcome);
        self.resync_members(node, hello.members);
        self.resync_parts(node, &hello.parts);
        for job in self.jobs.values_mut() {
            job.resync_done(&mut self.core, node);
        }
    }

    /// A connection ended.
    pub(crate) fn disconnected(&mut self, node: &NodeName, session: SessionId) {
        let heard = self.core.nodes.get(node).map(|known| known.heard);
        if !self.core.nodes.disconnect(node, session) {
            return;
        }
        self.core.warn(format!("agent lost node={node}"));
        self.core.requests.lost(session);
        let heard = heard.map_or(0, |heard| self.core.unix_at(heard));
        for job in self.jobs.values_mut() {
            job.node_lost(&mut self.core, node, heard);
        }
        for probe in self.probes.values_mut() {
            probe.lost(node);
        }
        self.finish_probes();
    }

    /// Closes a connection and takes it for lost.
    pub(crate) fn drop_session(&mut self, node: &NodeName, session: SessionId, reason: &str) {
        self.core.outbox.send_urgent(Action::Drop {
            node: node.clone(),
            session,
            reason: reason.to_owned(),
        });
        self.disconnected(node, session);
    }

    fn resync_members(&mut self, node: &NodeName, members: Vec<MemberState>) {
        let core = &mut self.core;
        let listed: BTreeSet<MemberKey> = members.iter().map(|state| state.key.clone()).collect();
        for job in self.jobs.values_mut() {
            job.note_missing(node, &listed);
        }
        for state in members {
            match self.jobs.get_mut(&state.key.job) {
                Some(job) => job.resync_member(core, node, state),
                // Perhaps of a journal that was lost: not ours to judge.
                None => core.warn(format!(
                    "member of an unknown job left alone node={node} member={}",
                    state.key
                )),
            }
        }
    }

    fn resync_parts(&mut self, node: &NodeName, parts: &[PartState]) {
        let mut done: BTreeSet<(&JobKey, Epoch)> = BTreeSet::new();
        for state in parts {
            let part = &state.part;
            let Some(job) = self.jobs.get(&part.job) else {
                continue;
            };
            if job.committed.contains_key(&part.epoch) {
                if !state.committed && done.insert((&part.job, part.epoch)) {
                    job.copy_commit(&mut self.core, part.epoch, Some(node));
                }
            } else if part.epoch <= job.last_epoch
                && !job.is_deciding(part.epoch)
                && done.insert((&part.job, part.epoch))
            {
                // After all that is journalled: also a retirement that has just been.
                let last = self.core.outbox.last();
                job.retire_on(&mut self.core, last, node, part.epoch);
            }
        }
    }
}

impl Job {
    /// True while that epoch may still be committed.
    fn is_deciding(&self, epoch: Epoch) -> bool {
        match &self.activity {
            Activity::Checkpoint(open) => open.machine.epoch == epoch,
            Activity::Committing { epoch: open, .. } => open.record.epoch == epoch,
            Activity::Survey { epoch: open, .. } => *open == epoch,
            _ => false,
        }
    }

    /// An agent is lost: whatever needs it fails.
    fn node_lost(&mut self, core: &mut Core, node: &NodeName, heard: u64) {
        if self
            .trees
            .of(self.incarnation)
            .any(|(_, tree)| tree.node == *node && tree.may_run())
        {
            self.last_sign = self.last_sign.max(heard);
        }
        match &self.activity {
            Activity::Starting { .. } => self.start_lost(core, node),
            Activity::Checkpoint(_) if self.placements.iter().any(|at| at.node == *node) => {
                self.abort_checkpoint(core, vec![refusal::agent_lost(node)]);
            }
            Activity::Restart(_) => self.restart_lost(core, node),
            Activity::Survey { .. } => self.survey_lost(core, node),
            _ => {}
        }
    }

    /// Members that the agent of their node does not list.
    fn note_missing(&mut self, node: &NodeName, listed: &BTreeSet<MemberKey>) {
        let job = self.key.clone();
        let mut never_ran = Vec::new();
        for (incarnation, member, tree) in self.trees.iter_mut() {
            let key = MemberKey {
                job: job.clone(),
                incarnation,
                member,
            };
            if tree.node != *node || listed.contains(&key) {
                continue;
            }
            match tree.life {
                Life::Ordered | Life::Running => tree.life = Life::Missing,
                // Half built and not resumed: it ended with its agent's engine.
                Life::Building | Life::Built => never_ran.push((incarnation, member)),
                Life::Missing | Life::Gone { .. } => {}
            }
        }
        for (incarnation, member) in never_ran {
            self.trees.remove(incarnation, member);
        }
    }

    /// One member that the agent lists.
    fn resync_member(&mut self, core: &mut Core, node: &NodeName, state: MemberState) {
        let MemberKey {
            incarnation,
            member,
            ..
        } = state.key;
        if incarnation > self.last_incarnation {
            core.warn(format!(
                "member of an incarnation that the journal does not know left alone node={node} \
                 member={}",
                state.key
            ));
            return;
        }
        match self.trees.tree_mut(incarnation, member) {
            Some(tree) if tree.node == *node => match (state.ended, tree.life) {
                (Some(status), _) => {
                    self.member_gone(core, incarnation, member, status, Proof::Ended);
                    return;
                }
                (None, Life::Gone { proof, .. }) => {
                    core.warn(format!(
                        "member declared dead runs and is ended node={node} member={} \
                         proof={proof:?}",
                        state.key
                    ));
                    tree.life = Life::Running;
                    tree.doomed = true;
                }
                (None, Life::Missing | Life::Ordered) => tree.life = Life::Running,
                (None, _) => {}
            },
            // A life that is over, or one that went on elsewhere.
            _ if state.ended.is_some() => {
                let last = core.outbox.last();
                core.order(last, node, None, ToAgent::Forget { key: state.key });
                return;
            }
            Some(_) => {
                core.warn(format!(
                    "member runs where it should not node={node} member={}",
                    state.key
                ));
                core.kill(core.outbox.last(), node, state.key);
                return;
            }
            None => {
                core.warn(format!(
                    "old member runs and is ended node={node} member={}",
                    state.key
                ));
                let mut tree = Tree::new(node.clone(), Life::Running);
                tree.doomed = true;
                self.trees.insert(incarnation, member, tree);
            }
        }
        if let Some(epoch) = state.epoch
            && !self.is_deciding(epoch)
        {
            let (node, key) = (node.clone(), state.key);
            self.clean_ups.insert(CleanUp { node, key, epoch });
        }
    }

    /// What waits for this node is done now.
    fn resync_done(&mut self, core: &mut Core, node: &NodeName) {
        let last = core.outbox.last();
        for clean_up in self
            .clean_ups
            .iter()
            .filter(|clean_up| clean_up.node == *node)
        {
            clean_up.order(core, last);
        }
        self.kill_doomed(core, Some(node));
        self.listen(core, Some(node));
        self.fence(core);
    }
}
