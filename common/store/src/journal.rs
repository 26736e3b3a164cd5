//! The coordinator's journal: an append-only sequence of records, each durable before `append`
//! returns and each with its own checksum, in one redb file. The coordinator's catalogue of jobs and
//! epochs is what replaying it gives.

use std::fs::OpenOptions;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use redb::backends::FileBackend;
use redb::{Database, OwnedRange, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::StoreError;
use crate::files;
use crate::staged::locked;

/// Version of the tables below.
const SCHEMA: u64 = 1;
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SCHEMA_KEY: &str = "schema";
const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
const HASH_BYTES: usize = 32;
/// Longest record, in bytes.
const RECORD_LIMIT: usize = 64 << 20;
const CACHE_BYTES: usize = 8 << 20;

/// An error of the journal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The journal's file could not be used.
    #[error(transparent)]
    File(#[from] StoreError),
    /// A newer crcoord wrote it; it is not downgraded.
    #[error("the journal {} has schema {found}, this crcoord knows {SCHEMA}", path.display())]
    TooNew {
        /// The journal.
        path: PathBuf,
        /// Its schema.
        found: u64,
    },
    /// The file as a whole is damaged, or no journal.
    #[error("the journal {} is damaged: {what}", path.display())]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// One record is damaged.
    #[error("record {sequence} of the journal {} is damaged: {what}", path.display())]
    DamagedRecord {
        /// The journal.
        path: PathBuf,
        /// The record.
        sequence: u64,
        /// What is wrong.
        what: String,
    },
    /// A record's type holds something that MessagePack cannot express.
    #[error("a record for the journal cannot be encoded: {0}")]
    Unencodable(String),
    /// A record is longer than is accepted.
    #[error("a record of {length} bytes is too long for the journal")]
    TooLong {
        /// Its length.
        length: usize,
    },
}

impl JournalError {
    /// The error as it crosses the wire.
    pub fn report(&self) -> crcoord_common::report::Report {
        use crcoord_common::report::{Class, Report};
        let report = |code, path: &Path, remedy| {
            Report::new(code, Class::Failure, self.to_string())
                .path(path.display().to_string())
                .remedy(remedy)
        };
        match self {
            JournalError::File(error) => error.report(),
            JournalError::TooNew { path, .. } => report(
                "journal-too-new",
                path,
                "use the newer crcoord or put back the backup made before its upgrade",
            ),
            JournalError::Damaged { path, .. } | JournalError::DamagedRecord { path, .. } => {
                report(
                    "journal-damaged",
                    path,
                    "put back a backup, or rebuild the journal from the stores' commit records",
                )
            }
            JournalError::TooLong { .. } | JournalError::Unencodable(_) => {
                Report::new("journal-bad-record", Class::Failure, self.to_string())
            }
        }
    }
}

/// The receipt of records that are durable: whatever depends on them may leave now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Persisted(
    /// Sequence number of the last one; the first record of a journal has 1.
    pub u64,
);

/// The journal. One process has it open at a time.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// `None` after an I/O error: redb wants the file to be opened anew.
    database: Mutex<Option<Database>>,
}

impl Journal {
    /// Opens the journal, creating it (owner only) where it is absent.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let database = open_database(path)?;
        Ok(Journal {
            path: path.to_owned(),
            database: Mutex::new(Some(database)),
        })
    }

    /// Appends records in one transaction: all of them are durable when it returns, or, after an
    /// error, none is known to be. An error does not end the journal: the next call opens it anew.
    pub fn append<R: Serialize>(&self, records: &[R]) -> Result<Persisted, JournalError> {
        let mut bodies = Vec::with_capacity(records.len());
        for record in records {
            let body = rmp_serde::to_vec_named(record)
                .map_err(|error| JournalError::Unencodable(error.to_string()))?;
            if body.len() > RECORD_LIMIT {
                return Err(JournalError::TooLong { length: body.len() });
            }
            bodies.push(body);
        }
        self.with(|database| {
            let write = database.begin_write()?;
            let mut last;
            {
                let mut table = write.open_table(RECORDS)?;
                last = table.last()?.map_or(0, |(sequence, _)| sequence.value());
                for body in bodies {
                    last += 1;
                    table.insert(last, sealed(last, body).as_slice())?;
                }
            }
            write.commit()?;
            Ok(Persisted(last))
        })
    }

    /// The last durable record's number; 0 where there is none.
    pub fn last(&self) -> Result<Persisted, JournalError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(RECORDS)?;
            let last = table.last()?.map_or(0, |(sequence, _)| sequence.value());
            Ok(Persisted(last))
        })
    }

    /// All records from number `first` on, as they are now. A gap or a damaged record is an error
    /// that names it; the records after it still follow. Drop the replay before going on: it keeps
    /// the file from being opened anew after an error.
    pub fn replay<R: DeserializeOwned>(&self, first: u64) -> Result<Replay<R>, JournalError> {
        let first = first.max(1);
        let range = self.with(|database| {
            let table = database.begin_read()?.open_table(RECORDS)?;
            Ok(table.range_owned(first..)?)
        })?;
        Ok(Replay {
            path: self.path.clone(),
            range,
            expected: first,
            records: PhantomData,
        })
    }

    /// Reads every record, checks its checksum and that none is missing; gives their number.
    pub fn verify(&self) -> Result<u64, JournalError> {
        let mut count = 0;
        for body in self.replay::<serde::de::IgnoredAny>(1)? {
            body?;
            count += 1;
        }
        Ok(count)
    }

    /// Copies the journal, as it is now, to a new file; refuses to overwrite.
    pub fn backup(&self, to: &Path) -> Result<u64, JournalError> {
        if to.exists() {
            return Err(StoreError::Exists {
                path: to.to_owned(),
            }
            .into());
        }
        let mut partial = to.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        files::remove_file(&partial)?;
        let copied = self.copy_to(&partial).and_then(|count| {
            files::rename(&partial, to)?;
            files::sync_directory(parent(to))?;
            Ok(count)
        });
        if copied.is_err() {
            // The first error is the one to tell.
            let _ = files::remove_file(&partial);
        }
        copied
    }

    fn copy_to(&self, to: &Path) -> Result<u64, JournalError> {
        let copy = open_database(to)?;
        self.with(|database| {
            let from = database.begin_read()?.open_table(RECORDS)?;
            let write = copy.begin_write()?;
            let mut count = 0;
            {
                let mut table = write.open_table(RECORDS)?;
                for entry in from.iter()? {
                    let (sequence, value) = entry?;
                    table.insert(sequence.value(), value.value())?;
                    count += 1;
                }
            }
            write.commit()?;
            Ok(count)
        })
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, JournalError> {
        let mut database = locked(&self.database);
        let open = match database.take() {
            Some(open) => open,
            None => open_database(&self.path)?,
        };
        let value = work(&open).map_err(|error| failure(&self.path, error))?;
        *database = Some(open);
        Ok(value)
    }
}

/// The records of a journal, in order.
pub struct Replay<R> {
    path: PathBuf,
    range: OwnedRange<u64, &'static [u8]>,
    expected: u64,
    records: PhantomData<fn() -> R>,
}

impl<R: DeserializeOwned> Iterator for Replay<R> {
    type Item = Result<(u64, R), JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (sequence, value) = match self.range.next()? {
            Ok((sequence, value)) => (sequence.value(), value),
            Err(error) => return Some(Err(failure(&self.path, error.into()))),
        };
        let damaged = |sequence, what: String| JournalError::DamagedRecord {
            path: self.path.clone(),
            sequence,
            what,
        };
        let expected = std::mem::replace(&mut self.expected, sequence + 1);
        if sequence != expected {
            let what = format!("it is missing; the next one is {sequence}");
            return Some(Err(damaged(expected, what)));
        }
        let Some(body) = opened(sequence, value.value()) else {
            return Some(Err(damaged(sequence, "its checksum does not match".into())));
        };
        let record = rmp_serde::from_slice(body)
            .map_err(|error| damaged(sequence, format!("it does not decode: {error}")));
        Some(record.map(|record| (sequence, record)))
    }
}

fn open_database(path: &Path) -> Result<Database, JournalError> {
    let new = !path.exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| StoreError::io("open", path, &error))?;
    let database = FileBackend::new(file)
        .and_then(|backend| {
            Database::builder()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(backend)
        })
        .map_err(|error| failure(path, error.into()))?;
    prepare(&database, path)?;
    if new {
        files::sync_directory(parent(path))?;
    }
    Ok(database)
}

/// Checks the schema and creates the tables of a new journal.
fn prepare(database: &Database, path: &Path) -> Result<(), JournalError> {
    let schema = schema_of(database).map_err(|error| failure(path, error))?;
    match schema {
        Some(SCHEMA) => return Ok(()),
        Some(found) if found > SCHEMA => {
            return Err(JournalError::TooNew {
                path: path.to_owned(),
                found,
            });
        }
        Some(found) => {
            return Err(JournalError::Damaged {
                path: path.to_owned(),
                what: format!("schema {found} never existed"),
            });
        }
        None => {}
    }
    let create = || -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        write.open_table(META)?.insert(SCHEMA_KEY, SCHEMA)?;
        write.open_table(RECORDS)?;
        write.commit()?;
        Ok(())
    };
    create().map_err(|error| failure(path, error))
}

fn schema_of(database: &Database) -> Result<Option<u64>, redb::Error> {
    match database.begin_read()?.open_table(META) {
        Ok(table) => Ok(table.get(SCHEMA_KEY)?.map(|value| value.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The body followed by the BLAKE3 hash of number and body.
fn sealed(sequence: u64, mut body: Vec<u8>) -> Vec<u8> {
    let hash = hash(sequence, &body);
    body.extend_from_slice(&hash);
    body
}

fn opened(sequence: u64, value: &[u8]) -> Option<&[u8]> {
    let (body, found) = value.split_last_chunk::<HASH_BYTES>()?;
    (hash(sequence, body) == *found).then_some(body)
}

fn hash(sequence: u64, body: &[u8]) -> [u8; HASH_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&sequence.to_le_bytes()).update(body);
    *hasher.finalize().as_bytes()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn failure(path: &Path, error: redb::Error) -> JournalError {
    let path = path.to_owned();
    match error {
        redb::Error::Io(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            JournalError::Damaged {
                path,
                what: error.to_string(),
            }
        }
        redb::Error::Io(error) => StoreError::io("use", &path, &error).into(),
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path }.into(),
        other => JournalError::Damaged {
            path,
            what: other.to_string(),
        },
    }
}
