//! Why a cluster of namespaces could not be built or used.

use std::io;
use std::path::PathBuf;

use crcoord_common::ids::NodeName;
use crcoord_common::report::{Class, Report};
use crcoord_kernel::namespace::NamespaceError;
use crcoord_transport::pki::PkiError;

/// What goes wrong around a cluster of namespaces.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Namespaces or mounts were refused.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A user namespace could not be made or gives no rights.
    #[error("without root this needs a user namespace: {reason}")]
    NoUserNamespace {
        /// What was refused.
        reason: String,
    },
    /// The kernel refused a network device or address.
    #[error("{step}: {reason}")]
    Network {
        /// What was tried.
        step: String,
        /// The kernel's words.
        reason: String,
    },
    /// A file or process.
    #[error("{step}: {source}")]
    Io {
        /// What was tried.
        step: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Certificates could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A node of the cluster ended or did not answer.
    #[error("node {node}: {reason}")]
    Node {
        /// Its name.
        node: NodeName,
        /// What happened.
        reason: String,
    },
    /// A daemon in the cluster ended.
    #[error("{daemon} on node {node} {reason}; its log {log} ends with:\n{tail}")]
    Daemon {
        /// The node.
        node: NodeName,
        /// `agent` or `coordinator`.
        daemon: String,
        /// What happened.
        reason: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
}

impl DemoError {
    /// Names the step at which the operating system refused.
    pub(crate) fn io(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let step = step.into();
        move |source| DemoError::Io { step, source }
    }

    /// As it reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            DemoError::Namespace(_) => Report::new("demo-namespace", Class::Obstacle, text)
                .remedy("run it as root on a kernel with namespaces, outside of a container"),
            DemoError::NoUserNamespace { .. } => {
                Report::new("demo-user-namespace", Class::Obstacle, text).remedy(
                    "run it as root, or let users make namespaces: sysctl \
                     user.max_user_namespaces=1000, and where they exist \
                     kernel.unprivileged_userns_clone=1 and \
                     kernel.apparmor_restrict_unprivileged_userns=0",
                )
            }
            DemoError::Network { .. } => Report::new("demo-network", Class::Obstacle, text)
                .remedy("load the kernel modules bridge, veth and macvlan"),
            DemoError::Io { source, .. } => {
                Report::new("demo-failed", Class::Failure, text).errno(source.raw_os_error())
            }
            DemoError::Pki(_) => Report::new("demo-pki", Class::Failure, text),
            DemoError::Node { node, .. } => {
                Report::new("demo-node", Class::Failure, text).on_node(node)
            }
            DemoError::Daemon { node, log, .. } => Report::new("demo-daemon", Class::Failure, text)
                .on_node(node)
                .path(log.display().to_string()),
        }
    }
}

impl From<DemoError> for crate::failure::Failure {
    fn from(error: DemoError) -> Self {
        error.report().into()
    }
}
