//! The image container: manifest, records, chunk ids and the page index (see FORMAT.md).

pub mod chunk;
pub mod manifest;
pub mod objects;
pub mod page_index;
pub mod record;

pub use chunk::{ChunkId, PageRun, WINDOW_BYTES};
pub use manifest::{Architecture, Manifest, ManifestBody, ManifestError, MemoryEntry, SealingKey};
pub use objects::{ObjectEntry, ObjectKind};
pub use record::{ImageRecord, Record};
