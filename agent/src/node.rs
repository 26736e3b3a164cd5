//! What all parts of a running agent share.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crcoord_common::image::SealingKey;
use crcoord_common::report::Report;
use crcoord_store::ImageStore;
use crcoord_transport::{ConnectError, Connection, Endpoint, Role};

use crate::capsule::cgroup::Cgroups;
use crate::members::Members;
use crate::network::{self, NetworkError};
use crate::outbox::Outbox;
use crate::own_image::OwnImage;
use crate::settings::Settings;

/// The agent's parts.
pub struct Node {
    /// What the site chose.
    pub settings: Settings,
    /// What capsules and engines run.
    pub image: OwnImage,
    /// Where capsules' cgroups are made, if they can be.
    pub cgroups: Option<Cgroups>,
    /// The agent's own store.
    pub store: Arc<dyn ImageStore>,
    /// The store of all nodes.
    pub shared: Option<Arc<dyn ImageStore>>,
    /// What authenticates manifests.
    pub key: SealingKey,
    /// The network.
    pub endpoint: Arc<Endpoint>,
    /// The members of this node.
    pub members: Members,
    /// What the coordinator is to be told.
    pub outbox: Outbox,
    /// The address from which the coordinator was last reached.
    pub route: Mutex<Option<IpAddr>>,
    partners: tokio::sync::Mutex<HashMap<SocketAddr, Connection>>,
    uplink: OnceLock<String>,
}

impl Node {
    /// Puts the parts together.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        settings: Settings,
        image: OwnImage,
        cgroups: Option<Cgroups>,
        store: Arc<dyn ImageStore>,
        shared: Option<Arc<dyn ImageStore>>,
        key: SealingKey,
        endpoint: Arc<Endpoint>,
        outbox: Outbox,
    ) -> Self {
        Node {
            settings,
            image,
            cgroups,
            store,
            shared,
            key,
            endpoint,
            members: Members::default(),
            outbox,
            route: Mutex::new(None),
            partners: tokio::sync::Mutex::default(),
            uplink: OnceLock::new(),
        }
    }

    /// The program that serves as engine.
    pub fn engine_program(&self) -> String {
        match &self.settings.engine {
            Some(path) => path.display().to_string(),
            None => self.image.path(),
        }
    }

    /// A path below the run directory.
    pub fn run_path(&self, directory: &str, name: &str) -> PathBuf {
        self.settings.run_dir.join(directory).join(name)
    }

    /// A report that says it is of this node.
    pub fn here(&self, report: Report) -> Report {
        report.on_node(&self.settings.node)
    }

    /// The interface that joins the nodes. Blocks.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn uplink(&self) -> Result<String, NetworkError> {
        if let Some(uplink) = &self.settings.uplink {
            return Ok(uplink.clone());
        }
        if let Some(uplink) = self.uplink.get() {
            return Ok(uplink.clone());
        }
        let unspecified = self.settings.listen.ip();
        let address = locked(&self.route).unwrap_or(unspecified);
        let uplink = network::interface_with(address)?;
        Ok(self.uplink.get_or_init(|| uplink).clone())
    }

    /// Where other agents reach this one.
    ///
    /// # Errors
    /// The socket's, which cannot happen while it is open.
    pub fn bulk_address(&self) -> io::Result<SocketAddr> {
        if let Some(address) = self.settings.advertise {
            return Ok(address);
        }
        let bound = self.endpoint.local_address()?;
        Ok(match (bound.ip().is_unspecified(), *locked(&self.route)) {
            (true, Some(route)) => SocketAddr::new(route, bound.port()),
            _ => bound,
        })
    }

    /// A connection to another agent; one is kept for each. The agent there must be `node`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn partner(
        &self,
        node: &str,
        address: SocketAddr,
    ) -> Result<Connection, ConnectError> {
        let mut partners = self.partners.lock().await;
        partners.retain(|_, connection| connection.lost_reason().is_none());
        if let Some(connection) = partners.get(&address)
            && connection.peer().name() == node
        {
            return Ok(connection.clone());
        }
        let connection = self.connect(node, address).await?;
        partners.insert(address, connection.clone());
        Ok(connection)
    }

    /// The same, surely to the agent that runs there now: a connection to one that was killed looks
    /// well until its idle time is over, and a part that is put there would be lost.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn partner_of_now(
        &self,
        node: &str,
        address: SocketAddr,
    ) -> Result<Connection, ConnectError> {
        let connection = self.connect(node, address).await?;
        let mut partners = self.partners.lock().await;
        partners.insert(address, connection.clone());
        Ok(connection)
    }

    async fn connect(&self, node: &str, address: SocketAddr) -> Result<Connection, ConnectError> {
        let identity = self.endpoint.identity();
        let expected =
            identity
                .peer_named(Role::Node, node)
                .map_err(|error| ConnectError::Failed {
                    expected: identity.peer().clone(),
                    address,
                    reason: error.to_string(),
                })?;
        self.endpoint.connect(address, &expected).await
    }

    /// Free bytes of the agent's own store, 0 where that cannot be told. Blocks.
    pub fn free_bytes(&self) -> u64 {
        self.store.free_bytes().unwrap_or_else(|error| {
            tracing::warn!(%error, "free space of the store is not known");
            0
        })
    }
}

/// Locks a mutex; what a panicking holder left is used as it is.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs blocking work off the runtime.
///
/// # Panics
/// With the work's own panic.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is ending, and the caller with it.
            Err(_) => std::future::pending().await,
        },
    }
}
