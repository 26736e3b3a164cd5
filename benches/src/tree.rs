//! A running specimen as its bench sees it: started here, or brought back from an image.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crcoord_common::wire::engine::LeftOut;
use crcoord_kernel::process_control::Spawn;
use rustix::io::Errno;
use rustix::process::{WaitOptions, getpid, set_child_subreaper, wait};

use crate::arguments::Pages;
use crate::failure::{Explain, Failure, Result};
use crate::specimen;

/// Names of the standard streams that an image leaves out, by descriptor. The same names as
/// `crcoord engine` uses.
pub const STREAMS: [(i32, &str); 2] = [(0, "stdin"), (1, "stdout")];

/// A specimen, told and heard by pipes. It ends by itself when the bench is gone.
#[derive(Debug)]
pub struct Tree {
    pid: i32,
    to: PipeWriter,
    from: BufReader<PipeReader>,
}

impl Tree {
    /// Starts a specimen and waits until its memory is there. It runs from a copy in `home`, which
    /// must live as long: a process that maps the restorer's own program cannot be given back that
    /// program (EBUSY of PR_SET_MM_MAP, prctl(2)).
    pub fn start(bytes: u64, pages: Pages, home: &Path) -> Result<Tree> {
        // What an engine brings back is reaped here, so that its pid is free for the next round.
        set_child_subreaper(Some(getpid())).explain("becoming a subreaper")?;
        let own = std::env::current_exe().explain("own path")?;
        let program = home.join("specimen");
        fs::copy(&own, &program).explain(program.display())?;
        let program = program
            .to_str()
            .explain("the scratch directory is no UTF-8")?;
        let (input, to) = pipe().explain("making a pipe")?;
        let (from, output) = pipe().explain("making a pipe")?;
        let nowhere = File::create("/dev/null").explain("/dev/null")?;
        // Nothing of the caller's descriptors, session or terminal is to be captured.
        let arguments = [program, specimen::ROLE, &bytes.to_string(), pages.word()];
        let spawned = Spawn::new(program, &arguments, &[])
            .explain("starting the specimen")?
            .descriptors(vec![input.as_fd(), output.as_fd(), nowhere.as_fd()])
            .new_session()
            .start()
            .explain("starting the specimen")?;
        let mut tree = Tree {
            pid: spawned.pid,
            to,
            from: BufReader::new(from),
        };
        drop((input, output));
        tree.expect(specimen::READY)?;
        Ok(tree)
    }

    /// Runs a command that brings the tree with this pid back and then ends, on pipes that become
    /// the tree's own. Gives what the command said first, when `speaks`.
    pub fn restored_by(command: &mut Command, pid: i32, speaks: bool) -> Result<(Tree, String)> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .explain(&name)?;
        let to = child.stdin.take().explain("no pipe to the tree")?;
        let from = child.stdout.take().explain("no pipe from the tree")?;
        let status = child.wait().explain(&name)?;
        if !status.success() {
            return Err(Failure(format!("restore by {name}: {status}")));
        }
        let mut tree = Tree {
            pid,
            to: OwnedFd::from(to).into(),
            from: BufReader::new(OwnedFd::from(from).into()),
        };
        let said = if speaks { tree.line()? } else { String::new() };
        Ok((tree, said))
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Requires all of its memory to be what it was.
    pub fn check(&mut self) -> Result<()> {
        writeln!(self.to, "{}", specimen::CHECK).explain("asking the specimen")?;
        self.expect(specimen::GOOD)
    }

    /// Share of its memory on huge pages, 0 to 1.
    pub fn huge_share(&self) -> Result<f64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let text = fs::read_to_string(&path).explain(&path)?;
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
                .explain(format!("{path}: no {name}"))
        };
        Ok(of("AnonHugePages:")? / of("Anonymous:")?)
    }

    /// The streams that an image of it leaves out.
    pub fn left_out(&self) -> Result<Vec<LeftOut>> {
        STREAMS
            .iter()
            .map(|(fd, name)| {
                let path = format!("/proc/{}/fd/{fd}", self.pid);
                let metadata = fs::metadata(&path).explain(&path)?;
                Ok(LeftOut {
                    device: metadata.dev(),
                    inode: metadata.ino(),
                    name: (*name).to_owned(),
                })
            })
            .collect()
    }

    /// Ends it and waits until its pid is free. The caller must have no other children.
    pub fn end(self) -> Result<()> {
        let Tree { pid, to, from } = self;
        drop((to, from));
        let mut status = None;
        // Snapshot copies of the tree are in its session and collected by its reaper, which is this
        // process: as long as one of them is there, the number of the session is in use.
        loop {
            match wait(WaitOptions::empty()) {
                Ok(Some((child, ended))) if child.as_raw_nonzero().get() == pid => {
                    status = ended.exit_status();
                }
                Ok(_) => {}
                Err(Errno::CHILD) => break,
                Err(error) => return Err(Failure(format!("waiting for {pid}: {error}"))),
            }
        }
        if status == Some(0) {
            return Ok(());
        }
        Err(Failure(format!(
            "specimen {pid} ended with status {status:?}"
        )))
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let line = self.line()?;
        if line == word {
            return Ok(());
        }
        Err(Failure(format!(
            "specimen {} said {line:?} in place of {word:?}",
            self.pid
        )))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.from.read_line(&mut line).explain("hearing the tree")?;
        Ok(line.trim_end().to_owned())
    }
}
