//! Messages of agents: answers are matched with their requests, events with their members.

use crcoord_common::ids::{Epoch, MemberKey, NodeName, RequestId};
use crcoord_common::report::Report;
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{Frame, FromAgent, ToAgent};
use crcoord_common::wire::member::ExitStatus;

use crate::action::SessionId;
use crate::coordinator::Coordinator;
use crate::job::{Activity, CleanUp, Job};
use crate::requests::Purpose;
use crate::trees::{Life, Proof};

/// SIGKILL (signal(7)).
const SIGKILL: i32 = 9;

impl Coordinator {
    /// A message arrived. What is not of this connection is not believed, nor an answer of
    /// another term.
    pub(crate) fn message(&mut self, node: &NodeName, session: SessionId, frame: Frame<FromAgent>) {
        if !self.core.nodes.is_present(node, session) {
            return;
        }
        self.core.nodes.heard(self.core.now, node);
        match frame.body {
            FromAgent::Hello { .. } => {
                self.core.warn(format!("second hello ignored node={node}"));
            }
            FromAgent::Heartbeat { free_bytes } => {
                self.heartbeat(node, frame.request, free_bytes);
            }
            FromAgent::Ended { key, status } => self.ended(node, &key, status),
            FromAgent::Output { key, stream, bytes } => {
                let (member, event) = (key.member, |member| Event::Output {
                    member,
                    stream,
                    bytes,
                });
                if let Some(job) = self.jobs.get(&key.job) {
                    job.tell_watchers(&mut self.core, Default::default(), &event(member));
                }
            }
            FromAgent::Progress {
                key,
                epoch,
                done_bytes,
                total_bytes,
            } => self.progress(&key, epoch, done_bytes, total_bytes),
            FromAgent::HoldLost { key, epoch, report } => self.hold_lost(&key, epoch, report),
            answer => {
                let purpose = match frame.term == self.core.leadership.term() {
                    true => self
                        .core
                        .requests
                        .answered(node, session, frame.request, &answer),
                    false => None,
                };
                match purpose {
                    Some(purpose) => self.answer(node, purpose, answer),
                    None => self.core.log(format!(
                        "stale answer ignored node={node} request={}",
                        frame.request
                    )),
                }
            }
        }
    }

    fn heartbeat(&mut self, node: &NodeName, request: RequestId, free_bytes: u64) {
        self.core.nodes.set_free_bytes(node, free_bytes);
        self.core.answer(node, request, ToAgent::Alive);
        for job in self.jobs.values_mut() {
            job.renew_run_leases(&mut self.core, node, request);
            job.kill_doomed(&mut self.core, Some(node));
        }
    }

    fn ended(&mut self, node: &NodeName, key: &MemberKey, status: ExitStatus) {
        if let Some(job) = self.jobs.get_mut(&key.job) {
            let tree = job.trees.tree(key.incarnation, key.member);
            // Another node's word about a member that is not there is not believed.
            if tree.is_some_and(|tree| tree.node == *node) {
                job.member_gone(
                    &mut self.core,
                    key.incarnation,
                    key.member,
                    status,
                    Proof::Ended,
                );
            }
        }
    }

    fn progress(&mut self, key: &MemberKey, epoch: Epoch, done_bytes: u64, total_bytes: u64) {
        let now = self.core.now;
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        let client = match &mut job.activity {
            Activity::Checkpoint(open)
                if open.machine.epoch == epoch && key.incarnation == job.incarnation =>
            {
                open.machine.progress(now, key.member, done_bytes);
                open.client
            }
            Activity::Restart(open)
                if open.machine.epoch == epoch && key.incarnation == open.machine.incarnation =>
            {
                open.machine.progress(now, key.member, done_bytes);
                open.client
            }
            _ => return,
        };
        let event = Event::Progress {
            member: key.member,
            done_bytes,
            total_bytes,
        };
        self.core.tell(client, event, false);
    }

    fn hold_lost(&mut self, key: &MemberKey, epoch: Epoch, report: Report) {
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        if job.is_of_open_epoch(key, epoch) {
            job.hold_lost(&mut self.core, key.member, report);
        }
    }

    fn answer(&mut self, node: &NodeName, purpose: Purpose, answer: FromAgent) {
        let core = &mut self.core;
        let key = match &purpose {
            Purpose::Start(key)
            | Purpose::Epoch(key, _)
            | Purpose::Renew(key, _)
            | Purpose::CleanUp(key, _)
            | Purpose::Kill(key)
            | Purpose::Build(key)
            | Purpose::Resume(key)
            | Purpose::Survey(key, _) => key.clone(),
            Purpose::Store => {
                if let FromAgent::Failed(report) = answer {
                    core.warn(format!("store failed node={node} reason={report}"));
                }
                return;
            }
            Purpose::Check(client) => {
                if let Some(probe) = self.probes.get_mut(client) {
                    probe.answered(node, answer);
                    self.finish_probes();
                }
                return;
            }
        };
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        match (purpose, answer) {
            (Purpose::Start(_), FromAgent::Started { owner, .. }) => job.started(core, &key, owner),
            (Purpose::Start(_), FromAgent::Failed(report)) => {
                // It never came to be, so there is nothing to prove or to end.
                if !job
                    .trees
                    .tree(key.incarnation, key.member)
                    .is_some_and(|tree| tree.is_gone())
                {
                    job.trees.remove(key.incarnation, key.member);
                }
                job.start_failed(core, vec![report.on_node(node)]);
                job.finish_ending(core);
            }
            (Purpose::Epoch(_, epoch), answer) if job.is_of_open_epoch(&key, epoch) => {
                job.epoch_answered(core, &key, answer);
            }
            (Purpose::Renew(_, epoch), answer) if job.is_of_open_epoch(&key, epoch) => match answer
            {
                FromAgent::Done => job.renewed(key.member),
                FromAgent::Failed(report) => job.hold_lost(core, key.member, report),
                _ => {}
            },
            (Purpose::CleanUp(_, epoch), FromAgent::Done) => {
                let node = node.clone();
                job.clean_ups.remove(&CleanUp { node, key, epoch });
            }
            (Purpose::CleanUp(..), FromAgent::Failed(report)) => {
                core.warn(format!("abort failed member={key} reason={report}"));
            }
            (Purpose::Kill(_), FromAgent::Killed) => {
                let status = ExitStatus::Signaled(SIGKILL);
                job.member_gone(core, key.incarnation, key.member, status, Proof::Killed);
            }
            (Purpose::Kill(_), FromAgent::Failed(report)) => {
                job.kill_failed(core, &key, report.on_node(node));
            }
            (Purpose::Build(_), FromAgent::Built { replica, .. }) => {
                job.built(core, &key, replica);
            }
            (Purpose::Resume(_), FromAgent::Done) => job.resumed(core, &key),
            (Purpose::Build(_) | Purpose::Resume(_), FromAgent::Failed(report))
                if job.is_restarting(&key) =>
            {
                job.fail_restart(core, vec![report.on_node(node)]);
            }
            (Purpose::Survey(..), answer) => job.survey_answered(core, &key, answer),
            (purpose, _) => {
                core.log(format!(
                    "answer without use ignored node={node} request={purpose:?}"
                ));
            }
        }
    }
}

impl Job {
    /// True when that member and epoch are of the checkpoint in progress.
    pub(crate) fn is_of_open_epoch(&self, key: &MemberKey, epoch: Epoch) -> bool {
        match &self.activity {
            Activity::Checkpoint(open) => {
                open.machine.epoch == epoch && key.incarnation == self.incarnation
            }
            _ => false,
        }
    }

    fn is_restarting(&self, key: &MemberKey) -> bool {
        match &self.activity {
            Activity::Restart(open) => open.machine.incarnation == key.incarnation,
            _ => false,
        }
    }

    fn renewed(&mut self, member: crcoord_common::ids::MemberId) {
        if let Activity::Checkpoint(open) = &mut self.activity {
            open.machine.renewed(member);
        }
    }

    /// Renews the run leases of members on a node that has just been heard. A member that is to be
    /// ended gets none: its end may be what is waited for.
    fn renew_run_leases(
        &mut self,
        core: &mut crate::core::Core,
        node: &NodeName,
        heartbeat: RequestId,
    ) {
        let Some(lease_ms) = self.spec.run_lease_ms else {
            return;
        };
        let now = core.now;
        let job = self.key.clone();
        for (incarnation, member, tree) in self.trees.iter_mut() {
            let alive = matches!(tree.life, Life::Running | Life::Building | Life::Built);
            if tree.node != *node || tree.doomed || !alive {
                continue;
            }
            tree.lease.renewed(now, heartbeat, lease_ms);
            let key = MemberKey {
                job: job.clone(),
                incarnation,
                member,
            };
            core.answer(node, heartbeat, ToAgent::RunLease { key, lease_ms });
        }
    }
}
