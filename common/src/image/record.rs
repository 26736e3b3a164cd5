//! Records: one kernel resource each, versioned, as named maps that older and newer readers can
//! tell apart.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// An encoded record of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it describes, for example `process` or `pipe`.
    pub kind: String,
    /// Version of this kind's fields, counted from 1.
    pub version: u16,
    /// The oldest version of the kind that a reader must know to use it rightly.
    pub min_reader: u16,
    /// The named map (MessagePack).
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

/// Implemented by each resource's image struct.
pub trait ImageRecord: Serialize + DeserializeOwned {
    /// The kind's name; never changes.
    const KIND: &'static str;
    /// Today's version.
    const VERSION: u16 = 1;
    /// The oldest version that a reader must know.
    const MIN_READER: u16 = 1;
}

/// A record that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A newer crcoord wrote it in a way that an older one must not guess at.
    #[error(
        "record {kind:?} needs a reader of version {min_reader}, this one knows version {known}"
    )]
    TooNew {
        /// The record's kind.
        kind: String,
        /// What it asks for.
        min_reader: u16,
        /// What this reader knows; 0 when it does not know the kind at all.
        known: u16,
    },
    /// Its body does not decode.
    #[error("record {kind:?} is damaged: {detail}")]
    Damaged {
        /// The record's kind.
        kind: String,
        /// The decoder's words.
        detail: String,
    },
}

impl Record {
    /// Encodes a resource's state.
    pub fn encode<T: ImageRecord>(state: &T) -> Record {
        let body = rmp_serde::to_vec_named(state)
            .expect("image structs hold only data that MessagePack can express");
        Record {
            kind: T::KIND.to_owned(),
            version: T::VERSION,
            min_reader: T::MIN_READER,
            body,
        }
    }

    /// True when this is a record of kind `T`.
    pub fn is<T: ImageRecord>(&self) -> bool {
        self.kind == T::KIND
    }

    /// Decodes the state; the caller has checked the kind.
    pub fn decode<T: ImageRecord>(&self) -> Result<T, RecordError> {
        if self.min_reader > T::VERSION {
            return Err(RecordError::TooNew {
                kind: self.kind.clone(),
                min_reader: self.min_reader,
                known: T::VERSION,
            });
        }
        rmp_serde::from_slice(&self.body).map_err(|error| RecordError::Damaged {
            kind: self.kind.clone(),
            detail: error.to_string(),
        })
    }
}
