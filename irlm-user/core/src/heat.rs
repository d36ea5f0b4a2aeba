//! Which parts of a guest's memory are written to, how often, and how many pages that is: a decayed heat map of one
//! VM, fed with intervals of observation by whichever sampler there is.
//!
//! Heat is the number of intervals in which a page was seen dirtied, each halved with every [`HALF_LIFE`] seconds of
//! observation that follow. A page with heat [`HOT`] was dirtied at least twice, not long ago: what was hashed of it
//! is more likely stale than not by the time it leaves.
//!
//! Bounds: [`MAX_PAGES`] pages and [`MAX_REGIONS`] regions a VM, some 20 MiB. What finds no place is counted in
//! [`HeatMap::lost`], and its rate is known all the same.

use super::units::{BlockIx, PageAddr};
use std::collections::HashMap;

/// Pages in a region: 2 MiB.
pub const REGION_PAGES: u32 = 512;
/// Seconds of observation after which heat counts half.
pub const HALF_LIFE: f64 = 10.0;
/// Heat of a hot page: dirtied in two intervals that are no further apart than [`HALF_LIFE`].
pub const HOT: f64 = 1.5;
/// Most pages with a heat of their own: 1 GiB of pages written to lately.
pub const MAX_PAGES: usize = 1 << 18;
/// Most regions with a heat of their own: 256 GiB.
pub const MAX_REGIONS: usize = 1 << 17;

/// A 2 MiB part of a RAM block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RegionAddr {
    /// Which block.
    pub block: BlockIx,
    /// Which region of it: page number / [`REGION_PAGES`].
    pub region: u32,
}

impl RegionAddr {
    /// The region of a page.
    #[must_use]
    pub fn of(page: PageAddr) -> Self {
        Self { block: page.block, region: page.page / REGION_PAGES }
    }
}

/// How much of what was dirtied a sampler shows one by one.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Coverage {
    /// Every page.
    Every,
    /// One dirtying in so many, drawn by chance.
    OneIn(f64),
    /// Always the same pages, of which each stands for so many.
    Fixed(f64),
}

/// What was seen in one interval.
#[derive(Clone, Debug)]
pub struct Interval {
    /// How long it was.
    pub seconds: f64,
    /// Pages dirtied, as far as the sampler counts them. Includes those whose place is not known.
    pub dirtied: f64,
    /// Estimated dirtyings by region.
    pub regions: Vec<(RegionAddr, f64)>,
    /// Pages seen dirtied, in any order, each any number of times.
    pub pages: Vec<PageAddr>,
    /// Pages known to have been dirtied for the first time ever, but not which.
    pub fresh: f64,
}

/// What is known of a VM's writes.
#[derive(Clone, Debug)]
pub struct HeatMap {
    coverage: Coverage,
    /// Weight of what is seen now; grows instead of all older heat shrinking.
    weight: f64,
    interval: u32,
    regions: HashMap<RegionAddr, f64>,
    pages: HashMap<PageAddr, Cell>,
    dirtied: f64,
    seconds: f64,
    observed: f64,
    fresh: f64,
    lost: u64,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    heat: f64,
    /// The interval in which it was last counted.
    seen: u32,
}

/// Weight at which all figures are scaled back, far below where f64 loses small heats beside it.
const RESCALE: f64 = 1e9;

impl HeatMap {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(coverage: Coverage) -> Self {
        Self {
            coverage,
            weight: 1.0,
            interval: 0,
            regions: HashMap::new(),
            pages: HashMap::new(),
            dirtied: 0.0,
            seconds: 0.0,
            observed: 0.0,
            fresh: 0.0,
            lost: 0,
        }
    }

    /// Takes in what one interval showed.
    pub fn absorb(&mut self, seen: &Interval) {
        if !(seen.seconds > 0.0 && seen.seconds.is_finite()) {
            return;
        }
        self.weight *= (seen.seconds / HALF_LIFE).min(1000.0).exp2();
        if self.weight > RESCALE {
            self.rescale();
        }
        self.interval = self.interval.wrapping_add(1);
        self.observed += seen.seconds;
        self.seconds += self.weight * seen.seconds;
        self.dirtied += self.weight * seen.dirtied.max(0.0);
        self.fresh += seen.fresh.max(0.0);
        for (region, pages) in &seen.regions {
            let full = self.regions.len() >= MAX_REGIONS;
            match self.regions.get_mut(region) {
                Some(heat) => *heat += self.weight * pages,
                None if full => self.lost += 1,
                None => {
                    self.regions.insert(*region, self.weight * pages);
                }
            }
        }
        for page in &seen.pages {
            if let Some(cell) = self.pages.get_mut(page) {
                if cell.seen != self.interval {
                    *cell = Cell { heat: cell.heat + self.weight, seen: self.interval };
                }
            } else if self.pages.len() < MAX_PAGES {
                self.pages.insert(*page, Cell { heat: self.weight, seen: self.interval });
            } else {
                self.lost += 1;
            }
        }
    }

    /// So many sightings of pages were lost before they came here.
    pub fn lose(&mut self, n: u64) {
        self.lost = self.lost.saturating_add(n);
    }

    fn rescale(&mut self) {
        let by = 1.0 / self.weight;
        self.weight = 1.0;
        self.seconds *= by;
        self.dirtied *= by;
        // What has cooled down to nothing makes room.
        self.regions.retain(|_, heat| {
            *heat *= by;
            *heat > 1e-3
        });
        self.pages.retain(|_, cell| {
            cell.heat *= by;
            cell.heat > 1e-3
        });
    }

    /// Seconds observed in all.
    #[must_use]
    pub fn observed(&self) -> f64 {
        self.observed
    }

    /// Pages dirtied a second, of late. 0 before anything was observed.
    #[must_use]
    pub fn dirty_rate(&self) -> f64 {
        if self.seconds > 0.0 { self.dirtied / self.seconds } else { 0.0 }
    }

    /// Sightings of pages and regions that found no place here, or were lost before.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Estimated number of different pages that were dirtied at least once while observed.
    #[must_use]
    pub fn distinct(&self) -> f64 {
        let seen = self.pages.len() as f64;
        let known = match self.coverage {
            Coverage::Every if self.lost == 0 => seen,
            Coverage::Fixed(each) => seen * each,
            // Dirtyings of a region spread over its pages by chance: so many different ones are hit.
            Coverage::Every | Coverage::OneIn(_) => {
                let all = f64::from(REGION_PAGES);
                let hit = |heat: &f64| all * (1.0 - (-heat / self.weight / all).exp());
                self.regions.values().map(hit).sum::<f64>().max(seen)
            }
        };
        known + self.fresh
    }

    /// A page's heat, if it was seen.
    #[must_use]
    pub fn page_heat(&self, page: PageAddr) -> f64 {
        self.pages.get(&page).map_or(0.0, |c| c.heat / self.weight)
    }

    /// Dirtyings of a region, decayed.
    #[must_use]
    pub fn region_heat(&self, region: RegionAddr) -> f64 {
        self.regions.get(&region).map_or(0.0, |heat| heat / self.weight)
    }

    /// Whether a page is likely to be dirtied again soon: seen so itself, or, where not every page is seen, in a region
    /// of which at least half must be.
    #[must_use]
    pub fn is_hot(&self, page: PageAddr) -> bool {
        let density = HOT / 2.0 * f64::from(REGION_PAGES);
        self.page_heat(page) >= HOT
            || (self.coverage != Coverage::Every && self.region_heat(RegionAddr::of(page)) >= density)
    }

    /// Whether a region has a page that was dirtied of late, so that reading it can wait.
    #[must_use]
    pub fn is_warm(&self, region: RegionAddr) -> bool {
        self.region_heat(region) >= 1.0
    }

    /// The pages known to be hot themselves, the hottest first.
    #[must_use]
    pub fn hot_pages(&self) -> Vec<PageAddr> {
        let mut hot: Vec<_> = self
            .pages
            .iter()
            .filter(|(_, c)| c.heat / self.weight >= HOT)
            .map(|(p, c)| (*p, c.heat))
            .collect();
        hot.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        hot.into_iter().map(|(p, _)| p).collect()
    }

    /// The regions by heat, the hottest first.
    #[must_use]
    pub fn hot_regions(&self) -> Vec<(RegionAddr, f64)> {
        let mut all: Vec<_> = self.regions.iter().map(|(r, heat)| (*r, heat / self.weight)).collect();
        all.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(page: u32) -> PageAddr {
        PageAddr { block: BlockIx(0), page }
    }

    fn second(pages: &[u32]) -> Interval {
        let mut regions: HashMap<RegionAddr, f64> = HashMap::new();
        for p in pages {
            *regions.entry(RegionAddr::of(at(*p))).or_default() += 1.0;
        }
        Interval {
            seconds: 1.0,
            dirtied: pages.len() as f64,
            regions: regions.into_iter().collect(),
            pages: pages.iter().copied().map(at).collect(),
            fresh: 0.0,
        }
    }

    #[test]
    fn what_is_written_again_is_hot_and_what_is_written_once_is_not() {
        let mut m = HeatMap::new(Coverage::Every);
        for n in 0..5 {
            m.absorb(&second(&[1, 2, 1, 100 + n]));
        }
        assert_eq!(m.hot_pages(), [at(1), at(2)]);
        assert!(m.is_hot(at(1)) && !m.is_hot(at(102)) && !m.is_hot(at(7)));
        assert_eq!(m.distinct(), 7.0);
        assert!((m.dirty_rate() - 4.0).abs() < 1e-9);
        assert!(m.is_warm(RegionAddr::of(at(3))) && !m.is_warm(RegionAddr::of(at(5000))));
    }

    #[test]
    fn heat_halves_with_its_half_life_and_the_rate_follows_the_present() {
        let mut m = HeatMap::new(Coverage::Every);
        m.absorb(&second(&[1; 8]));
        let before = m.page_heat(at(1));
        m.absorb(&Interval { seconds: HALF_LIFE, ..second(&[]) });
        assert!((m.page_heat(at(1)) - before / 2.0).abs() < 1e-9);
        for _ in 0..500 {
            m.absorb(&second(&[5, 6]));
        }
        assert!((m.dirty_rate() - 2.0).abs() < 1e-3, "{}", m.dirty_rate());
        assert_eq!(m.page_heat(at(1)), 0.0);
        // A page written in each second: 1 / (1 - 2^(-1 s / half-life)).
        assert!((m.page_heat(at(5)) - 1.0 / (1.0 - (-1.0 / HALF_LIFE).exp2())).abs() < 0.01);
    }

    #[test]
    fn few_looks_stand_for_many_pages() {
        let mut m = HeatMap::new(Coverage::Fixed(16.0));
        let some: Vec<u32> = (0..32).map(|n| n * 16).collect();
        for _ in 0..3 {
            let mut s = second(&some);
            s.regions.iter_mut().for_each(|r| r.1 *= 16.0);
            m.absorb(&s);
        }
        assert_eq!(m.distinct(), 512.0);
        assert!(m.is_hot(at(7)), "its whole region is written in every interval");
        let mut m = HeatMap::new(Coverage::OneIn(64.0));
        let mut s = second(&[1, 513]);
        s.regions.iter_mut().for_each(|r| r.1 = 512.0);
        m.absorb(&s);
        assert!((m.distinct() - 2.0 * 512.0 * (1.0 - (-1f64).exp())).abs() < 1e-6);
    }

    #[test]
    fn at_its_bound_it_counts_what_it_cannot_keep() {
        let mut m = HeatMap::new(Coverage::Every);
        let pages: Vec<u32> = (0..MAX_PAGES as u32 + 3).collect();
        m.absorb(&second(&pages));
        assert_eq!((m.lost(), m.pages.len()), (3, MAX_PAGES));
        assert!(m.distinct() > 0.0 && m.dirty_rate() > MAX_PAGES as f64);
    }

    proptest! {
        #[test]
        fn figures_stay_finite_and_not_negative(
            seen in proptest::collection::vec((0.0f64..1e4, 0.0f64..1e9, proptest::collection::vec(0u32..2000, 0..50)), 0..60)
        ) {
            let mut m = HeatMap::new(Coverage::Every);
            for (seconds, dirtied, pages) in seen {
                m.absorb(&Interval { seconds, dirtied, ..second(&pages) });
            }
            prop_assert!(m.dirty_rate().is_finite() && m.dirty_rate() >= 0.0);
            prop_assert!(m.distinct().is_finite() && m.distinct() >= 0.0);
            for p in m.hot_pages() {
                prop_assert!(m.page_heat(p).is_finite() && m.is_hot(p));
            }
        }
    }
}
