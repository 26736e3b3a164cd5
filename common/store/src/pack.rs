//! Packs: append-only files of self-describing chunks, read by their trailer or, where a crash left
//! none, by a scan of the intact prefix. See FORMAT.md, "Pack".

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crcoord_common::ids::PartKey;
use crcoord_common::image::ChunkId;

use crate::codec::{Codec, EncodedChunk, lengths_are_possible};
use crate::error::StoreError;

const MAGIC: [u8; 8] = *b"crcpack\0";
/// The pack format that this crate writes and the newest it reads.
const VERSION: u16 = 1;
const MIN_READER: u16 = 1;
const PREFIX_BYTES: usize = 16;
const OWNER_LIMIT: u32 = 1024;
const HASH_BYTES: usize = 32;
const RECORD_MAGIC: [u8; 4] = *b"CHNK";
/// Bytes before each chunk's payload.
pub(crate) const RECORD_HEADER: usize = 56;
const TABLE_ENTRY: usize = 52;
const FOOTER_MAGIC: [u8; 8] = *b"crctail\0";
const FOOTER_BYTES: usize = 64;

/// Where one chunk lies in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Position of its record header, in bytes from the start of the file.
    pub offset: u64,
    /// Length of its payload.
    pub stored: u32,
    /// Length of its uncompressed bytes.
    pub raw: u32,
    /// How the payload is encoded.
    pub codec: Codec,
}

/// All chunks of a pack.
pub type Table = HashMap<ChunkId, Extent>;

/// An open pack. Reads are positioned, so any number of threads may share it.
#[derive(Debug)]
pub struct Pack {
    file: File,
    path: PathBuf,
    owner: Option<PartKey>,
    digest: ChunkId,
    length: u64,
}

/// What a scan found.
#[derive(Debug)]
pub struct Scan {
    /// The chunks of the intact prefix.
    pub table: Table,
    /// Where the prefix ends, in bytes.
    pub end: u64,
    /// Why it ends there; `None` at the end of the file or at a trailer.
    pub stopped: Option<String>,
}

impl Pack {
    /// Opens a finished pack by its trailer. A pack without a whole trailer is refused as damaged.
    pub fn open(path: &Path) -> Result<(Self, Table), StoreError> {
        let (mut pack, header, data) = Self::open_header(path)?;
        let damaged = |what: &str| StoreError::damaged(path, what);
        let length = pack.length;
        let Some(footer_at) = length
            .checked_sub(FOOTER_BYTES as u64)
            .filter(|at| *at >= data)
        else {
            return Err(damaged(
                "it has no trailer: it was cut off or never finished",
            ));
        };
        let mut footer = [0; FOOTER_BYTES];
        pack.read_at(&mut footer, footer_at)?;
        if footer[..8] != FOOTER_MAGIC {
            return Err(damaged(
                "it has no trailer: it was cut off or never finished",
            ));
        }
        if checksum(&footer[..56]) != footer[56..] {
            return Err(damaged("its footer's checksum does not match"));
        }
        let (count, table_at) = (u64_at(&footer, 8), u64_at(&footer, 16));
        let table_length = count.checked_mul(TABLE_ENTRY as u64);
        if table_at < data || table_length.and_then(|l| l.checked_add(table_at)) != Some(footer_at)
        {
            return Err(damaged("its table does not fit between data and footer"));
        }
        let mut bytes = vec![0; (footer_at - table_at) as usize];
        pack.read_at(&mut bytes, table_at)?;
        let digest = table_digest(&header, &bytes);
        if digest.0 != footer[24..56] {
            return Err(damaged("its table's hash does not match"));
        }
        pack.digest = digest;
        let mut table = Table::with_capacity(count as usize);
        for entry in bytes.chunks_exact(TABLE_ENTRY) {
            let (id, extent) = decode_entry(entry, data, table_at)
                .map_err(|what| StoreError::damaged(path, what))?;
            table.insert(id, extent);
        }
        Ok((pack, table))
    }

    /// Opens a pack that this process has just finished and whose table it still has.
    pub(crate) fn open_finished(path: &Path, digest: ChunkId) -> Result<Self, StoreError> {
        let (mut pack, _, _) = Self::open_header(path)?;
        pack.digest = digest;
        Ok(pack)
    }

    /// Reads the intact prefix of a pack chunk by chunk, checking every one. Slow: it reads it all.
    pub fn scan(path: &Path) -> Result<(Self, Scan), StoreError> {
        let (pack, _, data) = Self::open_header(path)?;
        let mut scan = Scan {
            table: Table::new(),
            end: data,
            stopped: None,
        };
        while scan.end < pack.length {
            match pack.record_at(scan.end) {
                Ok(Some((extent, chunk))) => {
                    scan.end += (RECORD_HEADER + chunk.bytes.len()) as u64;
                    scan.table.insert(chunk.id, extent);
                }
                Ok(None) => break,
                Err(StoreError::Damaged { what, .. } | StoreError::BadChunk { what, .. }) => {
                    scan.stopped = Some(format!("at byte {}: {what}", scan.end));
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok((pack, scan))
    }

    /// Reads a chunk in its stored form. Its header is checked, its content is not: decode it with
    /// [`EncodedChunk::decode_verified`].
    pub fn read(&self, id: ChunkId, extent: Extent) -> Result<EncodedChunk, StoreError> {
        let mut bytes = vec![0; RECORD_HEADER + extent.stored as usize];
        self.read_at(&mut bytes, extent.offset)?;
        let (found, codec, stored, raw) = decode_header(&bytes[..RECORD_HEADER])
            .map_err(|what| self.damaged_at(extent.offset, what))?;
        if (found, codec, stored, raw) != (id, extent.codec, extent.stored, extent.raw) {
            return Err(self.damaged_at(extent.offset, "another chunk lies there"));
        }
        bytes.drain(..RECORD_HEADER);
        Ok(EncodedChunk {
            id,
            codec,
            raw_length: raw,
            bytes,
        })
    }

    /// Reads, decompresses and verifies a chunk.
    pub fn read_raw(&self, id: ChunkId, extent: Extent) -> Result<Vec<u8>, StoreError> {
        let chunk = self.read(id, extent)?;
        chunk.decode_verified().map_err(|error| match error {
            StoreError::BadChunk { what, .. } => {
                self.damaged_at(extent.offset, &format!("chunk {id}: {what}"))
            }
            other => other,
        })
    }

    /// The part it was written for; `None` for an image outside any store.
    pub fn owner(&self) -> Option<&PartKey> {
        self.owner.as_ref()
    }

    /// Hash over header and table, which names all content; meaningless after a scan.
    pub fn digest(&self) -> ChunkId {
        self.digest
    }

    /// Length of the file, in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    fn open_header(path: &Path) -> Result<(Self, Vec<u8>, u64), StoreError> {
        let file = File::open(path).map_err(|error| StoreError::io("open", path, &error))?;
        let length = file
            .metadata()
            .map_err(|error| StoreError::io("examine", path, &error))?
            .len();
        let mut pack = Pack {
            file,
            path: path.to_owned(),
            owner: None,
            digest: ChunkId([0; 32]),
            length,
        };
        let mut header = vec![0; PREFIX_BYTES];
        if length < PREFIX_BYTES as u64 {
            return Err(StoreError::foreign(path, "it is too short for a pack"));
        }
        pack.read_at(&mut header, 0)?;
        if header[..8] != MAGIC {
            return Err(StoreError::foreign(path, "it is no pack"));
        }
        let needed = u16::from_le_bytes([header[10], header[11]]);
        if needed > VERSION {
            return Err(StoreError::TooNew {
                path: path.to_owned(),
                needed,
                known: VERSION,
            });
        }
        let owner_length = u32_at(&header, 12);
        let data = PREFIX_BYTES as u64 + u64::from(owner_length) + HASH_BYTES as u64;
        if owner_length > OWNER_LIMIT || data > length {
            return Err(StoreError::damaged(
                path,
                "its header's length is out of range",
            ));
        }
        header.resize(data as usize, 0);
        pack.read_at(&mut header[PREFIX_BYTES..], PREFIX_BYTES as u64)?;
        let (content, hash) = header.split_at(header.len() - HASH_BYTES);
        if ChunkId::of(content).0 != hash {
            return Err(StoreError::damaged(
                path,
                "its header's hash does not match",
            ));
        }
        pack.owner = rmp_serde::from_slice(&content[PREFIX_BYTES..])
            .map_err(|error| StoreError::damaged(path, format!("its owner: {error}")))?;
        Ok((pack, header, data))
    }

    /// The chunk whose record begins at `offset`, verified; `None` where the trailer begins.
    fn record_at(&self, offset: u64) -> Result<Option<(Extent, EncodedChunk)>, StoreError> {
        let cut_off = || StoreError::damaged(&self.path, "the chunk there is cut off");
        let mut header = [0; RECORD_HEADER];
        if self.length - offset < RECORD_HEADER as u64 {
            return Err(cut_off());
        }
        self.read_at(&mut header, offset)?;
        let (id, codec, stored, raw) = match decode_header(&header) {
            Ok(decoded) => decoded,
            Err(_) if self.trailer_begins_at(offset)? => return Ok(None),
            Err(what) => return Err(StoreError::damaged(&self.path, what)),
        };
        if self.length - offset - (RECORD_HEADER as u64) < u64::from(stored) {
            return Err(cut_off());
        }
        let extent = Extent {
            offset,
            stored,
            raw,
            codec,
        };
        let chunk = self.read(id, extent)?;
        chunk.decode_verified()?;
        Ok(Some((extent, chunk)))
    }

    fn trailer_begins_at(&self, offset: u64) -> Result<bool, StoreError> {
        let mut footer = [0; FOOTER_BYTES];
        let Some(at) = self.length.checked_sub(FOOTER_BYTES as u64) else {
            return Ok(false);
        };
        self.read_at(&mut footer, at)?;
        Ok(footer[..8] == FOOTER_MAGIC && u64_at(&footer, 16) == offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), StoreError> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => self.damaged_at(offset, "it ends there"),
                _ => StoreError::io("read", &self.path, &error),
            })
    }

    fn damaged_at(&self, offset: u64, what: &str) -> StoreError {
        StoreError::damaged(&self.path, format!("at byte {offset}: {what}"))
    }
}

/// The header of a pack that belongs to `owner`.
pub(crate) fn encode_pack_header(owner: Option<&PartKey>) -> Vec<u8> {
    let owner = rmp_serde::to_vec_named(&owner)
        .expect("a part key holds only names and numbers, which MessagePack can express");
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&MIN_READER.to_le_bytes());
    header.extend_from_slice(&(owner.len() as u32).to_le_bytes());
    header.extend_from_slice(&owner);
    let hash = ChunkId::of(&header);
    header.extend_from_slice(&hash.0);
    header
}

/// The record header of a chunk.
pub(crate) fn encode_record_header(chunk: &EncodedChunk) -> [u8; RECORD_HEADER] {
    let mut header = [0; RECORD_HEADER];
    header[..4].copy_from_slice(&RECORD_MAGIC);
    header[4] = chunk.codec as u8;
    header[8..12].copy_from_slice(&(chunk.bytes.len() as u32).to_le_bytes());
    header[12..16].copy_from_slice(&chunk.raw_length.to_le_bytes());
    header[16..48].copy_from_slice(&chunk.id.0);
    let sum = checksum(&header[..48]);
    header[48..].copy_from_slice(&sum);
    header
}

/// The trailer of a pack whose data ends at `table_at`, and the pack's digest.
pub(crate) fn encode_trailer(header: &[u8], table: &Table, table_at: u64) -> (Vec<u8>, ChunkId) {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_unstable_by_key(|(_, extent)| extent.offset);
    let mut bytes = Vec::with_capacity(entries.len() * TABLE_ENTRY + FOOTER_BYTES);
    for (id, extent) in entries {
        bytes.extend_from_slice(&id.0);
        bytes.extend_from_slice(&extent.offset.to_le_bytes());
        bytes.extend_from_slice(&extent.stored.to_le_bytes());
        bytes.extend_from_slice(&extent.raw.to_le_bytes());
        bytes.extend_from_slice(&[extent.codec as u8, 0, 0, 0]);
    }
    let digest = table_digest(header, &bytes);
    let mut footer = FOOTER_MAGIC.to_vec();
    footer.extend_from_slice(&(table.len() as u64).to_le_bytes());
    footer.extend_from_slice(&table_at.to_le_bytes());
    footer.extend_from_slice(&digest.0);
    let sum = checksum(&footer);
    footer.extend_from_slice(&sum);
    bytes.extend_from_slice(&footer);
    (bytes, digest)
}

/// The table's hash covers the pack's header, so that a table cannot move to another pack.
fn table_digest(header: &[u8], table: &[u8]) -> ChunkId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(table);
    ChunkId(*hasher.finalize().as_bytes())
}

fn decode_entry(entry: &[u8], data: u64, end: u64) -> Result<(ChunkId, Extent), &'static str> {
    let codec = Codec::from_byte(entry[48]).ok_or("a chunk's codec is not known")?;
    let extent = Extent {
        offset: u64_at(entry, 32),
        stored: u32_at(entry, 40),
        raw: u32_at(entry, 44),
        codec,
    };
    lengths_are_possible(codec, u64::from(extent.stored), extent.raw)
        .map_err(|_| "a chunk's lengths are out of range")?;
    let after = extent
        .offset
        .checked_add(RECORD_HEADER as u64 + u64::from(extent.stored));
    if extent.offset < data || after.is_none_or(|after| after > end) {
        return Err("a chunk lies outside of the data");
    }
    Ok((id_at(entry, 0), extent))
}

fn decode_header(header: &[u8]) -> Result<(ChunkId, Codec, u32, u32), &'static str> {
    if header[..4] != RECORD_MAGIC {
        return Err("no chunk begins there");
    }
    if checksum(&header[..48]) != header[48..56] {
        return Err("the chunk's header checksum does not match");
    }
    let codec = Codec::from_byte(header[4]).ok_or("the chunk's codec is not known")?;
    let (stored, raw) = (u32_at(header, 8), u32_at(header, 12));
    lengths_are_possible(codec, u64::from(stored), raw)?;
    Ok((id_at(header, 16), codec, stored, raw))
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    sum
}

fn id_at(bytes: &[u8], at: usize) -> ChunkId {
    let mut id = [0; 32];
    id.copy_from_slice(&bytes[at..at + 32]);
    ChunkId(id)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
