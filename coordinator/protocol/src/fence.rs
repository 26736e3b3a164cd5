//! Proof of death before a restart: for each tree that may run, the best way to it, or the obstacle.
//!
//! In this order: a kill confirmed by its agent, an operator's word, the run lease run out. A node
//! that is merely silent proves nothing.

use std::collections::BTreeSet;

use crcoord_common::ids::{MemberId, NodeName};
use crcoord_common::report::{Class, Report};

use crate::nodes::Nodes;
use crate::settings::Settings;
use crate::time::Millis;
use crate::trees::{Tree, Trees};

/// How one tree's death can be proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Its agent is connected: kill it.
    Kill,
    /// An operator says that its node is dead.
    Word,
    /// Its run lease runs out at this time, or has.
    Lease(Millis),
    /// There is none.
    None(Box<Report>),
}

/// What the ways depend on.
pub(crate) struct Fence<'a> {
    pub(crate) nodes: &'a Nodes,
    pub(crate) settings: &'a Settings,
    /// Nodes that an operator declared dead.
    pub(crate) confirmed: &'a BTreeSet<NodeName>,
}

impl Fence<'_> {
    /// The way for each tree that may run, and for each half-built one that can be told to end.
    pub(crate) fn ways(
        &self,
        trees: &Trees,
    ) -> Vec<(crcoord_common::ids::Incarnation, MemberId, Way)> {
        let open = trees.iter().filter(|(_, _, tree)| {
            tree.may_run() || (!tree.is_gone() && self.nodes.is_connected(&tree.node))
        });
        open.map(|(incarnation, member, tree)| (incarnation, member, self.way(member, tree)))
            .collect()
    }

    fn way(&self, member: MemberId, tree: &Tree) -> Way {
        if self.nodes.is_connected(&tree.node) {
            return Way::Kill;
        }
        if self.confirmed.contains(&tree.node) {
            return Way::Word;
        }
        match tree.lease.end() {
            Some(end) => Way::Lease(end.after(self.settings.run_lease_margin_ms)),
            None => Way::None(Box::new(no_proof(member, &tree.node))),
        }
    }
}

fn no_proof(member: MemberId, node: &NodeName) -> Report {
    Report::new(
        "restart-not-proven-dead",
        Class::Obstacle,
        format!("member {member} of the old incarnation may still run: its node does not answer"),
    )
    .on_node(node)
    .remedy(format!(
        "bring the agent of {node} back, or make sure that the node is off and restart with \
         --confirm-dead {node} as root or operator"
    ))
}
