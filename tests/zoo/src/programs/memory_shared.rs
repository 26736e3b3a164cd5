//! Shared anonymous memory over fork: one object in several processes, two views, untouched pages.

use std::sync::atomic::{AtomicU64, Ordering};

use crcoord_zoo::memory::{Mapping, PAGE, READ_WRITE};
use crcoord_zoo::processes::{Child, End, Gate};
use crcoord_zoo::tasks::eventually;
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, pattern};

const PAGES: usize = 64;
/// The second view begins here.
const VIEW: usize = 32;
/// Every fourth page has content, the others were never touched.
const STRIDE: usize = 4;
/// Pages of the chain: parent, first child, second child, parent again.
const CHAIN: [usize; 3] = [1, 33, 62];
/// Pages where each process counts while it waits.
const COUNTERS: [usize; 3] = [2, 34, 63];

pub fn run(stage: &Stage) -> Outcome {
    let object =
        Mapping::anonymous(PAGES * PAGE, READ_WRITE, libc::MAP_SHARED).explain("shared mapping")?;
    for page in (0..PAGES).step_by(STRIDE) {
        object.fill_page(page, 11)?;
    }
    let between_children = Mapping::anonymous(4 * PAGE, READ_WRITE, libc::MAP_SHARED)
        .explain("shared mapping of the children")?;
    let first = Child::spawn(stage, "first", |gate| {
        first_child(stage, gate, object, between_children)
    })?;
    let second = Child::spawn(stage, "second", |gate| {
        second_child(stage, gate, object, between_children)
    })?;
    between_children
        .unmap(0, between_children.length())
        .explain("munmap")?;
    let view = object
        .second_view(VIEW * PAGE, 16 * PAGE)
        .explain("second view of the object")?;
    stage.ready()?;
    count_until_go(stage, object, 0)?;

    verify_content(object)?;
    for page in view.pages() {
        if (VIEW + page).is_multiple_of(STRIDE) {
            let start = ((VIEW + page) * PAGE) as u64;
            view.check(page * PAGE, &pattern::bytes(11, start, PAGE), "second view")?;
        }
    }
    let chain = |position: usize| word(object, CHAIN[position]);
    chain(0).store(1000, Ordering::SeqCst);
    eventually("answer of the first child", || {
        chain(1).load(Ordering::SeqCst) == 1001
    })?;
    // Page 33 lies in the second view as well: both must be the same memory.
    ensure_equal!(
        word(view, CHAIN[1] - VIEW).load(Ordering::SeqCst),
        1001,
        "the second view"
    );
    eventually("answer of the second child", || {
        chain(2).load(Ordering::SeqCst) == 1002
    })?;
    stage.note("chain-done")?;
    first.expect(End::Exited(0))?;
    second.expect(End::Exited(0))
}

fn first_child(stage: &Stage, gate: &Gate<'_>, object: Mapping, private: Mapping) -> Outcome<u8> {
    word(private, 0).store(77, Ordering::SeqCst);
    gate.open()?;
    count_until_go(stage, object, 1)?;
    verify_content(object)?;
    let start = word(object, CHAIN[0]);
    eventually("start of the chain", || {
        start.load(Ordering::SeqCst) == 1000
    })?;
    word(object, CHAIN[1]).store(1001, Ordering::SeqCst);
    word(private, 1).store(78, Ordering::SeqCst);
    stage.await_note("chain-done")?;
    Ok(0)
}

fn second_child(stage: &Stage, gate: &Gate<'_>, object: Mapping, private: Mapping) -> Outcome<u8> {
    // This process sees only the second half of the object.
    object.unmap(0, VIEW * PAGE).explain("munmap")?;
    gate.open()?;
    count_until_go(stage, object, 2)?;
    ensure!(object.read(0, 1).is_err(), "the unmapped half is back");
    ensure_equal!(
        word(private, 0).load(Ordering::SeqCst),
        77,
        "memory of the children only"
    );
    let before = word(object, CHAIN[1]);
    eventually("the first child's link", || {
        before.load(Ordering::SeqCst) == 1001
    })?;
    let fresh = word(private, 1);
    eventually("the first child's private word", || {
        fresh.load(Ordering::SeqCst) == 78
    })?;
    word(object, CHAIN[2]).store(1002, Ordering::SeqCst);
    stage.await_note("chain-done")?;
    Ok(0)
}

fn count_until_go(stage: &Stage, object: Mapping, who: usize) -> Outcome {
    let counter = word(object, COUNTERS[who]);
    let mut count = 0;
    stage.work_until_go(|| {
        ensure_equal!(
            counter.load(Ordering::SeqCst),
            count,
            "counter of process {who}"
        );
        count += 1;
        counter.store(count, Ordering::SeqCst);
        Ok(())
    })
}

fn verify_content(object: Mapping) -> Outcome {
    for page in object.pages() {
        if page.is_multiple_of(STRIDE) {
            object.check_page(page, 11, "shared memory")?;
        } else if !CHAIN.contains(&page) && !COUNTERS.contains(&page) {
            object.check_zero_page(page, "untouched shared page")?;
        }
    }
    Ok(())
}

/// The first word of a page.
fn word(mapping: Mapping, page: usize) -> &'static AtomicU64 {
    // SAFETY: the mapping is readable and writable until the process ends; the unmapped half of the
    // second child is never indexed there, because only pages above VIEW are asked for.
    unsafe { &mapping.words()[page * PAGE / 8] }
}
