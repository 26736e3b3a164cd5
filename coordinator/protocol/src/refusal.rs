//! The reports by which requests are refused, each with its code and remedy in one place.

use crcoord_common::ids::{Epoch, JobId, JobKey, MemberId, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::member::ExitStatus;

pub(crate) fn unknown_job(job: &JobId) -> Report {
    Report::new(
        "job-unknown",
        Class::NotFound,
        format!("no job {job} is known"),
    )
    .remedy("see crcoord list for the known jobs")
}

pub(crate) fn job_exists(job: &JobKey) -> Report {
    Report::new(
        "job-exists",
        Class::Usage,
        format!("job {job} has not ended"),
    )
    .remedy("use another job id, or end that job first")
}

pub(crate) fn job_ended(job: &JobKey) -> Report {
    Report::new("job-ended", Class::NotFound, format!("job {job} has ended"))
        .remedy("restart it from a committed epoch with crcoord restart, if it has one")
}

pub(crate) fn busy(job: &JobKey, what: &str) -> Report {
    Report::new(
        "job-busy",
        Class::Failure,
        format!("job {job} is busy: {what}"),
    )
    .remedy("wait until that is done, or stop it with crcoord abort")
}

pub(crate) fn epoch_open(job: &JobKey, epoch: Epoch) -> Report {
    let text = format!("epoch {epoch} of job {job} is open already");
    Report::new("epoch-open", Class::Failure, text)
        .remedy("wait until it is committed, or stop it with crcoord abort")
}

pub(crate) fn no_commit(job: &JobKey, epoch: Option<Epoch>) -> Report {
    let what = match epoch {
        Some(epoch) => format!("epoch {epoch} of job {job} is not committed"),
        None => format!("job {job} has no committed epoch"),
    };
    Report::new("epoch-not-committed", Class::NotFound, what)
        .remedy("see crcoord show for the job's committed epochs")
}

pub(crate) fn no_addresses(count: usize) -> Report {
    let text = format!("the pool of virtual addresses has no {count} free addresses left");
    Report::new("network-pool-empty", Class::Failure, text)
        .remedy("configure a larger [network] pool")
}

pub(crate) fn usage(code: &str, what: &str, remedy: &str) -> Report {
    Report::new(code, Class::Usage, what).remedy(remedy)
}

pub(crate) fn agent_lost(node: &NodeName) -> Report {
    Report::new(
        "agent-lost",
        Class::Unreachable,
        "the connection to its agent is lost",
    )
    .on_node(node)
    .remedy("look into the log of crcoord agent there, and at the node itself")
}

pub(crate) fn not_connected(node: &NodeName) -> Report {
    Report::new(
        "node-not-connected",
        Class::Unreachable,
        "its agent is not connected",
    )
    .on_node(node)
    .remedy("start crcoord agent there")
}

pub(crate) fn member_ended(member: MemberId, node: &NodeName, status: ExitStatus) -> Report {
    let how = match status {
        ExitStatus::Exited(code) => format!("exited with code {code}"),
        ExitStatus::Signaled(signal) => format!("was ended by signal {signal}"),
        ExitStatus::Lost => "was lost".to_owned(),
    };
    let text = format!("member {member} {how}");
    Report::new("member-ended", Class::Aborted, text).on_node(node)
}

pub(crate) fn member_missing(member: MemberId, node: &NodeName) -> Report {
    let text = format!("its agent no longer knows member {member}");
    Report::new("member-missing", Class::Obstacle, text)
        .on_node(node)
        .remedy("restart the job from its newest committed epoch")
}

pub(crate) fn aborted(job: &JobKey, epoch: Epoch, phase: &str) -> Report {
    let text = format!("epoch {epoch} of job {job} was aborted ({phase}); the job was let go");
    Report::new("epoch-aborted", Class::Aborted, text)
}

pub(crate) fn not_ended(member: MemberId, node: &NodeName) -> Report {
    let text = format!("member {member} could not be ended: its agent did not confirm it");
    Report::new("member-not-ended", Class::Unreachable, text)
        .on_node(node)
        .remedy("bring the agent back: it is told again as soon as it connects")
}

pub(crate) fn single_copy(member: MemberId, node: &NodeName) -> Report {
    let text = format!("member {member} is stored on its own node only: the job has no other node");
    Report::new("epoch-single-copy", Class::Note, text)
        .on_node(node)
        .remedy("configure a shared directory to survive the loss of that node")
}
