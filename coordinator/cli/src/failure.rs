//! `Failure`: why a command failed, told once at the end, and the exit code that follows from it.

use std::fmt;

use crcoord_common::config::ConfigErrors;
use crcoord_common::exit::ExitCode;
use crcoord_common::hostlist::HostList;
use crcoord_common::report::{Class, Report, grouped};
use crcoord_common::wire::frame::FrameError;

use crate::output;

/// What a command ends with: its exit status, or why it failed.
pub type Outcome = Result<std::process::ExitCode, Failure>;

/// All reasons why a command failed; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    reports: Vec<Report>,
}

impl Failure {
    /// From the reports of a daemon.
    pub fn new(reports: Vec<Report>) -> Self {
        match reports.is_empty() {
            false => Failure { reports },
            true => Report::new(
                "cli-no-reason",
                Class::Failure,
                "it failed without a reason",
            )
            .remedy("look into the coordinator's log")
            .into(),
        }
    }

    /// The command line or configuration is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Report::new("cli-usage", Class::Usage, message).into()
    }

    /// Something of this process itself failed.
    pub fn internal(what: &str, error: &dyn fmt::Display) -> Self {
        Report::new("cli-failed", Class::Failure, format!("{what}: {error}")).into()
    }

    /// All reasons.
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }

    /// The code that the first reason asks for.
    pub fn exit_code(&self) -> ExitCode {
        match self.reports.first().map(|report| report.class.exit_code()) {
            Some(ExitCode::Done) | None => ExitCode::Failed,
            Some(code) => code,
        }
    }

    /// Tells people on standard error, and programs on standard output where they asked for JSON.
    pub fn tell(&self, json: bool) {
        for line in lines(&self.reports) {
            output::message(&format!("crcoord: {line}"));
        }
        if json {
            // Standard output may be closed already; the exit code still tells.
            let _ = output::json("failed", &self.reports);
        }
    }
}

/// One line for every group of equal reports, with the nodes in front.
pub fn lines(reports: &[Report]) -> Vec<String> {
    grouped(reports)
        .into_iter()
        .map(|(report, nodes)| match nodes.is_empty() {
            true => report.to_string(),
            false => format!("{}: {report}", HostList::sorted(nodes)),
        })
        .collect()
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&lines(&self.reports).join("\n"))
    }
}

impl std::error::Error for Failure {}

impl From<Report> for Failure {
    fn from(report: Report) -> Self {
        Failure {
            reports: vec![report],
        }
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        Failure::new(errors.reports())
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        error.report().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_class_decides_the_code_and_equal_reports_are_one_line() {
        let report = |node: &str| {
            Report::new("store-full", Class::Obstacle, "no space")
                .remedy("free some")
                .on_node(&node.parse().unwrap())
        };
        let other = Report::new("x", Class::Denied, "not yours");
        let failure = Failure::new(vec![report("n2"), report("n1"), other]);
        assert_eq!(failure.exit_code(), ExitCode::Obstacle);
        assert_eq!(
            failure.to_string(),
            "n[1-2]: no space [store-full] -> free some\nnot yours [x]"
        );
    }

    #[test]
    fn a_failure_never_ends_with_0() {
        let note = Report::new("x", Class::Note, "by the way");
        assert_eq!(Failure::new(vec![note]).exit_code(), ExitCode::Failed);
        assert_eq!(Failure::new(Vec::new()).exit_code(), ExitCode::Failed);
    }
}
