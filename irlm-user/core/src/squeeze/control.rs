//! How hard a connection compresses, from what its last frames took: the model is that a frame is worked on while the
//! kernel still sends the one before, so a raw byte takes the longer of the processor's time and the link's.
//!
//! What is measured of the level in force stands for the other levels by the ladder's figures: a trial of another one would
//! begin a new stream. Only two things must be tried: the link, where it was not seen at its limit for long (a few frames
//! sent raw show it; not where TCP has seen that it is slow), and the contents, where nothing was compressed for long.

use super::Mode;

/// A level, what it costs beside level 1, and how much more it finds (decision 0009 has the figures).
#[derive(Clone, Copy, Debug)]
struct Rung {
    level: i32,
    cost: f64,
    finds: f64,
}

const LADDER: [Rung; 3] = [
    Rung { level: 1, cost: 1.0, finds: 0.0 },
    Rung { level: 3, cost: 1.3, finds: 0.051 },
    Rung { level: 6, cost: 3.9, finds: 0.122 },
];

impl Rung {
    /// What it leaves where level 1 leaves `x`: of noise as much as that.
    fn leaves(&self, x: f64) -> f64 {
        x * (1.0 - self.finds * (1.0 - x).max(0.0))
    }
    /// What level 1 leaves where this one leaves `x`, nearly.
    fn would_leave(&self, x: f64) -> f64 {
        x / (1.0 - self.finds * (1.0 - x).max(0.0))
    }
}

/// Bytes on the wire after which is judged: several times what the kernel's buffers take at once.
const SPAN: usize = 768 << 10;
/// Before anything is known: a short connection should not spend half of its bytes on finding out.
const FIRST_SPAN: usize = 192 << 10;
/// Part of a span's time that the link must have held it up to be measured by it.
const HELD: f64 = 0.15;
/// How much a new measurement counts against the older ones.
const WEIGHT: f64 = 0.2;
/// The same for the link, which has fewer of them.
const LINK_WEIGHT: f64 = 0.5;
/// Of the shorter of processor's and link's time, how much is not hidden behind the longer: also what makes the cheaper
/// level win where both get the same through.
const SEEN: f64 = 0.03;
/// What another level must gain to be worth a new window.
const GAIN: f64 = 0.02;
/// What sending raw must gain to be worth the bytes, and the part of the bytes that is not worth any work.
const RAW_GAIN: f64 = 0.01;
const TRIFLE: f64 = 0.04;
/// What the kernel takes before it makes the sender wait: `TCP_NOTSENT_LOWAT` of the data connections.
const BUFFER: usize = 128 << 10;
/// Bytes of a raw frame that shows what the link takes: more than the kernel's buffer.
const TRIAL: usize = 192 << 10;
/// Spans that the link was not in the way after which it is tried: first, and at most, doubling with each vain trial.
const TRY_LINK: u32 = 1;
const TRY_LINK_MOST: u32 = 64;
/// Where the lowest level takes less than this part of what raw takes, the link is slow: nothing is sent raw then, however
/// much others want the processor, because they wait for the link as well.
const SLOW: f64 = 0.75;
/// The same, whatever the clock says, where the processor time for a byte is less than this part of the link's time that it
/// saves: a clock says little where dozens of threads want few processors. A higher level is taken by the same rule.
const CHEAP: f64 = 0.25;
/// As [`CHEAP`], where TCP has seen what the link gives.
const CHEAP_FOR_SURE: f64 = 0.4;
/// The same where little is saved: less than this part of the link's time harms nobody, and what comes next may shrink.
const HARMLESS: f64 = 0.3;
/// And for a step up the ladder: bytes on a slow link are worth this much processor time, whatever else it is wanted for.
const TOLERABLE: f64 = 0.1;
/// Seconds of queue on the way from which on the link counts as crowded, whoever fills it: what goes raw then, others wait
/// for, even if this sender is held up by its processor and not by the link.
const CROWDED: f64 = 0.006;
/// As [`WANTED`]: from here on the processor is so short that a crowded link is not spared by it.
const STARVED: f64 = 2.0;
/// Frames sent raw after which one is compressed, to learn how compressible contents are by now: where it may pay, and
/// where nothing short of a slower link would make it pay.
const TRY_SOON: u32 = 32;
const TRY_LATE: u32 = 1024;
/// What a change may cost before it is taken back, and for how many spans that is not tried again: first, and at most.
const WORSE: f64 = 0.04;
const SHUN: u32 = 16;
const SHUN_MOST: u32 = 256;
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
    /// How much longer a round trip takes than over an empty link.
    pub queued: f64,
    /// Bytes a second that the link has been seen to give; 0: not known.
    pub rate: f64,
}

/// A decayed average.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, x: f64, weight: f64) {
        self.0 = Some(self.0.map_or(x, |old| old * (1.0 - weight) + x * weight));
    }
}

/// Frames until they come to [`SPAN`].
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    raw: usize,
    wire: usize,
    cycle: f64,
    held: f64,
    /// Bytes that met a crowded link.
    crowded: usize,
    /// Of frames larger than the kernel's buffer: how many, bytes beyond it, seconds worked and held.
    large: f64,
    beyond: f64,
    worked: f64,
    waited: f64,
}

impl Span {
    fn add(&mut self, s: &Sample) {
        self.raw += s.raw;
        self.wire += s.wire;
        self.cycle += s.cycle;
        self.held += s.held;
        self.crowded += if s.queued > CROWDED { s.wire } else { 0 };
        if s.wire > BUFFER {
            self.large += 1.0;
            self.beyond += (s.wire - BUFFER) as f64;
            self.worked += s.cycle - s.held;
            self.waited += s.held;
        }
    }

    /// Seconds that a link takes for a byte which held the sender up. If the buffer ran empty before the next frame came,
    /// the link was idle until then, and only what went beyond the buffer tells.
    fn pace(&self) -> f64 {
        let idle = self.waited / self.beyond.max(1.0);
        let emptied = self.large > 0.0 && self.worked >= self.large * BUFFER as f64 * idle;
        if emptied { idle } else { self.cycle / self.wire as f64 }
    }
}

/// What one connection has learnt of this host's processor, of the contents and of the link: where the next one begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learnt {
    /// Seconds the link takes for a byte.
    link: Mean,
    /// What TCP has seen the link give, bytes a second; 0: nothing yet.
    rate: f64,
    /// Seconds level 1 takes for a byte, by the clock and of the processor's time, and what it leaves of it.
    work: Mean,
    cpu: Mean,
    leaves: Mean,
    /// Part of the contents that is worth compressing.
    part: Mean,
    /// Seconds of processor time that a raw byte takes besides.
    rest: Mean,
    /// Time by the clock over processor time, of the same work.
    wanted: Mean,
}

fn place(rung: Option<usize>) -> usize {
    rung.map_or(0, |r| r + 1)
}

/// The level of one connection.
#[derive(Clone, Debug)]
pub struct Control {
    mode: Mode,
    /// Place in the ladder; none: raw.
    rung: Option<usize>,
    span: Span,
    /// How long it may get.
    most: usize,
    /// What was in force before the last change, and the seconds that a raw byte took then; until the next span tells
    /// whether that was wise.
    before: Option<(Option<usize>, f64)>,
    /// Places that were not, raw first: for how many spans they are shunned, and for how many the next time.
    shunned: [(u32, u32); LADDER.len() + 1],
    /// Frames are sent raw until one has tried the link.
    trying: bool,
    /// Spans since the link was last seen at its limit, and after how many it is tried.
    free: u32,
    try_after: u32,
    /// Raw frames since the last one that was compressed.
    raw_since: u32,
    know: Learnt,
    /// Whether of the link's time for a byte only that is known that it is no more.
    bound: bool,
    /// Whether others wait for the link, too.
    crowded: bool,
    /// Whether TCP tells what the link gives.
    asks_tcp: bool,
    /// Whether another thread compresses while this one does all else.
    beside: bool,
}

impl Control {
    /// Begins with a fast level: what it does for the first frames tells the rest.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            rung: Some(0),
            span: Span::default(),
            most: FIRST_SPAN,
            before: None,
            shunned: [(0, SHUN); LADDER.len() + 1],
            trying: false,
            free: 0,
            try_after: TRY_LINK,
            raw_since: 0,
            know: Learnt::default(),
            bound: false,
            crowded: false,
            asks_tcp: false,
            beside: false,
        }
    }

    /// Over TCP, which knows after a large frame what the link gives. Begins with what other connections of the same side have learnt.
    #[must_use]
    pub fn knowing(mode: Mode, know: Learnt) -> Self {
        let mut c = Self { know, asks_tcp: true, ..Self::new(mode) };
        if know.work.0.is_some() {
            c.most = SPAN;
            c.choose();
        }
        c
    }

    /// Frames are compressed by a thread of their own, while all else is done for the next one.
    pub fn work_beside(&mut self) {
        self.beside = true;
    }

    /// What it has learnt by now, if it has compressed anything.
    #[must_use]
    pub fn learnt(&self) -> Option<Learnt> {
        (self.know.work.0.is_some() && self.know.link.0.is_some()).then_some(self.know)
    }

    /// What the group wants.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether the next frame goes raw only to see what the link gives.
    #[must_use]
    pub fn tries(&self) -> bool {
        self.trying && self.mode == Mode::Auto
    }

    /// Another connection tries the link just now.
    pub fn postpone(&mut self) {
        self.trying = false;
        self.free = 0;
    }

    /// The level of the next frame; none: raw.
    #[must_use]
    pub fn level(&self) -> Option<i32> {
        match (self.mode, self.rung) {
            (Mode::Off | Mode::Forwarded, _) => None,
            (Mode::Level(n), _) => Some(n),
            (Mode::Auto, _) if self.trying => None,
            (Mode::Auto, Some(r)) => Some(LADDER[r].level),
            (Mode::Auto, None) => (self.raw_since >= self.patience()).then_some(LADDER[0].level),
        }
    }

    fn patience(&self) -> u32 {
        match (self.know.link.0, self.know.work.0) {
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
        self.know.rest.add(s.rest_cpu / raw, WEIGHT);
        self.know.rate = s.rate;
        self.raw_since = self.raw_since.saturating_add(1);
        if let Some(rung) = s.level.and_then(|l| LADDER.iter().find(|r| r.level == l)) {
            self.raw_since = 0;
            self.know.part.add(s.squeezed as f64 / raw, WEIGHT);
            if s.squeezed > 0 {
                let squeezed = s.squeezed as f64;
                self.know.work.add(s.work / squeezed / rung.cost, WEIGHT);
                self.know.cpu.add(s.work_cpu / squeezed / rung.cost, WEIGHT);
                self.know.leaves.add(rung.would_leave(s.small as f64 / squeezed), WEIGHT);
                self.know.wanted.add((s.work / s.work_cpu.max(1e-9)).clamp(1.0, 4.0), WEIGHT);
            }
        }
        self.span.add(s);
        if self.span.wire >= self.most || (self.trying && s.wire >= TRIAL) {
            self.judge();
        }
    }

    /// A span is over.
    fn judge(&mut self) {
        let span = std::mem::take(&mut self.span);
        self.most = SPAN;
        let trial = std::mem::take(&mut self.trying);
        self.crowded = span.crowded * 2 > span.wire;
        if span.held >= HELD * span.cycle {
            self.free = 0;
            if std::mem::take(&mut self.bound) {
                self.know.link = Mean::default();
            }
            self.know.link.add(span.pace(), LINK_WEIGHT);
        } else {
            // It was not in the way, so it is at least that fast.
            let pace = span.cycle / span.wire as f64;
            self.free += 1;
            self.bound |= self.know.link.0.is_none_or(|l| pace < l);
            self.know.link.0 = Some(self.know.link.0.map_or(pace, |l| l.min(pace)));
        }
        let was = self.rung;
        let took = span.cycle / span.raw.max(1) as f64;
        for (left, _) in &mut self.shunned {
            *left = left.saturating_sub(1);
        }
        match self.before.take() {
            // The model may be wrong about a link that is not always busy; what got through is not.
            Some((rung, best)) if !trial && took > best * (1.0 + WORSE) && place(rung) >= self.lowest() => {
                let (left, next) = &mut self.shunned[place(was)];
                *left = *next;
                *next = (*next * 2).min(SHUN_MOST);
                self.rung = rung;
            }
            _ => self.choose(),
        }
        if self.rung != was && !trial && self.shunned[place(was)].0 == 0 {
            self.before = Some((was, took));
        }
        if trial {
            let vain = self.rung.is_some();
            self.free = 0;
            self.try_after = if vain { (self.try_after * 2).min(TRY_LINK_MOST) } else { TRY_LINK };
        } else if self.rung.is_some()
            && self.rung == was
            && self.free >= self.try_after
            && !self.crowded
            && !self.known_slow()
        {
            self.trying = true;
        }
    }

    /// Seconds a raw byte takes at this rung, and those that others wait meanwhile.
    fn times(&self, rung: Option<usize>) -> Option<(f64, f64)> {
        let (link, rest) = (self.know.link.0?, self.know.rest.0?);
        let wanted = self.know.wanted.0.unwrap_or(1.0);
        let (rest, mut work, mut wire) = (rest * wanted, 0.0, 1.0);
        if let Some(r) = rung {
            let part = self.know.part.0?;
            work = part * self.know.work.0? * LADDER[r].cost;
            wire += part * (LADDER[r].leaves(self.know.leaves.0?).min(1.0) - 1.0);
        }
        let sent = link * wire;
        // Where others want the processor, they wait for what is spent here.
        let taken = (wanted - WANTED).max(0.0) * (rest + work);
        let busy = if self.beside { rest.max(work) } else { rest + work };
        Some((busy.max(sent) + SEEN * busy.min(sent), taken))
    }

    /// What a raw byte costs all at this rung, in seconds.
    fn time(&self, rung: Option<usize>) -> Option<f64> {
        self.times(rung).map(|(own, taken)| own + taken)
    }

    /// Part of the bytes that the lowest level would save; unknown is all.
    fn saves(&self) -> f64 {
        self.know.part.0.unwrap_or(1.0) * (1.0 - self.know.leaves.0.unwrap_or(0.0))
    }

    /// Whether nothing goes raw, because others wait for the link or it is slow, and there are bytes to save.
    fn spared(&self) -> bool {
        let crowded = self.crowded && self.know.wanted.0.is_none_or(|w| w < STARVED);
        let own = |r| self.times(r).map(|(own, _)| own);
        let slow = || own(Some(0)).zip(own(None)).is_some_and(|(low, raw)| low < SLOW * raw);
        self.saves() > TRIFLE && (crowded || slow() || self.cheap(None, 0))
    }

    /// Whether going from one rung to another takes little processor time beside the link's time that it saves.
    fn cheap(&self, from: Option<usize>, to: usize) -> bool {
        // What TCP has seen is the link's; what the sender waited for may be the processor's.
        let sure = self.know.rate > 0.0;
        let (link, cheap) =
            if sure { (Some(1.0 / self.know.rate), CHEAP_FOR_SURE) } else { (self.know.link.0, CHEAP) };
        let known = self.know.cpu.0.zip(link).zip(self.know.leaves.0);
        known.is_some_and(|((cpu, link), leaves)| {
            let (cost, left) = from.map_or((0.0, 1.0), |r| (LADDER[r].cost, LADDER[r].leaves(leaves)));
            let (work, saved) = (cpu * (LADDER[to].cost - cost), left - LADDER[to].leaves(leaves));
            let anyhow = if from.is_none() { HARMLESS } else { TOLERABLE };
            work < cheap * link * saved || (sure && work < anyhow * link)
        })
    }

    /// Whether TCP has seen that the link is far slower than the lowest level.
    fn known_slow(&self) -> bool {
        self.know.rate > 0.0 && self.cheap(None, 0)
    }

    /// The lowest place that may be chosen.
    fn lowest(&self) -> usize {
        if !self.spared() {
            return 0;
        }
        let worth = |r: &usize| self.know.rate > 0.0 && self.cheap(Some(r - 1), *r);
        place(Some((1..LADDER.len()).take_while(worth).last().unwrap_or(0)))
    }

    fn choose(&mut self) {
        let Some(now) = self.time(self.rung) else { return };
        let worth = self.saves() > TRIFLE;
        let shunned = |r: &Option<usize>| self.shunned[place(*r)].0 > 0;
        let lowest = self.lowest();
        let all = std::iter::once(None).chain((0..LADDER.len()).filter(|_| worth).map(Some));
        // Bytes are worth something where there are bytes to save.
        let dear = |r: Option<usize>| if r.is_none() && worth { 1.0 + RAW_GAIN } else { 1.0 };
        let all = all.filter(|r| place(*r) >= lowest && !shunned(r));
        let priced = all.filter_map(|r| Some((r, self.time(r)? * dear(r))));
        let Some((rung, time)) = priced.min_by(|a, b| a.1.total_cmp(&b.1)) else { return };
        if rung != self.rung
            && (time < now * dear(self.rung) * (1.0 - GAIN) || !worth || place(self.rung) < lowest)
        {
            // What is sent raw before the link is known cannot be taken back: one frame tells.
            if rung.is_none() && self.asks_tcp && self.know.rate <= 0.0 {
                self.trying = true;
                return;
            }
            self.rung = rung;
            self.raw_since = 0;
        }
    }
}

#[cfg(test)]
mod tests;
