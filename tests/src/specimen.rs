//! One run of a zoo program: its files, its start in a sandbox, and its own verdict.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use crcoord_zoo::driver::Run;
use crcoord_zoo::{Entry, parse_listing};
use tempfile::TempDir;

use crate::{PATIENCE, Program, Sandbox, binaries};

/// A zoo program and the directory of its run.
#[derive(Debug)]
pub struct Specimen {
    name: String,
    directory: TempDir,
    run: Run,
    user: Option<u32>,
}

/// The content of a run's files at one moment.
#[derive(Debug)]
pub struct Files(BTreeMap<PathBuf, Vec<u8>>);

/// All programs of the zoo.
///
/// # Panics
/// `zoo list` fails.
pub fn listing() -> Vec<Entry> {
    let output = Command::new(binaries::zoo())
        .arg("list")
        .output()
        .expect("the zoo was built");
    assert!(output.status.success(), "zoo list: {output:?}");
    parse_listing(&String::from_utf8_lossy(&output.stdout))
        .unwrap_or_else(|failure| panic!("{failure}"))
}

impl Specimen {
    /// A run as root.
    ///
    /// # Panics
    /// No directory for it can be made.
    pub fn new(name: &str) -> Specimen {
        Specimen::of_user(name, None)
    }

    /// A run under an unprivileged uid, with its own copy of the binary, since the build's may lie
    /// where only root looks.
    ///
    /// # Panics
    /// No directory for it can be made.
    pub fn of_user(name: &str, user: Option<u32>) -> Specimen {
        let directory = tempfile::Builder::new()
            .prefix(&format!("crcoord-{name}-"))
            .tempdir()
            .expect("a temporary directory");
        let work = directory.path().join("work");
        fs::create_dir(&work).expect("the directory is new");
        if let Some(user) = user {
            let binary = directory.path().join("zoo");
            fs::copy(binaries::zoo(), &binary).expect("the zoo was built");
            let readable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(directory.path(), readable).expect("its owner");
            chown(&work, Some(user), Some(user)).expect("root may give files away");
        }
        let run = Run::new(&work, name);
        Specimen {
            name: name.to_owned(),
            directory,
            run,
            user,
        }
    }

    /// Starts it and waits until its resource stands; returns its pid.
    ///
    /// # Panics
    /// It fails before.
    pub fn start(&self, sandbox: &Sandbox) -> i32 {
        let binary = match self.user {
            Some(_) => self.directory.path().join("zoo"),
            None => binaries::zoo(),
        };
        let program = Program::new(binary, &self.work())
            .arguments(self.run.arguments())
            .user(self.user);
        let pid = sandbox.start(&program);
        match self.run.await_ready(PATIENCE) {
            Ok(ready) => assert_eq!(ready, pid, "{}: pid in the ready file", self.name),
            Err(failure) => panic!("{failure}; {}", self.complaint()),
        }
        pid
    }

    /// Lets it verify itself and requires `ok`.
    ///
    /// # Panics
    /// Its verdict is another one, or it gives none.
    pub fn verify(&self, what: &str) {
        self.run.go().unwrap_or_else(|failure| panic!("{failure}"));
        if let Err(failure) = self.run.await_result(PATIENCE) {
            panic!("{}, {what}: {failure}; {}", self.name, self.complaint());
        }
    }

    /// Requires that it still waits for go: a program that was disturbed may see it by itself.
    ///
    /// # Panics
    /// It has given its verdict.
    pub fn assert_waits(&self, what: &str) {
        if let Ok(verdict) = fs::read_to_string(self.work().join("result")) {
            panic!("{}, {what}: {verdict}; {}", self.name, self.complaint());
        }
    }

    /// A path for an image or the like beside the run's files.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directory of the run's files.
    pub fn work(&self) -> PathBuf {
        self.directory.path().join("work")
    }

    /// What the run's files hold now.
    ///
    /// # Panics
    /// They cannot be read.
    pub fn files(&self) -> Files {
        let mut files = BTreeMap::new();
        collect(&self.work(), &mut files);
        Files(files)
    }

    /// Puts the run's files back: later ones go, changed ones are rewritten in place.
    ///
    /// # Panics
    /// They cannot be written.
    pub fn put_back(&self, files: &Files) {
        let now = self.files();
        for path in now.0.keys() {
            if !files.0.contains_key(path) {
                fs::remove_file(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            }
        }
        for (path, content) in &files.0 {
            if now.0.get(path) != Some(content) {
                fs::write(path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            }
        }
    }

    fn complaint(&self) -> String {
        fs::read_to_string(self.work().join("stderr")).unwrap_or_default()
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), files),
            Ok(kind) if kind.is_file() => {
                // Notes may be renamed or go while the program runs on.
                if let Ok(content) = fs::read(entry.path()) {
                    files.insert(entry.path(), content);
                }
            }
            _ => {}
        }
    }
}
