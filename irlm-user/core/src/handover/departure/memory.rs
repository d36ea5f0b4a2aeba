//! What is known of the stopped VM's memory at both ends, where it is to be compared before the target may run (`crate::ram`).
//!
//! The target says what its memory comes to before it says that all is loaded. Until both are known and were compared, the VM is
//! not given up by word: a target that has not heard `GivenUp` never runs it, so it can be taken back whatever else was done.

use crate::ram::{Compared, PageAt, Ram};
use crate::wire::messages::Word;

/// What came of the comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is the same, but for so many clocks of KVM.
    Same { clocks: u32 },
    /// It is not, in one line.
    Differs(String),
    /// That cannot be known; why.
    Unknown(String),
}

/// The memory at both ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// It is to be compared.
    asked: bool,
    ours: Option<Ram>,
    theirs: Option<Ram>,
    compared: Option<Compared>,
    verdict: Option<Verdict>,
    /// The target has said that it has loaded the VM, and is answered once that is known.
    pub(super) loaded: Option<Word>,
}

impl Memory {
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// It cannot be compared any more, and the VM is the target's all the same.
    pub(super) fn go_without(&mut self) {
        *self = Self::default();
    }

    /// What this end's comes to.
    pub(super) fn ours(&mut self, ours: Ram) {
        if self.asked {
            self.ours = Some(ours);
            self.compare();
        }
    }

    /// What the target's does.
    pub(super) fn theirs(&mut self, theirs: Ram) {
        if self.asked {
            self.theirs = Some(theirs);
            self.compare();
        }
    }

    fn compare(&mut self) {
        let (Some(ours), Some(theirs), None) = (&self.ours, &self.theirs, &self.compared) else { return };
        let compared = ours.compare(theirs);
        let decided = compared.odd.is_empty() || compared.fault(&compared.odd).is_some();
        self.compared = Some(compared);
        if decided {
            self.spare(&[]);
        }
    }

    /// Pages that differ, and of which it is not known yet whether KVM has a clock there.
    pub(super) fn odd(&self) -> &[PageAt] {
        let waits = self.compared.as_ref().filter(|_| self.verdict.is_none());
        waits.map_or(&[], |c| &c.odd)
    }

    /// In these of them it has.
    pub(super) fn spare(&mut self, clocks: &[PageAt]) {
        let Some(compared) = self.compared.as_ref().filter(|_| self.verdict.is_none()) else { return };
        self.verdict = Some(match compared.fault(clocks) {
            None => Verdict::Same { clocks: compared.odd.len() as u32 },
            Some(why) => Verdict::Differs(why),
        });
    }

    /// That cannot be known.
    pub(super) fn unknown(&mut self, why: String) {
        if self.asked {
            self.verdict.get_or_insert(Verdict::Unknown(why));
        }
    }

    /// The target says that it is loaded, and has not said what its memory comes to.
    pub(super) fn unsaid(&mut self) {
        if self.theirs.is_none() {
            self.unknown("the target does not say what its memory comes to".to_owned());
        }
    }

    pub(super) fn has_theirs(&self) -> bool {
        self.theirs.is_some()
    }

    /// Nobody knows yet.
    pub(super) fn pending(&self) -> bool {
        self.asked && self.verdict.is_none()
    }

    /// Both are known to be the same.
    pub(super) fn same(&self) -> Option<(&Compared, u32, &Ram)> {
        let Some(Verdict::Same { clocks }) = self.verdict else { return None };
        Some((self.compared.as_ref()?, clocks, self.theirs.as_ref()?))
    }

    /// The target may not be told that it has the VM.
    pub(super) fn withholds(&self) -> bool {
        self.asked && self.same().is_none()
    }

    /// Why the target's is not run if the VM can stay where it is.
    pub(super) fn fault(&self) -> Option<&str> {
        match &self.verdict {
            Some(Verdict::Differs(why) | Verdict::Unknown(why)) => Some(why),
            _ => None,
        }
    }

    /// It was seen to be another one.
    pub(super) fn is_other(&self) -> bool {
        matches!(self.verdict, Some(Verdict::Differs(_)))
    }
}
