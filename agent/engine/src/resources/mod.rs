//! Kernel resources, one file each with image struct, capture and restore. Descriptors' kinds are
//! registered in [`DESCRIPTORS`].

pub mod char_devices;
pub mod credentials;
pub mod descriptors;
pub mod epoll;
pub mod eventfd;
pub mod files;
pub mod left_out;
pub mod mappings;
pub mod pipes;
pub mod process;
pub mod shared_memory;
pub mod signalfd;
pub mod signals;
pub mod tcp;
pub mod threads;
pub mod timerfd;
pub mod timers;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ObjectKind, Record};
use crcoord_common::report::Report;
use crcoord_common::wire::engine::{CaptureTarget, RestoreTarget};
use crcoord_kernel::net::lock::NetworkLock;
use crcoord_kernel::stub::Stub;
use crcoord_kernel::sys;

use crate::error::{Result, failure, obstacle};
use descriptors::Description;

/// A kind of descriptor: how it is recognised, checked, captured and restored.
pub struct DescriptorKind {
    /// Its name in COVERAGE.md and in records.
    pub name: &'static str,
    /// What it is in the object table.
    pub object: ObjectKind,
    /// True for descriptions of this kind; the first kind that says so takes it.
    pub recognise: fn(&CaptureContext<'_>, &Description) -> bool,
    /// Reasons why these descriptions cannot be captured; may look, must not touch: the tree runs.
    pub check: fn(&CaptureContext<'_>, &[&Description]) -> Vec<Report>,
    /// State of all descriptions of this kind; the tree is held.
    pub capture: fn(&mut CaptureContext<'_>, &[&Description]) -> Result<Vec<Record>>,
    /// Opens the objects again in the engine.
    pub open: fn(&mut RestoreContext<'_>, &[&Record]) -> Result<()>,
    /// What is left to be done once all descriptors of all processes are in place.
    pub finish: Option<Finish>,
}

/// See [`DescriptorKind::finish`]. The stubs are the processes' main threads by pid.
pub type Finish = fn(&mut RestoreContext<'_>, &BTreeMap<i32, Stub>, &[&Record]) -> Result<()>;

/// All kinds, in the order in which they are asked.
pub const DESCRIPTORS: &[DescriptorKind] = &[
    left_out::KIND,
    pipes::KIND,
    files::KIND,
    char_devices::KIND,
    eventfd::KIND,
    epoll::KIND,
    timerfd::KIND,
    signalfd::KIND,
    tcp::KIND,
];

/// What captures of resources share.
#[derive(Debug)]
pub struct CaptureContext<'a> {
    /// What was asked for.
    pub target: &'a CaptureTarget,
    /// Handles on the processes, by pid.
    pub pidfds: BTreeMap<i32, OwnedFd>,
    /// All descriptions of the tree.
    pub descriptions: &'a [Description],
    /// Established connections found on the way.
    pub connections: Vec<crcoord_common::wire::member::TcpEnd>,
    /// Duplicates of the connected sockets.
    pub sockets: Vec<OwnedFd>,
    /// Pid inside the job by pid in the engine's namespace.
    pub inner: BTreeMap<i32, i32>,
}

impl CaptureContext<'_> {
    /// A duplicate of the description, in the engine.
    pub fn duplicate(&self, description: &Description) -> Result<OwnedFd> {
        let (pid, fd) = (description.pid, description.fd);
        let process = self.pidfds.get(&pid).ok_or_else(|| {
            failure("looking up a process", &std::io::ErrorKind::NotFound.into()).pid(pid)
        })?;
        sys::pidfd_getfd(std::os::fd::AsFd::as_fd(process), fd)
            .map_err(|error| failure("pidfd_getfd", &error).pid(pid).fd(fd).into())
    }
}

/// What restores of resources share.
#[derive(Debug)]
pub struct RestoreContext<'a> {
    /// What was asked for.
    pub target: &'a RestoreTarget,
    /// Objects that are open in the engine, with numbers above every descriptor of the image.
    pub opened: BTreeMap<ObjectId, OwnedFd>,
    /// The lowest number for such descriptors.
    pub descriptor_base: i32,
    /// Rebuilt connections that are still under repair.
    pub connections: Vec<tcp::WaitingConnection>,
    /// Keeps the network of the tree silent until it runs.
    pub lock: Option<NetworkLock>,
    /// Root directory of the capsule; `None` for the engine's own.
    pub root: Option<OwnedFd>,
}

impl RestoreContext<'_> {
    /// Keeps an open object under its id, out of the way of the image's descriptors.
    pub fn keep(&mut self, object: ObjectId, fd: OwnedFd) -> Result<()> {
        let fd = sys::duplicate_above(std::os::fd::AsFd::as_fd(&fd), self.descriptor_base)
            .map_err(|error| failure("duplicating a descriptor", &error))?;
        self.opened.insert(object, fd);
        Ok(())
    }

    /// Locks the tree's network, once, before anything is put into it. In a network that is not the
    /// tree's own nothing is locked: connections under repair answer nobody.
    pub fn lock_network(&mut self) -> Result<()> {
        if self.lock.is_some() || !self.target.own_network {
            return Ok(());
        }
        let lock = NetworkLock::whole_namespace(None).map_err(|error| {
            obstacle(
                "engine-network-lock",
                format!("the network cannot be locked: {error}"),
            )
            .remedy("load nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)")
        })?;
        self.lock = Some(lock);
        Ok(())
    }

    /// The address that stands for one of the image: another one when the member has moved.
    pub fn mapped(&self, address: SocketAddr) -> SocketAddr {
        let ip = address.ip();
        let moved = self
            .target
            .addresses
            .iter()
            .find(|(old, _)| *old == ip.to_canonical());
        match (moved, ip) {
            (None, _) => address,
            // An IPv6 socket with an IPv4 connection keeps its family.
            (Some((_, std::net::IpAddr::V4(new))), std::net::IpAddr::V6(_)) => {
                SocketAddr::new(new.to_ipv6_mapped().into(), address.port())
            }
            (Some((_, new)), _) => SocketAddr::new(*new, address.port()),
        }
    }
}

/// No reason against it.
pub(crate) fn no_check(_: &CaptureContext<'_>, _: &[&Description]) -> Vec<Report> {
    Vec::new()
}
