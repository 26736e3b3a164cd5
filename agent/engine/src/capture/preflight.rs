//! Preflight: all reasons against a capture at once, while the tree runs.

use std::collections::BTreeMap;

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::control::Preflight;
use crcoord_common::wire::engine::CaptureTarget;
use crcoord_kernel::proc::{self, Status};
use crcoord_kernel::sys;

use crate::error::{Result, failure, obstacle};
use crate::resources::descriptors::{self, by_kind};
use crate::resources::mappings::ContentHashes;
use crate::resources::{CaptureContext, mappings, process};
use crate::tree::{discover, is_gone};

/// Looks at everything that would be captured. Hashes of mapped files are kept for the capture.
///
/// The tree runs meanwhile: to a look that knows nothing of a child born since, a pipe to that child
/// seems to lead outside. So an obstacle counts only if a second look finds it again.
pub fn preflight(target: &CaptureTarget, hashes: &mut ContentHashes) -> Result<Preflight> {
    let mut result = look(target, hashes)?;
    if result.findings.iter().any(is_obstacle) {
        let again = look(target, hashes)?;
        let before = std::mem::replace(&mut result, again).findings;
        result
            .findings
            .retain(|finding| !is_obstacle(finding) || before.contains(finding));
    }
    Ok(result)
}

fn is_obstacle(finding: &Report) -> bool {
    finding.class != Class::Note
}

fn look(target: &CaptureTarget, hashes: &mut ContentHashes) -> Result<Preflight> {
    let pids =
        discover(target.scope).map_err(|error| failure("listing the process tree", &error))?;
    let mut result = Preflight::default();
    if pids.is_empty() || std::fs::metadata(format!("/proc/{}", pids[0])).is_err() {
        result.findings.push(
            obstacle("engine-no-process", "there is no process to capture")
                .remedy("check the job id or the pid"),
        );
        return Ok(result);
    }
    for &pid in &pids {
        match look_at(&pids, pid, hashes, &mut result) {
            Ok(()) => {}
            // A process that ends while it is looked at is no obstacle.
            Err(error) if is_gone(&error) => {}
            Err(error) => result.findings.push(unreadable(pid, &error)),
        }
    }
    let descriptions = descriptors::scan(&pids, 0)?;
    let context = context(target, &pids, &descriptions);
    let (sorted, obstacles) = by_kind(&context);
    result.findings.extend(obstacles);
    for (kind, descriptions) in sorted {
        result
            .findings
            .extend((kind.check)(&context, &descriptions));
    }
    Ok(result)
}

/// The shared part of all captures of resources.
pub(super) fn context<'a>(
    target: &'a CaptureTarget,
    pids: &[i32],
    descriptions: &'a [descriptors::Description],
) -> CaptureContext<'a> {
    let mut inner = BTreeMap::new();
    let mut pidfds = BTreeMap::new();
    for &pid in pids {
        if let Ok(status) = Status::read(pid) {
            inner.insert(pid, status.inner_pid());
        }
        if let Ok(pidfd) = sys::pidfd_open(pid) {
            pidfds.insert(pid, pidfd);
        }
    }
    CaptureContext {
        target,
        pidfds,
        descriptions,
        connections: Vec::new(),
        sockets: Vec::new(),
        inner,
    }
}

fn look_at(
    pids: &[i32],
    pid: i32,
    hashes: &mut ContentHashes,
    result: &mut Preflight,
) -> std::io::Result<()> {
    result.findings.extend(process::check(pids, pid)?);
    let status = Status::read(pid)?;
    result.processes += 1;
    result.threads += status.threads;
    if matches!(status.state, 'Z' | 'X') {
        return Ok(());
    }
    let all = proc::mappings(pid)?;
    result.findings.extend(mappings::check(pid, &all));
    for mapping in &all {
        let private = !mapping.has(proc::vm_flags::SHARED);
        if mapping.inode == 0 || !private {
            result.memory_bytes += mapping.resident + mapping.swapped;
        }
        if private && mapping.inode != 0 && mapping.name.starts_with('/') {
            // Errors are found again, and named, by the capture.
            let _ = hashes.of(pid, &mapping.name);
        }
    }
    Ok(())
}

fn unreadable(pid: i32, error: &std::io::Error) -> Report {
    obstacle(
        "engine-unreadable",
        format!("it cannot be looked at: {error}"),
    )
    .pid(pid)
    .errno(error.raw_os_error())
    .remedy("run crcoord as root with CAP_SYS_PTRACE")
}
