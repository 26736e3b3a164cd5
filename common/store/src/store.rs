//! What an image store is: the traits that the agent, the engine and the commands program against.

use std::sync::Arc;

use crcoord_common::ids::PartKey;
use crcoord_common::image::ChunkId;

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::seal::Sealed;

/// Takes the chunks of one part. All calls may come from several threads at once.
pub trait ChunkSink: Send + Sync {
    /// True when the sink has the chunk durably from an earlier part or took it for this one: the
    /// part then refers to it and its bytes need not be given. False: give them by `append`.
    fn note_known(&self, id: ChunkId) -> Result<bool, StoreError>;

    /// Takes a chunk. The caller vouches that the bytes match the id: use
    /// [`EncodedChunk::verified`] for bytes of foreign origin.
    fn append(&self, chunk: &EncodedChunk) -> Result<PutOutcome, StoreError>;
}

/// Gives chunks by their id. All calls may come from several threads at once.
pub trait ChunkSource: Send + Sync {
    /// The chunk in its stored form. Its content is not verified: the reader does that.
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError>;

    /// The chunk's uncompressed bytes, verified.
    fn chunk(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let chunk = self.encoded(id)?;
        if chunk.id != id {
            return Err(StoreError::BadChunk {
                chunk: id,
                what: format!("chunk {} was given instead", chunk.id),
            });
        }
        chunk.decode_verified()
    }
}

/// What became of a chunk that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// It was stored, at this cost in bytes.
    New(u64),
    /// It was there already.
    Known,
}

/// A part that is being written into a store. Dropped without a seal it leaves nothing.
pub trait StagedPart: ChunkSink + ChunkSource {
    /// Makes the part whole and durable with this encoded manifest. Nothing can be added after it.
    fn seal(&self, manifest: &[u8]) -> Result<Sealed, StoreError>;

    /// What was taken so far.
    fn progress(&self) -> StageProgress;

    /// Hashes, compresses and takes uncompressed bytes.
    fn put(&self, raw: &[u8]) -> Result<(ChunkId, PutOutcome), StoreError> {
        let id = ChunkId::of(raw);
        if self.note_known(id)? {
            return Ok((id, PutOutcome::Known));
        }
        let chunk = EncodedChunk::encode_as(id, raw)?;
        Ok((id, self.append(&chunk)?))
    }
}

/// How far a staged part has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageProgress {
    /// Chunks written.
    pub chunks: u64,
    /// Bytes written.
    pub stored_bytes: u64,
    /// Uncompressed bytes of the chunks written.
    pub raw_bytes: u64,
}

/// Whether a part can be restarted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartState {
    /// Whole and durable, its epoch not known to be valid.
    Sealed,
    /// Its epoch is committed.
    Committed,
    /// Its seal cannot be read; it is kept, and so is every pack it may need.
    Damaged(StoreError),
}

/// A part that a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSummary {
    /// Which.
    pub part: PartKey,
    /// What it is good for.
    pub state: PartState,
    /// Its seal; `None` where that is damaged.
    pub sealed: Option<Sealed>,
}

/// Keeps parts and their chunks. Chunks are shared between the epochs of one job's member and with
/// nothing else.
pub trait ImageStore: Send + Sync {
    /// Begins a part. One that exists is refused.
    fn stage(&self, part: &PartKey) -> Result<Arc<dyn StagedPart>, StoreError>;

    /// Removes what interrupted attempts to write this part left behind. Attempts that this process
    /// still runs end when they are dropped.
    fn abort(&self, part: &PartKey) -> Result<(), StoreError>;

    /// Which of these chunks earlier parts of the same job and member hold durably.
    fn known(&self, part: &PartKey, ids: &[ChunkId]) -> Result<Vec<bool>, StoreError>;

    /// All sealed parts, in order of job, member and epoch.
    fn parts(&self) -> Result<Vec<PartSummary>, StoreError>;

    /// One sealed part; `None` where the store does not hold it.
    fn part(&self, part: &PartKey) -> Result<Option<PartSummary>, StoreError>;

    /// The encoded manifest, checked against the seal.
    fn manifest(&self, part: &PartKey) -> Result<Vec<u8>, StoreError>;

    /// A chunk of this part in its stored form, not verified.
    fn read_encoded(&self, part: &PartKey, id: ChunkId) -> Result<EncodedChunk, StoreError>;

    /// A chunk of this part, uncompressed and verified. One that is damaged is remembered as such:
    /// the next part that has it stores it again.
    fn read(&self, part: &PartKey, id: ChunkId) -> Result<Vec<u8>, StoreError>;

    /// Keeps the record that made the part's epoch valid. The same record again is fine, another
    /// one is refused.
    fn commit(&self, part: &PartKey, record: &[u8]) -> Result<(), StoreError>;

    /// The record given by `commit`, if any.
    fn commit_record(&self, part: &PartKey) -> Result<Option<Vec<u8>>, StoreError>;

    /// Retires a part, sealed or committed, and every pack that no other part needs. Gives the
    /// bytes freed. A part that is not there is fine.
    fn remove(&self, part: &PartKey) -> Result<u64, StoreError>;

    /// Forgets the indexes of members for which no part is being written; they are read again from
    /// the packs when needed.
    fn release_memory(&self);

    /// Bytes that the store's filesystem has left for it.
    fn free_bytes(&self) -> Result<u64, StoreError>;
}

/// The chunks of one sealed part of a store.
pub struct PartSource {
    store: Arc<dyn ImageStore>,
    part: PartKey,
}

impl PartSource {
    /// The chunks of `part`.
    pub fn new(store: Arc<dyn ImageStore>, part: PartKey) -> Self {
        PartSource { store, part }
    }
}

impl ChunkSource for PartSource {
    fn encoded(&self, id: ChunkId) -> Result<EncodedChunk, StoreError> {
        self.store.read_encoded(&self.part, id)
    }

    fn chunk(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        self.store.read(&self.part, id)
    }
}
