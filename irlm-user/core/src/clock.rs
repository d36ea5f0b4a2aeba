//! Durations between two moments of which one was stamped by somebody else's wall clock. Wall clocks step; a duration is
//! only ever the difference of two readings of one's own monotonic clock.

use super::units::Nanos;

/// How old a stamp may be to be believed, nanoseconds: what a loaded host may take to hear of an event.
const OLDEST: u64 = 1_000_000_000;

/// When an event happened by this host's monotonic clock, which is `now` when it is heard. `wall`: the wall clock when it is
/// heard, `stamp`: when it happened by the wall clock, Unix nanoseconds. A stamp that is not of the last second is of a clock
/// that was set meanwhile, or no stamp: then the event happened when it was heard.
#[must_use]
pub fn heard_at(now: Nanos, wall: u64, stamp: u64) -> Nanos {
    match wall.checked_sub(stamp) {
        Some(age) if age <= OLDEST => Nanos(now.0.saturating_sub(age)),
        _ => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn an_event_is_as_old_as_its_stamp_says_if_that_can_be() {
        let (now, wall) = (Nanos(50 * SECOND), 1_700_000_000 * SECOND);
        assert_eq!(heard_at(now, wall, wall), now);
        assert_eq!(heard_at(now, wall, wall - 7_000_000), Nanos(now.0 - 7_000_000));
        assert_eq!(heard_at(now, wall, wall - SECOND), Nanos(49 * SECOND));
        assert_eq!(heard_at(Nanos(3), wall, wall - 7), Nanos(0), "before this clock began");
    }

    #[test]
    fn a_clock_that_was_set_between_event_and_hearing_counts_for_nothing() {
        let (now, wall) = (Nanos(50 * SECOND), 1_700_000_000 * SECOND);
        for stamp in
            [wall + 1, wall + 86_400 * SECOND, wall - SECOND - 1, wall - 86_400 * SECOND, 0, u64::MAX]
        {
            assert_eq!(heard_at(now, wall, stamp), now, "{stamp}");
        }
    }
}
