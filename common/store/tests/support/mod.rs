//! Parts, pages and small filesystems that the store's tests share.
// Each test binary uses its own share of these; none of them is outside of a test.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crcoord_common::ids::{Epoch, JobKey, MemberId, ObjectId, PartKey};
use crcoord_common::image::{
    Architecture, Manifest, ManifestBody, MemoryEntry, PageRun, SealingKey,
};
use crcoord_store::{
    ChunkSink, ChunkSource, ImageStore, PartReader, PartWriter, Sealed, StoreError,
};

pub const PAGE: u64 = 4096;

pub fn job(id: &str) -> JobKey {
    JobKey {
        cluster: "test".parse().unwrap(),
        id: id.parse().unwrap(),
        submitted: 1_700_000_000,
    }
}

pub fn part(epoch: u64, member: u32) -> PartKey {
    PartKey {
        job: job("42"),
        epoch: Epoch(epoch),
        member: MemberId(member),
    }
}

/// A job's memory: window -> bytes of its 16 pages, half of them compressible.
pub type Memory = BTreeMap<u64, Vec<u8>>;

pub fn window(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let mut noise = blake3::Hasher::new();
    noise.update(&seed.to_le_bytes());
    noise.finalize_xof().fill(&mut bytes[..32768]);
    bytes[32768..].fill(seed as u8);
    bytes
}

pub fn memory(windows: u64) -> Memory {
    (0..windows).map(|n| (n, window(n))).collect()
}

pub fn run(window: u64) -> PageRun {
    PageRun {
        object: ObjectId(1),
        window,
        present: 0xffff,
    }
}

pub fn write(sink: Arc<dyn ChunkSink>, memory: &Memory) -> Result<Vec<MemoryEntry>, StoreError> {
    let writer = PartWriter::new(PAGE, vec![sink]);
    let runs: Vec<_> = memory
        .iter()
        .map(|(n, b)| (run(*n), b.as_slice()))
        .collect();
    writer.put_all(&runs)?;
    writer.finish()
}

pub fn encode(memory: Vec<MemoryEntry>, part: Option<PartKey>) -> Vec<u8> {
    Manifest {
        architecture: Architecture::NATIVE,
        page_size: PAGE as u32,
        body: ManifestBody {
            objects: Vec::new(),
            part,
            node: None,
            taken: 1,
            kernel: "test".into(),
            records: Vec::new(),
            memory,
        },
    }
    .encode(&SealingKey::Checksum)
}

pub fn decode(bytes: &[u8]) -> Manifest {
    Manifest::decode(bytes, &SealingKey::Checksum, PAGE as u32).unwrap()
}

pub fn save(store: &dyn ImageStore, part: &PartKey, memory: &Memory) -> Result<Sealed, StoreError> {
    let staged = store.stage(part)?;
    let entries = write(staged.clone(), memory)?;
    staged.seal(&encode(entries, Some(part.clone())))
}

pub fn load_from(manifest: &[u8], source: &dyn ChunkSource) -> Memory {
    let manifest = decode(manifest);
    let mut memory = Memory::new();
    PartReader::new(&manifest.body.memory, PAGE, source)
        .read_all(3, |run, bytes| {
            assert_eq!(run.present, 0xffff);
            memory.insert(run.window, bytes);
            Ok::<_, ()>(())
        })
        .unwrap();
    memory
}

pub fn load(store: &Arc<dyn ImageStore>, part: &PartKey) -> Memory {
    let source = crcoord_store::PartSource::new(store.clone(), part.clone());
    load_from(&store.manifest(part).unwrap(), &source)
}

/// All files below a directory.
pub fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.file_name().unwrap() != ".lock" {
            found.push(path.display().to_string());
        }
    }
    found.sort();
    found
}

/// A tmpfs of its own, unmounted on drop.
pub struct SmallFilesystem {
    pub directory: tempfile::TempDir,
}

impl SmallFilesystem {
    pub fn new(bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let done = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={bytes}"),
                "crcoord-test",
            ])
            .arg(directory.path())
            .status()
            .unwrap();
        assert!(
            done.success(),
            "this test needs CAP_SYS_ADMIN to mount a small tmpfs: run it as root"
        );
        SmallFilesystem { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.path())
            .status();
    }
}
