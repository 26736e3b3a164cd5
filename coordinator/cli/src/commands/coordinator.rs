//! `crcoord coordinator`: the daemon that drives all agents of a cluster.

use std::process::ExitCode;
use std::time::Duration;

use crcoord_common::config::Config;
use crcoord_coordinator::{CoordinatorError, Daemon, Settings};
use crcoord_transport::{IdentityPaths, pki};

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::{block_on_all, logging, service, users};

/// Arguments of `coordinator`.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

impl Arguments {
    /// Runs until it is asked to stop; jobs run on without it.
    pub fn execute(self, context: &Context) -> Outcome {
        logging::start(context)?;
        let settings = settings(context)?;
        block_on_all(async {
            let daemon = Daemon::start(settings).await.map_err(failure)?;
            let stop = service::until_stopped()?;
            daemon.serve(stop).await.map_err(failure)?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// The configuration as the daemon takes it.
fn settings(context: &Context) -> Result<Settings, Failure> {
    let Config {
        cluster,
        coordinator,
        agent,
        network,
        retention,
    } = context.config();
    let operators: Result<Vec<u32>, Failure> = coordinator
        .operators
        .iter()
        .map(|user| users::uid_of(user))
        .collect();
    let pool = network.pool.parse().map_err(|error| {
        let origin = context.loaded.origin("network.pool");
        Failure::usage(format!("{origin}: network.pool: {error}"))
    })?;
    let stem = format!("coordinator-{}", coordinator.name);
    Ok(Settings {
        cluster: cluster.name.clone(),
        listen: coordinator.listen,
        socket: coordinator.socket.clone(),
        state_dir: coordinator.state_dir.clone(),
        identity: IdentityPaths {
            certificate: cluster.pki_dir.join(format!("{stem}.pem")),
            key: cluster.pki_dir.join(format!("{stem}.key")),
            authority: cluster.pki_dir.join(pki::AUTHORITY_CERTIFICATE),
        },
        operators: operators?,
        heartbeat_ms: milliseconds(coordinator.heartbeat),
        heartbeat_timeout_ms: milliseconds(coordinator.lost_after),
        hold_lease_ms: milliseconds(coordinator.hold_lease),
        hold_maximum_ms: milliseconds(coordinator.hold_limit),
        answer_ms: milliseconds(coordinator.answer_limit),
        capture_ms: milliseconds(coordinator.capture_limit),
        seal_ms: milliseconds(coordinator.stream_limit),
        build_ms: milliseconds(coordinator.build_limit),
        run_lease_margin_ms: milliseconds(coordinator.run_lease_margin),
        keep_epochs: retention.epochs,
        copies: coordinator.copies,
        // One file for all nodes: what the agents have, the coordinator knows.
        shared: agent.shared_dir.is_some(),
        pool,
    })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn failure(error: CoordinatorError) -> Failure {
    error.report().into()
}
