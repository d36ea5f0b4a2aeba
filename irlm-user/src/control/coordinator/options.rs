//! What a caller gives the coordinator, and what it is shown.

use super::plan::Plan;
use super::watch::{AgentView, VmView};
use crate::control::api::PrepareStatus;
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;

/// The group at its index server, as the coordinator needs it; all blocking. Nothing is decided by the kind of an error: it
/// is only told.
pub trait GroupIndex: Send {
    /// Has the share plan made over all source hosts that have registered; a line for the log.
    fn plan_now(&mut self) -> Result<String>;
    /// Has the group forgotten.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Opens the group at its index server; blocking. A seam, so that the coordinator is tested without a server.
pub type OpenIndex = Arc<dyn Fn(&Plan) -> Result<Box<dyn GroupIndex>> + Send + Sync>;

/// How a group is moved, beside its plan.
pub struct Options {
    /// Arrived VMs stay paused.
    pub leave_paused: bool,
    /// Longest wait for one answer of one agent.
    pub call_timeout: Duration,
    /// How long a VM may be in doubt before it is reported so, and an agent silent before it is waited for
    /// no longer.
    pub doubt_wait: Duration,
    /// How long nothing at all may move before it is waited for no longer.
    pub stall_wait: Duration,
    /// Opens the group at the index, if the method has one.
    pub open_index: Option<OpenIndex>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("leave_paused", &self.leave_paused).finish_non_exhaustive()
    }
}

/// What there is to show.
#[derive(Debug)]
pub enum Scene<'a> {
    /// One line for the log.
    Say(&'a str),
    /// Preparations, in the order of the plan's agents.
    Preparing(&'a [Option<PrepareStatus>]),
    /// The VMs and the agents now.
    Moving(&'a [VmView], &'a [AgentView]),
}
