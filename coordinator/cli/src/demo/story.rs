//! The story: a job on three nodes survives the loss of one of them, bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crcoord_common::hostlist::HostList;
use crcoord_common::ids::{Incarnation, JobId, NodeName};
use crcoord_common::wire::client::{EpochInfo, Event, Phase, Request};
use crcoord_common::wire::member::{Command, ExitStatus, NetworkMode, Placement, Stdio};

use super::cluster::{Cluster, Options};
use super::display::{Display, Findings};
use super::error::DemoError;
use crate::client::{Client, ask, unexpected};
use crate::commands::run::groups_of_caller;
use crate::commands::show::ended_text;
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
/// The job's opt-in: cut off from the coordinator for this long, a member ends itself.
const RUN_LEASE: Duration = Duration::from_secs(3);
/// Everything that is waited for must happen within this time.
const PATIENCE: Duration = Duration::from_secs(120);

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
        program: program.to_owned(),
        directory: directory.to_owned(),
        size: arguments.size,
        steps: TRIAL_STEPS,
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
    program: PathBuf,
    directory: PathBuf,
    size: u32,
    steps: u64,
}

/// A job that was started, with the connection over which its end is told.
struct Job {
    id: JobId,
    client: Client,
    /// Where rank 0 writes how far it is.
    progress: PathBuf,
    /// Where rank 0 writes the final field.
    field: PathBuf,
}

impl Job {
    /// Something went wrong with it; `errors` is what it wrote itself.
    fn failed(&self, what: &str, errors: &str) -> Failure {
        let text = format!("{what}; it wrote: {:?}", errors.trim());
        Failure::internal(&format!("job {}", self.id), &text)
    }
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
        let reference = self.run("reference", &nodes, display).await?;
        let reference = self.follow(reference, display).await?;
        display.line(
            "reference",
            &format!("{} of {0} steps, uninterrupted", self.steps),
        );

        display.begin("job 42");
        let mut job = self.run("42", &nodes, display).await?;
        let mut epochs = Vec::new();
        let mut cut = Instant::now();
        for part in CHECKPOINTS {
            let step = self.until(&job, self.step_of(part), display).await?;
            let (info, at) = self.checkpoint(&job.id, display).await?;
            cut = at;
            display.checkpoint(step, &info);
            epochs.push(info);
        }

        let lost = nodes[1].clone();
        let step = self.until(&job, self.step_of(LOSS), display).await?;
        if step >= self.steps {
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
        job = restarted;
        let field = self.follow(job, display).await?;
        display.line("finish", &format!("{} of {0} steps", self.steps));
        Ok(Findings::new(
            lost,
            &placements,
            epochs,
            work_lost,
            bits_different(&reference, &field)?,
        ))
    }

    fn step_of(&self, part: f64) -> u64 {
        (self.steps as f64 * part) as u64
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
        let job = self.run("trial", nodes, display).await?;
        self.until(&job, UNIT, display).await?;
        let begin = Instant::now();
        self.follow(job, display).await?;
        let rate = (TRIAL_STEPS - UNIT) as f64 / begin.elapsed().as_secs_f64().max(0.001);
        self.steps = ((rate * SECONDS) as u64)
            .next_multiple_of(UNIT)
            .max(16 * UNIT);
        let size = self.size;
        display.line(
            "problem",
            &format!(
                "heat equation, {size} x {size} cells, {} steps, 3 ranks x 2 threads over TCP",
                self.steps
            ),
        );
        Ok(())
    }

    /// Starts the solver as a job and waits until all its members run.
    async fn run(
        &mut self,
        id: &str,
        nodes: &[NodeName],
        display: &mut Display,
    ) -> Result<Job, Failure> {
        let id: JobId = id
            .parse()
            .map_err(|error| Failure::internal("job", &error))?;
        let directory = self.directory.join(format!("job-{id}"));
        std::fs::create_dir(&directory)
            .map_err(DemoError::io(format!("making {}", directory.display())))?;
        let arguments = [
            &self.program.display().to_string(),
            "demo-part",
            "heat",
            "--directory",
            &directory.display().to_string(),
            "--size",
            &self.size.to_string(),
            "--steps",
            &self.steps.to_string(),
        ];
        let request = Request::Run {
            job: id.clone(),
            nodes: nodes.to_vec(),
            command: Command {
                arguments: arguments.map(str::to_owned).to_vec(),
                environment: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
                directory: directory.display().to_string(),
                umask: 0o022,
            },
            groups: groups_of_caller()?,
            stdio: Stdio::Caller,
            network: NetworkMode::Virtual,
            run_lease_ms: Some(RUN_LEASE.as_millis() as u64),
            attach: true,
        };
        let mut client = Client::send(&self.cluster.socket(), &request).await?;
        match client.next().await? {
            Event::JobStarted { placements, .. } => display.placed(&placements),
            other => return Err(unexpected(&other)),
        }
        Ok(Job {
            progress: directory.join("progress"),
            field: directory.join("field"),
            id,
            client,
        })
    }

    /// Waits until the job has done so many steps; how many it has done then.
    async fn until(&mut self, job: &Job, step: u64, display: &mut Display) -> Result<u64, Failure> {
        let mut last = (0, Instant::now());
        loop {
            let done = steps_done(&job.progress);
            display.steps(&job.id, done, self.steps);
            if done >= step {
                return Ok(done);
            }
            if done != last.0 {
                last = (done, Instant::now());
            }
            if last.1.elapsed() > PATIENCE {
                return Err(Failure::internal("the demo's job", &"it makes no progress"));
            }
            self.cluster.check()?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the job has ended well; its final field.
    async fn follow(&mut self, mut job: Job, display: &mut Display) -> Result<PathBuf, Failure> {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        let mut errors = String::new();
        let mut last = (0, Instant::now());
        loop {
            let event = tokio::select! {
                event = job.client.next() => event?,
                _ = ticks.tick() => {
                    let done = steps_done(&job.progress);
                    display.steps(&job.id, done, self.steps);
                    if done != last.0 {
                        last = (done, Instant::now());
                    }
                    if last.1.elapsed() > PATIENCE {
                        return Err(job.failed(&format!("no progress since step {done}"), &errors));
                    }
                    continue;
                }
            };
            match event {
                Event::Output {
                    stream: 2, bytes, ..
                } => errors.push_str(&String::from_utf8_lossy(&bytes)),
                // The other ranks wait for this one for ever.
                Event::MemberEnded { member, status } if status != ExitStatus::Exited(0) => {
                    let how = format!("rank {member} ended with {}", ended_text(status));
                    return Err(job.failed(&how, &errors));
                }
                Event::JobEnded { statuses } => {
                    let good = statuses
                        .iter()
                        .all(|(_, how)| *how == ExitStatus::Exited(0));
                    return match good {
                        true => Ok(job.field),
                        false => Err(job.failed("it ended badly", &errors)),
                    };
                }
                _ => {}
            }
        }
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
                return Ok((Job { client, ..job }, placements, incarnation));
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

/// What rank 0 last said of itself; 0 before it said anything.
fn steps_done(progress: &Path) -> u64 {
    let text = std::fs::read_to_string(progress).unwrap_or_default();
    let step = text.trim().strip_prefix("step ");
    step.and_then(|step| step.parse().ok()).unwrap_or(0)
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
