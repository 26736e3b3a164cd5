//! The ledger of a job's process trees: which may exist, which may run, which are proven dead.
//!
//! ```text
//! Start, Adopt -> Ordered --Started--> Running <--Resume sent-- Built <--Built-- Building <- Build
//!                    \                  |   ^                     |                 |
//!                     \        Hello without it, with it          |                 |
//!                      \                v   |                     |                 |
//!                       \            Missing                      |                 |
//!                        +--------------+---- a proof ----> Gone <+-----------------+
//! ```
//!
//! A tree that is Building or Built cannot run: nothing but our Resume lets it.

use std::collections::BTreeMap;

use crcoord_common::ids::{Incarnation, MemberId, NodeName};
use crcoord_common::wire::member::ExitStatus;
use serde::{Deserialize, Serialize};

use crate::run_lease::RunLease;

/// How it is known that a tree is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// Its agent said that it ended.
    Ended,
    /// Its agent killed it and saw the kernel confirm that.
    Killed,
    /// An operator says so.
    Operator,
    /// Its run lease has run out: its capsule has ended it.
    RunLease,
}

/// What is known of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Life {
    /// Start or Adopt was sent: it may run.
    Ordered,
    /// Build was sent: it cannot run.
    Building,
    /// It is built and cannot run.
    Built,
    /// It may run.
    Running,
    /// Its agent does not know it: no proof, the agent may have lost its memory.
    Missing,
    /// Proven dead.
    Gone { status: ExitStatus, proof: Proof },
}

/// One member in one incarnation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tree {
    pub(crate) node: NodeName,
    pub(crate) life: Life,
    /// It is to be ended as soon as its agent can be told.
    pub(crate) doomed: bool,
    pub(crate) lease: RunLease,
}

impl Tree {
    pub(crate) fn new(node: NodeName, life: Life) -> Self {
        Tree {
            node,
            life,
            doomed: false,
            lease: RunLease::default(),
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.life, Life::Gone { .. })
    }

    /// True when nothing excludes that its processes execute.
    pub(crate) fn may_run(&self) -> bool {
        matches!(self.life, Life::Ordered | Life::Running | Life::Missing)
    }
}

/// All trees of a job that matter still.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Trees(BTreeMap<(Incarnation, MemberId), Tree>);

impl Trees {
    pub(crate) fn insert(&mut self, incarnation: Incarnation, member: MemberId, tree: Tree) {
        self.0.insert((incarnation, member), tree);
    }

    pub(crate) fn tree(&self, incarnation: Incarnation, member: MemberId) -> Option<&Tree> {
        self.0.get(&(incarnation, member))
    }

    pub(crate) fn tree_mut(
        &mut self,
        incarnation: Incarnation,
        member: MemberId,
    ) -> Option<&mut Tree> {
        self.0.get_mut(&(incarnation, member))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Incarnation, MemberId, &Tree)> {
        self.0
            .iter()
            .map(|((incarnation, member), tree)| (*incarnation, *member, tree))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Incarnation, MemberId, &mut Tree)> {
        self.0
            .iter_mut()
            .map(|((incarnation, member), tree)| (*incarnation, *member, tree))
    }

    /// The trees of one incarnation, in member order.
    pub(crate) fn of(&self, incarnation: Incarnation) -> impl Iterator<Item = (MemberId, &Tree)> {
        let all = self
            .0
            .range((incarnation, MemberId(0))..=(incarnation, MemberId(u32::MAX)));
        all.map(|((_, member), tree)| (*member, tree))
    }

    /// Marks all trees of one incarnation, or of all, to be ended.
    pub(crate) fn doom(&mut self, incarnation: Option<Incarnation>) {
        for ((of, _), tree) in &mut self.0 {
            if incarnation.is_none_or(|wanted| wanted == *of) {
                tree.doomed = !tree.is_gone();
            }
        }
    }

    /// Drops proven dead trees of earlier incarnations.
    pub(crate) fn prune(&mut self, current: Incarnation) {
        self.0
            .retain(|(incarnation, _), tree| *incarnation == current || !tree.is_gone());
    }

    /// The same tree removed without proof: it never came to be, or is not ours to end.
    pub(crate) fn remove(&mut self, incarnation: Incarnation, member: MemberId) {
        self.0.remove(&(incarnation, member));
    }
}
