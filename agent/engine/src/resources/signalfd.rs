//! Signals read as a file, signalfd(2).

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_kernel::objects;
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext, no_check};
use crate::error::{Result, failure};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "signalfd",
    object: ObjectKind::Signalfd,
    recognise: |_, description| {
        description.name == "anon_inode:[signalfd]" && description.info.signals.is_some()
    },
    check: no_check,
    capture,
    open,
    finish: None,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SignalfdImage {
    object: ObjectId,
    signals: u64,
    flags: u32,
}

impl ImageRecord for SignalfdImage {
    const KIND: &'static str = "signalfd";
}

fn capture(_: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    Ok(all
        .iter()
        .map(|description| {
            Record::encode(&SignalfdImage {
                object: description.object,
                signals: description.info.signals.unwrap_or(0),
                flags: description.flags(),
            })
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: SignalfdImage = record.decode()?;
        let fd = objects::signalfd(image.signals).map_err(|error| failure("signalfd", &error))?;
        objects::set_status_flags(&fd, image.flags).map_err(|error| failure("F_SETFL", &error))?;
        context.keep(image.object, fd)?;
    }
    Ok(())
}
