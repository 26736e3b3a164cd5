//! Image stores, the stand-alone image directory and the coordinator's journal: everything that
//! crcoord keeps on disk. All calls block; daemons make them from blocking threads.
#![forbid(unsafe_code)]

mod chunk_index;
mod codec;
mod directory;
mod error;
mod files;
mod image_directory;
mod journal;
mod pack;
mod pack_writer;
mod part_reader;
mod part_writer;
mod seal;
mod series;
mod staged;
mod store;

pub use codec::{Codec, EncodedChunk, RAW_LIMIT};
pub use directory::{DirectoryStore, Kind};
pub use error::StoreError;
pub use image_directory::{ImageDirectory, ImageWriter};
pub use journal::{Journal, JournalError, Persisted, Replay};
pub use pack::{Extent, Pack, Scan, Table};
pub use pack_writer::{FinishedPack, PackWriter};
pub use part_reader::{ChunkRole, Damage, PartReader, ReadError, VerifyReport};
pub use part_writer::{PartWriter, WriteProgress};
pub use seal::{PackUse, Sealed};
pub use store::{
    ChunkSink, ChunkSource, ImageStore, PartSource, PartState, PartSummary, PutOutcome,
    StageProgress, StagedPart,
};
