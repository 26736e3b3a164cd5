//! What a rank does as a whole: the reduction over all ranks, and progress.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use super::links::read_word;
use super::settings::Settings;
use crate::{Explain, Outcome, ensure};

/// Steps between two reductions over all ranks, and between two progress lines.
pub(super) const REDUCTION: u64 = 64;

/// What the threads of a rank do together: reduce, report.
pub(super) struct RankWide<'a> {
    pub(super) settings: &'a Settings,
    pub(super) state: Mutex<Reduction>,
    pub(super) changed: Condvar,
}

pub(super) struct Reduction {
    pub(super) ring: Option<Ring>,
    pub(super) arrived: usize,
    pub(super) round: u64,
    pub(super) largest: f64,
    pub(super) broken: bool,
}

impl<'a> RankWide<'a> {
    pub(super) fn new(settings: &'a Settings, ring: Option<Ring>) -> RankWide<'a> {
        let state = Reduction {
            ring,
            arrived: 0,
            round: 0,
            largest: 0.0,
            broken: false,
        };
        RankWide {
            settings,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Called by every thread of the rank; the last one to arrive speaks with the other ranks.
    pub(super) fn reduce(&self, step: u64, change: f64) -> Outcome {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let round = state.round;
        state.largest = state.largest.max(change);
        state.arrived += 1;
        if state.arrived < self.settings.threads {
            while state.round == round && !state.broken {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            ensure!(!state.broken, "another thread gave up");
            return Ok(());
        }
        let mut largest = state.largest;
        if let Some(ring) = &mut state.ring {
            largest = ring.maximum(self.settings, step, largest)?;
        }
        state.arrived = 0;
        state.largest = 0.0;
        state.round += 1;
        self.changed.notify_all();
        drop(state);
        self.report(step, largest)
    }

    pub(super) fn give_up(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .broken = true;
        self.changed.notify_all();
    }

    pub(super) fn report(&self, step: u64, largest: f64) -> Outcome {
        let settings = self.settings;
        if let Some(path) = &settings.progress {
            replace(path, &format!("step {step}\n"))
                .explain(format!("cannot write {}", path.display()))?;
        }
        let often = (settings.steps / 10)
            .next_multiple_of(REDUCTION)
            .max(REDUCTION);
        if step.is_multiple_of(often) || step == settings.steps {
            say(&format!("step={step} change={largest:e}"));
        }
        Ok(())
    }
}

/// The ring of all ranks: a value goes around once to be maximised and once more to be known.
pub(super) struct Ring {
    pub(super) previous: TcpStream,
    pub(super) next: TcpStream,
}

impl Ring {
    pub(super) fn maximum(&mut self, settings: &Settings, step: u64, own: f64) -> Outcome<f64> {
        let mut value = own;
        for lap in 0..2 {
            if settings.rank == 0 {
                self.send(step, value)?;
                value = self.receive(step)?;
            } else {
                let incoming = self.receive(step)?;
                value = if lap == 0 {
                    value.max(incoming)
                } else {
                    incoming
                };
                self.send(step, value)?;
            }
        }
        Ok(value)
    }

    pub(super) fn send(&mut self, step: u64, value: f64) -> Outcome {
        let mut message = step.to_le_bytes().to_vec();
        message.extend(value.to_le_bytes());
        self.next.write_all(&message).explain("ring, send")
    }

    pub(super) fn receive(&mut self, step: u64) -> Outcome<f64> {
        let (theirs, value) = (
            read_word(&mut self.previous)?,
            read_word(&mut self.previous)?,
        );
        ensure!(
            theirs == step,
            "ring: rank before is at step {theirs}, this one at {step}"
        );
        Ok(f64::from_bits(value))
    }
}

/// Replaces a small file in one step, so that a reader sees the old or the new text.
pub(super) fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

/// A line on standard output. A reader that went away must not end a computation of hours.
pub(super) fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    if writeln!(output, "{line}")
        .and_then(|()| output.flush())
        .is_err()
    {
        eprintln!("crcoord-heat: standard output is closed; the line was: {line}");
    }
}
