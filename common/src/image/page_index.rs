//! The page index: a content-addressed tree from windows to chunk ids, one per memory object.
//!
//! A leaf covers 512 aligned windows (32 MiB), an inner node 512 aligned children. Boundaries
//! depend on addresses only, so an unchanged part of memory gives the same nodes in every epoch
//! and costs nothing again.

use std::collections::BTreeMap;

use super::chunk::ChunkId;

/// Children or entries a node can have.
pub const FANOUT_BITS: u32 = 9;
/// More levels than a 64-bit address needs are refused.
const LEVEL_LIMIT: u8 = 6;
const LEAF_ENTRY: usize = 8 + 2 + 32;
const INNER_ENTRY: usize = 8 + 32;
const NODE_HEADER: usize = 8;
const NODE_MAGIC: [u8; 4] = *b"CRPI";

/// One window of memory and the chunk that holds its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address or offset divided by the window size.
    pub window: u64,
    /// Which pages of the window the chunk holds.
    pub present: u16,
    /// The chunk.
    pub chunk: ChunkId,
}

/// A node that is not what an index node must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page index node {node} is damaged: {what}")]
pub struct DamagedNode {
    /// The node's id.
    pub node: ChunkId,
    /// What is wrong.
    pub what: &'static str,
}

/// Collects entries in any order and writes the tree.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    entries: BTreeMap<u64, (u16, ChunkId)>,
}

impl Builder {
    /// Adds or replaces a window's entry.
    pub fn insert(&mut self, entry: Entry) {
        self.entries
            .insert(entry.window, (entry.present, entry.chunk));
    }

    /// Takes a window out again, for pages that are zero now.
    pub fn remove(&mut self, window: u64) {
        self.entries.remove(&window);
    }

    /// How many pages all windows have together.
    pub fn pages(&self) -> u64 {
        let present = self.entries.values();
        present
            .map(|(present, _)| u64::from(present.count_ones()))
            .sum()
    }

    /// How many windows are known.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when no window is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes all nodes through `put`, children before parents; gives the root, or `None` for an
    /// object without any page.
    pub fn write<E>(
        &self,
        mut put: impl FnMut(ChunkId, Vec<u8>) -> Result<(), E>,
    ) -> Result<Option<ChunkId>, E> {
        let mut level: Vec<(u64, ChunkId)> = Vec::new();
        let entries: Vec<_> = self.entries.iter().collect();
        for node in entries.chunk_by(|a, b| *a.0 >> FANOUT_BITS == *b.0 >> FANOUT_BITS) {
            let mut bytes = header(0, node.len());
            for (window, (present, chunk)) in node {
                bytes.extend_from_slice(&window.to_le_bytes());
                bytes.extend_from_slice(&present.to_le_bytes());
                bytes.extend_from_slice(&chunk.0);
            }
            let id = ChunkId::of(&bytes);
            level.push((*node[0].0 >> FANOUT_BITS, id));
            put(id, bytes)?;
        }
        let mut depth = 1;
        while level.len() > 1 {
            let mut above = Vec::new();
            for node in level.chunk_by(|a, b| a.0 >> FANOUT_BITS == b.0 >> FANOUT_BITS) {
                let mut bytes = header(depth, node.len());
                for (index, child) in node {
                    bytes.extend_from_slice(&index.to_le_bytes());
                    bytes.extend_from_slice(&child.0);
                }
                let id = ChunkId::of(&bytes);
                above.push((node[0].0 >> FANOUT_BITS, id));
                put(id, bytes)?;
            }
            level = above;
            depth += 1;
        }
        Ok(level.first().map(|(_, id)| *id))
    }
}

fn header(level: u8, count: usize) -> Vec<u8> {
    let mut bytes = NODE_MAGIC.to_vec();
    bytes.push(level);
    bytes.push(0);
    bytes.extend_from_slice(&(count as u16).to_le_bytes());
    bytes
}

fn decode(
    id: ChunkId,
    bytes: &[u8],
    position: Option<(u8, u64)>,
) -> Result<(u8, Decoded), DamagedNode> {
    let damaged = |what| DamagedNode { node: id, what };
    if ChunkId::of(bytes) != id {
        return Err(damaged("its content does not match its id"));
    }
    if bytes.len() < NODE_HEADER || bytes[..4] != NODE_MAGIC {
        return Err(damaged("no node header"));
    }
    let level = bytes[4];
    let count = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
    if level > LEVEL_LIMIT || count == 0 || count > 1 << FANOUT_BITS {
        return Err(damaged("level or count out of range"));
    }
    if position.is_some_and(|(expected, _)| expected != level) {
        return Err(damaged("wrong level"));
    }
    let size = if level == 0 { LEAF_ENTRY } else { INNER_ENTRY };
    let body = &bytes[NODE_HEADER..];
    if body.len() != count * size {
        return Err(damaged("length does not match its count"));
    }
    let mut decoded = Vec::with_capacity(count);
    let mut last = None;
    for entry in body.chunks_exact(size) {
        let mut index = [0; 8];
        index.copy_from_slice(&entry[..8]);
        let index = u64::from_le_bytes(index);
        let parent = index >> FANOUT_BITS;
        if last.is_some_and(|last| index <= last) {
            return Err(damaged("entries out of order"));
        }
        if position.is_some_and(|(_, expected)| parent != expected) {
            return Err(damaged("entry outside its node's range"));
        }
        last = Some(index);
        let mut chunk = [0; 32];
        chunk.copy_from_slice(&entry[size - 32..]);
        let present = if level == 0 {
            u16::from_le_bytes([entry[8], entry[9]])
        } else {
            0
        };
        decoded.push((index, present, ChunkId(chunk)));
    }
    Ok((level, decoded))
}

type Decoded = Vec<(u64, u16, ChunkId)>;

/// An error of [`walk`]: either a damaged node or the reader's own.
#[derive(Debug)]
pub enum WalkError<E> {
    /// A node is damaged.
    Damaged(DamagedNode),
    /// `get` or `visit` failed.
    Other(E),
}

/// Visits all entries below `root` in ascending order.
pub fn walk<E>(
    root: ChunkId,
    get: &mut dyn FnMut(ChunkId) -> Result<Vec<u8>, E>,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), WalkError<E>> {
    descend(root, None, get, &mut |_| Ok(()), visit)
}

/// As [`walk`], and tells `node` every index node's id (what retention and copying need).
pub fn walk_all<E>(
    root: ChunkId,
    get: &mut dyn FnMut(ChunkId) -> Result<Vec<u8>, E>,
    node: &mut dyn FnMut(ChunkId) -> Result<(), E>,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), WalkError<E>> {
    descend(root, None, get, node, visit)
}

fn descend<E>(
    id: ChunkId,
    position: Option<(u8, u64)>,
    get: &mut dyn FnMut(ChunkId) -> Result<Vec<u8>, E>,
    node: &mut dyn FnMut(ChunkId) -> Result<(), E>,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), WalkError<E>> {
    node(id).map_err(WalkError::Other)?;
    let bytes = get(id).map_err(WalkError::Other)?;
    let (level, decoded) = decode(id, &bytes, position).map_err(WalkError::Damaged)?;
    for (index, present, chunk) in decoded {
        if level == 0 {
            visit(Entry {
                window: index,
                present,
                chunk,
            })
            .map_err(WalkError::Other)?;
        } else {
            descend(chunk, Some((level - 1, index)), get, node, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn entry(window: u64) -> Entry {
        Entry {
            window,
            present: 0xffff,
            chunk: ChunkId::of(&window.to_le_bytes()),
        }
    }

    fn build(windows: impl Iterator<Item = u64>) -> (Option<ChunkId>, HashMap<ChunkId, Vec<u8>>) {
        let mut builder = Builder::default();
        windows.for_each(|window| builder.insert(entry(window)));
        let mut nodes = HashMap::new();
        let root = builder
            .write(|id, bytes| {
                nodes.insert(id, bytes);
                Ok::<(), ()>(())
            })
            .unwrap();
        (root, nodes)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let windows = [0, 1, 511, 512, 70_000, 0x7_ffff_ffff, 0x1ff_ffff_ffff];
        let (root, nodes) = build(windows.into_iter());
        let mut seen = Vec::new();
        walk(
            root.unwrap(),
            &mut |id| Ok::<_, ()>(nodes[&id].clone()),
            &mut |entry| {
                seen.push(entry);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, windows.map(entry));
    }

    #[test]
    fn a_small_change_shares_all_other_nodes() {
        let (_, before) = build(0..512 * 40);
        let (_, after) = build((0..512 * 40).chain([512 * 40 + 7]));
        let new = after.keys().filter(|id| !before.contains_key(*id)).count();
        assert_eq!(new, 2, "one leaf and the root");
    }

    #[test]
    fn damage_is_named() {
        let (root, mut nodes) = build(0..2000);
        let root = root.unwrap();
        nodes.get_mut(&root).unwrap()[20] ^= 1;
        let result = walk(root, &mut |id| Ok::<_, ()>(nodes[&id].clone()), &mut |_| {
            Ok(())
        });
        assert!(
            matches!(result, Err(WalkError::Damaged(DamagedNode { node, .. })) if node == root)
        );
    }

    #[test]
    fn an_empty_object_has_no_root() {
        assert_eq!(build(std::iter::empty()).0, None);
    }
}
