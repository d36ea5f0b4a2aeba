//! The maps of one pair of classifiers, and the order in which they may be written: a packet that is under way must
//! never meet a flow without its footprint, or half a policy.

use std::collections::{HashMap as Known, hash_map::Entry};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use irlm_common::filter::{WORDS, Word, footprint, place};
use irlm_common::policy::{ClassPolicy, Policy, State};
use irlm_common::{
    ABI_VERSION, COUNT_ENTRIES, COUNTS_MAP, Counter, EVENTS_MAP, Events, FILTER_MAP, FLOWS_MAP, Flow,
    FlowClass, FlowKey, MAX_PREFIXES, POLICY_MAP, PREFIX_MAPS, SLOTS, STATE_MAP,
};

use super::counters::Counters;
use super::error::{BpfError, chain, os_error};
use super::key::address;

/// All maps that are pinned.
pub(super) const MAPS: [&str; 8] =
    [FLOWS_MAP, FILTER_MAP, COUNTS_MAP, EVENTS_MAP, POLICY_MAP, STATE_MAP, PREFIX_MAPS[0], PREFIX_MAPS[1]];

/// What is done to the packets of one class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Marking {
    /// Written into the IP header, 0 to 63; none: the packet keeps its own.
    pub dscp: Option<u8>,
    /// Goes to `skb->priority`, where HTB looks for its class (major × 65536 + minor); none: the packet's own.
    pub priority: Option<u32>,
    /// Goes to `skb->mark`; none: the packet's own.
    pub mark: Option<u32>,
}

/// What is done to migration packets, and which addresses are in this rack.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TagPolicy {
    /// By slot of the class; those of [`FlowClass::Other`] and of reserved slots are not used.
    pub classes: [Marking; SLOTS as usize],
    /// Prefixes of rack-local addresses: address and length. Everything else is behind the core link.
    pub rack_prefixes: Vec<(IpAddr, u8)>,
}

/// One pair of classifiers' maps, as their only writer.
pub(super) struct Tables {
    flows: HashMap<MapData, FlowKey, Flow>,
    filter: Array<MapData, Word>,
    counts: PerCpuArray<MapData, Counter>,
    events: PerCpuArray<MapData, Events>,
    policy: Array<MapData, Policy>,
    state: Array<MapData, State>,
    prefixes: [LpmTrie<MapData, [u8; 16], u32>; 2],
    /// Registered flows, and their footprints.
    known: Known<FlowKey, u32>,
    /// Flows with this footprint.
    shared: Known<u32, u32>,
    /// The filter as it is in the kernel.
    words: Vec<u64>,
}

impl Tables {
    /// The maps of a loaded object, new or taken over.
    pub(super) fn of(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        let mut take = |name| ebpf.take_map(name).ok_or(BpfError::Missing(name));
        let counts = PerCpuArray::try_from(take(COUNTS_MAP)?)?;
        if counts.len() != COUNT_ENTRIES {
            return Err(BpfError::Abi);
        }
        Ok(Self {
            flows: HashMap::try_from(take(FLOWS_MAP)?)?,
            filter: Array::try_from(take(FILTER_MAP)?)?,
            counts,
            events: PerCpuArray::try_from(take(EVENTS_MAP)?)?,
            policy: Array::try_from(take(POLICY_MAP)?)?,
            state: Array::try_from(take(STATE_MAP)?)?,
            prefixes: [LpmTrie::try_from(take(PREFIX_MAPS[0])?)?, LpmTrie::try_from(take(PREFIX_MAPS[1])?)?],
            known: Known::new(),
            shared: Known::new(),
            words: vec![0; WORDS as usize],
        })
    }

    /// Makes the maps ours: writes down whose they are, and forgets the flows of an owner that died. Its sockets died
    /// with it.
    pub(super) fn claim(&mut self, iface: &str, ifindex: u32) -> Result<(), BpfError> {
        let mut state = State { abi: ABI_VERSION, ifindex, ..self.state.get(&0, 0)? };
        state.iface = [0; 16];
        // The kernel's names are shorter; one byte of zero always ends it.
        state.iface.iter_mut().zip(iface.bytes().take(15)).for_each(|(to, from)| *to = from);
        self.state.set(0, state, 0)?;
        let left: Vec<FlowKey> = self.flows.keys().collect::<Result<_, _>>()?;
        for key in left {
            gone(self.flows.remove(&key))?;
        }
        for index in 0..WORDS {
            if self.filter.get(&index, 0)?.bits != 0 {
                self.filter.set(index, Word::default(), 0)?;
            }
        }
        Ok(())
    }

    /// Registers a flow, or changes the class of one that is.
    pub(super) fn add(&mut self, key: FlowKey, class: FlowClass) -> Result<(), MapError> {
        let flow = Flow { class: class.slot() };
        let Entry::Vacant(new) = self.known.entry(key) else { return self.flows.insert(key, flow, 0) };
        let footprint = *new.insert(footprint(&key));
        let flows = self.shared.entry(footprint).or_default();
        *flows += 1;
        // The footprint first: a flow without one would not be found.
        let result = match *flows {
            1 => self.write_bit(footprint, true),
            _ => Ok(()),
        };
        let result = result.and_then(|()| self.flows.insert(key, flow, 0));
        if result.is_err() {
            self.forget(&key)?;
        }
        result
    }

    /// Changes the class of a registered flow. What is not registered stays so.
    pub(super) fn change(&mut self, key: FlowKey, class: FlowClass) -> Result<(), MapError> {
        if self.known.contains_key(&key) { self.add(key, class) } else { Ok(()) }
    }

    /// Forgets a flow. What is not registered is no error.
    pub(super) fn remove(&mut self, key: &FlowKey) -> Result<(), MapError> {
        gone(self.flows.remove(key))?;
        self.forget(key)
    }

    /// Takes a flow's footprint away, after the flow.
    fn forget(&mut self, key: &FlowKey) -> Result<(), MapError> {
        let Some(footprint) = self.known.remove(key) else { return Ok(()) };
        let Some(flows) = self.shared.get_mut(&footprint) else { return Ok(()) };
        *flows -= 1;
        if *flows > 0 {
            return Ok(());
        }
        self.shared.remove(&footprint);
        self.write_bit(footprint, false)
    }

    fn write_bit(&mut self, footprint: u32, set: bool) -> Result<(), MapError> {
        let (index, bit) = place(footprint);
        let Some(word) = self.words.get_mut(index as usize) else { return Ok(()) };
        *word = if set { *word | bit } else { *word & !bit };
        self.filter.set(index, Word { bits: *word }, 0)
    }

    /// Puts a policy in force, whole: see `irlm_common::policy`.
    pub(super) fn set_policy(
        &mut self,
        core: &[Marking; SLOTS as usize],
        rack: &[Marking; SLOTS as usize],
        prefixes: &[(IpAddr, u8)],
    ) -> Result<(), BpfError> {
        let (core, rack) = (classes(core)?, classes(rack)?);
        if prefixes.len() > MAX_PREFIXES as usize {
            return Err(BpfError::too_many_prefixes(prefixes.len()));
        }
        let prefixes =
            prefixes.iter().map(|(ip, length)| prefix(*ip, *length)).collect::<Result<Vec<_>, _>>()?;
        let policy = Policy { prefixes: prefixes.len() as u32, core, rack };
        self.swap(policy, &prefixes).map_err(|error| BpfError::PolicyWrite(chain(&error)))
    }

    fn swap(&mut self, policy: Policy, prefixes: &[Key<[u8; 16]>]) -> Result<(), MapError> {
        let state = self.state.get(&0, 0)?;
        let next = (state.generation & 1) ^ 1;
        // Whoever still uses the other generation has begun before the last swap, so it is over after this.
        wait_for_programs();
        let trie = &mut self.prefixes[next as usize];
        let old: Vec<_> = trie.keys().collect::<Result<_, _>>()?;
        for key in old {
            gone(trie.remove(&key))?;
        }
        for key in prefixes {
            trie.insert(key, 1, 0)?;
        }
        self.policy.set(next, policy, 0)?;
        // One byte changes, so there is no moment in between.
        self.state.set(0, State { generation: next, ..state }, 0)
    }

    /// The sums so far, over all CPUs.
    pub(super) fn counters(&self) -> Result<Counters, BpfError> {
        read_counters(&self.counts, &self.events)
    }
}

/// Sums of both maps over all CPUs.
pub(super) fn read_counters(
    counts: &PerCpuArray<MapData, Counter>,
    events: &PerCpuArray<MapData, Events>,
) -> Result<Counters, BpfError> {
    let failed = |error: MapError| BpfError::Counters(chain(&error));
    let mut sums = [Counter::default(); COUNT_ENTRIES as usize];
    for (index, sum) in (0..COUNT_ENTRIES).zip(&mut sums) {
        counts.get(&index, 0).map_err(failed)?.iter().for_each(|cpu| sum.add(cpu));
    }
    Ok(Counters::new(sums, &events.get(&0, 0).map_err(failed)?))
}

/// A map by its pin.
pub(super) fn pinned(path: &std::path::Path) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_pin(path)?)
}

/// A further handle to a map.
pub(super) fn by_id(id: u32) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_id(id)?)
}

/// What was not there is gone too.
fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(error) if os_error(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn classes(markings: &[Marking; SLOTS as usize]) -> Result<[ClassPolicy; SLOTS as usize], BpfError> {
    let mut classes = [ClassPolicy::default(); SLOTS as usize];
    // What nobody registered is never changed, so neither `other` nor a slot without a class has a marking.
    for class in FlowClass::ALL.into_iter().filter(|class| *class != FlowClass::Other) {
        let Marking { dscp, priority, mark } = markings[class.slot() as usize];
        if let Some(value @ 64..) = dscp {
            return Err(BpfError::Policy(format!("DSCP {value} of class {} is not 0 to 63", class.name())));
        }
        classes[class.slot() as usize] = ClassPolicy {
            set_dscp: dscp.is_some().into(),
            set_priority: priority.is_some().into(),
            set_mark: mark.is_some().into(),
            dscp: dscp.unwrap_or_default(),
            priority: priority.unwrap_or_default(),
            mark: mark.unwrap_or_default(),
        };
    }
    Ok(classes)
}

/// As the tries have them: IPv4 mapped into IPv6, bits behind the prefix zero.
fn prefix(ip: IpAddr, length: u8) -> Result<Key<[u8; 16]>, BpfError> {
    let (most, before) = if ip.is_ipv4() { (32, 96) } else { (128, 0) };
    if length > most {
        return Err(BpfError::Policy(format!("rack prefix {ip}/{length}: at most /{most}")));
    }
    let bits = u128::from_be_bytes(address(ip));
    let length = u32::from(length) + before;
    let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
    let mapped = u128::from_be_bytes(irlm_common::parse::mapped([0; 4]));
    if length < 96 && (mapped ^ bits) & mask == 0 {
        // Written as IPv6 it would take in all of IPv4.
        return Err(BpfError::Policy(format!("rack prefix {ip}/{length} holds every IPv4 address")));
    }
    Ok(Key::new(length, (bits & mask).to_be_bytes()))
}

/// Returns when every program that was running has ended: they run inside RCU read sections, and this waits for a
/// grace period.
fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes three integers and touches none of our memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Refused where CPUs run without a tick. A program runs for less than a microsecond.
        thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::{BpfError, Marking, classes, prefix};
    use irlm_common::policy::ClassPolicy;
    use irlm_common::{FlowClass, SLOTS};

    #[test]
    fn prefixes_of_both_families_share_a_trie() {
        let key = prefix("10.77.1.9".parse().unwrap(), 24).unwrap();
        assert_eq!(key.prefix_len(), 120);
        assert_eq!(key.data()[..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 1, 0]);
        let key = prefix("fd77:0:0:1::9".parse().unwrap(), 64).unwrap();
        assert_eq!((key.prefix_len(), key.data()[..9].to_vec()), (64, vec![0xfd, 0x77, 0, 0, 0, 0, 0, 1, 0]));
        assert_eq!(prefix("0.0.0.0".parse().unwrap(), 0).unwrap().prefix_len(), 96);
        for (ip, length) in [("10.0.0.0", 33), ("fd77::", 129), ("::", 0), ("::", 80)] {
            let refused = prefix(ip.parse().unwrap(), length);
            assert!(matches!(refused, Err(BpfError::Policy(_))), "{ip}/{length}");
        }
    }

    #[test]
    fn only_classes_of_migration_flows_have_a_marking() {
        let all = [Marking { dscp: Some(46), priority: Some(0), mark: None }; SLOTS as usize];
        let classes = classes(&all).unwrap();
        for slot in 0..SLOTS {
            let used = FlowClass::ALL.iter().any(|class| *class != FlowClass::Other && class.slot() == slot);
            let set = ClassPolicy { set_dscp: 1, set_priority: 1, dscp: 46, ..ClassPolicy::default() };
            assert_eq!(
                classes[slot as usize],
                if used { set } else { ClassPolicy::default() },
                "slot {slot}"
            );
        }
        let mut wrong = all;
        wrong[FlowClass::Bulk.slot() as usize].dscp = Some(64);
        assert!(matches!(super::classes(&wrong), Err(BpfError::Policy(_))));
    }
}
