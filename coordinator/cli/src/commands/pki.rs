//! `crcoord pki`: the cluster's own certificate authority.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use crcoord_common::hostlist::HostList;
use crcoord_common::ids::ClusterName;
use crcoord_common::report::{Class, Report};
use crcoord_transport::Role as PeerRole;
use crcoord_transport::pki::{self, PkiError, Request};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output;

/// Arguments of `pki`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make the authority and the key of the images, once for a cluster
    Init {
        /// Name of the cluster [default: cluster.name of the configuration]
        #[arg(long)]
        cluster: Option<ClusterName>,
        /// Where to put them [default: cluster.pki_dir of the configuration]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Issue certificates by the authority
    Issue {
        /// What the holders may be
        #[arg(long, value_enum)]
        role: Role,
        /// The holders' names, for example n[001-500]
        #[arg(long = "name", value_name = "LIST")]
        names: HostList,
        /// Directory of the authority [default: cluster.pki_dir of the configuration]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Where to put certificates and keys [default: the authority's directory]
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
        /// Days until they expire
        #[arg(long, default_value_t = pki::DEFAULT_VALIDITY.as_secs() / DAY)]
        days: u64,
        /// Further host names or addresses to put into the certificate, for other tools
        #[arg(long = "subject-name", value_name = "NAME")]
        subject_names: Vec<String>,
    },
}

const DAY: u64 = 86400;

/// Roles of certificates.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    /// Drives checkpoints.
    Coordinator,
    /// The agent of a node.
    Node,
    /// Only asks.
    Operator,
}

#[derive(Serialize)]
struct Issued {
    peer: String,
    certificate: PathBuf,
    key: PathBuf,
    expires: String,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let configured = &context.config().cluster;
        match self.command {
            Command::Init { cluster, dir } => {
                let dir = dir.unwrap_or_else(|| configured.pki_dir.clone());
                let cluster = cluster.unwrap_or_else(|| configured.name.clone());
                init(context, &dir, &cluster)
            }
            Command::Issue {
                role,
                names,
                dir,
                output,
                days,
                subject_names,
            } => {
                let dir = dir.unwrap_or_else(|| configured.pki_dir.clone());
                let output = output.unwrap_or_else(|| dir.clone());
                let validity = Duration::from_secs(days.saturating_mul(DAY));
                let mut issued = Vec::new();
                for name in &names.0 {
                    let request = Request {
                        role: role.into(),
                        name: name.as_str(),
                        subject_names: &subject_names,
                        validity,
                    };
                    let one = pki::issue(&dir, &request, &output).map_err(failure)?;
                    issued.push(Issued {
                        peer: one.peer.to_string(),
                        certificate: one.certificate,
                        key: one.key,
                        expires: pki::readable_time(one.expires),
                    });
                }
                show(context, &issued)
            }
        }
    }
}

fn init(context: &Context, dir: &Path, cluster: &ClusterName) -> Outcome {
    let authority = pki::init(dir, cluster.as_str()).map_err(failure)?;
    let files = [authority.certificate, authority.key, authority.image_key];
    match context.json {
        true => output::json("authority", files)?,
        false => {
            for file in files {
                output::print(&file.display().to_string())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(context: &Context, issued: &[Issued]) -> Outcome {
    if context.json {
        output::json("certificates", issued)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = issued.iter().map(|one| {
        vec![
            one.peer.clone(),
            one.certificate.display().to_string(),
            one.expires.clone(),
        ]
    });
    output::print(&output::table(&["PEER", "CERTIFICATE", "EXPIRES"], rows))?;
    Ok(ExitCode::SUCCESS)
}

impl From<Role> for PeerRole {
    fn from(role: Role) -> PeerRole {
        match role {
            Role::Coordinator => PeerRole::Coordinator,
            Role::Node => PeerRole::Node,
            Role::Operator => PeerRole::Operator,
        }
    }
}

fn failure(error: PkiError) -> Failure {
    let text = error.to_string();
    match error {
        PkiError::Exists(path) => Report::new("pki-exists", Class::Failure, text)
            .path(path.display().to_string())
            .remedy("move the old file away first, or name another directory"),
        PkiError::File { path, source, .. } => {
            let class = match source.kind() {
                std::io::ErrorKind::PermissionDenied => Class::Denied,
                std::io::ErrorKind::NotFound => Class::NotFound,
                _ => Class::Failure,
            };
            Report::new("pki-file", class, text)
                .path(path.display().to_string())
                .errno(source.raw_os_error())
                .remedy("run it where the authority is (crcoord pki init makes one), as its owner")
        }
        PkiError::Name(_) | PkiError::SubjectName(_) | PkiError::Validity(_) => {
            Report::new("pki-request", Class::Usage, text).remedy("correct the request")
        }
        PkiError::Authority { .. } | PkiError::KeyMismatch { .. } | PkiError::NotPem(_) => {
            Report::new("pki-authority", Class::Failure, text)
                .remedy("restore the authority's files from your backup")
        }
        PkiError::Crypto(_) => Report::new("pki-crypto", Class::Failure, text),
    }
    .into()
}
