//! Pages shared copy-on-write by parent and child after fork: they diverge and never leak.

use std::sync::atomic::Ordering;

use crcoord_zoo::memory::{Mapping, PAGE, READ_WRITE};
use crcoord_zoo::processes::{Child, End};
use crcoord_zoo::{Explain, Outcome, Stage, ensure_equal};

const PAGES: usize = 512;
/// The page that both count in while they wait.
const COUNTER: usize = 3;

pub fn run(stage: &Stage) -> Outcome {
    let memory = Mapping::anonymous(PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE).explain("mmap")?;
    for page in memory.pages() {
        memory.fill_page(page, 31)?;
    }
    memory
        .write(COUNTER * PAGE, &[0; PAGE])
        .explain("counter")?;
    let child = Child::spawn(stage, "child", |gate| {
        for page in pages_of(1) {
            memory.fill_page(page, 32)?;
        }
        gate.open()?;
        count_until_go(stage, memory, 1000)?;
        verify(memory, 1, 32)?;
        // What the parent writes now must not be seen here.
        stage.await_note("parent-wrote")?;
        verify(memory, 1, 32)?;
        for page in memory.pages() {
            memory.fill_page(page, 34)?;
        }
        Ok(0)
    })?;
    for page in pages_of(2) {
        memory.fill_page(page, 33)?;
    }
    stage.ready()?;
    count_until_go(stage, memory, 1)?;
    verify(memory, 2, 33)?;
    for page in pages_of(2) {
        memory.fill_page(page, 35)?;
    }
    stage.note("parent-wrote")?;
    child.expect(End::Exited(0))?;
    // The child has overwritten all its pages: none of that may be here.
    verify(memory, 2, 35)
}

/// The pages that one side overwrote: every fourth, beginning with `first`; the rest stays common.
fn pages_of(first: usize) -> impl Iterator<Item = usize> {
    (first..PAGES).step_by(4)
}

fn count_until_go(stage: &Stage, memory: Mapping, step: u64) -> Outcome {
    // SAFETY: the mapping is readable and writable until the process ends.
    let counter = unsafe { &memory.words()[COUNTER * PAGE / 8] };
    let mut count = 0;
    stage.work_until_go(|| {
        count += step;
        ensure_equal!(
            counter.fetch_add(step, Ordering::SeqCst) + step,
            count,
            "counter in a page that was shared copy-on-write"
        );
        Ok(())
    })
}

fn verify(memory: Mapping, first: usize, seed: u64) -> Outcome {
    for page in memory.pages().filter(|&page| page != COUNTER) {
        let expected = if page % 4 == first { seed } else { 31 };
        memory.check_page(page, expected, "memory after fork")?;
    }
    Ok(())
}
