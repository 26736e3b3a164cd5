//! `Probe`: several nodes look at themselves for one command.

use std::collections::BTreeSet;

use crcoord_common::ids::NodeName;
use crcoord_common::report::Report;
use crcoord_common::wire::control::{FromAgent, ToAgent};

use crate::action::ClientId;
use crate::core::Core;
use crate::refusal;
use crate::requests::Purpose;
use crate::time::Millis;

/// How long a node may take to probe itself, in milliseconds.
const PROBE_MS: u64 = 10_000;

/// A probe of several nodes for one command.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Probe {
    waiting: BTreeSet<NodeName>,
    findings: Vec<Report>,
    pub(crate) deadline: Millis,
}

impl Probe {
    /// Asks the nodes; those that are not connected are findings at once.
    pub(crate) fn open(core: &mut Core, client: ClientId, nodes: BTreeSet<NodeName>) -> Self {
        let mut probe = Probe {
            waiting: BTreeSet::new(),
            findings: Vec::new(),
            deadline: core.now.after(PROBE_MS),
        };
        for node in nodes {
            let last = core.outbox.last();
            if core.order(last, &node, Some(Purpose::Check(client)), ToAgent::Check) {
                probe.waiting.insert(node);
            } else {
                probe.findings.push(refusal::not_connected(&node));
            }
        }
        probe
    }

    /// A node answered, or is lost.
    pub(crate) fn answered(&mut self, node: &NodeName, answer: FromAgent) {
        if !self.waiting.remove(node) {
            return;
        }
        match answer {
            FromAgent::Checked { findings } => {
                self.findings
                    .extend(findings.into_iter().map(|one| one.on_node(node)));
            }
            FromAgent::Failed(report) => self.findings.push(report.on_node(node)),
            _ => self.findings.push(refusal::agent_lost(node)),
        }
    }

    /// A node is lost.
    pub(crate) fn lost(&mut self, node: &NodeName) {
        if self.waiting.remove(node) {
            self.findings.push(refusal::agent_lost(node));
        }
    }

    /// The findings, when all have answered or the deadline has passed.
    pub(crate) fn finished(&mut self, now: Millis) -> Option<Vec<Report>> {
        if now >= self.deadline {
            let silent = std::mem::take(&mut self.waiting);
            self.findings.extend(silent.iter().map(refusal::agent_lost));
        }
        self.waiting
            .is_empty()
            .then(|| std::mem::take(&mut self.findings))
    }
}
