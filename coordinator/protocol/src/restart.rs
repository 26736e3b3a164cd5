//! One restart from its request to the new incarnation running, or to the half-built being ended.
//!
//! ```text
//! Fence --all proven dead--> Build --all built--> Resume --all run--> Decided
//!   |                          |                     |
//!   +-- no proof, deadline ----+-- failure, lost ----+--> Decided (failed: what was built is ended)
//! ```
//!
//! It knows members, not nodes; `restoring.rs` carries out its effects.

use std::collections::BTreeMap;

use crcoord_common::ids::{Epoch, Incarnation, MemberId};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Phase;
use crcoord_common::wire::member::Placement;

use crate::settings::Settings;
use crate::time::Millis;

/// What follows from what the machine was told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// A phase began.
    Phase(Phase),
    /// Journal the new incarnation, then order all members to be built.
    Build,
    /// Journal that members may run, then order all to resume.
    Resume,
    /// All run.
    Done,
    /// It failed: journal that and end what was built.
    Fail(Vec<Report>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    Fence,
    Build,
    Resume,
    Decided,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Part {
    answered: bool,
    done_bytes: u64,
    /// Last time it was seen to get on.
    sign: Millis,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Restart {
    pub(crate) incarnation: Incarnation,
    pub(crate) epoch: Epoch,
    pub(crate) placements: Vec<Placement>,
    stage: Stage,
    parts: BTreeMap<MemberId, Part>,
    deadline: Millis,
    settings: Settings,
}

impl Restart {
    /// Begins with the fence, which must be through by `fence_until`.
    pub(crate) fn open(
        now: Millis,
        settings: &Settings,
        incarnation: Incarnation,
        epoch: Epoch,
        placements: Vec<Placement>,
        fence_until: Millis,
    ) -> Self {
        let part = Part {
            answered: false,
            done_bytes: 0,
            sign: now,
        };
        Restart {
            incarnation,
            epoch,
            parts: placements
                .iter()
                .map(|at| (at.member, part.clone()))
                .collect(),
            placements,
            stage: Stage::Fence,
            deadline: fence_until,
            settings: settings.clone(),
        }
    }

    pub(crate) fn is_fencing(&self) -> bool {
        self.stage == Stage::Fence
    }

    /// Every earlier incarnation is proven dead.
    pub(crate) fn fenced(&mut self, now: Millis) -> Vec<Effect> {
        if self.stage != Stage::Fence {
            return Vec::new();
        }
        self.enter(now, Stage::Build);
        vec![Effect::Phase(Phase::Build), Effect::Build]
    }

    /// A member is built.
    pub(crate) fn built(&mut self, now: Millis, member: MemberId) -> Vec<Effect> {
        if self.stage != Stage::Build || !self.answer(member) {
            return Vec::new();
        }
        self.enter(now, Stage::Resume);
        vec![Effect::Phase(Phase::Resume), Effect::Resume]
    }

    /// A member runs.
    pub(crate) fn resumed(&mut self, member: MemberId) -> Vec<Effect> {
        if self.stage != Stage::Resume || !self.answer(member) {
            return Vec::new();
        }
        self.stage = Stage::Decided;
        vec![Effect::Done]
    }

    /// A member is getting on with its build.
    pub(crate) fn progress(&mut self, now: Millis, member: MemberId, done_bytes: u64) {
        if let Some(part) = self.parts.get_mut(&member)
            && done_bytes > part.done_bytes
        {
            part.done_bytes = done_bytes;
            part.sign = now;
        }
    }

    /// Something went wrong, unless it is decided already.
    pub(crate) fn fail(&mut self, reasons: Vec<Report>) -> Vec<Effect> {
        if self.stage == Stage::Decided {
            return Vec::new();
        }
        self.stage = Stage::Decided;
        vec![Effect::Fail(reasons)]
    }

    /// A deadline may have passed.
    pub(crate) fn tick(&mut self, now: Millis) -> Vec<Effect> {
        let late: Vec<MemberId> = match self.stage {
            Stage::Decided => return Vec::new(),
            Stage::Fence | Stage::Resume if now < self.deadline => return Vec::new(),
            Stage::Fence => Vec::new(),
            Stage::Resume => self.unanswered().map(|(member, _)| member).collect(),
            Stage::Build => {
                let limit = self.settings.build_ms;
                let late = self
                    .unanswered()
                    .filter(|(_, part)| now >= part.sign.after(limit));
                late.map(|(member, _)| member).collect()
            }
        };
        let report = |what: String| {
            Report::new("restart-deadline", Class::TimedOut, what)
                .remedy("look into the agent's log on its node, then restart again")
        };
        let reasons: Vec<Report> = match self.stage {
            Stage::Fence => {
                vec![report("the old incarnation was not ended in time".into())]
            }
            _ => late
                .into_iter()
                .map(|member| report(format!("member {member} was not built in time")))
                .collect(),
        };
        match reasons.is_empty() {
            true => Vec::new(),
            false => self.fail(reasons),
        }
    }

    /// When to call `tick`.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        match self.stage {
            Stage::Decided => None,
            Stage::Fence | Stage::Resume => Some(self.deadline),
            Stage::Build => {
                let signs = self.unanswered().map(|(_, part)| part.sign);
                signs.map(|sign| sign.after(self.settings.build_ms)).min()
            }
        }
    }

    fn enter(&mut self, now: Millis, stage: Stage) {
        self.stage = stage;
        self.deadline = now.after(self.settings.answer_ms);
        for part in self.parts.values_mut() {
            part.answered = false;
            part.sign = now;
        }
    }

    /// Notes an answer; true when it was the last one.
    fn answer(&mut self, member: MemberId) -> bool {
        if let Some(part) = self.parts.get_mut(&member) {
            part.answered = true;
        }
        self.parts.values().all(|part| part.answered)
    }

    fn unanswered(&self) -> impl Iterator<Item = (MemberId, &Part)> {
        let parts = self.parts.iter().filter(|(_, part)| !part.answered);
        parts.map(|(member, part)| (*member, part))
    }
}
