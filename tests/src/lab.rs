//! Two racks of guests, put together: a lab is made once, and each round (one method, one failure case) starts again
//! from the same restored guests.

use crate::cache::Cache;
use crate::janitor::Run;
use crate::net::{Host, Net, NetSpec, Rates};
use crate::profile::spent;
use crate::qemu::{Guest, Place, Role, Vm};
use crate::ram::{self, Census, Compared};
use crate::states::{self, State};
use anyhow::{Context as _, Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a guest may take to answer; emulated guests share few cores.
const ANSWER: Duration = Duration::from_secs(60);

/// What a lab is made of.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// Guests of each source host; as many target hosts are made.
    pub hosts: Vec<Vec<Guest>>,
    /// Link rates.
    pub rates: Rates,
    /// QEMU on the source hosts.
    pub qemu_source: PathBuf,
    /// QEMU on the target hosts.
    pub qemu_target: PathBuf,
    /// Whether each host's `eth0` keeps its own rate; if not it has no qdisc, and agents may set one up ([`NetSpec`]).
    pub host_qdisc: bool,
    /// Pairs of machines of other people, for their traffic over the core link.
    pub others: usize,
    /// TCP's congestion control on all hosts; the machine's own default if not given.
    pub congestion: Option<&'static str>,
    /// The text of every agent's policy file; agents have none if there is none here.
    pub policy: Option<String>,
    /// Whether agents prepare on processor time that guests want too: guests that never rest leave an idle-priority
    /// thread next to nothing of a few shared processors. Guests of our own VMM get still less then.
    pub hurry: bool,
    /// Whether IRLM's programs speak TLS ([`NetSpec`]).
    pub tls: bool,
}

impl LabSpec {
    /// `hosts` × `guests` guests of `mem_mib` MiB: a web on each host, a db on the first host, or on each where there are
    /// four guests or more (the paper's rack: web, db, idle, idle), and idle ones beside them.
    #[must_use]
    pub fn new(cache: &Cache, hosts: usize, guests: usize, mem_mib: u32) -> Self {
        let mut seeds = [0; 3];
        let mut guest = |host: usize, n: usize| {
            let role = match (host, n) {
                (_, 0) => Role::Web,
                (0, 1) => Role::Db,
                (_, 1) if guests >= 4 => Role::Db,
                _ => Role::Idle,
            };
            let seed = seeds[role as usize];
            seeds[role as usize] += 1;
            Guest { role, seed, mem_mib }
        };
        let hosts = (0..hosts).map(|h| (0..guests).map(|n| guest(h, n)).collect()).collect();
        let qemu = cache.qemu("7.2");
        Self {
            hosts,
            rates: Rates::default(),
            qemu_source: qemu.clone(),
            qemu_target: qemu,
            host_qdisc: true,
            others: 0,
            congestion: None,
            policy: None,
            hurry: false,
            tls: true,
        }
    }

    /// The network it stands on.
    fn net(&self) -> NetSpec {
        NetSpec {
            hosts: self.hosts.len(),
            others: self.others,
            rates: self.rates,
            host_qdisc: self.host_qdisc,
            congestion: self.congestion,
            tls: self.tls,
        }
    }
}

/// The racks, without guests.
#[derive(Debug)]
pub struct Lab {
    /// The network.
    pub net: Net,
    /// What it was made of.
    pub spec: LabSpec,
    cache: Cache,
    states: Vec<Vec<State>>,
    // Last: fields are dropped in order, and this one removes what the others stand on.
    run: Run,
}

/// A guest on its way: the running source and the waiting target.
#[derive(Debug)]
pub struct Pair {
    /// "web0".
    pub name: String,
    /// Number of its source host, and of its target host.
    pub host: usize,
    /// Where it runs.
    pub source: Vm,
    /// Where it shall run: started paused, waiting for `migrate-incoming`.
    pub target: Vm,
    check: String,
    uptime: f64,
}

/// One round's guests. Dropping it ends them all.
#[derive(Debug)]
pub struct Guests {
    /// All pairs, host by host.
    pub pairs: Vec<Pair>,
}

impl Lab {
    /// Makes the network and sees to it that every guest has a saved state. `say` is told what takes long.
    pub fn new(cache: Cache, spec: LabSpec, say: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        for q in [&spec.qemu_source, &spec.qemu_target] {
            if !q.is_file() {
                bail!("there is no QEMU at {}: run `cargo xtask setup`, or give its path", q.display());
            }
        }
        let run = Run::start()?;
        let all: Vec<Guest> = spec.hosts.iter().flatten().cloned().collect();
        let mut flat = states::ensure(&cache, run.dir(), &all, say)?.into_iter();
        let states = spec.hosts.iter().map(|h| flat.by_ref().take(h.len()).collect()).collect();
        let net = Net::create(run.id(), spec.net())?;
        for h in 0..spec.hosts.len() {
            for host in [Host::Source(h), Host::Target(h)] {
                std::fs::create_dir(run.dir().join(host.name()))?;
            }
        }
        std::fs::create_dir(run.dir().join("ctl"))?;
        for o in 0..spec.others {
            for host in [Host::OtherSource(o), Host::OtherTarget(o)] {
                std::fs::create_dir(run.dir().join(host.name()))?;
            }
        }
        Ok(Self { net, spec, cache, states, run })
    }

    /// A host's own directory.
    #[must_use]
    pub fn dir(&self, host: Host) -> PathBuf {
        self.run.dir().join(host.name())
    }

    /// The lab's directory.
    #[must_use]
    pub fn top(&self) -> &Path {
        self.run.dir()
    }

    /// Restores every guest on its source host and runs it, and starts the waiting targets.
    pub fn start_guests(&self) -> Result<Guests> {
        let mut pairs = Vec::new();
        for (h, guests) in self.spec.hosts.iter().enumerate() {
            for (g, guest) in guests.iter().enumerate() {
                let (from, to) = (self.dir(Host::Source(h)), self.dir(Host::Target(h)));
                let at = |host, dir, qemu| Place { net: Some((&self.net, host)), dir, qemu };
                let place = at(Host::Source(h), &from, &self.spec.qemu_source);
                let mut source = Vm::start(&self.cache, guest, place, true)?;
                let place = at(Host::Target(h), &to, &self.spec.qemu_target);
                let target = Vm::start(&self.cache, guest, place, true)?;
                states::restore(&mut source, &self.states[h][g])
                    .with_context(|| format!("{}; QEMU said: {}", guest.name(), source.said().trim()))?;
                source.qmp.run("cont", &json!({}))?;
                let check = self.states[h][g].check.clone();
                pairs.push(Pair { name: guest.name(), host: h, source, target, check, uptime: 0.0 });
            }
        }
        for p in &mut pairs {
            p.uptime = p.source.service()?.ask("uptime", ANSWER)?.parse().context("uptime")?;
        }
        Ok(Guests { pairs })
    }

    /// Compares the memory of one pair; both sides must be paused.
    pub fn compare(&self, pair: &mut Pair) -> Result<Compared> {
        ram::compare(&mut pair.source, &mut pair.target, self.run.dir())
            .with_context(|| format!("memory of {}", pair.name))
    }
}

impl Guests {
    /// The pair named `name`.
    pub fn pair(&mut self, name: &str) -> Result<&mut Pair> {
        self.pairs.iter_mut().find(|p| p.name == name).with_context(|| format!("there is no guest {name}"))
    }

    /// What could be shared among the guests as they are now.
    pub fn census(&self) -> Result<Census> {
        let hosts = 1 + self.pairs.iter().map(|p| p.host).max().unwrap_or(0);
        let by_host: Vec<Vec<&Vm>> = (0..hosts)
            .map(|h| self.pairs.iter().filter(|p| p.host == h).map(|p| &p.source).collect())
            .collect();
        ram::census(&by_host)
    }

    /// Seconds of processor time that the QEMUs of both sides have used, but for what their guests computed.
    #[must_use]
    pub fn spent(&self) -> f64 {
        self.pairs.iter().map(|p| spent(p.source.pid()) + spent(p.target.pid())).sum()
    }

    /// What the QEMUs printed, for an error message.
    #[must_use]
    pub fn said(&self) -> String {
        let of = |p: &Pair| {
            [("source", p.source.said()), ("target", p.target.said())].map(|s| (p.name.clone(), s.0, s.1))
        };
        let all = self.pairs.iter().flat_map(of).filter(|s| !s.2.trim().is_empty());
        all.map(|(name, side, said)| format!("--- {side} QEMU of {name}\n{said}\n")).collect()
    }

    /// Makes every guest write to `pages` pages of its memory, `rate` pages a second, and check what it wrote before.
    pub fn start_writers(&mut self, rate: u32, pages: u32) -> Result<()> {
        for p in &mut self.pairs {
            p.source.service()?.ask(&format!("writer {rate} {pages}"), ANSWER)?;
        }
        Ok(())
    }
}

impl Pair {
    /// Resumes the paused target and asks its service, which must answer as the source did before.
    pub fn resume_and_check(&mut self) -> Result<()> {
        self.target.qmp.run("cont", &json!({}))?;
        self.check_target()
    }

    /// Asks the service of the target, which must run and answer as the source did before.
    pub fn check_target(&mut self) -> Result<()> {
        Self::check(&mut self.target, &self.check, self.uptime)
            .with_context(|| format!("{} on the target", self.name))
    }

    /// Asks the service of the source, which must still run as before.
    pub fn check_source(&mut self) -> Result<()> {
        let status = self.source.qmp.status()?;
        if status != "running" {
            bail!("{}: the source should run, and is {status}", self.name);
        }
        Self::check(&mut self.source, &self.check, self.uptime)
            .with_context(|| format!("{} on the source", self.name))
    }

    fn check(vm: &mut Vm, expected: &str, uptime: f64) -> Result<()> {
        let mut service = vm.service()?;
        let now: f64 = service.ask("uptime", ANSWER)?.parse().context("uptime")?;
        if now < uptime {
            bail!("the guest's clock went back from {uptime} s to {now} s");
        }
        let answer = service.ask("check", ANSWER)?;
        if answer != expected {
            bail!("the service answers `{answer}`, not `{expected}`");
        }
        // Empty if no writer was started; an error if it found a page with old content.
        service.ask("written", ANSWER)?;
        Ok(())
    }
}
