//! Pipes: content with its packet borders, capacity, flags of both ends, ends that are closed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_kernel::objects;
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext};
use crate::error::{Result, bad_image, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "pipe",
    object: ObjectKind::Pipe,
    recognise: |_, description| description.name.starts_with("pipe:["),
    check,
    capture,
    open,
    finish: None,
};

const ACCESS_MODE: u32 = 3;
const O_DIRECT: u32 = 0o40_000;
const O_NONBLOCK: u32 = 0o4000;
const POLLIN: i16 = 1;
const POLLOUT: i16 = 4;
const POLLERR: i16 = 8;
const POLLHUP: i16 = 16;
/// Largest capacity that is taken from an image.
const CAPACITY_LIMIT: u32 = 1 << 30;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PipeImage {
    /// Read ends: object and status flags.
    readers: Vec<(ObjectId, u32)>,
    /// Write ends.
    writers: Vec<(ObjectId, u32)>,
    capacity: u32,
    content: Vec<serde_bytes::ByteBuf>,
}

impl ImageRecord for PipeImage {
    const KIND: &'static str = "pipe";
}

fn is_writer(description: &Description) -> bool {
    description.flags() & ACCESS_MODE == 1
}

fn is_reader(description: &Description) -> bool {
    description.flags() & ACCESS_MODE == 0
}

/// A pipe with only one end in the tree is fine when nobody has the other; else it is shared with a
/// process outside.
fn check(context: &CaptureContext<'_>, all: &[&Description]) -> Vec<Report> {
    let mut reports = Vec::new();
    for ends in by_inode(all).values() {
        let readers = ends.iter().any(|end| !is_writer(end));
        let writers = ends.iter().any(|end| !is_reader(end));
        if readers && writers {
            continue;
        }
        let end = ends[0];
        let alone = context.duplicate(end).and_then(|fd| {
            let events = objects::poll_now(&fd, POLLIN | POLLOUT)
                .map_err(|error| failure("poll", &error))?;
            Ok(events & if readers { POLLHUP } else { POLLERR } != 0)
        });
        match alone {
            Ok(true) => {}
            Ok(false) => reports.push(
                end.at(obstacle(
                    "engine-pipe-shared",
                    "the other end of the pipe belongs to a process outside the tree",
                )
                .remedy("redirect it to a file, or checkpoint the whole pipeline")),
            ),
            Err(error) => reports.extend(error.0),
        }
    }
    reports
}

fn by_inode<'a>(all: &[&'a Description]) -> BTreeMap<(u64, u64), Vec<&'a Description>> {
    let mut pipes: BTreeMap<_, Vec<&Description>> = BTreeMap::new();
    for description in all {
        pipes
            .entry((description.device, description.inode))
            .or_default()
            .push(description);
    }
    pipes
}

fn capture(context: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    let obstacles = check(context, all);
    if !obstacles.is_empty() {
        return Err(crate::EngineError(obstacles));
    }
    let mut records = Vec::new();
    for ends in by_inode(all).values() {
        let fd = context.duplicate(ends[0])?;
        let capacity =
            objects::pipe_capacity(&fd).map_err(|error| failure("F_GETPIPE_SZ", &error))?;
        let content = match ends.iter().find(|end| !is_writer(end)) {
            Some(reader) => {
                let fd = context.duplicate(reader)?;
                objects::pipe_content(&fd)
                    .map_err(|error| reader.at(failure("copying a pipe's content", &error)))?
            }
            None => Vec::new(),
        };
        let with = |wanted: fn(&Description) -> bool| {
            ends.iter()
                .filter(|end| wanted(end))
                .map(|end| (end.object, end.flags()))
                .collect::<Vec<_>>()
        };
        records.push(Record::encode(&PipeImage {
            readers: with(|end| !is_writer(end)),
            writers: with(is_writer),
            capacity,
            content: content
                .into_iter()
                .map(serde_bytes::ByteBuf::from)
                .collect(),
        }));
    }
    Ok(records)
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: PipeImage = record.decode()?;
        if image.capacity > CAPACITY_LIMIT {
            return Err(bad_image(format!("a pipe of {} bytes", image.capacity)).into());
        }
        let (reader, writer) = objects::pipe(0).map_err(|error| failure("pipe2", &error))?;
        objects::set_pipe_capacity(&writer, image.capacity)
            .map_err(|error| failure("F_SETPIPE_SZ", &error))?;
        refill(&image, &writer)?;
        for (object, flags) in image.readers.iter() {
            reopen(context, *object, &reader, *flags)?;
        }
        for (object, flags) in image.writers.iter() {
            reopen(context, *object, &writer, *flags)?;
        }
    }
    Ok(())
}

fn refill(image: &PipeImage, writer: &OwnedFd) -> Result<()> {
    let packets = image.writers.iter().any(|(_, flags)| flags & O_DIRECT != 0);
    let flags = O_NONBLOCK | if packets { O_DIRECT } else { 0 };
    objects::set_status_flags(writer, flags).map_err(|error| failure("F_SETFL", &error))?;
    let mut file = File::from(writer.try_clone().map_err(|error| failure("dup", &error))?);
    for piece in &image.content {
        file.write_all(piece)
            .map_err(|error| failure("refilling a pipe", &error))?;
    }
    objects::set_status_flags(writer, 0).map_err(|error| failure("F_SETFL", &error))?;
    Ok(())
}

/// Each end is a description of its own, with its own flags: opened anew by /proc.
fn reopen(
    context: &mut RestoreContext<'_>,
    object: ObjectId,
    end: &OwnedFd,
    flags: u32,
) -> Result<()> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let access = flags & ACCESS_MODE;
    let file = std::fs::OpenOptions::new()
        .read(access != 1)
        .write(access != 0)
        .custom_flags(O_NONBLOCK as i32)
        .open(format!("/proc/self/fd/{}", end.as_raw_fd()))
        .map_err(|error| failure("opening a pipe's end", &error))?;
    objects::set_status_flags(&file, flags & (O_DIRECT | O_NONBLOCK))
        .map_err(|error| failure("F_SETFL", &error))?;
    context.keep(object, file.into())
}
