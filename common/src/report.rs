//! `Report`: the one form in which errors and obstacles reach the wire and people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::ids::NodeName;

/// Where something went wrong. Every part that is known is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeName>,
    /// The process id as the node's initial PID namespace counts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The thread id, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tid: Option<i32>,
    /// The descriptor's number in that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// The file or object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A network address or a memory address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let mut part = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            let gap = if std::mem::take(&mut first) { "" } else { " " };
            write!(f, "{gap}{name} {value}")
        };
        if let Some(node) = &self.node {
            part(f, "node", node)?;
        }
        if let Some(pid) = self.pid {
            part(f, "pid", &pid)?;
        }
        if let Some(tid) = self.tid {
            part(f, "tid", &tid)?;
        }
        if let Some(fd) = self.fd {
            part(f, "fd", &fd)?;
        }
        if let Some(path) = &self.path {
            part(f, "path", path)?;
        }
        if let Some(address) = &self.address {
            part(f, "address", address)?;
        }
        Ok(())
    }
}

/// What a report is about, as far as a program needs to know to react.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Something failed.
    Failure,
    /// The request itself is wrong.
    Usage,
    /// A named reason why this cannot be done; nothing was frozen.
    Obstacle,
    /// The epoch was aborted and the job runs on.
    Aborted,
    /// A daemon or node could not be reached.
    Unreachable,
    /// The caller may not do this.
    Denied,
    /// There is no such thing.
    NotFound,
    /// A deadline passed.
    TimedOut,
    /// Not an error: something the reader should know.
    Note,
}

impl Class {
    /// The exit code of a command that ends with a report of this class.
    pub fn exit_code(self) -> ExitCode {
        match self {
            Class::Failure => ExitCode::Failed,
            Class::Usage => ExitCode::Usage,
            Class::Obstacle => ExitCode::Obstacle,
            Class::Aborted => ExitCode::Aborted,
            Class::Unreachable => ExitCode::Unreachable,
            Class::Denied => ExitCode::Denied,
            Class::NotFound => ExitCode::NotFound,
            Class::TimedOut => ExitCode::TimedOut,
            Class::Note => ExitCode::Done,
        }
    }
}

/// An error or obstacle as it crosses the wire and as people read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub struct Report {
    /// A stable code, `family-what`, for example `engine-fd-unsupported`.
    pub code: String,
    /// What kind of thing happened.
    pub class: Class,
    /// What happened, one sentence without the place.
    pub message: String,
    /// Where.
    #[serde(default)]
    pub place: Place,
    /// The kernel's errno, where one was the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
    /// One imperative sentence that mends it; empty where nothing is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Report {
    /// A report without a place; add the rest by the methods below.
    pub fn new(code: &str, class: Class, message: impl Into<String>) -> Self {
        Report {
            code: code.to_owned(),
            class,
            message: message.into(),
            place: Place::default(),
            errno: None,
            remedy: String::new(),
        }
    }

    /// Says how to mend it: one imperative sentence.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// Says on which node, unless that is known already.
    #[must_use]
    pub fn on_node(mut self, node: &NodeName) -> Self {
        self.place.node.get_or_insert_with(|| node.clone());
        self
    }

    /// Says in which process.
    #[must_use]
    pub fn pid(mut self, pid: i32) -> Self {
        self.place.pid = Some(pid);
        self
    }

    /// Says in which thread.
    #[must_use]
    pub fn tid(mut self, tid: i32) -> Self {
        self.place.tid = Some(tid);
        self
    }

    /// Says at which descriptor.
    #[must_use]
    pub fn fd(mut self, fd: i32) -> Self {
        self.place.fd = Some(fd);
        self
    }

    /// Says at which file or object.
    #[must_use]
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.place.path = Some(path.into());
        self
    }

    /// Says at which network or memory address.
    #[must_use]
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.place.address = Some(address.into());
        self
    }

    /// Gives the errno that was the cause.
    #[must_use]
    pub fn errno(mut self, errno: Option<i32>) -> Self {
        self.errno = errno;
        self
    }

    /// The same report without what differs between nodes: equal ones are shown once.
    fn without_node(&self) -> Report {
        let mut same = self.clone();
        same.place.node = None;
        same
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place.to_string();
        if !place.is_empty() {
            write!(f, "{place}: ")?;
        }
        write!(f, "{} [{}]", self.message, self.code)?;
        if !self.remedy.is_empty() {
            write!(f, " -> {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Groups reports that differ only by their node, in order of first appearance.
pub fn grouped(reports: &[Report]) -> Vec<(Report, Vec<NodeName>)> {
    let mut groups: Vec<(Report, Vec<NodeName>)> = Vec::new();
    for report in reports {
        let same = report.without_node();
        let node = report.place.node.clone();
        match groups.iter_mut().find(|(known, _)| *known == same) {
            Some((_, nodes)) => nodes.extend(node),
            None => groups.push((same, node.into_iter().collect())),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_as_one_line() {
        let report = Report::new(
            "engine-fd-unsupported",
            Class::Obstacle,
            "io_uring descriptor",
        )
        .pid(7)
        .fd(3)
        .remedy("run with io_uring switched off");
        assert_eq!(
            report.to_string(),
            "pid 7 fd 3: io_uring descriptor [engine-fd-unsupported] -> run with io_uring switched off"
        );
    }

    #[test]
    fn equal_reports_of_several_nodes_are_one_group() {
        let one = Report::new("x", Class::Failure, "disk full");
        let n1 = "n1".parse().unwrap();
        let n2 = "n2".parse().unwrap();
        let all = [
            one.clone().on_node(&n1),
            one.clone().pid(1).on_node(&n1),
            one.on_node(&n2),
        ];
        let groups = grouped(&all);
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0].1, vec![n1.clone(), n2]);
        assert_eq!(groups[1].1, vec![n1]);
    }
}
