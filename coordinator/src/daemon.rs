//! `Daemon`: everything put together, from settings to a running coordinator.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use crcoord_protocol::Coordinator;
use crcoord_transport::{Endpoint, Identity, Limits, Role};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::agents;
use crate::driver::Driver;
use crate::error::CoordinatorError;
use crate::journal;
use crate::settings::Settings;
use crate::socket::CommandSocket;

/// Messages that may wait for the driver; senders wait beyond that.
const QUEUE: usize = 4096;

/// A coordinator that is bound and has replayed its journal, but serves nobody yet.
#[derive(Debug)]
pub struct Daemon {
    settings: Settings,
    endpoint: Arc<Endpoint>,
    address: SocketAddr,
    socket: CommandSocket,
    driver: Driver,
    queue: mpsc::Sender<crate::driver::Message>,
}

impl Daemon {
    /// Checks the settings, binds both sockets, replays the journal and begins a term.
    pub async fn start(settings: Settings) -> Result<Self, CoordinatorError> {
        settings
            .check()
            .map_err(|(name, reason)| CoordinatorError::Setting { name, reason })?;
        let identity = Identity::load(&settings.identity)?;
        let peer = identity.peer();
        if peer.role() != Role::Coordinator || peer.cluster() != settings.cluster.as_str() {
            return Err(CoordinatorError::WrongIdentity {
                role: peer.role(),
                found: peer.cluster().to_owned(),
                wanted: settings.cluster.to_string(),
            });
        }
        // First the socket, which tells whether another coordinator runs, then the journal.
        let socket = CommandSocket::bind(&settings.socket).await?;
        let state_dir = settings.state_dir.clone();
        let opened = tokio::task::spawn_blocking(move || journal::open(&state_dir)).await;
        let (journal, records) =
            opened.map_err(|_| CoordinatorError::Ended("reader of the journal"))??;
        let count = records.len();
        let machine = Coordinator::recover(settings.machine(), records);
        let endpoint = Endpoint::bind(settings.listen, identity, Limits::control())?;
        let address = endpoint
            .local_address()
            .map_err(|source| CoordinatorError::File {
                action: "learn the address of",
                path: settings.listen.to_string().into(),
                source,
            })?;
        let (queue, messages) = mpsc::channel(QUEUE);
        let writer = journal::Writer::start(journal, queue.clone());
        let driver = Driver::new(machine, messages, writer, settings.operators.clone());
        let socket_path = settings.socket.display().to_string();
        tracing::info!(%address, socket = socket_path, records = count, "coordinator started");
        Ok(Daemon {
            settings,
            endpoint: Arc::new(endpoint),
            address,
            socket,
            driver,
            queue,
        })
    }

    /// The UDP address that is bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes, or until the journal fails.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), CoordinatorError> {
        let mut tasks = JoinSet::new();
        let cluster = self.settings.cluster.clone();
        tasks.spawn(agents::serve(
            self.endpoint.clone(),
            cluster,
            self.queue.clone(),
        ));
        tasks.spawn(self.socket.serve(self.queue));
        let result = self.driver.run(shutdown).await;
        self.endpoint.shutdown("the coordinator stops").await;
        tasks.shutdown().await;
        tracing::info!("coordinator stopped");
        result
    }
}

/// Starts a coordinator and serves until `shutdown` completes.
pub async fn run(
    settings: Settings,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    Daemon::start(settings).await?.serve(shutdown).await
}
