//! How hard a connection compresses, from what its last frames took: the model is that a frame is worked on while the
//! kernel still sends the one before, so a raw byte takes the longer of the processor's time and the link's.
//!
//! What is measured of the level in force stands for the others by the ladder's figures, so that no frame is spent on
//! trying them: another level begins a new stream, and an empty window costs more than a trial tells.

use super::Mode;

/// A level, and what it costs and leaves beside level 1 (decision 0009 has the figures).
#[derive(Clone, Copy, Debug)]
struct Rung {
    level: i32,
    cost: f64,
    leaves: f64,
}

const LADDER: [Rung; 4] = [
    Rung { level: 1, cost: 1.0, leaves: 1.0 },
    Rung { level: 3, cost: 1.6, leaves: 0.93 },
    Rung { level: 6, cost: 3.2, leaves: 0.89 },
    Rung { level: 9, cost: 6.0, leaves: 0.87 },
];

/// How much a new measurement counts against the older ones.
const WEIGHT: f64 = 0.2;
/// Part of a frame's time that the link must have held it up for the link to be measured by it.
const HELD: f64 = 0.1;
/// By how much a link that holds nobody up is taken for faster with each frame, until it is seen again.
const FADE: f64 = 0.99;
/// Of the shorter of processor's and link's time, how much is not hidden behind the longer: also what makes the cheaper
/// level win where both get the same through.
const SEEN: f64 = 0.1;
/// What another level must gain to be worth a new window.
const GAIN: f64 = 0.05;
/// Frames between two changes.
const DWELL: u32 = 12;
/// Frames sent raw after which one is compressed, to learn how compressible contents are by now: where it may pay, and
/// where nothing short of a slower link would make it pay.
const TRY_SOON: u32 = 32;
const TRY_LATE: u32 = 1024;
/// How much longer than its processor time work may take before the processor counts as wanted by others.
const WANTED: f64 = 1.15;

/// What one frame took; seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// The level it was compressed with; none: raw.
    pub level: Option<i32>,
    /// Bytes of its contents.
    pub raw: usize,
    /// Of them, those that were compressed, and what they came to.
    pub squeezed: usize,
    /// See `squeezed`.
    pub small: usize,
    /// Bytes that went out.
    pub wire: usize,
    /// From the end of the frame before to the end of this one.
    pub cycle: f64,
    /// Of that, waiting for the link.
    pub held: f64,
    /// Of that, compressing.
    pub work: f64,
    /// Processor time of the compressing.
    pub work_cpu: f64,
    /// Processor time of everything else.
    pub rest_cpu: f64,
}

/// A decayed average.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, x: f64) {
        self.0 = Some(self.0.map_or(x, |old| old * (1.0 - WEIGHT) + x * WEIGHT));
    }
}

/// The level of one connection.
#[derive(Clone, Debug)]
pub struct Control {
    mode: Mode,
    /// Place in the ladder; none: raw.
    rung: Option<usize>,
    /// Frames since the last change, and raw frames since the last one that was compressed.
    since: u32,
    raw_since: u32,
    /// Seconds the link takes for a byte.
    link: Mean,
    /// Seconds level 1 takes for a byte, by the clock, and what it leaves of it.
    work: Mean,
    leaves: Mean,
    /// Part of the contents that is worth compressing.
    part: Mean,
    /// Seconds of processor time that a raw byte takes besides.
    rest: Mean,
    /// Time by the clock over processor time, of the same work.
    wanted: Mean,
}

impl Control {
    /// Begins with a fast level: what it does for the first frames tells the rest.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        let none = Mean::default();
        Self {
            mode,
            rung: Some(0),
            since: 0,
            raw_since: 0,
            link: none,
            work: none,
            leaves: none,
            part: none,
            rest: none,
            wanted: none,
        }
    }

    /// The level of the next frame; none: raw.
    #[must_use]
    pub fn level(&self) -> Option<i32> {
        match self.mode {
            Mode::Off => None,
            Mode::Level(n) => Some(n),
            Mode::Auto => match self.rung {
                Some(r) => Some(LADDER[r].level),
                None => (self.raw_since >= self.patience()).then_some(LADDER[0].level),
            },
        }
    }

    fn patience(&self) -> u32 {
        match (self.link.0, self.work.0) {
            (Some(link), Some(work)) if link < work => TRY_LATE,
            _ => TRY_SOON,
        }
    }

    /// A frame has gone out.
    pub fn told(&mut self, s: &Sample) {
        if s.raw == 0 || s.wire == 0 || self.mode != Mode::Auto {
            return;
        }
        let raw = s.raw as f64;
        self.rest.add(s.rest_cpu / raw);
        self.raw_since = self.raw_since.saturating_add(1);
        if let Some(rung) = s.level.and_then(|l| LADDER.iter().find(|r| r.level == l)) {
            self.raw_since = 0;
            self.part.add(s.squeezed as f64 / raw);
            if s.squeezed > 0 {
                let squeezed = s.squeezed as f64;
                self.work.add(s.work / squeezed / rung.cost);
                self.leaves.add(s.small as f64 / squeezed / rung.leaves);
                self.wanted.add((s.work / s.work_cpu.max(1e-9)).clamp(1.0, 4.0));
            }
        }
        let pace = s.cycle / s.wire as f64;
        if s.held >= HELD * s.cycle {
            self.link.add(pace);
        } else {
            // It was never in the way, so it is at least that fast, and perhaps faster.
            self.link.0 = Some(self.link.0.map_or(pace, |l| l.min(pace) * FADE));
        }
        self.since += 1;
        if self.since >= DWELL {
            self.choose();
        }
    }

    /// Seconds a raw byte takes at this rung.
    fn time(&self, rung: Option<usize>) -> Option<f64> {
        let (link, rest) = (self.link.0?, self.rest.0?);
        let wanted = self.wanted.0.unwrap_or(1.0);
        let (mut busy, mut wire) = (rest * wanted, 1.0);
        if let Some(r) = rung {
            let part = self.part.0?;
            busy += part * self.work.0? * LADDER[r].cost;
            wire += part * ((self.leaves.0? * LADDER[r].leaves).min(1.0) - 1.0);
        }
        let sent = link * wire;
        // Where others want the processor, they wait for what is spent here.
        let taken = (wanted - WANTED).max(0.0) * busy;
        Some(busy.max(sent) + SEEN * busy.min(sent) + taken)
    }

    fn choose(&mut self) {
        let Some(now) = self.time(self.rung) else { return };
        let all = std::iter::once(None).chain((0..LADDER.len()).map(Some));
        let best = all.filter_map(|r| Some((r, self.time(r)?))).min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((rung, time)) = best
            && rung != self.rung
            && time < now * (1.0 - GAIN)
        {
            self.rung = rung;
            self.since = 0;
            self.raw_since = 0;
        }
    }
}

#[cfg(test)]
mod tests;
