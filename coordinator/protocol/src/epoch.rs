//! One global checkpoint from its intent to the decision: commit or abort.
//!
//! ```text
//! Preflight --all clear--> Hold --all held: the cut--> Capture --all captured--> Stream
//!     |                      |                            |                        |
//!     |                      +-- lease over, maximum over +                        +--all sealed--> Decided
//!     +-- obstacle, failure, lost agent, exit, deadline --+------------------------+--> Decided (abort)
//! ```
//!
//! It knows members, not nodes or connections; `checkpoint.rs` carries out its effects.

use std::collections::BTreeMap;

use crcoord_common::ids::{Epoch, MemberId};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Phase;
use crcoord_common::wire::control::{CopyTarget, FromAgent};
use crcoord_common::wire::member::{MemberCommit, Replica};

use crate::hold::HoldLease;
use crate::settings::Settings;
use crate::time::{Millis, earlier};

/// What a member's agent is to be told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    Preflight,
    Hold { lease_ms: u64 },
    Renew { lease_ms: u64 },
    Capture,
    Release { copies: Vec<CopyTarget> },
}

/// What follows from what the machine was told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Tell a member's agent.
    Order(MemberId, Order),
    /// A phase began.
    Phase(Phase),
    /// All members are held at this moment.
    Cut,
    /// Every member sealed: journal the commit.
    Commit(Sealed),
    /// It failed: journal the abort, then tell all members.
    Abort(Vec<Report>),
}

/// What the commit will say, in member order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Sealed {
    pub(crate) members: Vec<MemberCommit>,
    pub(crate) stream_ms: Vec<u64>,
}

/// Where a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    Preflight,
    Hold,
    Capture,
    Stream,
    Decided,
}

/// One member's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Part {
    /// It has answered the present stage's order.
    answered: bool,
    lease: Option<HoldLease>,
    copies: Vec<CopyTarget>,
    released: Option<Millis>,
    frozen_us: Option<u64>,
    sealed: Option<MemberCommit>,
    stream_ms: u64,
    done_bytes: u64,
    /// Last time it was seen to get on with streaming.
    sign: Millis,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Checkpoint {
    pub(crate) epoch: Epoch,
    stage: Stage,
    held: bool,
    streamed: bool,
    parts: BTreeMap<MemberId, Part>,
    obstacles: Vec<Report>,
    deadline: Millis,
    /// End that no hold may pass.
    hold_limit: Millis,
    settings: Settings,
}

impl Checkpoint {
    /// Opens the epoch; `copies` says for each member where its part goes besides its own store.
    pub(crate) fn open(
        now: Millis,
        settings: &Settings,
        epoch: Epoch,
        copies: BTreeMap<MemberId, Vec<CopyTarget>>,
    ) -> (Self, Vec<Effect>) {
        let part = |copies| Part {
            copies,
            ..Part::default()
        };
        let parts = copies
            .into_iter()
            .map(|(member, copies)| (member, part(copies)));
        let mut machine = Checkpoint {
            epoch,
            stage: Stage::Preflight,
            held: false,
            streamed: false,
            parts: parts.collect(),
            obstacles: Vec::new(),
            deadline: now,
            hold_limit: now,
            settings: settings.clone(),
        };
        let effects = machine.enter(now, Stage::Preflight);
        (machine, effects)
    }

    /// The phase as people are shown it.
    pub(crate) fn phase(&self) -> Phase {
        match self.stage {
            Stage::Preflight => Phase::Preflight,
            Stage::Hold => Phase::Hold,
            Stage::Capture => Phase::Capture,
            Stage::Stream => Phase::Stream,
            Stage::Decided => Phase::Commit,
        }
    }

    /// True once members may have been frozen.
    pub(crate) fn has_held(&self) -> bool {
        self.held
    }

    /// True once members were released, so that parts may lie in stores.
    pub(crate) fn has_streamed(&self) -> bool {
        self.streamed
    }

    /// True once commit or abort is decided: nothing changes it any more.
    pub(crate) fn is_decided(&self) -> bool {
        self.stage == Stage::Decided
    }

    /// An agent answered an order about this epoch.
    pub(crate) fn answered(
        &mut self,
        now: Millis,
        member: MemberId,
        answer: FromAgent,
    ) -> Vec<Effect> {
        let stage = self.stage;
        let Some(part) = self.parts.get_mut(&member) else {
            return Vec::new();
        };
        match (stage, answer) {
            (Stage::Decided, _) => return Vec::new(),
            (Stage::Preflight, FromAgent::Preflighted(found)) => {
                part.answered = true;
                let obstacles = found.findings.into_iter();
                let obstacles = obstacles.filter(|finding| finding.class != Class::Note);
                self.obstacles.extend(obstacles);
            }
            (Stage::Preflight, FromAgent::Failed(report)) => {
                part.answered = true;
                self.obstacles.push(report);
            }
            (Stage::Hold, FromAgent::Held { .. }) => {
                part.answered = true;
                if let Some(lease) = &mut part.lease {
                    lease.answered();
                }
            }
            (Stage::Capture, FromAgent::Captured(_)) => part.answered = true,
            (Stage::Stream, FromAgent::Released { frozen_us }) => {
                part.released = Some(now);
                part.frozen_us = Some(frozen_us);
                part.sign = now;
            }
            (Stage::Stream, FromAgent::Sealed { commit }) => {
                if let Err(report) = part.seal(now, member, commit) {
                    return self.abort(vec![*report]);
                }
            }
            (_, FromAgent::Failed(report)) => return self.abort(vec![report]),
            // An answer of an earlier stage that was delivered twice, or nonsense: not believed.
            _ => return Vec::new(),
        }
        self.advance(now)
    }

    /// A renewal was answered.
    pub(crate) fn renewed(&mut self, member: MemberId) {
        if let Some(lease) = self
            .parts
            .get_mut(&member)
            .and_then(|part| part.lease.as_mut())
        {
            lease.answered();
        }
    }

    /// A hold ended by itself. Of no consequence once the member was released by us.
    pub(crate) fn hold_lost(&mut self, member: MemberId, report: Report) -> Vec<Effect> {
        match self.parts.get(&member) {
            Some(part) if part.released.is_none() && part.sealed.is_none() => {
                self.abort(vec![report])
            }
            _ => Vec::new(),
        }
    }

    /// Streaming goes on.
    pub(crate) fn progress(&mut self, now: Millis, member: MemberId, done_bytes: u64) {
        if let Some(part) = self.parts.get_mut(&member)
            && done_bytes > part.done_bytes
        {
            part.done_bytes = done_bytes;
            part.sign = now;
        }
    }

    /// Ends it without a commit, unless that is decided already.
    pub(crate) fn abort(&mut self, reasons: Vec<Report>) -> Vec<Effect> {
        if self.is_decided() {
            return Vec::new();
        }
        self.stage = Stage::Decided;
        vec![Effect::Abort(reasons)]
    }

    /// A deadline may have passed.
    pub(crate) fn tick(&mut self, now: Millis) -> Vec<Effect> {
        match self.stage {
            Stage::Decided => Vec::new(),
            Stage::Preflight if now >= self.deadline => {
                let reasons = self.silent("did not answer the preflight in time");
                self.abort(reasons)
            }
            Stage::Preflight => Vec::new(),
            Stage::Hold | Stage::Capture => self.tick_held(now),
            Stage::Stream => self.tick_stream(now),
        }
    }

    /// When to call `tick`.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        let leases = self.parts.values().filter_map(|part| part.lease.as_ref());
        match self.stage {
            Stage::Decided => None,
            Stage::Preflight => Some(self.deadline),
            Stage::Hold | Stage::Capture => {
                let first = self.deadline.min(self.hold_limit);
                let leases = leases.map(HoldLease::next_deadline).min();
                earlier(Some(first), leases)
            }
            Stage::Stream => {
                let unsealed = self.parts.values().filter(|part| part.sealed.is_none());
                unsealed
                    .map(|part| part.sign.after(self.settings.seal_ms))
                    .min()
            }
        }
    }

    fn tick_held(&mut self, now: Millis) -> Vec<Effect> {
        if let Some(reasons) = self.poisoned(now) {
            return self.abort(reasons);
        }
        if now >= self.hold_limit {
            let limit = self.settings.hold_maximum_ms;
            let report = Report::new(
                "epoch-hold-maximum",
                Class::Aborted,
                format!("the members were not captured within the longest hold of {limit} ms"),
            );
            return self.abort(vec![
                report.remedy("raise hold_limit or look for a slow node"),
            ]);
        }
        if now >= self.deadline {
            let reasons = self.silent("did not answer in time while the job was held");
            return self.abort(reasons);
        }
        let limit = self.hold_limit;
        let mut effects = Vec::new();
        for (member, part) in &mut self.parts {
            let lease = part.lease.as_mut();
            if let Some(lease_ms) = lease.and_then(|lease| lease.renew(now, limit)) {
                effects.push(Effect::Order(*member, Order::Renew { lease_ms }));
            }
        }
        effects
    }

    fn tick_stream(&mut self, now: Millis) -> Vec<Effect> {
        let limit = self.settings.seal_ms;
        let stalled = |part: &Part| part.sealed.is_none() && now >= part.sign.after(limit);
        let reasons: Vec<Report> = self
            .parts
            .iter()
            .filter(|(_, part)| stalled(part))
            .map(|(member, part)| {
                let done = part.done_bytes;
                Report::new(
                    "epoch-stream-stalled",
                    Class::Aborted,
                    format!("member {member} stored nothing for {limit} ms, after {done} bytes"),
                )
                .remedy("look into the agent's log and at its store")
            })
            .collect();
        match reasons.is_empty() {
            true => Vec::new(),
            false => self.abort(reasons),
        }
    }

    /// Goes on when all members have answered.
    fn advance(&mut self, now: Millis) -> Vec<Effect> {
        let all = self.parts.values().all(|part| part.answered);
        match self.stage {
            Stage::Preflight if all && !self.obstacles.is_empty() => {
                let obstacles = std::mem::take(&mut self.obstacles);
                self.abort(obstacles)
            }
            Stage::Preflight if all => self.enter(now, Stage::Hold),
            Stage::Hold if all => match self.poisoned(now) {
                Some(reasons) => self.abort(reasons),
                None => {
                    let mut effects = vec![Effect::Cut];
                    effects.extend(self.enter(now, Stage::Capture));
                    effects
                }
            },
            Stage::Capture if all => match self.poisoned(now) {
                Some(reasons) => self.abort(reasons),
                None => self.enter(now, Stage::Stream),
            },
            Stage::Stream => self.commit_if_sealed(),
            _ => Vec::new(),
        }
    }

    fn enter(&mut self, now: Millis, stage: Stage) -> Vec<Effect> {
        self.stage = stage;
        self.held |= stage == Stage::Hold;
        self.streamed |= stage == Stage::Stream;
        let settings = &self.settings;
        let wait_ms = match stage {
            Stage::Hold => settings.hold_lease_ms,
            Stage::Capture => settings.capture_ms,
            _ => settings.answer_ms,
        };
        self.deadline = now.after(wait_ms);
        if stage == Stage::Hold {
            self.hold_limit = now.after(settings.hold_maximum_ms);
        }
        let mut effects = vec![Effect::Phase(self.phase())];
        for (member, part) in &mut self.parts {
            part.answered = false;
            let order = match stage {
                Stage::Preflight => Order::Preflight,
                Stage::Hold => {
                    let lease_ms = settings.hold_lease_ms.min(settings.hold_maximum_ms);
                    part.lease = Some(HoldLease::ordered(now, lease_ms));
                    Order::Hold { lease_ms }
                }
                Stage::Capture => Order::Capture,
                Stage::Stream => {
                    part.sign = now;
                    let copies = part.copies.clone();
                    Order::Release { copies }
                }
                Stage::Decided => continue,
            };
            effects.push(Effect::Order(*member, order));
        }
        effects
    }

    fn commit_if_sealed(&mut self) -> Vec<Effect> {
        let mut sealed = Sealed::default();
        for part in self.parts.values() {
            let Some(commit) = &part.sealed else {
                return Vec::new();
            };
            sealed.members.push(commit.clone());
            sealed.stream_ms.push(part.stream_ms);
        }
        self.stage = Stage::Decided;
        vec![Effect::Phase(Phase::Commit), Effect::Commit(sealed)]
    }

    /// The reasons, if any member may have thawed by itself: its state is no longer of the cut.
    fn poisoned(&self, now: Millis) -> Option<Vec<Report>> {
        let over = |part: &Part| part.lease.as_ref().is_some_and(|lease| lease.is_over(now));
        let reasons: Vec<Report> = self
            .parts
            .iter()
            .filter(|(_, part)| over(part))
            .map(|(member, _)| {
                Report::new(
                    "epoch-hold-lost",
                    Class::Aborted,
                    format!("the hold of member {member} was not renewed in time"),
                )
                .remedy("try again; raise hold_lease if its node or the network is slow")
            })
            .collect();
        (!reasons.is_empty()).then_some(reasons)
    }

    fn silent(&self, what: &str) -> Vec<Report> {
        let silent = self.parts.iter().filter(|(_, part)| !part.answered);
        silent
            .map(|(member, _)| {
                Report::new(
                    "epoch-deadline",
                    Class::TimedOut,
                    format!("member {member} {what}"),
                )
                .remedy("look into the agent's log on its node")
            })
            .collect()
    }
}

impl Part {
    fn seal(
        &mut self,
        now: Millis,
        member: MemberId,
        commit: MemberCommit,
    ) -> Result<(), Box<Report>> {
        let absent = |target: &&CopyTarget| {
            let replica = match target {
                CopyTarget::Partner { node, .. } => Replica::Node(node.clone()),
                CopyTarget::Shared => Replica::Shared,
            };
            !commit.replicas.contains(&replica)
        };
        if commit.member != member || self.copies.iter().any(|target| absent(&target)) {
            let what = format!("member {member} sealed without the copies that were asked for");
            let report = Report::new("epoch-copy-missing", Class::Failure, what);
            let remedy = "run the same version of crcoord on all nodes";
            return Err(Box::new(report.remedy(remedy)));
        }
        // Its release has happened, even if the answer to it was not seen.
        let released = *self.released.get_or_insert(self.sign);
        self.stream_ms = now.since(released);
        self.sealed = Some(MemberCommit {
            freeze_us: self.frozen_us.unwrap_or(commit.freeze_us),
            ..commit
        });
        Ok(())
    }
}
