//! The first incarnation: starting a job's members, or adopting a running tree.

use std::collections::BTreeSet;

use crcoord_common::ids::{MemberId, MemberKey, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::ToAgent;
use crcoord_common::wire::member::{Owner, Placement};

use crate::action::ClientId;
use crate::checkpoint::CheckpointRequest;
use crate::core::Core;
use crate::job::{Activity, Job};
use crate::outbox::Sequence;
use crate::record::Record;
use crate::refusal;
use crate::requests::Purpose;
use crate::trees::{Life, Tree};

impl Job {
    /// Orders every member to be started once the job is journalled.
    pub(crate) fn start(&mut self, core: &mut Core, client: ClientId, attach: bool) {
        if attach {
            self.watchers.insert(client);
        }
        let sequence = self.begin_starting(core, client, attach, None);
        let Some(command) = self.spec.command.clone() else {
            return;
        };
        for placement in self.placements.clone() {
            let key = self.member_key(self.incarnation, placement.member);
            let Some(capsule) = self.capsule(core, placement.member, &self.placements) else {
                continue;
            };
            let purpose = Some(Purpose::Start(key.clone()));
            let command = command.clone();
            let order = ToAgent::Start {
                key,
                capsule,
                command,
            };
            core.order(sequence, &placement.node, purpose, order);
        }
        self.listen(core, None);
    }

    /// Orders the one member's tree to be adopted once the job is journalled.
    pub(crate) fn adopt(
        &mut self,
        core: &mut Core,
        client: ClientId,
        pid: i32,
        caller: u32,
        then: CheckpointRequest,
    ) {
        let sequence = self.begin_starting(core, client, false, Some(then));
        for placement in self.placements.clone() {
            let key = self.member_key(self.incarnation, placement.member);
            let purpose = Some(Purpose::Start(key.clone()));
            let order = ToAgent::Adopt { key, pid, caller };
            core.order(sequence, &placement.node, purpose, order);
        }
    }

    fn begin_starting(
        &mut self,
        core: &mut Core,
        client: ClientId,
        attach: bool,
        then: Option<CheckpointRequest>,
    ) -> Sequence {
        let sequence = core.persist(Record::JobStarting {
            job: self.key.clone(),
            spec: self.spec.clone(),
            placements: self.placements.clone(),
        });
        for Placement { member, node, .. } in &self.placements {
            let tree = Tree::new(node.clone(), Life::Ordered);
            self.trees.insert(self.incarnation, *member, tree);
        }
        self.activity = Activity::Starting {
            client: Some(client),
            attach,
            waiting: self.placements.iter().map(|at| at.member).collect(),
            deadline: core.now.after(core.settings.answer_ms),
            then,
        };
        sequence
    }

    /// A member's program runs.
    pub(crate) fn started(&mut self, core: &mut Core, key: &MemberKey, owner: Owner) {
        let (now, lease_ms) = (core.now, self.spec.run_lease_ms);
        if let Some(tree) = self.trees.tree_mut(key.incarnation, key.member) {
            if tree.life == Life::Ordered {
                tree.life = Life::Running;
            }
            if let Some(lease_ms) = lease_ms {
                tree.lease.begun(now, lease_ms);
            }
        }
        let Activity::Starting { waiting, .. } = &mut self.activity else {
            return;
        };
        if !waiting.remove(&key.member) || !waiting.is_empty() {
            return;
        }
        let adopted = self.is_adopted().then_some(owner);
        if let Some(owner) = &adopted {
            self.spec.owner = owner.clone();
        }
        let sequence = core.persist(Record::JobRunning {
            job: self.key.clone(),
            owner: adopted,
        });
        let Activity::Starting {
            client,
            attach,
            then,
            ..
        } = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        match then {
            Some(request) => self.open_checkpoint(core, client, request),
            None => {
                let event = Event::JobStarted {
                    job: self.key.clone(),
                    placements: self.placements.clone(),
                };
                core.tell_after(sequence, client, event, !attach);
                self.tell_if_over(core);
            }
        }
    }

    /// The job cannot be started: what was started of it is ended.
    pub(crate) fn start_failed(&mut self, core: &mut Core, reasons: Vec<Report>) {
        let Activity::Starting { client, .. } = &self.activity else {
            return;
        };
        let client = *client;
        let sequence = core.persist(Record::JobFailed {
            job: self.key.clone(),
        });
        // The caller who would have been attached gets the reasons instead.
        self.watchers.clear();
        core.fail(sequence, client, reasons);
        if self.is_adopted() {
            // Not ours to end.
            for placement in &self.placements {
                self.trees.remove(self.incarnation, placement.member);
            }
            self.activity = Activity::Idle;
            return;
        }
        self.end_all(core, None, Event::Done);
    }

    /// A member's agent is lost while the job is being started.
    pub(crate) fn start_lost(&mut self, core: &mut Core, node: &NodeName) {
        let Activity::Starting { waiting, .. } = &self.activity else {
            return;
        };
        if waiting
            .iter()
            .any(|member| self.node_of(*member) == Some(node))
        {
            self.start_failed(core, vec![refusal::agent_lost(node)]);
        }
    }

    /// The start's deadline may have passed.
    pub(crate) fn start_tick(&mut self, core: &mut Core) {
        let Activity::Starting {
            waiting, deadline, ..
        } = &self.activity
        else {
            return;
        };
        if core.now < *deadline {
            return;
        }
        let late = |member: &MemberId| {
            let report = Report::new(
                "start-deadline",
                Class::TimedOut,
                format!("member {member} was not started in time"),
            );
            let report = report.remedy("look into the agent's log on its node");
            match self.node_of(*member) {
                Some(node) => report.on_node(node),
                None => report,
            }
        };
        let waiting: &BTreeSet<MemberId> = waiting;
        let reasons = waiting.iter().map(late).collect();
        self.start_failed(core, reasons);
    }
}
