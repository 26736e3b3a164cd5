//! A full disk: named, and nothing but the earlier parts stays.

mod support;

use std::fs;
use std::sync::Arc;

use crcoord_store::{
    DirectoryStore, ImageDirectory, ImageStore, Journal, JournalError, Kind, StoreError,
};
use support::*;

#[test]
fn a_full_disk_ends_the_part_and_nothing_else() {
    let small = SmallFilesystem::new(4 << 20);
    let store: Arc<dyn ImageStore> =
        Arc::new(DirectoryStore::open(small.path(), Kind::Local).unwrap());
    let before = memory(20);
    save(&*store, &part(1, 0), &before).unwrap();
    store.commit(&part(1, 0), b"record").unwrap();
    let (files_before, free_before) = (files(small.path()), store.free_bytes().unwrap());
    let staged = store.stage(&part(2, 0)).unwrap();
    let error = write(
        staged.clone(),
        &(0..400).map(|n| (n, window(n + 500))).collect(),
    );
    assert!(matches!(error, Err(StoreError::Full { .. })), "{error:?}");
    assert!(matches!(staged.put(b"x"), Err(StoreError::Full { .. })));
    assert!(matches!(staged.seal(b"x"), Err(StoreError::Full { .. })));
    drop(staged);
    assert_eq!(files(small.path()), files_before);
    assert_eq!(store.free_bytes().unwrap(), free_before);
    assert_eq!(load(&store, &part(1, 0)), before);
    save(&*store, &part(2, 0), &memory(21)).unwrap();
    assert_eq!(load(&store, &part(2, 0)), memory(21));
}

#[test]
fn a_disk_that_fills_at_any_point_of_the_seal_leaves_no_part() {
    let small = SmallFilesystem::new(8 << 20);
    let store: Arc<dyn ImageStore> =
        Arc::new(DirectoryStore::open(small.path(), Kind::Local).unwrap());
    let before = memory(20);
    save(&*store, &part(1, 0), &before).unwrap();
    let files_before = files(small.path());
    let (mut failed, mut sealed) = (0, 0);
    // Leave 0, 1, 2 .. pages for what the seal still has to write.
    for pages in 0..70u64 {
        let staged = store.stage(&part(2, 0)).unwrap();
        let entries = write(staged.clone(), &memory(25)).unwrap();
        let ballast = small.path().join("ballast");
        let free = store.free_bytes().unwrap().saturating_sub(pages * 4096);
        fs::write(&ballast, vec![1; free as usize]).unwrap();
        let result = staged.seal(&encode(entries, None));
        drop(staged);
        fs::remove_file(&ballast).unwrap();
        match result {
            Ok(_) => {
                sealed += 1;
                store.remove(&part(2, 0)).unwrap();
            }
            Err(StoreError::Full { .. }) => failed += 1,
            Err(error) => panic!("{pages}: {error}"),
        }
        let left: Vec<_> = files(small.path());
        assert_eq!(left, files_before, "with {pages} pages");
    }
    assert!(sealed > 0 && failed > 40, "{sealed} {failed}");
    assert_eq!(load(&store, &part(1, 0)), before);
}

#[test]
fn a_full_disk_ends_a_standalone_image() {
    let small = SmallFilesystem::new(1 << 20);
    let directory = small.path().join("image");
    let image = Arc::new(ImageDirectory::create(&directory).unwrap());
    let result = write(image.clone(), &memory(100));
    assert!(matches!(result, Err(StoreError::Full { .. })), "{result:?}");
    drop(image);
    assert!(!directory.exists());
}

#[test]
fn the_journal_goes_on_after_a_full_disk() {
    let small = SmallFilesystem::new(4 << 20);
    let journal = Journal::open(&small.path().join("journal")).unwrap();
    let record = "x".repeat(10_000);
    let mut written = 0u64;
    let error = loop {
        match journal.append(&[&record]) {
            Ok(persisted) => {
                written += 1;
                assert_eq!(persisted.0, written);
            }
            Err(error) => break error,
        }
        assert!(written < 1000, "a journal of 4 MiB cannot hold that");
    };
    assert!(
        matches!(error, JournalError::File(StoreError::Full { .. })),
        "{error:?}"
    );
    assert!(written > 10);
    assert_eq!(
        journal.verify().unwrap(),
        written,
        "what was promised is there"
    );
    let status = std::process::Command::new("mount")
        .args(["-o", "remount,size=16777216"])
        .arg(small.path())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(journal.append(&[&record]).unwrap().0, written + 1);
    assert_eq!(journal.verify().unwrap(), written + 1);
}
