//! Checkpoints that stand still in a given phase, so that a test can do harm in it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crcoord::client::Client;
use crcoord::demo::cluster::head_name;
use crcoord::failure::Failure;
use crcoord_common::wire::client::{EpochInfo, Event, Phase, Request};
use crcoord_kernel::sys::kill;
use tokio::runtime::Runtime;

use crate::cluster::{Site, until};

const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;
/// A phase may be over before the coordinator can be stopped in it.
const ATTEMPTS: u32 = 40;
/// What a stopped coordinator said before lies in the socket: reading it takes no time.
const IN_THE_SOCKET: Duration = Duration::from_millis(50);

/// A checkpoint whose coordinator is stopped (SIGSTOP): it stays in its phase. Goes on with
/// [`Still::go_on`], and at the end of the value.
pub struct Still {
    runtime: Runtime,
    client: Client,
    coordinator: i32,
    /// The number of its epoch.
    pub epoch: u64,
}

impl Still {
    /// Begins checkpoints of a job until one stands still in this phase.
    ///
    /// # Panics
    /// Not one of many does, or one fails.
    pub fn in_phase(site: &Site, job: &str, wanted: Phase) -> Still {
        Still::of(site, job, wanted, false)
    }

    /// The same of one that ends the job after its commit; it has to be in time at once.
    ///
    /// # Panics
    /// It was not, or it fails.
    pub fn of_last_checkpoint(site: &Site, job: &str, wanted: Phase) -> Still {
        Still::of(site, job, wanted, true)
    }

    fn of(site: &Site, job: &str, wanted: Phase, last: bool) -> Still {
        let coordinator = site
            .cluster
            .process_of(&head_name(), "coordinator")
            .expect("the coordinator runs");
        for _ in 0..if last { 1 } else { ATTEMPTS } {
            let mut still = Still::begin(site, job, coordinator, last);
            if still.stops_in(wanted) {
                return still;
            }
            still.go_on();
            still.end().unwrap_or_else(|failure| {
                panic!("a checkpoint that nobody disturbed: {failure}");
            });
        }
        panic!("no checkpoint could be stopped in {wanted:?}");
    }

    fn begin(site: &Site, job: &str, coordinator: i32, last: bool) -> Still {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("an event loop");
        let request = Request::Checkpoint {
            job: job.parse().expect("a job's id"),
            adopt: None,
            kill: last,
            wait: true,
            reset_external_tcp: false,
        };
        let client = runtime
            .block_on(Client::send(&site.cluster.socket(), &request))
            .unwrap_or_else(|failure| panic!("{failure}"));
        Still {
            runtime,
            client,
            coordinator,
            epoch: 0,
        }
    }

    /// Waits for the phase and stops the coordinator; whether it was in time.
    fn stops_in(&mut self, wanted: Phase) -> bool {
        loop {
            match self.runtime.block_on(self.client.next()) {
                Ok(Event::Phase { phase }) if phase == wanted => break,
                Ok(Event::Opened { epoch }) => self.epoch = epoch.0,
                Ok(Event::Committed(_)) => panic!("no phase {wanted:?}"),
                Ok(_) => {}
                Err(failure) => panic!("before {wanted:?}: {failure}"),
            }
        }
        signal(self.coordinator, SIGSTOP);
        until("the coordinator stands still", || {
            state_of(self.coordinator) == Some('T')
        });
        self.runtime.block_on(async {
            loop {
                match tokio::time::timeout(IN_THE_SOCKET, self.client.next()).await {
                    Err(_) => return true,
                    Ok(Ok(Event::Phase { .. } | Event::Committed(_)) | Err(_)) => return false,
                    Ok(Ok(_)) => {}
                }
            }
        })
    }

    /// Lets the coordinator go on.
    pub fn go_on(&self) {
        signal(self.coordinator, SIGCONT);
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// Why it was not committed.
    pub fn end(&mut self) -> Result<EpochInfo, Failure> {
        self.runtime.block_on(async {
            loop {
                if let Event::Committed(info) = self.client.next().await? {
                    return Ok(info);
                }
            }
        })
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        // It may have been killed: then there is nobody to wake.
        if state_of(self.coordinator) == Some('T') {
            signal(self.coordinator, SIGCONT);
        }
    }
}

/// The engine that works for an agent now.
pub fn engine_of(agent: i32) -> Option<i32> {
    let tasks = fs::read_dir(format!("/proc/{agent}/task")).ok()?;
    let children = tasks
        .flatten()
        .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let children: Vec<i32> = children
        .flat_map(|text| {
            let pids = text.split_whitespace().map(str::parse);
            pids.flatten().collect::<Vec<i32>>()
        })
        .collect();
    children.into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("engine\0serve")
    })
}

/// Sends a signal to a process.
///
/// # Panics
/// There is no such process.
pub fn signal(pid: i32, signal: i32) {
    kill(pid, signal).unwrap_or_else(|error| panic!("signal {signal} to {pid}: {error}"));
}

/// Whether a process is there.
pub fn exists(pid: i32) -> bool {
    fs::metadata(Path::new("/proc").join(pid.to_string())).is_ok_and(|process| process.nlink() > 0)
}

fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}
