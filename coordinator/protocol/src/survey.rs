//! Questions that change nothing: probing nodes, the preflight of a running job.

use std::collections::{BTreeMap, BTreeSet};

use crcoord_common::ids::{Epoch, MemberId, MemberKey, NodeName};
use crcoord_common::report::Report;
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{FromAgent, Preflight, ToAgent};

use crate::action::ClientId;
use crate::core::Core;
use crate::job::{Activity, Job};
use crate::refusal;
use crate::requests::Purpose;
use crate::time::Millis;

/// How long a node may take to probe itself, in milliseconds.
const PROBE_MS: u64 = 10_000;

/// The epoch of a preflight that prepares none.
pub(crate) const NO_EPOCH: Epoch = Epoch(0);

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

impl Job {
    /// Has every member preflighted, job running.
    pub(crate) fn open_survey(&mut self, core: &mut Core, client: ClientId) {
        let refused: Vec<Report> = match self.refuse_busy() {
            Some(refused) => vec![refused],
            None => self.absent(core),
        };
        if !refused.is_empty() {
            return core.fail(core.outbox.last(), Some(client), refused);
        }
        let mut found = BTreeMap::new();
        for at in self.placements.clone() {
            let key = self.member_key(self.incarnation, at.member);
            let purpose = Some(Purpose::CheckJob(key.clone()));
            let options = self.capture_options(false);
            let epoch = NO_EPOCH;
            let order = ToAgent::Preflight {
                key,
                epoch,
                options,
            };
            core.order(core.outbox.last(), &at.node, purpose, order);
            found.insert(at.member, None);
        }
        self.activity = Activity::Survey {
            client: Some(client),
            found,
            deadline: core.now.after(core.settings.answer_ms),
        };
    }

    /// A member was preflighted, or that failed.
    pub(crate) fn survey_answered(&mut self, core: &mut Core, key: &MemberKey, answer: FromAgent) {
        let Some(node) = self.node_of(key.member).cloned() else {
            return;
        };
        let preflight = match answer {
            FromAgent::Preflighted(mut preflight) => {
                let findings = std::mem::take(&mut preflight.findings);
                preflight.findings = findings.into_iter().map(|one| one.on_node(&node)).collect();
                preflight
            }
            FromAgent::Failed(report) => Preflight {
                findings: vec![report.on_node(&node)],
                ..Preflight::default()
            },
            _ => return,
        };
        // What the agent keeps ready for a capture is not needed.
        let (key, epoch) = (key.clone(), NO_EPOCH);
        let member = key.member;
        core.order(
            core.outbox.last(),
            &node,
            None,
            ToAgent::Abort { key, epoch },
        );
        if let Activity::Survey { found, .. } = &mut self.activity {
            found.insert(member, Some(preflight));
        }
        self.finish_survey(core, false);
    }

    /// An agent is lost, or a deadline has passed.
    pub(crate) fn survey_lost(&mut self, core: &mut Core, node: &NodeName) {
        let lost = refusal::agent_lost(node);
        let members: BTreeSet<MemberId> = self
            .placements
            .iter()
            .filter(|at| at.node == *node)
            .map(|at| at.member)
            .collect();
        if let Activity::Survey { found, .. } = &mut self.activity {
            for (member, preflight) in found {
                if members.contains(member) && preflight.is_none() {
                    *preflight = Some(Preflight {
                        findings: vec![lost.clone()],
                        ..Preflight::default()
                    });
                }
            }
        }
        self.finish_survey(core, false);
    }

    /// Answers when all is known, or when it is time.
    pub(crate) fn finish_survey(&mut self, core: &mut Core, tick: bool) {
        let Activity::Survey {
            client,
            found,
            deadline,
        } = &self.activity
        else {
            return;
        };
        let due = tick && core.now >= *deadline;
        if !due && found.values().any(Option::is_none) {
            return;
        }
        let client = *client;
        let answer = found
            .iter()
            .map(|(member, preflight)| {
                let silent = || {
                    let node = self.node_of(*member);
                    Preflight {
                        findings: node.map(refusal::agent_lost).into_iter().collect(),
                        ..Preflight::default()
                    }
                };
                (*member, preflight.clone().unwrap_or_else(silent))
            })
            .collect();
        self.activity = Activity::Idle;
        core.tell(client, Event::Preflights(answer), true);
        self.tell_if_over(core);
    }
}
