//! A sender before a virtual link: what it compresses, what the kernel's buffer hides, and what gets through.

use super::*;

const FRAME: f64 = 262_144.0;
/// `TCP_NOTSENT_LOWAT` of the data connections.
const BUFFER: f64 = 131_072.0;

/// A world that a connection lives in.
#[derive(Clone, Copy, Debug)]
struct World {
    /// Bytes a second; what level 1 compresses a second; what it leaves.
    link: f64,
    work: f64,
    leaves: f64,
    /// Time by the clock over processor time.
    wanted: f64,
    /// How far the truth about higher levels is from the ladder: cost and what they leave.
    off: (f64, f64),
    /// Whether another thread compresses.
    beside: bool,
}

const MBIT: f64 = 1e6 / 8.0;
/// What is not compression: parsing, hashing, copying.
const REST: f64 = 1.0 / 1.2e9;

impl World {
    fn level(&self, level: Option<i32>) -> (f64, f64) {
        let Some(level) = level else { return (0.0, 1.0) };
        let n = LADDER.iter().position(|r| r.level == level).unwrap();
        let power = |x: f64| if n == 0 { 1.0 } else { x };
        let cost = LADDER[n].cost * power(self.off.0) / self.work;
        (cost, (LADDER[n].leaves(self.leaves) * power(self.off.1)).min(1.001))
    }

    /// Moves frames; gives the rate of the second half in raw bytes a second, and which part of it was sent raw.
    fn run(
        &self,
        frames: u32,
        mut level: impl FnMut() -> Option<i32>,
        mut told: impl FnMut(&Sample),
    ) -> (f64, f64) {
        let (mut unsent, mut half, mut clock, mut raw) = (0.0f64, 0.0, 0.0, 0.0);
        for n in 0..frames {
            let level = level();
            let (cost, leaves) = self.level(level);
            let (rest_cpu, work_cpu) = (FRAME * REST, FRAME * cost);
            let here = if self.beside { rest_cpu } else { rest_cpu + work_cpu };
            let busy = here * self.wanted;
            let wire = FRAME * leaves;
            unsent = (unsent - busy * self.link).max(0.0) + wire;
            let held = ((unsent - BUFFER) / self.link).max(0.0);
            unsent = unsent.min(BUFFER);
            // The other thread may take longer than all that.
            let cycle = (busy + held).max(if self.beside { work_cpu * self.wanted } else { 0.0 });
            unsent = (unsent - (cycle - busy - held) * self.link).max(0.0);
            clock += cycle;
            if n == frames / 2 {
                (half, raw) = (clock, 0.0);
            }
            raw += f64::from(u8::from(level.is_none()));
            told(&Sample {
                level,
                raw: FRAME as usize,
                squeezed: if level.is_some() { FRAME as usize } else { 0 },
                small: if level.is_some() { wire as usize } else { 0 },
                wire: wire as usize,
                cycle,
                held,
                work: work_cpu * self.wanted,
                work_cpu,
                rest_cpu,
                queued: 0.0,
                rate: 0.0,
            });
        }
        let rest = f64::from(frames - frames / 2);
        (rest * FRAME / (clock - half), raw / rest)
    }

    fn fixed(&self, level: Option<i32>) -> f64 {
        self.run(400, || level, |_| ()).0
    }

    fn auto(&self) -> (f64, f64) {
        let control = std::cell::RefCell::new(Control::new(Mode::Auto));
        if self.beside {
            control.borrow_mut().work_beside();
        }
        self.run(2000, || control.borrow().level(), |s| control.borrow_mut().told(s))
    }
}

#[test]
fn whatever_the_link_it_comes_close_to_the_best_level_and_never_below_raw() {
    for mbit in [10.0, 100.0, 300.0, 1000.0, 2500.0, 10_000.0, 40_000.0] {
        for leaves in [0.05, 0.3, 0.6, 0.95] {
            for wanted in [1.0, 2.0] {
                for off in [(1.0, 1.0), (1.3, 1.05), (0.8, 0.95)] {
                    let beside = off.1 < 1.0;
                    let w = World { link: mbit * MBIT, work: 400e6, leaves, wanted, off, beside };
                    let levels = std::iter::once(None).chain(LADDER.iter().map(|r| Some(r.level)));
                    let best = levels.map(|l| w.fixed(l)).fold(0.0, f64::max);
                    let (rate, _) = w.auto();
                    // On a link just as fast as the compressor the bytes saved are worth a few hundredths.
                    assert!(
                        rate > 0.93 * w.fixed(None),
                        "{w:?}: {:.0} MB/s, raw {:.0}",
                        rate / 1e6,
                        w.fixed(None) / 1e6
                    );
                    // Where the processor is wanted by others a cheaper level may stand for the best.
                    let share = if wanted > 1.0 { 0.7 } else { 0.85 };
                    assert!(rate > share * best, "{w:?}: {:.0} MB/s of {:.0}", rate / 1e6, best / 1e6);
                }
            }
        }
    }
}

#[test]
fn a_second_thread_makes_it_worth_compressing_on_a_faster_link() {
    let serial =
        World { link: 2400.0 * MBIT, work: 400e6, leaves: 0.3, wanted: 1.0, off: (1.0, 1.0), beside: false };
    let both = World { beside: true, ..serial };
    let ((alone, _), (rate, raw)) = (serial.auto(), both.auto());
    assert!(rate > 1.2 * alone && raw < 0.1, "{rate:.3e} against {alone:.3e}, {raw:.2} of it raw");
}

#[test]
fn a_link_faster_than_the_compressor_is_left_alone_and_a_slow_one_is_spared() {
    let w =
        World { link: f64::INFINITY, work: 400e6, leaves: 0.1, wanted: 1.0, off: (1.0, 1.0), beside: false };
    assert!(w.auto().1 > 0.99, "{:?}", w.auto());
    assert!(World { link: 40_000.0 * MBIT, ..w }.auto().1 > 0.99);
    assert!(World { link: 100.0 * MBIT, leaves: 0.4, ..w }.auto().1 < 0.01);
    // Contents that do not shrink are tried now and then.
    let (_, raw) = World { link: 100.0 * MBIT, leaves: 1.0, ..w }.auto();
    assert!((0.9..0.99).contains(&raw), "{raw}");
}

#[test]
fn the_level_rises_as_the_link_slows_and_falls_as_others_want_the_processor() {
    let level = |mbit: f64, wanted| {
        let w = World { link: mbit * MBIT, work: 400e6, leaves: 0.3, wanted, off: (1.0, 1.0), beside: false };
        let control = std::cell::RefCell::new(Control::new(Mode::Auto));
        w.run(500, || control.borrow().level(), |s| control.borrow_mut().told(s));
        let level = control.borrow().level();
        level.unwrap_or(0)
    };
    let alone: Vec<i32> = [10.0, 100.0, 1000.0, 10_000.0].map(|m| level(m, 1.0)).into();
    assert!(alone.is_sorted_by(|a, b| a >= b) && alone[0] > alone[2] && alone[3] == 0, "{alone:?}");
    assert!(level(100.0, 3.0) < level(100.0, 1.0));
}

#[test]
fn a_slow_link_gets_nothing_raw_however_short_the_processor_is() {
    // As measured of a stream that shared a 100 Mbit/s link and two processors with seven others, and went raw.
    let known = |x: f64| Mean(Some(x));
    for rung in [None, Some(0), Some(2)] {
        let mut c = Control::new(Mode::Auto);
        (c.rung, c.know.part, c.know.leaves, c.know.wanted) = (rung, known(1.0), known(0.573), known(3.78));
        (c.know.link, c.know.work, c.know.rest) = (known(288e-9), known(66e-9), known(4.8e-9));
        c.know.cpu = known(17.5e-9);
        let (mut fast, mut crowd) = (c.clone(), c.clone());
        c.choose();
        assert_eq!(c.rung, Some(0), "from {rung:?}");
        // By the clock the work takes longer than the link, because twenty threads want each processor.
        (crowd.know.work, crowd.know.wanted) = (known(400e-9), known(20.0));
        crowd.choose();
        assert_eq!(crowd.rung, Some(0), "from {rung:?}");
        // Where the link is no slower than the work, it is left to the processor.
        fast.know.link = known(60e-9);
        fast.choose();
        assert_eq!(fast.rung, None, "from {rung:?}");
    }
}

#[test]
fn a_slow_link_does_not_fall_back_to_raw_because_a_span_took_longer() {
    let known = |x: f64| Mean(Some(x));
    for (link, falls_back) in [(288e-9, false), (60e-9, true)] {
        let mut c = Control::new(Mode::Auto);
        (c.know.part, c.know.leaves, c.know.wanted) = (known(1.0), known(0.573), known(3.78));
        (c.know.link, c.know.work, c.know.rest) = (known(link), known(66e-9), known(4.8e-9));
        c.know.cpu = known(17.5e-9);
        // It has just begun to compress, and this span happened to take twice as long a byte as the raw one before.
        (c.rung, c.before) = (Some(0), Some((None, link)));
        let (raw, wire) = (2 * SPAN, SPAN);
        let held = if falls_back { 0.0 } else { wire as f64 * link };
        c.span = Span { raw, wire, cycle: raw as f64 * link * 2.0, held, ..Span::default() };
        c.judge();
        assert_eq!(c.rung.is_none(), falls_back, "link {link}");
    }
}

#[test]
fn a_link_that_tcp_knows_to_be_slow_is_neither_tried_nor_sent_anything_raw() {
    // Twelve hosts on two processors: a frame takes its sender twenty times its processor time, the link is hardly ever what
    // it waits for. Seen so of a rack of 6x4 at 100 Mbit/s.
    let levels = |rate: f64| {
        let mut c = Control::new(Mode::Auto);
        let mut seen = Vec::new();
        for _ in 0..400 {
            let level = c.level();
            seen.push(level);
            let (raw, cpu) = (512 << 10, if level.is_some() { 2e-3 } else { 0.0 });
            let (squeezed, wire) = if level.is_some() { (raw, 200 << 10) } else { (0, raw) };
            let (work, held, rest_cpu) = (cpu * 20.0, 5e-3, 1e-3);
            let cycle = work + held + rest_cpu * 20.0;
            let (small, work_cpu) = (wire, cpu);
            c.told(&Sample {
                level,
                raw,
                squeezed,
                small,
                wire,
                cycle,
                held,
                work,
                work_cpu,
                rest_cpu,
                queued: 0.0,
                rate,
            });
        }
        seen
    };
    // A sixth of the link for each of six connections.
    let slow = levels(100.0 * MBIT / 6.0);
    assert!(slow.iter().all(Option::is_some), "{slow:?}");
    assert!(slow[20..].iter().all(|l| *l >= Some(3)), "bytes that are nearly free are taken: {slow:?}");
    // Where TCP has seen that it is fast, the clock is believed.
    assert!(levels(40_000.0 * MBIT)[200..].iter().any(Option::is_none));
}

#[test]
fn fixed_modes_are_kept_whatever_happens() {
    let w =
        World { link: 100.0 * MBIT, work: 400e6, leaves: 0.3, wanted: 1.0, off: (1.0, 1.0), beside: false };
    for (mode, level) in [(Mode::Off, None), (Mode::Level(6), Some(6))] {
        let control = std::cell::RefCell::new(Control::new(mode));
        let same = || {
            assert_eq!(control.borrow().level(), level);
            level
        };
        w.run(200, same, |s| control.borrow_mut().told(s));
    }
}

#[test]
fn odd_samples_do_no_harm() {
    let mut c = Control::new(Mode::Auto);
    for n in 0..200 {
        let odd = [0.0, f64::MIN_POSITIVE, 1e300][n % 3];
        let level = c.level();
        c.told(&Sample { level, raw: 4096, wire: 1, cycle: odd, held: odd, work: odd, ..Sample::default() });
        c.told(&Sample { level, cycle: odd, ..Sample::default() });
    }
    assert!(c.level().is_none_or(|l| LADDER.iter().any(|r| r.level == l)));
}

#[test]
fn a_crowded_link_is_spared_by_a_sender_that_is_short_of_processor_time() {
    for (queued, compressed) in [(0.02, true), (0.0, false)] {
        let mut c = Control::new(Mode::Auto);
        let mut raw = 0;
        for n in 0..400 {
            // Never held up: its own work takes longer than its share of the link.
            let (level, kib) = (c.level(), 1 << 10);
            let (squeezed, wire) = if level.is_some() { (256 * kib, 80 * kib) } else { (0, 256 * kib) };
            raw += u32::from(level.is_none() && n >= 200);
            let work = if level.is_some() { 4e-3 } else { 0.0 };
            let (cycle, small, rest_cpu) = (work + 1e-3, wire, 2e-4);
            let s = Sample {
                level,
                raw: 256 * kib,
                squeezed,
                small,
                wire,
                cycle,
                work,
                work_cpu: work,
                rest_cpu,
                queued,
                ..Sample::default()
            };
            c.told(&s);
        }
        assert_eq!(raw == 0, compressed, "{raw} of 200 frames raw with {queued} s of queue");
    }
}

#[test]
fn a_connection_begins_where_others_have_come_to() {
    let w =
        World { link: 100.0 * MBIT, work: 400e6, leaves: 0.3, wanted: 1.0, off: (1.0, 1.0), beside: false };
    let control = std::cell::RefCell::new(Control::new(Mode::Auto));
    assert!(control.borrow().learnt().is_none(), "nothing to tell yet");
    w.run(200, || control.borrow().level(), |s| control.borrow_mut().told(s));
    let (level, learnt) = (control.borrow().level(), control.borrow().learnt().unwrap());
    assert_eq!(level, Some(6));
    assert_eq!(Control::knowing(Mode::Auto, learnt).level(), level);
    assert_eq!(Control::knowing(Mode::Off, learnt).level(), None);
    assert_eq!(Control::knowing(Mode::Level(1), learnt).level(), Some(1));
    assert_eq!(Control::knowing(Mode::Auto, Learnt::default()).level(), Some(1));
}

#[test]
fn nothing_but_a_trial_goes_raw_before_tcp_has_seen_the_link() {
    // A processor that others want: by the clock raw is faster.
    let w =
        World { link: 4000.0 * MBIT, work: 200e6, leaves: 0.35, wanted: 3.0, off: (1.0, 1.0), beside: false };
    for rate in [0.0, 4000.0 * MBIT] {
        let control = std::cell::RefCell::new(Control::knowing(Mode::Auto, Learnt::default()));
        let (raw, tries) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
        let level = || {
            let mut c = control.borrow_mut();
            if c.tries() && rate == 0.0 {
                tries.set(tries.get() + 1);
                c.postpone();
            }
            raw.set(raw.get() + u32::from(c.level().is_none()));
            c.level()
        };
        w.run(300, level, |s| control.borrow_mut().told(&Sample { rate, ..*s }));
        if rate == 0.0 {
            assert!(raw.get() == 0 && tries.get() > 0, "{} raw, {} trials", raw.get(), tries.get());
        } else {
            assert!(raw.get() > 150, "{} of 300 raw on a link that is known to be fast", raw.get());
        }
    }
}
