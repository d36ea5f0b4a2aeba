//! How many connections a port holds of which nobody knows yet who they are, and who makes room when there are too many.
//! A newcomer always gets in: the oldest one of the origin that holds most makes room for it. So whoever opens many
//! connections loses his own, and a caller from elsewhere is heard.
//!
//! The same serves for connections that were let in and may be dropped at any time, because nothing of theirs is being
//! done ([`Pass::hold`], [`Pass::rest`]).
//!
//! Bounds: [`Limits`], derived from how many files the process may have open ([`Sizes`]). One that was told to make room
//! is counted until it has gone ([`Gate::is_choked`]).

use crate::core::origin::Origin;
use crate::obs::rare;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many connections the ports of a process hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Strangers at a port.
    pub strangers: usize,
    /// Control connections that were let in.
    pub control: usize,
    /// Data connections, or those of an index server, that were let in.
    pub data: usize,
}

impl Sizes {
    /// For a process that may have so many files open. An agent has two ports, which hold seven eighths at most; the rest
    /// is for journals and monitors. Connections that were let in and files of the VMs make use of the same numbers, so
    /// that an agent of many VMs wants a limit of some thousands.
    #[must_use]
    pub fn of(descriptors: u64) -> Self {
        let part =
            |of: u64, least, most| usize::try_from(descriptors / of).unwrap_or(most).clamp(least, most);
        Self { strangers: part(16, 8, 512), control: part(8, 16, 256), data: part(2, 16, 4096) }
    }
}

impl Default for Sizes {
    /// Where descriptors are no concern.
    fn default() -> Self {
        Self::of(1 << 20)
    }
}

/// How many a gate holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// In all.
    pub in_all: usize,
    /// Of one origin.
    pub of_one: usize,
}

/// Who is there, without clocks and sockets: numbers rise, so the lowest one came first.
#[derive(Debug)]
struct Crowd {
    limits: Limits,
    next: u64,
    /// Those who may be sent away.
    here: BTreeMap<u64, Origin>,
    by_origin: HashMap<Origin, BTreeSet<u64>>,
    /// Those who may not, while something of theirs is done.
    held: HashMap<u64, Origin>,
}

impl Crowd {
    fn new(limits: Limits) -> Self {
        Self { limits, next: 0, here: BTreeMap::new(), by_origin: HashMap::new(), held: HashMap::new() }
    }

    /// One more: its number, and who is to go for it. None if nobody can go.
    fn enter(&mut self, origin: Origin) -> Option<(u64, Option<(u64, Origin)>)> {
        let own = self.by_origin.get(&origin).map_or(0, BTreeSet::len);
        let goes = if own > 0 && own >= self.limits.of_one {
            self.oldest_of(origin)
        } else if self.here.len() + self.held.len() >= self.limits.in_all {
            Some(self.oldest_of(self.busiest()?)?)
        } else {
            None
        };
        if let Some(number) = goes {
            let from = self.leave(number).unwrap_or(Origin::OTHERS);
            return Some((self.add(origin), Some((number, from))));
        }
        Some((self.add(origin), None))
    }

    fn add(&mut self, origin: Origin) -> u64 {
        let number = self.next;
        self.next += 1;
        self.here.insert(number, origin);
        self.by_origin.entry(origin).or_default().insert(number);
        number
    }

    fn oldest_of(&self, origin: Origin) -> Option<u64> {
        self.by_origin.get(&origin)?.first().copied()
    }

    /// The origin that most come from; of several the one whose oldest came first.
    fn busiest(&self) -> Option<Origin> {
        let rank = |(_, of): &(&Origin, &BTreeSet<u64>)| (of.len(), std::cmp::Reverse(of.first().copied()));
        self.by_origin.iter().max_by_key(rank).map(|(origin, _)| *origin)
    }

    /// One less; where it came from, if it was here.
    fn leave(&mut self, number: u64) -> Option<Origin> {
        if let Some(origin) = self.held.remove(&number) {
            return Some(origin);
        }
        let origin = self.here.remove(&number)?;
        if let Some(of) = self.by_origin.get_mut(&origin) {
            of.remove(&number);
            if of.is_empty() {
                self.by_origin.remove(&origin);
            }
        }
        Some(origin)
    }

    /// It may not be sent away for now. Whether it is here at all.
    fn hold(&mut self, number: u64) -> bool {
        let origin = self.leave(number);
        self.held.extend(origin.map(|o| (number, o)));
        origin.is_some()
    }

    /// It may be sent away again, the last of all: its new number.
    fn rest(&mut self, number: u64) -> Option<u64> {
        self.leave(number).map(|origin| self.add(origin))
    }
}

/// Ends a connection.
type End = Box<dyn Fn() + Send>;

/// The connections of a port that may have to make room.
pub struct Gate {
    /// For the log.
    name: &'static str,
    patience: Duration,
    inner: Mutex<Inner>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("name", &self.name).finish_non_exhaustive()
    }
}

struct Inner {
    crowd: Crowd,
    ends: HashMap<u64, End>,
    /// Told to make room, and not gone yet.
    leaving: HashSet<u64>,
}

impl Gate {
    /// A gate where everybody may stay for `patience` before it is known who he is.
    #[must_use]
    pub fn new(name: &'static str, limits: Limits, patience: Duration) -> Arc<Self> {
        let inner = Inner { crowd: Crowd::new(limits), ends: HashMap::new(), leaving: HashSet::new() };
        Arc::new(Self { name, patience, inner: Mutex::new(inner) })
    }

    /// The gate of a port that holds so many strangers, half of them of one origin.
    #[must_use]
    pub fn of_strangers(name: &'static str, most: usize, patience: Duration) -> Arc<Self> {
        Self::new(name, Limits { in_all: most, of_one: most.div_ceil(2) }, patience)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection in. `end` ends it from another thread. None: everybody here is being served.
    pub fn enter(self: &Arc<Self>, peer: SocketAddr, end: impl Fn() + Send + 'static) -> Option<Pass> {
        let (number, goes) = {
            let mut inner = self.inner();
            let (number, goes) = inner.crowd.enter(peer.ip().into())?;
            inner.ends.insert(number, Box::new(end));
            let goes = goes.and_then(|(old, origin)| {
                inner.leaving.insert(old);
                Some((inner.ends.remove(&old)?, origin))
            });
            (number, goes)
        };
        if let Some((end, origin)) = goes {
            end();
            rare::warn(
                self.name,
                peer,
                format_args!("too many connections, the oldest of {origin} made room"),
            );
        }
        Some(Pass { gate: self.clone(), number, until: Instant::now() + self.patience })
    }

    /// As [`Self::enter`], for a connection that ends when it is shut down.
    pub fn enter_tcp(self: &Arc<Self>, peer: SocketAddr, tcp: &Arc<TcpStream>) -> Option<Pass> {
        // The gate must not keep it open.
        let tcp = Arc::downgrade(tcp);
        self.enter(peer, move || {
            if let Some(tcp) = tcp.upgrade() {
                let _ = tcp.shutdown(Shutdown::Both);
            }
        })
    }

    /// Whether as many as there may be are still going: the next one is to wait in the kernel's queue.
    #[must_use]
    pub fn is_choked(&self) -> bool {
        let inner = self.inner();
        inner.leaving.len() >= inner.crowd.limits.in_all
    }

    /// How many are here.
    #[must_use]
    pub fn count(&self) -> usize {
        let inner = self.inner();
        inner.crowd.here.len() + inner.crowd.held.len()
    }
}

/// A connection's stay. It ends when this is dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    number: u64,
    until: Instant,
}

impl Pass {
    /// By when it must be known who this is.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Something is done for it: it makes no room meanwhile. False if it has been told to.
    pub fn hold(&mut self) -> bool {
        self.gate.inner().crowd.hold(self.number)
    }

    /// It may make room again, after all others. False if it has been told to.
    pub fn rest(&mut self) -> bool {
        let mut inner = self.gate.inner();
        let Some(number) = inner.crowd.rest(self.number) else { return false };
        if let Some(end) = inner.ends.remove(&self.number) {
            inner.ends.insert(number, end);
        }
        drop(inner);
        self.number = number;
        true
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inner = self.gate.inner();
        inner.crowd.leave(self.number);
        inner.leaving.remove(&self.number);
        let end = inner.ends.remove(&self.number);
        drop((inner, end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn at(a: u8) -> Origin {
        IpAddr::from([10, 0, 0, a]).into()
    }

    fn crowd(in_all: usize, of_one: usize) -> Crowd {
        Crowd::new(Limits { in_all, of_one })
    }

    /// Who goes for one from there.
    #[track_caller]
    fn goes(c: &mut Crowd, origin: Origin) -> Option<u64> {
        c.enter(origin).unwrap().1.map(|(number, _)| number)
    }

    #[test]
    fn whoever_opens_many_loses_his_own_oldest() {
        let mut c = crowd(10, 4);
        assert_eq!((0..4).map(|_| goes(&mut c, at(1))).collect::<Vec<_>>(), [None; 4]);
        assert_eq!((0..3).map(|_| goes(&mut c, at(1))).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        assert_eq!(goes(&mut c, at(2)), None);
        assert_eq!(c.here.len(), 5);
    }

    #[test]
    fn at_the_bound_the_busiest_origin_makes_room_for_newcomers_from_elsewhere() {
        let mut c = crowd(8, 6);
        (0..6).for_each(|_| assert_eq!(goes(&mut c, at(1)), None));
        (0..2).for_each(|_| assert_eq!(goes(&mut c, at(2)), None));
        // Each newcomer displaces the one that holds most, until all hold the same.
        let out: Vec<_> = (3..7).map(|a| goes(&mut c, at(a))).collect();
        assert_eq!(out, [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(c.by_origin[&at(1)].len(), 2);
        assert_eq!(c.by_origin[&at(2)].len(), 2, "who holds little keeps it");
        // A thousand origins of one connection each: the oldest goes.
        let mut c = crowd(3, 3);
        (0..3).for_each(|a| assert_eq!(goes(&mut c, at(a)), None));
        assert_eq!(
            (3..8).map(|a| goes(&mut c, at(a))).collect::<Vec<_>>(),
            (0..5).map(Some).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_storm_from_one_network_leaves_every_other_origin_alone() {
        let net = |n: u64| Origin::from(IpAddr::from((0xfd00_u128 << 112 | u128::from(n)).to_be_bytes()));
        let mut c = crowd(64, 32);
        let friend = c.enter(at(9)).unwrap().0;
        for n in 0..100_000 {
            if let Some((_, Some((gone, _)))) = c.enter(net(n)) {
                assert_ne!(gone, friend);
            }
        }
        assert_eq!((c.here.len(), c.by_origin.len()), (33, 2), "a /64 is one origin");
    }

    #[test]
    fn who_is_served_is_not_sent_away_and_who_rests_goes_last() {
        let mut c = crowd(3, 3);
        let n: Vec<u64> = (0..3).map(|_| c.enter(at(1)).unwrap().0).collect();
        assert!(c.hold(n[0]));
        assert_eq!(goes(&mut c, at(2)), Some(n[1]));
        assert!(!c.hold(n[1]), "it was told to go");
        let rests = c.rest(n[0]).unwrap();
        assert_eq!(goes(&mut c, at(2)), Some(n[2]));
        c.hold(rests);
        let all: Vec<u64> = c.here.keys().copied().collect();
        all.iter().for_each(|n| assert!(c.hold(*n)));
        assert_eq!(c.enter(at(3)), None, "all are being served");
        assert!(c.leave(rests).is_some());
        assert_eq!(goes(&mut c, at(3)), None, "a place came free");
    }

    #[test]
    fn one_that_makes_room_is_ended_and_counted_until_it_has_gone() {
        let gate = Gate::new("test", Limits { in_all: 2, of_one: 2 }, Duration::from_secs(5));
        let ended = Arc::new(AtomicUsize::new(0));
        let peer = SocketAddr::from(([10, 0, 0, 1], 7));
        let enter = || {
            let ended = ended.clone();
            let end = move || {
                ended.fetch_add(1, Ordering::Relaxed);
            };
            gate.enter(peer, end).unwrap()
        };
        let (mut a, b) = (enter(), enter());
        let left = a.until().saturating_duration_since(Instant::now());
        assert!(left > Duration::from_secs(4) && left <= Duration::from_secs(5));
        assert!(!gate.is_choked());
        let (c, d) = (enter(), enter());
        assert_eq!((ended.load(Ordering::Relaxed), gate.count()), (2, 2));
        assert!(gate.is_choked() && !a.rest() && !a.hold());
        drop(a);
        assert!(!gate.is_choked());
        drop((b, c, d));
        assert_eq!(gate.count(), 0);
        let inner = gate.inner();
        assert_eq!((inner.ends.len(), inner.leaving.len()), (0, 0));
        assert_eq!(Arc::strong_count(&ended), 1, "nothing is kept of those who have gone");
    }

    #[test]
    fn sizes_leave_descriptors_for_what_must_be_written() {
        for limit in [256, 1024, 4096, 20_000, 1 << 20] {
            let s = Sizes::of(limit);
            let ports = 2 * s.strangers + s.control + s.data;
            assert!(ports as u64 <= limit / 8 * 7, "{limit}: {s:?}");
        }
        assert_eq!(Sizes::of(1024), Sizes { strangers: 64, control: 128, data: 512 });
        assert_eq!(Sizes::default(), Sizes { strangers: 512, control: 256, data: 4096 });
    }
}
