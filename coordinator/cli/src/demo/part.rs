//! The hidden command `demo-part`: what the demo's own processes are started as.

use std::path::PathBuf;

use super::init::{InitArguments, NodeArguments};
use super::story::StoryArguments;
use super::world;
use crate::failure::Outcome;

/// A process of the demo.
#[derive(Debug, clap::Subcommand)]
pub enum Part {
    /// Makes the namespaces of the demo's world
    World(StoryArguments),
    /// PID 1 of the demo's world: plays the story
    Stage(StoryArguments),
    /// Makes the namespaces of a node
    Node(NodeArguments),
    /// PID 1 of a node
    Init(InitArguments),
    /// A rank of the job
    Heat(HeatArguments),
}

/// Arguments of a rank.
#[derive(Debug, clap::Args)]
pub struct HeatArguments {
    /// Where rank 0 writes its progress and the final field
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    size: u32,
    #[arg(long)]
    steps: u64,
}

impl Part {
    /// Does it.
    pub fn execute(self, json: bool) -> Outcome {
        match self {
            Part::World(arguments) => world::make(&arguments, json),
            Part::Stage(arguments) => world::stage(&arguments, json),
            Part::Node(arguments) => arguments.execute(),
            Part::Init(arguments) => arguments.execute(),
            Part::Heat(arguments) => Ok(crcoord_zoo::heat::main(&arguments.words())),
        }
    }
}

impl HeatArguments {
    /// The solver's command line; rank and addresses are in its environment.
    fn words(&self) -> Vec<String> {
        let mut words = vec![
            "--size".to_owned(),
            self.size.to_string(),
            "--steps".to_owned(),
            self.steps.to_string(),
            "--threads".to_owned(),
            "2".to_owned(),
        ];
        if std::env::var("CRCOORD_MEMBER").is_ok_and(|member| member == "0") {
            for (flag, file) in [("--progress", "progress"), ("--output", "field")] {
                words.push(flag.to_owned());
                words.push(self.directory.join(file).display().to_string());
            }
        }
        words
    }
}
