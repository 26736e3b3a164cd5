//! A restart of a job: checking the request, fencing the old incarnation, carrying out the restart
//! machine's effects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crcoord_common::ids::{Epoch, MemberId, MemberKey, NodeName, PartKey};
use crcoord_common::report::Report;
use crcoord_common::wire::client::{Event, Phase};
use crcoord_common::wire::control::{RestoreOrder, Source, ToAgent};
use crcoord_common::wire::member::{ExitStatus, NetworkMode, Placement, Replica};

use crate::action::ClientId;
use crate::core::Core;
use crate::fence::{Fence, Way};
use crate::job::{Activity, Job, Restarting};
use crate::placement::{self, Living};
use crate::record::Record;
use crate::refusal;
use crate::requests::Purpose;
use crate::restart::{Effect, Restart};
use crate::time::Millis;
use crate::trees::{Life, Proof, Tree};

/// What a caller asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RestartRequest {
    pub(crate) epoch: Option<Epoch>,
    pub(crate) nodes: Vec<NodeName>,
    pub(crate) confirmed: BTreeSet<NodeName>,
    pub(crate) attach: bool,
}

impl Job {
    /// Begins a restart, or tells all that is in the way. Until the fence nothing is touched.
    pub(crate) fn open_restart(
        &mut self,
        core: &mut Core,
        client: ClientId,
        request: RestartRequest,
        living: &Living,
    ) {
        let opened = self.check_restart(core, &request, living);
        let (epoch, placements, fence_until) = match opened {
            Ok(opened) => opened,
            Err(reasons) => return core.fail(core.outbox.last(), Some(client), reasons),
        };
        let taken = self
            .committed
            .get(&epoch)
            .map_or(0, |epoch| epoch.record.taken);
        let machine = Restart::open(
            core.now,
            &core.settings,
            self.last_incarnation.next(),
            epoch,
            placements,
            fence_until,
        );
        self.activity = Activity::Restart(Box::new(Restarting {
            machine,
            client: Some(client),
            attach: request.attach,
            confirmed: request.confirmed,
            lost_seconds: self.sign_of_life(core).saturating_sub(taken),
        }));
        core.tell(
            Some(client),
            Event::Phase {
                phase: Phase::Fence,
            },
            false,
        );
        self.trees.doom(None);
        self.kill_doomed(core, None);
        self.fence(core);
    }

    fn check_restart(
        &self,
        core: &Core,
        request: &RestartRequest,
        living: &Living,
    ) -> Result<(Epoch, Vec<Placement>, Millis), Vec<Report>> {
        if !self.is_idle() {
            return Err(self.refuse_busy().into_iter().collect());
        }
        let newest = self.committed.keys().next_back().copied();
        let committed = request
            .epoch
            .or(newest)
            .and_then(|epoch| self.committed.get(&epoch));
        let Some(committed) = committed else {
            return Err(vec![refusal::no_commit(&self.key, request.epoch)]);
        };
        let record = &committed.record;
        // The members this job had at most leave their nodes, so these count as free of them.
        let chosen = match request.nodes.is_empty() {
            true => placement::choose(&record.members, living),
            false => placement::accept(&record.members, &request.nodes, living),
        };
        let mut obstacles = chosen.as_ref().err().cloned().unwrap_or_default();
        let mut fence_until = core.now.after(core.settings.answer_ms);
        for (_, _, way) in self.fence_of(core, &request.confirmed).ways(&self.trees) {
            match way {
                Way::Kill | Way::Word => {}
                // It is seen to run out, then the kills may still be on their way.
                Way::Lease(end) => {
                    fence_until = fence_until.max(end.after(core.settings.answer_ms));
                }
                Way::None(report) => obstacles.push(*report),
            }
        }
        match chosen {
            Ok(chosen) if obstacles.is_empty() => {
                let placements = self.new_placements(core, &record.placements, &chosen);
                Ok((record.epoch, placements, fence_until))
            }
            _ => Err(obstacles),
        }
    }

    fn new_placements(
        &self,
        core: &Core,
        old: &[Placement],
        chosen: &BTreeMap<MemberId, NodeName>,
    ) -> Vec<Placement> {
        let place = |at: &Placement| {
            let node = chosen.get(&at.member).unwrap_or(&at.node).clone();
            let address = match self.spec.network {
                NetworkMode::Virtual => at.address,
                NetworkMode::Host => core.nodes.bulk(&node).map_or(at.address, |bulk| bulk.ip()),
            };
            Placement {
                member: at.member,
                node,
                address,
            }
        };
        old.iter().map(place).collect()
    }

    fn fence_of<'a>(&self, core: &'a Core, confirmed: &'a BTreeSet<NodeName>) -> Fence<'a> {
        Fence {
            nodes: &core.nodes,
            settings: &core.settings,
            confirmed,
        }
    }

    /// Last time the present incarnation is known to have lived, in seconds since 1970.
    fn sign_of_life(&self, core: &Core) -> u64 {
        let lives = |tree: &Tree| tree.may_run() && core.nodes.is_connected(&tree.node);
        match self.trees.of(self.incarnation).any(|(_, tree)| lives(tree)) {
            true => core.unix(),
            false => self.last_sign,
        }
    }

    /// Looks what proofs of death there are, and goes on when there is one for every tree.
    pub(crate) fn fence(&mut self, core: &mut Core) {
        let confirmed = match &self.activity {
            Activity::Restart(restart) if restart.machine.is_fencing() => restart.confirmed.clone(),
            _ => return,
        };
        let mut obstacles = Vec::new();
        let mut waiting = false;
        for (incarnation, member, way) in self.fence_of(core, &confirmed).ways(&self.trees) {
            let proof = match way {
                Way::Word => Proof::Operator,
                Way::Lease(end) if core.now >= end => Proof::RunLease,
                Way::Lease(_) | Way::Kill => {
                    waiting = true;
                    continue;
                }
                Way::None(report) => {
                    obstacles.push(*report);
                    continue;
                }
            };
            self.record_gone(core, incarnation, member, ExitStatus::Lost, proof);
        }
        if !obstacles.is_empty() {
            return self.fail_restart(core, obstacles);
        }
        let now = core.now;
        if !waiting && let Activity::Restart(restart) = &mut self.activity {
            let effects = restart.machine.fenced(now);
            self.apply_restart(core, effects);
        }
    }

    /// When the next run lease that a restart waits for has run out.
    pub(crate) fn fence_deadline(&self, core: &Core) -> Option<Millis> {
        let Activity::Restart(restart) = &self.activity else {
            return None;
        };
        if !restart.machine.is_fencing() {
            return None;
        }
        let ways = self.fence_of(core, &restart.confirmed).ways(&self.trees);
        let ends = ways.into_iter().filter_map(|(_, _, way)| match way {
            Way::Lease(end) => Some(end),
            _ => None,
        });
        ends.min()
    }

    /// A member of the new incarnation is built.
    pub(crate) fn built(&mut self, core: &mut Core, key: &MemberKey, replica: Option<Replica>) {
        let (now, lease_ms) = (core.now, self.spec.run_lease_ms);
        let Activity::Restart(restart) = &mut self.activity else {
            return;
        };
        if restart.machine.incarnation != key.incarnation {
            return;
        }
        let epoch = restart.machine.epoch;
        let effects = restart.machine.built(now, key.member);
        if let Some(tree) = self.trees.tree_mut(key.incarnation, key.member) {
            tree.life = Life::Built;
            if let Some(lease_ms) = lease_ms {
                tree.lease.begun(now, lease_ms);
            }
        }
        if let Some(replica) = replica {
            self.add_replica(core, epoch, key.member, replica);
        }
        self.apply_restart(core, effects);
    }

    fn add_replica(&mut self, core: &mut Core, epoch: Epoch, member: MemberId, replica: Replica) {
        let Some(committed) = self.committed.get_mut(&epoch) else {
            return;
        };
        let mut parts = committed.record.members.iter_mut();
        let Some(part) = parts.find(|part| part.member == member) else {
            return;
        };
        if part.replicas.contains(&replica) {
            return;
        }
        part.replicas.push(replica.clone());
        core.persist(Record::ReplicaAdded {
            job: self.key.clone(),
            epoch,
            member,
            replica: replica.clone(),
        });
        if let Replica::Node(node) = &replica {
            self.copy_commit(core, epoch, Some(node));
        }
    }

    /// A member of the new incarnation runs.
    pub(crate) fn resumed(&mut self, core: &mut Core, key: &MemberKey) {
        if let Activity::Restart(restart) = &mut self.activity
            && restart.machine.incarnation == key.incarnation
        {
            let effects = restart.machine.resumed(key.member);
            self.apply_restart(core, effects);
        }
    }

    /// Something went wrong in the restart.
    pub(crate) fn fail_restart(&mut self, core: &mut Core, reasons: Vec<Report>) {
        if let Activity::Restart(restart) = &mut self.activity {
            let effects = restart.machine.fail(reasons);
            self.apply_restart(core, effects);
        }
    }

    /// An agent that takes part in a restart is lost.
    pub(crate) fn restart_lost(&mut self, core: &mut Core, node: &NodeName) {
        let Activity::Restart(restart) = &self.activity else {
            return;
        };
        if restart.machine.placements.iter().any(|at| at.node == *node) {
            self.fail_restart(core, vec![refusal::agent_lost(node)]);
        } else {
            self.fence(core);
        }
    }

    /// A deadline of the restart may have passed.
    pub(crate) fn restart_tick(&mut self, core: &mut Core) {
        self.fence(core);
        if let Activity::Restart(restart) = &mut self.activity {
            let effects = restart.machine.tick(core.now);
            self.apply_restart(core, effects);
        }
    }

    fn apply_restart(&mut self, core: &mut Core, effects: Vec<Effect>) {
        for effect in effects {
            let Activity::Restart(restart) = &self.activity else {
                return;
            };
            match effect {
                Effect::Phase(phase) => {
                    core.tell(restart.client, Event::Phase { phase }, false);
                }
                Effect::Build => self.order_build(core),
                Effect::Resume => self.order_resume(core),
                Effect::Done => self.finish_restart(core),
                Effect::Fail(reasons) => self.roll_back(core, reasons),
            }
        }
    }

    /// Journals the new incarnation, then has all members built.
    fn order_build(&mut self, core: &mut Core) {
        let Activity::Restart(restart) = &self.activity else {
            return;
        };
        let (incarnation, epoch) = (restart.machine.incarnation, restart.machine.epoch);
        let placements = restart.machine.placements.clone();
        self.last_incarnation = incarnation;
        let sequence = core.persist(Record::Restarting {
            job: self.key.clone(),
            incarnation,
            epoch,
            placements: placements.clone(),
        });
        let mut lost = Vec::new();
        for at in &placements {
            let key = self.member_key(incarnation, at.member);
            let tree = Tree::new(at.node.clone(), Life::Building);
            self.trees.insert(incarnation, at.member, tree);
            let capsule = self.capsule(core, at.member, &placements);
            let order = self.restore_order(core, epoch, at, &placements);
            let (Some(capsule), Some(restore)) = (capsule, order) else {
                lost.push(refusal::no_commit(&self.key, Some(epoch)));
                continue;
            };
            let purpose = Some(Purpose::Build(key.clone()));
            let body = ToAgent::Build {
                key,
                capsule,
                restore,
            };
            if !core.order(sequence, &at.node, purpose, body) {
                lost.push(refusal::agent_lost(&at.node));
            }
        }
        if !lost.is_empty() {
            return self.fail_restart(core, lost);
        }
        self.listen(core, None);
    }

    fn restore_order(
        &self,
        core: &Core,
        epoch: Epoch,
        at: &Placement,
        placements: &[Placement],
    ) -> Option<RestoreOrder> {
        let record = &self.committed.get(&epoch)?.record;
        let commit = record
            .members
            .iter()
            .find(|commit| commit.member == at.member)?;
        let source = |replica: &Replica| match replica {
            Replica::Node(node) if *node == at.node => Some(Source::Own),
            Replica::Node(node) => Some(Source::Partner {
                address: core.nodes.bulk(node)?,
                node: node.clone(),
            }),
            Replica::Shared => Some(Source::Shared),
        };
        let mut sources: Vec<Source> = commit.replicas.iter().filter_map(source).collect();
        sources.sort_by_key(|source| match source {
            Source::Own => 0,
            Source::Partner { .. } => 1,
            Source::Shared => 2,
        });
        let old = record.placements.iter();
        let moved = old.filter_map(|old| {
            let new = placements.iter().find(|new| new.member == old.member)?;
            (new.address != old.address).then_some((old.address, new.address))
        });
        let addresses: Vec<(IpAddr, IpAddr)> = moved.collect();
        Some(RestoreOrder {
            part: PartKey {
                job: self.key.clone(),
                epoch,
                member: at.member,
            },
            manifest: commit.manifest,
            sources,
            connections: record
                .members
                .iter()
                .flat_map(|one| one.connections.clone())
                .collect(),
            addresses,
        })
    }

    /// Journals that members may run from here on, then lets all run.
    fn order_resume(&mut self, core: &mut Core) {
        let Activity::Restart(restart) = &self.activity else {
            return;
        };
        let incarnation = restart.machine.incarnation;
        let placements = restart.machine.placements.clone();
        let sequence = core.persist(Record::Resuming {
            job: self.key.clone(),
            incarnation,
        });
        let mut lost = Vec::new();
        for at in &placements {
            if let Some(tree) = self.trees.tree_mut(incarnation, at.member) {
                tree.life = Life::Running;
            }
            let key = self.member_key(incarnation, at.member);
            let purpose = Some(Purpose::Resume(key.clone()));
            if !core.order(sequence, &at.node, purpose, ToAgent::Resume { key }) {
                lost.push(refusal::agent_lost(&at.node));
            }
        }
        if !lost.is_empty() {
            self.fail_restart(core, lost);
        }
    }

    fn finish_restart(&mut self, core: &mut Core) {
        let Activity::Restart(restart) = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        self.incarnation = restart.machine.incarnation;
        self.placements = restart.machine.placements.clone();
        self.trees.prune(self.incarnation);
        let sequence = core.persist(Record::Resumed {
            job: self.key.clone(),
            incarnation: self.incarnation,
        });
        let event = Event::Resumed {
            job: self.key.clone(),
            incarnation: self.incarnation,
            epoch: restart.machine.epoch,
            lost_seconds: restart.lost_seconds,
            placements: self.placements.clone(),
        };
        core.tell_after(sequence, restart.client, event, !restart.attach);
        if restart.attach
            && let Some(client) = restart.client
        {
            self.watch(core, client);
        }
        core.log(format!(
            "job resumed job={} incarnation={} epoch={}",
            self.key, self.incarnation, restart.machine.epoch
        ));
        self.tell_if_over(core);
    }

    /// Ends what was built; images and committed epochs stay as they were.
    fn roll_back(&mut self, core: &mut Core, reasons: Vec<Report>) {
        let Activity::Restart(restart) = std::mem::replace(&mut self.activity, Activity::Idle)
        else {
            return;
        };
        let incarnation = restart.machine.incarnation;
        let sequence = match self.last_incarnation == incarnation {
            true => core.persist(Record::RestartFailed {
                job: self.key.clone(),
                incarnation,
            }),
            // Not even begun: the fence failed. What is doomed stays so, for it was half ended.
            false => core.outbox.last(),
        };
        self.trees.doom(Some(incarnation));
        self.kill_doomed(core, None);
        core.fail(sequence, restart.client, reasons);
        self.tell_if_over(core);
    }
}
