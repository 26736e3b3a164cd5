//! The lease of one held member, as the coordinator may count on it.
//!
//! The agent counts a lease from the receipt of an order, the coordinator from its sending, so the
//! coordinator's end is never the later one. Only an answered order counts.

use crate::time::Millis;

/// A held member's lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HoldLease {
    lease_ms: u64,
    /// The lease is certain up to here.
    certain_until: Millis,
    /// An order that is not answered yet: when it was sent and the lease it grants.
    unanswered: Option<(Millis, u64)>,
    next_renewal: Millis,
}

impl HoldLease {
    /// A Hold order is sent now.
    pub(crate) fn ordered(now: Millis, lease_ms: u64) -> Self {
        HoldLease {
            lease_ms,
            certain_until: end(now, lease_ms),
            unanswered: Some((now, lease_ms)),
            next_renewal: now.after(lease_ms / 3),
        }
    }

    /// The order was answered.
    pub(crate) fn answered(&mut self) {
        if let Some((sent, lease_ms)) = self.unanswered.take() {
            self.certain_until = self.certain_until.max(end(sent, lease_ms));
        }
    }

    /// The lease to ask for now, if it is time. `limit` is the end that no lease may pass.
    pub(crate) fn renew(&mut self, now: Millis, limit: Millis) -> Option<u64> {
        if self.unanswered.is_some() || now < self.next_renewal {
            return None;
        }
        let lease_ms = self.lease_ms.min(limit.since(now));
        self.next_renewal = now.after((self.lease_ms / 3).max(1));
        // A renewal must not shorten what is granted already.
        if lease_ms == 0 || end(now, lease_ms) <= self.certain_until {
            return None;
        }
        self.unanswered = Some((now, lease_ms));
        Some(lease_ms)
    }

    /// True when the member may have thawed by itself.
    pub(crate) fn is_over(&self, now: Millis) -> bool {
        now >= self.certain_until
    }

    /// When something is to be done about it.
    pub(crate) fn next_deadline(&self) -> Millis {
        match self.unanswered {
            Some(_) => self.certain_until,
            None => self.certain_until.min(self.next_renewal),
        }
    }
}

/// The end of a lease, less a twentieth: two clocks do not run equally fast.
fn end(sent: Millis, lease_ms: u64) -> Millis {
    sent.after(lease_ms - lease_ms / 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: Millis = Millis(1_000_000);

    #[test]
    fn a_renewal_counts_from_its_sending_and_only_when_answered() {
        let mut lease = HoldLease::ordered(Millis(0), 1_000);
        lease.answered();
        assert_eq!(lease.renew(Millis(300), FAR), None);
        assert_eq!(lease.renew(Millis(400), FAR), Some(1_000));
        assert!(!lease.is_over(Millis(949)));
        assert!(lease.is_over(Millis(950)), "not answered yet");
        lease.answered();
        assert!(!lease.is_over(Millis(1_349)));
        assert!(lease.is_over(Millis(1_350)));
    }

    #[test]
    fn no_renewal_reaches_beyond_the_limit() {
        let mut lease = HoldLease::ordered(Millis(0), 1_000);
        lease.answered();
        assert_eq!(
            lease.renew(Millis(400), Millis(900)),
            None,
            "it would add nothing"
        );
        assert_eq!(lease.renew(Millis(800), Millis(1_790)), Some(990));
        lease.answered();
        assert_eq!(lease.renew(Millis(1_790), Millis(1_790)), None);
    }

    #[test]
    fn one_renewal_at_a_time() {
        let mut lease = HoldLease::ordered(Millis(0), 1_000);
        assert_eq!(
            lease.renew(Millis(500), FAR),
            None,
            "the hold itself is not answered"
        );
        lease.answered();
        assert_eq!(lease.renew(Millis(500), FAR), Some(1_000));
        assert_eq!(lease.renew(Millis(900), FAR), None);
    }
}
