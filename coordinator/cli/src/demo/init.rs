//! Inside a node of the cluster: the process that makes the namespaces, and their PID 1, which
//! starts daemons, reaps whatever ends and goes with its leash (standard input).

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crcoord_common::ids::NodeName;
use crcoord_kernel::namespace::{
    NamespaceKind, Propagation, mount_proc, mount_tmpfs, set_host_name, set_propagation, unshare,
};
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, set_parent_process_death_signal, waitpid,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};

use super::error::DemoError;
use crate::block_on;
use crate::failure::{Failure, Outcome};

/// To a node's PID 1, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Start a program (this one, with these arguments) and log its output.
    Start {
        /// By which it is known, for example `agent`.
        name: String,
        arguments: Vec<String>,
        log: PathBuf,
    },
}

/// From a node, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Word {
    /// PID 1 was started; its pid as the caller sees it.
    Init { pid: i32 },
    /// PID 1 has its mounts and its host name.
    Ready,
    /// A program runs; its pid as the node sees it.
    Started { name: String, pid: i32 },
    /// An order could not be carried out.
    Failed { name: String, reason: String },
    /// A program ended.
    Ended { name: String, status: String },
}

/// Arguments of the process that makes the namespaces.
#[derive(Debug, clap::Args)]
pub struct NodeArguments {
    #[command(flatten)]
    init: InitArguments,
}

/// Arguments of a node's PID 1.
#[derive(Debug, clap::Args)]
pub struct InitArguments {
    /// The node's name
    #[arg(long)]
    name: NodeName,
    /// Where the node's own memory filesystem is mounted
    #[arg(long)]
    private: PathBuf,
}

impl NodeArguments {
    /// Makes the namespaces, starts PID 1 in them and ends with it.
    pub fn execute(self) -> Outcome {
        let kinds = [
            NamespaceKind::Network,
            NamespaceKind::Mount,
            NamespaceKind::Uts,
            NamespaceKind::Ipc,
            NamespaceKind::Pid,
        ];
        unshare(&kinds).map_err(DemoError::from)?;
        let mut init = Command::new("/proc/self/exe")
            .args([
                "demo-part",
                "init",
                "--name",
                self.init.name.as_str(),
                "--private",
            ])
            .arg(&self.init.private)
            .spawn()
            .map_err(DemoError::io("starting the node's PID 1"))?;
        say(&Word::Init {
            pid: init.id().cast_signed(),
        })?;
        let status = init
            .wait()
            .map_err(DemoError::io("waiting for the node's PID 1"))?;
        Ok(match status.success() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

impl InitArguments {
    /// Sets the node up and serves orders until the leash ends; everything in the node ends with it.
    pub fn execute(self) -> Outcome {
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|error| DemoError::io("prctl(PR_SET_PDEATHSIG)")(error.into()))?;
        set_propagation(Propagation::Private).map_err(DemoError::from)?;
        mount_proc(Path::new("/proc")).map_err(DemoError::from)?;
        mount_tmpfs(&self.private).map_err(DemoError::from)?;
        set_host_name(self.name.as_str()).map_err(DemoError::from)?;
        block_on(serve())
    }
}

async fn serve() -> Outcome {
    let wait = |error| DemoError::io("waiting for children")(error);
    let mut children = signal(SignalKind::child()).map_err(wait)?;
    let orders = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(pipe::Receiver::from_owned_fd)
        .map_err(DemoError::io("reading orders"))?;
    let mut orders = BufReader::new(orders).lines();
    let mut names = BTreeMap::new();
    say(&Word::Ready)?;
    loop {
        tokio::select! {
            order = orders.next_line() => {
                match order.map_err(DemoError::io("reading orders"))? {
                    Some(line) => obey(&line, &mut names)?,
                    None => return Ok(ExitCode::SUCCESS),
                }
            }
            _ = children.recv() => reap(&mut names)?,
        }
    }
}

fn obey(line: &str, names: &mut BTreeMap<i32, String>) -> Result<(), Failure> {
    let order = serde_json::from_str(line)
        .map_err(|error| Failure::internal("an order does not decode", &error))?;
    let Order::Start {
        name,
        arguments,
        log,
    } = order;
    match start(&arguments, &log) {
        Ok(pid) => {
            names.insert(pid, name.clone());
            say(&Word::Started { name, pid })
        }
        Err(error) => say(&Word::Failed {
            name,
            reason: error.to_string(),
        }),
    }
}

/// Its pid; it is reaped with all others.
fn start(arguments: &[String], log: &Path) -> io::Result<i32> {
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new("/proc/self/exe");
    // The cluster's configuration is its own, whatever the caller's says.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CRCOORD_") {
            command.env_remove(name);
        }
    }
    let child = command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child.id().cast_signed())
}

fn reap(names: &mut BTreeMap<i32, String>) -> Result<(), Failure> {
    while let Ok(Some((pid, status))) = waitpid(None, WaitOptions::NOHANG) {
        // Orphans of the node's jobs have no name.
        if let Some(name) = names.remove(&Pid::as_raw(Some(pid))) {
            say(&Word::Ended {
                name,
                status: in_words(status),
            })?;
        }
    }
    Ok(())
}

fn in_words(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "changed its state".to_owned(),
    }
}

fn say(word: &Word) -> Result<(), Failure> {
    let text = serde_json::to_string(word)
        .map_err(|error| Failure::internal("a word does not encode", &error))?;
    let mut output = io::stdout().lock();
    writeln!(output, "{text}")
        .and_then(|()| output.flush())
        .map_err(|error| Failure::internal("nobody listens to this node", &error))
}
