//! A file that grows while the program waits: after a restart it holds exactly the lines the program wrote.

use std::fs;

use crcoord_zoo::{Explain, Outcome, Stage, descriptors, ensure, ensure_equal, pattern};

pub fn run(stage: &Stage) -> Outcome {
    let path = stage.file("log");
    // Not O_APPEND: the position decides where a line goes.
    let file = descriptors::open(&path, libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC)
        .explain(path.display())?;
    let mut lines = 0_u64;
    let mut write_line = || -> Outcome<u64> {
        // Lines of a life after the cut would lie beyond: they must be gone before the next write covers them.
        let position = descriptors::position(&file).explain("lseek")?;
        let length = fs::metadata(&path).explain(path.display())?.len();
        ensure_equal!(
            length,
            position,
            "length of the file against the position in it"
        );
        descriptors::write_all(&file, line(lines).as_bytes()).explain("write")?;
        lines += 1;
        Ok(lines)
    };
    for _ in 0..100 {
        write_line()?;
    }
    stage.ready()?;
    let mut written = 100;
    stage.work_until_go(|| {
        written = write_line()?;
        Ok(())
    })?;

    let expected: String = (0..written).map(line).collect();
    let found = fs::read_to_string(&path).explain(path.display())?;
    ensure_equal!(found.lines().count() as u64, written, "lines in the file");
    ensure!(
        found == expected,
        "the file has other lines than were written"
    );
    let position = descriptors::position(&file).explain("lseek")?;
    ensure_equal!(position, expected.len() as u64, "position in the file");
    write_line()?;
    let length = fs::metadata(&path).explain(path.display())?.len();
    ensure_equal!(
        length,
        position + line(written).len() as u64,
        "length after one more line"
    );
    Ok(())
}

fn line(number: u64) -> String {
    format!("line {number} {:016x}\n", pattern::word(81, number))
}
