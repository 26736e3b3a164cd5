//! The demo's world: mount and PID namespaces (and without root a user namespace) in which all of it
//! happens and with whose PID 1 all of it ends, whatever happens to whom.
//!
//! ```text
//! crcoord demo --pipe--> world (makes the namespaces) --> stage (PID 1: plays the story)
//! ```
//! The pipe is a leash: when the command ends, however, the stage reads its end and exits.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crcoord_kernel::namespace::{
    NamespaceError, NamespaceKind, Propagation, mount_proc, mount_tmpfs, set_propagation, unshare,
};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::error::DemoError;
use super::story::{self, StoryArguments};
use crate::failure::Outcome;
use crate::{block_on, output, service};

/// Status of a command that was ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Hidden by a memory filesystem of the world's own; the cluster's directory is in it, so that not
/// even an empty directory is left behind.
const HIDDEN: &str = "/run";

/// The command: starts the world and waits for it; a signal takes the world away.
pub fn run(arguments: &StoryArguments, json: bool) -> Outcome {
    block_on(async {
        let stop = service::asked_to_stop()?;
        let mut world = tokio::process::Command::new("/proc/self/exe")
            .args(arguments.words("world", json))
            .stdin(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(DemoError::io("starting the demo's world"))?;
        let leash = world.stdin.take();
        let interrupted = tokio::select! {
            status = world.wait() => Some(status),
            () = stop => None,
        };
        drop(leash);
        let status = match interrupted {
            Some(status) => status,
            None => {
                let ended = world.wait().await;
                output::message("crcoord: interrupted; everything of the demo has ended");
                ended.map_err(DemoError::io("waiting for the demo's world"))?;
                return Ok(ExitCode::from(INTERRUPTED));
            }
        };
        let status = status.map_err(DemoError::io("waiting for the demo's world"))?;
        Ok(match status.code() {
            Some(code) => ExitCode::from(code as u8),
            None => ExitCode::FAILURE,
        })
    })
}

/// The world: makes the namespaces and waits for its PID 1. Must be single-threaded.
pub fn make(arguments: &StoryArguments, json: bool) -> Outcome {
    enter()?;
    let mut stage = Command::new("/proc/self/exe")
        .args(arguments.words("stage", json))
        .spawn()
        .map_err(DemoError::io("starting the demo's stage"))?;
    let status = stage
        .wait()
        .map_err(DemoError::io("waiting for the demo's stage"))?;
    Ok(match status.code() {
        Some(code) => ExitCode::from(code as u8),
        None => ExitCode::FAILURE,
    })
}

/// The stage, PID 1 of the world: plays the story until its end or the end of the leash.
pub fn stage(arguments: &StoryArguments, json: bool) -> Outcome {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| DemoError::io("prctl(PR_SET_PDEATHSIG)")(error.into()))?;
    std::thread::spawn(|| {
        // Nothing is ever written to the leash: any answer is its end.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(i32::from(INTERRUPTED));
    });
    set_propagation(Propagation::Private).map_err(DemoError::from)?;
    mount_proc(Path::new("/proc")).map_err(DemoError::from)?;
    mount_tmpfs(Path::new(HIDDEN)).map_err(DemoError::from)?;
    let directory = PathBuf::from(HIDDEN).join("crcoord-demo");
    std::fs::create_dir(&directory)
        .map_err(DemoError::io(format!("making {}", directory.display())))?;
    // A copy, so that building this program anew cannot pull it from under the demo's job.
    let program = directory.join("crcoord");
    std::fs::copy("/proc/self/exe", &program)
        .map_err(DemoError::io("copying this program into the demo's world"))?;
    block_on(story::play(arguments, &directory, &program, json))
}

/// Into namespaces of our own, with a user namespace in which we are root where we are not.
fn enter() -> Result<(), DemoError> {
    let kinds = [NamespaceKind::Mount, NamespaceKind::Pid];
    if unshare(&kinds).is_ok() {
        return Ok(());
    }
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let no_rights = |error: NamespaceError| DemoError::NoUserNamespace {
        reason: error.to_string(),
    };
    unshare(&[NamespaceKind::User]).map_err(no_rights)?;
    for (file, text) in [
        // Must be given up before a user without rights may map groups (user_namespaces(7)).
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {} 1", uid.as_raw())),
        ("gid_map", format!("0 {} 1", gid.as_raw())),
    ] {
        let path = format!("/proc/self/{file}");
        std::fs::write(&path, text).map_err(|error| DemoError::NoUserNamespace {
            reason: format!("writing {path}: {error}"),
        })?;
    }
    unshare(&kinds).map_err(no_rights)
}
