//! Descriptor tables: which process has which open file description under which number.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ImageRecord, ObjectEntry};
use crcoord_common::report::Report;
use crcoord_kernel::proc::{self, FdInfo};
use crcoord_kernel::stub::{Call, Stub};
use crcoord_kernel::sys::{Compare, kcmp};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DESCRIPTORS, DescriptorKind, RestoreContext};
use crate::error::{Result, bad_image, failure, obstacle};
use crate::tree::is_gone;

/// `O_CLOEXEC` (asm-generic/fcntl.h).
pub const CLOSE_ON_EXEC: u32 = 0o2_000_000;

/// An open file description, known by one of the descriptors that refer to it.
#[derive(Clone, Debug)]
pub struct Description {
    /// Unique in the image.
    pub object: ObjectId,
    /// A process that has it, in the engine's namespace.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// The kernel's name: a path, or `pipe:[17]` and the like.
    pub name: String,
    /// Device of the inode.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Device number of a device file.
    pub special: u64,
    /// Size in bytes.
    pub size: u64,
    /// Owner.
    pub owner: (u32, u32),
    /// What fdinfo tells.
    pub info: FdInfo,
    /// All descriptors: (pid in the engine's namespace, number, close on exec).
    pub holders: Vec<(i32, i32, bool)>,
}

impl Description {
    /// Open flags (`F_GETFL`), without close-on-exec.
    pub fn flags(&self) -> u32 {
        self.info.flags & !CLOSE_ON_EXEC
    }

    /// True for this file type (`S_IF*`).
    pub fn is_type(&self, kind: u32) -> bool {
        self.mode & 0o170_000 == kind
    }

    /// The place for a report.
    pub fn at(&self, report: Report) -> Report {
        report.pid(self.pid).fd(self.fd).path(self.name.clone())
    }
}

/// Finds all open file descriptions of these processes, and who shares them (kcmp(2)).
pub fn scan(pids: &[i32], first_object: u32) -> Result<Vec<Description>> {
    let mut found: Vec<Description> = Vec::new();
    let mut by_inode: BTreeMap<(u64, u64), Vec<usize>> = BTreeMap::new();
    for &pid in pids {
        let fds = match proc::descriptors(pid) {
            Ok(fds) => fds,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(failure("listing descriptors", &error).pid(pid).into()),
        };
        for fd in fds {
            let description = match read(pid, fd) {
                Ok(description) => description,
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    return Err(failure("reading a descriptor", &error)
                        .pid(pid)
                        .fd(fd)
                        .into());
                }
            };
            let close_on_exec = description.info.flags & CLOSE_ON_EXEC != 0;
            let same_inode = by_inode
                .entry((description.device, description.inode))
                .or_default();
            let mut known = None;
            for &index in same_inode.iter() {
                let other: &Description = &found[index];
                match kcmp(Compare::File, pid, other.pid, fd, other.fd) {
                    Ok(order) if order.is_eq() => {
                        known = Some(index);
                        break;
                    }
                    Ok(_) => {}
                    Err(error) if is_gone(&error) || error.raw_os_error() == Some(9) => {}
                    Err(error) => return Err(failure("kcmp", &error).pid(pid).fd(fd).into()),
                }
            }
            let index = known.unwrap_or_else(|| {
                found.push(description);
                same_inode.push(found.len() - 1);
                found.len() - 1
            });
            found[index].holders.push((pid, fd, close_on_exec));
        }
    }
    for (description, number) in found.iter_mut().zip(first_object..) {
        description.object = ObjectId(number);
    }
    Ok(found)
}

fn read(pid: i32, fd: i32) -> io::Result<Description> {
    let link = format!("/proc/{pid}/fd/{fd}");
    let name = std::fs::read_link(&link)?;
    let name = name.into_os_string().into_string().map_err(|name| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the path {name:?} is not UTF-8"),
        )
    })?;
    let metadata = std::fs::metadata(&link)?;
    Ok(Description {
        object: ObjectId(0),
        pid,
        fd,
        name,
        device: metadata.dev(),
        inode: metadata.ino(),
        mode: metadata.mode(),
        special: metadata.rdev(),
        size: metadata.len(),
        owner: (metadata.uid(), metadata.gid()),
        info: proc::fdinfo(pid, fd)?,
        holders: Vec::new(),
    })
}

/// Descriptions of one kind.
pub type OfKind<'a> = (&'static DescriptorKind, Vec<&'a Description>);

/// Sorts descriptions by kind, in the table's order; those of no kind are obstacles.
pub fn by_kind<'a>(context: &CaptureContext<'a>) -> (Vec<OfKind<'a>>, Vec<Report>) {
    let mut sorted: Vec<OfKind<'a>> = DESCRIPTORS.iter().map(|kind| (kind, Vec::new())).collect();
    let mut obstacles = Vec::new();
    for description in context.descriptions {
        match DESCRIPTORS
            .iter()
            .position(|kind| (kind.recognise)(context, description))
        {
            Some(index) => sorted[index].1.push(description),
            None => obstacles.push(unsupported(description)),
        }
    }
    sorted.retain(|(_, descriptions)| !descriptions.is_empty());
    (sorted, obstacles)
}

fn unsupported(description: &Description) -> Report {
    let remedy = match description.name.as_str() {
        name if name.contains("io_uring") => {
            "switch the program's io_uring off (for example UV_USE_IO_URING=0)"
        }
        name if name.contains("userfaultfd") => "switch the program's userfaultfd use off",
        name if name.contains("perf_event") => "do not profile the job while it is checkpointed",
        name if name.contains("inotify") => "switch the program's file watching off",
        name if name.starts_with("/dev/infiniband") => {
            "run over TCP (OMPI_MCA_btl=tcp,self,vader or UCX_TLS=tcp,sm)"
        }
        name if name.starts_with("/dev/pts/") || name.starts_with("/dev/tty") => {
            "start the program without a terminal, or leave standard streams out"
        }
        name if name.ends_with(" (deleted)") => "keep the file linked while it is open",
        _ => "close it before the checkpoint",
    };
    let message = match description.mode & 0o170_000 {
        _ if description.name.ends_with(" (deleted)") => {
            "an open file without a name is not supported yet".to_owned()
        }
        0o140_000 => "this kind of socket is not supported yet".to_owned(),
        0o060_000 => "block devices are not supported".to_owned(),
        0o020_000 => "this character device is not supported".to_owned(),
        _ => "this kind of descriptor is not supported".to_owned(),
    };
    description.at(obstacle("engine-fd-unsupported", message).remedy(remedy))
}

/// The entry of the object table.
pub fn object_entry(
    context: &CaptureContext<'_>,
    kind: &DescriptorKind,
    description: &Description,
) -> ObjectEntry {
    ObjectEntry {
        id: description.object,
        kind: match kind.object {
            crcoord_common::image::ObjectKind::File if description.is_type(0o040_000) => {
                crcoord_common::image::ObjectKind::Directory
            }
            kind => kind,
        },
        path: description.name.clone(),
        flags: description.flags(),
        owner: Some(description.owner),
        mode: Some(description.mode & 0o7777),
        descriptors: description
            .holders
            .iter()
            .map(|(pid, fd, _)| (context.inner.get(pid).copied().unwrap_or(*pid), *fd))
            .collect(),
    }
}

/// Image of one process's descriptor table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Pid inside the job.
    pub pid: i32,
    /// Its descriptors.
    pub entries: Vec<DescriptorEntry>,
}

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorEntry {
    /// Its number.
    pub fd: i32,
    /// What it refers to.
    pub object: ObjectId,
    /// Closed on exec.
    pub close_on_exec: bool,
}

impl ImageRecord for DescriptorTable {
    const KIND: &'static str = "descriptors";
}

/// The table of each process.
pub fn tables(context: &CaptureContext<'_>) -> Vec<DescriptorTable> {
    let mut tables: BTreeMap<i32, Vec<DescriptorEntry>> = BTreeMap::new();
    for description in context.descriptions {
        for (pid, fd, close_on_exec) in &description.holders {
            tables.entry(*pid).or_default().push(DescriptorEntry {
                fd: *fd,
                object: description.object,
                close_on_exec: *close_on_exec,
            });
        }
    }
    tables
        .into_iter()
        .map(|(pid, mut entries)| {
            entries.sort_by_key(|entry| entry.fd);
            DescriptorTable {
                pid: context.inner.get(&pid).copied().unwrap_or(pid),
                entries,
            }
        })
        .collect()
}

/// Places a process's descriptors, from the objects it has inherited from the engine.
pub fn restore(context: &RestoreContext<'_>, stub: &Stub, table: &DescriptorTable) -> Result<()> {
    let base = context.descriptor_base;
    let mut calls = vec![Call::new(SYS_CLOSE_RANGE, [0, base as u64 - 1, 0])];
    for entry in &table.entries {
        if entry.fd < 0 || entry.fd >= base {
            return Err(bad_image(format!("descriptor {} is out of range", entry.fd)).into());
        }
        let Some(object) = context.opened.get(&entry.object) else {
            return Err(bad_image(format!(
                "descriptor {} refers to object {}, which does not exist",
                entry.fd, entry.object
            ))
            .pid(table.pid)
            .into());
        };
        let object = std::os::fd::AsRawFd::as_raw_fd(object);
        let flags = if entry.close_on_exec {
            CLOSE_ON_EXEC
        } else {
            0
        };
        calls.push(Call::new(
            SYS_DUP3,
            [object as u64, entry.fd as u64, flags.into()],
        ));
    }
    stub.run_all(&calls)?;
    Ok(())
}

/// Closes what is left of the engine's descriptors in a stub that needs none of them any more.
pub fn close_rest(context: &RestoreContext<'_>, stub: &Stub) -> Result<()> {
    stub.call(
        SYS_CLOSE_RANGE,
        [context.descriptor_base as u64, u64::from(u32::MAX), 0],
    )?;
    Ok(())
}

use crcoord_kernel::number::{SYS_CLOSE_RANGE, SYS_DUP3};
