//! The story: a job on three nodes survives the loss of one of them, bit for bit.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crcoord_common::hostlist::HostList;
use crcoord_common::ids::{Incarnation, JobId, NodeName};
use crcoord_common::wire::client::{EpochInfo, Event, Phase, Request};
use crcoord_common::wire::member::{NetworkMode, Placement};

use super::cluster::{Cluster, Options};
use super::display::{Display, Findings};
use super::error::DemoError;
use super::job::{Job, PATIENCE, Problem};
use crate::client::{Client, ask};
use crate::failure::{Failure, Outcome};

/// Seconds that the whole computation shall take: the steps are chosen to fit the machine.
const SECONDS: f64 = 15.0;
/// Steps of the run that measures the machine's speed.
const TRIAL_STEPS: u64 = 256;
/// The solver reports its progress in units of these.
const UNIT: u64 = 64;
/// When the checkpoints are taken and the node is lost, in parts of all steps.
const CHECKPOINTS: [f64; 2] = [0.2, 0.45];
const LOSS: f64 = 0.6;
/// Arguments of `demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct StoryArguments {
    /// Cells along an edge of the field; 2048 are 64 MiB of memory over all ranks
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(64..=16384))]
    size: u32,
    /// Copy the daemons' logs to this directory at the end
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

impl StoryArguments {
    /// The same as the command line of a part of the demo.
    pub(super) fn words(&self, part: &str, json: bool) -> Vec<String> {
        let mut words = vec!["demo-part".to_owned(), part.to_owned()];
        words.extend(["--size".to_owned(), self.size.to_string()]);
        if let Some(logs) = &self.logs {
            words.extend(["--logs".to_owned(), logs.display().to_string()]);
        }
        if json {
            words.push("--json".to_owned());
        }
        words
    }
}

/// Plays it in a world of its own, with the cluster's files in `directory` and `program` for all.
pub async fn play(
    arguments: &StoryArguments,
    directory: &Path,
    program: &Path,
    json: bool,
) -> Outcome {
    let mut display = Display::start(json);
    let mut story = Story {
        cluster: build(directory, program, &mut display)?,
        problem: Problem {
            program: program.to_owned(),
            directory: directory.to_owned(),
            size: arguments.size,
            steps: TRIAL_STEPS,
        },
    };
    let result = story.tell(&mut display).await;
    if let Some(target) = &arguments.logs {
        keep_logs(&story.cluster.logs(), target)?;
    }
    // A daemon that died is the reason for whatever else failed.
    if result.is_err() {
        story.cluster.check()?;
    }
    let findings = result?;
    display.finish(&findings)?;
    Ok(match findings.bits_different {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

struct Story {
    cluster: Cluster,
    problem: Problem,
}

impl Story {
    async fn tell(&mut self, display: &mut Display) -> Result<Findings, Failure> {
        let names = |text: &str| text.parse::<HostList>().map(|list| list.0);
        let nodes = names("n[1-3]").map_err(|error| Failure::internal("nodes", &error))?;
        display.begin("waiting for the agents");
        self.until_connected(4).await?;
        display.line(
            "cluster",
            "coordinator on head; agents on n[1-4] connected; n4 is the spare",
        );
        self.measure(&nodes, display).await?;

        display.begin("reference run without interruption");
        let reference = self
            .run("reference", &nodes, NetworkMode::Host, display)
            .await?;
        let reference = reference.follow(display).await?;
        display.line(
            "reference",
            &format!("{} of {0} steps, uninterrupted", self.problem.steps),
        );

        display.begin("job 42");
        let mut job = self
            .run("42", &nodes, NetworkMode::Virtual, display)
            .await?;
        let mut epochs = Vec::new();
        let mut cut = Instant::now();
        for part in CHECKPOINTS {
            let step = job.until(self.step_of(part), display).await?;
            let (info, at) = self.checkpoint(&job.id, display).await?;
            cut = at;
            display.checkpoint(step, &info);
            display.begin("job 42");
            epochs.push(info);
        }

        let lost = nodes[1].clone();
        let step = job.until(self.step_of(LOSS), display).await?;
        if step >= self.problem.steps {
            return Err(Failure::internal(
                "the demo's job",
                &"it was done before a node could be lost; try a larger --size",
            ));
        }
        let work_lost = cut.elapsed();
        self.cluster.lose_node(&lost)?;
        display.line(
            "loss",
            &format!("{lost} at step {step}: cable cut, agent, capsule and all processes killed"),
        );

        display.begin("waiting for the coordinator to miss the node");
        self.until_connected(3).await?;
        display.line("missed", &format!("{lost} does not answer any more"));
        display.begin("restart");
        let (restarted, placements, incarnation) = self.restart(job, display).await?;
        let on = placements.iter().map(|place| place.node.clone()).collect();
        display.line(
            "restart",
            &format!(
                "epoch {} as life {incarnation} on {}",
                epochs.last().map_or(0, |info| info.epoch.0),
                HostList(on)
            ),
        );
        display.begin("job 42, second life");
        let field = restarted.follow(display).await?;
        display.line("finish", &format!("{} of {0} steps", self.problem.steps));
        Ok(Findings::new(
            lost,
            &placements,
            epochs,
            work_lost,
            bits_different(&reference, &field)?,
        ))
    }

    fn step_of(&self, part: f64) -> u64 {
        (self.problem.steps as f64 * part) as u64
    }

    /// Waits until the coordinator answers and has this many agents.
    async fn until_connected(&mut self, count: usize) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.cluster.check()?;
            let answer = ask(&self.cluster.socket(), &Request::Status).await;
            if let Ok(Event::Cluster { nodes, .. }) = &answer
                && nodes.iter().filter(|node| node.connected).count() == count
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                let late = Failure::internal(
                    "the demo's cluster",
                    &format!("the coordinator does not have {count} agents"),
                );
                return Err(answer.err().unwrap_or(late));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Chooses the number of steps so that the computation takes [`SECONDS`] on this machine.
    async fn measure(&mut self, nodes: &[NodeName], display: &mut Display) -> Result<(), Failure> {
        display.begin("measuring the machine");
        let mut job = self.run("trial", nodes, NetworkMode::Host, display).await?;
        job.until(UNIT, display).await?;
        let begin = Instant::now();
        job.follow(display).await?;
        let rate = (TRIAL_STEPS - UNIT) as f64 / begin.elapsed().as_secs_f64().max(0.001);
        self.problem.steps = ((rate * SECONDS) as u64)
            .next_multiple_of(UNIT)
            .max(8 * UNIT);
        let size = self.problem.size;
        display.line(
            "problem",
            &format!(
                "heat equation, {size} x {size} cells, {} steps, 3 ranks x 2 threads over TCP",
                self.problem.steps
            ),
        );
        Ok(())
    }

    /// Only the job that moves needs addresses that move with it; the others use their nodes'.
    async fn run(
        &self,
        id: &str,
        nodes: &[NodeName],
        network: NetworkMode,
        display: &mut Display,
    ) -> Result<Job, Failure> {
        Job::start(
            &self.cluster.socket(),
            &self.problem,
            id,
            nodes,
            network,
            display,
        )
        .await
    }

    /// One checkpoint, and the moment when all members were frozen.
    async fn checkpoint(
        &mut self,
        job: &JobId,
        display: &mut Display,
    ) -> Result<(EpochInfo, Instant), Failure> {
        display.begin("checkpoint");
        let request = Request::Checkpoint {
            job: job.clone(),
            adopt: None,
            kill: false,
            wait: true,
            reset_external_tcp: false,
        };
        let mut client = Client::send(&self.cluster.socket(), &request).await?;
        let mut cut = Instant::now();
        loop {
            let event = client.next().await?;
            display.event(&event);
            match event {
                Event::Phase {
                    phase: Phase::Capture,
                } => cut = Instant::now(),
                Event::Committed(info) => return Ok((info, cut)),
                _ => {}
            }
        }
    }

    /// Restarts from the newest checkpoint, wherever the coordinator finds room.
    async fn restart(
        &mut self,
        job: Job,
        display: &mut Display,
    ) -> Result<(Job, Vec<Placement>, Incarnation), Failure> {
        let request = Request::Restart {
            job: job.id.clone(),
            epoch: None,
            nodes: Vec::new(),
            confirmed_dead: Vec::new(),
            attach: true,
        };
        let mut client = Client::send(&self.cluster.socket(), &request).await?;
        loop {
            let event = client.next().await?;
            display.event(&event);
            if let Event::Resumed {
                placements,
                incarnation,
                ..
            } = event
            {
                return Ok((job.resumed(client), placements, incarnation));
            }
        }
    }
}

fn build(directory: &Path, program: &Path, display: &mut Display) -> Result<Cluster, Failure> {
    display.begin("building a cluster of network namespaces");
    let nodes = "n[1-4]"
        .parse::<HostList>()
        .map_err(|error| Failure::internal("nodes", &error))?;
    let mut cluster = Cluster::build(Options {
        program: program.to_owned(),
        directory: directory.to_owned(),
        nodes: nodes.0,
        settings: vec![
            "coordinator.heartbeat = \"250ms\"".to_owned(),
            "coordinator.lost_after = \"2s\"".to_owned(),
            "coordinator.run_lease_margin = \"2s\"".to_owned(),
        ],
        log: "info".to_owned(),
    })?;
    cluster.start_all()?;
    Ok(cluster)
}

/// Bits that differ between two fields.
fn bits_different(one: &Path, other: &Path) -> Result<u64, Failure> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(DemoError::io(format!("reading {}", path.display())))
    };
    let (one, other) = (read(one)?, read(other)?);
    let missing = one.len().abs_diff(other.len()) as u64 * 8;
    let differing = one
        .iter()
        .zip(&other)
        .map(|(a, b)| u64::from((a ^ b).count_ones()));
    Ok(missing + differing.sum::<u64>())
}

fn keep_logs(logs: &Path, target: &Path) -> Result<(), DemoError> {
    let step = || format!("copying logs to {}", target.display());
    std::fs::create_dir_all(target).map_err(DemoError::io(step()))?;
    for entry in std::fs::read_dir(logs).map_err(DemoError::io(step()))? {
        let entry = entry.map_err(DemoError::io(step()))?;
        std::fs::copy(entry.path(), target.join(entry.file_name()))
            .map_err(DemoError::io(step()))?;
    }
    Ok(())
}
