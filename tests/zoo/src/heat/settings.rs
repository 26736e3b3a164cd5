//! The solver's command line and environment, checked.

use std::fmt::Display;
use std::path::PathBuf;

use crate::{Explain, Failure, Outcome, ensure};

/// Largest field: 16384 x 16384 cells are 2 GiB.
pub(super) const MOST_CELLS: usize = 16384;

/// The command line, checked.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) rank: usize,
    pub(super) peers: Vec<String>,
    pub(super) size: usize,
    pub(super) steps: u64,
    pub(super) threads: usize,
    pub(super) output: Option<PathBuf>,
    pub(super) progress: Option<PathBuf>,
}

impl Settings {
    pub(super) fn parse(
        arguments: &[String],
        environment: impl Fn(&str) -> Option<String>,
    ) -> Outcome<Settings> {
        let known = [
            "rank", "peers", "port", "size", "steps", "threads", "output", "progress",
        ];
        let mut flags = Vec::new();
        for pair in arguments.chunks(2) {
            let [name, value] = pair else {
                return Err(Failure::new(format!("{} has no value", pair[0])));
            };
            let name = name.strip_prefix("--").filter(|name| known.contains(name));
            flags.push((
                name.explain(format!("unknown flag {}", pair[0]))?,
                value.clone(),
            ));
        }
        let flag = |name: &str| {
            flags
                .iter()
                .find(|(flag, _)| *flag == name)
                .map(|(_, value)| value.clone())
        };
        let peers: Vec<String> = match (flag("peers"), environment("CRCOORD_ADDRESSES")) {
            (Some(peers), _) => peers.split(',').map(str::to_owned).collect(),
            (None, Some(addresses)) => {
                let port: u16 = number("--port", flag("port").or(Some("7200".into())))?;
                addresses
                    .split(',')
                    .map(|address| with_port(address, port))
                    .collect()
            }
            (None, None) => return Err(Failure::new("neither --peers nor CRCOORD_ADDRESSES")),
        };
        let settings = Settings {
            rank: number(
                "rank",
                flag("rank").or_else(|| environment("CRCOORD_MEMBER")),
            )?,
            peers,
            size: number("--size", flag("size"))?,
            steps: number("--steps", flag("steps"))?,
            threads: number("--threads", flag("threads").or(Some("2".into())))?,
            output: flag("output").map(PathBuf::from),
            progress: flag("progress").map(PathBuf::from),
        };
        let ranks = settings.peers.len();
        if let Some(members) = environment("CRCOORD_MEMBERS").filter(|_| flag("peers").is_none()) {
            let members: usize = number("CRCOORD_MEMBERS", Some(members))?;
            ensure!(members == ranks, "{members} members but {ranks} addresses");
        }
        ensure!(settings.rank < ranks, "rank {} of {ranks}", settings.rank);
        ensure!(
            (1..=256).contains(&settings.threads),
            "--threads is not in 1..=256"
        );
        let blocks = ranks * settings.threads;
        let sizes = blocks.max(3)..=MOST_CELLS;
        ensure!(
            sizes.contains(&settings.size),
            "--size is not in {sizes:?} for {blocks} blocks"
        );
        Ok(settings)
    }

    pub(super) fn ranks(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn blocks(&self) -> usize {
        self.ranks() * self.threads
    }

    /// The first row of a block; block `blocks()` begins behind the last row.
    pub(super) fn first_row(&self, block: usize) -> usize {
        block * self.size / self.blocks()
    }
}

pub(super) fn number<T: std::str::FromStr<Err: Display>>(
    name: &str,
    text: Option<String>,
) -> Outcome<T> {
    let text = text.explain(format!("{name} is missing"))?;
    text.parse().explain(format!("{name} {text:?}"))
}

/// `ADDRESS:PORT`, with brackets for IPv6.
pub(super) fn with_port(address: &str, port: u16) -> String {
    if address.contains(':') && !address.starts_with('[') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}
