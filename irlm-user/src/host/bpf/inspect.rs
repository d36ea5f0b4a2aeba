//! Reads an agent's pins as anybody may: whether it lives, was killed, or hangs.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use irlm_common::policy::{ClassPolicy, Policy};
use irlm_common::{
    ABI_VERSION, COUNTS_MAP, Counter, EVENTS_MAP, Events, FLOWS_MAP, Flow, FlowClass, FlowKey, POLICY_MAP,
    PREFIX_MAPS, STATE_MAP, Scope,
};
use serde::Serialize;

use super::attach::{PROGRAMS, state};
use super::counters::{CountsRow, Oddities};
use super::error::{BpfError, chain};
use super::pins::{PIN_ROOT, default_pin_dir, owned};
use super::tables::{MAPS, Marking, pinned, read_counters};

/// What an agent's pins say.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The agent's name.
    pub name: String,
    /// Where the pins are.
    pub dir: PathBuf,
    /// Whether an agent of that name runs.
    pub agent_runs: bool,
    /// The interface by its name in its own network namespace.
    pub iface: String,
    /// The interface by its index in its own network namespace.
    pub ifindex: u32,
    /// Version of the maps.
    pub abi: u32,
    /// Which of the two policies is in force.
    pub generation: u32,
    /// The programs; those of a clsact qdisc have no link to be found by.
    pub programs: Vec<ProgramRow>,
    /// The pinned maps.
    pub maps: Vec<MapRow>,
    /// Registered flows by class.
    pub flows: Vec<(&'static str, usize)>,
    /// What is done to migration packets.
    pub policy: Vec<PolicyRow>,
    /// Rack-local prefixes.
    pub rack_prefixes: Vec<String>,
    /// What was counted.
    pub counters: Vec<CountsRow>,
    /// What should not happen.
    pub oddities: Oddities,
}

/// An attached program.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramRow {
    /// `egress` or `ingress`.
    pub direction: &'static str,
    /// The kernel's number for the link.
    pub link: u32,
    /// The kernel's number for the program.
    pub program: u32,
    /// The program's name.
    pub name: String,
    /// Instructions that the verifier looked at.
    pub verified: Option<u32>,
}

/// A pinned map.
#[derive(Clone, Debug, Serialize)]
pub struct MapRow {
    /// Its name.
    pub name: &'static str,
    /// The kernel's number for it.
    pub id: u32,
    /// Most entries.
    pub max_entries: u32,
}

/// A class's tags in one scope.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PolicyRow {
    /// The class.
    pub class: &'static str,
    /// `core` or `rack`.
    pub scope: &'static str,
    /// Written into the IP header.
    pub dscp: Option<u8>,
    /// `skb->priority`.
    pub priority: Option<u32>,
    /// `skb->mark`.
    pub mark: Option<u32>,
}

/// Names of the agents that have pins.
pub fn names() -> Result<Vec<String>, BpfError> {
    let root = Path::new(PIN_ROOT);
    let failed = |error: &std::io::Error| BpfError::Pins { path: root.to_owned(), text: error.to_string() };
    let entries = match std::fs::read_dir(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| failed(&error))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(|error| failed(&error))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

impl Snapshot {
    /// Reads the pins of the agent called `name`.
    pub fn of(name: &str) -> Result<Self, BpfError> {
        let dir = default_pin_dir(name)?;
        if !dir.exists() {
            return Err(BpfError::Pins {
                path: dir,
                text: "no such pins: no agent of that name runs here with core_iface set, or it cannot pin"
                    .into(),
            });
        }
        Self::read(name, &dir)
    }

    fn read(name: &str, dir: &Path) -> Result<Self, BpfError> {
        let at = |name: &str, text: String| BpfError::Pins { path: dir.join(name), text };
        let state = state(&dir.join(STATE_MAP)).map_err(|e| at(STATE_MAP, chain(&e)))?;
        if state.abi != ABI_VERSION {
            let text = format!("maps of ABI {}, and this irlm reads {ABI_VERSION}", state.abi);
            return Err(BpfError::Pins { path: dir.to_owned(), text });
        }
        let failed = |name: &'static str| move |error: MapError| at(name, chain(&error));
        let counts: PerCpuArray<MapData, Counter> = open(dir, COUNTS_MAP).map_err(failed(COUNTS_MAP))?;
        let events: PerCpuArray<MapData, Events> = open(dir, EVENTS_MAP).map_err(failed(EVENTS_MAP))?;
        let flows: HashMap<MapData, FlowKey, Flow> = open(dir, FLOWS_MAP).map_err(failed(FLOWS_MAP))?;
        let policies: Array<MapData, Policy> = open(dir, POLICY_MAP).map_err(failed(POLICY_MAP))?;
        let trie = PREFIX_MAPS[(state.generation & 1) as usize];
        let prefixes: LpmTrie<MapData, [u8; 16], u32> = open(dir, trie).map_err(failed(trie))?;
        let policy = policies.get(&(state.generation & 1), 0).map_err(failed(POLICY_MAP))?;
        let counters = read_counters(&counts, &events)?;
        // Flows come and go meanwhile; one that ends under the iterator ends the walk and not the report.
        let classes: Vec<u32> = flows.iter().map_while(Result::ok).map(|(_, flow)| flow.class).collect();
        let migration = FlowClass::ALL.into_iter().filter(|class| *class != FlowClass::Other);
        let number = |class: FlowClass| classes.iter().filter(|slot| **slot == class.slot()).count();
        Ok(Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            agent_runs: owned(dir).map_err(|error| at("", error.to_string()))?,
            iface: String::from_utf8_lossy(&state.iface).trim_end_matches('\0').to_owned(),
            ifindex: state.ifindex,
            abi: state.abi,
            generation: state.generation,
            programs: programs(dir),
            maps: MAPS.into_iter().filter_map(|name| map_row(dir, name)).collect(),
            flows: migration.clone().map(|class| (class.name(), number(class))).collect(),
            policy: migration.flat_map(|class| Scope::ALL.map(|scope| row(&policy, class, scope))).collect(),
            rack_prefixes: prefixes
                .keys()
                .map_while(Result::ok)
                .map(|key| prefix_name(key.data(), key.prefix_len()))
                .collect(),
            counters: counters.rows().collect(),
            oddities: counters.oddities(),
        })
    }
}

fn open<M: TryFrom<aya::maps::Map, Error = MapError>>(dir: &Path, name: &str) -> Result<M, MapError> {
    pinned(&dir.join(name))?.try_into()
}

fn programs(dir: &Path) -> Vec<ProgramRow> {
    let mut rows = Vec::new();
    for ((_, _, link), direction) in PROGRAMS.into_iter().zip(["egress", "ingress"]) {
        let Ok(link) = PinnedLink::from_pin(dir.join(link)) else { continue };
        let Ok(info) = FdLink::from(link).info() else { continue };
        let program = loaded_programs().filter_map(Result::ok).find(|p| p.id() == info.program_id());
        rows.push(ProgramRow {
            direction,
            link: info.id(),
            program: info.program_id(),
            name: program.as_ref().and_then(|p| p.name_as_str()).unwrap_or_default().to_owned(),
            verified: program.and_then(|p| p.verified_instruction_count()),
        });
    }
    rows
}

fn map_row(dir: &Path, name: &'static str) -> Option<MapRow> {
    let info = MapData::from_pin(dir.join(name)).ok()?.info().ok()?;
    Some(MapRow { name, id: info.id(), max_entries: info.max_entries() })
}

fn row(policy: &Policy, class: FlowClass, scope: Scope) -> PolicyRow {
    let Marking { dscp, priority, mark } = marking(policy.of(scope, class.slot()));
    PolicyRow { class: class.name(), scope: scope.name(), dscp, priority, mark }
}

fn marking(class: &ClassPolicy) -> Marking {
    Marking {
        dscp: (class.set_dscp != 0).then_some(class.dscp),
        priority: (class.set_priority != 0).then_some(class.priority),
        mark: (class.set_mark != 0).then_some(class.mark),
    }
}

/// As people write it: mapped addresses as IPv4.
fn prefix_name(address: [u8; 16], length: u32) -> String {
    let address = Ipv6Addr::from(address);
    match address.to_ipv4_mapped() {
        Some(v4) if length >= 96 => format!("{}/{}", IpAddr::V4(v4), length - 96),
        _ => format!("{address}/{length}"),
    }
}

#[cfg(test)]
mod tests {
    use super::prefix_name;

    #[test]
    fn prefixes_are_named_as_people_write_them() {
        assert_eq!(prefix_name(irlm_common::parse::mapped([10, 77, 1, 0]), 120), "10.77.1.0/24");
        assert_eq!(prefix_name([0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 48), "fd77::/48");
    }
}
