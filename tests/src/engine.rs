//! The commands `crcoord engine dump` and `crcoord engine restore`, run inside a sandbox.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::{PATIENCE, Sandbox, binaries};

/// How an engine's command ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// What it said on standard error.
    pub said: String,
}

impl Ended {
    /// Requires success.
    ///
    /// # Panics
    /// It failed.
    pub fn done(self, what: &str) -> Ended {
        assert!(
            self.status.success(),
            "{what}: {}: {}",
            self.status,
            self.said
        );
        self
    }

    /// Requires a refusal: exit status 3, with `word` in the message.
    ///
    /// # Panics
    /// It ended otherwise.
    pub fn refused(self, what: &str, word: &str) -> Ended {
        assert_eq!(self.status.code(), Some(3), "{what}: {}", self.said);
        assert!(
            self.said.contains(word),
            "{what}: no {word:?} in: {}",
            self.said
        );
        self
    }

    /// Whether the command was killed by the fault that the test injected.
    pub fn was_killed(&self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.status.signal() == Some(9)
    }
}

/// Flags of `crcoord engine dump`.
#[derive(Clone, Copy, Debug, Default)]
pub struct DumpOptions {
    /// `--leave-running`
    pub leave_running: bool,
    /// `--external-tcp reset`
    pub reset_external_tcp: bool,
    /// The traced stop, counted from 1, at which the engine kills itself; 0: never.
    pub kill_at_stop: u64,
}

impl Sandbox {
    /// Dumps the tree of `pid` into the directory `image`.
    ///
    /// # Panics
    /// The command does not end.
    pub fn dump(&self, pid: i32, image: &Path, options: DumpOptions) -> Ended {
        let mut command = self.command(binaries::crcoord());
        command.args(["engine", "dump", "--pid", &pid.to_string(), "--dir"]);
        command.arg(image);
        if options.leave_running {
            command.arg("--leave-running");
        }
        if options.reset_external_tcp {
            command.args(["--external-tcp", "reset"]);
        }
        run(command, options.kill_at_stop, &said_at(image, "dump"))
    }

    /// Restores the image in the directory `image`.
    ///
    /// # Panics
    /// The command does not end.
    pub fn restore(&self, image: &Path) -> Ended {
        self.restore_killed_at(image, 0)
    }

    /// Restores an image with an engine that kills itself at a traced stop, counted from 1.
    ///
    /// # Panics
    /// The command does not end.
    pub fn restore_killed_at(&self, image: &Path, stop: u64) -> Ended {
        let mut command = self.command(binaries::crcoord());
        command.args(["engine", "restore", "--dir"]).arg(image);
        run(command, stop, &said_at(image, "restore"))
    }
}

/// The file for a command's messages: beside the image, so that an image's directory is its own.
fn said_at(image: &Path, verb: &str) -> std::path::PathBuf {
    image.with_extension(format!("{verb}.said"))
}

fn run(mut command: Command, kill_at_stop: u64, said: &Path) -> Ended {
    // A file and not a pipe: whatever the engine leaves behind must not keep the test waiting.
    let output = File::create(said).unwrap_or_else(|error| panic!("{}: {error}", said.display()));
    let mut child = command
        .env("CRCOORD_FAULT_KILL_AT_STOP", kill_at_stop.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()
        .expect("nsenter (package util-linux) starts");
    let start = Instant::now();
    let read = || std::fs::read_to_string(said).unwrap_or_default();
    loop {
        let status = child.try_wait().expect("a child can be waited for");
        if let Some(status) = status {
            return Ended {
                status,
                said: read(),
            };
        }
        if start.elapsed() > PATIENCE {
            // What runs inside ends with the sandbox.
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} does not end; it said: {}", read());
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
