//! Progress of a checkpoint or restart on a terminal; silent everywhere else.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use crcoord_common::ids::MemberId;
use crcoord_common::units::ByteSize;
use crcoord_common::wire::client::{Event, Phase};
use indicatif::{ProgressBar, ProgressStyle};

/// A spinner with the phase and, while pages are streamed, how far all members are.
pub struct Progress {
    bar: ProgressBar,
    members: BTreeMap<MemberId, (u64, u64)>,
}

impl Progress {
    /// Begins to show; nothing where standard error is no terminal.
    pub fn start(what: String) -> Self {
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress {
            bar,
            members: BTreeMap::new(),
        }
    }

    /// Shows what an event says.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Phase { phase } => self.bar.set_message(phase_text(*phase)),
            Event::Progress {
                member,
                done_bytes,
                total_bytes,
            } => {
                self.members.insert(*member, (*done_bytes, *total_bytes));
                let (done, total) = self
                    .members
                    .values()
                    .fold((0, 0), |sum, member| (sum.0 + member.0, sum.1 + member.1));
                self.bar.set_message(format!(
                    "{} {} of about {}",
                    phase_text(Phase::Stream),
                    ByteSize(done).rounded(),
                    ByteSize(total).rounded()
                ));
            }
            _ => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A phase in words.
pub fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "looking for obstacles",
        Phase::Hold => "freezing all members",
        Phase::Capture => "taking their state",
        Phase::Stream => "job runs on, streaming its pages",
        Phase::Commit => "committing",
        Phase::Fence => "proving the old incarnation dead",
        Phase::Build => "fetching and building",
        Phase::Resume => "resuming",
    }
}
