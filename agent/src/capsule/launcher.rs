//! `crcoord capsule`: reads its order, makes the namespaces and forks PID 1.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::frame;
use crcoord_kernel::namespace::{NamespaceKind, unshare};
use crcoord_kernel::process_control::{Fork, fork_single_threaded, inherited_descriptor};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::init;
use super::protocol::{Announcement, MESSAGE_LIMIT, Order};

/// Number of the descriptor over which the order comes.
pub(super) const ORDER_DESCRIPTOR: i32 = 3;

/// Why a capsule could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    /// No order came.
    #[error("no order was received: {0}")]
    Order(#[from] frame::FrameError),
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Namespaces or mounts.
    #[error(transparent)]
    Namespace(#[from] crcoord_kernel::namespace::NamespaceError),
}

impl LaunchError {
    pub(super) fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let step = step.into();
        move |source| LaunchError::Step { step, source }
    }

    pub(super) fn report(&self) -> Report {
        Report::new("capsule-launch", Class::Failure, self.to_string())
            .remedy("run `crcoord check` on this node")
    }
}

/// The hidden role `crcoord capsule`. Never returns in PID 1 before the capsule's end.
pub fn main() -> ExitCode {
    let stream = match inherited_descriptor(ORDER_DESCRIPTOR) {
        Ok(descriptor) => UnixStream::from(descriptor),
        Err(error) => {
            eprintln!("crcoord capsule is started by an agent only: {error}");
            return ExitCode::from(2);
        }
    };
    let forked = prepare(&stream).and_then(|(order, listener)| {
        let fork = fork_single_threaded().map_err(LaunchError::step("fork of PID 1"))?;
        Ok((fork, order, listener))
    });
    match forked {
        // The stream goes along: PID 1 closes its copy once it is ready.
        Ok((Fork::Child, order, listener)) => init::run(order, listener, stream),
        Ok((Fork::Parent(pid), ..)) => {
            introduce(&stream, pid);
            ExitCode::SUCCESS
        }
        Err(error) => {
            // The agent is told; where it is gone there is nobody else to tell.
            let _ = announce(&stream, &Announcement::Failed(error.report()));
            ExitCode::FAILURE
        }
    }
}

fn prepare(stream: &UnixStream) -> Result<(Order, UnixListener), LaunchError> {
    let order: Order = frame::read(&mut &*stream, MESSAGE_LIMIT)?.ok_or_else(|| {
        LaunchError::step("reading the order")(io::ErrorKind::UnexpectedEof.into())
    })?;
    // Bound before the mount namespace is entered, so that every later agent sees it.
    let listener = bind(Path::new(&order.socket))?;
    if let Some(cgroup) = &order.cgroup {
        let path = Path::new(cgroup).join("cgroup.procs");
        fs::write(&path, "0").map_err(LaunchError::step(format!("joining {}", path.display())))?;
    }
    let mut kinds = vec![
        NamespaceKind::Pid,
        NamespaceKind::Mount,
        NamespaceKind::Uts,
        NamespaceKind::Ipc,
    ];
    if order.own_network {
        kinds.push(NamespaceKind::Network);
    }
    unshare(&kinds)?;
    Ok((order, listener))
}

fn bind(path: &Path) -> Result<UnixListener, LaunchError> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(LaunchError::step(format!("removing {}", path.display()))(
                error,
            ));
        }
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    UnixListener::bind(path).map_err(LaunchError::step(format!("binding {}", path.display())))
}

/// Names PID 1 to the agent and stays its parent until the agent holds a pidfd.
fn introduce(stream: &UnixStream, pid: i32) {
    let told = announce(stream, &Announcement::Init { pid });
    let mut byte = [0];
    let agreed = told.is_ok() && matches!((&mut &*stream).read(&mut byte), Ok(1));
    if !agreed {
        // The agent died meanwhile and will never know of this capsule.
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

pub(super) fn announce(stream: &UnixStream, what: &Announcement) -> io::Result<()> {
    frame::write(&mut &*stream, what, MESSAGE_LIMIT).map_err(io::Error::other)?;
    (&mut &*stream).flush()
}
