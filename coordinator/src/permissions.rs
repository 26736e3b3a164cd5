//! Who may ask what: root and operators everything, a user what concerns his own jobs.

use crcoord_common::ids::JobId;
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::Request;

/// What a request does and to which job.
pub(crate) struct Deed<'a> {
    /// The word for it in the audit log.
    pub(crate) verb: &'static str,
    /// The job, for requests about an existing one.
    pub(crate) job: Option<&'a JobId>,
    /// It changes something, so it is audited.
    pub(crate) changes: bool,
}

/// What a request is about.
pub(crate) fn deed(request: &Request) -> Deed<'_> {
    let about = |verb, job, changes| Deed {
        verb,
        job: Some(job),
        changes,
    };
    let general = |verb| Deed {
        verb,
        job: None,
        changes: false,
    };
    match request {
        Request::Run { job, .. } => about("run", job, true),
        Request::Checkpoint { job, .. } => about("checkpoint", job, true),
        Request::Restart { job, .. } => about("restart", job, true),
        Request::Show { job } => about("show", job, false),
        Request::CheckJob { job } => about("check-job", job, false),
        Request::Abort { job } => about("abort", job, true),
        Request::Kill { job } => about("kill", job, true),
        Request::Attach { job } => about("attach", job, true),
        Request::List => general("list"),
        Request::Status => general("status"),
        Request::Check { .. } => general("check"),
    }
}

/// The nodes that a request declares dead, for the audit log; empty as a rule.
pub(crate) fn confirmed_dead(request: &Request) -> String {
    let Request::Restart { confirmed_dead, .. } = request else {
        return String::new();
    };
    let names: Vec<&str> = confirmed_dead.iter().map(|node| node.as_str()).collect();
    names.join(",")
}

/// Decides. `owner` is the owner of the job that the request names, if there is one. A new job under
/// the id of another user's ended one is refused, too: ids are how users find their jobs.
pub(crate) fn decide(
    uid: u32,
    privileged: bool,
    deed: &Deed<'_>,
    owner: Option<u32>,
) -> Result<(), Box<Report>> {
    match (deed.job, owner) {
        (Some(job), Some(owner)) if !privileged && owner != uid => {
            let verb = deed.verb;
            let report = Report::new(
                "job-denied",
                Class::Denied,
                format!("uid {uid} may not {verb} job {job}, which belongs to uid {owner}"),
            );
            Err(Box::new(
                report.remedy("ask the job's owner or an operator"),
            ))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill(owner: Option<u32>, uid: u32, privileged: bool) -> bool {
        let request = Request::Kill {
            job: "42".parse().unwrap(),
        };
        decide(uid, privileged, &deed(&request), owner).is_ok()
    }

    #[test]
    fn a_user_acts_on_his_own_jobs_only() {
        assert!(kill(Some(1000), 1000, false));
        assert!(!kill(Some(1001), 1000, false));
        assert!(!kill(Some(0), 1000, false));
        assert!(kill(Some(1001), 1000, true));
        assert!(kill(None, 1000, false), "an unknown job is told as unknown");
    }

    #[test]
    fn a_refusal_is_of_class_denied() {
        let request = Request::Show {
            job: "42".parse().unwrap(),
        };
        let report = decide(7, false, &deed(&request), Some(8)).unwrap_err();
        assert_eq!(
            (report.code.as_str(), report.class),
            ("job-denied", Class::Denied)
        );
    }
}
