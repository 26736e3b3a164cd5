//! `crcoord check`: whether nodes can do their work, or whether a job could be checkpointed now.

use std::process::ExitCode;

use crcoord_common::hostlist::HostList;
use crcoord_common::ids::{JobId, MemberId};
use crcoord_common::report::{Class, Report, grouped};
use crcoord_common::units::ByteSize;
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::control::Preflight;

use crate::client::{ask, unexpected};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::{block_on, output};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The nodes to check [default: all]
    #[arg(long, value_name = "LIST", conflicts_with = "job")]
    nodes: Option<HostList>,
    /// Look at a running job instead, without freezing it
    #[arg(long, value_name = "ID")]
    job: Option<JobId>,
}

impl Arguments {
    /// Does it. The exit code is that of the first finding that is not only a note.
    pub fn execute(self, context: &Context) -> Outcome {
        let request = match self.job {
            Some(job) => Request::CheckJob { job },
            None => Request::Check {
                nodes: self.nodes.unwrap_or_default().0,
            },
        };
        let findings = match block_on(ask(context.socket(), &request))? {
            Event::Findings(findings) => {
                match context.json {
                    true => output::json("findings", &findings)?,
                    false => output::print(&findings_text(&findings))?,
                }
                findings
            }
            Event::Preflights(members) => {
                match context.json {
                    true => output::json("preflights", &members)?,
                    false => output::print(&preflights_text(&members))?,
                }
                let findings = members.into_iter().flat_map(|(_, member)| member.findings);
                findings.collect()
            }
            other => return Err(unexpected(&other)),
        };
        let mut serious = findings
            .into_iter()
            .filter(|finding| finding.class != Class::Note);
        Ok(match serious.next() {
            Some(first) => Failure::from(first).exit_code().into(),
            None => ExitCode::SUCCESS,
        })
    }
}

fn findings_text(findings: &[Report]) -> String {
    match findings.is_empty() {
        true => "nothing found: all nodes can checkpoint and restart jobs".to_owned(),
        false => findings_table(findings),
    }
}

fn findings_table(findings: &[Report]) -> String {
    let rows = grouped(findings).into_iter().map(|(finding, nodes)| {
        let place = finding.place.to_string();
        let what = match place.is_empty() {
            true => finding.message.clone(),
            false => format!("{place}: {}", finding.message),
        };
        vec![
            HostList::sorted(nodes).to_string(),
            class_text(finding.class).to_owned(),
            format!("{what} [{}]", finding.code),
            finding.remedy,
        ]
    });
    output::table(&["NODES", "KIND", "FINDING", "REMEDY"], rows)
}

fn preflights_text(members: &[(MemberId, Preflight)]) -> String {
    let findings: Vec<Report> = members
        .iter()
        .flat_map(|(_, member)| member.findings.iter().cloned())
        .collect();
    let obstacles = findings.iter().any(|finding| finding.class != Class::Note);
    let rows = members.iter().map(|(member, preflight)| {
        vec![
            member.to_string(),
            preflight.processes.to_string(),
            preflight.threads.to_string(),
            ByteSize(preflight.memory_bytes).rounded(),
            preflight.findings.len().to_string(),
        ]
    });
    let header = [">MEMBER", ">PROCESSES", ">THREADS", ">MEMORY", ">FINDINGS"];
    let mut text = output::table(&header, rows);
    if !findings.is_empty() {
        text.push_str("\n\n");
        text.push_str(&findings_table(&findings));
    }
    text.push_str(match obstacles {
        true => "\n\nthe job cannot be checkpointed now",
        false => "\n\nthe job can be checkpointed now",
    });
    text
}

fn class_text(class: Class) -> &'static str {
    match class {
        Class::Failure => "failure",
        Class::Usage => "usage",
        Class::Obstacle => "obstacle",
        Class::Aborted => "aborted",
        Class::Unreachable => "unreachable",
        Class::Denied => "denied",
        Class::NotFound => "not found",
        Class::TimedOut => "timed out",
        Class::Note => "note",
    }
}
