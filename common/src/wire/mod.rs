//! Messages between the parts of crcoord (see WIRE.md): named MessagePack maps, every one versioned
//! by its stream's first message and bounded by the framing.

pub mod bulk;
pub mod client;
pub mod control;
pub mod engine;
pub mod frame;
pub mod member;

/// Version of all messages in this module; a peer that speaks another one is refused by name.
pub const WIRE_VERSION: u16 = 1;
/// Largest control message, in bytes.
pub const MESSAGE_LIMIT: u32 = 16 << 20;
