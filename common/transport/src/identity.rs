//! `Identity`: who we are (certificate and key) and whom we trust (the cluster's authority).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crcoord_common::report::{Class, Report};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use webpki::EndEntityCert;

use crate::peer::{Peer, PeerError, Role};
use crate::pki;

/// Largest certificate or key file read, in bytes (1 MiB).
const FILE_LIMIT: u64 = 1 << 20;

/// Where the three files lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityPaths {
    /// Our certificate, PEM; intermediate certificates may follow it.
    pub certificate: PathBuf,
    /// Our private key, PEM, readable by its owner alone.
    pub key: PathBuf,
    /// The certificates of the authorities we trust, PEM: one, or two while it is being changed.
    pub authority: PathBuf,
}

/// A loaded and checked identity. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identity {
    peer: Peer,
    expires: SystemTime,
    certified: Arc<CertifiedKey>,
    pub(crate) roots: Arc<RootCertStore>,
}

/// Why an identity could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read.
    #[error("cannot read {what} {path}: {source}", path = path.display())]
    Read {
        /// `certificate`, `key` or `authority`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The key can be read by others than its owner.
    #[error("key {path} has mode {mode:04o}: group or others may read it", path = path.display())]
    KeyIsOpen {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold what it should in PEM form.
    #[error("{path} does not hold a usable {what}: {reason}", path = path.display())]
    Unusable {
        /// `certificate`, `key` or `authority`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificate names nobody, or somebody invalid.
    #[error("{path}: {source}", path = path.display())]
    Name {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong.
        source: PeerError,
    },
    /// Certificate and key are of different pairs.
    #[error("{key} is not the key of {certificate}", key = key.display(), certificate = certificate.display())]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The certificate's time is over.
    #[error("certificate {path} expired {when}", path = path.display(), when = pki::readable_time(*.expired))]
    Expired {
        /// The certificate's file.
        path: PathBuf,
        /// When.
        expired: SystemTime,
    },
    /// Our own authority did not sign our certificate, or not for our use.
    #[error("{certificate} is not valid under {authority}: {reason}", certificate = certificate.display(), authority = authority.display())]
    NotOurs {
        /// The certificate's file.
        certificate: PathBuf,
        /// The authority's file.
        authority: PathBuf,
        /// webpki's reason.
        reason: webpki::Error,
    },
}

impl IdentityError {
    /// As it reaches people.
    pub fn report(&self) -> Report {
        let (code, path, remedy) = match self {
            IdentityError::Read { path, .. } => (
                "identity-read",
                path,
                "issue this host a certificate (crcoord pki issue) and install its files",
            ),
            IdentityError::KeyIsOpen { path, .. } => {
                ("identity-key-open", path, "chmod 0600 the key file")
            }
            IdentityError::Unusable { path, .. } => (
                "identity-unusable",
                path,
                "install the files again as `crcoord pki issue` wrote them",
            ),
            IdentityError::Name { path, .. } => (
                "identity-name",
                path,
                "use a certificate that `crcoord pki issue` made",
            ),
            IdentityError::KeyMismatch { key, .. } => (
                "identity-key-mismatch",
                key,
                "install certificate and key of the same issue",
            ),
            IdentityError::Expired { path, .. } => (
                "identity-expired",
                path,
                "issue and install a new certificate (crcoord pki issue)",
            ),
            IdentityError::NotOurs { certificate, .. } => (
                "identity-not-ours",
                certificate,
                "install the ca.pem of the authority that issued the certificate",
            ),
        };
        let errno = match self {
            IdentityError::Read { source, .. } => source.raw_os_error(),
            _ => None,
        };
        Report::new(code, Class::Failure, self.to_string())
            .path(path.display().to_string())
            .errno(errno)
            .remedy(remedy)
    }
}

impl Identity {
    /// Loads the three files and checks that they belong together.
    pub fn load(paths: &IdentityPaths) -> Result<Self, IdentityError> {
        let chain = load_certificates("certificate", &paths.certificate)?;
        let authorities = load_certificates("authority", &paths.authority)?;
        let key = load_key(&paths.key)?;
        let unusable = |what, path: &Path, reason: String| IdentityError::Unusable {
            what,
            path: path.to_path_buf(),
            reason,
        };
        let peer = Peer::of_certificate(&chain[0]).map_err(|source| IdentityError::Name {
            path: paths.certificate.clone(),
            source,
        })?;
        let expires = pki::expiry_of(&chain[0])
            .map_err(|error| unusable("certificate", &paths.certificate, error.to_string()))?;
        let certified =
            CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => IdentityError::KeyMismatch {
                    key: paths.key.clone(),
                    certificate: paths.certificate.clone(),
                },
                other => unusable("key", &paths.key, other.to_string()),
            })?;
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots
                .add(authority)
                .map_err(|error| unusable("authority", &paths.authority, error.to_string()))?;
        }
        let identity = Identity {
            peer,
            expires,
            certified: Arc::new(certified),
            roots: Arc::new(roots),
        };
        identity.check_against_authority(paths)?;
        Ok(identity)
    }

    /// Whom our certificate names.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// When our certificate ends.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// A peer of our own cluster, for `Endpoint::connect`.
    pub fn peer_named(&self, role: Role, name: &str) -> Result<Peer, PeerError> {
        Peer::new(self.peer.cluster(), role, name)
    }

    /// Gives rustls the one certificate we have, whatever the other side asks for.
    pub(crate) fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(self.certified.clone()))
    }

    /// Finds at start what every handshake would otherwise fail with.
    fn check_against_authority(&self, paths: &IdentityPaths) -> Result<(), IdentityError> {
        if self.expires <= SystemTime::now() {
            return Err(IdentityError::Expired {
                path: paths.certificate.clone(),
                expired: self.expires,
            });
        }
        let not_ours = |reason| IdentityError::NotOurs {
            certificate: paths.certificate.clone(),
            authority: paths.authority.clone(),
            reason,
        };
        let (own, intermediates) = match self.certified.cert.as_slice() {
            [own, intermediates @ ..] => (own, intermediates),
            [] => return Err(not_ours(webpki::Error::UnknownIssuer)),
        };
        EndEntityCert::try_from(own)
            .and_then(|certificate| {
                certificate
                    .verify_for_usage(
                        provider().signature_verification_algorithms.all,
                        &self.roots.roots,
                        intermediates,
                        UnixTime::now(),
                        webpki::KeyUsage::client_auth(),
                        None,
                        None,
                    )
                    .map(|_| ())
            })
            .map_err(not_ours)
    }
}

/// The one cryptography provider of this crate; no process-wide default is consulted.
///
/// AES-128-GCM comes first: with AES instructions it is the fastest suite for bulk data.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    use rustls::crypto::ring::{cipher_suite, default_provider};
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..default_provider()
    })
}

fn load_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let unusable = |reason: String| IdentityError::Unusable {
        what,
        path: path.to_path_buf(),
        reason,
    };
    let pem = read_bounded(what, path, open(what, path)?)?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(error.to_string()))?;
    match certificates.is_empty() {
        false => Ok(certificates),
        true => Err(unusable("no certificate in it".into())),
    }
}

fn load_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let file = open("key", path)?;
    // Of the opened file, so that what was checked is what is read.
    let mode = file.metadata().map_err(read_error("key", path))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::KeyIsOpen {
            path: path.to_path_buf(),
            mode,
        });
    }
    let pem = read_bounded("key", path, file)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| IdentityError::Unusable {
        what: "key",
        path: path.to_path_buf(),
        reason: error.to_string(),
    })
}

fn open(what: &'static str, path: &Path) -> Result<File, IdentityError> {
    File::open(path).map_err(read_error(what, path))
}

fn read_bounded(what: &'static str, path: &Path, file: File) -> Result<Vec<u8>, IdentityError> {
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT)
        .read_to_end(&mut bytes)
        .map_err(read_error(what, path))?;
    Ok(bytes)
}

fn read_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_path_buf();
    move |source| IdentityError::Read { what, path, source }
}
