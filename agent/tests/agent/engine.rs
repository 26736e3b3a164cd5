//! A scripted engine: speaks the engine's protocol over pages that it makes up, so that everything
//! around an engine can be tested without one. What goes wrong is chosen by a member address.

use std::fs::File;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use crcoord_common::ids::ObjectId;
use crcoord_common::image::{ManifestBody, MemoryEntry, PageRun, WINDOW_BYTES};
use crcoord_common::wire::control::{CaptureSummary, Preflight};
use crcoord_common::wire::engine::{FromEngine, RING_SLOTS, Slot, ToEngine};
use crcoord_common::wire::frame;
use crcoord_kernel::process_control::inherited_descriptor;
use crcoord_kernel::ring::Ring;

/// Windows of a captured tree: more than the ring has slots.
pub const WINDOWS: u64 = 700;
/// The address that makes the engine die as soon as it holds.
pub const DIES_HOLDING: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
/// The address that changes a tenth of the pages, as a later epoch does.
pub const CHANGED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));
const LIMIT: u32 = 1 << 30;

/// Serves one epoch or one restore, blocking.
pub fn serve() {
    let socket = std::os::unix::net::UnixStream::from(inherited_descriptor(3).unwrap());
    let memory = inherited_descriptor(4).unwrap();
    let ring = Ring::open(memory, RING_SLOTS, WINDOW_BYTES as usize).unwrap();
    let hear = || frame::read::<ToEngine>(&mut &socket, LIMIT).unwrap();
    let tell = |message: &FromEngine| frame::write(&mut &socket, message, LIMIT).unwrap();
    let mut changed = false;
    let mut dies = false;
    while let Some(message) = hear() {
        match message {
            ToEngine::Preflight(target) => {
                dies = target.options.members.contains(&DIES_HOLDING);
                changed = target.options.members.contains(&CHANGED);
                tell(&FromEngine::Preflighted(Preflight {
                    processes: 1,
                    ..Preflight::default()
                }));
            }
            ToEngine::Hold => {
                tell(&FromEngine::Held { freeze_us: 7 });
                if dies {
                    std::process::abort();
                }
            }
            ToEngine::Capture => {
                let memory_bytes = WINDOWS * WINDOW_BYTES;
                let summary = CaptureSummary {
                    memory_bytes,
                    ..CaptureSummary::default()
                };
                tell(&FromEngine::Captured(summary));
            }
            ToEngine::Release => {
                tell(&FromEngine::Released { frozen_us: 9 });
                give_pages(&ring, changed, &hear, &tell);
                tell(&FromEngine::Body(Box::new(body())));
            }
            ToEngine::Abort => {
                tell(&FromEngine::Done);
                return;
            }
            ToEngine::Restore(target) => return restore(&ring, *target, &hear, &tell),
            ToEngine::Free(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn body() -> ManifestBody {
    let empty = MemoryEntry {
        object: ObjectId(2),
        root: None,
        bytes: 0,
    };
    ManifestBody {
        objects: Vec::new(),
        part: None,
        node: None,
        taken: 0,
        kernel: "scripted".to_owned(),
        records: Vec::new(),
        memory: vec![empty],
    }
}

/// The pages of one window.
fn pages(window: u64, changed: bool) -> (PageRun, Vec<u8>) {
    let present = if window.is_multiple_of(3) {
        0x0f0f
    } else {
        0xffff
    };
    let run = PageRun {
        object: ObjectId(1),
        window,
        present,
    };
    let generation = u64::from(changed && window.is_multiple_of(10));
    let mut state = window * 2 + 1 + generation;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    });
    (run, bytes.take(run.bytes(4096) as usize).collect())
}

fn give_pages(
    ring: &Ring,
    changed: bool,
    hear: &dyn Fn() -> Option<ToEngine>,
    tell: &dyn Fn(&FromEngine),
) {
    let mut free: Vec<u32> = (0..RING_SLOTS).collect();
    let mut batch = Vec::new();
    for window in 0..WINDOWS {
        let slot = loop {
            match free.pop() {
                Some(slot) => break slot,
                None => {
                    if !batch.is_empty() {
                        tell(&FromEngine::Pages(std::mem::take(&mut batch)));
                    }
                    match hear() {
                        Some(ToEngine::Free(slots)) => free.extend(slots),
                        _ => return,
                    }
                }
            }
        };
        let (run, bytes) = pages(window, changed);
        ring.write(slot, &bytes).unwrap();
        batch.push(Slot { slot, run });
        if batch.len() == 50 {
            tell(&FromEngine::Pages(std::mem::take(&mut batch)));
        }
    }
    tell(&FromEngine::Pages(batch));
}

/// The restored tree is a shell that writes to the substituted stream once it may run.
fn restore(
    ring: &Ring,
    target: crcoord_common::wire::engine::RestoreTarget,
    hear: &dyn Fn() -> Option<ToEngine>,
    tell: &dyn Fn(&FromEngine),
) {
    let output = target
        .substitutions
        .iter()
        .find(|(name, _)| name == "stdout")
        .unwrap()
        .1;
    let output = File::from(inherited_descriptor(output).unwrap());
    let mut child = Command::new("nsenter")
        .args(["-t", &target.capsule.unwrap().to_string(), "-p", "sh", "-c"])
        .arg("read go && echo restored && exec sleep 1000")
        .stdin(Stdio::piped())
        .stdout(output)
        .spawn()
        .unwrap();
    assert_eq!(target.body.kernel, "scripted");
    assert_eq!(target.body.memory.len(), 2);
    tell(&FromEngine::Ready);
    let mut filled_bytes = 0;
    let mut right = true;
    while let Some(message) = hear() {
        match message {
            ToEngine::Fill(slots) => {
                for slot in &slots {
                    let changed = pages(slot.run.window, true);
                    let unchanged = pages(slot.run.window, false);
                    let bytes = ring.read(slot.slot, changed.1.len()).unwrap();
                    filled_bytes += bytes.len() as u64;
                    right &= (slot.run, bytes.clone()) == changed || (slot.run, bytes) == unchanged;
                }
                tell(&FromEngine::Freed(
                    slots.iter().map(|slot| slot.slot).collect(),
                ));
            }
            ToEngine::Filled if right => tell(&FromEngine::Built {
                root: 2,
                filled_bytes,
            }),
            ToEngine::Resume => {
                use std::io::Write;
                child.stdin.take().unwrap().write_all(b"go\n").unwrap();
                tell(&FromEngine::Resumed);
                Box::leak(Box::new(child)); // it ends with its capsule
                return;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
