//! The memory devices: null, zero, full, random and urandom stay open and usable.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crcoord_zoo::{Explain, Outcome, Stage, descriptors, ensure, ensure_equal};

pub fn run(stage: &Stage) -> Outcome {
    let open = |name: &str, flags: i32| -> Outcome<OwnedFd> {
        descriptors::open(Path::new(name), flags).explain(name)
    };
    let null = open("/dev/null", libc::O_RDWR | libc::O_CLOEXEC)?;
    let zero = open("/dev/zero", libc::O_RDONLY)?;
    let full = open("/dev/full", libc::O_WRONLY | libc::O_APPEND)?;
    let random = open("/dev/random", libc::O_RDONLY | libc::O_NONBLOCK)?;
    let urandom = open("/dev/urandom", libc::O_RDONLY)?;
    let describe = || -> Outcome<Vec<(i32, i32, i32)>> {
        [&null, &zero, &full, &random, &urandom]
            .into_iter()
            .map(|descriptor| {
                let status = descriptors::status_flags(descriptor).explain("F_GETFL")?;
                let flags =
                    descriptors::control(descriptor, libc::F_GETFD, 0).explain("F_GETFD")?;
                Ok((descriptor.as_raw_fd(), status, flags))
            })
            .collect()
    };
    let before = describe()?;
    let use_all = || -> Outcome {
        ensure_equal!(
            descriptors::write(&null, b"gone").explain("null")?,
            4,
            "write to null"
        );
        ensure!(
            descriptors::read(&null, 4).explain("null")?.is_empty(),
            "null gives bytes"
        );
        ensure_equal!(
            descriptors::read(&zero, 64).explain("zero")?,
            [0; 64],
            "zero"
        );
        let error = descriptors::write(&full, b"x")
            .err()
            .and_then(|error| error.raw_os_error());
        ensure_equal!(error, Some(libc::ENOSPC), "write to full");
        for descriptor in [&random, &urandom] {
            let bytes = descriptors::read(descriptor, 32).explain("random")?;
            ensure!(
                bytes.len() == 32 && bytes != [0; 32],
                "no random bytes: {bytes:?}"
            );
        }
        Ok(())
    };
    use_all()?;
    stage.ready()?;
    stage.work_until_go(use_all)?;
    ensure_equal!(describe()?, before, "numbers and flags");
    use_all()
}
