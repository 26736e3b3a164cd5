//! An agent's side of a capsule: making one, finding it again, asking it, and proving it dead.
//!
//! All functions block for a bounded time, except [`Capsule::watch`]: call them off the runtime.

use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::frame::{self, FrameError};
use crcoord_kernel::namespace::{Namespace, NamespaceKind, in_network_namespace, set_link};
use crcoord_kernel::process_control::{Spawn, pidfd_open, signal_process};
use crcoord_transport::{FrameReader, FrameWriter};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::cgroup;
use super::protocol::{Announcement, Answer, Ask, MESSAGE_LIMIT, Order, Status};
use crate::network::INTERFACE;
use crate::own_image::OwnImage;

/// How long a capsule may take to be made, and PID 1 to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why something with a capsule failed.
#[derive(Debug, thiserror::Error)]
pub enum CapsuleError {
    /// A system call failed.
    #[error("capsule {id}: {step}: {source}")]
    Step {
        /// The capsule.
        id: String,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// PID 1 did not answer as it should.
    #[error("capsule {id}: talking to its PID 1: {source}")]
    Talk {
        /// The capsule.
        id: String,
        /// What went wrong.
        source: FrameError,
    },
    /// PID 1 answered something else than was asked.
    #[error("capsule {id}: its PID 1 gave an answer that does not fit")]
    Unexpected {
        /// The capsule.
        id: String,
    },
    /// The capsule itself says why.
    #[error("{0}")]
    Refused(Report),
    /// Its processes did not end in time.
    #[error("capsule {id}: its processes did not end within {} s", after.as_secs())]
    Alive {
        /// The capsule.
        id: String,
        /// How long was waited.
        after: Duration,
    },
}

impl CapsuleError {
    /// As it crosses the wire and reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            CapsuleError::Refused(report) => report.clone(),
            CapsuleError::Step { source, .. } => {
                Report::new("capsule-step", Class::Failure, text).errno(source.raw_os_error())
            }
            CapsuleError::Talk { .. } | CapsuleError::Unexpected { .. } => {
                Report::new("capsule-talk", Class::Failure, text)
            }
            CapsuleError::Alive { .. } => Report::new("capsule-alive", Class::TimedOut, text)
                .remedy("look for processes in state D on this node, then kill again"),
        }
    }
}

/// A capsule that runs on this node.
#[derive(Clone, Debug)]
pub struct Capsule {
    /// Its name on this node.
    pub id: String,
    /// Pid of its PID 1 in the agent's PID namespace.
    pub init: i32,
    /// PID 1's pidfd.
    pub pidfd: Arc<OwnedFd>,
    socket: PathBuf,
    hosts: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    /// Its network, where that is one of its own.
    network: Option<Arc<Namespace>>,
}

/// The network namespace of a capsule, unless it is the agent's.
fn own_network(init: i32) -> Option<Arc<Namespace>> {
    let network = Namespace::of_process(init, NamespaceKind::Network).ok()?;
    let agents = Namespace::current(NamespaceKind::Network).ok()?;
    (network.id().ok()? != agents.id().ok()?).then(|| Arc::new(network))
}

impl Capsule {
    /// Makes a capsule.
    ///
    /// # Errors
    /// [`CapsuleError`]; nothing is left then.
    pub fn create(image: &OwnImage, id: &str, order: &Order) -> Result<Self, CapsuleError> {
        let failed = step(id);
        let (ours, theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
        ours.set_read_timeout(Some(PATIENCE))
            .map_err(failed("socketpair"))?;
        ours.set_write_timeout(Some(PATIENCE))
            .map_err(failed("socketpair"))?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(failed("opening /dev/null"))?;
        let launcher = Spawn::new(&image.path(), &["crcoord", "capsule"], &[])
            .map_err(failed("starting it"))?
            .descriptors(vec![
                null.as_fd(),
                null.as_fd(),
                null.as_fd(),
                theirs.as_fd(),
            ])
            .new_session()
            .start()
            .map_err(failed("starting it"))?;
        drop(theirs);
        let made = converse(id, &ours, order);
        drop(ours); // a launcher that still waits for us gives up
        // It ends now in every case; a failure here means that it was waited for already.
        let _ = waitid(WaitId::PidFd(launcher.pidfd.as_fd()), WaitIdOptions::EXITED);
        let (init, pidfd) = made?;
        Ok(Capsule {
            id: id.to_owned(),
            init,
            pidfd: Arc::new(pidfd),
            socket: PathBuf::from(&order.socket),
            hosts: order.hosts.as_ref().map(PathBuf::from),
            cgroup: order.cgroup.as_ref().map(PathBuf::from),
            network: own_network(init),
        })
    }

    /// Finds the capsule of an earlier agent; `None` when it has ended.
    ///
    /// # Errors
    /// [`CapsuleError`] when it is there but does not answer.
    pub fn attach(
        id: &str,
        socket: &Path,
        hosts: Option<PathBuf>,
        cgroup: Option<PathBuf>,
    ) -> Result<Option<(Self, Status)>, CapsuleError> {
        let stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(step(id)("connecting")(error)),
        };
        let peer = socket_peercred(&stream).map_err(|e| step(id)("SO_PEERCRED")(e.into()))?;
        let init = peer.pid.as_raw_nonzero().get();
        let Ok(pidfd) = pidfd_open(init) else {
            return Ok(None);
        };
        // An answer on this very connection, after the pidfd was opened, proves that the pidfd is
        // PID 1's and not that of a process which got its number later.
        match exchange(id, &stream, &Ask::Status) {
            Ok(Answer::Status(status)) => {
                let capsule = Capsule {
                    id: id.to_owned(),
                    init,
                    pidfd: Arc::new(pidfd),
                    socket: socket.to_owned(),
                    hosts,
                    cgroup,
                    network: own_network(init),
                };
                Ok(Some((capsule, status)))
            }
            Ok(_) => Err(CapsuleError::Unexpected { id: id.to_owned() }),
            Err(CapsuleError::Talk {
                source: FrameError::Truncated,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks PID 1; a refusal is an error.
    ///
    /// # Errors
    /// [`CapsuleError`].
    pub fn ask(&self, ask: &Ask) -> Result<Answer, CapsuleError> {
        exchange(&self.id, &self.connect()?, ask)
    }

    /// Its status.
    ///
    /// # Errors
    /// [`CapsuleError`].
    pub fn status(&self) -> Result<Status, CapsuleError> {
        match self.ask(&Ask::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(CapsuleError::Unexpected {
                id: self.id.clone(),
            }),
        }
    }

    /// The program's ends of its standard streams, for a tree that an engine builds.
    ///
    /// # Errors
    /// [`CapsuleError`].
    pub fn streams(&self) -> Result<Vec<(String, OwnedFd)>, CapsuleError> {
        let stream = self.connect()?;
        let mut writer = &stream;
        frame::write(&mut writer, &Ask::Streams, MESSAGE_LIMIT).map_err(|e| self.talk(e))?;
        // Descriptors come with the first byte, which is therefore read on its own.
        let mut first = [0; 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut first)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(|error| step(&self.id)("recvmsg")(error.into()))?;
        if received.bytes == 0 {
            return Err(self.talk(FrameError::Truncated));
        }
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        let mut rest = first.chain(&stream);
        match frame::read(&mut rest, MESSAGE_LIMIT).map_err(|error| self.talk(error))? {
            Some(Answer::Streams { names }) if names.len() == descriptors.len() => {
                Ok(names.into_iter().zip(descriptors).collect())
            }
            Some(Answer::Failed(report)) => Err(CapsuleError::Refused(report)),
            Some(_) => Err(CapsuleError::Unexpected {
                id: self.id.clone(),
            }),
            None => Err(self.talk(FrameError::Truncated)),
        }
    }

    /// A connection that gets the exit, and output where that is wanted; call on the runtime.
    ///
    /// # Errors
    /// [`CapsuleError`].
    pub async fn watch(&self, output: bool) -> Result<Watch, CapsuleError> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .map_err(step(&self.id)("connecting"))?;
        let (read, write) = stream.into_split();
        let mut writer = FrameWriter::with_limit(write, MESSAGE_LIMIT);
        writer
            .send(&Ask::Watch { output })
            .await
            .map_err(|error| self.talk(error))?;
        let mut reader = FrameReader::with_limit(read, MESSAGE_LIMIT);
        match reader.recv().await.map_err(|error| self.talk(error))? {
            Some(Answer::Done) => Ok(Watch { reader, writer }),
            _ => Err(CapsuleError::Unexpected {
                id: self.id.clone(),
            }),
        }
    }

    /// Pid in the agent's PID namespace of a child of PID 1 that has this pid inside
    /// (`NSpid` of `proc_pid_status(5)`, Linux 4.1).
    pub fn host_pid(&self, inside: i32) -> Option<i32> {
        let children = format!("/proc/{0}/task/{0}/children", self.init);
        fs::read_to_string(children)
            .ok()?
            .split_ascii_whitespace()
            .find(|pid| innermost_pid(pid) == Some(inside))?
            .parse()
            .ok()
    }

    /// True when PID 1, and so every process of the capsule, has ended.
    pub fn ended(&self) -> bool {
        self.gone_within(Duration::ZERO)
    }

    /// Ends all of it with proof, as [`Capsule::end`] does.
    ///
    /// Its network is cut first: sockets outlive their processes and would go on to send old data
    /// and a FIN, which a restarted life of the job, with the same addresses, must never get.
    ///
    /// # Errors
    /// [`CapsuleError::Alive`] when the proof does not come in time.
    pub fn kill(&self, patience: Duration) -> Result<(), CapsuleError> {
        self.cut_network();
        self.end(patience)
    }

    /// Ends all of it and waits for the proof: PID 1's pidfd is readable only after the kernel has
    /// ended and reaped its whole PID namespace (`pid_namespaces(7)`). Then removes what belonged
    /// to it on this node.
    ///
    /// What a program that has ended by itself wrote last is still delivered by the kernel.
    ///
    /// # Errors
    /// [`CapsuleError::Alive`] when the proof does not come in time.
    pub fn end(&self, patience: Duration) -> Result<(), CapsuleError> {
        match signal_process(&self.pidfd, rustix::process::Signal::KILL.as_raw()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
            Err(error) => return Err(step(&self.id)("killing its PID 1")(error)),
        }
        if !self.gone_within(patience) {
            return Err(CapsuleError::Alive {
                id: self.id.clone(),
                after: patience,
            });
        }
        self.clean_up();
        Ok(())
    }

    fn cut_network(&self) {
        let Some(network) = &self.network else { return };
        let cut = in_network_namespace(network.as_fd(), || set_link(INTERFACE, false));
        if let Err(error) = cut.and_then(|cut| cut) {
            // A capsule that never got its interface has none.
            tracing::debug!(capsule = self.id, %error, "no interface to cut");
        }
    }

    /// Removes what belonged to a capsule that has ended.
    fn clean_up(&self) {
        remove_remains(&self.id, &self.socket, self.hosts(), self.cgroup());
    }

    /// Its cgroup's directory.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// The file over its /etc/hosts.
    pub fn hosts(&self) -> Option<&Path> {
        self.hosts.as_deref()
    }

    fn gone_within(&self, patience: Duration) -> bool {
        wait_readable(&*self.pidfd, patience)
    }

    fn connect(&self) -> Result<UnixStream, CapsuleError> {
        UnixStream::connect(&self.socket).map_err(step(&self.id)("connecting"))
    }

    fn talk(&self, source: FrameError) -> CapsuleError {
        CapsuleError::Talk {
            id: self.id.clone(),
            source,
        }
    }
}

/// Removes socket, hosts file and cgroup of a capsule that has ended.
pub fn remove_remains(id: &str, socket: &Path, hosts: Option<&Path>, cgroup: Option<&Path>) {
    for path in [Some(socket), hosts].into_iter().flatten() {
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(capsule = id, path = %path.display(), %error, "not removed");
        }
    }
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup::remove(cgroup)
    {
        tracing::warn!(capsule = id, path = %cgroup.display(), %error, "not removed");
    }
}

/// Output and exit of a capsule's program.
#[derive(Debug)]
pub struct Watch {
    reader: FrameReader<tokio::net::unix::OwnedReadHalf>,
    writer: FrameWriter<tokio::net::unix::OwnedWriteHalf>,
}

impl Watch {
    /// Whether output is wanted from now on. What was sent before still comes.
    ///
    /// # Errors
    /// [`FrameError`].
    pub async fn want_output(&mut self, output: bool) -> Result<(), FrameError> {
        self.writer.send(&Ask::Watch { output }).await
    }

    /// The next [`Answer::Output`] or [`Answer::Exited`]; `None` when PID 1 has closed the
    /// connection. [`Answer::Done`] confirms a change of mind. Cancel-safe.
    ///
    /// # Errors
    /// [`FrameError`].
    pub async fn next(&mut self) -> Result<Option<Answer>, FrameError> {
        self.reader.recv().await
    }
}

/// Waits until a descriptor is readable; true when it is.
pub(crate) fn wait_readable(descriptor: impl AsFd, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec {
            tv_sec: left.as_secs().min(i64::MAX as u64).cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&descriptor, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn innermost_pid(pid: &str) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}

fn converse(id: &str, ours: &UnixStream, order: &Order) -> Result<(i32, OwnedFd), CapsuleError> {
    let talk = |source| CapsuleError::Talk {
        id: id.to_owned(),
        source,
    };
    frame::write(&mut &*ours, order, MESSAGE_LIMIT).map_err(talk)?;
    let mut init = None;
    let mut ready = false;
    while init.is_none() || !ready {
        match frame::read(&mut &*ours, MESSAGE_LIMIT).map_err(talk)? {
            Some(Announcement::Init { pid }) => {
                let pidfd = pidfd_open(pid).map_err(step(id)("pidfd_open"))?;
                (&mut &*ours)
                    .write_all(&[1])
                    .map_err(step(id)("answering"))?;
                init = Some((pid, pidfd));
            }
            Some(Announcement::Ready) => ready = true,
            Some(Announcement::Failed(report)) => return Err(CapsuleError::Refused(report)),
            None => return Err(talk(FrameError::Truncated)),
        }
    }
    init.ok_or_else(|| CapsuleError::Unexpected { id: id.to_owned() })
}

fn exchange(id: &str, stream: &UnixStream, ask: &Ask) -> Result<Answer, CapsuleError> {
    let talk = |source| CapsuleError::Talk {
        id: id.to_owned(),
        source,
    };
    stream
        .set_read_timeout(Some(PATIENCE))
        .map_err(step(id)("setting a deadline"))?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .map_err(step(id)("setting a deadline"))?;
    frame::write(&mut &*stream, ask, MESSAGE_LIMIT).map_err(talk)?;
    match frame::read(&mut &*stream, MESSAGE_LIMIT).map_err(talk)? {
        Some(Answer::Failed(report)) => Err(CapsuleError::Refused(report)),
        Some(answer) => Ok(answer),
        None => Err(talk(FrameError::Truncated)),
    }
}

fn step(id: &str) -> impl Fn(&'static str) -> Box<dyn FnOnce(io::Error) -> CapsuleError> {
    let id = id.to_owned();
    move |step| {
        let id = id.clone();
        Box::new(move |source| CapsuleError::Step { id, step, source })
    }
}
