//! `Record`: what the coordinator journals. Replaying the records in order gives its whole durable
//! state. Variants and fields may be added, never renamed: old journals stay readable.

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, Incarnation, JobKey, MemberId, MemberKey, Term};
use crcoord_common::report::Report;
use crcoord_common::wire::member::{ExitStatus, JobSpec, Owner, Placement, Replica};
use serde::{Deserialize, Serialize};

use crate::trees::Proof;

/// A committed epoch with what it cost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommittedEpoch {
    /// The commit itself, as it is copied to the stores.
    pub record: CommitRecord,
    /// From release to seal of each member in member order, in milliseconds.
    pub stream_ms: Vec<u64>,
    /// From the request to the commit, in milliseconds.
    pub total_ms: u64,
}

/// Credentials of an adopted tree, known only once its agent has looked.
pub type AdoptedOwner = Option<Owner>;

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// A coordinator took over. Durable before it sends anything.
    TermBegan {
        /// Its term.
        term: Term,
    },
    /// A job is about to be started. Durable before any Start or Adopt.
    JobStarting {
        /// The job.
        job: JobKey,
        /// What was asked for.
        spec: JobSpec,
        /// Where its members go.
        placements: Vec<Placement>,
    },
    /// All members of the first incarnation run.
    JobRunning {
        /// The job.
        job: JobKey,
        /// Set for adopted trees.
        owner: AdoptedOwner,
    },
    /// The job never ran; its members are to be ended.
    JobFailed {
        /// The job.
        job: JobKey,
    },
    /// A member is gone, proven. Durable before its agent may forget it.
    MemberGone {
        /// The member.
        key: MemberKey,
        /// How it ended.
        status: ExitStatus,
        /// How that is known.
        proof: Proof,
        /// When it was learnt, in seconds since 1970-01-01 UTC.
        at: u64,
    },
    /// An epoch is opened. Durable before its first message.
    Intent {
        /// The job.
        job: JobKey,
        /// Its incarnation.
        incarnation: Incarnation,
        /// The epoch.
        epoch: Epoch,
        /// The coordinator's term.
        term: Term,
    },
    /// The epoch is valid. Durable before anybody is told.
    Commit(Box<CommittedEpoch>),
    /// The epoch will never be valid.
    Abort {
        /// The job.
        job: JobKey,
        /// The epoch.
        epoch: Epoch,
        /// Why.
        reasons: Vec<Report>,
    },
    /// A committed epoch is given up. Durable before any store removes it.
    Retired {
        /// The job.
        job: JobKey,
        /// The epoch.
        epoch: Epoch,
    },
    /// A part of a committed epoch is durable at one more place.
    ReplicaAdded {
        /// The job.
        job: JobKey,
        /// The epoch.
        epoch: Epoch,
        /// Whose part.
        member: MemberId,
        /// Where.
        replica: Replica,
    },
    /// A restart begins; every earlier incarnation is proven dead. Durable before any Build.
    Restarting {
        /// The job.
        job: JobKey,
        /// The new incarnation.
        incarnation: Incarnation,
        /// The epoch it comes from.
        epoch: Epoch,
        /// Where its members are built.
        placements: Vec<Placement>,
    },
    /// All members are built. Durable before any Resume: from here on one may run.
    Resuming {
        /// The job.
        job: JobKey,
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// All members of the new incarnation run.
    Resumed {
        /// The job.
        job: JobKey,
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// The restart failed; members of that incarnation are to be ended.
    RestartFailed {
        /// The job.
        job: JobKey,
        /// The incarnation.
        incarnation: Incarnation,
    },
}
