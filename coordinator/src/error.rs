//! Why the daemon could not start or had to stop.

use std::io;
use std::path::PathBuf;

use crcoord_common::report::{Class, Report};
use crcoord_store::JournalError;
use crcoord_transport::{EndpointError, IdentityError, Role};

/// An error of the daemon as a whole.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// A setting makes no sense.
    #[error("setting {name} {reason}")]
    Setting {
        /// Its name in the configuration.
        name: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// Certificate or key cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate is for something else.
    #[error("the certificate is for {role} of cluster {found}, not for coordinator of {wanted}")]
    WrongIdentity {
        /// Its role.
        role: Role,
        /// Its cluster.
        found: String,
        /// The configured cluster.
        wanted: String,
    },
    /// The UDP endpoint cannot be used.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The journal cannot be used. A coordinator without a journal can decide nothing.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file or the socket cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Another coordinator listens on the socket.
    #[error("another coordinator listens on {}", path.display())]
    Running {
        /// The socket.
        path: PathBuf,
    },
    /// A thread or task of the daemon ended, which it never should.
    #[error("the {0} ended unexpectedly")]
    Ended(&'static str),
}

impl CoordinatorError {
    /// As people are told.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            CoordinatorError::Setting { name, .. } => {
                Report::new("coordinator-setting", Class::Usage, text)
                    .remedy(format!("correct {name} in the configuration"))
            }
            CoordinatorError::Identity(_) => {
                Report::new("coordinator-identity", Class::Usage, text)
                    .remedy("issue a certificate with crcoord pki issue")
            }
            CoordinatorError::WrongIdentity { .. } => {
                Report::new("coordinator-identity", Class::Usage, text)
                    .remedy("configure the certificate that was issued for the coordinator")
            }
            CoordinatorError::Endpoint(error) => error.report(),
            CoordinatorError::Journal(error) => error.report(),
            CoordinatorError::File { path, source, .. } => {
                Report::new("coordinator-file", Class::Failure, text)
                    .path(path.display().to_string())
                    .errno(source.raw_os_error())
            }
            CoordinatorError::Running { path } => {
                Report::new("coordinator-running", Class::Failure, text)
                    .path(path.display().to_string())
                    .remedy("stop the other coordinator first")
            }
            CoordinatorError::Ended(_) => Report::new("coordinator-ended", Class::Failure, text),
        }
    }
}
