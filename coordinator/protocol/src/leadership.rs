//! The term: one life of a coordinator's leadership. Raised in the journal at each start, before
//! anything is sent.

use crcoord_common::ids::{NodeName, Term};
use crcoord_common::report::{Class, Report};

/// The present term.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Leadership {
    term: Term,
}

impl Leadership {
    /// A term found in the journal.
    pub(crate) fn replay(&mut self, term: Term) {
        self.term = self.term.max(term);
    }

    /// Begins the next term and tells it.
    pub(crate) fn begin(&mut self) -> Term {
        self.term = self.term.next();
        self.term
    }

    pub(crate) fn term(&self) -> Term {
        self.term
    }

    /// Refuses an agent that has obeyed a newer coordinator: this one's journal is out of date, and
    /// what it decides could undo commits it does not know.
    pub(crate) fn admit(&self, node: &NodeName, obeyed: Term) -> Result<(), Box<Report>> {
        if obeyed <= self.term {
            return Ok(());
        }
        let (ours, theirs) = (self.term, obeyed);
        let report = Report::new(
            "coordinator-superseded",
            Class::Failure,
            format!("the agent has obeyed term {theirs}, this coordinator is in term {ours}"),
        )
        .on_node(node)
        .remedy("stop the other coordinator, or put back the newest journal");
        Err(Box::new(report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_higher_term_and_newer_coordinators_win() {
        let mut leadership = Leadership::default();
        leadership.replay(Term(4));
        assert_eq!(leadership.begin(), Term(5));
        let node = "n1".parse().unwrap();
        assert!(leadership.admit(&node, Term(5)).is_ok());
        let report = leadership.admit(&node, Term(6)).unwrap_err();
        assert_eq!(report.code, "coordinator-superseded");
    }
}
