//! (being written)
pub mod process_control;
pub mod ring;
pub mod namespace;
pub mod net;
pub mod socket_options;
