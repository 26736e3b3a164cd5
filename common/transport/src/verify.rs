//! The certificate checks of both sides of a handshake.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::identity::{Identity, provider};
use crate::peer::{Peer, PeerError};

/// Why we did not accept a server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is valid but names somebody else.
    Other(Peer),
    /// It is not valid; the reason in words.
    Invalid(String),
}

/// Accepts a server whose certificate our authority signed for exactly the expected peer. Made anew
/// for each connection; the TLS server name is not used, because our names are not host names.
#[derive(Debug)]
pub(crate) struct ServerCheck {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Peer,
    refusal: Mutex<Option<Refusal>>,
}

impl ServerCheck {
    pub(crate) fn new(identity: &Identity, expected: Peer) -> Self {
        ServerCheck {
            roots: identity.roots.clone(),
            algorithms: provider().signature_verification_algorithms,
            expected,
            refusal: Mutex::new(None),
        }
    }

    /// Why the certificate was refused, if it was: TLS errors have no room for the peer's name.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let slot = self.refusal.lock();
        slot.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn refuse(&self, refusal: Refusal, error: Error) -> Error {
        let slot = self.refusal.lock();
        *slot.unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        error
    }
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        ParsedCertificate::try_from(end_entity)
            .and_then(|certificate| {
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    &self.roots,
                    intermediates,
                    now,
                    self.algorithms.all,
                )
            })
            .map_err(|error| self.refuse(Refusal::Invalid(error.to_string()), error))?;
        let found = Peer::of_certificate(end_entity)
            .map_err(|error| self.refuse(Refusal::Invalid(error.to_string()), unnamed(error)))?;
        if found != self.expected {
            let error = CertificateError::NotValidForName.into();
            return Err(self.refuse(Refusal::Other(found), error));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts a client whose certificate our authority signed for a peer of our cluster. What that
/// peer may do is for the daemon to decide by `Connection::peer`.
#[derive(Debug)]
pub(crate) struct ClientCheck {
    chain: Arc<dyn ClientCertVerifier>,
    cluster: String,
}

impl ClientCheck {
    pub(crate) fn new(identity: &Identity) -> Result<Self, Error> {
        let chain = WebPkiClientVerifier::builder_with_provider(identity.roots.clone(), provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(ClientCheck {
            chain,
            cluster: identity.peer().cluster().to_owned(),
        })
    }
}

impl ClientCertVerifier for ClientCheck {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // We send none: our peers have one certificate each and choose nothing.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let peer = Peer::of_certificate(end_entity).map_err(unnamed)?;
        match peer.cluster() == self.cluster {
            true => Ok(verified),
            false => Err(CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

fn unnamed(error: PeerError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}
