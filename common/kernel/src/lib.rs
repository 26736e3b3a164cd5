//! (being written)
pub mod ring;
pub mod namespace;
pub mod net;
pub mod socket_options;
