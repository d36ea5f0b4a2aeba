//! Whose requests are being performed. One caller has a few in hand at a time, and operators can always have some: a
//! request takes a thread, and may wait for a QEMU. Further ones wait, first come, first served. It is the same with long
//! lines while they are read.

use crate::core::quota::{Owner, Quota};
use crate::flow::lock;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The requests that may be performed at a time.
#[derive(Debug)]
pub(super) struct Turns {
    quota: Quota,
    /// Of all who are no operators.
    others: Arc<Semaphore>,
    /// Of each caller who is here: as many as there are connections.
    each: Mutex<HashMap<Owner, Weak<Semaphore>>>,
}

/// One caller's turns, for as long as it has a connection.
#[derive(Debug)]
pub(super) struct Queue {
    own: Arc<Semaphore>,
    others: Option<Arc<Semaphore>>,
}

/// A request is performed.
#[derive(Debug)]
pub(super) struct Turn {
    _own: OwnedSemaphorePermit,
    _others: Option<OwnedSemaphorePermit>,
}

impl Turns {
    /// `most` at a time, of which a caller has an eighth.
    pub(super) fn new(most: usize) -> Self {
        let quota = Quota::new(most, 8);
        Self { quota, others: Arc::new(Semaphore::new(quota.others())), each: Mutex::default() }
    }

    /// Where this caller's requests wait.
    pub(super) fn queue(&self, owner: &Owner) -> Queue {
        let mut each = lock(&self.each);
        each.retain(|_, of| of.strong_count() > 0);
        let own = each.get(owner).and_then(Weak::upgrade).unwrap_or_else(|| {
            let of = Arc::new(Semaphore::new(self.quota.of(owner)));
            each.insert(owner.clone(), Arc::downgrade(&of));
            of
        });
        let others = !matches!(owner, Owner::Operator(_));
        Queue { own, others: others.then(|| self.others.clone()) }
    }
}

impl Queue {
    /// What a turn takes, in this order.
    pub(super) fn permits(self) -> Vec<Arc<Semaphore>> {
        [Some(self.own), self.others].into_iter().flatten().collect()
    }

    /// Waits for a turn. The caller bounds the time.
    pub(super) async fn turn(&self) -> Option<Turn> {
        let own = self.own.clone().acquire_owned().await.ok()?;
        let others = match &self.others {
            Some(others) => Some(others.clone().acquire_owned().await.ok()?),
            None => None,
        };
        Some(Turn { _own: own, _others: others })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn turn(queue: &Queue) -> Option<Turn> {
        tokio::time::timeout(Duration::from_millis(20), queue.turn()).await.ok().flatten()
    }

    /// As many turns as the queue gives.
    async fn all_of(queue: &Queue) -> Vec<Turn> {
        let mut turns = Vec::new();
        while let Some(one) = turn(queue).await {
            turns.push(one);
        }
        turns
    }

    #[tokio::test]
    async fn who_asks_for_much_waits_for_himself_and_operators_wait_for_nobody_else() {
        let turns = Turns::new(16);
        let named = |name: &str| turns.queue(&Owner::Named(name.into()));
        let (a, again, b) = (named("a"), named("a"), named("b"));
        let held = all_of(&a).await;
        assert_eq!((held.len(), turn(&again).await.is_none()), (2, true), "also over another connection");
        assert!(turn(&b).await.is_some());
        let many: Vec<Queue> = ["b", "c", "d", "e", "f", "g"].iter().map(|n| named(n)).collect();
        let mut all = Vec::new();
        for queue in &many {
            all.extend(all_of(queue).await);
        }
        assert_eq!(held.len() + all.len(), 14);
        assert!(turn(&named("h")).await.is_none());
        assert!(turn(&turns.queue(&Owner::Operator("ann".into()))).await.is_some());
        drop(held);
        assert!(turn(&again).await.is_some());
        drop((a, again, b, many, all));
        let _ = named("h");
        assert_eq!(lock(&turns.each).len(), 1, "who is gone leaves nothing");
    }
}
