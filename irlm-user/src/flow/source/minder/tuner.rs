//! Keeps QEMU's switchover decision honest. QEMU stops the VM when what remains fits `downtime-limit` at the
//! rate at which its stream was taken; references let the stream run faster than the link, but the last pages
//! are mostly new content, which does not. So `downtime-limit` is scaled by the rate at which content goes
//! over stream rate (docs/decisions/0002).

use super::super::SourceVmShared;
use crate::core::hold;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What was counted by the time of a look, or between two.
#[derive(Clone, Copy, Default)]
struct Counts {
    /// Bytes taken from QEMU, and put on the wire.
    stream: u64,
    wire: u64,
    /// Contents as they were, and what they came to on the wire.
    raw: u64,
    small: u64,
}

/// Scales the downtime limit by the rate of content over stream rate.
pub(super) struct Tuner {
    limit_ms: u64,
    set_ms: u64,
    at: Instant,
    seen: Counts,
    /// The fastest the wire has been, decaying slowly: it is only meaningful when the link was busy.
    capacity: f64,
    /// The fastest that content has been, decaying likewise: the link is not all that may bound it.
    content: f64,
    /// What is left of content on the wire, of late: what compressed well before says little of the last
    /// pages.
    leaves: f64,
    /// The fastest the stream has been of late: after a pause QEMU may see that rate again at any moment.
    fastest: f64,
    pub(super) done: bool,
}

impl Tuner {
    const EVERY: Duration = Duration::from_millis(250);

    pub(super) fn new(limit_ms: u64) -> Self {
        Self {
            limit_ms,
            set_ms: limit_ms,
            at: Instant::now(),
            seen: Counts::default(),
            capacity: 0.0,
            content: 0.0,
            leaves: 1.0,
            fastest: 0.0,
            done: false,
        }
    }

    /// A new limit to set, if it differs enough from the one in force.
    pub(super) fn step(&mut self, shared: &SourceVmShared) -> Option<u64> {
        let dt = self.at.elapsed();
        if self.done || dt < Self::EVERY {
            return None;
        }
        let (raw, small) = shared.work.contents();
        let now = Counts {
            stream: shared.stream_bytes.load(Ordering::Relaxed),
            wire: shared.wire_bytes.load(Ordering::Relaxed),
            raw,
            small,
        };
        let was = std::mem::replace(&mut self.seen, now);
        let passed = Counts {
            stream: now.stream - was.stream,
            wire: now.wire - was.wire,
            raw: now.raw - was.raw,
            small: now.small - was.small,
        };
        self.at = Instant::now();
        let holds = shared.holds.load(Ordering::Relaxed) > 0;
        let ms = self.judge(passed, dt.as_secs_f64(), holds);
        if let Some(rate) = self.rate() {
            let pages = hold::allowance(rate, self.limit_ms as f64 / 1e3);
            shared.may_hold.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
        }
        ms
    }

    /// Bytes of content a second that go through, if that is known.
    fn rate(&self) -> Option<f64> {
        (self.capacity > 0.0).then(|| (self.capacity / self.leaves).min(self.content.max(self.capacity)))
    }

    fn judge(&mut self, n: Counts, seconds: f64, holds: bool) -> Option<u64> {
        self.capacity = (n.wire as f64 / seconds).max(self.capacity * 0.98);
        self.content = (n.raw as f64 / seconds).max(self.content * 0.98);
        self.fastest = (n.stream as f64 / seconds).max(self.fastest * 0.9);
        if n.raw > 0 {
            let now = (n.small as f64 / n.raw as f64).clamp(0.001, 1.0);
            // Worse counts at once, better only as it lasts.
            self.leaves = if now > self.leaves { now } else { self.leaves * 0.7 + now * 0.3 };
        }
        let rate = self.rate().filter(|_| self.fastest > 0.0)?;
        // What is held back leaves while the VM stands still, too.
        let rest = if holds { 1.0 - hold::SHARE } else { 1.0 };
        let scale = (rate / self.fastest).min(1.0) * rest;
        let ms = ((self.limit_ms as f64 * scale) as u64).max(self.limit_ms.min(10));
        if ms.abs_diff(self.set_ms) * 5 < self.set_ms {
            return None;
        }
        self.set_ms = ms;
        Some(ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second in which so many MB were taken from QEMU and sent, of them so many of content, before and
    /// after.
    fn second(t: &mut Tuner, stream: f64, wire: f64, raw: f64, small: f64) -> Option<u64> {
        let [stream, wire, raw, small] = [stream, wire, raw, small].map(|mb| (mb * 1e6) as u64);
        t.judge(Counts { stream, wire, raw, small }, 1.0, false)
    }

    #[test]
    fn the_limit_follows_the_wire_not_the_references() {
        let mut t = Tuner::new(300);
        assert_eq!(
            second(&mut t, 12.0, 12.0, 12.0, 12.0),
            None,
            "stream as fast as the wire: the limit stands"
        );
        let ms = second(&mut t, 120.0, 1.0, 0.5, 0.5).unwrap();
        assert!((20..=40).contains(&ms), "references ten times as fast: {ms} ms");
        let ms = second(&mut t, 0.0, 0.0, 0.0, 0.0);
        assert!(ms.is_none_or(|ms| ms < 60), "a held stream may burst at any moment");
        let ms = (0..40).filter_map(|_| second(&mut t, 12.0, 11.8, 11.8, 11.8)).last().unwrap();
        assert!(ms > 240, "content again, for long: {ms} ms");
        for _ in 0..1000 {
            second(&mut t, 1e6, 1e-6, 0.0, 0.0);
        }
        assert_eq!(t.set_ms, 10, "never below what any QEMU needs to stop at all");
    }

    #[test]
    fn what_is_held_back_is_taken_off_the_limit() {
        let mut t = Tuner::new(400);
        let n = Counts { stream: 12_000_000, wire: 12_000_000, raw: 12_000_000, small: 12_000_000 };
        assert_eq!(t.judge(n, 1.0, true), Some(300));
        assert_eq!(t.judge(n, 1.0, false), Some(400));
        assert_eq!(t.rate(), Some(12e6));
    }

    #[test]
    fn compressed_content_counts_as_what_it_was() {
        // 36 MB/s of content go as 12 MB/s: the stream is no faster than its content, so the limit stands.
        let mut t = Tuner::new(300);
        for _ in 0..20 {
            second(&mut t, 36.0, 12.0, 36.0, 12.0);
        }
        assert!(t.set_ms > 240, "{} ms", t.set_ms);
        // References on top do not go that fast.
        second(&mut t, 360.0, 12.0, 30.0, 10.0);
        assert!((20..=40).contains(&t.set_ms), "{} ms", t.set_ms);
        // Content that does not shrink: the link takes a third of it, whatever it took before.
        let mut t = Tuner::new(300);
        for _ in 0..20 {
            second(&mut t, 36.0, 12.0, 36.0, 12.0);
        }
        second(&mut t, 12.0, 12.0, 12.0, 12.0);
        assert!((90..=130).contains(&t.set_ms), "{} ms", t.set_ms);
        // A link that is never the bound: content goes as fast as it goes, not as fast as the link would take
        // it.
        let mut t = Tuner::new(300);
        second(&mut t, 1000.0, 1000.0, 1000.0, 1000.0);
        for _ in 0..200 {
            second(&mut t, 400.0, 120.0, 300.0, 100.0);
        }
        assert!((200..=240).contains(&t.set_ms), "{} ms", t.set_ms);
    }
}
