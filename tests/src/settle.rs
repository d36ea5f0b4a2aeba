//! Rule 1, seen from outside: of every guest exactly one copy runs, and never two. Agents are not asked; QEMU is.

use crate::lab::{Guests, Pair};
use anyhow::{Context as _, Result, bail};
use std::time::{Duration, Instant};

/// Where a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where it was.
    Source,
    /// Where it was to go.
    Target,
}

/// Which copies of one guest run now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// The source's run state; `None` if its QEMU is gone.
    pub source: Option<String>,
    /// The target's run state; `None` if its QEMU is gone.
    pub target: Option<String>,
}

impl Look {
    /// Looks at both; fails if both run.
    pub fn at(pair: &mut Pair) -> Result<Self> {
        let runs = |s: &Option<String>| s.as_deref() == Some("running");
        let source = state(&mut pair.source);
        let target = state(&mut pair.target);
        // Between the two questions the guest may have moved: two copies ran only if the source still does.
        if runs(&source) && runs(&target) && runs(&state(&mut pair.source)) {
            bail!("{}: TWO copies run, on the source and on the target", pair.name);
        }
        Ok(Self { source, target })
    }

    /// The side that runs it, if one does.
    #[must_use]
    pub fn side(&self) -> Option<Side> {
        match (self.source.as_deref(), self.target.as_deref()) {
            (_, Some("running")) => Some(Side::Target),
            (Some("running"), _) => Some(Side::Source),
            _ => None,
        }
    }
}

fn state(vm: &mut crate::qemu::Vm) -> Option<String> {
    if vm.alive() { vm.qmp.status().ok() } else { None }
}

/// Waits until every guest runs on the side that `expected` gives (`None`: either will do) and has stayed there for a
/// second, then asks its service there. Fails at once if two copies of one run.
pub fn settled(
    guests: &mut Guests,
    expected: impl Fn(&Pair) -> Option<Side>,
    wait: Duration,
) -> Result<Vec<(String, Side)>> {
    let until = Instant::now() + wait;
    let mut since: Option<Instant> = None;
    loop {
        let mut sides = Vec::new();
        let mut wrong = None;
        for p in &mut guests.pairs {
            let look = Look::at(p)?;
            match (look.side(), expected(p)) {
                (Some(side), want) if want.is_none_or(|w| w == side) => sides.push((p.name.clone(), side)),
                (_, want) => wrong = Some(format!("{}: {look:?}, expected {want:?}", p.name)),
            }
        }
        match (wrong, since) {
            (None, Some(s)) if s.elapsed() > Duration::from_secs(1) => match check(guests, &sides) {
                Ok(()) => return Ok(sides),
                // One that has left while it was asked is asked again where it is.
                Err(_) if left(guests, &sides)? && Instant::now() < until => since = None,
                Err(e) => return Err(e),
            },
            (None, None) => since = Some(Instant::now()),
            (None, Some(_)) => {}
            (Some(what), _) if Instant::now() > until => bail!("not settled after {wait:?}: {what}"),
            (Some(_), _) => since = None,
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether one of them is not where it was.
fn left(guests: &mut Guests, sides: &[(String, Side)]) -> Result<bool> {
    for (p, (_, side)) in guests.pairs.iter_mut().zip(sides) {
        if Look::at(p)?.side() != Some(*side) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn check(guests: &mut Guests, sides: &[(String, Side)]) -> Result<()> {
    for (p, (_, side)) in guests.pairs.iter_mut().zip(sides) {
        match side {
            Side::Source => p.check_source()?,
            Side::Target => p.check_target().context("after the migration")?,
        }
    }
    Ok(())
}
