//! `Peer`: who is at the other end, as the certificate says it: cluster, role and name.
//!
//! A certificate of ours carries exactly one subject alternative name of the form
//! `crcoord://CLUSTER/ROLE/NAME`. A URI and not a DNS name, because names may hold `_` and capitals
//! and because a DNS name could be mistaken for, or issued as, a host's ordinary name; and because
//! `rustls-webpki` hands out URI names (`valid_uri_names`) it has parsed itself, so no second X.509
//! parser looks at bytes of a stranger.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

/// Longest cluster or peer name, in bytes.
pub const NAME_LIMIT: usize = 64;

const SCHEME: &str = "crcoord://";

/// What a peer is allowed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Drives checkpoints; agents obey it.
    Coordinator,
    /// An agent on a compute node.
    Node,
    /// A person or tool that only asks.
    Operator,
}

impl Role {
    /// The word that stands for the role in certificates and file names.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Node => "node",
            Role::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        [Role::Coordinator, Role::Node, Role::Operator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| PeerError::Role(excerpt(text)))
    }
}

/// The identity a certificate gives: `crcoord://CLUSTER/ROLE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    cluster: String,
    role: Role,
    name: String,
}

/// Why a text or certificate does not give a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// A cluster or peer name outside the allowed alphabet or length.
    #[error(
        "{what} name {text:?} is not valid: use 1 to {NAME_LIMIT} of A-Z a-z 0-9 . _ - \
         and no leading dot"
    )]
    Name {
        /// `cluster` or `peer`.
        what: &'static str,
        /// The offending text, cut to the limit.
        text: String,
    },
    /// A role that this version does not know.
    #[error("role {0:?} is none of coordinator, node, operator")]
    Role(String),
    /// A text that is not of the form above.
    #[error("{0:?} is not of the form {SCHEME}CLUSTER/ROLE/NAME")]
    Form(String),
    /// The certificate cannot be parsed.
    #[error("certificate cannot be read: {0}")]
    Certificate(webpki::Error),
    /// The certificate has no name of ours, or several.
    #[error("certificate carries {0} names of the form {SCHEME}CLUSTER/ROLE/NAME instead of one")]
    Count(usize),
}

impl Peer {
    /// A peer of these names.
    pub fn new(cluster: &str, role: Role, name: &str) -> Result<Self, PeerError> {
        Ok(Peer {
            cluster: checked_name("cluster", cluster)?,
            role,
            name: checked_name("peer", name)?,
        })
    }

    /// The peer that a certificate speaks for. The certificate's signature is *not* checked here.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, PeerError> {
        let certificate = EndEntityCert::try_from(certificate).map_err(PeerError::Certificate)?;
        let mut names = certificate
            .valid_uri_names()
            .filter(|name| name.starts_with(SCHEME));
        match (names.next(), names.count()) {
            (Some(only), 0) => only.parse(),
            (None, _) => Err(PeerError::Count(0)),
            (Some(_), more) => Err(PeerError::Count(1 + more)),
        }
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The node's, coordinator's or operator's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.role, self.name)
    }
}

impl FromStr for Peer {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        let parts = text.strip_prefix(SCHEME).and_then(|rest| {
            let (cluster, rest) = rest.split_once('/')?;
            let (role, name) = rest.split_once('/')?;
            Some((cluster, role, name))
        });
        let (cluster, role, name) = parts.ok_or_else(|| PeerError::Form(excerpt(text)))?;
        Peer::new(cluster, role.parse()?, name)
    }
}

/// The URI by which a CA's certificate names its cluster.
pub(crate) fn cluster_uri(cluster: &str) -> String {
    format!("{SCHEME}{cluster}")
}

/// The cluster that a CA's certificate names.
pub(crate) fn cluster_of_authority(certificate: &CertificateDer<'_>) -> Result<String, PeerError> {
    let certificate = EndEntityCert::try_from(certificate).map_err(PeerError::Certificate)?;
    let mut names = certificate.valid_uri_names();
    let cluster = names.find_map(|name| name.strip_prefix(SCHEME));
    checked_name("cluster", cluster.ok_or(PeerError::Count(0))?)
}

/// Checks a cluster or peer name and gives it back.
pub(crate) fn checked_name(what: &'static str, text: &str) -> Result<String, PeerError> {
    let valid = !text.is_empty()
        && text.len() <= NAME_LIMIT
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    match valid {
        true => Ok(text.to_owned()),
        false => Err(PeerError::Name {
            what,
            text: excerpt(text),
        }),
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(2 * NAME_LIMIT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_its_uri_and_back() {
        let peer = Peer::new("alpha", Role::Node, "n_01.Rack-2").unwrap();
        assert_eq!(peer.to_string(), "crcoord://alpha/node/n_01.Rack-2");
        assert_eq!(peer.to_string().parse(), Ok(peer));
    }

    #[test]
    fn other_texts_are_refused() {
        let long = format!("crcoord://c/node/{}", "x".repeat(65));
        for text in [
            "",
            "https://alpha/node/n1",
            "crcoord://alpha/node",
            "crcoord://alpha/root/n1",
            "crcoord:///node/n1",
            "crcoord://alpha/node/",
            "crcoord://alpha/node/../n1",
            "crcoord://alpha/node/n1/n2",
            "crcoord://alpha/node/n 1",
            "crcoord://alpha/node/n1\0",
            "crcoord://alpha/node/n%31",
            long.as_str(),
        ] {
            assert!(text.parse::<Peer>().is_err(), "{text:?}");
        }
    }
}
