//! `crcoord agent`: the daemon of a compute node.

use std::process::ExitCode;

use crcoord_agent::{Agent, CoordinatorAddress, Settings, StartError};
use crcoord_common::config::Config;
use crcoord_common::ids::NodeName;
use crcoord_transport::{IdentityPaths, pki};

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::{block_on_all, logging, service};

/// Arguments of `agent`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Name of this node [default: agent.node of the configuration, else the host name]
    #[arg(long, value_name = "NAME")]
    node: Option<NodeName>,
}

impl Arguments {
    /// Runs until it is asked to stop; jobs run on without it.
    pub fn execute(self, context: &Context) -> Outcome {
        logging::start(context)?;
        let settings = settings(context.config(), self.node)?;
        block_on_all(async {
            let agent = Agent::start(settings).await.map_err(failure)?;
            let stop = service::until_stopped()?;
            agent.serve(stop).await;
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// The configuration as the daemon takes it.
fn settings(config: &Config, node: Option<NodeName>) -> Result<Settings, Failure> {
    let Config {
        cluster,
        coordinator,
        agent,
        network,
        ..
    } = config;
    let node = match node.or_else(|| agent.node.clone()) {
        Some(node) => node,
        None => host_name()?,
    };
    let pki_dir = &cluster.pki_dir;
    let coordinators = coordinator
        .address
        .iter()
        .map(|address| CoordinatorAddress {
            name: coordinator.name.to_string(),
            address: address.to_string(),
        });
    Ok(Settings {
        cluster: cluster.name.clone(),
        coordinators: coordinators.collect(),
        listen: agent.listen,
        advertise: agent.address,
        run_dir: agent.run_dir.clone(),
        store_dir: agent.store_dir.clone(),
        shared_dir: agent.shared_dir.clone(),
        min_free_bytes: agent.min_free.0,
        identity: IdentityPaths {
            certificate: pki_dir.join(format!("node-{node}.pem")),
            key: pki_dir.join(format!("node-{node}.key")),
            authority: pki_dir.join(pki::AUTHORITY_CERTIFICATE),
        },
        image_key: pki_dir.join(pki::IMAGE_KEY),
        uplink: network.uplink.clone(),
        kill_patience: agent.kill_limit,
        resume_patience: agent.resume_limit,
        engine: None,
        node,
    })
}

/// This host's name up to its first dot, as Slurm names nodes.
fn host_name() -> Result<NodeName, Failure> {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    let short = name.split('.').next().unwrap_or_default();
    short.parse().map_err(|error| {
        Failure::usage(format!(
            "the host name cannot name this node ({error}); set agent.node"
        ))
    })
}

fn failure(error: StartError) -> Failure {
    error.report().into()
}
