//! The harness's side of the contract: start a program, wait for ready, give go, read the result.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Explain, Failure, Outcome};

/// The files of one run, in a directory of its own.
#[derive(Clone, Debug)]
pub struct Run {
    directory: PathBuf,
    name: String,
}

impl Run {
    /// A run of the program `name` with its files in `directory`, which must be absolute and exist.
    pub fn new(directory: &Path, name: &str) -> Run {
        Run {
            directory: directory.to_owned(),
            name: name.to_owned(),
        }
    }

    /// The arguments for the `zoo` binary.
    pub fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let mut arguments = vec![self.name.clone()];
        for name in ["ready", "go", "result"] {
            arguments.extend([format!("--{name}"), path(name)]);
        }
        arguments
    }

    /// Waits for the ready file and returns the pid in it, as seen in the program's PID namespace.
    ///
    /// # Errors
    /// It did not appear in time, a result appeared instead, or it names another noun.
    pub fn await_ready(&self, patience: Duration) -> Outcome<i32> {
        let text = self.await_file("ready", patience)?;
        let (pid, noun) = text
            .trim_end()
            .split_once(' ')
            .explain("ready file without a noun")?;
        if noun != self.name {
            return Err(Failure::new(format!(
                "ready file of {noun}, not of {}",
                self.name
            )));
        }
        pid.parse().explain(format!("ready file with pid {pid:?}"))
    }

    /// Lets the program go on to verify itself.
    ///
    /// # Errors
    /// The go file cannot be written.
    pub fn go(&self) -> Outcome {
        fs::write(self.path("go"), "").explain("cannot write the go file")
    }

    /// Waits for the result: `Ok` only for `ok`.
    ///
    /// # Errors
    /// The program's own `FAIL: reason`, or no result in time.
    pub fn await_result(&self, patience: Duration) -> Outcome {
        let text = self.await_file("result", patience)?;
        if text == "ok\n" {
            Ok(())
        } else {
            Err(Failure::new(text.trim_end()))
        }
    }

    fn await_file(&self, name: &str, patience: Duration) -> Outcome<String> {
        let path = self.path(name);
        let start = Instant::now();
        loop {
            // Contract files appear by rename: what can be read is complete.
            if let Ok(text) = fs::read_to_string(&path) {
                return Ok(text);
            }
            if let Ok(early) = fs::read_to_string(self.path("result")) {
                return Err(Failure::new(format!(
                    "no {name} file, but {}",
                    early.trim_end()
                )));
            }
            if start.elapsed() > patience {
                return Err(Failure::new(format!(
                    "{}: no {name} file after {patience:?}",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}
