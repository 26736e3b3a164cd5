//! The command line: global options and the table of commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use crcoord_common::ids::JobId;

use crate::commands;
use crate::context::Context;
use crate::demo;
use crate::failure::{Failure, Outcome};

/// Freezes, saves and restarts jobs of ordinary Linux programs across the nodes of a cluster.
#[derive(Debug, Parser)]
#[command(
    name = "crcoord",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Arguments {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Commands,
}

/// What every command takes.
#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file [default: /etc/crcoord/crcoord.toml]; conf.d beside it is read too
    #[arg(long, global = true, value_name = "FILE", env = "CRCOORD_CONFIG")]
    pub config: Option<PathBuf>,
    /// Set a key of the configuration, before environment and files
    #[arg(long = "set", global = true, value_name = "SECTION.KEY=VALUE", value_parser = assignment)]
    pub assignments: Vec<(String, String)>,
    /// Print data as JSON with a schema version
    #[arg(long, global = true)]
    pub json: bool,
    /// Write logs as JSON
    #[arg(long, global = true)]
    pub log_json: bool,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,crcoord_agent=debug`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "CRCOORD_LOG",
        default_value = "info"
    )]
    pub log: String,
}

/// All commands, one file each in `commands/`.
#[derive(Debug, Subcommand)]
pub enum Commands {
    /// Run the coordinator of a cluster
    Coordinator(commands::coordinator::Arguments),
    /// Run the agent of this node
    Agent(commands::agent::Arguments),
    /// Start a program as a job, one member on each node
    Run(commands::run::Arguments),
    /// Take a consistent checkpoint of a job
    Checkpoint(commands::checkpoint::Arguments),
    /// Restart a job from a committed checkpoint
    Restart(commands::restart::Arguments),
    /// List all jobs
    List(commands::list::Arguments),
    /// Show a job and its checkpoints
    Show(commands::show::Arguments),
    /// Show the cluster's nodes and jobs
    Status(commands::status::Arguments),
    /// Check nodes, or whether a job could be checkpointed now
    Check(commands::check::Arguments),
    /// End a job's processes
    Kill(commands::kill::Arguments),
    /// Abort the checkpoint that is being taken of a job
    Abort(commands::abort::Arguments),
    /// Make the cluster's certificate authority and certificates
    Pki(commands::pki::Arguments),
    /// Show the configuration
    Config(commands::config::Arguments),
    /// Show on this machine how a job survives the loss of a node
    Demo(demo::StoryArguments),
    /// Checkpoint or restore a process tree alone, without daemons
    #[command(hide = true)]
    Engine(commands::engine::Arguments),
    /// The first process of a member's capsule
    #[command(hide = true)]
    Capsule,
    /// A process of the demo
    #[command(hide = true, subcommand)]
    DemoPart(demo::Part),
}

impl Commands {
    /// True for commands whose exit status is that of the program they start.
    pub fn returns_programs_status(&self) -> bool {
        matches!(self, Commands::Run(_))
    }

    /// Does it. The last ones stand alone: no configuration can keep them from work.
    pub fn execute(self, global: &Global) -> Outcome {
        let context = || Context::new(global);
        match self {
            Commands::Coordinator(arguments) => arguments.execute(&context()?),
            Commands::Agent(arguments) => arguments.execute(&context()?),
            Commands::Run(arguments) => arguments.execute(&context()?),
            Commands::Checkpoint(arguments) => arguments.execute(&context()?),
            Commands::Restart(arguments) => arguments.execute(&context()?),
            Commands::List(arguments) => arguments.execute(&context()?),
            Commands::Show(arguments) => arguments.execute(&context()?),
            Commands::Status(arguments) => arguments.execute(&context()?),
            Commands::Check(arguments) => arguments.execute(&context()?),
            Commands::Kill(arguments) => arguments.execute(&context()?),
            Commands::Abort(arguments) => arguments.execute(&context()?),
            Commands::Pki(arguments) => arguments.execute(&context()?),
            Commands::Config(arguments) => arguments.execute(&context()?),
            Commands::Engine(arguments) => arguments.execute(),
            Commands::Capsule => Ok(crcoord_agent::capsule::main()),
            Commands::Demo(arguments) => demo::run(&arguments, global.json),
            Commands::DemoPart(part) => part.execute(global.json),
        }
    }
}

/// `--job`, where it may be left out inside a job.
#[derive(Debug, Args)]
pub struct JobArgument {
    /// The job [default: SLURM_JOB_ID, else CRCOORD_JOB]
    #[arg(long = "job", value_name = "ID")]
    job: Option<JobId>,
}

impl JobArgument {
    /// The job that is meant.
    pub fn resolve(&self) -> Result<JobId, Failure> {
        if let Some(job) = &self.job {
            return Ok(job.clone());
        }
        for variable in ["SLURM_JOB_ID", "CRCOORD_JOB"] {
            if let Some(value) = std::env::var(variable)
                .ok()
                .filter(|value| !value.is_empty())
            {
                return value
                    .parse()
                    .map_err(|error| Failure::usage(format!("{variable}: {error}")));
            }
        }
        Err(Failure::usage(
            "no job is named: give --job ID, or run inside a job",
        ))
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .ok_or_else(|| "write SECTION.KEY=VALUE".to_owned())
}
