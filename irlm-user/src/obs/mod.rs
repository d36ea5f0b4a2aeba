//! What every floor but core may use to be seen: the log, and figures as people read them.

// Figures as people read them.
pub mod human;
// The log.
pub mod log;
// Lines about peers, which may be many.
pub(crate) mod rare;
// Words for people that nobody may be there to read.
pub(crate) mod say;
