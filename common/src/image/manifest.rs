//! The manifest: one member's part of one epoch without its pages. Authenticated, and refused by
//! name before anything is decoded that its header does not promise.

use serde::{Deserialize, Serialize};

use super::chunk::ChunkId;
use super::objects::ObjectEntry;
use super::record::Record;
use crate::ids::{NodeName, ObjectId, PartKey};

const MAGIC: [u8; 8] = *b"crcoord\0";
const HEADER_BYTES: usize = 32;
const MAC_BYTES: usize = 32;
/// Version of the container that this crate writes.
pub const FORMAT_VERSION: u16 = 1;
/// The oldest container version that a reader of today's manifests must know.
const MIN_READER: u16 = 1;
/// Largest manifest body that is read, in bytes.
pub const BODY_LIMIT: u64 = 1 << 30;
const FLAG_KEYED: u16 = 1;

/// The CPU family an image was taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Architecture {
    /// x86-64, little endian.
    X86_64 = 1,
    /// 64-bit Arm, little endian.
    Aarch64 = 2,
}

impl Architecture {
    /// The one this program was built for.
    pub const NATIVE: Architecture = if cfg!(target_arch = "aarch64") {
        Architecture::Aarch64
    } else {
        Architecture::X86_64
    };

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Architecture::X86_64),
            2 => Some(Architecture::Aarch64),
            _ => None,
        }
    }
}

/// Where one memory object's pages are found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEntry {
    /// The object.
    pub object: ObjectId,
    /// Root of its page index; `None` when it has no page.
    pub root: Option<ChunkId>,
    /// Bytes of pages below the root, uncompressed.
    pub bytes: u64,
}

/// Everything a manifest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestBody {
    /// The table of descriptors and objects.
    pub objects: Vec<ObjectEntry>,
    /// Whose part of which epoch this is; `None` for an image taken without a coordinator.
    pub part: Option<PartKey>,
    /// The node it was taken on.
    pub node: Option<NodeName>,
    /// When, in seconds since 1970-01-01 UTC.
    pub taken: u64,
    /// Kernel release of the node (`uname -r`).
    pub kernel: String,
    /// The resources.
    pub records: Vec<Record>,
    /// The memory.
    pub memory: Vec<MemoryEntry>,
}

/// A manifest and what its header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The CPU family.
    pub architecture: Architecture,
    /// Page size of the node, in bytes.
    pub page_size: u32,
    /// The content.
    pub body: ManifestBody,
}

/// What authenticates manifests: the cluster's key, or a plain checksum for images taken without a
/// cluster.
#[derive(Clone)]
pub enum SealingKey {
    /// The cluster's secret of 32 bytes (BLAKE3 keyed hash).
    Keyed([u8; 32]),
    /// No secret: damage is found, forgery is not.
    Checksum,
}

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SealingKey::Keyed(_) => "Keyed(..)",
            SealingKey::Checksum => "Checksum",
        })
    }
}

/// A manifest that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not a manifest at all.
    #[error("not a crcoord manifest")]
    Foreign,
    /// Shorter or longer than its header says.
    #[error("the manifest is {actual} bytes long, its header promises {promised}")]
    Length {
        /// What is there.
        actual: u64,
        /// What should be there.
        promised: u64,
    },
    /// Written by a newer crcoord.
    #[error("the manifest needs a reader of format {needed}, this one knows {FORMAT_VERSION}")]
    TooNew {
        /// The format it asks for.
        needed: u16,
    },
    /// Taken on another kind of CPU.
    #[error(
        "the image was taken on architecture {found:?}, this node is {:?}",
        Architecture::NATIVE
    )]
    Architecture {
        /// The image's.
        found: Option<Architecture>,
    },
    /// Taken with another page size.
    #[error("the image has pages of {found} bytes, this node has {expected}")]
    PageSize {
        /// The image's.
        found: u32,
        /// The node's.
        expected: u32,
    },
    /// Not authenticated by this cluster's key.
    #[error("the manifest was not written with this cluster's image key, or was changed since")]
    Forged,
    /// It has no key's authentication but one is required.
    #[error("the manifest carries only a checksum, but this cluster has an image key")]
    Unkeyed,
    /// It was sealed with a key that the reader does not have.
    #[error("the manifest is sealed with a cluster's image key, which was not given")]
    KeyMissing,
    /// Its checksum is wrong.
    #[error("the manifest is damaged: its checksum does not match")]
    Damaged,
    /// It does not decode although its checksum is right.
    #[error("the manifest does not decode: {0}")]
    Undecodable(String),
}

impl Manifest {
    /// Encodes and authenticates the manifest.
    pub fn encode(&self, key: &SealingKey) -> Vec<u8> {
        let body = rmp_serde::to_vec_named(&self.body)
            .expect("a manifest holds only data that MessagePack can express");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + MAC_BYTES);
        let flags = if matches!(key, SealingKey::Keyed(_)) {
            FLAG_KEYED
        } else {
            0
        };
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&MIN_READER.to_le_bytes());
        bytes.push(self.architecture as u8);
        bytes.push(0);
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&self.page_size.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&body);
        let mac = authenticator(key, &bytes);
        bytes.extend_from_slice(&mac);
        bytes
    }

    /// Checks and decodes a manifest for use on this node.
    pub fn decode(bytes: &[u8], key: &SealingKey, page_size: u32) -> Result<Self, ManifestError> {
        let manifest = Self::decode_any(bytes, key)?;
        if manifest.architecture != Architecture::NATIVE {
            return Err(ManifestError::Architecture {
                found: Some(manifest.architecture),
            });
        }
        if manifest.page_size != page_size {
            return Err(ManifestError::PageSize {
                found: manifest.page_size,
                expected: page_size,
            });
        }
        Ok(manifest)
    }

    /// Checks and decodes a manifest of any architecture, to look at.
    pub fn decode_any(bytes: &[u8], key: &SealingKey) -> Result<Self, ManifestError> {
        if bytes.len() < HEADER_BYTES || bytes[..8] != MAGIC {
            return Err(ManifestError::Foreign);
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let needed = u16_at(10);
        if needed > FORMAT_VERSION {
            return Err(ManifestError::TooNew { needed });
        }
        let flags = u16_at(14);
        let page_size = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[24..32]);
        let length = u64::from_le_bytes(length);
        let promised = (HEADER_BYTES + MAC_BYTES) as u64;
        let promised = promised.saturating_add(length);
        if length > BODY_LIMIT || bytes.len() as u64 != promised {
            return Err(ManifestError::Length {
                actual: bytes.len() as u64,
                promised,
            });
        }
        let (content, mac) = bytes.split_at(bytes.len() - MAC_BYTES);
        match (key, flags & FLAG_KEYED != 0) {
            (SealingKey::Keyed(_), false) => return Err(ManifestError::Unkeyed),
            (SealingKey::Checksum, true) => return Err(ManifestError::KeyMissing),
            _ => {}
        }
        // `blake3::Hash` compares in constant time.
        if blake3::Hash::from(authenticator(key, content)) != *mac {
            return Err(match key {
                SealingKey::Keyed(_) => ManifestError::Forged,
                SealingKey::Checksum => ManifestError::Damaged,
            });
        }
        let architecture = Architecture::from_byte(bytes[12])
            .ok_or(ManifestError::Architecture { found: None })?;
        let body = rmp_serde::from_slice(&content[HEADER_BYTES..])
            .map_err(|error| ManifestError::Undecodable(error.to_string()))?;
        Ok(Manifest {
            architecture,
            page_size,
            body,
        })
    }

    /// The hash by which a commit record names an encoded manifest.
    pub fn digest(encoded: &[u8]) -> ChunkId {
        ChunkId::of(encoded)
    }
}

fn authenticator(key: &SealingKey, content: &[u8]) -> [u8; 32] {
    match key {
        SealingKey::Keyed(key) => *blake3::keyed_hash(key, content).as_bytes(),
        SealingKey::Checksum => *blake3::hash(content).as_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            architecture: Architecture::NATIVE,
            page_size: 4096,
            body: ManifestBody {
                objects: Vec::new(),
                part: None,
                node: None,
                taken: 1,
                kernel: "6.18".into(),
                records: vec![Record {
                    kind: "x".into(),
                    version: 1,
                    min_reader: 1,
                    body: vec![1, 2, 3],
                }],
                memory: vec![MemoryEntry {
                    object: ObjectId(3),
                    root: Some(ChunkId::of(b"x")),
                    bytes: 4096,
                }],
            },
        }
    }

    #[test]
    fn round_trip() {
        for key in [SealingKey::Keyed([7; 32]), SealingKey::Checksum] {
            let bytes = manifest().encode(&key);
            assert_eq!(Manifest::decode(&bytes, &key, 4096).unwrap(), manifest());
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let key = SealingKey::Keyed([7; 32]);
        let bytes = manifest().encode(&key);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&damaged, &key, 4096).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..length], &key, 4096).is_err());
        }
    }

    #[test]
    fn refusals_have_names() {
        let key = SealingKey::Keyed([7; 32]);
        let mut other = manifest();
        other.architecture = Architecture::Aarch64;
        if Architecture::NATIVE == Architecture::X86_64 {
            assert!(matches!(
                Manifest::decode(&other.encode(&key), &key, 4096),
                Err(ManifestError::Architecture {
                    found: Some(Architecture::Aarch64)
                })
            ));
        }
        let bytes = manifest().encode(&key);
        assert!(matches!(
            Manifest::decode(&bytes, &SealingKey::Keyed([8; 32]), 4096),
            Err(ManifestError::Forged)
        ));
        assert!(matches!(
            Manifest::decode(&bytes, &SealingKey::Checksum, 4096),
            Err(ManifestError::KeyMissing)
        ));
        assert!(matches!(
            Manifest::decode(&bytes, &key, 65536),
            Err(ManifestError::PageSize { .. })
        ));
        let mut newer = bytes.clone();
        newer[10] = 9;
        assert!(matches!(
            Manifest::decode(&newer, &key, 4096),
            Err(ManifestError::TooNew { needed: 9 })
        ));
        assert!(matches!(
            Manifest::decode(b"\x7fELF", &key, 4096),
            Err(ManifestError::Foreign)
        ));
    }
}
