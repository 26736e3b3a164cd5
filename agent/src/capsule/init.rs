//! PID 1 of a capsule: mounts, then one loop that starts, reaps, enforces the lease and answers.
//!
//! It has one thread, never waits for anything but its poll, and holds no secret.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::frame::FrameError;
use crcoord_common::wire::member::{Command, ExitStatus};
use crcoord_kernel::namespace::{
    Propagation, bind_mount, loopback_up, mount_mqueue, mount_proc, set_host_name, set_link,
    set_propagation,
};
use crcoord_kernel::process_control::{signal_descriptor, signal_everybody_else};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, setsid, wait};

use super::launcher::{LaunchError, announce};
use super::lease::Lease;
use super::output::Peer;
use super::program::{self, Starting};
use super::protocol::{Announcement, Answer, Ask, Order, Status, VERSION};
use super::streams::{self, Stream};
use crate::network::INTERFACE;

/// Most connections at a time; an agent needs two.
const PEER_LIMIT: usize = 16;
/// Exit codes of PID 1 itself: only seen in logs of the node's init.
const LEASE_OVER: i32 = 4;

/// Sets the namespaces up, announces itself and serves until the end.
pub(super) fn run(order: Order, listener: UnixListener, stream: UnixStream) -> ! {
    let init = match Init::set_up(order, listener) {
        Ok(init) => init,
        Err(error) => {
            let _ = announce(&stream, &Announcement::Failed(error.report()));
            std::process::exit(1);
        }
    };
    let announced = announce(&stream, &Announcement::Ready);
    drop(stream); // not shut down: the launcher may still use its copy
    let outcome = match announced {
        Ok(()) => init.serve(),
        Err(error) => Err(error),
    };
    // Only a broken kernel interface ends the loop; the member ends with it, visibly.
    std::process::exit(if outcome.is_ok() { 0 } else { 1 })
}

struct Init {
    order: Order,
    listener: UnixListener,
    children: OwnedFd,
    lease: Option<Lease>,
    streams: Vec<Stream>,
    starting: Option<(Starting, usize)>,
    root: Option<i32>,
    ended: Option<ExitStatus>,
    peers: Vec<(usize, Peer)>,
    next_peer: usize,
    /// Statuses of children that ended before anybody said which one is the root.
    early: Vec<(i32, ExitStatus)>,
}

/// What became readable or writable.
enum Ready {
    Child,
    Lease,
    Caller,
    Started,
    Output(usize),
    Peer(usize),
}

impl Init {
    fn set_up(order: Order, listener: UnixListener) -> Result<Self, LaunchError> {
        setsid().map_err(|error| LaunchError::step("setsid")(error.into()))?;
        // From here on SO_PEERCRED of the socket names PID 1 and not the launcher.
        rustix::net::listen(&listener, 16)
            .map_err(|error| LaunchError::step("listen")(error.into()))?;
        listener
            .set_nonblocking(true)
            .map_err(LaunchError::step("listen"))?;
        set_propagation(Propagation::Slave)?;
        mount_proc(Path::new("/proc"))?;
        if Path::new("/dev/mqueue").is_dir() {
            mount_mqueue(Path::new("/dev/mqueue"))?;
        }
        set_host_name(&order.hostname)?;
        if order.own_network {
            loopback_up()?;
        }
        if let Some(hosts) = &order.hosts {
            bind_mount(Path::new(hosts), Path::new("/etc/hosts"))?;
        }
        let children =
            signal_descriptor(&[Signal::CHILD.as_raw()]).map_err(LaunchError::step("signalfd"))?;
        let lease = order.run_lease_ms.map(Lease::start).transpose();
        let lease = lease.map_err(LaunchError::step("run lease"))?;
        let streams = streams::open(&order.stdio).map_err(LaunchError::step("pipes"))?;
        std::env::set_current_dir("/").map_err(LaunchError::step("chdir /"))?;
        Ok(Init {
            order,
            listener,
            children,
            lease,
            streams,
            starting: None,
            root: None,
            ended: None,
            peers: Vec::new(),
            next_peer: 0,
            early: Vec::new(),
        })
    }

    fn serve(mut self) -> io::Result<()> {
        loop {
            for ready in self.wait()? {
                match ready {
                    Ready::Child => self.reap()?,
                    Ready::Lease => self.enforce_lease()?,
                    Ready::Caller => self.accept(),
                    Ready::Started => self.started(),
                    Ready::Output(index) => self.forward(index)?,
                    Ready::Peer(number) => self.serve_peer(number)?,
                }
            }
            self.tell_exit();
        }
    }

    fn wait(&self) -> io::Result<Vec<Ready>> {
        let mut fds = vec![
            PollFd::new(&self.children, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        let mut meaning = vec![Ready::Child, Ready::Caller];
        if let Some(lease) = &self.lease {
            fds.push(PollFd::new(lease, PollFlags::IN));
            meaning.push(Ready::Lease);
        }
        if let Some((starting, _)) = &self.starting {
            fds.push(PollFd::new(starting, PollFlags::IN));
            meaning.push(Ready::Started);
        }
        // Output is only read when the watcher has taken all before it: so the pipe fills and the
        // program waits, and PID 1 keeps one message at most.
        if self
            .peers
            .iter()
            .any(|(_, peer)| peer.wants_output && !peer.busy())
        {
            for (index, stream) in self.streams.iter().enumerate().filter(|(_, s)| !s.ended()) {
                fds.push(PollFd::new(stream, PollFlags::IN));
                meaning.push(Ready::Output(index));
            }
        }
        for (number, peer) in &self.peers {
            let output = if peer.busy() {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            fds.push(PollFd::new(peer, PollFlags::IN | output));
            meaning.push(Ready::Peer(*number));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(meaning
            .into_iter()
            .zip(ready)
            .filter_map(|(what, ready)| ready.then_some(what))
            .collect())
    }

    fn enforce_lease(&mut self) -> io::Result<()> {
        if self
            .lease
            .as_ref()
            .is_some_and(|lease| lease.over().unwrap_or(true))
        {
            // First the network: this life of the job must not say another word to the next one. A
            // capsule without an interface of its own has nothing to cut.
            if self.order.own_network {
                let _ = set_link(INTERFACE, false);
            }
            signal_everybody_else(Signal::KILL.as_raw())?;
            std::process::exit(LEASE_OVER);
        }
        Ok(())
    }

    /// Waits for every child that has ended.
    fn reap(&mut self) -> io::Result<()> {
        let mut buffer = [0; 128];
        // One read empties it: what matters is who has ended, which waitpid says.
        match rustix::io::read(&self.children, &mut buffer) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.child_ended(pid.as_raw_nonzero().get(), status)?,
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn child_ended(&mut self, pid: i32, status: WaitStatus) -> io::Result<()> {
        let status = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ExitStatus::Exited(code),
            (None, Some(signal)) => ExitStatus::Signaled(signal),
            (None, None) => return Ok(()), // stopped or continued
        };
        if self.root == Some(pid) {
            return self.root_ended(status);
        }
        if self.root.is_none() && self.early.len() < PEER_LIMIT {
            self.early.push((pid, status));
        }
        Ok(())
    }

    /// The member ends with its root process: whatever that left behind ends too.
    fn root_ended(&mut self, status: ExitStatus) -> io::Result<()> {
        self.ended = Some(status);
        signal_everybody_else(Signal::KILL.as_raw())
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else {
            return; // the caller has gone again
        };
        if self.peers.len() >= PEER_LIMIT {
            return;
        }
        if let Ok(peer) = Peer::new(stream) {
            self.peers.push((self.next_peer, peer));
            self.next_peer += 1;
        }
    }

    fn started(&mut self) {
        let Some((mut starting, number)) = self.starting.take() else {
            return;
        };
        let answer = match starting.outcome() {
            None => {
                streams::give_away(&mut self.streams);
                Answer::Started { pid: starting.pid }
            }
            Some(report) => {
                self.root = None;
                self.ended = None;
                Answer::Failed(report)
            }
        };
        self.with_peer(number, |peer| peer.answer(&answer));
    }

    /// Passes on what one stream holds.
    fn forward(&mut self, index: usize) -> io::Result<()> {
        // Another stream's output may have made the watcher busy since the poll.
        let Some(number) = self
            .peers
            .iter()
            .find(|(_, p)| p.wants_output && !p.busy())
            .map(|(number, _)| *number)
        else {
            return Ok(());
        };
        let stream = &mut self.streams[index];
        if let Some(bytes) = stream.read()? {
            let event = Answer::Output {
                stream: stream.number,
                bytes,
            };
            self.with_peer(number, |peer| peer.answer(&event));
        }
        Ok(())
    }

    /// Tells the watcher the exit, once it has all output that there will be if it wants that.
    fn tell_exit(&mut self) {
        let Some(status) = self.ended.filter(|_| self.starting.is_none()) else {
            return;
        };
        let Some((number, wants_output)) = self
            .peers
            .iter()
            .find(|(_, peer)| peer.watching && !peer.busy() && !peer.told_exit)
            .map(|(number, peer)| (*number, peer.wants_output))
        else {
            return;
        };
        // Everybody in the capsule is dead. A pipe without end is held by somebody outside; then
        // what is in it now is all.
        let readable = |stream: &Stream| {
            let mut fds = [PollFd::new(stream, PollFlags::IN)];
            let now = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            !stream.ended()
                && poll(&mut fds, Some(&now)).is_ok()
                && fds[0].revents().contains(PollFlags::IN)
        };
        if wants_output && self.streams.iter().any(readable) {
            return;
        }
        self.with_peer(number, |peer| {
            peer.told_exit = true;
            peer.answer(&Answer::Exited { status })
        });
    }

    fn serve_peer(&mut self, number: usize) -> io::Result<()> {
        let mut asks = Vec::new();
        self.with_peer(number, |peer| {
            peer.flush()?;
            asks = peer.receive()?;
            Ok(())
        });
        for ask in asks {
            self.serve_ask(number, ask)?;
        }
        Ok(())
    }

    fn serve_ask(&mut self, number: usize, ask: Ask) -> io::Result<()> {
        let answer = match ask {
            Ask::Status => Answer::Status(Status {
                version: VERSION,
                root: self.root,
                ended: self.ended,
                streams: streams::identities(&self.streams),
            }),
            Ask::Start { command } => match self.start(&command, number) {
                Ok(()) => return Ok(()), // answered when the exec is done
                Err(report) => Answer::Failed(report),
            },
            Ask::Watch { output } => {
                self.peers
                    .retain(|(other, peer)| *other == number || !peer.watching);
                self.with_peer(number, |peer| {
                    (peer.watching, peer.wants_output) = (true, output);
                    peer.told_exit = false;
                    Ok(())
                });
                Answer::Done
            }
            Ask::RenewLease { lease_ms } => self.renew(lease_ms),
            Ask::Streams => return self.give_streams(number),
            Ask::Expect { root } => self.expect(root)?,
            Ask::Signal { signal } => self.signal(signal),
            Ask::Kill => {
                signal_everybody_else(Signal::KILL.as_raw())?;
                std::process::exit(0);
            }
        };
        self.with_peer(number, |peer| peer.answer(&answer));
        Ok(())
    }

    fn start(&mut self, command: &Command, number: usize) -> Result<(), Report> {
        if self.root.is_some() || self.starting.is_some() {
            return Err(failure(
                "capsule-running",
                "the capsule's program was started already",
            ));
        }
        let starting = program::start(command, &self.order.owner, &self.order.stdio, &self.streams)
            .map_err(|error| failure("capsule-start", &format!("fork: {error}")))?;
        self.root = Some(starting.pid);
        self.starting = Some((starting, number));
        Ok(())
    }

    fn renew(&mut self, lease_ms: u64) -> Answer {
        let outcome = match &self.lease {
            Some(lease) => lease.renew(lease_ms),
            None => Lease::start(lease_ms).map(|lease| self.lease = Some(lease)),
        };
        match outcome {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed(failure("capsule-lease", &error.to_string())),
        }
    }

    fn give_streams(&mut self, number: usize) -> io::Result<()> {
        let streams = std::mem::take(&mut self.streams);
        let names = streams
            .iter()
            .map(|stream| stream.name.to_owned())
            .collect();
        let writers: Vec<_> = streams.iter().filter_map(Stream::writer).collect();
        if writers.len() == streams.len() {
            let answer = Answer::Streams { names };
            self.with_peer(number, |peer| match writers.is_empty() {
                true => peer.answer(&answer),
                false => peer.answer_with(&answer, &writers),
            });
        } else {
            let report = failure("capsule-streams", "the standard streams were given away");
            self.with_peer(number, |peer| peer.answer(&Answer::Failed(report)));
        }
        drop(writers);
        self.streams = streams;
        Ok(())
    }

    fn expect(&mut self, root: i32) -> io::Result<Answer> {
        if self.root.is_some() {
            return Ok(Answer::Failed(failure(
                "capsule-running",
                "the capsule has a root already",
            )));
        }
        self.root = Some(root);
        streams::give_away(&mut self.streams);
        if let Some((_, status)) = self.early.iter().find(|(pid, _)| *pid == root) {
            let status = *status;
            self.root_ended(status)?;
        }
        Ok(Answer::Done)
    }

    fn signal(&self, signal: i32) -> Answer {
        let target = self
            .root
            .filter(|_| self.ended.is_none())
            .and_then(Pid::from_raw);
        let (Some(target), Some(signal)) = (target, Signal::from_named_raw(signal)) else {
            return Answer::Failed(failure(
                "capsule-signal",
                "no such signal or no running program",
            ));
        };
        match kill_process(target, signal) {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed(failure("capsule-signal", &error.to_string())),
        }
    }

    /// Does something with a connection and drops it when that fails: its agent has gone.
    fn with_peer(&mut self, number: usize, work: impl FnOnce(&mut Peer) -> Result<(), FrameError>) {
        let Some(index) = self.peers.iter().position(|(other, _)| *other == number) else {
            return;
        };
        if work(&mut self.peers[index].1).is_err() {
            self.peers.remove(index);
        }
    }
}

fn failure(code: &str, message: &str) -> Report {
    Report::new(code, Class::Failure, message)
}
