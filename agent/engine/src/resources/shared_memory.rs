//! Memory that processes share without a file: one object in the image, one after restart.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, PageRun};
use crcoord_kernel::objects;
use crcoord_kernel::sys::{self, page_size};
use serde::{Deserialize, Serialize};

use super::RestoreContext;
use crate::error::{Result, bad_image, failure};
use crate::pages::{PageRange, PageSink, stream};

/// Largest object that is taken from an image, in bytes.
const SIZE_LIMIT: u64 = 1 << 46;

/// A shared object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemoryImage {
    /// Its pages are addressed by offset under this id.
    pub object: ObjectId,
    /// Size in bytes.
    pub size: u64,
}

impl ImageRecord for SharedMemoryImage {
    const KIND: &'static str = "shared-memory";
}

/// A shared object of a held tree.
#[derive(Debug)]
pub struct SharedObject {
    /// Its image.
    pub image: SharedMemoryImage,
    file: File,
}

impl SharedObject {
    /// Opens the object behind a mapping (/proc/PID/map_files, needs CAP_CHECKPOINT_RESTORE).
    pub fn open(object: ObjectId, pid: i32, start: u64, end: u64) -> Result<SharedObject> {
        let failed = |error: std::io::Error| {
            failure("opening shared memory", &error)
                .pid(pid)
                .address(format!("{start:#x}"))
        };
        let file =
            File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        Ok(SharedObject {
            image: SharedMemoryImage { object, size },
            file,
        })
    }

    /// Reads all its pages; they must not change meanwhile.
    pub fn stream(&self, sink: &mut dyn PageSink) -> Result<u64> {
        let failed = |error: std::io::Error| failure("reading shared memory", &error);
        let ranges: Vec<PageRange> = objects::data_ranges(&self.file)
            .map_err(failed)?
            .into_iter()
            .map(|(start, end)| PageRange {
                start,
                end: end.next_multiple_of(page_size()),
                keep_zeros: false,
            })
            .collect();
        let size = self.image.size;
        let mut read = |pieces: &[(u64, usize)], buffer: &mut [u8]| {
            let mut position = 0;
            for (start, length) in pieces {
                let buffer = &mut buffer[position..position + length];
                let there = size.saturating_sub(*start).min(*length as u64) as usize;
                self.file.read_exact_at(&mut buffer[..there], *start)?;
                buffer[there..].fill(0);
                position += length;
            }
            Ok(())
        };
        stream(self.image.object, &ranges, &mut read, sink)
    }
}

impl SharedMemoryImage {
    /// Makes the object anew, empty.
    pub fn open(&self, context: &mut RestoreContext<'_>) -> Result<File> {
        if self.size > SIZE_LIMIT {
            return Err(bad_image(format!("shared memory of {} bytes", self.size)).into());
        }
        let file = objects::shared_memory(self.size)
            .map_err(|error| failure("making shared memory", &error))?;
        let writer = file.try_clone().map_err(|error| failure("dup", &error))?;
        let kept = sys::duplicate_above(file.as_fd(), context.descriptor_base)
            .map_err(|error| failure("duplicating shared memory", &error))?;
        context.opened.insert(self.object, kept);
        Ok(writer)
    }
}

/// Writes one run into a shared object.
pub fn fill(file: &File, run: &PageRun, bytes: &[u8]) -> Result<()> {
    for (offset, position, length) in run.pieces(page_size()) {
        file.write_all_at(&bytes[position..position + length], offset)
            .map_err(|error| failure("filling shared memory", &error))?;
    }
    Ok(())
}
