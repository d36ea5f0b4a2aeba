//! Which way a group's pages go, between the coordinator's word and the host that waits for it.

use crate::flow::lock;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often it looks whether the group was cancelled meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// The group's decision, between who hears it and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Route {
    direct: Mutex<Option<bool>>,
    heard: Condvar,
}

impl Route {
    /// It is decided. The first word counts.
    pub(super) fn tell(&self, direct: bool) {
        lock(&self.direct).get_or_insert(direct);
        self.heard.notify_all();
    }

    /// Whether the group goes direct, once that was said; after `wait`, or once it is `over`: no, whatever is said later.
    pub(super) fn wait(&self, wait: Duration, over: impl Fn() -> bool) -> bool {
        let until = Instant::now() + wait;
        let mut direct = lock(&self.direct);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if direct.is_some() || left.is_zero() || over() {
                return *direct.get_or_insert(false);
            }
            direct =
                self.heard.wait_timeout(direct, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_host_goes_direct_only_if_it_is_told_to_in_time() {
        let told = |word: Option<bool>, over: bool| {
            let route = Route::default();
            if let Some(direct) = word {
                route.tell(direct);
            }
            let wait = if word.is_none() && !over { Duration::from_millis(20) } else { LONG };
            let direct = route.wait(wait, || over);
            // A word that comes later, or another one, changes nothing: what was said is prepared for.
            route.tell(!direct);
            assert_eq!(route.wait(LONG, || false), direct);
            direct
        };
        assert!(told(Some(true), false));
        assert!(!told(Some(false), false));
        assert!(!told(None, false), "nobody said so");
        assert!(!told(None, true), "the group was cancelled");
    }

    #[test]
    fn the_word_ends_the_wait() {
        let route = Route::default();
        std::thread::scope(|s| {
            let began = Instant::now();
            let waits = s.spawn(|| route.wait(LONG, || false));
            std::thread::sleep(Duration::from_millis(20));
            route.tell(true);
            assert!(waits.join().unwrap() && began.elapsed() < LONG / 2);
        });
    }
}
