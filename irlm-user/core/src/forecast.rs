//! How a pre-copy migration will go: rounds, time, downtime, and whether it converges at all, from how fast and how
//! widely a guest writes. And from that, in which order VMs leave a host, and how many at a time ([`next`]).
//!
//! The model (docs/sampling.md has the reasoning): in `t` seconds a guest dirties `D(t) = W (1 - e^(-r t / W))`
//! different pages, `r` being its dirty rate and `W` its working set: `r t` at first, never more than `W`. A round
//! sends what the round before left dirty; QEMU stops the guest when what is left can be sent within the downtime
//! limit. `D` is concave, so the rounds converge exactly if `D(limit)` can be sent within `limit`.

/// Bytes that a page costs on the wire: its content, and QEMU's header of it.
pub const PAGE_WIRE_BYTES: f64 = 4096.0 + 8.0;
/// Rounds after which a forecast ends: QEMU goes on for ever, an operator does not.
pub const MAX_ROUNDS: u32 = 1000;

/// How a guest writes.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Writes {
    /// Pages dirtied a second.
    pub rate: f64,
    /// Different pages it keeps writing to. May be infinite: then each write is taken for a new page.
    pub working_set: f64,
}

impl Writes {
    /// From a rate and the number of different pages that were dirtied in `seconds`: the working set that explains
    /// both, between `distinct` and `ram_pages`.
    #[must_use]
    pub fn fit(rate: f64, distinct: f64, seconds: f64, ram_pages: f64) -> Self {
        let rate = clean(rate);
        let all = clean(ram_pages);
        let distinct = clean(distinct).min(all);
        let explains = |w: f64| Self { rate, working_set: w }.dirty_after(seconds) >= distinct;
        // Too few writes for so many pages: the guest wrote to new ones all the time.
        if !explains(all) {
            return Self { rate, working_set: all };
        }
        let (mut low, mut high) = (distinct, all);
        for _ in 0..64 {
            let middle = f64::midpoint(low, high);
            if explains(middle) { high = middle } else { low = middle }
        }
        Self { rate, working_set: high }
    }

    /// Different pages that are dirty after `seconds`.
    #[must_use]
    pub fn dirty_after(&self, seconds: f64) -> f64 {
        let (r, w, t) = (clean(self.rate), self.working_set, clean(seconds));
        if w.is_infinite() {
            return r * t;
        }
        let w = clean(w);
        if w == 0.0 { 0.0 } else { (w * -(-r * t / w).exp_m1()).min(r * t) }
    }

    /// The least bytes a second at which its rounds converge to a downtime of `limit` seconds.
    #[must_use]
    pub fn needs(&self, limit: f64) -> f64 {
        let limit = clean(limit).max(1e-3);
        self.dirty_after(limit) * PAGE_WIRE_BYTES / limit
    }
}

/// 0 for what is no figure.
fn clean(x: f64) -> f64 {
    if x.is_finite() && x > 0.0 { x } else { 0.0 }
}

/// How a migration will go.
#[derive(Clone, Copy, PartialEq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Forecast {
    /// Whether it comes to an end by itself.
    pub converges: bool,
    /// Rounds, the last one with the guest stopped included.
    pub rounds: u32,
    /// From its start to the guest running at the target, seconds; if it does not converge, until [`MAX_ROUNDS`] or
    /// until nothing changes any more.
    pub seconds: f64,
    /// How long the guest is stopped for its last pages, seconds. If it does not converge: the least that it can be made to be.
    pub downtime: f64,
    /// Bytes sent.
    pub bytes: f64,
}

/// Forecasts a VM with `pages` to send in the first round, over `bandwidth` bytes a second, stopped when what is left
/// takes no more than `limit` seconds. `None` if there is no bandwidth to speak of.
#[must_use]
pub fn forecast(pages: f64, writes: &Writes, bandwidth: f64, limit: f64) -> Option<Forecast> {
    let (pages, limit) = (clean(pages), clean(limit));
    if clean(bandwidth) < 1.0 {
        return None;
    }
    let time = |n: f64| n * PAGE_WIRE_BYTES / bandwidth;
    let converges = writes.needs(limit) <= bandwidth;
    let (mut left, mut seconds, mut sent) = (pages, 0.0, 0.0);
    let mut rounds = 0;
    while time(left) > limit && rounds + 1 < MAX_ROUNDS {
        rounds += 1;
        seconds += time(left);
        sent += left;
        let next = writes.dirty_after(time(left));
        // Within a thousandth of a page: no further round changes anything.
        let stuck = !converges && (next - left).abs() < 1e-3;
        left = next;
        if stuck {
            break;
        }
    }
    let downtime = time(left);
    Some(Forecast {
        converges: converges && downtime <= limit,
        rounds: rounds + 1,
        seconds: seconds + downtime,
        downtime,
        bytes: (sent + left) * PAGE_WIRE_BYTES,
    })
}

/// What the order of departures goes by.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Departure {
    /// Bytes a second without which it does not converge; 0 if nothing is known of its writes.
    pub needs: f64,
    /// Pages to send in the first round.
    pub pages: f64,
}

/// Which VM of `waiting` (in the order of the group file) leaves next, beside those that are `leaving`; `None`: none
/// yet. `bandwidth` in bytes a second, 0 if it is not known; `places` is how many may leave at a time.
///
/// The policy, and why:
/// 1. *A VM starts only if what it and those under way need fits the link*, or if the link is free: rounds converge
///    only while a VM's share exceeds what it dirties, and what is sent twice is lost to all. So VMs that write much
///    leave with few neighbours, or alone.
/// 2. *Among those that fit, the one that needs most goes first*: figures are fresh, the link is still free, and what is
///    left for the end packs well. Between equals the larger goes first (longest job first), then the file's order.
/// 3. *VMs that cannot converge even alone go last*, so that nobody waits behind them.
#[must_use]
pub fn next(waiting: &[Departure], leaving: &[Departure], bandwidth: f64, places: usize) -> Option<usize> {
    if leaving.len() >= places.max(1) {
        return None;
    }
    let known = clean(bandwidth) > 0.0;
    let hopeless = |d: &Departure| known && d.needs > bandwidth;
    let taken: f64 = leaving.iter().map(|d| d.needs).sum();
    let fits = |d: &Departure| leaving.is_empty() || !known || d.needs == 0.0 || taken + d.needs <= bandwidth;
    let mut order: Vec<usize> = (0..waiting.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (&waiting[*a], &waiting[*b]);
        hopeless(a)
            .cmp(&hopeless(b))
            .then(b.needs.total_cmp(&a.needs))
            // Sizes order only what is known to write.
            .then(if a.needs > 0.0 { b.pages.total_cmp(&a.pages) } else { std::cmp::Ordering::Equal })
    });
    order
        .into_iter()
        .find(|i| fits(&waiting[*i]) && (!hopeless(&waiting[*i]) || waiting.iter().all(hopeless)))
}

#[cfg(test)]
mod tests;
