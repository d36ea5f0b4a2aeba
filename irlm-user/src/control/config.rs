//! The two configuration files, read once at the door into typed values, so that nothing deeper meets a bad name, an
//! unknown host or a cap exceeded. One error names the file, the place, and what to do (docs/examples/*.toml).

use super::allow::Allow;
pub use super::terms::{
    GroupTimeouts, MAX_HOSTS, MAX_NAME, MAX_SOCKET_PATH, MAX_TENANT, MAX_VMS, Mistake, MulticastConfig,
    valid_name,
};
use super::terms::{Method, check_range};
use crate::core::account::Pages;
use crate::core::digest::Algorithm;
use crate::core::direct::Direct;
use crate::core::identity::Mapping;
use crate::core::migration::Migration;
use crate::core::policy::MAX_MBIT;
use crate::core::squeeze::Mode;
use crate::flow::Front;
use serde::Deserialize;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Largest configuration file read, bytes: 8192 VMs take about 2 MiB.
const MAX_FILE: u64 = 16 << 20;

/// A configuration file that cannot be used. One line: file, place, what is wrong, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {what}")]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// What is wrong, where, and what to do.
    pub what: String,
}

// bounds: the keys of one file
/// agent.toml: one host's daemon.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The host's name in logs and reports.
    pub name: String,
    /// Where `irlm evacuate`, `status`, … reach this agent.
    pub control: SocketAddr,
    /// Where source hosts and other target hosts send pages.
    pub data: SocketAddr,
    /// Directory with this host's certificates (ca-cert.pem, server-cert.pem, …); none: plain text.
    #[serde(default)]
    pub tls: Option<PathBuf>,
    /// Says that whoever reaches the ports may do everything, where they are not only loopback's and there is no `tls`.
    #[serde(default)]
    pub plaintext: Option<Plaintext>,
    /// Roles for certificates that do not name one themselves.
    #[serde(default)]
    pub roles: Mapping,
    /// What callers may have this agent touch.
    #[serde(default)]
    pub allow: Allow,
    /// Per-VM records that must survive a crash of this agent or a reboot.
    pub state_dir: PathBuf,
    /// The port that faces the core link, for the eBPF counters; none: no counters.
    #[serde(default)]
    pub core_iface: Option<String>,
    /// Whether to load the eBPF counters at all.
    #[serde(default = "yes")]
    pub bpf: bool,
    /// What migration may use of that port; none: nothing is tagged or shaped.
    #[serde(default)]
    pub policy: Option<PathBuf>,
    /// How guests are read beforehand.
    #[serde(default)]
    pub prepare: PrepareConfig,
    /// How VMs' writes are watched.
    #[serde(default)]
    pub sampling: SamplingConfig,
    /// How long others are waited for.
    #[serde(default)]
    pub timeouts: AgentTimeouts,
    /// Most memory for contents of all groups together, stored and kept, MiB.
    #[serde(default = "contents_mib")]
    pub contents_mib: u64,
    /// Most memory for what is known of contents that were sent, of all groups together, MiB.
    #[serde(default = "tables_mib")]
    pub tables_mib: u64,
    /// Most memory for contents that arriving VMs share, MiB for each group.
    #[serde(default = "store_mib")]
    pub store_mib: u64,
    /// Most memory for contents that are kept so that similar pages travel as differences from them, MiB for each group
    /// and role.
    #[serde(default = "kept_mib")]
    pub kept_mib: u64,
    /// Threads that compress beside those of departing VMs; none: as many as these leave processors free.
    #[serde(default)]
    pub workers: Option<u16>,
}

/// The word by which an operator takes plain text on a network upon himself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Plaintext {
    /// Whoever reaches the network's ports may do everything there.
    TrustedNetwork,
}

/// Refuses a port that strangers reach, where nobody is asked who he is.
pub(crate) fn check_reach(
    listens: &[SocketAddr],
    tls: bool,
    plaintext: Option<Plaintext>,
) -> Result<(), Mistake> {
    if tls && plaintext.is_some() {
        return Err("tls and plaintext are both given: take one away".into());
    }
    let open = listens.iter().find(|a| !a.ip().to_canonical().is_loopback());
    match open {
        Some(addr) if !tls && plaintext.is_none() => Err(format!(
            "{addr} is reached over the network, and without certificates everybody there may do everything: give tls \
             (a directory, see `irlm cert --help`), or plaintext = \"trusted-network\""
        )
        .into()),
        _ => Ok(()),
    }
}

/// `[prepare]` of agent.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareConfig {
    /// Guest memory read and hashed per second, MiB, over all guests of the host.
    pub rate_mib_s: u64,
    /// Whether to do so only on CPU time nobody else wants (SCHED_IDLE).
    pub idle: bool,
    /// Whether arriving VMs' memory is made while their group is prepared, where they would take all of it anyway.
    pub populate: bool,
}

impl Default for PrepareConfig {
    fn default() -> Self {
        Self { rate_mib_s: 400, idle: true, populate: true }
    }
}

/// `[sampling]` of agent.toml.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Whether programs in the kernel may be used, and VMs' dirty logs turned on for them; otherwise contents are read.
    pub kernel: bool,
    /// How long VMs are watched during preparation, seconds; 0: not at all.
    pub seconds: u32,
    /// One dirtying in so many is looked at by place.
    pub one_in: u32,
    /// Mbit/s that this host has towards the core link, for the order in which VMs leave; none: as the port says.
    pub link_mbit: Option<u64>,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { kernel: true, seconds: 2, one_in: 1, link_mbit: None }
    }
}

/// `[timeouts]` of agent.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentTimeouts {
    /// A peer silent for so long is taken for dead, milliseconds.
    pub peer_ms: u64,
}

impl Default for AgentTimeouts {
    fn default() -> Self {
        Self { peer_ms: 5000 }
    }
}

// bounds: the keys of one file
/// GROUP.toml: which VMs move from where to where.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The group's name; the agents know it by this.
    pub name: String,
    /// The source rack's index server; needed by method `irlm`.
    #[serde(default)]
    pub index: Option<SocketAddr>,
    /// The page digest.
    #[serde(default)]
    pub digest: Algorithm,
    /// The method, unless `--method` says otherwise; neither: `irlm`.
    #[serde(default)]
    pub method: Option<Method>,
    /// How page contents are compressed, unless `--compress` says otherwise.
    #[serde(default)]
    pub compress: Mode,
    /// Whether QEMUs may stream to each other where the link is faster than the agents (method `irlm`).
    #[serde(default)]
    pub direct: Direct,
    /// Whether similar contents leave as differences (methods `gm` and `irlm`); otherwise nothing is kept for them.
    #[serde(default = "yes")]
    pub differences: bool,
    /// Whether pages that are written all the time are held back while a VM runs, so that only their last version is sent.
    #[serde(default = "yes")]
    pub hold_back: bool,
    /// Whether source hosts lend each other contents that stand for many similar ones, so that each host's first VM can leave as
    /// differences, too (method `irlm`).
    #[serde(default = "yes")]
    pub models: bool,
    /// How VMs move that our own VMM runs, unless `--migration` says otherwise.
    #[serde(default)]
    pub migration: Migration,
    /// Longest downtime QEMU may plan for, milliseconds.
    #[serde(default = "downtime_ms")]
    pub downtime_ms: u64,
    /// Directory with the certificates to call agents and index with, unless `--tls` says otherwise; none: plain text.
    #[serde(default)]
    pub tls: Option<PathBuf>,
    /// Most VMs that leave one source host at a time; none: no bound.
    #[serde(default)]
    pub parallel: Option<u16>,
    /// What the whole group may use of the core link, Mbit/s; none: no limit of its own.
    #[serde(default)]
    pub budget_mbit: Option<u64>,
    /// IP multicast in the target rack; none: contents are forwarded to each host on its own.
    #[serde(default)]
    pub multicast: Option<MulticastConfig>,
    /// How moves are verified.
    #[serde(default)]
    pub verify: VerifyConfig,
    /// How long pages and peers are waited for.
    #[serde(default)]
    pub timeouts: GroupTimeouts,
    /// Source hosts.
    pub source: Vec<SourceHost>,
    /// Target hosts.
    pub target: Vec<TargetHost>,
    /// The VMs.
    pub vm: Vec<VmConfig>,
}

/// `[verify]` of GROUP.toml.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyConfig {
    /// Whether both ends account for every page, and compare before the target may run; whether they compare memory besides
    /// (methods `gm` and `irlm`).
    pub pages: Pages,
}

/// `[[source]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceHost {
    /// Its name here.
    pub name: String,
    /// Its agent's control address.
    pub agent: SocketAddr,
    /// Its agent's data address, as the other source hosts reach it; none: as the agent says.
    #[serde(default)]
    pub data: Option<SocketAddr>,
}

/// `[[target]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetHost {
    /// Its name here.
    pub name: String,
    /// Its agent's control address.
    pub agent: SocketAddr,
    /// Its agent's data address, as the source hosts reach it.
    pub data: SocketAddr,
}

/// `[[vm]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Its name.
    pub name: String,
    /// Name of the source host it runs on.
    pub source: String,
    /// Name of the target host it goes to.
    pub target: String,
    /// Trust domain: pages are shared only among VMs of the same label.
    #[serde(default)]
    pub tenant: String,
    /// QEMU's monitor socket on the source host.
    #[serde(default)]
    pub source_qmp: Option<PathBuf>,
    /// Monitor socket, on the target host, of the QEMU that waits with `-S -incoming defer`.
    #[serde(default)]
    pub target_qmp: Option<PathBuf>,
    /// Instead of `source_qmp`: control socket of the `irlm vmm` that runs it.
    #[serde(default)]
    pub source_vmm: Option<PathBuf>,
    /// Instead of `target_qmp`: control socket of the `irlm vmm --incoming` that waits for it.
    #[serde(default)]
    pub target_vmm: Option<PathBuf>,
}

impl VmConfig {
    /// Who runs it and who waits for it; none if the file does not say so in one of the two ways.
    #[must_use]
    pub fn fronts(&self) -> Option<(Front, Front)> {
        match (&self.source_qmp, &self.target_qmp, &self.source_vmm, &self.target_vmm) {
            (Some(s), Some(t), None, None) => Some((Front::Qmp(s.clone()), Front::Qmp(t.clone()))),
            (None, None, Some(s), Some(t)) => Some((Front::Vmm(s.clone()), Front::Vmm(t.clone()))),
            _ => None,
        }
    }
}

fn yes() -> bool {
    true
}

fn kept_mib() -> u64 {
    256
}
fn store_mib() -> u64 {
    4096
}
fn contents_mib() -> u64 {
    10_240
}
fn tables_mib() -> u64 {
    8192
}

fn downtime_ms() -> u64 {
    300
}

impl AgentConfig {
    /// Reads and checks agent.toml; `tls` is the directory of the command line, if it names one.
    pub fn load(file: &Path, tls: Option<&Path>) -> Result<Self, ConfigError> {
        load_with(file, |text| Self::parse_with(text, tls))
    }

    /// Reads and checks the text of an agent.toml.
    pub fn parse(text: &str) -> Result<Self, Mistake> {
        Self::parse_with(text, None)
    }

    fn parse_with(text: &str, tls: Option<&Path>) -> Result<Self, Mistake> {
        let mut c: Self = from_toml(text)?;
        c.tls = tls.map(Path::to_owned).or(c.tls);
        check_name("name", &c.name)?;
        if c.control == c.data {
            return Err(format!("control and data are both {}: give them two ports", c.control).into());
        }
        check_reach(&[c.control, c.data], c.tls.is_some(), c.plaintext)?;
        if c.policy.is_some() && c.core_iface.is_none() {
            return Err("policy is given, but not the port it is for: add core_iface".into());
        }
        check_range("prepare.rate_mib_s", c.prepare.rate_mib_s, 1..=1 << 20)?;
        check_range("store_mib", c.store_mib, 16..=1 << 24)?;
        check_range("kept_mib", c.kept_mib, 0..=1 << 20)?;
        check_range("contents_mib", c.contents_mib, 16..=1 << 24)?;
        check_range("tables_mib", c.tables_mib, 16..=1 << 24)?;
        check_range("sampling.seconds", c.sampling.seconds.into(), 0..=60)?;
        check_range("sampling.one_in", c.sampling.one_in.into(), 1..=1 << 20)?;
        check_range("sampling.link_mbit", c.sampling.link_mbit.unwrap_or(1), 1..=1 << 32)?;
        check_range("timeouts.peer_ms", c.timeouts.peer_ms, 100..=3_600_000)?;
        Ok(c)
    }
}

impl GroupConfig {
    /// Reads and checks GROUP.toml.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        load_with(file, Self::parse)
    }

    /// Reads and checks the text of a GROUP.toml.
    pub fn parse(text: &str) -> Result<Self, Mistake> {
        let c: Self = from_toml(text)?;
        check_name("name", &c.name)?;
        check_range("downtime_ms", c.downtime_ms, 1..=2_000_000)?;
        check_range("timeouts.wait_ms", c.timeouts.wait_ms, 10..=3_600_000)?;
        check_range("timeouts.prepare_ms", c.timeouts.prepare_ms, 100..=86_400_000)?;
        check_range("timeouts.move_ms", c.timeouts.move_ms, 1000..=604_800_000)?;
        if c.parallel == Some(0) {
            return Err(
                "parallel = 0 would move nothing: give 1 or more, or leave it out for no bound".into()
            );
        }
        if let Some(mbit) = c.budget_mbit {
            check_range("budget_mbit", mbit, 1..=MAX_MBIT)?;
        }
        if let Some(m) = &c.multicast {
            m.check()?;
        }
        check_range("the number of [[source]]", c.source.len() as u64, 1..=MAX_HOSTS as u64)?;
        check_range("the number of [[target]]", c.target.len() as u64, 1..=MAX_HOSTS as u64)?;
        check_range("the number of [[vm]]", c.vm.len() as u64, 1..=MAX_VMS as u64)?;
        let sources = unique("source", c.source.iter().map(|h| h.name.as_str()))?;
        let targets = unique("target", c.target.iter().map(|h| h.name.as_str()))?;
        unique("vm", c.vm.iter().map(|v| v.name.as_str()))?;
        distinct_agents("source", c.source.iter().map(|h| (h.name.as_str(), h.agent)))?;
        distinct_agents("target", c.target.iter().map(|h| (h.name.as_str(), h.agent)))?;
        for v in &c.vm {
            let here = |key: &str| format!("vm {:?}: {key}", v.name);
            if !sources.contains_key(v.source.as_str()) {
                return Err(
                    format!("{} = {:?}: no [[source]] has that name", here("source"), v.source).into()
                );
            }
            if !targets.contains_key(v.target.as_str()) {
                return Err(
                    format!("{} = {:?}: no [[target]] has that name", here("target"), v.target).into()
                );
            }
            if v.tenant.len() > MAX_TENANT {
                return Err(format!("{}: longer than {MAX_TENANT} bytes", here("tenant")).into());
            }
            let Some((source, target)) = v.fronts() else {
                return Err(format!(
                    "vm {:?}: needs source_qmp and target_qmp (a QEMU), or source_vmm and target_vmm (an `irlm vmm`), \
                     and nothing of the other kind",
                    v.name
                ).into());
            };
            let kind = if source.is_qemu() { "qmp" } else { "vmm" };
            for (side, path) in [("source", source.socket()), ("target", target.socket())] {
                if !path.is_absolute() || path.as_os_str().len() > MAX_SOCKET_PATH {
                    let (limit, key) = (MAX_SOCKET_PATH, format!("{side}_{kind}"));
                    return Err(
                        format!("{}: needs an absolute path of at most {limit} bytes", here(&key)).into()
                    );
                }
            }
        }
        let mut seen = HashMap::new();
        for v in &c.vm {
            let Some((source, target)) = v.fronts() else { continue };
            let kind = if source.is_qemu() { "qmp" } else { "vmm" };
            for (side, host, front) in [("source", &v.source, source), ("target", &v.target, target)] {
                if let Some(other) = seen.insert((side, host, front), &v.name) {
                    return Err(
                        format!("vm {:?} and vm {other:?} have the same {side}_{kind}", v.name).into()
                    );
                }
            }
        }
        Ok(c)
    }
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let size = std::fs::metadata(file).map_err(|e| fail(file, e.to_string()))?.len();
    if size > MAX_FILE {
        return Err(fail(file, format!("{size} bytes is too large for a configuration file")));
    }
    std::fs::read_to_string(file).map_err(|e| fail(file, e.to_string()))
}

/// Reads a file and has its text checked; errors name the file.
pub(super) fn load_with<T>(
    file: &Path,
    parse: impl FnOnce(&str) -> Result<T, Mistake>,
) -> Result<T, ConfigError> {
    parse(&read(file)?).map_err(|Mistake(what)| fail(file, what))
}

/// Reads the keys of `[roles]` from a file of their own, for programs that have no other.
pub fn load_roles(file: &Path) -> Result<Mapping, ConfigError> {
    load_with(file, from_toml)
}

fn fail(file: &Path, what: String) -> ConfigError {
    ConfigError { file: file.display().to_string(), what }
}

/// One line with the place, instead of the parser's drawing of it.
pub(super) fn from_toml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Mistake> {
    toml::from_str(text).map_err(|e| {
        let what = e.message().replace('\n', " ");
        let Some(span) = e.span().filter(|s| s.start <= text.len()) else { return what.into() };
        let before = text.get(..span.start).unwrap_or("");
        let line = text.lines().nth(before.matches('\n').count()).unwrap_or("").trim();
        format!("line {}: {what} (at `{line}`)", before.matches('\n').count() + 1).into()
    })
}

fn check_name(key: &str, name: &str) -> Result<(), Mistake> {
    if valid_name(name) {
        return Ok(());
    }
    Err(format!("{key} = {name:?}: give 1 to {MAX_NAME} of a-z 0-9 - _ . that do not start with a dot")
        .into())
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<HashMap<&'a str, usize>, Mistake> {
    let mut seen = HashMap::new();
    for (i, n) in names.enumerate() {
        check_name(&format!("[[{what}]] name"), n)?;
        if seen.insert(n, i).is_some() {
            return Err(format!("[[{what}]] name = {n:?} is there twice: rename one").into());
        }
    }
    Ok(seen)
}

fn distinct_agents<'a>(
    what: &str,
    hosts: impl Iterator<Item = (&'a str, SocketAddr)>,
) -> Result<(), Mistake> {
    let mut seen = HashMap::new();
    for (name, agent) in hosts {
        if let Some(other) = seen.insert(agent, name) {
            return Err(format!(
                "[[{what}]] {name:?} and {other:?} have the same agent {agent}: one host, one entry"
            )
            .into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = include_str!("../../../docs/examples/agent.toml");
    const GROUP: &str = include_str!("../../../docs/examples/group.toml");

    #[test]
    fn the_examples_are_valid_and_show_the_defaults() {
        let a = AgentConfig::parse(AGENT).unwrap();
        let least = "name='a'\ncontrol='127.0.0.1:1'\ndata='127.0.0.1:2'\nstate_dir='/s'";
        let d = AgentConfig::parse(least).unwrap();
        assert_eq!(
            (a.prepare.rate_mib_s, a.store_mib, a.kept_mib, a.bpf),
            (d.prepare.rate_mib_s, d.store_mib, d.kept_mib, d.bpf)
        );
        assert_eq!(format!("{:?}", a.timeouts), format!("{:?}", d.timeouts));
        assert_eq!(a.sampling, d.sampling);
        let g = GroupConfig::parse(GROUP).unwrap();
        assert_eq!((g.source.len(), g.target.len(), g.vm.len()), (2, 2, 4));
        assert_eq!((g.downtime_ms, g.timeouts), (300, GroupTimeouts::default()));
        // The multicast that the example shows, and does not turn on.
        let shown = GROUP.lines().skip_while(|l| *l != "# [multicast]");
        let shown: Vec<&str> =
            shown.map_while(|l| l.strip_prefix("# ")).filter(|l| !l.starts_with('#')).collect();
        let m = GroupConfig::parse(
            &GROUP.replace("[[source]]\nname = \"s1\"", &(shown.join("\n") + "\n[[source]]\nname = \"s1\"")),
        );
        let m = m.unwrap().multicast.unwrap();
        assert_eq!((m.mtu, m.floor_mbit, m.ceiling_mbit), (1500, 5, Some(5000)));
    }

    #[test]
    fn each_mistake_has_one_line_that_names_it() {
        let cases = [
            ("name = \"rack-7\"", "name = \"Rack 7\"", "a-z 0-9"),
            ("downtime_ms = 300", "downtime_ms = \"soon\"", "downtime_ms"),
            ("downtime_ms = 300", "downtime_ms = 0", "must be 1 to"),
            ("downtime_ms = 300", "downtme_ms = 300", "downtme_ms"),
            ("source = \"s1\"", "source = \"s9\"", "no [[source]] has that name"),
            ("target = \"t1\"", "target = \"t9\"", "no [[target]] has that name"),
            ("name = \"db1\"", "name = \"web1\"", "there twice"),
            ("name = \"s2\"", "name = \"s1\"", "there twice"),
            ("digest = \"blake3\"", "digest = \"md5\"", "md5"),
            ("pages = \"stream\"", "pages = \"disk\"", "disk"),
            ("downtime_ms = 300", "budget_mbit = 0", "must be 1 to"),
            ("method = \"irlm\"", "method = \"magic\"", "magic"),
            ("source_qmp = \"/run/vm/web1.qmp\"", "source_qmp = \"web1.qmp\"", "absolute path"),
            ("source_qmp = \"/run/vm/db1.qmp\"", "source_qmp = \"/run/vm/web1.qmp\"", "same source_qmp"),
            ("agent = \"10.1.0.12:7700\"", "agent = \"10.1.0.11:7700\"", "same agent"),
            ("# [multicast]", "[multicast]\ngroup = \"10.2.0.1:7720\"", "239.0.0.0/8"),
            ("# [multicast]", "[multicast]\ngroup = \"[ff0e::1]:7720\"", "ff05::/16"),
            ("# [multicast]", "[multicast]\ngroup = \"239.255.7.1:0\"", "a port"),
            ("# [multicast]", "[multicast]\ngroup = \"239.255.7.1:7720\"\nmtu = 200", "1280 to 9000"),
            (
                "# [multicast]",
                "[multicast]\ngroup = \"239.255.7.1:7720\"\nfloor_mbit = 90\nceiling_mbit = 80",
                "ceiling_mbit is 80",
            ),
            ("source_qmp = \"/run/vm/db1.qmp\"", "", "source_vmm and target_vmm"),
            ("source_qmp = \"/run/vm/db1.qmp\"", "source_vmm = \"/run/vm/db1.vmm\"", "other kind"),
        ];
        for (good, bad, want) in cases {
            assert!(GROUP.contains(good), "{good} is not in the example");
            let e = GroupConfig::parse(&GROUP.replacen(good, bad, 1)).unwrap_err();
            assert!(e.0.contains(want) && !e.0.contains('\n'), "{bad}: {e}");
        }
        let e = GroupConfig::parse("name='g'\nsource=[]\ntarget=[]\nvm=[]").unwrap_err();
        assert!(e.0.contains("[[source]]"), "{e}");
        let e = AgentConfig::load(Path::new("/nonexistent/agent.toml"), None).unwrap_err().to_string();
        assert!(e.starts_with("/nonexistent/agent.toml: "), "{e}");
        let e = AgentConfig::parse(&AGENT.replace(":7701", ":7700")).unwrap_err();
        assert!(e.0.contains("two ports"), "{e}");
        let e = AgentConfig::parse(&AGENT.replace("tls = \"", "# tls = \"")).unwrap_err();
        assert!(e.0.contains("10.1.0.11:7700") && e.0.contains("trusted-network"), "{e}");
        let open = AGENT.replace("tls = \"/etc/irlm/tls\"", "plaintext = \"trusted-network\"");
        assert_eq!(AgentConfig::parse(&open).unwrap().plaintext, Some(Plaintext::TrustedNetwork));
        // What the command line names is not left aside.
        let dir = Path::new("/d");
        assert!(AgentConfig::parse_with(&open, Some(dir)).unwrap_err().0.contains("take one away"));
        assert_eq!(AgentConfig::parse_with(AGENT, Some(dir)).unwrap().tls.as_deref(), Some(dir));
        let e = AgentConfig::parse(&AGENT.replace("rate_mib_s = 400", "rate_mib_s = 0")).unwrap_err();
        assert!(e.0.contains("prepare.rate_mib_s"), "{e}");
    }

    #[test]
    fn names_are_safe_in_files_and_on_terminals() {
        let bad = ["", ".", "..", ".a", "A", "a/b", "a b", "a\n", "ä", &"x".repeat(MAX_NAME + 1)];
        assert!(["a", "rack-7_b.c", &"x".repeat(MAX_NAME)].iter().all(|n| valid_name(n)));
        assert_eq!(bad.iter().find(|n| valid_name(n)), None);
    }
}
