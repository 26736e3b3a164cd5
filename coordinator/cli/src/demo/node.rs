//! A node of the cluster as its owner holds it: dropping it ends everything in it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crcoord_common::ids::NodeName;
use rustix::process::{Pid, Signal, kill_process};

use super::error::DemoError;
use super::init::{Order, Word};

/// A node does what it is told within this time, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running node.
#[derive(Debug)]
pub(super) struct Node {
    name: NodeName,
    helper: Child,
    leash: Option<ChildStdin>,
    words: Receiver<Word>,
    init: i32,
    running: BTreeMap<String, Running>,
}

/// A program in a node.
#[derive(Debug)]
struct Running {
    pid: i32,
    log: PathBuf,
    ended: Option<String>,
}

impl Node {
    /// Starts a node with namespaces of its own.
    pub(super) fn start(
        program: &Path,
        name: &NodeName,
        private: &Path,
    ) -> Result<Self, DemoError> {
        let mut helper = Command::new(program)
            .args(["demo-part", "node", "--name", name.as_str(), "--private"])
            .arg(private)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(DemoError::io(format!("starting node {name}")))?;
        let (sender, words) = channel();
        if let Some(output) = helper.stdout.take() {
            // Ends with the node, whose end closes the pipe.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let word = serde_json::from_str(&line).ok();
                    if word.is_none_or(|word| sender.send(word).is_err()) {
                        break;
                    }
                }
            });
        }
        let mut node = Node {
            name: name.clone(),
            leash: helper.stdin.take(),
            helper,
            words,
            init: 0,
            running: BTreeMap::new(),
        };
        // The helper and PID 1 speak in any order.
        let (mut init, mut ready) = (None, false);
        node.init = node.wait("start", |word| {
            match word {
                Word::Init { pid } => init = Some(*pid),
                Word::Ready => ready = true,
                _ => {}
            }
            init.filter(|_| ready).map(Ok)
        })?;
        Ok(node)
    }

    /// PID 1, as the owner sees it.
    pub(super) fn init(&self) -> i32 {
        self.init
    }

    /// One of its programs, as the owner sees it, while it runs.
    pub(super) fn process_of(&self, name: &str) -> Option<i32> {
        let running = self.running.get(name)?;
        outside_pid(self.init, running.pid)
    }

    /// Starts `crcoord ARGUMENTS` in it, under a name, its output logged.
    pub(super) fn run(
        &mut self,
        name: &str,
        arguments: Vec<String>,
        log: PathBuf,
    ) -> Result<(), DemoError> {
        let order = Order::Start {
            name: name.to_owned(),
            arguments,
            log: log.clone(),
        };
        self.order(&order)?;
        let pid = self.wait("start a program", |word| match word {
            Word::Started { name: one, pid } if one == name => Some(Ok(*pid)),
            Word::Failed { name: one, reason } if one == name => Some(Err(reason.clone())),
            _ => None,
        })?;
        let running = Running {
            pid,
            log,
            ended: None,
        };
        self.running.insert(name.to_owned(), running);
        Ok(())
    }

    /// An error if one of its programs has ended.
    pub(super) fn check(&mut self) -> Result<(), DemoError> {
        while let Ok(word) = self.words.try_recv() {
            note(&word, &mut self.running);
        }
        let ended = self.running.iter().find_map(|(name, running)| {
            let reason = running.ended.clone()?;
            Some(DemoError::Daemon {
                node: self.name.clone(),
                daemon: name.clone(),
                reason,
                log: running.log.clone(),
                tail: tail(&running.log),
            })
        });
        ended.map_or(Ok(()), Err)
    }

    /// Sends SIGKILL to a program and waits for its end; only that process, as a crash would.
    pub(super) fn kill_program(&mut self, name: &str) -> Result<(), DemoError> {
        let pid = match self.running.get(name) {
            Some(running) if running.ended.is_none() => running.pid,
            _ => return Err(self.failed(format!("{name} does not run"))),
        };
        // The node counts its pids anew: find the process by what it is called there.
        let outside = outside_pid(self.init, pid)
            .ok_or_else(|| self.failed(format!("process {pid} of the node cannot be found")))?;
        send_kill(outside).map_err(|error| self.failed(format!("killing {name}: {error}")))?;
        self.wait("end a program", |word| match word {
            Word::Ended { name: one, .. } if one == name => Some(Ok(())),
            _ => None,
        })?;
        self.running.remove(name);
        Ok(())
    }

    /// Ends everything in it at once, as if its power had failed.
    pub(super) fn kill(mut self) -> Result<(), DemoError> {
        send_kill(self.init).map_err(|error| self.failed(format!("killing it: {error}")))?;
        let ended = self.helper.wait();
        ended.map(drop).map_err(DemoError::io(format!(
            "waiting for the end of node {}",
            self.name
        )))
    }

    fn order(&mut self, order: &Order) -> Result<(), DemoError> {
        let mut line = serde_json::to_vec(order)
            .map_err(|error| self.failed(format!("an order does not encode: {error}")))?;
        line.push(b'\n');
        let sent = match &mut self.leash {
            Some(leash) => leash.write_all(&line),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        sent.map_err(|error| self.failed(format!("it takes no orders: {error}")))
    }

    /// Waits for a word that answers; `Err` of the answer is the node's own reason.
    fn wait<T>(
        &mut self,
        what: &str,
        mut answer: impl FnMut(&Word) -> Option<Result<T, String>>,
    ) -> Result<T, DemoError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.words.recv_timeout(left) {
                Ok(word) => {
                    note(&word, &mut self.running);
                    match answer(&word) {
                        Some(Ok(value)) => return Ok(value),
                        Some(Err(reason)) => {
                            return Err(self.failed(format!("it could not {what}: {reason}")));
                        }
                        None => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.failed(format!("it could not {what} within {PATIENCE:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failed(format!("it ended before it could {what}")));
                }
            }
        }
    }

    fn failed(&self, reason: String) -> DemoError {
        DemoError::Node {
            node: self.name.clone(),
            reason,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The end of the leash ends PID 1, with it the node, with it the helper.
        drop(self.leash.take());
        let _ = self.helper.wait();
    }
}

fn note(word: &Word, running: &mut BTreeMap<String, Running>) {
    if let Word::Ended { name, status } = word
        && let Some(program) = running.get_mut(name)
    {
        program.ended = Some(status.clone());
    }
}

fn send_kill(pid: i32) -> std::io::Result<()> {
    let pid = Pid::from_raw(pid).ok_or(std::io::ErrorKind::NotFound)?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// The pid by which this process sees `inner` of the PID namespace whose PID 1 is `init`: it is a
/// child of that one, and its last NSpid is `inner` (proc(5), Linux 4.1).
fn outside_pid(init: i32, inner: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).ok()?;
    children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .find(|pid: &i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| {
                line.strip_prefix("NSpid:")
                    .and_then(|pids| pids.split_whitespace().last())
                    .is_some_and(|last| last == inner.to_string())
            })
        })
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    const LINES: usize = 12;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
