//! This host's part of the share plan, between who waits for the index and who starts the group. The plan comes first, then the
//! models (decision 0017); a group that starts in between leaves with the plan alone, and one that starts before both waits a
//! little.

use crate::core::plan::{Carry, HostPlan};
use crate::flow::lock;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// See the module. Starts with nothing awaited.
#[derive(Debug, Default)]
pub(super) struct Part {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    awaited: bool,
    /// The group has left, with what there was.
    left: bool,
    /// Models to carry, and the plan.
    come: Option<(Vec<Carry>, HostPlan)>,
}

impl Part {
    /// Something is to come from now on, until [`Self::complete`].
    pub(super) fn expect(&self) {
        lock(&self.state).awaited = true;
    }

    /// Whether something is still to come.
    pub(super) fn is_awaited(&self) -> bool {
        lock(&self.state).awaited
    }

    /// The plan is here. Unless the group has left without it, `promise` makes it known; else it is given back, because
    /// nobody would push what it promises.
    pub(super) fn planned(&self, plan: HostPlan, promise: impl FnOnce(&HostPlan)) -> Result<(), HostPlan> {
        let mut state = lock(&self.state);
        if state.left {
            return Err(plan);
        }
        promise(&plan);
        state.come = Some((Vec::new(), plan));
        Ok(())
    }

    /// Models are here. Unless the group has left with the plan, `promise` makes them known; else they are not to be used,
    /// because nobody would push them. Says which.
    pub(super) fn models(&self, models: Vec<Carry>, promise: impl FnOnce(&[Carry])) -> bool {
        let mut state = lock(&self.state);
        let Some((carry, _)) = &mut state.come else { return false };
        promise(&models);
        *carry = models;
        true
    }

    /// No more is to come.
    pub(super) fn complete(&self) {
        lock(&self.state).awaited = false;
        self.changed.notify_all();
    }

    /// Takes what there is, models and plan, once it is complete or `wait` is over. Nothing if there is no plan.
    pub(super) fn take(&self, wait: Duration) -> Option<(Vec<Carry>, HostPlan)> {
        let until = Instant::now() + wait;
        let mut state = lock(&self.state);
        while state.awaited {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        state.left = true;
        state.come.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::digest::Digest;
    use crate::core::index::TargetSet;
    use crate::core::units::{HostIx, PageId};

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    fn carry(n: u8) -> Carry {
        let id = PageId { bucket: 0, index: n.into() };
        Carry { digest: Digest([n; 20]), id, first: HostIx(0), forward: TargetSet::default() }
    }

    fn plan() -> HostPlan {
        HostPlan { carry: vec![carry(1)], remote: Vec::new() }
    }

    #[test]
    fn a_group_that_starts_while_models_are_chosen_leaves_with_its_plan() {
        let part = Part::default();
        part.expect();
        part.planned(plan(), |_| {}).unwrap();
        assert_eq!(part.take(SHORT), Some((Vec::new(), plan())));
        assert!(part.is_awaited());
        let taken = part.models(vec![carry(2)], |_| panic!("nobody will push it"));
        assert!(!taken, "models that come too late are not promised");
        part.complete();
        assert_eq!(part.take(LONG), None);
    }

    #[test]
    fn a_plan_that_comes_when_the_group_has_left_without_it_is_not_promised() {
        let part = Part::default();
        part.expect();
        assert_eq!(part.take(SHORT), None);
        let back = part.planned(plan(), |_| panic!("nobody will push it"));
        assert_eq!(back, Err(plan()), "it is given back, to be withdrawn");
        assert!(!part.models(vec![carry(2)], |_| panic!("nobody will push it")));
        part.complete();
        assert_eq!(part.take(LONG), None);
    }

    #[test]
    fn a_group_that_starts_early_waits_until_all_is_there() {
        let part = Part::default();
        part.expect();
        std::thread::scope(|s| {
            let group = s.spawn(|| part.take(LONG));
            part.planned(plan(), |_| {}).unwrap();
            let mut promised = 0;
            assert!(part.models(vec![carry(2), carry(3)], |m| promised = m.len()));
            assert_eq!(promised, 2);
            std::thread::sleep(SHORT);
            assert!(!group.is_finished());
            part.complete();
            assert_eq!(group.join().unwrap(), Some((vec![carry(2), carry(3)], plan())));
        });
    }

    #[test]
    fn nobody_waits_for_what_is_not_to_come() {
        let part = Part::default();
        assert_eq!(part.take(LONG), None);
        part.expect();
        assert!(part.is_awaited());
        part.complete();
        assert!(!part.is_awaited());
        assert_eq!(part.take(LONG), None);
    }
}
