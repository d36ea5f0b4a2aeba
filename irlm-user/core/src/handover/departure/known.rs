//! What a departure knows of its disk, of the copy here, and of the target.

use super::memory::Memory;
use crate::account::Tally;
use crate::handover::{GuestState, SourceState};
use crate::units::Nanos;
use crate::wire::messages::Word;

/// What a restart would find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) written: SourceState,
    /// Or, instead, one of the writes that failed since and may have come to disk all the same.
    pub(super) maybe: Vec<SourceState>,
    /// A state that is only written for order's sake, and when.
    pub(super) rewrite: Option<(SourceState, Nanos)>,
}

impl Disk {
    pub(super) fn of(written: SourceState) -> Self {
        Self { written, maybe: Vec::new(), rewrite: None }
    }
}

/// The copy here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Here {
    /// What was seen of it when it was taken back.
    pub(super) left: Option<GuestState>,
    /// The VM has been stopped for its last pages, and may have run on since.
    pub(super) stopped: bool,
    pub(super) ran_on: bool,
    /// Its process has ended.
    pub(super) gone: bool,
    /// And may have run on after it was given up, or while that was under way: the target's copy may be
    /// older. Only an operator can choose.
    pub(super) behind: bool,
    /// It was seen to stand still since it was given up, and the target has been heard all the
    /// time. If not, it is looked at before it is said once more that it was given up.
    pub(super) seen: bool,
    /// It was given up, and somebody has continued it by hand: how that stands. Only an operator
    /// can choose.
    pub(super) claimed: Option<GuestState>,
    /// Post-copy: pages of its memory are lost.
    pub(super) pages_lost: bool,
}

impl Here {
    pub(super) fn new() -> Self {
        Self {
            left: None,
            stopped: false,
            ran_on: false,
            gone: false,
            behind: false,
            seen: true,
            claimed: None,
            pages_lost: false,
        }
    }
}

/// The target, as far as it was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) connected: bool,
    /// When it is called next, and the pause after that.
    pub(super) call: Option<(Nanos, u64)>,
    /// It has said that it has a copy.
    pub(super) loaded: bool,
    /// Post-copy: it runs the VM.
    pub(super) runs: bool,
    /// It has lost its copy; why.
    pub(super) lost: Option<String>,
    /// What the pages come to that it was sent.
    pub(super) sent: Option<Tally>,
    /// It has said the same of those that it has.
    pub(super) proven: bool,
    /// It has said something else, in one line. It never runs it unless an operator says so.
    pub(super) differs: Option<String>,
    /// What both ends read in memory.
    pub(super) memory: Memory,
}

impl Target {
    pub(super) fn new() -> Self {
        Self {
            connected: true,
            call: None,
            loaded: false,
            runs: false,
            lost: None,
            sent: None,
            proven: false,
            differs: None,
            memory: Memory::default(),
        }
    }

    /// Whether what it says of its pages is something else than was sent. `must`: it has to say so, because the VM can still
    /// stay. One that was started anew does not know it any more.
    pub(super) fn differs_by(&mut self, word: &Word, must: bool) -> bool {
        let (Word::Loaded(made) | Word::Ready(made)) = word else { return false };
        if must {
            self.memory.unsaid();
        }
        // What cannot be known is no difference where nothing can stay.
        if let Some(why) = self.memory.fault().filter(|_| must || self.memory.is_other()) {
            self.differs = Some(why.to_owned());
            return true;
        }
        let Some(sent) = self.sent else { return false };
        match made {
            Some(made) if *made == sent => {
                self.proven = true;
                return false;
            }
            // Some of its pages still wait for what others bring.
            None if !must || matches!(word, Word::Ready(_)) => return false,
            Some(made) => {
                self.differs = Some(format!(
                    "the pages that arrived are not those that were sent (sent: {sent}; arrived: {made}), so they are not run"
                ));
            }
            None => {
                self.differs = Some("the target does not account for the pages that it was sent".to_owned());
            }
        }
        true
    }
}
