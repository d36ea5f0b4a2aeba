//! What a driver of the handover has still to do: one action at a time, in order. One that failed
//! is tried again after a pause, and nothing after it happens meanwhile.

use crate::units::Nanos;
use std::collections::VecDeque;

/// A driver's actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agenda<A> {
    queue: VecDeque<A>,
    doing: Option<A>,
    /// The first action of the queue is not tried before; and the pause after it.
    again: Option<Nanos>,
    pause: u64,
    /// First and longest pause between two tries of the same action.
    pauses: (u64, u64),
    /// What is being tried again, and why it does not succeed.
    pub(super) trouble: Option<String>,
}

impl<A: Clone + PartialEq> Agenda<A> {
    pub(super) fn new(pauses: (u64, u64)) -> Self {
        Self { queue: VecDeque::new(), doing: None, again: None, pause: pauses.0, pauses, trouble: None }
    }

    /// Whether an action is under way, of which it is not known yet what it came to.
    pub(super) fn is_busy(&self) -> bool {
        self.doing.is_some()
    }

    /// What comes next.
    pub(super) fn first(&self) -> Option<&A> {
        self.queue.front()
    }

    /// Whether it may be done now.
    pub(super) fn is_due(&self, now: Nanos) -> bool {
        self.again.is_none_or(|at| at <= now) && !self.queue.is_empty()
    }

    /// When it may, if it has failed before.
    pub(super) fn wake(&self) -> Option<Nanos> {
        self.again.filter(|_| !self.queue.is_empty())
    }

    pub(super) fn take(&mut self) -> Option<A> {
        self.queue.pop_front()
    }

    /// This is being done from now on.
    pub(super) fn begin(&mut self, action: Option<A>) -> Option<A> {
        self.doing.clone_from(&action);
        action
    }

    /// It is known what the action under way came to.
    pub(super) fn end(&mut self) -> Option<A> {
        self.doing.take()
    }

    pub(super) fn then(&mut self, actions: impl IntoIterator<Item = A>) {
        self.queue.extend(actions);
    }

    /// After what is to be done already, unless it is among that.
    pub(super) fn once(&mut self, action: A) {
        if !self.queue.contains(&action) {
            self.queue.push_back(action);
        }
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
    }

    /// What was still to be done is not any more; this is.
    pub(super) fn instead(&mut self, action: A) {
        self.clear();
        self.went();
        self.queue.push_back(action);
    }

    /// What failed before does not any more.
    pub(super) fn went(&mut self) {
        (self.again, self.pause, self.trouble) = (None, self.pauses.0, None);
    }

    pub(super) fn try_again(&mut self, action: A, why: String, now: Nanos) {
        self.trouble = Some(why);
        self.queue.push_front(action);
        self.again = Some(after(now, self.pause));
        self.pause = (self.pause * 2).min(self.pauses.1);
    }
}

pub(super) fn after(now: Nanos, pause: u64) -> Nanos {
    Nanos(now.0.saturating_add(pause))
}
