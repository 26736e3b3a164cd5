//! (being written)
pub mod namespace;
pub mod net;
pub mod socket_options;
