//! `crcoord status`: the coordinator, its nodes and its jobs.

use std::process::ExitCode;
use std::time::Duration;

use crcoord_common::units::{ByteSize, format_duration, rounded_duration};
use crcoord_common::wire::client::{Event, NodeInfo, Request};
use serde::Serialize;

use crate::client::{ask, unexpected};
use crate::commands::list;
use crate::context::Context;
use crate::failure::Outcome;
use crate::{block_on, output};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

#[derive(Serialize)]
struct Status<N, J> {
    term: u64,
    uptime_s: u64,
    nodes: N,
    jobs: J,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let (cluster, jobs) = block_on(async {
            let cluster = ask(context.socket(), &Request::Status).await?;
            Ok((cluster, ask(context.socket(), &Request::List).await?))
        })?;
        let (term, uptime_s, nodes) = match cluster {
            Event::Cluster {
                term,
                uptime_s,
                nodes,
            } => (term, uptime_s, nodes),
            other => return Err(unexpected(&other)),
        };
        let jobs = match jobs {
            Event::Jobs(jobs) => jobs,
            other => return Err(unexpected(&other)),
        };
        if context.json {
            let status = Status {
                term,
                uptime_s,
                nodes,
                jobs,
            };
            output::json("status", status)?;
            return Ok(ExitCode::SUCCESS);
        }
        let uptime = format_duration(Duration::from_secs(uptime_s));
        let connected = nodes.iter().filter(|node| node.connected).count();
        output::print(&format!(
            "coordinator up {uptime}, term {term}; {connected} of {} nodes connected\n\n{}\n\n{}",
            nodes.len(),
            node_table(&nodes),
            list::table(&jobs),
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn node_table(nodes: &[NodeInfo]) -> String {
    let header = [
        "NODE",
        "ADDRESS",
        "STATE",
        ">SILENT",
        ">STORE FREE",
        ">MEMBERS",
    ];
    let rows = nodes.iter().map(|node| {
        let address = node.address.map(|address| address.to_string());
        vec![
            node.node.to_string(),
            address.unwrap_or_else(|| "-".to_owned()),
            if node.connected { "connected" } else { "lost" }.to_owned(),
            rounded_duration(Duration::from_millis(node.silent_ms)),
            ByteSize(node.free_bytes).rounded(),
            node.members.to_string(),
        ]
    });
    output::table(&header, rows)
}
