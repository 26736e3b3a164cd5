//! The journal's thread: appends what the machine hands out, in order and in batches, and answers
//! when it is durable.

use std::path::Path;
use std::sync::mpsc as blocking;
use std::thread;

use crcoord_protocol::{Input, Record, Sequence};
use crcoord_store::{Journal, JournalError};
use tokio::sync::mpsc;

use crate::driver::Message;
use crate::error::CoordinatorError;

/// The journal's file in the state directory.
const FILE: &str = "journal.redb";

/// Opens the journal and reads all of it.
pub(crate) fn open(state_dir: &Path) -> Result<(Journal, Vec<Record>), CoordinatorError> {
    let file = |source| CoordinatorError::File {
        action: "create",
        path: state_dir.to_owned(),
        source,
    };
    std::fs::create_dir_all(state_dir).map_err(file)?;
    let journal = Journal::open(&state_dir.join(FILE))?;
    let records = journal
        .replay::<Record>(1)?
        .collect::<Result<Vec<_>, JournalError>>()?;
    let records = records.into_iter().map(|(_, record)| record).collect();
    Ok((journal, records))
}

/// The way to the journal's thread.
#[derive(Debug)]
pub(crate) struct Writer {
    records: Option<blocking::Sender<(Sequence, Record)>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread. It ends when the writer is dropped, or by an error, which it tells.
    pub(crate) fn start(journal: Journal, queue: mpsc::Sender<Message>) -> Self {
        let (records, batches) = blocking::channel();
        let thread = thread::spawn(move || write(&journal, &batches, &queue));
        Writer {
            records: Some(records),
            thread: Some(thread),
        }
    }

    /// Appends a record after all before it.
    pub(crate) fn append(&self, sequence: Sequence, record: Record) {
        // The thread has ended only after it told why, and the driver is about to read that.
        if let Some(records) = &self.records {
            let _ = records.send((sequence, record));
        }
    }
}

impl Drop for Writer {
    /// Waits for the append that is under way, so that the journal is free for the next life. The
    /// queue's receiving end must be gone by then, or the thread might wait for room in it.
    fn drop(&mut self) {
        self.records = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked");
        }
    }
}

fn write(
    journal: &Journal,
    batches: &blocking::Receiver<(Sequence, Record)>,
    queue: &mpsc::Sender<Message>,
) {
    while let Ok((mut last, first)) = batches.recv() {
        let mut batch = vec![first];
        while let Ok((sequence, record)) = batches.try_recv() {
            batch.push(record);
            last = sequence;
        }
        let answer = match journal.append(&batch) {
            Ok(_) => Message::Input(Input::Persisted(last)),
            Err(error) => Message::JournalFailed(error),
        };
        let failed = matches!(answer, Message::JournalFailed(_));
        if queue.blocking_send(answer).is_err() || failed {
            return;
        }
    }
}
