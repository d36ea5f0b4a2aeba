//! The shaping policy of a host's core-facing port as typed, checked values, and the class tree that follows from it.
//! Only arithmetic: the file is read by `control::policy`, the kernel is spoken to by `net::tc`.
//!
//! ```text
//! 1f1a:    root, unknown packets to :f0
//! └ :1     line       ceil 98 % of the link, so that queues build here and not in the switch
//!   ├ :2   migration  ceil line - others: what migration can never exceed
//!   │ ├ :3 core       ceil also the group budget's share
//!   │ │ ├ :10 switchover   prio 0
//!   │ │ ├ :20 demand       prio 1
//!   │ │ └ :40 bulk         prio 5
//!   │ ├ :30 control        prio 2
//!   │ └ :50 forward        prio 4
//!   └ :f0  others          prio 3, guaranteed others_mbit, ceil line
//! ```

use std::net::IpAddr;

/// Major number of our tree's handles: "irla" as far as hexadecimal goes. It tells a tree of ours, also one that a
/// killed agent left, from an operator's.
pub const MAJOR: u16 = 0x1f1a;
/// Minor numbers of the tree's classes.
pub mod minor {
    /// All that leaves the port.
    pub const LINE: u16 = 0x1;
    /// All of migration.
    pub const MIGRATION: u16 = 0x2;
    /// What of it crosses the core link.
    pub const CORE: u16 = 0x3;
    /// Everybody else.
    pub const OTHERS: u16 = 0xf0;
}

/// Of a thousand parts of the link that the tree gives out. A wire needs 24 bytes a packet (preamble, check sum, gap)
/// that no interface counts: 1.6 % of full-size packets. Below that the queue would stand in the switch, where
/// priorities mean nothing.
const LINE_PERMILLE: u64 = 980;
/// What a bucket holds, as time at its rate. A timer that fires late (a busy host) loses nothing as long as it is no
/// later than this; what a switch must swallow at once is no more than this.
const BURST_MS: u64 = 5;
/// No bucket is smaller: one full super-packet, so that a packet rarely overdraws it.
const MIN_BURST: u64 = 16 * 1024;
/// What a leaf may queue, as time at its ceiling: a switch port's shallow buffer.
const QUEUE_MS: u64 = 20;
/// No queue is shorter: four super-packets.
const MIN_QUEUE: u64 = 256 * 1024;
/// Longest queue, bytes.
const MAX_QUEUE: u64 = 256 << 20;
/// Least rate of a class, bit/s: HTB refuses 0.
const MIN_RATE: u64 = 64_000;
/// Largest link, Mbit/s: 1.6 Tbit/s.
pub const MAX_MBIT: u64 = 1_600_000;
/// Most rack prefixes.
pub const MAX_PREFIXES: usize = 64;

/// A class of migration traffic, the most urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Class {
    /// Device state and last round of a VM that is stopped.
    Switchover,
    /// Pages that a running VM waits for.
    Demand,
    /// What agents, index and coordinator say.
    Control,
    /// Pages passed on inside the target rack. Before bulk: a page that has crossed the core link is waited for by a
    /// VM, and it takes nothing from that link. The two rarely meet: source hosts send bulk, target hosts forward.
    Forward,
    /// Pages over the core link.
    Bulk,
}

impl Class {
    /// All, the most urgent first.
    pub const ALL: [Self; 5] = [Self::Switchover, Self::Demand, Self::Control, Self::Forward, Self::Bulk];

    /// As in policy files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Demand => "demand",
            Self::Control => "control",
            Self::Forward => "forward",
            Self::Bulk => "bulk",
        }
    }

    /// The class's number in the eBPF programs' tables.
    #[must_use]
    pub const fn slot(self) -> usize {
        match self {
            Self::Bulk => 1,
            Self::Control => 2,
            Self::Forward => 3,
            Self::Switchover => 4,
            Self::Demand => 5,
        }
    }

    /// Minor number of its leaf.
    #[must_use]
    pub const fn minor(self) -> u16 {
        match self {
            Self::Switchover => 0x10,
            Self::Demand => 0x20,
            Self::Control => 0x30,
            Self::Bulk => 0x40,
            Self::Forward => 0x50,
        }
    }

    /// Class id of its leaf, as `skb->priority` names it.
    #[must_use]
    pub const fn classid(self) -> u32 {
        classid(self.minor())
    }

    /// Whether its packets cross the core link. Control mostly does not (the index is in the source rack), and what does
    /// is words, not pages.
    #[must_use]
    pub const fn crosses_core(self) -> bool {
        matches!(self, Self::Switchover | Self::Demand | Self::Bulk)
    }

    const fn parent(self) -> u16 {
        if self.crosses_core() { minor::CORE } else { minor::MIGRATION }
    }

    /// HTB's priority; 0 is served first. Others stand between control and forward.
    const fn prio(self) -> u32 {
        match self {
            Self::Switchover => 0,
            Self::Demand => 1,
            Self::Control => 2,
            Self::Forward => 4,
            Self::Bulk => 5,
        }
    }

    /// RFC 4594: expedited, multimedia conferencing's AF41, operations (CS2), high-throughput data (AF11), low
    /// priority (CS1).
    const fn default_dscp(self) -> u8 {
        match self {
            Self::Switchover => 46,
            Self::Demand => 34,
            Self::Control => 16,
            Self::Forward => 10,
            Self::Bulk => 8,
        }
    }

    /// Thousandths of what migration may use at most.
    const fn default_min_permille(self) -> u64 {
        match self {
            Self::Switchover | Self::Demand => 20,
            Self::Control | Self::Forward | Self::Bulk => 10,
        }
    }
}

const OTHERS_PRIO: u32 = 3;

/// The class id of one of our classes.
#[must_use]
pub const fn classid(minor: u16) -> u32 {
    (MAJOR as u32) << 16 | minor as u32
}

/// What to do about the port's qdisc.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shaping {
    /// Only tag.
    Off,
    /// Set our tree up unless somebody else's is there.
    Own,
    /// Replace what is there, and restore it at exit.
    TakeOver,
}

impl Shaping {
    /// As in policy files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Own => "own",
            Self::TakeOver => "take-over",
        }
    }
}

/// What a policy file says, its syntax understood, nothing checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Draft {
    /// What to do about the port's qdisc.
    pub shaping: Shaping,
    /// The link's rate, Mbit/s.
    pub link_mbit: u64,
    /// Guaranteed to everybody else, Mbit/s.
    pub others_mbit: u64,
    /// This rack.
    pub rack_prefixes: Vec<(IpAddr, u8)>,
    /// What is said of classes.
    pub classes: Vec<(Class, ClassDraft)>,
}

/// What a policy file says of one class.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ClassDraft {
    /// DSCP: none, the default; `Some(None)`, leave the packet's own.
    pub dscp: Option<Option<u8>>,
    /// Guaranteed rate, Mbit/s.
    pub min_mbit: Option<u64>,
    /// Most it may use, Mbit/s.
    pub ceil_mbit: Option<u64>,
    /// The firewall mark.
    pub mark: Option<u32>,
    /// `skb->priority` where our tree is not set up.
    pub priority: Option<u32>,
}

/// A policy that cannot be. One line: which key, what is wrong, what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PolicyError {
    /// A number out of its range.
    #[error("{key} is {value}: it must be {least} to {most}")]
    Range {
        /// The key.
        key: String,
        /// Its value.
        value: u64,
        /// Least value.
        least: u64,
        /// Largest value.
        most: u64,
    },
    /// No address range.
    #[error("port.rack_prefixes: {addr}/{len} is no prefix: bits after the first {len} must be 0")]
    Prefix {
        /// The address.
        addr: IpAddr,
        /// Its length.
        len: u8,
    },
    /// Too many of them.
    #[error("port.rack_prefixes: {0} prefixes, at most {MAX_PREFIXES}")]
    Prefixes(usize),
    /// Nothing is left for migration.
    #[error(
        "port.others_mbit = {others} leaves nothing for migration: of link_mbit = {link} {line} can be given out \
         (2 % stay free); lower it"
    )]
    NothingLeft {
        /// Guaranteed to others, Mbit/s.
        others: u64,
        /// The link, Mbit/s.
        link: u64,
        /// What can be given out, Mbit/s.
        line: u64,
    },
    /// A class guaranteed more than it may use.
    #[error(
        "class.{class}: min_mbit = {min} is above its ceiling of {ceil} Mbit/s: lower one or raise the other"
    )]
    MinAboveCeil {
        /// The class.
        class: &'static str,
        /// Guaranteed, Mbit/s.
        min: u64,
        /// Ceiling, Mbit/s.
        ceil: u64,
    },
    /// More guaranteed than there is.
    #[error(
        "the classes' min_mbit add up to {sum} Mbit/s, and {left} are left for migration \
         (98 % of link_mbit less others_mbit): lower some"
    )]
    Oversold {
        /// Their sum, Mbit/s, rounded up.
        sum: u64,
        /// What there is, Mbit/s.
        left: u64,
    },
}

/// What is set for one class. Rates are bit/s.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassPolicy {
    /// Guaranteed.
    pub min: u64,
    /// Most it may use.
    pub ceil: u64,
    /// DSCP; none: the packet's own.
    pub dscp: Option<u8>,
    /// Firewall mark; none: the packet's own.
    pub mark: Option<u32>,
    /// `skb->priority` where our tree is not set up; none: the leaf's class id there too.
    pub priority: Option<u32>,
}

/// A policy that can be carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// What to do about the port's qdisc.
    pub shaping: Shaping,
    /// The link's rate, bit/s.
    pub link: u64,
    /// Guaranteed to everybody else, bit/s.
    pub others: u64,
    /// This rack: what goes there does not cross the core link.
    pub rack_prefixes: Vec<(IpAddr, u8)>,
    classes: [ClassPolicy; 5],
}

const MBIT: u64 = 1_000_000;

fn range(key: impl Into<String>, value: u64, least: u64, most: u64) -> Result<u64, PolicyError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(PolicyError::Range { key: key.into(), value, least, most })
}

impl Policy {
    /// Checks a draft, and fills in what it leaves out.
    pub fn new(d: &Draft) -> Result<Self, PolicyError> {
        let link = range("port.link_mbit", d.link_mbit, 1, MAX_MBIT)? * MBIT;
        let line = link / 1000 * LINE_PERMILLE;
        let others = range("port.others_mbit", d.others_mbit, 0, d.link_mbit)? * MBIT;
        let migration = line.saturating_sub(others);
        if migration < MBIT / 2 {
            return Err(PolicyError::NothingLeft {
                others: d.others_mbit,
                link: d.link_mbit,
                line: line / MBIT,
            });
        }
        if d.rack_prefixes.len() > MAX_PREFIXES {
            return Err(PolicyError::Prefixes(d.rack_prefixes.len()));
        }
        for &(addr, len) in &d.rack_prefixes {
            if !is_prefix(addr, len) {
                return Err(PolicyError::Prefix { addr, len });
            }
        }
        let said = |class: Class| d.classes.iter().find(|(c, _)| *c == class).map(|(_, c)| c.clone());
        // Guarantees nobody asked for give way to those somebody did.
        let asked: u64 = d
            .classes
            .iter()
            .filter_map(|(_, c)| c.min_mbit)
            .fold(0, |a, m| a.saturating_add(m.saturating_mul(MBIT)));
        let unasked: u64 = Class::ALL
            .into_iter()
            .filter(|c| said(*c).is_none_or(|d| d.min_mbit.is_none()))
            .map(|c| migration / 1000 * c.default_min_permille())
            .sum();
        let free = migration.saturating_sub(asked);
        let mut classes = [ClassPolicy { min: 0, ceil: 0, dscp: None, mark: None, priority: None }; 5];
        for (class, out) in Class::ALL.into_iter().zip(&mut classes) {
            let c = said(class).unwrap_or_default();
            let key = |k: &str| format!("class.{}.{k}", class.name());
            if let Some(Some(dscp)) = c.dscp {
                range(key("dscp"), u64::from(dscp), 0, 63)?;
            }
            let ceil = match c.ceil_mbit {
                None => migration,
                Some(m) => (range(key("ceil_mbit"), m, 1, MAX_MBIT)? * MBIT).min(migration),
            };
            let min = match c.min_mbit {
                Some(m) => range(key("min_mbit"), m, 0, MAX_MBIT)? * MBIT,
                None => {
                    let wish = migration / 1000 * class.default_min_permille();
                    scale(wish, free.min(unasked), unasked).min(ceil)
                }
            };
            if min > ceil {
                let (class, min, ceil) = (class.name(), min / MBIT, ceil / MBIT);
                return Err(PolicyError::MinAboveCeil { class, min, ceil });
            }
            *out = ClassPolicy {
                min,
                ceil,
                dscp: c.dscp.unwrap_or(Some(class.default_dscp())),
                mark: c.mark,
                priority: c.priority,
            };
        }
        let sum: u64 = classes.iter().map(|c| c.min).sum();
        if sum > migration {
            return Err(PolicyError::Oversold { sum: sum.div_ceil(MBIT), left: migration / MBIT });
        }
        Ok(Self { shaping: d.shaping, link, others, rack_prefixes: d.rack_prefixes.clone(), classes })
    }

    /// What is set for `class`.
    #[must_use]
    pub fn class(&self, class: Class) -> &ClassPolicy {
        // ALL is in declaration order.
        &self.classes[class as usize]
    }

    /// What the tree gives out in all, bit/s.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.link / 1000 * LINE_PERMILLE
    }

    /// What migration can never exceed, bit/s.
    #[must_use]
    pub fn migration(&self) -> u64 {
        self.line() - self.others
    }

    /// The class tree, parents before their children. `budget`: this host's share of the core link, bit/s; what
    /// crosses it stays below.
    #[must_use]
    pub fn tree(&self, budget: Option<u64>) -> Vec<HtbClass> {
        let (line, migration) = (self.line(), self.migration());
        let core = budget.unwrap_or(u64::MAX).clamp(MIN_RATE, migration.max(MIN_RATE));
        // A leaf may send at its guaranteed rate whatever its parents say, so guarantees must fit below them.
        let promised: u64 =
            Class::ALL.into_iter().filter(|c| c.crosses_core()).map(|c| self.class(c).min).sum();
        let leaf = |class: Class| {
            let p = self.class(class);
            let (min, most) = if class.crosses_core() {
                (scale(p.min, core, promised.max(core)), core)
            } else {
                (p.min, migration)
            };
            let ceil = p.ceil.min(most);
            HtbClass::new(
                class.name(),
                class.minor(),
                class.parent(),
                min.min(ceil),
                ceil,
                class.prio(),
                true,
            )
        };
        let leaves = Class::ALL.map(leaf);
        let sum = |inside: fn(Class) -> bool| -> u64 {
            Class::ALL.into_iter().zip(&leaves).filter(|(c, _)| inside(*c)).map(|(_, l)| l.rate).sum()
        };
        let inner = |name, own, parent, rate: u64, ceil: u64| {
            HtbClass::new(name, own, parent, rate.min(ceil), ceil, 0, false)
        };
        let mut out = vec![
            inner("line", minor::LINE, 0, line, line),
            inner("migration", minor::MIGRATION, minor::LINE, sum(|_| true), migration),
            inner("core", minor::CORE, minor::MIGRATION, sum(Class::crosses_core), core),
        ];
        out.extend(leaves);
        out.push(HtbClass::new("others", minor::OTHERS, minor::LINE, self.others, line, OTHERS_PRIO, true));
        out
    }
}

/// `value * part / whole`, for part ≤ whole.
fn scale(value: u64, part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return value;
    }
    u64::try_from(u128::from(value) * u128::from(part) / u128::from(whole)).unwrap_or(value)
}

fn is_prefix(addr: IpAddr, len: u8) -> bool {
    let (bits, width) = match addr {
        IpAddr::V4(a) => (u128::from(u32::from(a)) << 96, 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    };
    len <= width && (len == 128 || bits << len == 0)
}

/// One class of the tree. Rates are bit/s, sizes bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HtbClass {
    /// For tables.
    pub name: &'static str,
    /// Its minor number.
    pub minor: u16,
    /// Its parent's; 0: the qdisc itself.
    pub parent: u16,
    /// Guaranteed.
    pub rate: u64,
    /// Most it may use, borrowing.
    pub ceil: u64,
    /// Who borrows first: 0 does.
    pub prio: u32,
    /// Bytes sent in a turn among classes of one priority.
    pub quantum: u32,
    /// Bytes at once at its rate.
    pub burst: u32,
    /// Bytes at once at its ceiling.
    pub cburst: u32,
    /// Bytes its queue holds; 0: it has none, it is a parent.
    pub queue: u32,
}

impl HtbClass {
    fn new(name: &'static str, minor: u16, parent: u16, rate: u64, ceil: u64, prio: u32, leaf: bool) -> Self {
        let rate = rate.max(MIN_RATE);
        let ceil = ceil.max(rate);
        let cap = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let bytes_in = |rate: u64, ms: u64| rate / 8000 * ms;
        let burst = |rate| cap(bytes_in(rate, BURST_MS).max(MIN_BURST));
        let queue = if leaf { cap(bytes_in(ceil, QUEUE_MS).clamp(MIN_QUEUE, MAX_QUEUE)) } else { 0 };
        // HTB's own default (r2q 10), kept between two packets and what it warns of.
        let quantum = cap((rate / 80).clamp(3028, 200_000));
        Self {
            name,
            minor,
            parent,
            rate,
            ceil,
            prio,
            quantum,
            burst: burst(rate),
            cburst: burst(ceil),
            queue,
        }
    }

    /// Its class id.
    #[must_use]
    pub const fn classid(&self) -> u32 {
        classid(self.minor)
    }

    /// Its parent's class id.
    #[must_use]
    pub const fn parent_id(&self) -> u32 {
        classid(self.parent)
    }

    /// Handle of its queue's qdisc.
    #[must_use]
    pub const fn queue_handle(&self) -> u32 {
        (MAJOR as u32 + (self.minor >> 4) as u32) << 16
    }
}

/// What packets of each class are given, by slot of the eBPF tables; slots that are no class of ours give nothing.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Marks {
    /// Packets that cross the core link.
    pub core: [Mark; 8],
    /// Packets that stay in the rack.
    pub rack: [Mark; 8],
}

/// See [`Marks`]. `tree`: ours is there.
#[must_use]
pub fn markings(policy: Option<&Policy>, tree: bool) -> Marks {
    let mut out = Marks::default();
    let Some(p) = policy else { return out };
    for class in Class::ALL {
        let c = p.class(class);
        let own = class.classid();
        let priority = if tree { own } else { c.priority.unwrap_or(own) };
        let mark = Mark { dscp: c.dscp, priority: Some(priority), mark: c.mark };
        out.core[class.slot()] = mark;
        out.rack[class.slot()] = mark;
    }
    if tree {
        // Pages that stay in the rack take nothing from the core link, and must not count against its budget.
        out.rack[Class::Bulk.slot()].priority = Some(Class::Forward.classid());
    }
    out
}

/// What one class's packets are given; none: their own is left.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Mark {
    /// DSCP.
    pub dscp: Option<u8>,
    /// `skb->priority`: the class id of a leaf.
    pub priority: Option<u32>,
    /// Firewall mark.
    pub mark: Option<u32>,
}

#[cfg(test)]
mod tests;
