//! One run as it goes: VMs and daemons stand, the evacuation begins, and what the schedule says happens when it says so.

use super::copy::{Hand, Place};
use super::schedule::{Event, Fault, Kind, Schedule, Side, Who};
use super::vm::{Known, Vm, Whereabouts, lock};
use super::world::{Daemons, GROUP, World, host};
use crate::irlm::{CONTROL, DATA, Proc};
use crate::net::Host;
use anyhow::{Result, bail};
use rustix::process::Signal;
use serde_json::json;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest wait for an evacuation after the last thing that happened to it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something that is still to be done.
#[derive(Debug, Clone, Copy)]
enum Todo {
    Fault(Fault),
    Continue(Who),
    Restart(Who),
    Mend,
    Rates,
    Room(Host),
}

/// A command that an operator gave.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) what: String,
    pub(super) proc: Proc,
    pub(super) json: Option<PathBuf>,
    /// Its exit code, once it has ended; -1 if a signal ended it.
    pub(super) code: Option<i32>,
    /// Since the run began.
    pub(super) ended: Duration,
}

/// One run under way.
#[derive(Debug)]
pub(super) struct Act<'a> {
    pub(super) world: &'a World,
    pub(super) s: &'a Schedule,
    pub(super) epoch: Instant,
    began: Instant,
    pub(super) daemons: Daemons,
    pub(super) vms: Vec<Vm>,
    /// The first is the evacuation itself.
    pub(super) ops: Vec<Op>,
    todo: Vec<(Duration, Todo)>,
    /// Processes that do not run until they are continued.
    stopped: Vec<Who>,
    owners: Vec<JoinHandle<()>>,
    /// The schedule has killed `irlm evacuate`.
    pub(super) unwatched: bool,
    /// What happened when, for the story.
    pub(super) told: Vec<(Duration, String)>,
}

impl<'a> Act<'a> {
    /// Everything stands, and nothing has begun.
    pub(super) fn set_up(world: &'a World, s: &'a Schedule) -> Result<Self> {
        world.clear()?;
        world.rates(s.edge, s.core)?;
        let epoch = Instant::now();
        let daemons = world.daemons(s)?;
        let mut act = Self {
            world,
            s,
            epoch,
            began: epoch,
            daemons,
            vms: Vec::new(),
            ops: Vec::new(),
            todo: Vec::new(),
            stopped: Vec::new(),
            owners: Vec::new(),
            unwatched: false,
            told: Vec::new(),
        };
        for n in 0..s.all() {
            let vm = act.with_place(Side::Source, n, |p| Vm::start(s, n, p, epoch, s.paused.contains(&n)))?;
            act.vms.push(vm);
            act.add_target(n)?;
        }
        Ok(act)
    }

    /// Starts something of a VM where that side of it is.
    fn with_place<T>(&self, side: Side, vm: usize, start: impl FnOnce(Place<'_>) -> T) -> T {
        let world = self.world;
        let at = host(side, self.s.host_of(vm));
        let version = if side == Side::Source { self.s.versions.0 } else { self.s.versions.1 };
        let (dir, qemu, shared) = (world.dir(at), world.cache.qemu(version), world.shared());
        let (irlm, cache) = (&*world.program, &world.cache);
        start(Place { net: &world.net, host: at, dir: &dir, irlm, qemu: &qemu, shared: &shared, cache })
    }

    /// Starts a further copy of a VM on its target host.
    pub(super) fn add_target(&mut self, n: usize) -> Result<()> {
        let mut vms = std::mem::take(&mut self.vms);
        let done = self.with_place(Side::Target, n, |p| vms[n].add(self.s, p));
        self.vms = vms;
        done
    }

    /// Writes a group file with these VMs, each to its newest copy.
    pub(super) fn group(&self, name: &str, vms: &[usize]) -> Result<PathBuf> {
        let s = self.s;
        let migration = match s.kind {
            Kind::PostCopy => "post-copy",
            Kind::Hybrid => "hybrid",
            _ => "pre-copy",
        };
        let direct = if s.kind == Kind::Direct { "always" } else { "never" };
        let index = format!("{}:7710", Host::Ctl.ip());
        let mut text = format!(
            "name = {name:?}\nindex = {index:?}\ndirect = {direct:?}\nmigration = {migration:?}\n\
             [timeouts]\nprepare_ms = 20000\n"
        );
        for n in 0..s.hosts {
            for (kind, at) in [("source", Host::Source(n)), ("target", Host::Target(n))] {
                let (name, ip) = (at.name(), at.ip());
                text.push_str(&format!("[[{kind}]]\nname = {name:?}\nagent = \"{ip}:{CONTROL}\"\n"));
                if kind == "target" {
                    text.push_str(&format!("data = \"{ip}:{DATA}\"\n"));
                }
            }
        }
        let key = if s.kind.is_qemu() { "qmp" } else { "vmm" };
        for &n in vms {
            let vm = &self.vms[n];
            let (from, to) = (&vm.copies[0].control, &vm.copies[vm.copies.len() - 1].control);
            text.push_str(&format!(
                "[[vm]]\nname = {:?}\nsource = \"s{}\"\ntarget = \"t{}\"\nsource_{key} = {from:?}\n\
                 target_{key} = {to:?}\n",
                vm.name(),
                vm.host,
                vm.host
            ));
        }
        let file = self.world.dir(Host::Ctl).join(format!("{name}.toml"));
        std::fs::write(&file, text)?;
        Ok(file)
    }

    /// Starts `irlm evacuate` for a group file.
    pub(super) fn evacuate(&mut self, what: &str, file: &std::path::Path) -> Result<()> {
        let json = self.world.dir(Host::Ctl).join(format!("{what}.json"));
        let (file, to) = (file.display().to_string(), json.display().to_string());
        let args = ["evacuate", &file, "--quiet", "--method", self.s.method.name(), "--json", &to];
        self.op(what, &args, Some(json))
    }

    fn op(&mut self, what: &str, args: &[&str], json: Option<PathBuf>) -> Result<()> {
        let proc = self.world.spawn(what, args)?;
        self.tell(format!("operator: {what}"));
        self.ops.push(Op { what: what.to_owned(), proc, json, code: None, ended: Duration::ZERO });
        Ok(())
    }

    pub(super) fn tell(&mut self, what: String) {
        self.told.push((self.epoch.elapsed(), what));
    }

    /// Evacuates, and does all that the schedule says; returns when all has been done and all commands have ended, or with
    /// the reason why they have not.
    pub(super) fn play(&mut self) -> Result<Option<String>> {
        let all: Vec<usize> = (0..self.vms.len()).collect();
        let file = self.group(GROUP, &all)?;
        self.began = Instant::now();
        let event = |e: &Event| (Duration::from_millis(e.at.into()), Todo::Fault(e.fault));
        self.todo = self.s.events.iter().map(event).collect();
        self.evacuate("evacuate", &file)?;
        let mut last = Instant::now();
        loop {
            let now = self.began.elapsed();
            self.todo.sort_by_key(|t| t.0);
            if self.todo.first().is_some_and(|t| t.0 <= now) {
                let (_, todo) = self.todo.remove(0);
                self.carry_out(todo)?;
                last = Instant::now();
            }
            let waits = self.reap()?;
            self.owners.retain(|o| !o.is_finished());
            if self.todo.is_empty() && self.owners.is_empty() {
                let Some(waits) = waits else { return Ok(None) };
                if last.elapsed() > PATIENCE {
                    return Ok(Some(waits));
                }
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Takes the exit codes of commands that have ended; gives the name of one that has not.
    fn reap(&mut self) -> Result<Option<String>> {
        let now = self.epoch.elapsed();
        let mut waits = None;
        for op in self.ops.iter_mut().filter(|o| o.code.is_none()) {
            op.code = op.proc.ended()?;
            op.ended = now;
            if let Some(code) = op.code {
                self.told.push((now, format!("`{}` ended with {code}", op.what)));
            } else {
                waits = Some(op.what.clone());
            }
        }
        Ok(waits)
    }

    /// Waits for the newest command.
    pub(super) fn last_op(&mut self, wait: Duration) -> Result<i32> {
        let until = Instant::now() + wait;
        loop {
            self.reap()?;
            match self.ops.last() {
                Some(Op { code: Some(code), .. }) => return Ok(*code),
                Some(op) if Instant::now() > until => bail!("`{}` has not ended after {wait:?}", op.what),
                Some(_) => std::thread::sleep(Duration::from_millis(5)),
                None => bail!("no command was given"),
            }
        }
    }

    fn later(&mut self, ms: u32, todo: Todo) {
        self.todo.push((self.began.elapsed() + Duration::from_millis(ms.into()), todo));
    }

    fn carry_out(&mut self, todo: Todo) -> Result<()> {
        match todo {
            Todo::Fault(fault) => {
                self.tell(fault.to_string());
                return self.fault(fault);
            }
            Todo::Continue(who) => {
                self.tell(format!("continue {who}"));
                self.signal(who, Signal::CONT);
            }
            Todo::Restart(who) => {
                self.tell(format!("restart {who}"));
                self.daemons.revive(self.world)?;
            }
            Todo::Mend => {
                self.tell("mend the core link".into());
                self.world.net.mend_core()?;
            }
            Todo::Rates => {
                self.tell("the core link as it was".into());
                self.world.core(self.s.core, None)?;
            }
            Todo::Room(at) => {
                self.tell(format!("room on {}", at.name()));
                self.world.empty_disk(at);
            }
        }
        Ok(())
    }

    fn fault(&mut self, fault: Fault) -> Result<()> {
        let all: Vec<usize> = (0..self.vms.len()).collect();
        match fault {
            Fault::Kill(who, back) => {
                self.kill(who);
                if matches!(who, Who::Agent(..) | Who::Index) {
                    self.later(back, Todo::Restart(who));
                }
            }
            Fault::Stop(who, ms) => {
                if self.signal(who, Signal::STOP) {
                    self.stopped.push(who);
                    self.later(ms, Todo::Continue(who));
                }
            }
            Fault::Cut(ms) => {
                self.world.net.cut_core()?;
                self.later(ms, Todo::Mend);
            }
            Fault::Slow(mbit, ms) => {
                self.world.core(mbit.min(self.s.core), None)?;
                self.later(ms, Todo::Rates);
            }
            Fault::Lossy(ms) => {
                self.world.core(self.s.core, Some(3 * 1514))?;
                self.later(ms, Todo::Rates);
            }
            Fault::Full(side, n, ms) => {
                let at = host(side, n);
                self.world.fill_disk(at)?;
                self.later(ms, Todo::Room(at));
            }
            Fault::Again => {
                let file = self.world.dir(Host::Ctl).join(format!("{GROUP}.toml"));
                self.evacuate(&format!("again{}", self.ops.len()), &file)?;
            }
            Fault::Cancel => {
                let file = self.world.dir(Host::Ctl).join(format!("{GROUP}.toml"));
                self.op("cancel", &["cancel", &file.display().to_string()], None)?;
            }
            Fault::Settle(vm, side) => {
                let file = self.world.dir(Host::Ctl).join(format!("{GROUP}.toml")).display().to_string();
                let (vm, at) = (self.vms[vm].name().to_owned(), side.to_string());
                self.op("settle", &["settle", &file, &vm, "--run-at", &at], None)?;
            }
            Fault::Pause(vm, back) => self.owner(vm, move |o| o.pause(back)),
            Fault::Save(vm) => {
                let to = self.world.shared().join(format!("{}.save", self.vms[vm].name()));
                self.owner(vm, move |o| o.save(&to));
            }
            Fault::Other => {
                let file = self.group("other", &all)?;
                self.evacuate(&format!("other{}", self.ops.len()), &file)?;
            }
        }
        Ok(())
    }

    fn kill(&mut self, who: Who) {
        match who {
            Who::Agent(side, n) => self.daemons.agents.get_mut(&host(side, n)).map_or((), Proc::kill),
            Who::Index => self.daemons.index.as_mut().map_or((), Proc::kill),
            Who::Coordinator => {
                if let Some(op) = self.ops.first_mut().filter(|o| o.code.is_none()) {
                    op.proc.kill();
                    self.unwatched = true;
                }
            }
            Who::Copy(side, vm) => {
                let postcopy = matches!(self.s.kind, Kind::PostCopy | Kind::Hybrid);
                self.vms[vm].kill(usize::from(side == Side::Target), postcopy);
            }
        }
    }

    /// Sends a signal; false if there is nobody to take it.
    fn signal(&mut self, who: Who, signal: Signal) -> bool {
        let proc = match who {
            Who::Agent(side, n) => self.daemons.agents.get_mut(&host(side, n)),
            Who::Index => self.daemons.index.as_mut(),
            Who::Coordinator => self.ops.first_mut().filter(|o| o.code.is_none()).map(|o| &mut o.proc),
            Who::Copy(side, vm) => {
                let copy = self.vms[vm].copies.get_mut(usize::from(side == Side::Target));
                copy.map(|c| &mut c.proc)
            }
        };
        proc.is_some_and(|p| matches!(p.ended(), Ok(None)) && p.signal(signal).is_ok())
    }

    /// Something that a VM's owner does takes as long as it takes, beside everything else.
    fn owner(&mut self, vm: usize, act: impl FnOnce(&Ownership) + Send + 'static) {
        let v = &self.vms[vm];
        let hands = v.copies.iter().map(super::copy::Copy::owner).collect();
        let qemu = v.copies[0].is_qemu();
        let known = Arc::clone(&v.known);
        let o = Ownership { hands, known, epoch: self.epoch, qemu };
        if let Ok(t) = std::thread::Builder::new().name("owner".into()).spawn(move || act(&o)) {
            self.owners.push(t);
        }
    }

    /// Everything that was done is undone: what stands still goes on, what died is started again, links and disks are as
    /// they were.
    pub(super) fn heal(&mut self) -> Result<()> {
        for who in std::mem::take(&mut self.stopped) {
            self.signal(who, Signal::CONT);
        }
        for at in self.world.hosts(self.s.hosts) {
            self.world.empty_disk(at);
        }
        self.world.core(self.s.core, None)?;
        let dead = self.daemons.revive(self.world)?;
        if !dead.is_empty() {
            self.tell(format!("started again: {}", dead.join(", ")));
        }
        self.daemons.ready()
    }
}

/// A VM's owner, who knows nothing of any move but would not start a second copy himself.
struct Ownership {
    hands: Vec<super::copy::Owner>,
    known: Arc<Mutex<Known>>,
    epoch: Instant,
    qemu: bool,
}

impl Ownership {
    fn note(&self, what: String) {
        lock(&self.known).history.note(self.epoch.elapsed(), what);
    }

    fn pause(&self, back: Option<u32>) {
        let newest = usize::from(lock(&self.known).history.ran(1));
        let done = || -> Result<bool> {
            let mut hand = self.hands[newest].connect()?;
            if hand.state()? != "running" {
                return Ok(false);
            }
            hand.stop()?;
            // Stopped for its last pages in between: then it was not the owner who stopped it.
            Ok(hand.state()? == "paused")
        };
        match done() {
            Ok(true) => lock(&self.known).paused = true,
            Ok(false) => return self.note("its owner found it not running".into()),
            Err(e) => return self.note(format!("its owner could not stop it: {e:#}")),
        }
        self.note(format!("its owner has stopped copy {newest}"));
        let Some(ms) = back else { return };
        std::thread::sleep(Duration::from_millis(ms.into()));
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until {
            if self.let_run() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        lock(&self.known).back = true;
        self.note("its owner lets it run again when it is where it will be".into());
    }

    /// Lets run what stands, if it is clear which copy that is, and that nobody is just moving it.
    fn let_run(&self) -> bool {
        let place = super::vm::whereabouts(&lock(&self.known).history.last());
        let Whereabouts::Stands(n) = place else { return false };
        let done = || -> Result<bool> {
            let mut hand = self.hands[n].connect()?;
            // Of a VMM nobody can tell whether an agent has just stopped it, too; its owner lets it run when all is over.
            if hand.state()? != "paused" || hand.migrates()? || !self.qemu {
                return Ok(false);
            }
            let mut known = lock(&self.known);
            known.paused = false;
            known.history.owner_continues(n, self.epoch.elapsed());
            drop(known);
            hand.cont()?;
            Ok(true)
        };
        done().unwrap_or(false)
    }

    fn save(&self, to: &std::path::Path) {
        match self.saved(to) {
            Ok(said) => self.note(said),
            Err(e) => self.note(format!("its owner cannot save it: {e:#}")),
        }
    }

    fn saved(&self, to: &std::path::Path) -> Result<String> {
        let mut hand = self.hands[0].connect()?;
        if hand.state()? != "running" {
            return Ok("its owner found it not running, and saved nothing".into());
        }
        let Hand::Qemu(qmp) = &mut hand else { return Ok("a VMM is not saved".into()) };
        qmp.run("migrate", &json!({ "uri": format!("exec:cat > {}", to.display()) }))?;
        self.note("its owner saves it to a file".into());
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let v = qmp.run("query-migrate", &json!({}))?;
            match v["status"].as_str() {
                Some("completed") => break,
                Some(end @ ("failed" | "cancelled" | "cancelling")) => {
                    let what = format!("its owner's own save is {end}, and nobody of his did that");
                    lock(&self.known).theirs = Some(what.clone());
                    return Ok(what);
                }
                _ if Instant::now() > until => bail!("the save does not end"),
                _ => std::thread::sleep(Duration::from_millis(4)),
            }
        }
        if lock(&self.known).history.ran(1) {
            return Ok("its owner's save is over, and it runs elsewhere".into());
        }
        lock(&self.known).history.owner_continues(0, self.epoch.elapsed());
        qmp.run("cont", &json!({}))?;
        Ok("its owner has saved it".into())
    }
}
