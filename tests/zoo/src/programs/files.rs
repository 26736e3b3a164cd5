//! Regular files and directories: offsets, flags, sharing of open files, numbers, close-on-exec.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crcoord_zoo::processes::{Child, End};
use crcoord_zoo::{Explain, Outcome, Stage, descriptors, ensure, ensure_equal, pattern};

const LENGTH: usize = 10_000;
const SEED: u64 = 71;
const HIGH: i32 = 900;
const ENTRIES: usize = 60;

pub fn run(stage: &Stage) -> Outcome {
    let data = stage.file("data");
    fs::write(&data, pattern::bytes(SEED, 0, LENGTH)).explain(data.display())?;
    let reader = open_at(&data, libc::O_RDONLY, 1000)?;
    let separate = open_at(&data, libc::O_RDONLY | libc::O_NONBLOCK, 5000)?;
    let duplicate = descriptors::duplicate(&reader, 3, true).explain("F_DUPFD_CLOEXEC")?;
    let high = descriptors::duplicate(&reader, HIGH, false).explain("F_DUPFD 900")?;
    let writing = Writing::set_up(stage)?;
    let mut directory = Directory::set_up(stage)?;
    let child = Child::spawn(stage, "child", |gate| {
        gate.open()?;
        stage.await_note_after_go("parent-has-read")?;
        ensure_equal!(
            descriptors::position(&reader).explain("lseek")?,
            1200,
            "shared offset"
        );
        read_and_check(&reader, 1200, 50)?;
        Ok(0)
    })?;
    let open = || -> Outcome<Vec<Description>> {
        [
            &reader,
            &separate,
            &duplicate,
            &high,
            &writing.plain,
            &writing.append,
            &writing.both,
        ]
        .into_iter()
        .map(Description::of)
        .collect()
    };
    let (before, table) = (open()?, descriptors::table().explain("/proc/self/fd")?);
    stage.ready()?;
    stage.wait_for_go();

    ensure_equal!(open()?, before, "numbers, offsets and flags");
    ensure_equal!(
        regular(descriptors::table().explain("/proc/self/fd")?),
        regular(table),
        "open descriptors"
    );
    ensure_equal!(high.as_raw_fd(), HIGH, "the high number");
    read_and_check(&reader, 1000, 100)?;
    read_and_check(&high, 1100, 50)?;
    read_and_check(&duplicate, 1150, 50)?;
    read_and_check(&separate, 5000, 50)?;
    ensure!(
        descriptors::write(&reader, b"x").is_err(),
        "a file opened for reading can be written"
    );
    stage.note("parent-has-read")?;
    child.expect(End::Exited(0))?;
    ensure_equal!(
        descriptors::position(&reader).explain("lseek")?,
        1250,
        "offset after the child"
    );
    writing.verify()?;
    directory.verify()
}

/// What must be the same afterwards.
#[derive(Debug, PartialEq, Eq)]
struct Description {
    number: i32,
    offset: u64,
    status: i32,
    close_on_exec: i32,
}

impl Description {
    fn of(descriptor: &OwnedFd) -> Outcome<Description> {
        Ok(Description {
            number: descriptor.as_raw_fd(),
            offset: descriptors::position(descriptor).explain("lseek")?,
            status: descriptors::status_flags(descriptor).explain("F_GETFL")?,
            close_on_exec: descriptors::control(descriptor, libc::F_GETFD, 0).explain("F_GETFD")?,
        })
    }
}

/// Files that are written after the restart.
struct Writing {
    plain: OwnedFd,
    plain_duplicate: OwnedFd,
    append: OwnedFd,
    both: OwnedFd,
    paths: [PathBuf; 3],
}

impl Writing {
    fn set_up(stage: &Stage) -> Outcome<Writing> {
        let paths = ["plain", "append", "both"].map(|name| stage.file(name));
        let open = |index: usize, flags: i32| -> Outcome<OwnedFd> {
            let flags = flags | libc::O_CREAT | libc::O_TRUNC;
            let path: &PathBuf = &paths[index];
            let descriptor = descriptors::open(path, flags).explain(path.display())?;
            descriptors::write_all(&descriptor, b"before;").explain("write")?;
            Ok(descriptor)
        };
        let plain = open(0, libc::O_WRONLY | libc::O_CLOEXEC)?;
        let plain_duplicate = descriptors::duplicate(&plain, 3, false).explain("F_DUPFD")?;
        let append = open(1, libc::O_WRONLY | libc::O_APPEND)?;
        let both = open(2, libc::O_RDWR | libc::O_NONBLOCK)?;
        // An append file's position is not where it writes; the third one stands beyond its end.
        descriptors::seek(&append, 2, libc::SEEK_SET).explain("lseek")?;
        descriptors::seek(&both, 4096, libc::SEEK_SET).explain("lseek")?;
        Ok(Writing {
            plain,
            plain_duplicate,
            append,
            both,
            paths,
        })
    }

    fn verify(&self) -> Outcome {
        for (descriptor, text) in [
            (&self.plain, "one;"),
            (&self.plain_duplicate, "two;"),
            (&self.append, "end;"),
            (&self.both, "far;"),
        ] {
            descriptors::write_all(descriptor, text.as_bytes()).explain("write after go")?;
        }
        let mut far = b"before;".to_vec();
        far.resize(4096, 0);
        far.extend(b"far;");
        let expected = [b"before;one;two;".to_vec(), b"before;end;".to_vec(), far];
        for (path, expected) in self.paths.iter().zip(expected) {
            let found = fs::read(path).explain(path.display())?;
            ensure!(
                found == expected,
                "{} has the wrong content",
                path.display()
            );
        }
        ensure!(
            descriptors::read(&self.plain, 1).is_err(),
            "a write-only file can be read"
        );
        descriptors::seek(&self.both, 0, libc::SEEK_SET).explain("lseek")?;
        let start = descriptors::read_exactly(&self.both, 7).explain("read")?;
        ensure_equal!(start, b"before;", "reading from the O_RDWR file");
        Ok(())
    }
}

/// A directory that has been read halfway with `getdents64`.
struct Directory {
    descriptor: OwnedFd,
    seen: BTreeSet<String>,
    doubled: Vec<String>,
}

impl Directory {
    fn set_up(stage: &Stage) -> Outcome<Directory> {
        let path = stage.file("directory");
        fs::create_dir(&path).explain(path.display())?;
        for index in 0..ENTRIES {
            fs::write(path.join(format!("entry-{index}")), "").explain("entry")?;
        }
        let descriptor =
            descriptors::open(&path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC)
                .explain(path.display())?;
        let mut directory = Directory {
            descriptor,
            seen: BTreeSet::new(),
            doubled: Vec::new(),
        };
        while directory.seen.len() < ENTRIES / 3 {
            ensure!(directory.read_some()?, "the directory ended early");
        }
        ensure!(
            directory.seen.len() < ENTRIES,
            "the directory was read at once"
        );
        Ok(directory)
    }

    fn verify(&mut self) -> Outcome {
        while self.read_some()? {}
        ensure!(
            self.doubled.is_empty(),
            "entries seen twice: {:?}",
            self.doubled
        );
        // With "." and "..".
        ensure_equal!(self.seen.len(), ENTRIES + 2, "entries of the directory");
        Ok(())
    }

    /// Reads a few entries; false at the end.
    fn read_some(&mut self) -> Outcome<bool> {
        let mut buffer = [0_u8; 256];
        let number = self.descriptor.as_fd().as_raw_fd();
        // SAFETY: the buffer is valid for its length.
        let length = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                number,
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        };
        ensure!(
            length >= 0,
            "getdents64: {}",
            std::io::Error::last_os_error()
        );
        let mut rest = &buffer[..length as usize];
        while !rest.is_empty() {
            // struct linux_dirent64: inode 8, offset 8, length 2, type 1, name (getdents(2)).
            let size = usize::from(u16::from_le_bytes([rest[16], rest[17]]));
            let name = rest[19..size]
                .split(|&byte| byte == 0)
                .next()
                .unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            if !self.seen.insert(name.clone()) {
                self.doubled.push(name);
            }
            rest = &rest[size..];
        }
        Ok(length > 0)
    }
}

/// Descriptors beside those of the harness that a restart may substitute.
fn regular(table: BTreeMap<i32, PathBuf>) -> BTreeMap<i32, PathBuf> {
    table
        .into_iter()
        .filter(|(_, path)| path.is_absolute())
        .collect()
}

fn open_at(path: &Path, flags: i32, offset: i64) -> Outcome<OwnedFd> {
    let descriptor = descriptors::open(path, flags).explain(path.display())?;
    descriptors::seek(&descriptor, offset, libc::SEEK_SET).explain("lseek")?;
    Ok(descriptor)
}

fn read_and_check(descriptor: &OwnedFd, at: u64, length: usize) -> Outcome {
    let found = descriptors::read_exactly(descriptor, length).explain("read")?;
    ensure!(
        found == pattern::bytes(SEED, at, length),
        "wrong bytes read at offset {at}"
    );
    Ok(())
}
