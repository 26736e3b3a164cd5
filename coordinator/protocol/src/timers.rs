//! Deadlines: when the machine wants to be woken, and what it does then.

use crate::coordinator::Coordinator;
use crate::core::Core;
use crate::job::{Activity, Job};
use crate::time::{Millis, earlier};

impl Coordinator {
    /// When `handle(now, Input::Tick)` is to be called at the latest; `None` when nothing waits.
    pub fn next_deadline(&self) -> Option<Millis> {
        let silence = self
            .core
            .nodes
            .next_deadline(self.core.settings.heartbeat_timeout_ms);
        let probes = self.probes.values().map(|probe| probe.deadline).min();
        let jobs = self
            .jobs
            .values()
            .filter_map(|job| job.next_deadline(&self.core))
            .min();
        earlier(silence, earlier(probes, jobs))
    }

    /// A deadline may have passed.
    pub(crate) fn tick(&mut self) {
        let timeout_ms = self.core.settings.heartbeat_timeout_ms;
        for (node, session) in self.core.nodes.silent(self.core.now, timeout_ms) {
            self.drop_session(
                &node,
                session,
                "nothing was heard for the heartbeat timeout",
            );
        }
        self.finish_probes();
        for job in self.jobs.values_mut() {
            job.tick(&mut self.core);
        }
    }
}

impl Job {
    fn next_deadline(&self, core: &Core) -> Option<Millis> {
        match &self.activity {
            Activity::Idle | Activity::Committing { .. } => None,
            Activity::Starting { deadline, .. }
            | Activity::Ending { deadline, .. }
            | Activity::Survey { deadline, .. } => Some(*deadline),
            Activity::Checkpoint(open) => open.machine.next_deadline(),
            Activity::Restart(open) => {
                earlier(open.machine.next_deadline(), self.fence_deadline(core))
            }
        }
    }

    fn tick(&mut self, core: &mut Core) {
        match &self.activity {
            Activity::Idle | Activity::Committing { .. } => {}
            Activity::Starting { .. } => self.start_tick(core),
            Activity::Checkpoint(_) => self.checkpoint_tick(core),
            Activity::Restart(_) => self.restart_tick(core),
            Activity::Ending { .. } => self.ending_tick(core),
            Activity::Survey { .. } => self.finish_survey(core, true),
        }
    }
}
