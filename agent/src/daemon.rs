//! The daemon: puts its parts together, serves until it is asked to stop, and leaves jobs alive.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crcoord_common::report::{Class, Report};
use crcoord_store::{DirectoryStore, ImageStore, Kind, StoreError};
use crcoord_transport::{Endpoint, EndpointError, Identity, IdentityError, Limits, Role};

use crate::capsule::cgroup::Cgroups;
use crate::image_key::{self, ImageKeyError};
use crate::node::{Node, blocking, locked};
use crate::outbox::{Outgoing, outbox};
use crate::own_image::OwnImage;
use crate::settings::Settings;
use crate::{bulk_server, link, members};

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate is somebody else's.
    #[error("the certificate is {found}'s, this agent is node {node} of cluster {cluster}")]
    WrongIdentity {
        /// Whom the certificate names.
        found: String,
        /// The configured node.
        node: String,
        /// The configured cluster.
        cluster: String,
    },
    /// The image key.
    #[error(transparent)]
    ImageKey(#[from] ImageKeyError),
    /// The network.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The run directory.
    #[error("the run directory {}: {source}", path.display())]
    RunDirectory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The copy of the own program.
    #[error("the own program could not be copied into memory: {0}")]
    OwnImage(io::Error),
    /// There is nobody to call.
    #[error("no coordinator is configured")]
    NoCoordinator,
}

impl StartError {
    /// As it reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            StartError::Identity(_) | StartError::WrongIdentity { .. } => {
                Report::new("agent-identity", Class::Usage, text)
                    .remedy("issue this node a certificate (crcoord pki issue) and name it right")
            }
            StartError::ImageKey(error) => error.report(),
            StartError::Endpoint(error) => error.report(),
            StartError::Store(error) => error.report(),
            StartError::RunDirectory { path, source } => {
                Report::new("agent-run-dir", Class::Failure, text)
                    .path(path.display().to_string())
                    .errno(source.raw_os_error())
            }
            StartError::OwnImage(source) => {
                Report::new("agent-own-image", Class::Failure, text).errno(source.raw_os_error())
            }
            StartError::NoCoordinator => Report::new("agent-no-coordinator", Class::Usage, text)
                .remedy("set coordinator.address"),
        }
    }
}

/// A started agent.
pub struct Agent {
    node: Arc<Node>,
    outgoing: Outgoing,
}

/// Starts an agent and serves until `shutdown` is done.
///
/// # Errors
/// [`StartError`]; once started, nothing but `shutdown` ends it.
pub async fn run(
    settings: Settings,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), StartError> {
    Agent::start(settings).await?.serve(shutdown).await;
    Ok(())
}

impl Agent {
    /// Opens stores and network and takes over what an earlier agent left running.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(settings: Settings) -> Result<Self, StartError> {
        if settings.coordinators.is_empty() {
            return Err(StartError::NoCoordinator);
        }
        let (outbox, outgoing) = outbox();
        let opened = blocking(move || open(settings)).await?;
        let Opened {
            settings,
            image,
            cgroups,
            store,
            shared,
            key,
            identity,
        } = opened;
        let endpoint = Endpoint::bind(settings.listen, identity, Limits::default())?;
        let node = Arc::new(Node::new(
            settings,
            image,
            cgroups,
            store,
            shared,
            key,
            Arc::new(endpoint),
            outbox,
        ));
        members::find_again(&node)
            .await
            .map_err(run_directory(&node.settings))?;
        Ok(Agent { node, outgoing })
    }

    /// The UDP address that is bound.
    ///
    /// # Errors
    /// The socket's.
    pub fn local_address(&self) -> io::Result<std::net::SocketAddr> {
        self.node.endpoint.local_address()
    }

    /// Serves until `shutdown` is done; then thaws what is held, drops unfinished epochs and leaves
    /// jobs alone.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let Agent { node, outgoing } = self;
        let bulk = tokio::spawn(bulk_server::serve(node.clone()));
        let link = tokio::spawn(link::keep(node.clone(), outgoing));
        shutdown.await;
        // No new holds from here on.
        link.abort();
        bulk.abort();
        stop(&node).await;
        node.endpoint.shutdown("the agent is stopping").await;
    }
}

async fn stop(node: &Arc<Node>) {
    let mut aborting = Vec::new();
    for member in node.members.all() {
        if let Some(session) = &*locked(&member.session) {
            aborting.push(session.aborting());
        }
        // A tree that waits to be resumed is nobody's yet: its engine ends it.
        drop(locked(&member.built).take());
        member.stop_following();
    }
    futures::future::join_all(aborting).await;
    tracing::info!("stopped; jobs run on");
}

struct Opened {
    settings: Settings,
    image: OwnImage,
    cgroups: Option<Cgroups>,
    store: Arc<dyn ImageStore>,
    shared: Option<Arc<dyn ImageStore>>,
    key: crcoord_common::image::SealingKey,
    identity: Identity,
}

fn open(settings: Settings) -> Result<Opened, StartError> {
    let identity = Identity::load(&settings.identity)?;
    let peer = identity.peer();
    let ours = peer.role() == Role::Node
        && peer.name() == settings.node.as_str()
        && peer.cluster() == settings.cluster.as_str();
    if !ours {
        return Err(StartError::WrongIdentity {
            found: peer.to_string(),
            node: settings.node.to_string(),
            cluster: settings.cluster.to_string(),
        });
    }
    let key = image_key::load(&settings.image_key)?;
    for directory in ["capsules", "members"] {
        make_private(&settings.run_dir.join(directory)).map_err(run_directory(&settings))?;
    }
    let store = Arc::new(DirectoryStore::open(&settings.store_dir, Kind::Local)?);
    let shared = match &settings.shared_dir {
        Some(path) => Some(Arc::new(DirectoryStore::open(path, Kind::Shared)?)),
        None => None,
    };
    let cgroups = Cgroups::find()
        .inspect_err(|error| tracing::warn!(%error, "capsules get no cgroup of their own"))
        .ok();
    let image = OwnImage::create().map_err(StartError::OwnImage)?;
    let shared = shared.map(|shared| -> Arc<dyn ImageStore> { shared });
    Ok(Opened {
        settings,
        image,
        cgroups,
        store,
        shared,
        key,
        identity,
    })
}

fn make_private(directory: &std::path::Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    fs::set_permissions(
        directory,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
}

fn run_directory(settings: &Settings) -> impl FnOnce(io::Error) -> StartError + use<> {
    let path = settings.run_dir.clone();
    move |source| StartError::RunDirectory { path, source }
}
