//! Memory that all groups of an agent have in common: what one is given another one lacks, until it is over.
//!
//! A share is at most half of what is left, so that a group that comes later finds something, too. A group that gets less
//! than it could use moves more bytes; nothing else becomes of it.

use crate::flow::lock;
use std::sync::{Arc, Mutex};

/// What there is for all.
#[derive(Debug)]
pub(super) struct Purse {
    left: Mutex<u64>,
}

impl Purse {
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { left: Mutex::new(bytes) })
    }

    /// As much as is wanted, as far as it can be had.
    pub(super) fn take(self: &Arc<Self>, wanted: u64) -> Share {
        let mut left = lock(&self.left);
        let bytes = wanted.min(*left / 2);
        *left -= bytes;
        Share { bytes, from: Some(self.clone()) }
    }
}

/// A part of it, which goes back when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Share {
    bytes: u64,
    from: Option<Arc<Purse>>,
}

impl Share {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some(purse) = &self.from {
            *lock(&purse.left) += self.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_group_gets_all_and_what_is_given_back_is_there_again() {
        let purse = Purse::new(1000);
        let first = purse.take(400);
        let second = purse.take(400);
        let third = purse.take(400);
        assert_eq!([first.bytes(), second.bytes(), third.bytes()], [400, 300, 150]);
        let many: Vec<Share> = (0..1000).map(|_| purse.take(400)).collect();
        assert!(many.iter().map(Share::bytes).sum::<u64>() <= 150);
        drop((first, third, many));
        assert_eq!(purse.take(u64::MAX).bytes(), 350);
        drop(second);
        assert_eq!(*lock(&purse.left), 1000);
        assert_eq!(Share::default().bytes(), 0);
    }
}
