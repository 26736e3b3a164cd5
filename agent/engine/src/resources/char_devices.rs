//! Character devices without state: null, zero, full, random, urandom.

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::files::open_as_owner;
use super::{CaptureContext, DescriptorKind, RestoreContext, no_check};
use crate::error::{Result, bad_image};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "char-device",
    object: ObjectKind::CharDevice,
    recognise: |_, description| {
        description.is_type(0o020_000) && KNOWN.iter().any(|(rdev, _)| *rdev == description.special)
    },
    check: no_check,
    capture,
    open,
    finish: None,
};

/// Device numbers (Documentation/admin-guide/devices.txt) and paths.
const KNOWN: [(u64, &str); 5] = [
    (0x103, "/dev/null"),
    (0x105, "/dev/zero"),
    (0x107, "/dev/full"),
    (0x108, "/dev/random"),
    (0x109, "/dev/urandom"),
];

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CharDeviceImage {
    object: ObjectId,
    device: u64,
    flags: u32,
}

impl ImageRecord for CharDeviceImage {
    const KIND: &'static str = "char-device";
}

fn capture(_: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    Ok(all
        .iter()
        .map(|description| {
            Record::encode(&CharDeviceImage {
                object: description.object,
                device: description.special,
                flags: description.flags(),
            })
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    /// O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_LARGEFILE
    const ONCE: u32 = 0o100 | 0o200 | 0o400 | 0o1000 | 0o100_000;
    for record in records {
        let image: CharDeviceImage = record.decode()?;
        let Some((_, path)) = KNOWN.iter().find(|(rdev, _)| *rdev == image.device) else {
            return Err(bad_image(format!("unknown device {:#x}", image.device)).into());
        };
        let file = open_as_owner(context, path, image.flags & !ONCE)?;
        context.keep(image.object, file.into())?;
    }
    Ok(())
}
