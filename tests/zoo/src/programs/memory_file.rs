//! File mappings: private ones with copied pages up to the partial last page, and shared ones.

use std::os::fd::AsRawFd;
use std::path::Path;

use crcoord_zoo::memory::{Mapping, PAGE, READ_WRITE};
use crcoord_zoo::{Explain, Outcome, Stage, descriptors, ensure, pattern};

/// Ten and a half pages.
const LENGTH: usize = 10 * PAGE + PAGE / 2;
const MAPPED: usize = 11 * PAGE;
const SHARED_OFFSET: usize = 4 * PAGE;
const COPIED: [usize; 3] = [2, 5, 10];

pub fn run(stage: &Stage) -> Outcome {
    let private_path = stage.file("private");
    let shared_path = stage.file("shared");
    let private = private_mapping(&private_path)?;
    let shared = Shared::set_up(&shared_path)?;
    let permissions = (private.permissions()?, shared.whole.permissions()?);
    stage.ready()?;
    let mut count = 0_u64;
    stage.work_until_go(|| {
        shared.whole.check(
            7 * PAGE,
            &count.to_le_bytes(),
            "counter in the shared mapping",
        )?;
        count += 1;
        shared
            .whole
            .write(7 * PAGE, &count.to_le_bytes())
            .explain("shared mapping")
    })?;

    ensure!(
        private.permissions()? == permissions.0,
        "permissions of the private mapping changed"
    );
    ensure!(
        shared.whole.permissions()? == permissions.1,
        "permissions of the shared mapping changed"
    );
    verify_private(&private, &private_path)?;
    shared.verify(&shared_path, count)
}

fn private_mapping(path: &Path) -> Outcome<Mapping> {
    let file = descriptors::open(path, libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC)
        .explain(path.display())?;
    descriptors::write_all(&file, &pattern::bytes(21, 0, LENGTH)).explain("file content")?;
    let mapping = Mapping::file(file.as_raw_fd(), 0, MAPPED, READ_WRITE, libc::MAP_PRIVATE)
        .explain("private mapping")?;
    for page in COPIED {
        mapping.fill_page(page, 22)?;
    }
    // Not copied yet, so the file's new content shows through.
    descriptors::seek(&file, 3 * PAGE as i64, libc::SEEK_SET).explain("lseek")?;
    descriptors::write_all(&file, b"late change of the file").explain("write")?;
    Ok(mapping)
}

fn verify_private(mapping: &Mapping, path: &Path) -> Outcome {
    let file = std::fs::read(path).explain(path.display())?;
    ensure!(
        file.len() == LENGTH,
        "the private file has {} bytes now",
        file.len()
    );
    for page in mapping.pages() {
        if COPIED.contains(&page) {
            // The whole last page is ours, its part beyond the end of the file as well.
            mapping.check_page(page, 22, "copied page of the private mapping")?;
        } else {
            let range = page * PAGE..(page + 1) * PAGE;
            mapping.check(
                page * PAGE,
                &file[range],
                "page of the file in the private mapping",
            )?;
        }
    }
    mapping.check(3 * PAGE, b"late change", "late change of the file")?;
    ensure!(
        file[5 * PAGE..6 * PAGE] == pattern::bytes(21, 5 * PAGE as u64, PAGE),
        "a private change reached the file"
    );
    mapping.fill_page(4, 23)?;
    let after = std::fs::read(path).explain(path.display())?;
    ensure!(after == file, "the private mapping became shared");
    mapping.check_page(4, 23, "page copied after the restart")
}

/// Three mappings of one file: all of it, part of it at an offset, and read-only.
struct Shared {
    whole: Mapping,
    part: Mapping,
    read_only: Mapping,
}

impl Shared {
    fn set_up(path: &Path) -> Outcome<Shared> {
        let file = descriptors::open(path, libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC)
            .explain(path.display())?;
        let mut content = pattern::bytes(24, 0, LENGTH);
        content[7 * PAGE..7 * PAGE + 8].fill(0);
        descriptors::write_all(&file, &content).explain("file content")?;
        let reader = descriptors::open(path, libc::O_RDONLY).explain(path.display())?;
        let map = |descriptor, offset, length, protection| {
            Mapping::file(descriptor, offset, length, protection, libc::MAP_SHARED)
                .explain("shared mapping")
        };
        let shared = Shared {
            whole: map(file.as_raw_fd(), 0, MAPPED, READ_WRITE)?,
            part: map(file.as_raw_fd(), SHARED_OFFSET, 2 * PAGE, READ_WRITE)?,
            read_only: map(reader.as_raw_fd(), 0, PAGE, libc::PROT_READ)?,
        };
        shared.whole.fill_page(1, 25)?;
        Ok(shared)
    }

    fn verify(&self, path: &Path, count: u64) -> Outcome {
        let mut expected = pattern::bytes(24, 0, LENGTH);
        expected[PAGE..2 * PAGE].copy_from_slice(&pattern::bytes(25, PAGE as u64, PAGE));
        expected[7 * PAGE..7 * PAGE + 8].copy_from_slice(&count.to_le_bytes());
        self.whole.check(0, &expected, "shared mapping")?;
        let file = std::fs::read(path).explain(path.display())?;
        ensure!(
            file == expected,
            "the shared file's content differs from its mapping"
        );

        // One object: mapping -> file, mapping -> other mapping, file -> mapping.
        self.part.write(10, b"through the part").explain("part")?;
        self.whole
            .check(SHARED_OFFSET + 10, b"through the part", "the whole mapping")?;
        let file = descriptors::open(path, libc::O_RDWR).explain(path.display())?;
        descriptors::seek(&file, (SHARED_OFFSET + 10) as i64, libc::SEEK_SET).explain("lseek")?;
        let seen = descriptors::read_exactly(&file, 16).explain("read")?;
        ensure!(
            seen == b"through the part",
            "a write to the mapping did not reach the file"
        );
        descriptors::write_all(&file, b"through the file").explain("write")?;
        self.part.check(
            26,
            b"through the file",
            "a write to the file seen in the mapping",
        )?;
        self.read_only
            .check(0, &expected[..PAGE], "read-only shared mapping")?;
        // The file was open for reading only, which the mapping must remember.
        let upgrade = self.read_only.protect(0, PAGE, READ_WRITE);
        ensure!(
            upgrade.is_err(),
            "the read-only shared mapping can be made writable"
        );
        Ok(())
    }
}
