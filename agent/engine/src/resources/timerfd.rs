//! Timers read as a file, timerfd_create(2): what is left of the time at the cut is left at restart.

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_kernel::{objects, proc};
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext};
use crate::error::{Result, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "timerfd",
    object: ObjectKind::Timerfd,
    recognise: |_, description| description.name == "anon_inode:[timerfd]",
    check,
    capture,
    open,
    finish: None,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TimerfdImage {
    object: ObjectId,
    clock: i32,
    ticks: u64,
    value: u64,
    interval: u64,
    flags: u32,
}

impl ImageRecord for TimerfdImage {
    const KIND: &'static str = "timerfd";
}

/// TFD_TIMER_CANCEL_ON_SET
const CANCEL_ON_SET: i32 = 2;

fn check(_: &CaptureContext<'_>, all: &[&Description]) -> Vec<Report> {
    all.iter()
        .filter_map(|description| match proc::timerfd(&description.info) {
            Some((_, _, flags, _, _)) if flags & CANCEL_ON_SET == 0 => None,
            Some(_) => Some(description.at(obstacle(
                "engine-timerfd-cancel",
                "a timer that is cancelled when the clock is set is not supported yet",
            ))),
            None => Some(description.at(obstacle(
                "engine-timerfd-unknown",
                "the kernel does not tell the state of this timer",
            ))),
        })
        .collect()
}

fn capture(context: &mut CaptureContext<'_>, all: &[&Description]) -> Result<Vec<Record>> {
    let obstacles = check(context, all);
    if !obstacles.is_empty() {
        return Err(crate::EngineError(obstacles));
    }
    Ok(all
        .iter()
        .filter_map(|description| {
            let (clock, ticks, _, value, interval) = proc::timerfd(&description.info)?;
            Some(Record::encode(&TimerfdImage {
                object: description.object,
                clock,
                ticks,
                value,
                interval,
                flags: description.flags(),
            }))
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: TimerfdImage = record.decode()?;
        let fd = objects::timerfd(image.clock, image.value, image.interval, image.ticks)
            .map_err(|error| failure("timerfd", &error))?;
        objects::set_status_flags(&fd, image.flags).map_err(|error| failure("F_SETFL", &error))?;
        context.keep(image.object, fd)?;
    }
    Ok(())
}
