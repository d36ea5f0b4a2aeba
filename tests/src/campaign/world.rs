//! What all runs of a campaign stand on: one set of namespaces, links whose rates can be changed, an index and agents that
//! are started afresh for each run, each with its own small disk.

use super::schedule::{Schedule, Side};
use crate::cache::Cache;
use crate::irlm::{CONTROL, DATA, Proc, allow, spawn};
use crate::janitor::Run;
use crate::net::{Host, Net, NetSpec, Rates};
use anyhow::{Context as _, Result, bail};
use irlm_user::flow::index::client::IndexOpener;
use irlm_user::net::connection::{Endpoint, Security};
use irlm_user::net::tls::{Credentials, Use};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Hosts in each rack: as many as the largest shape has.
pub(super) const HOSTS: usize = 2;
const INDEX: u16 = 7710;
/// An agent's whole disk.
const DISK: &str = "size=1m,mode=700";
/// How long an agent and the index may take to end when they are asked to. Each program that an agent detaches waits for a grace
/// period of the kernel's RCU. One took 6 s here, where the median is 12 ms (`membarrier` asked in a loop beside a campaign).
const END: Duration = Duration::from_secs(30);
/// The group's name in every run.
pub(super) const GROUP: &str = "lab";

/// Namespaces, directories and programs.
#[derive(Debug)]
pub(super) struct World {
    pub(super) net: Net,
    pub(super) program: PathBuf,
    pub(super) cache: Cache,
    /// Whether agents know how to hold a VM at the handover's words.
    drills: bool,
    run: Run,
}

/// The daemons of one run.
#[derive(Debug)]
pub(super) struct Daemons {
    pub(super) index: Option<Proc>,
    pub(super) agents: BTreeMap<Host, Proc>,
    args: Vec<String>,
    /// What each agent had pinned before it had any group.
    pins: BTreeMap<Host, BTreeSet<String>>,
}

/// An agent's host.
pub(super) fn host(side: Side, n: usize) -> Host {
    if side == Side::Source { Host::Source(n) } else { Host::Target(n) }
}

impl World {
    pub(super) fn new(program: PathBuf) -> Result<Self> {
        let cache = Cache::open()?;
        let help = Command::new(&program).args(["agent", "--help"]).output();
        let help = help.with_context(|| format!("start {}", program.display()))?;
        let drills = String::from_utf8_lossy(&help.stdout).contains("--drill-before-give-up");
        let run = Run::start()?;
        let rates = Rates { edge: Some(1_000_000_000), core: Some(1_000_000_000) };
        let spec = NetSpec { hosts: HOSTS, others: 0, rates, host_qdisc: true, congestion: None, tls: true };
        let net = Net::create(run.id(), spec)?;
        let world = Self { net, program, cache, drills, run };
        for host in world.hosts(HOSTS).chain([Host::Ctl]) {
            std::fs::create_dir_all(world.state(host))?;
        }
        std::fs::create_dir(world.shared())?;
        for host in world.hosts(HOSTS) {
            let data = std::ffi::CString::new(DISK)?;
            mount("none", world.state(host), "tmpfs", MountFlags::empty(), data.as_c_str())
                .with_context(|| format!("mount a disk for {}", host.name()))?;
        }
        Ok(world)
    }

    pub(super) fn hosts(&self, n: usize) -> impl Iterator<Item = Host> + use<> {
        (0..n).flat_map(|h| [Host::Source(h), Host::Target(h)])
    }

    pub(super) fn dir(&self, host: Host) -> PathBuf {
        self.run.dir().join(host.name())
    }

    /// Where both sides' images and disks are.
    pub(super) fn shared(&self) -> PathBuf {
        self.run.dir().join("shared")
    }

    fn state(&self, host: Host) -> PathBuf {
        self.dir(host).join("state")
    }

    /// All files of the run before are removed.
    pub(super) fn clear(&self) -> Result<()> {
        for dir in self.hosts(HOSTS).chain([Host::Ctl]).map(|h| self.dir(h)).chain([self.shared()]) {
            empty(&dir)?;
        }
        Ok(())
    }

    /// What everybody wrote, copied for whoever wants to know what went wrong.
    pub(super) fn keep_logs(&self, to: &Path) -> Result<()> {
        for host in self.hosts(HOSTS).chain([Host::Ctl]) {
            for e in std::fs::read_dir(self.dir(host))?.flatten() {
                let name = e.file_name().to_string_lossy().into_owned();
                if e.path().is_file() && [".log", ".json", ".toml"].iter().any(|end| name.ends_with(end)) {
                    std::fs::copy(e.path(), to.join(format!("{}-{name}", host.name())))?;
                }
            }
        }
        Ok(())
    }

    /// Sets all links' rates, Mbit/s.
    pub(super) fn rates(&self, edge: u32, core: u32) -> Result<()> {
        let mut of: BTreeMap<String, String> = BTreeMap::new();
        for host in self.hosts(HOSTS) {
            let switch = if matches!(host, Host::Target(_)) { "tsw" } else { "ssw" };
            of.entry(switch.into()).or_default().push_str(&bucket(&host.name(), edge, None));
            of.entry(host.name()).or_default().push_str(&bucket("eth0", edge, None));
        }
        for (ns, lines) in of {
            self.tc(&ns, &lines)?;
        }
        self.core(core, None)
    }

    /// Sets the core link's rate, and what its queue holds if that is less than usual.
    pub(super) fn core(&self, mbit: u32, queue: Option<u32>) -> Result<()> {
        self.net.mend_core()?;
        ["ssw", "tsw"].iter().try_for_each(|ns| self.tc(ns, &bucket("core", mbit, queue)))
    }

    fn tc(&self, ns: &str, lines: &str) -> Result<()> {
        let mut child = Command::new("tc")
            .args(["-n", &self.net.namespace(ns), "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start tc (iproute2)")?;
        child.stdin.take().context("no input")?.write_all(lines.as_bytes())?;
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!("tc in {ns}: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(())
    }

    /// Starts the index and the agents of so many hosts.
    pub(super) fn daemons(&self, s: &Schedule) -> Result<Daemons> {
        let mut args = Vec::new();
        for (arg, ms) in [("--drill-before-give-up", s.drill.0), ("--drill-after-give-up", s.drill.1)] {
            if ms > 0 && self.drills {
                args.extend([arg.to_owned(), ms.to_string()]);
            }
        }
        let mut d = Daemons { index: None, agents: BTreeMap::new(), args, pins: BTreeMap::new() };
        self.start_index(&mut d)?;
        for host in self.hosts(s.hosts) {
            self.start_agent(&mut d, host)?;
        }
        d.ready()?;
        d.pins = d.agents.iter().map(|(h, p)| (*h, pins(p.pid()))).collect();
        Ok(d)
    }

    /// Starts the index server; it may not listen yet.
    pub(super) fn start_index(&self, d: &mut Daemons) -> Result<()> {
        let listen = format!("{}:{INDEX}", Host::Ctl.ip());
        let dir = self.dir(Host::Ctl);
        let place = (&self.net, Host::Ctl, &*dir);
        d.index = Some(spawn(place, &self.program, "index", &["index", "--listen", &listen])?);
        Ok(())
    }

    /// Starts, or starts again, the agent of a host; it may not listen yet.
    pub(super) fn start_agent(&self, d: &mut Daemons, host: Host) -> Result<()> {
        let (ip, name, dir) = (host.ip(), host.name(), self.dir(host));
        let (config, state) = (dir.join("agent.toml"), self.state(host));
        // Short waits for the dead, so that many runs fit into an hour; and the guests leave no processor idle here.
        let text = format!(
            "name = {name:?}\ncontrol = \"{ip}:{CONTROL}\"\ndata = \"{ip}:{DATA}\"\nstate_dir = {state:?}\n\
             core_iface = \"eth0\"\n{}[prepare]\nidle = false\n[sampling]\nseconds = 0\n[timeouts]\npeer_ms = 4000\n{}",
            self.net.secured(host),
            allow(&dir)
        );
        std::fs::write(&config, text)?;
        let config = config.display().to_string();
        let mut args = vec!["agent", "--config", &config];
        args.extend(d.args.iter().map(String::as_str));
        let p = spawn((&self.net, host, &dir), &self.program, "agent", &args)?;
        d.agents.insert(host, p);
        Ok(())
    }

    /// Fills an agent's disk to its last byte.
    pub(super) fn fill_disk(&self, host: Host) -> Result<()> {
        let mut file = std::fs::File::create(self.state(host).join("filler"))?;
        for n in [64 << 10, 4096, 512, 1] {
            while file.write_all(&vec![7; n]).is_ok() {}
        }
        Ok(())
    }

    /// Gives it room again.
    pub(super) fn empty_disk(&self, host: Host) {
        let _ = std::fs::remove_file(self.state(host).join("filler"));
    }

    /// Runs `irlm` in the source rack; gives its exit code and standard output.
    pub(super) fn irlm(&self, args: &[&str]) -> Result<(i32, String)> {
        let out = self.net.command(Host::Ctl, &self.program).args(args).output()?;
        Ok((out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stdout).into_owned()))
    }

    /// Starts `irlm` in the source rack; its output goes to `WHAT.log`.
    pub(super) fn spawn(&self, what: &str, args: &[&str]) -> Result<Proc> {
        let dir = self.dir(Host::Ctl);
        spawn((&self.net, Host::Ctl, &*dir), &self.program, what, args)
    }

    /// What the agents say of a group: host, role, VM, phase, error.
    pub(super) fn status(&self, file: &Path) -> Result<Value> {
        let (code, text) = self.irlm(&["status", &file.display().to_string(), "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("irlm status ended with {code}"))
    }

    /// Why a group of this name cannot be opened at the index now, if it cannot.
    pub(super) fn name_is_taken(&self, s: &Schedule) -> Option<String> {
        let hosts = u16::try_from(s.hosts).unwrap_or(u16::MAX);
        let addr = format!("{}:{INDEX}", Host::Ctl.ip());
        let opened = self.net.within(Host::Ctl, || {
            let addr: SocketAddr = addr.parse().context("the index's address")?;
            let token = blake3::hash(&s.seed.to_le_bytes()).into();
            let keys = self.net.keys(Host::Ctl).context("the lab speaks TLS")?;
            let security = Security::Tls(Arc::new(Credentials::open(&keys, Use::Client)?));
            let at = Endpoint { addr, security };
            let opened = IndexOpener::open(at, GROUP, &token, hosts, hosts, Duration::from_secs(5))?;
            Ok(opened.close()?)
        });
        opened.err().map(|e| format!("{e:#}"))
    }

    /// Ends the daemons as an operator would, and says what they left behind.
    pub(super) fn end(&self, d: &mut Daemons) -> Vec<String> {
        let mut left = Vec::new();
        for (host, p) in &d.agents {
            let now = pins(p.pid());
            let before = d.pins.get(host).cloned().unwrap_or_default();
            let more: Vec<&str> = now.difference(&before).map(String::as_str).collect();
            if !more.is_empty() {
                left.push(format!("pinned by {} after the group: {}", host.name(), more.join(", ")));
            }
        }
        let agents = d.agents.iter_mut().map(|(h, p)| (format!("agent {}", h.name()), p));
        let mut all: Vec<_> = agents.chain(d.index.iter_mut().map(|p| ("the index".to_owned(), p))).collect();
        for (_, p) in &all {
            let _ = p.signal(rustix::process::Signal::TERM);
        }
        let until = Instant::now() + END;
        for (who, p) in &mut all {
            if p.wait(until.saturating_duration_since(Instant::now())).is_err() {
                left.push(format!("{who} does not end at SIGTERM: {}", threads(p.pid())));
                p.kill();
            }
        }
        left
    }

    /// What is left on the hosts when nothing of a run should be.
    pub(super) fn leftovers(&self, s: &Schedule) -> Vec<String> {
        let mut left = Vec::new();
        for host in self.hosts(s.hosts).chain([Host::Ctl]) {
            let ns = self.net.namespace(&host.name());
            let out = |c: &mut Command| c.output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
            let pids = out(Command::new("ip").args(["netns", "pids", &ns])).unwrap_or_default();
            for pid in pids.split_whitespace() {
                let what = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                left.push(format!("process {pid} ({}) on {}", what.trim(), host.name()));
            }
            if host == Host::Ctl {
                continue;
            }
            let qdiscs = out(Command::new("tc").args(["-n", &ns, "qdisc", "show", "dev", "eth0"]));
            for line in qdiscs.unwrap_or_default().lines().filter(|l| !l.contains(" tbf ")) {
                left.push(format!("on {}: {}", host.name(), line.trim()));
            }
            // What the journal keeps as history is not looked at; sockets and half-written files are.
            for e in std::fs::read_dir(self.state(host)).into_iter().flatten().flatten() {
                let name = e.file_name().to_string_lossy().into_owned();
                let socket = e.file_type().is_ok_and(|t| t.is_socket());
                if socket || [".tmp", ".part", ".new"].iter().any(|end| name.ends_with(end)) {
                    left.push(format!("{name} in the state directory of {}", host.name()));
                }
            }
        }
        left
    }
}

/// Where the threads of a process are, one after the other.
fn threads(pid: u32) -> String {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = |what: &str| std::fs::read_to_string(task.path().join(what)).unwrap_or_default();
        let state =
            text("status").lines().find_map(|l| l.strip_prefix("State:").map(|s| s.trim().to_owned()));
        let frames: Vec<String> = text("stack")
            .lines()
            .take(8)
            .filter_map(|l| Some(l.split(' ').nth(1)?.split('+').next()?.to_owned()))
            .collect();
        let state = state.unwrap_or_default();
        all.push(format!("{} {state} in {}", text("comm").trim(), frames.join("<")));
    }
    all.join("; ")
}

impl Daemons {
    /// Waits until all listen.
    pub(super) fn ready(&mut self) -> Result<()> {
        for p in self.agents.values_mut() {
            p.listening(CONTROL, Duration::from_secs(20))?;
            // Its port is open before it has pinned what it keeps as long as it lives.
            p.says(": control ", Duration::from_secs(20))?;
        }
        self.index.iter_mut().try_for_each(|p| p.listening(INDEX, Duration::from_secs(10)))
    }

    /// Starts again what has ended; gives who it was.
    pub(super) fn revive(&mut self, world: &World) -> Result<Vec<String>> {
        let mut dead = Vec::new();
        let gone = |p: &mut Proc| !matches!(p.ended(), Ok(None));
        if self.index.as_mut().is_none_or(gone) {
            dead.push("index".to_owned());
            world.start_index(self)?;
        }
        let all: Vec<Host> = self.agents.iter_mut().filter_map(|(h, p)| gone(p).then_some(*h)).collect();
        for host in all {
            dead.push(format!("agent {}", host.name()));
            world.start_agent(self, host)?;
        }
        Ok(dead)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in self.hosts(HOSTS) {
            let _ = unmount(self.state(host), UnmountFlags::DETACH);
        }
    }
}

/// What a process has pinned in the BPF file system that it sees.
fn pins(pid: u32) -> BTreeSet<String> {
    let root = PathBuf::from(format!("/proc/{pid}/root/sys/fs/bpf"));
    let mut out = BTreeSet::new();
    let mut todo = vec![root.clone()];
    while let Some(dir) = todo.pop() {
        for e in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if e.file_type().is_ok_and(|t| t.is_dir()) {
                todo.push(e.path());
            }
            if let Ok(name) = e.path().strip_prefix(&root) {
                out.insert(name.display().to_string());
            }
        }
    }
    out
}

/// A token bucket as the lab's own ones (`net`), at this rate.
fn bucket(link: &str, mbit: u32, queue: Option<u32>) -> String {
    let bytes = u64::from(mbit.max(1)) * 125_000;
    let (burst, limit) = ((bytes / 500).max(16_384), (bytes / 50).max(65_536));
    let (burst, limit) = queue.map_or((burst, limit), |q| (3000, u64::from(q)));
    format!("qdisc replace dev {link} root tbf rate {mbit}mbit burst {burst}b limit {limit}b\n")
}

/// Removes all files below a directory, and leaves the directories.
fn empty(dir: &Path) -> Result<()> {
    for e in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let e = e?;
        if e.file_type()?.is_dir() {
            empty(&e.path())?;
        } else {
            std::fs::remove_file(e.path())?;
        }
    }
    Ok(())
}
