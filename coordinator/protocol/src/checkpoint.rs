//! A checkpoint of a job: opening it, carrying out the epoch machine's effects, aborting.

use std::collections::BTreeMap;

use crcoord_common::ids::{MemberId, MemberKey, NodeName, PartKey};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{CaptureOptions, CopyTarget, FromAgent, ToAgent};

use crate::action::ClientId;
use crate::core::Core;
use crate::epoch::{Checkpoint, Effect, Order};
use crate::job::{Activity, Checkpointing, CleanUp, Job};
use crate::record::Record;
use crate::refusal;
use crate::requests::Purpose;

/// What a caller asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CheckpointRequest {
    pub(crate) kill: bool,
    pub(crate) wait: bool,
    pub(crate) reset_external_tcp: bool,
}

impl Job {
    /// Opens an epoch, or tells why not.
    pub(crate) fn open_checkpoint(
        &mut self,
        core: &mut Core,
        client: Option<ClientId>,
        request: CheckpointRequest,
    ) {
        if let Some(refused) = self.refuse_busy() {
            return core.fail(core.outbox.last(), client, vec![refused]);
        }
        let absent = self.absent(core);
        if !absent.is_empty() {
            return core.fail(core.outbox.last(), client, absent);
        }
        let epoch = self.last_epoch.next();
        self.last_epoch = epoch;
        let intent = core.persist(Record::Intent {
            job: self.key.clone(),
            incarnation: self.incarnation,
            epoch,
            term: core.leadership.term(),
        });
        let (copies, notes) = self.copies(core);
        core.tell_after(intent, client, Event::Opened { epoch }, !request.wait);
        let (machine, effects) = Checkpoint::open(core.now, &core.settings, epoch, copies);
        self.activity = Activity::Checkpoint(Box::new(Checkpointing {
            machine,
            client: client.filter(|_| request.wait),
            kill: request.kill,
            options: self.capture_options(request.reset_external_tcp),
            opened: core.now,
            taken: core.unix(),
            intent,
            notes,
        }));
        self.apply_epoch(core, effects);
    }

    /// What is in the way of beginning something new.
    pub(crate) fn refuse_busy(&self) -> Option<Report> {
        match &self.activity {
            Activity::Idle if self.is_over() => Some(refusal::job_ended(&self.key)),
            Activity::Idle => None,
            Activity::Starting { .. } => Some(refusal::busy(&self.key, "it is being started")),
            Activity::Checkpoint(open) => Some(refusal::epoch_open(&self.key, open.machine.epoch)),
            Activity::Committing { epoch, .. } => {
                Some(refusal::epoch_open(&self.key, epoch.record.epoch))
            }
            Activity::Restart(_) => Some(refusal::busy(&self.key, "it is being restarted")),
            Activity::Ending { .. } => Some(refusal::busy(&self.key, "it is being ended")),
            Activity::Survey { .. } => Some(refusal::busy(&self.key, "it is being checked")),
        }
    }

    pub(crate) fn capture_options(&self, reset_external_tcp: bool) -> CaptureOptions {
        CaptureOptions {
            reset_external_tcp,
            members: self.placements.iter().map(|at| at.address).collect(),
        }
    }

    /// Where each member's part goes besides its own store: to the next member's node in the job's
    /// ring, and to the shared directory where there is one.
    fn copies(&self, core: &Core) -> (BTreeMap<MemberId, Vec<CopyTarget>>, Vec<Report>) {
        let mut all = BTreeMap::new();
        let mut notes = Vec::new();
        for (index, at) in self.placements.iter().enumerate() {
            let next = &self.placements[(index + 1) % self.placements.len()].node;
            let partner = core.nodes.bulk(next).filter(|_| *next != at.node);
            let mut copies = Vec::new();
            if core.settings.copies > 0
                && let Some(address) = partner
            {
                let node = next.clone();
                copies.push(CopyTarget::Partner { node, address });
            }
            if core.settings.shared {
                copies.push(CopyTarget::Shared);
            }
            if copies.is_empty() && core.settings.copies > 0 {
                notes.push(refusal::single_copy(at.member, &at.node));
            }
            all.insert(at.member, copies);
        }
        (all, notes)
    }

    /// An agent answered an order of an epoch.
    pub(crate) fn epoch_answered(&mut self, core: &mut Core, key: &MemberKey, answer: FromAgent) {
        let node = self.node_of(key.member).cloned();
        let answer = match (answer, node) {
            (FromAgent::Failed(report), Some(node)) => FromAgent::Failed(report.on_node(&node)),
            (FromAgent::Preflighted(mut found), Some(node)) => {
                let findings = std::mem::take(&mut found.findings);
                found.findings = findings.into_iter().map(|one| one.on_node(&node)).collect();
                FromAgent::Preflighted(found)
            }
            (answer, _) => answer,
        };
        if let Activity::Checkpoint(open) = &mut self.activity {
            let effects = open.machine.answered(core.now, key.member, answer);
            self.apply_epoch(core, effects);
        }
    }

    /// Ends the open epoch without a commit; false when none is open or it is decided already.
    pub(crate) fn abort_checkpoint(&mut self, core: &mut Core, reasons: Vec<Report>) -> bool {
        let Activity::Checkpoint(open) = &mut self.activity else {
            return false;
        };
        let effects = open.machine.abort(reasons);
        let aborted = !effects.is_empty();
        self.apply_epoch(core, effects);
        aborted
    }

    /// A hold ended by itself.
    pub(crate) fn hold_lost(&mut self, core: &mut Core, member: MemberId, report: Report) {
        let node = self.node_of(member).cloned();
        if let Activity::Checkpoint(open) = &mut self.activity {
            let report = match &node {
                Some(node) => report.on_node(node),
                None => report,
            };
            let effects = open.machine.hold_lost(member, report);
            self.apply_epoch(core, effects);
        }
    }

    /// A deadline of the epoch may have passed.
    pub(crate) fn checkpoint_tick(&mut self, core: &mut Core) {
        if let Activity::Checkpoint(open) = &mut self.activity {
            let effects = open.machine.tick(core.now);
            self.apply_epoch(core, effects);
        }
    }

    /// Carries out what the epoch machine decided.
    pub(crate) fn apply_epoch(&mut self, core: &mut Core, effects: Vec<Effect>) {
        for effect in effects {
            let Activity::Checkpoint(open) = &mut self.activity else {
                return;
            };
            match effect {
                Effect::Phase(phase) => {
                    core.tell_after(open.intent, open.client, Event::Phase { phase }, false);
                }
                Effect::Cut => open.taken = core.unix(),
                Effect::Order(member, order) => self.order_epoch(core, member, order),
                Effect::Commit(sealed) => self.commit(core, sealed),
                Effect::Abort(reasons) => self.carry_out_abort(core, reasons),
            }
        }
    }

    fn order_epoch(&mut self, core: &mut Core, member: MemberId, order: Order) {
        let Activity::Checkpoint(open) = &self.activity else {
            return;
        };
        let (epoch, intent, options) = (open.machine.epoch, open.intent, open.options.clone());
        let Some(node) = self.node_of(member).cloned() else {
            return;
        };
        let key = self.member_key(self.incarnation, member);
        let purpose = match order {
            Order::Renew { .. } => Purpose::Renew(key.clone(), epoch),
            _ => Purpose::Epoch(key.clone(), epoch),
        };
        let urgent = matches!(order, Order::Renew { .. });
        let body = match order {
            Order::Preflight => ToAgent::Preflight {
                key,
                epoch,
                options,
            },
            Order::Hold { lease_ms } => ToAgent::Hold {
                key,
                epoch,
                lease_ms,
            },
            Order::Renew { lease_ms } => ToAgent::Renew {
                key,
                epoch,
                lease_ms,
            },
            Order::Capture => ToAgent::Capture { key, epoch },
            Order::Release { copies } => ToAgent::Release { key, epoch, copies },
        };
        // An agent that is not connected has aborted the epoch already, so nothing is lost here.
        if urgent {
            core.order_urgent(&node, Some(purpose), body);
        } else {
            core.order(intent, &node, Some(purpose), body);
        }
    }

    /// Journals the abort; then all members' agents drop the epoch and let the job go.
    fn carry_out_abort(&mut self, core: &mut Core, reasons: Vec<Report>) {
        let Activity::Checkpoint(open) = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        let reasons = self.with_nodes(reasons);
        let epoch = open.machine.epoch;
        let sequence = core.persist(Record::Abort {
            job: self.key.clone(),
            epoch,
            reasons: reasons.clone(),
        });
        core.close_epoch(&self.key, epoch);
        for at in self.placements.clone() {
            let key = self.member_key(self.incarnation, at.member);
            let node = at.node;
            let clean_up = CleanUp { node, key, epoch };
            self.clean_ups.insert(clean_up.clone());
            clean_up.order(core, sequence);
        }
        if open.machine.has_streamed() {
            for at in &self.placements {
                self.retire_on(core, sequence, &at.node, epoch);
            }
        }
        let first = reasons.first();
        let why = first.map_or_else(
            || "no reason is known".to_owned(),
            |one| one.message.clone(),
        );
        core.log(format!(
            "epoch aborted job={} epoch={epoch} reason={why:?}",
            self.key
        ));
        // An obstacle of the preflight is told as it is: nothing was frozen. One that comes up later
        // aborts like any other failure.
        let untouched = !open.machine.has_held()
            && !reasons.is_empty()
            && reasons.iter().all(|reason| reason.class == Class::Obstacle);
        let mut told = reasons;
        if !untouched {
            told.insert(0, refusal::aborted(&self.key, epoch, &why));
        }
        core.fail(sequence, open.client, told);
        self.tell_if_over(core);
    }

    /// Removes all parts of an unwanted epoch from a node's store.
    pub(crate) fn retire_on(
        &self,
        core: &mut Core,
        after: crate::outbox::Sequence,
        node: &NodeName,
        epoch: crcoord_common::ids::Epoch,
    ) {
        let part = PartKey {
            job: self.key.clone(),
            epoch,
            member: MemberId(0),
        };
        core.order(after, node, Some(Purpose::Store), ToAgent::Retire { part });
    }

    /// Names the node in reports of the machine, which knows members only.
    fn with_nodes(&self, reasons: Vec<Report>) -> Vec<Report> {
        let name = |report: Report| {
            let named = |at: &&crcoord_common::wire::member::Placement| {
                let text = format!("member {} ", at.member);
                report.place.node.is_none() && report.message.contains(&text)
            };
            match self.placements.iter().find(named) {
                Some(at) => report.on_node(&at.node),
                None => report,
            }
        };
        reasons.into_iter().map(name).collect()
    }
}

impl CleanUp {
    /// Tells the agent, if it is connected; it is told again when it connects anew.
    pub(crate) fn order(&self, core: &mut Core, after: crate::outbox::Sequence) {
        let purpose = Purpose::CleanUp(self.key.clone(), self.epoch);
        let (key, epoch) = (self.key.clone(), self.epoch);
        core.order(
            after,
            &self.node,
            Some(purpose),
            ToAgent::Abort { key, epoch },
        );
    }
}
