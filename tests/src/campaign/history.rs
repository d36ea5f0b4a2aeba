//! What was seen of a VM's copies, and what may never be seen: an older copy that runs after a newer one ran. That is
//! proved by times: the newer copy's answer was here before the older one was asked. A guest's own count proves it, too,
//! of a copy that ran for less time than lies between two questions.

use std::time::Duration;

/// One look at one copy.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// When it was asked, since the run began.
    pub(super) asked: Duration,
    /// When the answer was here.
    pub(super) answered: Duration,
    /// The run state, in its monitor's word; "gone" if its process has ended.
    pub(super) state: String,
    /// The guest's own count, read right after the answer.
    pub(super) count: Option<u32>,
}

/// The word for a copy whose process has ended.
pub(super) const GONE: &str = "gone";

/// One state of a copy, for as long as it was seen so.
#[derive(Debug, Clone)]
struct Span {
    state: String,
    first: Duration,
    last: Duration,
    counts: (Option<u32>, Option<u32>),
}

/// One copy.
#[derive(Debug, Clone, Default)]
struct Copy {
    what: String,
    spans: Vec<Span>,
    /// The answer that first said it runs.
    ran: Option<Duration>,
    /// The last question whose answer was that it runs.
    asked_running: Option<Duration>,
    /// The last count, and when it was read.
    count: Option<(Duration, u32)>,
    /// The last change of the count, by when it had been read before.
    counted: Option<Duration>,
    /// Its owner himself let it run, knowing nothing of the move: what follows is not IRLM's doing.
    owners_own: bool,
}

/// A VM's copies, the oldest first, and what happened around them.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    copies: Vec<Copy>,
    notes: Vec<(Duration, String)>,
    wrong: Option<String>,
}

impl History {
    /// A further copy, newer than all others; gives its number.
    pub(super) fn add(&mut self, what: &str) -> usize {
        self.copies.push(Copy { what: what.to_owned(), ..Copy::default() });
        self.copies.len() - 1
    }

    /// Something worth telling in the story.
    pub(super) fn note(&mut self, at: Duration, what: String) {
        self.notes.push((at, what));
    }

    /// The owner lets this copy run.
    pub(super) fn owner_continues(&mut self, copy: usize, at: Duration) {
        self.copies[copy].owners_own = self.copies[copy + 1..].iter().any(|c| c.ran.is_some());
        self.note(at, format!("the owner lets {} run", self.copies[copy].what.clone()));
    }

    /// Takes a look at copy number `n`. Looks of one copy come in order, those of several may not.
    pub(super) fn see(&mut self, n: usize, seen: &Seen) {
        let copy = &mut self.copies[n];
        match copy.spans.last_mut() {
            Some(s) if s.state == seen.state => {
                s.last = seen.answered;
                s.counts.1 = seen.count;
            }
            _ => copy.spans.push(Span {
                state: seen.state.clone(),
                first: seen.answered,
                last: seen.answered,
                counts: (seen.count, seen.count),
            }),
        }
        if seen.state == "running" {
            copy.ran = copy.ran.or(Some(seen.answered));
            copy.asked_running = Some(seen.asked);
        }
        if let Some(now) = seen.count {
            if let Some((read, _)) = copy.count.filter(|(_, before)| *before != now) {
                copy.counted = Some(read);
            }
            copy.count = Some((seen.answered, now));
        }
        self.judge();
    }

    /// Looks whether an older copy ran after a newer one did.
    fn judge(&mut self) {
        if self.wrong.is_some() {
            return;
        }
        for (n, old) in self.copies.iter().enumerate() {
            for new in &self.copies[n + 1..] {
                let Some(ran) = new.ran else { continue };
                let says = old.asked_running.filter(|at| *at > ran);
                let counts = old.counted.filter(|at| *at > ran);
                let Some(at) = says.or(counts).filter(|_| !old.owners_own) else { continue };
                let both = new.spans.last().is_some_and(|s| s.state == "running");
                let how = if both { "TWO copies run" } else { "an OLD copy runs again" };
                let why = if says.is_some() { "says it runs" } else { "goes on counting" };
                self.wrong = Some(format!(
                    "{how}: {} {why} after {:.3} s, and {} ran at {:.3} s",
                    old.what,
                    at.as_secs_f64(),
                    new.what,
                    ran.as_secs_f64()
                ));
                return;
            }
        }
    }

    /// What must never be seen, if it was.
    #[must_use]
    pub(super) fn wrong(&self) -> Option<&str> {
        self.wrong.as_deref()
    }

    /// What was last seen of every copy.
    #[must_use]
    pub(super) fn last(&self) -> Vec<&str> {
        self.copies.iter().map(|c| c.spans.last().map_or("not seen", |s| s.state.as_str())).collect()
    }

    /// Whether this copy was ever seen to run.
    #[must_use]
    pub(super) fn ran(&self, copy: usize) -> bool {
        self.copies.get(copy).is_some_and(|c| c.ran.is_some())
    }

    /// Who saw what when, a line each.
    #[must_use]
    pub(super) fn story(&self) -> String {
        let mut lines: Vec<(Duration, String)> = self.notes.clone();
        for c in &self.copies {
            for s in &c.spans {
                let counts = match s.counts {
                    (Some(a), Some(b)) => format!(", its guest counts {a} to {b}"),
                    _ => String::new(),
                };
                let until = s.last.as_secs_f64();
                lines.push((s.first, format!("{}: {} until {until:.3}{counts}", c.what, s.state)));
            }
        }
        lines.sort_by_key(|l| l.0);
        lines.iter().map(|(at, what)| format!("{:9.3} {what}\n", at.as_secs_f64())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn seen(asked: u64, answered: u64, state: &str, count: u32) -> Seen {
        Seen { asked: ms(asked), answered: ms(answered), state: state.into(), count: Some(count) }
    }

    fn pair() -> History {
        let mut h = History::default();
        h.add("the source");
        h.add("the target");
        h
    }

    #[test]
    fn a_plain_move_is_right() {
        let mut h = pair();
        h.see(0, &seen(0, 1, "running", 5));
        h.see(1, &seen(0, 1, "inmigrate", 0));
        h.see(0, &seen(10, 11, "postmigrate", 9));
        // Its memory is filled from outside before it runs: a count alone says nothing of the newest copy.
        h.see(1, &seen(10, 11, "inmigrate", 9));
        h.see(1, &seen(20, 21, "running", 12));
        h.see(0, &seen(22, 23, "postmigrate", 9));
        assert_eq!(h.wrong(), None);
        assert_eq!(h.last(), ["postmigrate", "running"]);
        assert!(h.ran(1) && h.story().contains("the target: running"));
    }

    #[test]
    fn an_older_copy_that_is_asked_after_the_newer_one_answered_proves_two() {
        let mut h = pair();
        h.see(1, &seen(20, 21, "running", 12));
        h.see(0, &seen(22, 23, "running", 13));
        assert!(h.wrong().unwrap().contains("TWO copies run"), "{h:?}");
    }

    #[test]
    fn an_old_copy_that_runs_when_the_newer_one_no_longer_does_is_as_wrong() {
        let mut h = pair();
        h.see(1, &seen(20, 21, "running", 12));
        h.see(1, &seen(30, 31, "paused", 15));
        h.see(0, &seen(40, 41, "running", 9));
        assert!(h.wrong().unwrap().contains("an OLD copy"), "{h:?}");
        let mut h = pair();
        h.see(1, &seen(20, 21, "running", 12));
        h.see(1, &seen(30, 31, GONE, 15));
        h.see(0, &seen(40, 41, "running", 9));
        assert!(h.wrong().is_some());
    }

    #[test]
    fn answers_that_may_have_been_given_in_either_order_prove_nothing() {
        let mut h = pair();
        // The source was asked before the target's answer was here: it may have stopped and the target begun since.
        h.see(0, &seen(18, 30, "running", 12));
        h.see(1, &seen(20, 21, "running", 12));
        assert_eq!(h.wrong(), None);
        // Looks of two copies need not come in order.
        let mut h = pair();
        h.see(0, &seen(22, 23, "running", 13));
        h.see(1, &seen(20, 21, "running", 12));
        assert!(h.wrong().is_some());
    }

    #[test]
    fn a_guest_that_counts_between_two_looks_has_run() {
        let mut h = pair();
        h.see(0, &seen(10, 11, "paused", 9));
        h.see(1, &seen(20, 21, "running", 12));
        h.see(0, &seen(22, 23, "paused", 9));
        assert_eq!(h.wrong(), None);
        h.see(0, &seen(32, 33, "paused", 10));
        assert!(h.wrong().unwrap().contains("goes on counting"), "{h:?}");
        // But what it counted before the newer copy ran is no proof.
        let mut h = pair();
        h.see(0, &seen(10, 11, "running", 9));
        h.see(1, &seen(20, 21, "running", 12));
        h.see(0, &seen(22, 23, "paused", 11));
        assert_eq!(h.wrong(), None);
    }

    #[test]
    fn what_its_owner_himself_continues_is_not_held_against_the_move() {
        let mut h = pair();
        h.see(1, &seen(20, 21, "running", 12));
        h.owner_continues(0, ms(25));
        h.see(0, &seen(30, 31, "running", 13));
        assert_eq!(h.wrong(), None);
        // Only if the newer one ran already: otherwise nothing is wrong with it yet.
        let mut h = pair();
        h.owner_continues(0, ms(5));
        h.see(1, &seen(20, 21, "running", 12));
        h.see(0, &seen(30, 31, "running", 13));
        assert!(h.wrong().is_some());
    }

    #[test]
    fn a_third_copy_counts_as_the_newest() {
        let mut h = pair();
        h.see(1, &seen(1, 2, GONE, 0));
        h.add("the second target");
        h.see(2, &seen(20, 21, "running", 12));
        h.see(0, &seen(30, 31, "paused", 9));
        assert_eq!(h.wrong(), None);
        h.see(0, &seen(40, 41, "running", 9));
        assert!(h.wrong().is_some());
    }
}
