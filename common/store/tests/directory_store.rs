//! The directory store: round trips, dedupe, retention, damage, concurrency.
// Helpers outside of test functions unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crcoord_common::image::{ChunkId, Manifest, SealingKey};
use crcoord_store::{
    DirectoryStore, EncodedChunk, ImageStore, Kind, PartReader, PartSource, PartState, PartWriter,
    PutOutcome, StoreError,
};
use support::*;

fn open(root: &Path, kind: Kind) -> Arc<dyn ImageStore> {
    Arc::new(DirectoryStore::open(root, kind).unwrap())
}

fn pack_of(root: &Path, epoch: u64, member: u32) -> std::path::PathBuf {
    root.join(format!("test/42@1700000000/m{member}/e{epoch}/pack"))
}

#[test]
fn a_part_survives_closing_the_store() {
    let root = tempfile::tempdir().unwrap();
    let memory = memory(40);
    {
        let store = open(root.path(), Kind::Local);
        let sealed = save(&*store, &part(1, 0), &memory).unwrap();
        assert_eq!(sealed.chunks, 41, "40 windows and one index leaf");
        assert!(sealed.stored_bytes < 40 * 40_000, "half of it compresses");
        assert_eq!(
            store.part(&part(1, 0)).unwrap().unwrap().state,
            PartState::Sealed
        );
        store.commit(&part(1, 0), b"record").unwrap();
        store.commit(&part(1, 0), b"record").unwrap();
        assert_eq!(
            store.commit(&part(1, 0), b"other"),
            Err(StoreError::CommitConflict { part: part(1, 0) })
        );
        assert!(matches!(
            DirectoryStore::open(root.path(), Kind::Local),
            Err(StoreError::InUse { .. })
        ));
    }
    for kind in [Kind::Local, Kind::Shared, Kind::ReadOnly] {
        let store = open(root.path(), kind);
        assert_eq!(load(&store, &part(1, 0)), memory);
        assert_eq!(
            store.commit_record(&part(1, 0)).unwrap().unwrap(),
            b"record"
        );
        let parts = store.parts().unwrap();
        assert_eq!(parts.len(), 1);
        assert_eq!(
            (&parts[0].part, &parts[0].state),
            (&part(1, 0), &PartState::Committed)
        );
        assert!(store.free_bytes().unwrap() > 0);
    }
    let store = open(root.path(), Kind::ReadOnly);
    assert!(matches!(
        store.stage(&part(2, 0)),
        Err(StoreError::ReadOnly { .. })
    ));
    assert!(matches!(
        store.remove(&part(1, 0)),
        Err(StoreError::ReadOnly { .. })
    ));
    assert!(matches!(
        store.manifest(&part(9, 0)),
        Err(StoreError::NoPart { .. })
    ));
}

#[test]
fn files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let base = root.path().join("spool");
    let store = open(&base, Kind::Local);
    save(&*store, &part(1, 0), &memory(2)).unwrap();
    store.commit(&part(1, 0), b"record").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let files = files(&base);
    assert_eq!(files.len(), 4, "{files:?}");
    for file in &files {
        let path = Path::new(file);
        assert_eq!(mode(path), 0o600, "{file}");
        for directory in path.ancestors().skip(1).take_while(|d| *d != root.path()) {
            assert_eq!(mode(directory), 0o700, "{}", directory.display());
        }
    }
}

#[test]
fn one_percent_of_change_costs_about_one_percent() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let mut memory = memory(2000);
    let first = save(&*store, &part(1, 0), &memory).unwrap();
    for n in 0..20 {
        memory.insert(700 + n, window(1_000_000 + n));
    }
    let second = save(&*store, &part(2, 0), &memory).unwrap();
    assert!(
        second.chunks <= 20 + 2,
        "20 windows, a leaf and the root: {}",
        second.chunks
    );
    let percent = second.stored_bytes as f64 * 100.0 / first.stored_bytes as f64;
    assert!((0.9..1.5).contains(&percent), "{percent} %");
    assert_eq!(load(&store, &part(2, 0)), memory);
    let third = save(&*store, &part(3, 0), &memory).unwrap();
    assert_eq!(third.chunks, 0, "nothing changed");
    assert_eq!(load(&store, &part(3, 0)), memory);
}

#[test]
fn known_means_durable_and_of_the_same_member() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let memory = memory(5);
    let ids: Vec<_> = memory.values().map(|bytes| ChunkId::of(bytes)).collect();
    let staged = store.stage(&part(1, 0)).unwrap();
    let entries = write(staged.clone(), &memory).unwrap();
    assert_eq!(
        store.known(&part(1, 0), &ids).unwrap(),
        [false; 5],
        "not sealed yet"
    );
    assert!(
        staged.note_known(ids[0]).unwrap(),
        "but taken for this part"
    );
    assert_eq!(staged.chunk(ids[1]).unwrap(), memory[&1]);
    staged.seal(&encode(entries, None)).unwrap();
    assert_eq!(store.known(&part(2, 0), &ids).unwrap(), [true; 5]);
    assert_eq!(
        store.known(&part(2, 1), &ids).unwrap(),
        [false; 5],
        "another member"
    );
    let mut other = part(2, 0);
    other.job = job("43");
    assert_eq!(
        store.known(&other, &ids).unwrap(),
        [false; 5],
        "another job"
    );
    assert!(matches!(staged.put(b"more"), Err(StoreError::Ended { .. })));
    assert!(matches!(
        staged.seal(b"again"),
        Err(StoreError::Ended { .. })
    ));
    drop(staged);
    assert!(matches!(
        store.stage(&part(1, 0)),
        Err(StoreError::Exists { .. })
    ));
    store.release_memory();
    assert_eq!(
        store.known(&part(2, 0), &ids).unwrap(),
        [true; 5],
        "indexed again"
    );
}

#[test]
fn an_abandoned_part_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let before = memory(5);
    save(&*store, &part(1, 0), &before).unwrap();
    let files_before = files(root.path());
    let staged = store.stage(&part(2, 0)).unwrap();
    write(staged.clone(), &memory(50)).unwrap();
    assert_ne!(files(root.path()), files_before);
    drop(staged);
    assert_eq!(files(root.path()), files_before);
    assert_eq!(load(&store, &part(1, 0)), before);
    save(&*store, &part(2, 0), &memory(50)).unwrap();
}

#[test]
fn what_a_dead_process_left_is_cleared() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    save(&*store, &part(1, 0), &memory(5)).unwrap();
    let staged = store.stage(&part(2, 0)).unwrap();
    write(staged.clone(), &memory(9)).unwrap();
    // As after kill -9: nothing is dropped, a copy of the files stays.
    let copy = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("cp")
        .arg("-a")
        .arg(root.path().join("test"))
        .arg(copy.path())
        .status()
        .unwrap();
    assert!(status.success());
    assert!(
        files(copy.path())
            .iter()
            .any(|file| file.contains(".staging-e2-1"))
    );
    let shared = open(copy.path(), Kind::Shared);
    assert!(
        files(copy.path())
            .iter()
            .any(|file| file.contains(".staging-e2-1"))
    );
    assert_eq!(shared.parts().unwrap().len(), 1, "a staged part is no part");
    drop(shared);
    let again = open(copy.path(), Kind::Local);
    assert!(
        !files(copy.path())
            .iter()
            .any(|file| file.contains(".staging"))
    );
    assert_eq!(load(&again, &part(1, 0)), memory(5));
}

#[test]
fn retention_keeps_what_a_later_part_needs() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let mut changing = memory(100);
    save(&*store, &part(1, 0), &changing).unwrap();
    changing.insert(3, window(5000));
    save(&*store, &part(2, 0), &changing).unwrap();
    save(&*store, &part(1, 1), &memory(10)).unwrap();
    store.remove(&part(1, 0)).unwrap();
    assert!(store.part(&part(1, 0)).unwrap().is_none());
    assert!(pack_of(root.path(), 1, 0).exists(), "epoch 2 refers to it");
    assert_eq!(load(&store, &part(2, 0)), changing);
    drop(store);
    let store = open(root.path(), Kind::Local);
    assert_eq!(load(&store, &part(2, 0)), changing);
    let freed = store.remove(&part(2, 0)).unwrap();
    assert!(freed > 100 * 32768, "both packs go: {freed}");
    assert!(!pack_of(root.path(), 1, 0).exists() && !pack_of(root.path(), 2, 0).exists());
    assert_eq!(store.remove(&part(2, 0)).unwrap(), 0, "again is fine");
    store.remove(&part(1, 1)).unwrap();
    assert_eq!(files(root.path()), [""; 0]);
    assert!(
        !root.path().join("test").exists(),
        "empty directories go too"
    );
}

#[test]
fn an_aborted_epoch_takes_nothing_from_the_others() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let mut changing = memory(50);
    save(&*store, &part(1, 0), &changing).unwrap();
    let first = changing.clone();
    (0..40).for_each(|n| drop(changing.insert(n, window(9000 + n))));
    save(&*store, &part(2, 0), &changing).unwrap();
    // Epoch 3 copies the ten old chunks out of the pack of epoch 1, which is mostly dead by now.
    let third = save(&*store, &part(3, 0), &changing).unwrap();
    assert_eq!(third.chunks, 10);
    store.remove(&part(3, 0)).unwrap();
    assert_eq!(load(&store, &part(1, 0)), first);
    assert_eq!(load(&store, &part(2, 0)), changing);
}

#[test]
fn packs_stay_bounded_over_a_long_job() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let mut changing = memory(100);
    let mut full = 0;
    for epoch in 1..=60u64 {
        let sealed = save(&*store, &part(epoch, 0), &changing).unwrap();
        full = full.max(sealed.stored_bytes);
        if epoch > 2 {
            store.remove(&part(epoch - 2, 0)).unwrap();
        }
        assert_eq!(load(&store, &part(epoch, 0)), changing, "epoch {epoch}");
        let used: u64 = files(root.path())
            .iter()
            .map(|file| fs::metadata(file).unwrap().len())
            .sum();
        assert!(
            used < full * 3,
            "epoch {epoch}: {used} bytes for parts of {full}"
        );
        for n in 0..10 {
            let at = (epoch * 37 + n * 11) % 100;
            changing.insert(at, window(epoch * 1000 + n));
        }
    }
}

#[test]
fn a_stage_keeps_the_packs_it_may_refer_to() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let memory = memory(20);
    save(&*store, &part(1, 0), &memory).unwrap();
    let staged = store.stage(&part(2, 0)).unwrap();
    let entries = write(staged.clone(), &memory).unwrap();
    store.remove(&part(1, 0)).unwrap();
    staged.seal(&encode(entries, None)).unwrap();
    drop(staged);
    assert_eq!(load(&store, &part(2, 0)), memory);
}

#[test]
fn many_parts_and_many_threads_at_once() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    std::thread::scope(|scope| {
        for member in 0..6 {
            let store = &store;
            scope.spawn(move || {
                let mut memory = memory(60);
                memory.insert(member, window(777 + member));
                for epoch in 1..4 {
                    let part = part(epoch, member as u32);
                    let staged = store.stage(&part).unwrap();
                    let writer = PartWriter::new(PAGE, vec![staged.clone()]);
                    std::thread::scope(|inner| {
                        for share in 0..3 {
                            let (writer, memory) = (&writer, &memory);
                            inner.spawn(move || {
                                for (n, bytes) in memory.iter().filter(|(n, _)| **n % 3 != share) {
                                    writer.put(run(*n), bytes).unwrap();
                                }
                            });
                        }
                    });
                    staged
                        .seal(&encode(writer.finish().unwrap(), None))
                        .unwrap();
                    assert_eq!(load(store, &part), memory);
                    store
                        .remove(&support::part(epoch - 1, member as u32))
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(store.parts().unwrap().len(), 6);
}

#[test]
fn nodes_share_a_directory_without_a_lock() {
    let root = tempfile::tempdir().unwrap();
    let nodes: Vec<_> = (0..3).map(|_| open(root.path(), Kind::Shared)).collect();
    std::thread::scope(|scope| {
        for (member, store) in nodes.iter().enumerate() {
            scope.spawn(move || {
                for epoch in 1..6 {
                    save(&**store, &part(epoch, member as u32), &memory(20 + epoch)).unwrap();
                    store.remove(&part(epoch - 1, member as u32)).unwrap();
                }
            });
        }
    });
    // A node reads what another wrote after it looked last, and takes its member over.
    assert_eq!(load(&nodes[0], &part(5, 2)), memory(25));
    save(&*nodes[1], &part(6, 2), &memory(26)).unwrap();
    assert_eq!(load(&nodes[0], &part(6, 2)), memory(26));
    nodes[1].remove(&part(5, 2)).unwrap();
    assert_eq!(load(&nodes[2], &part(6, 2)), memory(26));
}

#[test]
fn damage_is_named_and_not_built_upon() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let memory = memory(30);
    save(&*store, &part(1, 0), &memory).unwrap();
    let pack = pack_of(root.path(), 1, 0);
    let mut bytes = fs::read(&pack).unwrap();
    // In the noise of some window, which is stored verbatim as LZ4 literals.
    let at = bytes
        .windows(64)
        .position(|w| w == &memory[&7][1000..1064])
        .unwrap();
    bytes[at] ^= 0x10;
    fs::write(&pack, &bytes).unwrap();
    let source = PartSource::new(store.clone(), part(1, 0));
    let manifest = decode(&store.manifest(&part(1, 0)).unwrap());
    let reader = PartReader::new(&manifest.body.memory, PAGE, &source);
    let report = reader.verify(2);
    assert_eq!(
        (report.good, report.damaged),
        (30, 1),
        "29 windows and the leaf are good"
    );
    assert_eq!(report.damage[0].window, Some(7));
    assert!(
        report.damage[0].error.to_string().contains("pack"),
        "{:?}",
        report.damage
    );
    let error = reader.read_all(2, |_, _| Ok::<_, String>(())).unwrap_err();
    assert!(
        error.to_string().contains("object 1 address 0x70000"),
        "{error}"
    );
    // The next epoch has the same page: it is stored again instead of referred to.
    let sealed = save(&*store, &part(2, 0), &memory).unwrap();
    assert_eq!(sealed.chunks, 1);
    assert_eq!(load(&store, &part(2, 0)), memory);
}

#[test]
fn a_pack_cut_off_or_exchanged_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let saved = memory(30);
    {
        let store = open(root.path(), Kind::Local);
        save(&*store, &part(1, 0), &saved).unwrap();
        save(&*store, &part(1, 1), &memory(31)).unwrap();
    }
    let pack = pack_of(root.path(), 1, 0);
    let whole = fs::read(&pack).unwrap();
    let verify = || {
        let store = open(root.path(), Kind::Local);
        let source = PartSource::new(store.clone(), part(1, 0));
        let manifest = decode(&store.manifest(&part(1, 0)).unwrap());
        PartReader::new(&manifest.body.memory, PAGE, &source).verify(2)
    };
    assert_eq!(verify().damaged, 0);
    fs::write(&pack, &whole[..whole.len() - 3000]).unwrap();
    let report = verify();
    assert!(report.damaged >= 1);
    assert!(
        report.damage[0].error.to_string().contains("no trailer"),
        "{report:?}"
    );
    // The leaf was written last and is lost with the tail; cut less, and a scan finds everything.
    fs::write(&pack, &whole[..whole.len() - 10]).unwrap();
    assert_eq!(verify().damaged, 0);
    fs::copy(pack_of(root.path(), 1, 1), &pack).unwrap();
    let report = verify();
    assert!(
        matches!(report.damage[0].error, StoreError::Foreign { .. }),
        "{report:?}"
    );
    fs::remove_file(&pack).unwrap();
    assert!(matches!(
        verify().damage[0].error,
        StoreError::Missing { .. }
    ));
}

#[test]
fn a_manifest_or_seal_that_is_not_the_sealed_one_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    save(&*store, &part(1, 0), &memory(3)).unwrap();
    save(&*store, &part(2, 0), &memory(4)).unwrap();
    let at = |epoch, name| pack_of(root.path(), epoch, 0).with_file_name(name);
    fs::copy(at(2, "manifest"), at(1, "manifest")).unwrap();
    assert!(matches!(
        store.manifest(&part(1, 0)),
        Err(StoreError::Damaged { .. })
    ));
    fs::copy(at(2, "seal"), at(1, "seal")).unwrap();
    assert!(matches!(
        store.manifest(&part(1, 0)),
        Err(StoreError::Foreign { .. })
    ));
    let mut seal = fs::read(at(2, "seal")).unwrap();
    for at_bit in 0..seal.len() * 8 {
        seal[at_bit / 8] ^= 1 << (at_bit % 8);
        fs::write(at(1, "seal"), &seal).unwrap();
        assert!(store.manifest(&part(1, 0)).is_err(), "bit {at_bit}");
        seal[at_bit / 8] ^= 1 << (at_bit % 8);
    }
    let state = store.part(&part(1, 0)).unwrap().unwrap().state;
    assert!(matches!(state, PartState::Damaged(_)), "{state:?}");
    // A seal that cannot be read may need any pack: none goes.
    store.remove(&part(2, 0)).unwrap();
    assert!(at(2, "pack").exists());
}

#[test]
fn a_part_is_copied_to_another_store_in_its_stored_form() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (from, to) = (
        open(here.path(), Kind::Local),
        open(there.path(), Kind::Local),
    );
    let mut memory = memory(50);
    let sealed = save(&*from, &part(1, 0), &memory).unwrap();
    let copy = |key: &crcoord_common::ids::PartKey| {
        let source = PartSource::new(from.clone(), key.clone());
        let encoded = from.manifest(key).unwrap();
        let manifest = decode(&encoded);
        let staged = to.stage(key).unwrap();
        let reader = PartReader::new(&manifest.body.memory, PAGE, &source);
        let copied = reader.copy_to(&*staged, 3).unwrap();
        (copied, staged.seal(&encoded).unwrap())
    };
    let (copied, twin) = copy(&part(1, 0));
    assert_eq!(
        (copied, twin.chunks, twin.stored_bytes),
        (51, 51, sealed.stored_bytes)
    );
    memory.insert(8, window(88));
    save(&*from, &part(2, 0), &memory).unwrap();
    assert_eq!(copy(&part(2, 0)).0, 2, "the new window and the leaf");
    assert_eq!(load(&to, &part(2, 0)), memory);
}

#[test]
fn a_copy_that_arrives_wrong_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let staged = store.stage(&part(1, 0)).unwrap();
    let good = EncodedChunk::encode(&window(1)).unwrap();
    let take =
        |bytes: Vec<u8>| EncodedChunk::verified(good.id, good.codec as u8, good.raw_length, bytes);
    let mut bent = good.bytes.clone();
    bent[100] ^= 1;
    assert!(matches!(take(bent), Err(StoreError::BadChunk { .. })));
    let taken = take(good.bytes.clone()).unwrap();
    assert!(matches!(staged.append(&taken).unwrap(), PutOutcome::New(_)));
    assert_eq!(staged.append(&taken).unwrap(), PutOutcome::Known);
}

#[test]
fn pages_kept_by_id_need_no_bytes() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    let memory = memory(10);
    save(&*store, &part(1, 0), &memory).unwrap();
    let staged = store.stage(&part(2, 0)).unwrap();
    let writer = PartWriter::new(PAGE, vec![staged.clone()]);
    for (n, bytes) in &memory {
        assert!(writer.keep(run(*n), ChunkId::of(bytes)).unwrap());
    }
    assert!(!writer.keep(run(99), ChunkId::of(b"unheard of")).unwrap());
    writer.put(run(50), &window(50)).unwrap();
    writer.forget(run(50).object, 50);
    assert!(matches!(
        writer.put(run(51), b"short"),
        Err(StoreError::BadRun { .. })
    ));
    let entries = writer.finish().unwrap();
    assert_eq!(entries[0].bytes, 10 * 65536);
    staged.seal(&encode(entries, None)).unwrap();
    assert_eq!(load(&store, &part(2, 0)), memory);
}

#[test]
fn a_consumer_that_gives_up_ends_the_reader() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    save(&*store, &part(1, 0), &memory(600)).unwrap();
    let source = PartSource::new(store.clone(), part(1, 0));
    let manifest = decode(&store.manifest(&part(1, 0)).unwrap());
    let mut seen = 0;
    let result = PartReader::new(&manifest.body.memory, PAGE, &source).read_all(2, |_, _| {
        seen += 1;
        if seen == 5 { Err("enough") } else { Ok(()) }
    });
    assert_eq!(result.unwrap_err().to_string(), "enough");
    assert_eq!(seen, 5);
}

#[test]
fn a_removal_that_was_interrupted_is_finished_later() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path(), Kind::Local);
    save(&*store, &part(1, 0), &memory(5)).unwrap();
    let mut changed = memory(5);
    changed.insert(0, window(100));
    save(&*store, &part(2, 0), &changed).unwrap();
    save(&*store, &part(3, 0), &memory(3)).unwrap();
    store.commit(&part(3, 0), b"record").unwrap();
    drop(store);
    // The seal goes first; a crash right after it leaves the rest.
    for epoch in [1, 3] {
        fs::remove_file(pack_of(root.path(), epoch, 0).with_file_name("seal")).unwrap();
    }
    let shared = open(root.path(), Kind::Shared);
    assert_eq!(
        shared.parts().unwrap().len(),
        1,
        "without a seal there is no part"
    );
    drop(shared);
    let store = open(root.path(), Kind::Local);
    assert!(!pack_of(root.path(), 3, 0).with_file_name("").exists());
    let names = fs::read_dir(pack_of(root.path(), 1, 0).with_file_name("")).unwrap();
    assert_eq!(
        names.count(),
        1,
        "epoch 2 needs the pack of epoch 1 and nothing else of it"
    );
    assert_eq!(load(&store, &part(2, 0)), changed);
}

/// `golden/store-v1` was written by the first version and is kept for ever.
#[test]
fn what_version_1_wrote_is_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store-v1");
    let store = open(&root, Kind::ReadOnly);
    let parts = store.parts().unwrap();
    let states: Vec<_> = parts
        .iter()
        .map(|p| (p.part.epoch.0, p.state.clone()))
        .collect();
    assert_eq!(states, [(1, PartState::Committed), (2, PartState::Sealed)]);
    for epoch in [1, 2] {
        let encoded = store.manifest(&part(epoch, 0)).unwrap();
        let manifest = Manifest::decode_any(&encoded, &SealingKey::Checksum).unwrap();
        assert_eq!(manifest.body.part, Some(part(epoch, 0)));
        let source = PartSource::new(store.clone(), part(epoch, 0));
        let mut pages = Vec::new();
        PartReader::new(&manifest.body.memory, PAGE, &source)
            .read_all(1, |run, bytes| {
                assert_eq!((run.present, bytes.len()), (0b101, 8192));
                pages.push((run.window, bytes[0], bytes[8191]));
                Ok::<_, ()>(())
            })
            .unwrap();
        pages.sort_unstable();
        let changed = if epoch == 1 { 20 } else { 99 };
        assert_eq!(pages, [(1, 10, 10), (2, changed, changed), (600, 30, 30)]);
    }
    assert_eq!(
        store.commit_record(&part(1, 0)).unwrap().unwrap(),
        b"golden"
    );
}
