//! What an all-seeing observer notes of holds, captures and seals, and the rules it checks.

use std::collections::BTreeMap;

use crcoord_common::commit::CommitRecord;
use crcoord_common::ids::{Epoch, JobKey, MemberId, MemberKey};

#[derive(Clone, Debug, Default)]
struct Part {
    held: Option<u64>,
    captured: Option<u64>,
    thawed: Option<u64>,
    sealed: bool,
}

pub struct Ledger {
    parts: BTreeMap<(JobKey, Epoch), BTreeMap<MemberId, Part>>,
    members: u32,
    /// Longest time a member may be frozen.
    bound_ms: u64,
}

impl Ledger {
    pub fn new(members: u32, bound_ms: u64) -> Self {
        Ledger {
            parts: BTreeMap::new(),
            members,
            bound_ms,
        }
    }

    fn part(&mut self, key: &MemberKey, epoch: Epoch) -> &mut Part {
        let parts = self.parts.entry((key.job.clone(), epoch)).or_default();
        parts.entry(key.member).or_default()
    }

    pub fn hold(&mut self, now: u64, key: &MemberKey, epoch: Epoch) {
        let before = self.part(key, epoch).held.replace(now);
        assert!(before.is_none(), "{key} was held twice for epoch {epoch}");
    }

    pub fn capture(&mut self, now: u64, key: &MemberKey, epoch: Epoch) {
        self.part(key, epoch).captured = Some(now);
    }

    pub fn seal(&mut self, key: &MemberKey, epoch: Epoch) {
        self.part(key, epoch).sealed = true;
    }

    pub fn thaw(&mut self, now: u64, key: &MemberKey, epoch: Epoch) {
        let bound_ms = self.bound_ms;
        let part = self.part(key, epoch);
        part.thawed = Some(now);
        let frozen = now - part.held.unwrap();
        assert!(frozen <= bound_ms, "{key} was frozen for {frozen} ms");
    }

    /// An agent was told to release: by then all must be captured.
    pub fn released(&mut self, key: &MemberKey, epoch: Epoch) {
        let members = self.members as usize;
        let parts = self.parts.entry((key.job.clone(), epoch)).or_default();
        let captured = parts
            .values()
            .filter(|part| part.captured.is_some())
            .count();
        assert_eq!(
            captured, members,
            "{key} epoch {epoch} released before all were captured"
        );
    }

    /// An epoch was committed: it must be one consistent cut, sealed by all.
    pub fn check_commit(&self, record: &CommitRecord) {
        let what = format!("{} epoch {}", record.job, record.epoch);
        let parts = &self.parts[&(record.job.clone(), record.epoch)];
        assert_eq!(parts.len(), self.members as usize, "{what}");
        assert!(
            parts.values().all(|part| part.sealed),
            "{what} not sealed by all"
        );
        let held = parts.values().map(|part| part.held.unwrap()).max();
        let first = parts.values().map(|part| part.captured.unwrap()).min();
        let last = parts.values().map(|part| part.captured.unwrap()).max();
        let thawed = parts.values().filter_map(|part| part.thawed).min();
        assert!(
            held <= first,
            "{what}: one was captured before all were held"
        );
        assert!(
            thawed.is_none() || last <= thawed,
            "{what}: one ran before all were captured"
        );
    }
}
