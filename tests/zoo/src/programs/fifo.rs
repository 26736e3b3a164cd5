//! A named pipe: content, flags and the name stay, also where both ends are one descriptor.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use crcoord_zoo::descriptors::{self, checked};
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, pattern};

pub fn run(stage: &Stage) -> Outcome {
    let path = stage.file("pipe");
    let c_path = CString::new(path.as_os_str().as_bytes()).explain("path")?;
    // SAFETY: the path is a valid C string.
    checked(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }).explain("mkfifo")?;
    let reader = descriptors::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).explain("reader")?;
    let writer = descriptors::open(&path, libc::O_WRONLY).explain("writer")?;
    let both = descriptors::open(&path, libc::O_RDWR).explain("both")?;
    descriptors::write_all(&writer, &pattern::bytes(131, 0, 3000)).explain("write")?;
    descriptors::write_all(&both, &pattern::bytes(131, 3000, 500)).explain("write")?;
    stage.ready()?;
    stage.wait_for_go();

    let found = descriptors::read_exactly(&reader, 3500).explain("read")?;
    ensure!(found == pattern::bytes(131, 0, 3500), "wrong content");
    let error = descriptors::read(&reader, 1)
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_equal!(error, Some(libc::EAGAIN), "reading the empty fifo");
    let by_name = descriptors::open(&path, libc::O_WRONLY | libc::O_NONBLOCK).explain("by name")?;
    descriptors::write_all(&by_name, b"by name").explain("write")?;
    ensure_equal!(
        descriptors::read(&both, 100).explain("read")?,
        b"by name",
        "by name"
    );
    drop((writer, both, by_name));
    ensure!(
        descriptors::read(&reader, 1).explain("read")?.is_empty(),
        "no end of file"
    );
    Ok(())
}
