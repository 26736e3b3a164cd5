//! Objects that are left out of the image and replaced at restart by a table: standard streams that
//! belong to the launcher.

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_kernel::sys;
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext, no_check};
use crate::error::{Result, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "left-out",
    object: ObjectKind::LeftOut,
    recognise: |context, description| name_of(context, description).is_some(),
    check: no_check,
    capture,
    open,
    finish: None,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LeftOutImage {
    object: ObjectId,
    name: String,
    was: String,
}

impl ImageRecord for LeftOutImage {
    const KIND: &'static str = "left-out";
}

fn name_of<'a>(context: &'a CaptureContext<'_>, description: &Description) -> Option<&'a str> {
    context
        .target
        .left_out
        .iter()
        .find(|left| left.device == description.device && left.inode == description.inode)
        .map(|left| left.name.as_str())
}

fn capture(context: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    Ok(all
        .iter()
        .filter_map(|description| {
            let name = name_of(context, description)?.to_owned();
            let was = description.name.clone();
            Some(Record::encode(&LeftOutImage {
                object: description.object,
                name,
                was,
            }))
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: LeftOutImage = record.decode()?;
        let replacement = context
            .target
            .substitutions
            .iter()
            .find(|(name, _)| *name == image.name);
        let Some((_, fd)) = replacement else {
            return Err(obstacle(
                "engine-not-substituted",
                format!(
                    "{} was left out of the image and is not replaced",
                    image.name
                ),
            )
            .path(image.was)
            .remedy(format!("give a replacement for {}", image.name))
            .into());
        };
        let copy = sys::duplicate_number(*fd)
            .map_err(|error| failure("using a replacement", &error).fd(*fd))?;
        context.keep(image.object, copy)?;
    }
    Ok(())
}
