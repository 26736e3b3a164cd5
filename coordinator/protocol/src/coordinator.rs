//! `Coordinator`: the whole state, and what each input does to it.

use std::collections::BTreeMap;

use crcoord_common::ids::{JobId, JobKey, MemberId, NodeName};
use crcoord_common::report::{Class, Report};

use crate::action::{Action, ClientId, Input};
use crate::core::Core;
use crate::job::Job;
use crate::placement::Living;
use crate::probe::Probe;
use crate::record::Record;
use crate::settings::Settings;
use crate::time::Millis;

/// The coordinator's state. Equal states behave equally.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coordinator {
    pub(crate) core: Core,
    pub(crate) jobs: BTreeMap<JobKey, Job>,
    pub(crate) probes: BTreeMap<ClientId, Probe>,
}

impl Coordinator {
    /// The state that the journal's records give, in their order. It does nothing until `begin`.
    pub fn recover(settings: Settings, journal: impl IntoIterator<Item = Record>) -> Self {
        let mut coordinator = Coordinator {
            core: Core::new(settings),
            jobs: BTreeMap::new(),
            probes: BTreeMap::new(),
        };
        for record in journal {
            coordinator.replay(record);
        }
        coordinator
    }

    /// Takes over at time `now`, `unix` seconds after 1970-01-01 UTC: begins a term, gives up what
    /// the life before left half done.
    pub fn begin(&mut self, now: Millis, unix: u64) {
        self.core.at(now);
        self.core.set_wall(unix);
        let term = self.core.leadership.begin();
        self.core.term_record = self.core.persist(Record::TermBegan { term });
        self.settle();
    }

    /// Something happened. `now` never goes back; an earlier one counts as the last.
    pub fn handle(&mut self, now: Millis, input: Input) {
        self.core.at(now);
        match input {
            Input::Persisted(sequence) => {
                self.core.outbox.persisted(sequence);
                for job in self.jobs.values_mut() {
                    job.finish_commit(&mut self.core);
                }
            }
            Input::Connected {
                node,
                session,
                hello,
            } => self.connected(&node, session, hello),
            Input::Disconnected { node, session } => self.disconnected(&node, session),
            Input::Message {
                node,
                session,
                frame,
            } => self.message(&node, session, frame),
            Input::Asked {
                client,
                caller,
                privileged,
                request,
            } => self.asked(client, caller, privileged, request),
            Input::Left { client } => {
                self.probes.remove(&client);
                for job in self.jobs.values_mut() {
                    job.left(&mut self.core, client);
                }
            }
            Input::Wall { unix } => self.core.set_wall(unix),
            Input::Stop => self.stop(),
            Input::Tick => self.tick(),
        }
    }

    fn stop(&mut self) {
        let reason = Report::new("coordinator-stops", Class::Aborted, "the coordinator stops")
            .remedy("ask for another checkpoint when it runs again");
        for job in self.jobs.values_mut() {
            job.abort_checkpoint(&mut self.core, vec![reason.clone()]);
        }
    }

    /// The next thing to do; `None` when all is done.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.core.outbox.poll()
    }

    /// True when nothing waits for a record to become durable.
    pub fn is_quiet(&self) -> bool {
        self.core.outbox.is_persisted(self.core.outbox.last())
    }

    /// The coordinator's term.
    pub fn term(&self) -> crcoord_common::ids::Term {
        self.core.leadership.term()
    }

    /// The uid of the owner of the newest job with this id.
    pub fn job_owner(&self, id: &JobId) -> Option<u32> {
        let key = self.newest(id)?;
        self.jobs.get(&key).map(|job| job.spec.owner.uid)
    }

    /// The newest job with this id.
    pub(crate) fn newest(&self, id: &JobId) -> Option<JobKey> {
        let bound = |submitted| JobKey {
            cluster: self.core.settings.cluster.clone(),
            id: id.clone(),
            submitted,
        };
        let same = self.jobs.range(bound(0)..=bound(u64::MAX));
        same.map(|(key, _)| key.clone()).next_back()
    }

    /// Members that may run on each node.
    pub(crate) fn load(&self) -> BTreeMap<NodeName, u32> {
        let mut load = BTreeMap::new();
        for job in self.jobs.values() {
            for (_, _, tree) in job.trees.iter().filter(|(_, _, tree)| !tree.is_gone()) {
                *load.entry(tree.node.clone()).or_insert(0) += 1;
            }
        }
        load
    }

    /// Connected nodes with the members they run, those of `except` not counted.
    pub(crate) fn living(&self, except: Option<&JobKey>) -> Living {
        let load = self.load();
        let own = |node: &NodeName| {
            let job = except.and_then(|key| self.jobs.get(key));
            let trees = job.map(|job| {
                job.trees
                    .iter()
                    .filter(|(_, _, tree)| !tree.is_gone() && tree.node == *node)
                    .count()
            });
            trees.unwrap_or(0) as u32
        };
        let connected = self.core.nodes.connected();
        connected
            .map(|node| {
                let all = load.get(node).copied().unwrap_or(0);
                (node.clone(), all.saturating_sub(own(node)))
            })
            .collect()
    }

    /// Where the members of a job are: for tests and simulations, which check invariants by it.
    pub fn members(&self, job: &JobKey) -> Vec<(MemberId, NodeName)> {
        let placements = self
            .jobs
            .get(job)
            .map(|job| job.placements.clone())
            .unwrap_or_default();
        placements
            .into_iter()
            .map(|at| (at.member, at.node))
            .collect()
    }
}
