//! Event counters, eventfd(2).

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_kernel::objects;
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext, no_check};
use crate::error::{Result, failure};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "eventfd",
    object: ObjectKind::Eventfd,
    recognise: |_, description| description.info.eventfd_count.is_some(),
    check: no_check,
    capture,
    open,
    finish: None,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EventfdImage {
    object: ObjectId,
    count: u64,
    semaphore: bool,
    flags: u32,
}

impl ImageRecord for EventfdImage {
    const KIND: &'static str = "eventfd";
}

fn capture(_: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    Ok(all
        .iter()
        .map(|description| {
            Record::encode(&EventfdImage {
                object: description.object,
                count: description.info.eventfd_count.unwrap_or(0),
                semaphore: description.info.eventfd_semaphore,
                flags: description.flags(),
            })
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: EventfdImage = record.decode()?;
        let fd = objects::eventfd(image.count, image.semaphore)
            .map_err(|error| failure("eventfd", &error))?;
        objects::set_status_flags(&fd, image.flags).map_err(|error| failure("F_SETFL", &error))?;
        context.keep(image.object, fd)?;
    }
    Ok(())
}
