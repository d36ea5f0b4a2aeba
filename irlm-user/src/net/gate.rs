//! How many connections a port holds of which nobody knows yet who they are, and who makes room when there are too many.
//! A newcomer always gets in: the oldest one of the origin that holds most makes room for it. So whoever opens many
//! connections loses his own, and a caller from elsewhere is heard. Each may stay for `STAY` at least from when it is
//! listened to: in a storm the next ones wait in the kernel's queue, and who has just come can say who he is.
//!
//! Nobody makes room while something of his is being done, or is to be done by this side ([`Pass::hold`], [`Pass::rest`]).
//! So the same serves for connections that were let in, between their requests.
//!
//! Bounds: how many a gate holds, derived from how many files the process may have open ([`Sizes`]). One that was told to
//! make room is counted until it has gone ([`Gate::pause`]).

use crate::core::origin::Origin;
use crate::obs::rare;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long nobody is told to make room after it was begun to listen to him.
const STAY: Duration = Duration::from_millis(10);
/// How soon it is looked again whether those who were told to go have gone.
const LOOK: Duration = Duration::from_millis(2);

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
        Self { strangers: part(8, 8, 512), control: part(8, 16, 256), data: part(2, 16, 4096) }
    }
}

impl Default for Sizes {
    /// Where descriptors are no concern.
    fn default() -> Self {
        Self::of(1 << 20)
    }
}

/// Connections that the kernel keeps for a port before they are taken (at most `net.core.somaxconn`). One that finds no place
/// there tries again a second later.
const BACKLOG: i32 = 4096;

/// Lets as many connections as may be wait in the kernel, so that a burst does not keep a caller waiting.
pub fn deepen(listener: &impl AsFd) {
    if let Err(e) = rustix::net::listen(listener, BACKLOG) {
        tracing::debug!("a port's queue stays as it is: {e}");
    }
}

/// Who is there, without clocks and sockets: numbers rise, so the lowest one came first.
#[derive(Debug)]
struct Crowd {
    most: usize,
    next: u64,
    /// Those who may be sent away: where they come from, and since when.
    here: BTreeMap<u64, (Origin, Instant)>,
    by_origin: HashMap<Origin, BTreeSet<u64>>,
    /// Those who may not, while something of theirs is done.
    held: HashMap<u64, Origin>,
}

impl Crowd {
    fn new(most: usize) -> Self {
        Self { most, next: 0, here: BTreeMap::new(), by_origin: HashMap::new(), held: HashMap::new() }
    }

    fn count(&self) -> usize {
        self.here.len() + self.held.len()
    }

    /// Who is to go before one more comes. None: nobody has to, or nobody can.
    fn next_to_go(&self) -> Option<u64> {
        if self.count() < self.most { None } else { self.oldest_of(self.busiest()?) }
    }

    /// How long one more is to wait, so that whoever goes for it has had his time; none where nobody has to go.
    fn pause(&self, now: Instant) -> Option<Duration> {
        if self.count() < self.most {
            return None;
        }
        let Some((_, since)) = self.next_to_go().and_then(|n| self.here.get(&n)) else { return Some(LOOK) };
        Some(STAY.saturating_sub(now.saturating_duration_since(*since))).filter(|d| !d.is_zero())
    }

    /// One more: its number, and who goes for it. None if nobody can go.
    fn enter(&mut self, origin: Origin, now: Instant) -> Option<(u64, Option<(u64, Origin)>)> {
        let goes = self.next_to_go();
        if goes.is_none() && self.count() >= self.most {
            return None;
        }
        let goes = goes.and_then(|number| Some((number, self.leave(number)?)));
        Some((self.add(origin, now), goes))
    }

    fn add(&mut self, origin: Origin, now: Instant) -> u64 {
        let number = self.next;
        self.next += 1;
        self.here.insert(number, (origin, now));
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
        let (origin, _) = self.here.remove(&number)?;
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
    fn rest(&mut self, number: u64, now: Instant) -> Option<u64> {
        self.leave(number).map(|origin| self.add(origin, now))
    }
}

/// Ends a connection.
type End = Box<dyn Fn() + Send>;

/// The connections of a port that may have to make room.
pub struct Gate {
    /// What the log says of it when it is full.
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
    /// A gate that holds so many, where everybody may stay for `patience` before it is known who he is.
    #[must_use]
    pub fn new(name: &'static str, most: usize, patience: Duration) -> Arc<Self> {
        let inner = Inner { crowd: Crowd::new(most), ends: HashMap::new(), leaving: HashSet::new() };
        Arc::new(Self { name, patience, inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long whoever takes connections is to wait before the next one enters: for those who have just come, and while as many
    /// as there may be have been told to go and have not gone. The others wait in the kernel's queue.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        let inner = self.inner();
        if inner.leaving.len() >= inner.crowd.most { Some(LOOK) } else { inner.crowd.pause(Instant::now()) }
    }

    /// Takes a connection in, which makes no room until it is told to rest. `end` ends it from another thread. None:
    /// everybody here is being served.
    pub fn enter(self: &Arc<Self>, peer: SocketAddr, end: impl Fn() + Send + 'static) -> Option<Pass> {
        let (number, goes) = {
            let mut inner = self.inner();
            let (number, goes) = inner.crowd.enter(peer.ip().into(), Instant::now())?;
            inner.crowd.hold(number);
            inner.ends.insert(number, Box::new(end));
            let goes = goes.and_then(|(old, origin)| {
                inner.leaving.insert(old);
                Some((inner.ends.remove(&old)?, origin))
            });
            (number, goes)
        };
        if let Some((end, origin)) = goes {
            end();
            rare::warn(self.name, peer, format_args!("the oldest connection of {origin} made room"));
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

    /// How many are here.
    #[must_use]
    pub fn count(&self) -> usize {
        self.inner().crowd.count()
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
        let Some(number) = inner.crowd.rest(self.number, Instant::now()) else { return false };
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

    /// Who goes for one from there.
    #[track_caller]
    fn goes(c: &mut Crowd, origin: Origin) -> Option<u64> {
        c.enter(origin, Instant::now()).unwrap().1.map(|(number, _)| number)
    }

    #[test]
    fn whoever_opens_many_loses_his_own_oldest() {
        let mut c = Crowd::new(4);
        assert_eq!((0..4).map(|_| goes(&mut c, at(1))).collect::<Vec<_>>(), [None; 4]);
        assert_eq!((0..3).map(|_| goes(&mut c, at(1))).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        assert_eq!(goes(&mut c, at(2)), Some(3));
        assert_eq!(c.here.len(), 4);
    }

    #[test]
    fn at_the_bound_the_busiest_origin_makes_room_for_newcomers_from_elsewhere() {
        let mut c = Crowd::new(8);
        (0..6).for_each(|_| assert_eq!(goes(&mut c, at(1)), None));
        (0..2).for_each(|_| assert_eq!(goes(&mut c, at(2)), None));
        // Each newcomer displaces the one that holds most, until all hold the same.
        let out: Vec<_> = (3..7).map(|a| goes(&mut c, at(a))).collect();
        assert_eq!(out, [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(c.by_origin[&at(1)].len(), 2);
        assert_eq!(c.by_origin[&at(2)].len(), 2, "who holds little keeps it");
        // Many origins of one connection each: the oldest goes.
        let mut c = Crowd::new(3);
        (0..3).for_each(|a| assert_eq!(goes(&mut c, at(a)), None));
        let out: Vec<_> = (3..8).map(|a| goes(&mut c, at(a))).collect();
        assert_eq!(out, (0..5).map(Some).collect::<Vec<_>>());
    }

    #[test]
    fn a_storm_from_one_network_leaves_every_other_origin_alone() {
        let net = |n: u64| Origin::from(IpAddr::from((0xfd00_u128 << 112 | u128::from(n)).to_be_bytes()));
        let (mut c, now) = (Crowd::new(64), Instant::now());
        let friend = c.enter(at(9), now).unwrap().0;
        for n in 0..100_000 {
            if let Some((_, Some((gone, _)))) = c.enter(net(n), now) {
                assert_ne!(gone, friend);
            }
        }
        assert_eq!((c.here.len(), c.by_origin.len()), (64, 2), "a /64 is one origin");
    }

    #[test]
    fn in_a_storm_everybody_has_his_time() {
        let (mut c, begin) = (Crowd::new(100), Instant::now());
        let (mut now, mut came) = (begin, HashMap::new());
        for _ in 0..10_000 {
            if let Some(pause) = c.pause(now) {
                assert!(pause <= STAY);
                now += pause;
            }
            let (number, goes) = c.enter(at(1), now).unwrap();
            came.insert(number, now);
            if let Some((gone, _)) = goes {
                assert!(now.duration_since(came[&gone]) >= STAY);
            }
        }
        let rate = 10_000.0 / now.duration_since(begin).as_secs_f64();
        assert!(rate > 9000.0, "a queue of 4096 is through in half a second: {rate} a second");
        assert_eq!(c.pause(now + STAY), None, "nobody waits once there is room");
    }

    #[test]
    fn who_is_served_is_not_sent_away_and_who_rests_goes_last() {
        let (mut c, now) = (Crowd::new(3), Instant::now());
        let n: Vec<u64> = (0..3).map(|_| c.enter(at(1), now).unwrap().0).collect();
        assert!(c.hold(n[0]));
        assert_eq!(goes(&mut c, at(2)), Some(n[1]));
        assert!(!c.hold(n[1]), "it was told to go");
        let rests = c.rest(n[0], now).unwrap();
        assert_eq!(goes(&mut c, at(2)), Some(n[2]));
        c.hold(rests);
        let all: Vec<u64> = c.here.keys().copied().collect();
        all.iter().for_each(|n| assert!(c.hold(*n)));
        assert_eq!(c.enter(at(3), now), None, "all are being served");
        assert_eq!(c.pause(now), Some(LOOK), "until one is not");
        assert!(c.leave(rests).is_some());
        assert_eq!(goes(&mut c, at(3)), None, "a place came free");
    }

    #[test]
    fn one_that_makes_room_is_ended_and_counted_until_it_has_gone() {
        let gate = Gate::new("test", 2, Duration::from_secs(5));
        let ended = Arc::new(AtomicUsize::new(0));
        let peer = SocketAddr::from(([10, 0, 0, 1], 7));
        let enter = || {
            let ended = ended.clone();
            let end = move || {
                ended.fetch_add(1, Ordering::Relaxed);
            };
            let mut pass = gate.enter(peer, end).unwrap();
            assert!(pass.rest());
            pass
        };
        let (mut a, b) = (enter(), enter());
        let left = a.until().saturating_duration_since(Instant::now());
        assert!(left > Duration::from_secs(4) && left <= Duration::from_secs(5));
        let (c, d) = (enter(), enter());
        assert_eq!((ended.load(Ordering::Relaxed), gate.count()), (2, 2));
        assert_eq!(gate.pause(), Some(LOOK));
        assert!(!a.rest() && !a.hold());
        drop(a);
        assert_ne!(gate.pause(), Some(LOOK));
        drop((b, c, d));
        assert_eq!((gate.count(), gate.pause()), (0, None));
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
        assert_eq!(Sizes::of(1024), Sizes { strangers: 128, control: 128, data: 512 });
        assert_eq!(Sizes::default(), Sizes { strangers: 512, control: 256, data: 4096 });
    }
}
