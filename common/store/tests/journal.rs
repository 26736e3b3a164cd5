//! The journal: durable, ordered, and honest about damage.

use std::fs;

use crcoord_store::{Journal, JournalError, Persisted, StoreError};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Record {
    Intent { epoch: u64 },
    Commit { epoch: u64, digest: String },
}

fn records() -> Vec<Record> {
    (1..=20)
        .flat_map(|epoch| {
            let digest = format!("digest-of-epoch-{epoch:05}");
            [Record::Intent { epoch }, Record::Commit { epoch, digest }]
        })
        .collect()
}

#[test]
fn records_come_back_in_order() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    {
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.last().unwrap(), Persisted(0));
        assert_eq!(journal.append(&records()[..3]).unwrap(), Persisted(3));
        assert_eq!(journal.append(&records()[3..]).unwrap(), Persisted(40));
        assert!(matches!(
            Journal::open(&path),
            Err(JournalError::File(StoreError::InUse { .. }))
        ));
    }
    let journal = Journal::open(&path).unwrap();
    let back: Vec<(u64, Record)> = journal.replay(1).unwrap().map(Result::unwrap).collect();
    let expected: Vec<_> = (1..).zip(records()).collect();
    assert_eq!(back, expected);
    let tail: Vec<(u64, Record)> = journal.replay(39).unwrap().map(Result::unwrap).collect();
    assert_eq!(tail, expected[38..]);
    assert_eq!(journal.verify().unwrap(), 40);
    let copy = root.path().join("backup");
    assert_eq!(journal.backup(&copy).unwrap(), 40);
    assert!(matches!(
        journal.backup(&copy),
        Err(JournalError::File(StoreError::Exists { .. }))
    ));
    let copied = Journal::open(&copy).unwrap();
    let back: Vec<(u64, Record)> = copied.replay(1).unwrap().map(Result::unwrap).collect();
    assert_eq!(back, expected);
    use std::os::unix::fs::PermissionsExt;
    for file in [path, copy] {
        assert_eq!(
            fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}

#[test]
fn a_torn_value_is_named_and_the_rest_still_comes() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    Journal::open(&path).unwrap().append(&records()).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let needle = b"digest-of-epoch-00007";
    let places: Vec<_> = (0..bytes.len() - needle.len())
        .filter(|at| bytes[*at..].starts_with(needle))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at] ^= 1;
    }
    fs::write(&path, &bytes).unwrap();
    let journal = Journal::open(&path).unwrap();
    let back: Vec<_> = journal.replay::<Record>(1).unwrap().collect();
    assert_eq!(back.len(), 40);
    let errors: Vec<_> = back.into_iter().filter_map(Result::err).collect();
    assert!(
        matches!(
            &errors[..],
            [JournalError::DamagedRecord { sequence: 14, .. }]
        ),
        "{errors:?}"
    );
    assert!(matches!(
        journal.verify(),
        Err(JournalError::DamagedRecord { sequence: 14, .. })
    ));
}

#[test]
fn a_record_of_another_kind_is_named() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::open(&root.path().join("journal")).unwrap();
    journal.append(&["not a record"]).unwrap();
    let error = journal
        .replay::<Record>(1)
        .unwrap()
        .next()
        .unwrap()
        .unwrap_err();
    assert!(matches!(
        error,
        JournalError::DamagedRecord { sequence: 1, .. }
    ));
}

#[test]
fn a_foreign_file_is_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    for content in [b"#!/bin/sh\nexit 0\n".to_vec(), vec![0x5a; 8192]] {
        fs::write(&path, &content).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), content);
    }
}

#[test]
fn every_truncation_is_refused_or_loses_no_record_silently() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    Journal::open(&path).unwrap().append(&records()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let cut = root.path().join("cut");
    for length in (1..bytes.len()).step_by(bytes.len() / 50) {
        fs::write(&cut, &bytes[..length]).unwrap();
        if let Ok(journal) = Journal::open(&cut) {
            match journal.verify() {
                Ok(count) => assert_eq!(count, 40, "cut at {length} of {}", bytes.len()),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
}

#[test]
fn a_newer_schema_is_not_downgraded() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    drop(Journal::open(&path).unwrap());
    let database = redb::Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    write.open_table(meta).unwrap().insert("schema", 2).unwrap();
    write.commit().unwrap();
    drop(database);
    assert!(matches!(
        Journal::open(&path),
        Err(JournalError::TooNew { found: 2, .. })
    ));
}

#[test]
fn a_missing_record_is_named() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    Journal::open(&path).unwrap().append(&records()).unwrap();
    let database = redb::Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    let table = redb::TableDefinition::<u64, &[u8]>::new("records");
    write.open_table(table).unwrap().remove(5).unwrap();
    write.commit().unwrap();
    drop(database);
    let journal = Journal::open(&path).unwrap();
    let error = journal.verify().unwrap_err();
    assert!(error.to_string().contains("record 5"), "{error}");
    assert!(error.to_string().contains("missing"), "{error}");
}
