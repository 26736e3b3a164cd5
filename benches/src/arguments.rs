//! Flags that all benches have, and what is measured by default.

use clap::{Args, ValueEnum};
use crcoord_common::units::ByteSize;

/// What every bench takes.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Small sizes and one round: shows that everything works; its figures mean nothing
    #[arg(long)]
    pub quick: bool,
    /// Rounds; medians of them are told
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Print one JSON document in place of a table
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// How often everything is measured.
    pub fn rounds(&self, usual: u32) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { usual })
    }
}

/// Size and number of the pages that a specimen lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// 4 KiB pages
    Small,
    /// Transparent huge pages
    Huge,
}

impl Pages {
    /// As on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Pages::Small => "small",
            Pages::Huge => "huge",
        }
    }

    /// As in tables.
    pub fn label(self) -> &'static str {
        match self {
            Pages::Small => "4K",
            Pages::Huge => "THP",
        }
    }
}

/// The sizes asked for, or those that are measured otherwise.
pub fn sizes(asked: &[ByteSize], quick: bool, usual: &[u64]) -> Vec<u64> {
    const QUICK: u64 = 32 << 20;
    match (asked, quick) {
        ([], true) => vec![QUICK],
        ([], false) => usual.to_vec(),
        (asked, _) => asked.iter().map(|size| size.0).collect(),
    }
}
