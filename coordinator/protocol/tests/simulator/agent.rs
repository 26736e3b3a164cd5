//! A node as a model: an agent with members that are states and deadlines instead of processes.

use std::collections::BTreeMap;

use crcoord_common::ids::{Epoch, MemberKey, NodeName, Term};
use crcoord_common::image::ChunkId;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::{
    CaptureSummary, CopyTarget, FromAgent, MemberState, Preflight, ToAgent,
};
use crcoord_common::wire::member::{ExitStatus, MemberCommit, Owner, Replica};

use crate::ledger::Ledger;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    Running,
    Built,
    Ended(ExitStatus),
}

#[derive(Clone, Debug)]
pub struct Hold {
    pub epoch: Epoch,
    pub until: u64,
    pub captured: bool,
}

#[derive(Clone, Debug)]
pub struct Tree {
    pub life: Life,
    pub hold: Option<Hold>,
    pub streaming: Option<(Epoch, Vec<CopyTarget>, crcoord_common::ids::RequestId, Term)>,
    /// When the capsule ends itself, kept by the capsule and not by the agent.
    pub lease: Option<(u64, u64)>,
    pub newest_epoch: Epoch,
}

pub struct Node {
    pub name: NodeName,
    /// False from a crash to the reboot: nothing runs there.
    pub up: bool,
    pub term: Term,
    pub trees: BTreeMap<MemberKey, Tree>,
    /// Heartbeats are numbered, by the time of their sending.
    pub numbered: bool,
}

fn failed(what: &str) -> Vec<FromAgent> {
    vec![FromAgent::Failed(Report::new(
        "sim-failed",
        Class::Failure,
        what,
    ))]
}

impl Node {
    pub fn new(name: &str, numbered: bool) -> Self {
        Node {
            name: name.parse().unwrap(),
            up: true,
            term: Term(0),
            trees: BTreeMap::new(),
            numbered,
        }
    }

    pub fn states(&self) -> Vec<MemberState> {
        let state = |(key, tree): (&MemberKey, &Tree)| MemberState {
            key: key.clone(),
            ended: match tree.life {
                Life::Ended(status) => Some(status),
                _ => None,
            },
            epoch: match (&tree.hold, &tree.streaming) {
                (Some(hold), _) => Some(hold.epoch),
                (None, Some((epoch, ..))) => Some(*epoch),
                (None, None) => None,
            },
        };
        self.trees.iter().map(state).collect()
    }

    /// The agent dies: engines see it and let go; what was half built is gone; capsules live on.
    pub fn crash_agent(&mut self, now: u64, ledger: &mut Ledger) {
        self.trees.retain(|_, tree| tree.life != Life::Built);
        for (key, tree) in &mut self.trees {
            thaw(now, key, tree, ledger);
            tree.streaming = None;
        }
    }

    /// The node dies with all that runs on it.
    pub fn crash(&mut self, now: u64, ledger: &mut Ledger) {
        self.crash_agent(now, ledger);
        self.trees.clear();
        self.up = false;
    }

    /// Deadlines that members keep themselves. Events for the coordinator are returned.
    pub fn tick(&mut self, now: u64, ledger: &mut Ledger) -> Vec<FromAgent> {
        let mut events = Vec::new();
        for (key, tree) in &mut self.trees {
            if let Some(hold) = tree.hold.clone()
                && now >= hold.until
            {
                thaw(now, key, tree, ledger);
                let report = Report::new("sim-hold-expired", Class::Aborted, "the lease ended");
                events.push(FromAgent::HoldLost {
                    key: key.clone(),
                    epoch: hold.epoch,
                    report,
                });
            }
            let over = tree.lease.is_some_and(|(_, until)| now >= until);
            if over && !matches!(tree.life, Life::Ended(_)) {
                events.push(end(now, key, tree, ExitStatus::Signaled(9), ledger));
            }
        }
        events
    }

    /// A member exits by itself.
    pub fn exit(&mut self, now: u64, key: &MemberKey, ledger: &mut Ledger) -> Option<FromAgent> {
        let tree = self.trees.get_mut(key)?;
        let runs = tree.life == Life::Running && tree.hold.is_none();
        runs.then(|| end(now, key, tree, ExitStatus::Exited(0), ledger))
    }

    /// A stream comes to its end.
    pub fn seal(&mut self, key: &MemberKey, ledger: &mut Ledger) -> Option<FromAgent> {
        let tree = self.trees.get_mut(key)?;
        let (epoch, copies, ..) = tree.streaming.take()?;
        ledger.seal(key, epoch);
        let copies = copies.into_iter().map(|copy| match copy {
            CopyTarget::Partner { node, .. } => Replica::Node(node),
            CopyTarget::Shared => Replica::Shared,
        });
        let own = Replica::Node(self.name.clone());
        Some(FromAgent::Sealed {
            commit: MemberCommit {
                member: key.member,
                node: self.name.clone(),
                manifest: ChunkId([0; 32]),
                replicas: std::iter::once(own).chain(copies).collect(),
                raw_bytes: 0,
                stored_bytes: 0,
                freeze_us: 0,
                connections: Vec::new(),
            },
        })
    }

    /// An order arrives and is carried out at once; how late the answer is, the network decides.
    pub fn serve(
        &mut self,
        now: u64,
        request: crcoord_common::ids::RequestId,
        term: Term,
        order: ToAgent,
        ledger: &mut Ledger,
    ) -> Vec<FromAgent> {
        if term < self.term {
            return Vec::new();
        }
        self.term = term;
        match order {
            ToAgent::Start { key, capsule, .. } => {
                let lease = capsule
                    .run_lease_ms
                    .map(|lease_ms| (lease_ms, now + lease_ms));
                self.trees.insert(key, tree(Life::Running, lease));
                let owner = Owner {
                    uid: 0,
                    gid: 0,
                    groups: Vec::new(),
                };
                vec![FromAgent::Started { pid: 1, owner }]
            }
            ToAgent::Build { key, capsule, .. } => {
                let lease = capsule
                    .run_lease_ms
                    .map(|lease_ms| (lease_ms, now + lease_ms));
                self.trees.insert(key, tree(Life::Built, lease));
                vec![FromAgent::Built {
                    fetched_bytes: 0,
                    filled_bytes: 0,
                    replica: None,
                }]
            }
            ToAgent::Resume { key } => match self.trees.get_mut(&key) {
                Some(tree) if tree.life == Life::Built => {
                    tree.life = Life::Running;
                    vec![FromAgent::Done]
                }
                _ => failed("not built"),
            },
            ToAgent::Kill { key } => {
                if let Some(mut tree) = self.trees.remove(&key) {
                    thaw(now, &key, &mut tree, ledger);
                }
                vec![FromAgent::Killed]
            }
            ToAgent::Forget { key } => {
                let ended = |tree: &Tree| matches!(tree.life, Life::Ended(_));
                if self.trees.get(&key).is_some_and(ended) {
                    self.trees.remove(&key);
                }
                Vec::new()
            }
            ToAgent::RunLease { key, lease_ms } => {
                if let Some(tree) = self.trees.get_mut(&key)
                    && let Some((_, until)) = &mut tree.lease
                {
                    let from = match self.numbered {
                        true => request.0,
                        false => now,
                    };
                    *until = (*until).max(from + lease_ms);
                }
                Vec::new()
            }
            ToAgent::Preflight { key, epoch, .. } => match self.trees.get_mut(&key) {
                Some(tree) if tree.life == Life::Running && epoch > tree.newest_epoch => {
                    thaw(now, &key, tree, ledger);
                    tree.streaming = None;
                    tree.newest_epoch = epoch;
                    vec![FromAgent::Preflighted(Preflight::default())]
                }
                _ => failed("no such member, or a stale epoch"),
            },
            ToAgent::Hold {
                key,
                epoch,
                lease_ms,
            } => match self.trees.get_mut(&key) {
                Some(tree) if tree.life == Life::Running && tree.newest_epoch == epoch => {
                    tree.hold = Some(Hold {
                        epoch,
                        until: now + lease_ms,
                        captured: false,
                    });
                    ledger.hold(now, &key, epoch);
                    vec![FromAgent::Held { freeze_us: 1 }]
                }
                _ => failed("not preflighted"),
            },
            ToAgent::Renew {
                key,
                epoch,
                lease_ms,
            } => match self.held(&key, epoch) {
                Some(hold) => {
                    hold.until = now + lease_ms;
                    vec![FromAgent::Done]
                }
                None => failed("not held"),
            },
            ToAgent::Capture { key, epoch } => match self.held(&key, epoch) {
                Some(hold) => {
                    hold.captured = true;
                    ledger.capture(now, &key, epoch);
                    vec![FromAgent::Captured(CaptureSummary::default())]
                }
                None => failed("not held"),
            },
            ToAgent::Release { key, epoch, copies } => {
                ledger.released(&key, epoch);
                match self.held(&key, epoch) {
                    Some(hold) if hold.captured => {
                        if let Some(tree) = self.trees.get_mut(&key) {
                            thaw(now, &key, tree, ledger);
                            tree.streaming = Some((epoch, copies, request, term));
                        }
                        vec![FromAgent::Released { frozen_us: 1 }]
                    }
                    _ => failed("not captured"),
                }
            }
            ToAgent::Abort { key, epoch } => {
                if let Some(tree) = self.trees.get_mut(&key) {
                    if tree.hold.as_ref().is_some_and(|hold| hold.epoch == epoch) {
                        thaw(now, &key, tree, ledger);
                    }
                    if tree.streaming.as_ref().is_some_and(|(of, ..)| *of == epoch) {
                        tree.streaming = None;
                    }
                }
                vec![FromAgent::Done]
            }
            ToAgent::Commit { .. } | ToAgent::Retire { .. } | ToAgent::Signal { .. } => {
                vec![FromAgent::Done]
            }
            ToAgent::Check => vec![FromAgent::Checked {
                findings: Vec::new(),
            }],
            ToAgent::Adopt { .. } => failed("nothing is adopted here"),
            ToAgent::Welcome { .. } | ToAgent::Alive | ToAgent::Listen { .. } => Vec::new(),
        }
    }

    fn held(&mut self, key: &MemberKey, epoch: Epoch) -> Option<&mut Hold> {
        let hold = self.trees.get_mut(key)?.hold.as_mut()?;
        (hold.epoch == epoch).then_some(hold)
    }
}

fn tree(life: Life, lease: Option<(u64, u64)>) -> Tree {
    Tree {
        life,
        hold: None,
        streaming: None,
        lease,
        newest_epoch: Epoch(0),
    }
}

fn thaw(now: u64, key: &MemberKey, tree: &mut Tree, ledger: &mut Ledger) {
    if let Some(hold) = tree.hold.take() {
        ledger.thaw(now, key, hold.epoch);
    }
}

fn end(
    now: u64,
    key: &MemberKey,
    tree: &mut Tree,
    status: ExitStatus,
    ledger: &mut Ledger,
) -> FromAgent {
    thaw(now, key, tree, ledger);
    tree.streaming = None;
    tree.life = Life::Ended(status);
    FromAgent::Ended {
        key: key.clone(),
        status,
    }
}
