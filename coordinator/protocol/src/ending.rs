//! Ending members: killing what is to be ended, learning that it is gone, telling who waits.

use crcoord_common::ids::{Incarnation, MemberId, MemberKey, NodeName};
use crcoord_common::report::Report;
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::ToAgent;
use crcoord_common::wire::member::ExitStatus;

use crate::action::ClientId;
use crate::core::Core;
use crate::job::{Activity, Job};
use crate::record::Record;
use crate::refusal;
use crate::trees::{Life, Proof};

impl Job {
    /// Ends all members of all incarnations, then tells `client` the `last` event.
    pub(crate) fn end_all(&mut self, core: &mut Core, client: Option<ClientId>, last: Event) {
        self.trees.doom(None);
        self.activity = Activity::Ending {
            client,
            last: Box::new(last),
            deadline: core.now.after(core.settings.answer_ms),
        };
        self.kill_doomed(core, None);
        self.finish_ending(core);
    }

    /// Tells the agents (or one of them) to end what is to be ended. Done again whenever a node
    /// connects or reports, until it is confirmed.
    pub(crate) fn kill_doomed(&self, core: &mut Core, only: Option<&NodeName>) {
        let after = core.outbox.last();
        for (incarnation, member, tree) in self.trees.iter() {
            let wanted = tree.doomed && only.is_none_or(|only| *only == tree.node);
            if wanted && !tree.is_gone() {
                core.kill(after, &tree.node, self.member_key(incarnation, member));
            }
        }
    }

    /// A tree is proven dead. Journalled, told to all whom it concerns, once.
    pub(crate) fn member_gone(
        &mut self,
        core: &mut Core,
        incarnation: Incarnation,
        member: MemberId,
        status: ExitStatus,
        proof: Proof,
    ) {
        let Some((node, wanted)) = self.record_gone(core, incarnation, member, status, proof)
        else {
            return;
        };
        let reason = refusal::member_ended(member, &node, status);
        match &self.activity {
            Activity::Checkpoint(_) if !wanted && incarnation == self.incarnation => {
                self.abort_checkpoint(core, vec![reason]);
            }
            Activity::Restart(restart) if restart.machine.incarnation == incarnation => {
                self.fail_restart(core, vec![reason]);
            }
            Activity::Restart(_) => self.fence(core),
            _ => {}
        }
        self.trees.prune(self.incarnation);
        self.finish_ending(core);
        self.tell_if_over(core);
    }

    /// Journals that a tree is dead; its node and whether that was wanted, or `None` when it is
    /// nothing new.
    pub(crate) fn record_gone(
        &mut self,
        core: &mut Core,
        incarnation: Incarnation,
        member: MemberId,
        status: ExitStatus,
        proof: Proof,
    ) -> Option<(NodeName, bool)> {
        let key = self.member_key(incarnation, member);
        let tree = self.trees.tree_mut(incarnation, member)?;
        let node = tree.node.clone();
        if tree.is_gone() {
            // Told again: the agent has not heard that it may forget.
            core.order(core.outbox.last(), &node, None, ToAgent::Forget { key });
            return None;
        }
        let wanted = std::mem::replace(&mut tree.doomed, false);
        tree.life = Life::Gone { status, proof };
        let at = core.unix();
        let sequence = core.persist(Record::MemberGone {
            key: key.clone(),
            status,
            proof,
            at,
        });
        core.order(sequence, &node, None, ToAgent::Forget { key });
        core.log(format!(
            "member gone job={} incarnation={incarnation} member={member} node={node} \
             status={status:?} proof={proof:?}",
            self.key
        ));
        if incarnation == self.incarnation {
            self.last_sign = self.last_sign.max(at);
            // Of a restart only the job's going on is shown, not the old members' end.
            if !matches!(self.activity, Activity::Restart(_)) {
                let event = Event::MemberEnded { member, status };
                self.tell_watchers(core, sequence, &event);
            }
        }
        Some((node, wanted))
    }

    /// An agent could not end a member.
    pub(crate) fn kill_failed(&mut self, core: &mut Core, key: &MemberKey, report: Report) {
        core.warn(format!("kill failed member={key} reason={report}"));
        match &self.activity {
            Activity::Restart(restart) if restart.machine.is_fencing() => {
                self.fail_restart(core, vec![report]);
            }
            Activity::Ending { client, .. } => {
                let client = *client;
                self.activity = Activity::Idle;
                core.fail(core.outbox.last(), client, vec![report]);
            }
            _ => {}
        }
    }

    /// Tells who waits for the end, when it has come.
    pub(crate) fn finish_ending(&mut self, core: &mut Core) {
        if !matches!(self.activity, Activity::Ending { .. })
            || self
                .trees
                .iter()
                .any(|(_, _, tree)| tree.doomed && !tree.is_gone())
        {
            return;
        }
        if let Activity::Ending { client, last, .. } =
            std::mem::replace(&mut self.activity, Activity::Idle)
        {
            core.tell_after(core.outbox.last(), client, *last, true);
        }
    }

    /// The deadline of the end may have passed. What is to be ended stays so.
    pub(crate) fn ending_tick(&mut self, core: &mut Core) {
        let Activity::Ending {
            client, deadline, ..
        } = &self.activity
        else {
            return;
        };
        if core.now < *deadline {
            return;
        }
        let client = *client;
        let doomed = self
            .trees
            .iter()
            .filter(|(_, _, tree)| tree.doomed && !tree.is_gone());
        let reasons = doomed
            .map(|(_, member, tree)| refusal::not_ended(member, &tree.node))
            .collect();
        self.activity = Activity::Idle;
        core.fail(core.outbox.last(), client, reasons);
    }
}
