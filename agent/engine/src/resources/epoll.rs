//! epoll(7) instances. A watched descriptor is known to the kernel by file *and* number, so watches
//! are added again by the process that had them, once its descriptors are in place.

use std::collections::BTreeMap;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_kernel::number::{SYS_EPOLL_CTL, flag};
use crcoord_kernel::objects;
use crcoord_kernel::stub::{Call, Stub};
use serde::{Deserialize, Serialize};

use super::descriptors::Description;
use super::{CaptureContext, DescriptorKind, RestoreContext};
use crate::error::{Result, bad_image, failure, obstacle};

/// The kind.
pub const KIND: DescriptorKind = DescriptorKind {
    name: "epoll",
    object: ObjectKind::Epoll,
    recognise: |_, description| description.name == "anon_inode:[eventpoll]",
    check,
    capture,
    open,
    finish: Some(finish),
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EpollImage {
    object: ObjectId,
    /// Pid inside the job and number of a descriptor for it.
    holder: (i32, i32),
    watches: Vec<Watch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Watch {
    fd: i32,
    events: u32,
    data: u64,
}

impl ImageRecord for EpollImage {
    const KIND: &'static str = "epoll";
}

/// The process that holds all the files an instance watches under the numbers it watches them by.
fn holder(context: &CaptureContext<'_>, epoll: &Description) -> Option<(i32, i32)> {
    epoll
        .holders
        .iter()
        .map(|(pid, fd, _)| (*pid, *fd))
        .find(|(pid, _)| {
            epoll.info.epoll.iter().all(|watch| {
                context.descriptions.iter().any(|description| {
                    description.inode == watch.inode
                        && description
                            .holders
                            .iter()
                            .any(|(owner, fd, _)| (*owner, *fd) == (*pid, watch.fd))
                })
            })
        })
}

fn check(context: &CaptureContext<'_>, all: &[&Description]) -> Vec<Report> {
    all.iter()
        .filter(|epoll| holder(context, epoll).is_none())
        .map(|epoll| {
            epoll.at(obstacle(
                "engine-epoll-closed",
                "it watches a descriptor that is closed or has another number in its process",
            )
            .remedy("remove descriptors from epoll before closing them"))
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
        .filter_map(|epoll| {
            let (pid, fd) = holder(context, epoll)?;
            let inner = context.inner.get(&pid).copied().unwrap_or(pid);
            let watches = epoll.info.epoll.iter();
            Some(Record::encode(&EpollImage {
                object: epoll.object,
                holder: (inner, fd),
                watches: watches
                    .map(|watch| Watch {
                        fd: watch.fd,
                        events: watch.events,
                        data: watch.data,
                    })
                    .collect(),
            }))
        })
        .collect())
}

fn open(context: &mut RestoreContext<'_>, records: &[&Record]) -> Result<()> {
    for record in records {
        let image: EpollImage = record.decode()?;
        let fd = objects::epoll().map_err(|error| failure("epoll_create1", &error))?;
        context.keep(image.object, fd)?;
    }
    Ok(())
}

fn finish(
    _: &mut RestoreContext<'_>,
    stubs: &BTreeMap<i32, Stub>,
    records: &[&Record],
) -> Result<()> {
    /// Bytes of `struct epoll_event` on x86-64, where it is packed.
    const EVENT: u64 = 12;
    for record in records {
        let image: EpollImage = record.decode()?;
        let (pid, epoll) = image.holder;
        let stub = stubs
            .get(&pid)
            .ok_or_else(|| bad_image(format!("epoll of process {pid}, which does not exist")))?;
        for watches in image.watches.chunks(1024) {
            let mut events = Vec::new();
            for watch in watches {
                events.extend_from_slice(&watch.events.to_ne_bytes());
                events.extend_from_slice(&watch.data.to_ne_bytes());
            }
            let address = stub.put(0, &events)?;
            let calls: Vec<Call> = (0u64..)
                .zip(watches)
                .map(|(index, watch)| {
                    let event = address + index * EVENT;
                    let (epoll, fd) = (epoll as u64, watch.fd as u64);
                    Call::new(SYS_EPOLL_CTL, [epoll, flag::EPOLL_CTL_ADD, fd, event])
                })
                .collect();
            stub.run_all(&calls)?;
        }
    }
    Ok(())
}
