//! A VM's memory, before anything is known of it.

use super::super::kvm::guest::Guest;
use crate::host::ram::GuestRam;
use std::sync::Arc;

/// A VM's memory, open for reading.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    /// Its RAM, if it can be read from outside.
    pub ram: Option<Arc<GuestRam>>,
    /// The VM with its dirty log on, if our own VMM runs it.
    pub guest: Option<Arc<Guest>>,
}
