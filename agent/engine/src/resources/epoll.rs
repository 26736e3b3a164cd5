//! epoll(7) instances. A watched descriptor is known to the kernel by file *and* number, so watches
//! are added again by the process that had them, once its descriptors are in place.

use std::collections::BTreeMap;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_kernel::number::{SYS_EPOLL_CTL, SYS_EPOLL_WAIT, flag};
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
    for record in records {
        let image: EpollImage = record.decode()?;
        let pid = image.holder.0;
        let stub = stubs
            .get(&pid)
            .ok_or_else(|| bad_image(format!("epoll of process {pid}, which does not exist")))?;
        let (spent, live): (Vec<Watch>, Vec<Watch>) =
            image.watches.iter().partition(|watch| watch.is_spent());
        image.spend(stub, &spent)?;
        image.add(stub, &live)?;
    }
    Ok(())
}

/// Bytes of `struct epoll_event` on x86-64, where it is packed.
const EVENT: u64 = 12;
/// EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET: not events.
const MODES: u32 = 0xf000_0000;
const ONE_SHOT: u32 = 1 << 30;

impl Watch {
    /// True for a one-shot watch that has fired and was not armed again.
    fn is_spent(&self) -> bool {
        self.events & ONE_SHOT != 0 && self.events & !MODES == 0
    }
}

impl EpollImage {
    fn add(&self, stub: &Stub, watches: &[Watch]) -> Result<()> {
        for watches in watches.chunks(1024) {
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
                    let (epoll, fd) = (self.holder.1 as u64, watch.fd as u64);
                    Call::new(SYS_EPOLL_CTL, [epoll, flag::EPOLL_CTL_ADD, fd, event])
                })
                .collect();
            stub.run_all(&calls)?;
        }
        Ok(())
    }

    /// The kernel makes a spent watch only by letting it fire: each is added alone, armed for
    /// anything, and its event is taken. One that is not ready for anything stays armed for errors.
    fn spend(&self, stub: &Stub, watches: &[Watch]) -> Result<()> {
        const IN_PRI_OUT: u32 = 1 | 2 | 4;
        for watch in watches {
            let armed = Watch {
                events: watch.events | IN_PRI_OUT,
                ..*watch
            };
            self.add(stub, &[armed])?;
            let taken = stub.scratch() + 64;
            let wait = Call::new(SYS_EPOLL_WAIT, [self.holder.1 as u64, taken, 1, 0]);
            if stub.run_all(&[wait])?[0] == 0 {
                stub.put(0, &watch.events.to_ne_bytes())?;
                stub.put(4, &watch.data.to_ne_bytes())?;
                let (epoll, fd) = (self.holder.1 as u64, watch.fd as u64);
                let event = stub.scratch();
                stub.run_all(&[Call::new(
                    SYS_EPOLL_CTL,
                    [epoll, flag::EPOLL_CTL_MOD, fd, event],
                )])?;
            }
        }
        Ok(())
    }
}
