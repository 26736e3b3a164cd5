//! What the demo shows: a live line on a terminal, a line for every phase, and the result.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crcoord_common::ids::{JobId, MemberId, NodeName};
use crcoord_common::units::rounded_duration;
use crcoord_common::wire::client::{EpochInfo, Event};
use crcoord_common::wire::member::Placement;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::commands::checkpoint::figures_table;
use crate::failure::Failure;
use crate::output;
use crate::progress::phase_text;

/// The story's result.
#[derive(Debug, Serialize)]
pub struct Findings {
    /// The node that was lost.
    pub node_lost: NodeName,
    /// Where the members ran at the end.
    pub nodes: Vec<NodeName>,
    /// Bits of the final field that differ from the uninterrupted run's.
    pub bits_different: u64,
    /// The longest time that a member was frozen, in microseconds.
    pub longest_freeze_us: u64,
    /// From the last cut to the loss, in seconds.
    pub work_lost_s: f64,
    /// The checkpoints that were taken.
    pub epochs: Vec<EpochInfo>,
}

impl Findings {
    /// Puts the findings together.
    pub fn new(
        node_lost: NodeName,
        placements: &[Placement],
        epochs: Vec<EpochInfo>,
        work_lost: Duration,
        bits_different: u64,
    ) -> Self {
        let freezes = epochs.iter().flat_map(|info| info.members.iter());
        Findings {
            node_lost,
            nodes: placements.iter().map(|place| place.node.clone()).collect(),
            bits_different,
            longest_freeze_us: freezes.map(|member| member.freeze_us).max().unwrap_or(0),
            work_lost_s: work_lost.as_secs_f64(),
            epochs,
        }
    }
}

/// The display.
pub struct Display {
    bar: ProgressBar,
    json: bool,
    start: Instant,
    phase: Instant,
    members: BTreeMap<MemberId, String>,
    streamed: BTreeMap<MemberId, (u64, u64)>,
}

impl Display {
    /// Lines go to standard output unless that is for JSON; the live line to a terminal only.
    pub fn start(json: bool) -> Self {
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new(0),
            false => ProgressBar::hidden(),
        };
        let template = "{spinner} {prefix:<28} [{bar:30}] {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        let now = Instant::now();
        Display {
            bar,
            json,
            start: now,
            phase: now,
            members: BTreeMap::new(),
            streamed: BTreeMap::new(),
        }
    }

    /// A phase begins.
    pub fn begin(&mut self, what: &str) {
        self.phase = Instant::now();
        self.streamed.clear();
        self.bar.set_prefix(what.to_owned());
        // A bar of length 0 would be shown full.
        self.bar.set_length(1);
        self.bar.set_position(0);
        self.bar.set_message("");
    }

    /// A phase has ended.
    pub fn line(&mut self, name: &str, text: &str) {
        let took = rounded_duration(self.phase.elapsed());
        self.say(&format!("{name:<11} {text}  ({took})"));
        self.phase = Instant::now();
    }

    /// How far a job is.
    pub fn steps(&self, job: &JobId, done: u64, all: u64) {
        self.bar.set_length(all);
        self.bar.set_position(done);
        self.bar
            .set_message(format!("job {job}, step {done} of {all}"));
    }

    /// Where a job's members are.
    pub fn placed(&mut self, placements: &[Placement]) {
        self.members = placements
            .iter()
            .map(|place| (place.member, place.node.to_string()))
            .collect();
    }

    /// What a checkpoint or restart is doing.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Phase { phase } => self.bar.set_message(phase_text(*phase)),
            Event::Progress {
                member,
                done_bytes,
                total_bytes,
            } => {
                self.streamed.insert(*member, (*done_bytes, *total_bytes));
                let parts: Vec<String> = self
                    .streamed
                    .iter()
                    .map(|(member, (done, all))| {
                        let node = self.members.get(member).map_or("?", String::as_str);
                        format!("{node} {}%", done * 100 / (*all).max(1))
                    })
                    .collect();
                self.bar
                    .set_message(format!("streaming: {}", parts.join(", ")));
            }
            _ => {}
        }
    }

    /// A checkpoint was committed.
    pub fn checkpoint(&mut self, step: u64, info: &EpochInfo) {
        self.line(
            "checkpoint",
            &format!("epoch {} at step {step} committed", info.epoch),
        );
        for line in figures_table(&info.members).lines() {
            self.say(&format!("            {line}"));
        }
    }

    /// The result.
    pub fn finish(&mut self, result: &Findings) -> Result<(), Failure> {
        self.bar.finish_and_clear();
        if self.json {
            return output::json("demo", result);
        }
        let freeze = Duration::from_micros(result.longest_freeze_us);
        output::print(&format!(
            "\nnode lost       {}\nbits different  {}\nfreeze          {} (longest of all members)\n\
             work lost       {:.1} s\nwhole demo      {}",
            result.node_lost,
            result.bits_different,
            rounded_duration(freeze),
            result.work_lost_s,
            rounded_duration(self.start.elapsed()),
        ))
    }

    fn say(&self, text: &str) {
        if !self.json {
            // A reader that has gone away does not end the story.
            self.bar.suspend(|| drop(output::print(text)));
        }
    }
}
