//! The question whether a running job could be checkpointed: a preflight without a hold.
//!
//! It takes an epoch's number, which is aborted at once, so that agents can tell its messages from
//! those of every other epoch.

use std::collections::BTreeMap;

use crcoord_common::ids::{MemberId, MemberKey, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Event;
use crcoord_common::wire::control::{FromAgent, Preflight, ToAgent};

use crate::action::ClientId;
use crate::core::Core;
use crate::job::{Activity, CleanUp, Job};
use crate::record::Record;
use crate::refusal;
use crate::requests::Purpose;

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
        let epoch = self.last_epoch.next();
        self.last_epoch = epoch;
        let intent = core.persist(Record::Intent {
            job: self.key.clone(),
            incarnation: self.incarnation,
            epoch,
            term: core.leadership.term(),
        });
        let mut found = BTreeMap::new();
        for at in &self.placements {
            let key = self.member_key(self.incarnation, at.member);
            let purpose = Some(Purpose::Survey(key.clone(), epoch));
            let options = self.capture_options(false);
            let order = ToAgent::Preflight {
                key,
                epoch,
                options,
            };
            core.order(intent, &at.node, purpose, order);
            found.insert(at.member, None);
        }
        self.activity = Activity::Survey {
            client: Some(client),
            epoch,
            found,
            deadline: core.now.after(core.settings.answer_ms),
        };
    }

    /// A member was preflighted, or that failed.
    pub(crate) fn survey_answered(&mut self, core: &mut Core, key: &MemberKey, answer: FromAgent) {
        let preflight = match answer {
            FromAgent::Preflighted(preflight) => preflight,
            FromAgent::Failed(report) => only(report),
            _ => return,
        };
        if let Activity::Survey { found, .. } = &mut self.activity {
            found.insert(key.member, Some(preflight));
        }
        self.finish_survey(core, false);
    }

    /// An agent is lost.
    pub(crate) fn survey_lost(&mut self, core: &mut Core, node: &NodeName) {
        let here = |at: &&crcoord_common::wire::member::Placement| at.node == *node;
        let lost: Vec<MemberId> = self
            .placements
            .iter()
            .filter(here)
            .map(|at| at.member)
            .collect();
        if let Activity::Survey { found, .. } = &mut self.activity {
            for member in lost {
                found.entry(member).and_modify(|preflight| {
                    preflight.get_or_insert_with(|| only(refusal::agent_lost(node)));
                });
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
            ..
        } = &self.activity
        else {
            return;
        };
        let due = tick && core.now >= *deadline;
        if !due && found.values().any(Option::is_none) {
            return;
        }
        let client = *client;
        let answer = found.iter().map(|(member, preflight)| {
            let preflight = preflight.clone().unwrap_or_else(|| only(silent(*member)));
            (*member, self.on_its_node(*member, preflight))
        });
        let event = Event::Preflights(answer.collect());
        self.end_survey(core);
        core.tell(client, event, true);
        self.tell_if_over(core);
    }

    /// Gives the epoch's number up; what the agents keep ready for a capture is not needed.
    pub(crate) fn end_survey(&mut self, core: &mut Core) {
        let Activity::Survey { epoch, .. } = &self.activity else {
            return;
        };
        let epoch = *epoch;
        self.activity = Activity::Idle;
        let sequence = core.persist(Record::Abort {
            job: self.key.clone(),
            epoch,
            reasons: vec![Report::new(
                "epoch-survey",
                Class::Note,
                "it was only asked for",
            )],
        });
        core.close_epoch(&self.key, epoch);
        for at in self.placements.clone() {
            let key = self.member_key(self.incarnation, at.member);
            let node = at.node;
            let clean_up = CleanUp { node, key, epoch };
            clean_up.order(core, sequence);
            self.clean_ups.insert(clean_up);
        }
    }

    fn on_its_node(&self, member: MemberId, mut preflight: Preflight) -> Preflight {
        if let Some(node) = self.node_of(member) {
            let findings = std::mem::take(&mut preflight.findings);
            preflight.findings = findings.into_iter().map(|one| one.on_node(node)).collect();
        }
        preflight
    }
}

fn only(finding: Report) -> Preflight {
    Preflight {
        findings: vec![finding],
        ..Preflight::default()
    }
}

fn silent(member: MemberId) -> Report {
    let text = format!("member {member} did not answer the preflight in time");
    Report::new("epoch-deadline", Class::TimedOut, text)
        .remedy("look into the agent's log on its node")
}
