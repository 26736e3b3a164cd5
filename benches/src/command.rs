//! Two `crcoord` binaries side by side: the same specimen dumped and restored by each in turn.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::arguments::Pages;
use crate::failure::{Explain, Failure, Result};
use crate::figures::{Collection, Sample, size_label};
use crate::tree::Tree;

/// What the ratios are to.
const YARDSTICK: &str = "baseline";

/// The binaries.
#[derive(Clone, Debug)]
pub struct Revisions {
    /// What is compared with.
    pub baseline: PathBuf,
    /// What is judged.
    pub candidate: PathBuf,
}

/// What one binary did in one round.
struct Round {
    dump: Duration,
    frozen: Duration,
    restore: Duration,
}

/// Compares them on one size and kind of pages; `scratch` is a directory in memory. Every image is
/// restored by the binary that wrote it.
pub fn compare(
    revisions: &Revisions,
    bytes: u64,
    pages: Pages,
    rounds: u32,
    scratch: &Path,
    collection: &mut Collection,
) -> Result<()> {
    let subject = format!("{} {}", size_label(bytes), pages.label());
    let home = tempfile::tempdir_in(scratch).explain(scratch.display())?;
    let mut tree = Tree::start(bytes, pages, home.path())?;
    for round in 0..rounds {
        let baseline;
        let candidate;
        // In turn, so that neither profits from coming second.
        if round % 2 == 0 {
            (tree, baseline) = one(&revisions.baseline, tree, scratch)?;
            (tree, candidate) = one(&revisions.candidate, tree, scratch)?;
        } else {
            (tree, candidate) = one(&revisions.candidate, tree, scratch)?;
            (tree, baseline) = one(&revisions.baseline, tree, scratch)?;
        }
        for (what, bytes, took, yardstick) in [
            ("engine dump", bytes, candidate.dump, baseline.dump),
            ("of that, freeze", 0, candidate.frozen, baseline.frozen),
            ("engine restore", bytes, candidate.restore, baseline.restore),
        ] {
            let sample = Sample {
                took,
                yardstick,
                frozen: None,
            };
            collection.add(&subject, what, bytes, YARDSTICK, sample);
        }
    }
    tree.end()
}

fn one(binary: &Path, tree: Tree, scratch: &Path) -> Result<(Tree, Round)> {
    let scratch = tempfile::tempdir_in(scratch).explain(scratch.display())?;
    let image = scratch.path().join("image");
    let pid = tree.pid();
    let start = Instant::now();
    let output = Command::new(binary)
        .args(["engine", "dump", "--leave-running", "--leave-stdio"])
        .args(["--pid", &pid.to_string(), "--dir"])
        .arg(&image)
        .stdin(Stdio::null())
        .output()
        .explain(binary.display())?;
    let dump = start.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let status = output.status;
        return Err(Failure(format!("{}: {status}: {said}", binary.display())));
    }
    let frozen = frozen(&said).explain(format!("{}: no freeze in {said:?}", binary.display()))?;
    tree.end()?;
    let mut command = Command::new(binary);
    command.args(["engine", "restore", "--dir"]).arg(&image);
    let start = Instant::now();
    let (mut tree, _) = Tree::restored_by(&mut command, pid, false)?;
    let restore = start.elapsed();
    tree.check()?;
    Ok((
        tree,
        Round {
            dump,
            frozen,
            restore,
        },
    ))
}

/// From `pid 7: ..., frozen 12.5 ms`.
fn frozen(said: &str) -> Option<Duration> {
    let (_, after) = said.rsplit_once("frozen ")?;
    let milliseconds: f64 = after.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1e3).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freeze_is_found() {
        let said = "note: x\npid 7: 1 processes, 2 threads, 9 bytes of memory, frozen 12.5 ms\n";
        assert_eq!(frozen(said), Some(Duration::from_micros(12500)));
        assert_eq!(frozen("pid 7: gone"), None);
    }
}
