//! Agents as they are, with a scripted coordinator and a scripted engine: members, epochs with a
//! partner's copy, restore from it, leases, faults, and a restart of the agent.
//!
//! Needs root. The test binary is its own capsule and engine.
#![allow(
    clippy::unwrap_used,
    reason = "tests, though not marked as such: see main"
)]

mod cluster;
mod engine;
mod epochs;
mod members;
mod restores;
mod steps;

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use epochs::{a_dead_engine, a_hold_ends_by_its_lease, an_abort, no_partner};
use members::{a_check, a_member_runs, a_restart, an_end_unseen, an_older_term};
use restores::{a_missing_image, a_real_tree, an_epoch};

const REAL_ENGINE: &str = "real-engine";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("capsule") => return crcoord_agent::capsule::main(),
        Some("engine") => {
            // A copy of this program under another name is the real engine.
            let name = std::fs::read_link("/proc/self/exe").unwrap();
            match name.ends_with(REAL_ENGINE) {
                true => crcoord_engine::serve::main().unwrap(),
                false => engine::serve(),
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let filter = arguments.iter().skip(1).find(|one| !one.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let outcome = catch_unwind(AssertUnwindSafe(test));
        println!(
            "test {name} ... {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        failed += u32::from(outcome.is_err());
    }
    ExitCode::from(u8::from(failed > 0))
}

const TESTS: &[(&str, fn())] = &[
    ("a_member_runs_and_its_output_and_end_are_told", || {
        run(a_member_runs())
    }),
    (
        "an_epoch_is_sealed_here_and_at_the_partner_and_restored_elsewhere",
        || run(an_epoch()),
    ),
    ("a_real_tree_goes_on_after_a_restore", || run(a_real_tree())),
    ("a_hold_ends_by_its_lease_and_poisons_its_epoch", || {
        run(a_hold_ends_by_its_lease())
    }),
    ("a_dead_engine_is_told_and_the_member_lives", || {
        run(a_dead_engine())
    }),
    (
        "an_unreachable_partner_fails_the_epoch_and_leaves_nothing",
        || run(no_partner()),
    ),
    ("an_abort_works_in_every_phase", || run(an_abort())),
    (
        "a_damaged_or_missing_image_is_refused_and_nothing_is_left",
        || run(a_missing_image()),
    ),
    ("an_agent_that_restarts_finds_its_members", || {
        run(a_restart())
    }),
    ("an_end_that_no_agent_saw_is_told", || run(an_end_unseen())),
    ("an_older_term_is_refused", || run(an_older_term())),
    ("a_check_finds_what_there_is", || run(a_check())),
];

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}
