//! QUIC between the daemons: the cluster's own certificates, endpoints with mutual TLS, control and
//! bulk streams. Generic over the messages; WIRE.md is the contract.
//!
//! Order of a connection: `Endpoint::connect` / `accept` prove who the peer is (`Connection::peer`),
//! then either side opens streams (`open_control`, `open_bulk`) that the other gets from
//! `accept_stream`. Nothing here knows jobs, epochs or terms.
#![forbid(unsafe_code)]

mod admission;
mod bulk;
mod connect;
mod connection;
mod control;
mod endpoint;
mod halves;
mod identity;
mod limits;
mod peer;
pub mod pki;
mod verify;

pub use bulk::{BulkReceiver, BulkSender, BulkStream};
pub use connect::ConnectError;
pub use connection::{CLOSE_PROTOCOL, CLOSE_SHUTDOWN, Connection, Lost, Stream, StreamError};
pub use control::{ControlStream, FrameReader, FrameWriter, Receiver, Sender};
pub use crcoord_common::wire::frame::FrameError;
pub use endpoint::{Endpoint, EndpointError};
pub use identity::{Identity, IdentityError, IdentityPaths};
pub use limits::{InvalidLimit, Limits};
pub use peer::{Peer, PeerError, Role};
