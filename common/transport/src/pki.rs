//! The cluster's own certificate authority: making it, issuing certificates, reading expiry dates.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crcoord_common::report::{Class, Report};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use webpki::EndEntityCert;

use crate::peer::{Peer, PeerError, Role, checked_name, cluster_of_authority, cluster_uri};

/// The authority's certificate, readable by all.
pub const AUTHORITY_CERTIFICATE: &str = "ca.pem";
/// The authority's private key; needed only to issue, so best kept off the nodes.
pub const AUTHORITY_KEY: &str = "ca.key";
/// The key of the manifests' MAC: 32 random bytes as 64 hexadecimal digits and a newline.
pub const IMAGE_KEY: &str = "image.key";

/// How long a certificate is valid unless asked otherwise (365 days).
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(365 * DAY);
/// Longest validity that may be asked for: the authority's own (3650 days).
pub const LONGEST_VALIDITY: Duration = Duration::from_secs(3650 * DAY);

const DAY: u64 = 24 * 3600;

/// Certificates are valid from a day ago, for nodes whose clock lags at boot.
const BACKDATED: Duration = Duration::from_secs(DAY);

/// Why the authority could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file that must be made exists already.
    #[error("{0} exists already and is not overwritten")]
    Exists(PathBuf),
    /// A file or directory could not be made, read or written.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// What was tried: `create`, `write`, `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A name does not fit, or a certificate names nothing of ours.
    #[error("{path}: {source}", path = path.display())]
    Authority {
        /// The authority's certificate.
        path: PathBuf,
        /// What is wrong with it.
        source: PeerError,
    },
    /// A cluster or peer name that was given is not valid.
    #[error(transparent)]
    Name(#[from] PeerError),
    /// An extra subject name that was given is neither an address nor a host name.
    #[error("{0:?} is neither an IP address nor a host name")]
    SubjectName(String),
    /// The validity is zero or longer than the authority's.
    #[error("a validity of {days} days is outside of 1 to 3650", days = .0.as_secs() / DAY)]
    Validity(Duration),
    /// Certificate and key of the authority do not belong together.
    #[error("{key} is not the key of {certificate}", key = key.display(), certificate = certificate.display())]
    KeyMismatch {
        /// The authority's key.
        key: PathBuf,
        /// The authority's certificate.
        certificate: PathBuf,
    },
    /// A text is not a certificate in PEM form.
    #[error("not a PEM certificate: {0}")]
    NotPem(String),
    /// The cryptographic library refused.
    #[error("cannot make key or certificate: {0}")]
    Crypto(String),
}

impl PkiError {
    /// As it reaches people.
    pub fn report(&self) -> Report {
        let text = self.to_string();
        match self {
            PkiError::Exists(path) => Report::new("pki-exists", Class::Failure, text)
                .path(path.display().to_string())
                .remedy("give another directory, or move the old file away first"),
            PkiError::File { path, source, .. } => Report::new("pki-file", Class::Failure, text)
                .path(path.display().to_string())
                .errno(source.raw_os_error()),
            PkiError::Authority { path, .. } => Report::new("pki-authority", Class::Failure, text)
                .path(path.display().to_string())
                .remedy("give the directory that `crcoord pki init` has made"),
            PkiError::Name(_) => Report::new("pki-name", Class::Usage, text),
            PkiError::SubjectName(_) => Report::new("pki-subject-name", Class::Usage, text),
            PkiError::Validity(_) => Report::new("pki-validity", Class::Usage, text),
            PkiError::KeyMismatch { key, .. } => {
                Report::new("pki-key-mismatch", Class::Failure, text)
                    .path(key.display().to_string())
                    .remedy("put certificate and key of the same authority into the directory")
            }
            PkiError::NotPem(_) => Report::new("pki-not-pem", Class::Failure, text),
            PkiError::Crypto(_) => Report::new("pki-crypto", Class::Failure, text),
        }
    }
}

/// What `init` made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// The authority's certificate.
    pub certificate: PathBuf,
    /// Its private key, mode 0600.
    pub key: PathBuf,
    /// The key of the manifests' MAC, mode 0600.
    pub image_key: PathBuf,
}

/// What `issue` is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What the holder may be.
    pub role: Role,
    /// The holder's name.
    pub name: &'a str,
    /// Further subject names (IP addresses or host names) for other tools; crcoord ignores them.
    pub subject_names: &'a [String],
    /// How long the certificate is valid from now, in whole seconds.
    pub validity: Duration,
}

/// What `issue` made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The certificate, `ROLE-NAME.pem`.
    pub certificate: PathBuf,
    /// Its private key, `ROLE-NAME.key`, mode 0600.
    pub key: PathBuf,
    /// Whom it names.
    pub peer: Peer,
    /// When it ends.
    pub expires: SystemTime,
}

/// Makes a new authority for `cluster` in `directory` (made if missing, mode 0700). Nothing is
/// overwritten; what was made before a failure is removed again.
pub fn init(directory: &Path, cluster: &str) -> Result<Authority, PkiError> {
    let cluster = checked_name("cluster", cluster)?;
    let authority = Authority {
        certificate: directory.join(AUTHORITY_CERTIFICATE),
        key: directory.join(AUTHORITY_KEY),
        image_key: directory.join(IMAGE_KEY),
    };
    let key = KeyPair::generate().map_err(crypto)?;
    let mut params = authority_params(&cluster)?;
    set_validity(&mut params, LONGEST_VALIDITY);
    let certificate = params.self_signed(&key).map_err(crypto)?;
    make_directory(directory)?;
    write_all_new(&[
        (&authority.key, 0o600, &key.serialize_pem()),
        (&authority.image_key, 0o600, &random_hex_key()?),
        (&authority.certificate, 0o644, &certificate.pem()),
    ])?;
    Ok(authority)
}

/// Issues a certificate by the authority in `directory` and writes it with a new key to `output`
/// (made if missing, mode 0700) as `ROLE-NAME.pem` and `ROLE-NAME.key`. Nothing is overwritten.
pub fn issue(directory: &Path, request: &Request<'_>, output: &Path) -> Result<Issued, PkiError> {
    if request.validity < Duration::from_secs(1) || request.validity > LONGEST_VALIDITY {
        return Err(PkiError::Validity(request.validity));
    }
    let (cluster, issuer) = load_authority(directory)?;
    let peer = Peer::new(&cluster, request.role, request.name)?;
    let mut params = holder_params(&peer, request.subject_names)?;
    let expires = set_validity(&mut params, request.validity);
    let key = KeyPair::generate().map_err(crypto)?;
    let certificate = params.signed_by(&key, &issuer).map_err(crypto)?;

    let stem = format!("{}-{}", peer.role(), peer.name());
    let issued = Issued {
        certificate: output.join(format!("{stem}.pem")),
        key: output.join(format!("{stem}.key")),
        peer,
        expires,
    };
    make_directory(output)?;
    write_all_new(&[
        (&issued.key, 0o600, &key.serialize_pem()),
        (&issued.certificate, 0o644, &certificate.pem()),
    ])?;
    Ok(issued)
}

/// When the first certificate in a PEM text ends.
pub fn expiry(pem: &[u8]) -> Result<SystemTime, PkiError> {
    let certificate =
        CertificateDer::from_pem_slice(pem).map_err(|error| PkiError::NotPem(error.to_string()))?;
    expiry_of(&certificate)
}

/// When a certificate ends. webpki tells the date only as the reason for a refusal, so it is asked
/// about a moment after any certificate's end; it looks at the dates before all else.
pub(crate) fn expiry_of(certificate: &CertificateDer<'_>) -> Result<SystemTime, PkiError> {
    const FAR_FUTURE: Duration = Duration::from_secs(1 << 40);
    let parsed = EndEntityCert::try_from(certificate)
        .map_err(|error| PkiError::NotPem(error.to_string()))?;
    let refused = parsed.verify_for_usage(
        &[],
        &[],
        &[],
        UnixTime::since_unix_epoch(FAR_FUTURE),
        webpki::KeyUsage::client_auth(),
        None,
        None,
    );
    match refused.err() {
        Some(webpki::Error::CertExpired { not_after, .. }) => {
            Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs()))
        }
        other => Err(PkiError::NotPem(format!("it has no end date: {other:?}"))),
    }
}

/// A time as people read it: `2027-11-25 10:59:59 UTC`.
pub fn readable_time(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    let (hour, minute, second) = time.to_hms();
    format!("{} {hour:02}:{minute:02}:{second:02} UTC", time.date())
}

fn load_authority(directory: &Path) -> Result<(String, Issuer<'static, KeyPair>), PkiError> {
    let certificate_path = directory.join(AUTHORITY_CERTIFICATE);
    let key_path = directory.join(AUTHORITY_KEY);
    let certificate = CertificateDer::from_pem_slice(&read(&certificate_path)?)
        .map_err(|error| PkiError::NotPem(format!("{}: {error}", certificate_path.display())))?;
    let unusable = |reason: String| PkiError::Crypto(format!("{}: {reason}", key_path.display()));
    let key_text = String::from_utf8(read(&key_path)?)
        .map_err(|_| unusable("not a PEM private key".into()))?;
    let key = KeyPair::from_pem(&key_text).map_err(|error| unusable(error.to_string()))?;
    let at_fault = |source| PkiError::Authority {
        path: certificate_path.clone(),
        source,
    };
    let cluster = cluster_of_authority(&certificate).map_err(at_fault)?;
    let parsed = EndEntityCert::try_from(&certificate)
        .map_err(|error| at_fault(PeerError::Certificate(error)))?;
    if parsed.subject_public_key_info().as_ref() != key.subject_public_key_info() {
        return Err(PkiError::KeyMismatch {
            key: key_path,
            certificate: certificate_path,
        });
    }
    // The same parameters as `init` used, so that issuer and key identifier agree with ca.pem.
    Ok((
        cluster.clone(),
        Issuer::new(authority_params(&cluster)?, key),
    ))
}

fn authority_params(cluster: &str) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("crcoord authority of {cluster}"));
    params.subject_alt_names = vec![uri(&cluster_uri(cluster))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn holder_params(peer: &Peer, subject_names: &[String]) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("crcoord {} {}", peer.role(), peer.name()));
    params.subject_alt_names = vec![uri(&peer.to_string())?];
    for name in subject_names {
        params.subject_alt_names.push(subject_name(name)?);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if peer.role() != Role::Operator {
        // An operator only asks: nothing of ours would take such a certificate from a server.
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    Ok(params)
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    Ia5String::try_from(text).map(SanType::URI).map_err(crypto)
}

fn subject_name(text: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let refused = || PkiError::SubjectName(text.to_owned());
    rustls_pki_types::DnsName::try_from(text).map_err(|_| refused())?;
    Ia5String::try_from(text)
        .map(SanType::DnsName)
        .map_err(|_| refused())
}

fn set_validity(params: &mut CertificateParams, validity: Duration) -> SystemTime {
    let now = SystemTime::now();
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    // X.509 dates hold whole seconds; the same value is what `expiry` reads back.
    params.not_after = OffsetDateTime::from(now + validity).truncate_to_second();
    params.not_after.into()
}

fn random_hex_key() -> Result<String, PkiError> {
    let mut bytes = [0; 32];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| PkiError::Crypto("no random numbers from the kernel".into()))?;
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.push('\n');
    Ok(text)
}

fn make_directory(path: &Path) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(file_error("create", path))
}

/// Writes several new files or none: what was made before one failed is removed.
fn write_all_new(files: &[(&PathBuf, u32, &String)]) -> Result<(), PkiError> {
    if let Some((path, ..)) = files
        .iter()
        .find(|(path, ..)| path.symlink_metadata().is_ok())
    {
        return Err(PkiError::Exists(path.to_path_buf()));
    }
    for (index, (path, mode, text)) in files.iter().enumerate() {
        if let Err(error) = write_new(path, *mode, text) {
            // A file that somebody else made at this moment is not ours to remove.
            let ours = match &error {
                PkiError::Exists(_) => index,
                _ => index + 1,
            };
            for (made, ..) in &files[..ours] {
                let _ = std::fs::remove_file(made); // best effort; `error` is what matters
            }
            return Err(error);
        }
    }
    Ok(())
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), PkiError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_path_buf()),
            _ => file_error("create", path)(error),
        })?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(file_error("write", path))?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(file_error("write", parent))
}

fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    std::fs::read(path).map_err(file_error("read", path))
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    let path = path.to_path_buf();
    move |source| PkiError::File {
        action,
        path,
        source,
    }
}

fn crypto(error: rcgen::Error) -> PkiError {
    PkiError::Crypto(error.to_string())
}
