//! Writes a pack: appends encoded chunks, each once, and ends with the trailer.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crcoord_common::ids::PartKey;
use crcoord_common::image::ChunkId;

use crate::codec::EncodedChunk;
use crate::error::StoreError;
use crate::files;
use crate::pack::{self, Extent, RECORD_HEADER, Table};

const BUFFER_BYTES: usize = 1 << 20;
/// Written data is pushed to the disk at this pace, so that the seal does not find gigabytes of
/// dirty page cache that the node's jobs have to pay for.
const SYNC_BYTES: u64 = 128 << 20;

/// A pack that is being written. Without [`PackWriter::finish`] its file has no trailer.
#[derive(Debug)]
pub struct PackWriter {
    file: File,
    path: PathBuf,
    header: Vec<u8>,
    buffer: Vec<u8>,
    /// Bytes in the file; what follows is in the buffer.
    written: u64,
    synced: u64,
    table: Table,
    raw_bytes: u64,
}

/// A pack with its trailer, durable but for its name.
#[derive(Debug)]
pub struct FinishedPack {
    /// All chunks.
    pub table: Table,
    /// Hash over header and table.
    pub digest: ChunkId,
    /// Length of the file.
    pub length: u64,
    /// Uncompressed bytes of all chunks.
    pub raw_bytes: u64,
}

impl PackWriter {
    /// Creates the file, which must not exist.
    pub fn create(path: &Path, owner: Option<&PartKey>) -> Result<Self, StoreError> {
        Ok(Self::over(files::create_new(path)?, path, owner))
    }

    /// Writes into an empty file that the caller has opened.
    pub(crate) fn over(file: File, path: &Path, owner: Option<&PartKey>) -> Self {
        let header = pack::encode_pack_header(owner);
        PackWriter {
            file,
            path: path.to_owned(),
            buffer: header.clone(),
            header,
            written: 0,
            synced: 0,
            table: Table::new(),
            raw_bytes: 0,
        }
    }

    /// Appends a chunk; `false` where the pack has it already. After an error the pack is lost.
    pub fn append(&mut self, chunk: &EncodedChunk) -> Result<bool, StoreError> {
        if self.table.contains_key(&chunk.id) {
            return Ok(false);
        }
        let extent = Extent {
            offset: self.length(),
            stored: chunk.bytes.len() as u32,
            raw: chunk.raw_length,
            codec: chunk.codec,
        };
        self.buffer
            .extend_from_slice(&pack::encode_record_header(chunk));
        self.buffer.extend_from_slice(&chunk.bytes);
        self.table.insert(chunk.id, extent);
        self.raw_bytes += u64::from(chunk.raw_length);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
            if self.written - self.synced >= SYNC_BYTES {
                self.sync()?;
            }
        }
        Ok(true)
    }

    /// True when this pack has the chunk.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.table.contains_key(id)
    }

    /// Reads back a chunk of this pack in its stored form.
    pub fn read(&mut self, id: ChunkId) -> Result<Option<EncodedChunk>, StoreError> {
        let Some(extent) = self.table.get(&id).copied() else {
            return Ok(None);
        };
        self.flush()?;
        let mut bytes = vec![0; extent.stored as usize];
        self.file
            .read_exact_at(&mut bytes, extent.offset + RECORD_HEADER as u64)
            .map_err(|error| StoreError::io("read", &self.path, &error))?;
        Ok(Some(EncodedChunk {
            id,
            codec: extent.codec,
            raw_length: extent.raw,
            bytes,
        }))
    }

    /// Bytes appended so far, header included.
    pub fn length(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Uncompressed bytes of all chunks so far.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    /// How many chunks it has.
    pub fn chunks(&self) -> u64 {
        self.table.len() as u64
    }

    /// Writes the trailer and makes all of the file durable.
    pub fn finish(self) -> Result<FinishedPack, StoreError> {
        self.finish_keeping_file().map(|(pack, _)| pack)
    }

    /// As `finish`; the file stays open, and with it a lock on it.
    pub(crate) fn finish_keeping_file(mut self) -> Result<(FinishedPack, File), StoreError> {
        let (trailer, digest) = pack::encode_trailer(&self.header, &self.table, self.length());
        self.flush()?;
        self.buffer = trailer;
        self.flush()?;
        self.sync()?;
        let finished = FinishedPack {
            table: self.table,
            digest,
            length: self.written,
            raw_bytes: self.raw_bytes,
        };
        Ok((finished, self.file))
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.file
            .write_all(&self.buffer)
            .map_err(|error| StoreError::io("write", &self.path, &error))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.synced = self.written;
        self.file
            .sync_all()
            .map_err(|error| StoreError::io("synchronise", &self.path, &error))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::pack::Pack;

    fn chunk(n: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096 + n as usize];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        bytes
    }

    fn write(path: &Path, count: u32) -> FinishedPack {
        let mut writer = PackWriter::create(path, None).unwrap();
        for n in 0..count {
            let encoded = EncodedChunk::encode(&chunk(n)).unwrap();
            assert!(writer.append(&encoded).unwrap());
            assert!(!writer.append(&encoded).unwrap());
            assert_eq!(writer.read(encoded.id).unwrap(), Some(encoded));
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_by_trailer_and_by_scan() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pack");
        let finished = write(&path, 50);
        let (pack, table) = Pack::open(&path).unwrap();
        assert_eq!(table, finished.table);
        assert_eq!(pack.digest(), finished.digest);
        assert_eq!(pack.length(), finished.length);
        for n in 0..50 {
            let id = ChunkId::of(&chunk(n));
            assert_eq!(pack.read_raw(id, table[&id]).unwrap(), chunk(n));
        }
        let (_, scan) = Pack::scan(&path).unwrap();
        assert_eq!(scan.table, finished.table);
        assert_eq!(scan.stopped, None);
    }

    #[test]
    fn every_truncation_is_refused_and_its_prefix_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pack");
        let finished = write(&path, 8);
        let whole = fs::read(&path).unwrap();
        let cut = directory.path().join("cut");
        let data = finished.table.values().map(|e| e.offset).min().unwrap();
        for length in 0..whole.len() {
            fs::write(&cut, &whole[..length]).unwrap();
            let error = Pack::open(&cut).unwrap_err();
            assert!(
                matches!(
                    error,
                    StoreError::Damaged { .. } | StoreError::Foreign { .. }
                ),
                "{length}: {error}"
            );
            if (length as u64) < data {
                assert!(Pack::scan(&cut).is_err());
                continue;
            }
            let (_, scan) = Pack::scan(&cut).unwrap();
            let expected = finished
                .table
                .values()
                .filter(|e| e.offset as usize + RECORD_HEADER + e.stored as usize <= length)
                .count();
            assert_eq!(scan.table.len(), expected, "cut at {length}");
        }
    }

    #[test]
    fn no_flipped_bit_changes_what_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pack");
        write(&path, 3);
        let whole = fs::read(&path).unwrap();
        let bent = directory.path().join("bent");
        let mut refused = 0;
        for bit in (0..whole.len() * 8).step_by(3) {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&bent, &bytes).unwrap();
            // A bit in the version field alone makes no difference to a reader.
            let Ok((pack, table)) = Pack::open(&bent) else {
                refused += 1;
                continue;
            };
            for n in 0..3 {
                let id = ChunkId::of(&chunk(n));
                match pack.read_raw(id, table[&id]) {
                    Ok(raw) => assert_eq!(raw, chunk(n)),
                    Err(StoreError::Damaged { .. }) => refused += 1,
                    Err(other) => panic!("bit {bit}: {other}"),
                }
            }
        }
        assert!(
            refused > 0 && refused >= whole.len() * 8 / 3 - 8,
            "{refused}"
        );
    }

    #[test]
    fn refusals_have_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pack");
        write(&path, 1);
        assert!(matches!(
            PackWriter::create(&path, None),
            Err(StoreError::Exists { .. })
        ));
        let mut bytes = fs::read(&path).unwrap();
        bytes[10] = 9;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(
            Pack::open(&path),
            Err(StoreError::TooNew { needed: 9, .. })
        ));
        fs::write(&path, b"\x7fELF and many more bytes").unwrap();
        assert!(matches!(Pack::open(&path), Err(StoreError::Foreign { .. })));
    }
}
