//! The program's side of the contract: ready, go, result, and notes between processes.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use crate::{Explain, Failure, Outcome, tasks};

/// The paths a program was given. Cheap to share: no descriptor is kept.
#[derive(Debug)]
pub struct Stage {
    noun: String,
    ready: PathBuf,
    go_for_kernel: CString,
    result: PathBuf,
    directory: PathBuf,
    flags: Vec<(String, String)>,
}

impl Stage {
    /// Reads `--name value` pairs.
    ///
    /// # Errors
    /// A flag without a value, one of the three contract paths missing, or a relative path.
    pub fn parse(noun: &str, arguments: &[String]) -> Outcome<Stage> {
        let mut flags = Vec::new();
        for pair in arguments.chunks(2) {
            let [name, value] = pair else {
                return Err(Failure::new(format!("flag {} has no value", pair[0])));
            };
            let name = name
                .strip_prefix("--")
                .explain(format!("{name} is not a --flag"))?;
            flags.push((name.to_owned(), value.clone()));
        }
        let path = |name: &str| -> Outcome<Option<PathBuf>> {
            let Some((_, value)) = flags.iter().find(|(flag, _)| flag == name) else {
                return Ok(None);
            };
            let path = PathBuf::from(value);
            if path.is_absolute() {
                Ok(Some(path))
            } else {
                Err(Failure::new(format!("--{name} {value} is not absolute")))
            }
        };
        let ready = path("ready")?.explain("--ready FILE is missing")?;
        let go = path("go")?.explain("--go FILE is missing")?;
        let result = path("result")?.explain("--result FILE is missing")?;
        let beside_ready = ready
            .parent()
            .explain("--ready has no directory")?
            .to_owned();
        let directory = path("dir")?.unwrap_or(beside_ready);
        let go_for_kernel = CString::new(go.as_os_str().as_bytes()).explain("--go")?;
        Ok(Stage {
            noun: noun.into(),
            ready,
            go_for_kernel,
            result,
            directory,
            flags,
        })
    }

    /// The noun under test.
    pub fn noun(&self) -> &str {
        &self.noun
    }

    /// A flag of the program's own, without its dashes.
    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags
            .iter()
            .find(|(flag, _)| flag == name)
            .map(|(_, value)| value.as_str())
    }

    /// The path for a file of the program, named after the noun.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{}.{name}", self.noun))
    }

    /// Says that the resource stands: the harness may take its checkpoint from now on.
    ///
    /// # Errors
    /// The ready file cannot be written.
    pub fn ready(&self) -> Outcome {
        write_atomically(
            &self.ready,
            &format!("{} {}\n", std::process::id(), self.noun),
        )
        .explain(format!("cannot write {}", self.ready.display()))
    }

    /// Whether go was given. Async-signal-safe: one system call, no allocation.
    pub fn go_seen(&self) -> bool {
        // SAFETY: the path is a valid C string; access() only reads it.
        unsafe { libc::access(self.go_for_kernel.as_ptr(), libc::F_OK) == 0 }
    }

    /// Waits for go, one `stat` every few milliseconds.
    pub fn wait_for_go(&self) {
        while !self.go_seen() {
            tasks::pause_briefly();
        }
    }

    /// Waits for go and calls `work` again and again meanwhile.
    ///
    /// # Errors
    /// Whatever `work` returns.
    pub fn work_until_go(&self, mut work: impl FnMut() -> Outcome) -> Outcome {
        while !self.go_seen() {
            work()?;
            tasks::pause_briefly();
        }
        Ok(())
    }

    /// Leaves a note for another process of the tree.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note(&self, name: &str) -> Outcome {
        write_atomically(&self.note_path(name), "").explain(format!("cannot leave the note {name}"))
    }

    /// Whether a note was left.
    pub fn noted(&self, name: &str) -> bool {
        self.note_path(name).exists()
    }

    /// Waits for a note.
    ///
    /// # Errors
    /// It did not come within the bound of [`tasks::eventually`].
    pub fn await_note(&self, name: &str) -> Outcome {
        tasks::eventually(&format!("note {name}"), || self.noted(name))
    }

    /// Waits for go without a bound and then for a note that another process leaves after it.
    ///
    /// # Errors
    /// The note did not come within the bound of [`tasks::eventually`].
    pub fn await_note_after_go(&self, name: &str) -> Outcome {
        self.wait_for_go();
        self.await_note(name)
    }

    /// Takes a note away again, so that it may be left anew.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget_note(&self, name: &str) -> Outcome {
        fs::remove_file(self.note_path(name)).explain(format!("cannot forget the note {name}"))
    }

    /// Keeps the reason of a failing child for its parent.
    pub fn leave_reason(&self, failure: &Failure) {
        let path = self.beside_result(&format!("reason.{}", std::process::id()));
        if let Err(error) = write_atomically(&path, &failure.to_string()) {
            eprintln!("zoo {}: {failure} (and no reason file: {error})", self.noun);
        }
    }

    /// The reason a child left, if any.
    pub fn reason_of(&self, pid: libc::pid_t) -> Option<String> {
        fs::read_to_string(self.beside_result(&format!("reason.{pid}"))).ok()
    }

    /// Writes the result file and turns the outcome into an exit status.
    pub fn finish(&self, outcome: &Outcome) -> ExitCode {
        let text = match outcome {
            Ok(()) => "ok\n".to_owned(),
            Err(failure) => format!("FAIL: {failure}\n"),
        };
        if let Err(error) = write_atomically(&self.result, &text) {
            eprintln!(
                "zoo {}: cannot write the result: {error}; it was {text}",
                self.noun
            );
            return ExitCode::FAILURE;
        }
        if outcome.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn note_path(&self, name: &str) -> PathBuf {
        self.beside_result(&format!("note.{name}"))
    }

    fn beside_result(&self, suffix: &str) -> PathBuf {
        let mut path = self.result.clone().into_os_string();
        path.push(".");
        path.push(suffix);
        path.into()
    }
}

/// Writes a whole file under a temporary name and renames it: readers see all of it or nothing.
///
/// # Errors
/// As `std::fs::write` and `rename(2)`.
pub(crate) fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn parses_the_contract_and_refuses_half_of_it() {
        let all = arguments("--ready /t/r --go /t/g --result /t/x --listen 127.0.0.1:1");
        let stage = Stage::parse("pipes", &all).unwrap();
        assert_eq!(stage.flag("listen"), Some("127.0.0.1:1"));
        assert_eq!(stage.file("data"), PathBuf::from("/t/pipes.data"));
        for wrong in [
            "--ready /t/r --go /t/g",
            "--ready r --go /g --result /x",
            "--ready",
        ] {
            assert!(Stage::parse("pipes", &arguments(wrong)).is_err(), "{wrong}");
        }
    }
}
