//! A lab with light guests in it: both QEMUs of each, the daemons, the sentry, group files, and what `irlm evacuate` says.

use super::light::{Begin, Light, migration, state, until};
use super::sentry::Sentry;
use crate::cases::say;
use crate::cmd_test::Bench;
use anyhow::{Context as _, Result, bail, ensure};
use irlm_tests::irlm::{CONTROL, DATA, Irlm, Proc};
use irlm_tests::lab::Lab;
use irlm_tests::net::{Host, Rates};
use irlm_tests::qemu::Vm;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// How long `irlm evacuate` may take here; every wait of its own is shorter.
pub(super) const WAIT: Duration = Duration::from_secs(100);
/// How long agents that can talk may take to settle a VM.
pub(super) const SETTLE: Duration = Duration::from_secs(40);
/// Agents that start at once and watch nothing: what these cases are about comes after.
const QUICK: &str = "bpf = false\n[prepare]\nidle = false\n[sampling]\nkernel = false\nseconds = 0\n";

/// What a rig is made of.
pub(super) struct Spec {
    /// Guests: on which source host, and how they are.
    pub(super) guests: Vec<(usize, Light)>,
    /// Source hosts, and as many target hosts.
    pub(super) hosts: usize,
    /// Mbit/s of the links between hosts and switches.
    pub(super) edge: u64,
    /// Further arguments of every agent.
    pub(super) args: Vec<String>,
    /// How targets wait.
    pub(super) waits: Begin,
    /// Hosts whose agents' journals are on a small disk of their own.
    pub(super) small: Vec<Host>,
    /// The end of every agent's configuration.
    pub(super) more: &'static str,
    /// Whether agents speak TLS. Without it QEMUs that stream to each other have the connection itself, else its agents
    /// pass it on.
    pub(super) tls: bool,
}

impl Spec {
    /// These guests on one host.
    pub(super) fn of(guests: Vec<Light>) -> Self {
        Self {
            guests: guests.into_iter().map(|g| (0, g)).collect(),
            hosts: 1,
            edge: 200,
            args: Vec::new(),
            waits: Begin::Waits,
            small: Vec::new(),
            more: QUICK,
            tls: true,
        }
    }

    /// One guest whose move takes some seconds.
    pub(super) fn slow() -> Self {
        let guest = Light { fill: 20, ..Light::new("alpha") };
        Self { edge: 40, ..Self::of(vec![guest]) }
    }

    /// Agents hold each departing guest at this point, for so long.
    pub(super) fn held(mut self, point: &str, ms: u64) -> Self {
        self.args = vec![point.to_owned(), ms.to_string()];
        self
    }
}

/// One guest and its two QEMUs.
pub(super) struct Duo {
    pub(super) light: Light,
    pub(super) host: usize,
    pub(super) source: Vm,
    pub(super) target: Vm,
}

impl Duo {
    pub(super) fn states(&mut self) -> (String, String) {
        (state(&mut self.source), state(&mut self.target))
    }
}

/// All of it.
pub(super) struct Rig<'a> {
    pub(super) b: &'a Bench,
    pub(super) lab: &'a Lab,
    pub(super) vms: Vec<Duo>,
    pub(super) irlm: Irlm<'a>,
    pub(super) sentry: Sentry,
    runs: usize,
}

/// Makes a rig, runs a case in it, and fails if the case does or if two copies ever ran.
pub(super) fn with(b: &Bench, spec: Spec, case: impl FnOnce(&mut Rig<'_>) -> Result<()>) -> Result<()> {
    let mut lab = b.spec(1, 1);
    lab.hosts = vec![vec![]; spec.hosts];
    lab.tls = spec.tls;
    lab.rates = Rates { edge: Some(spec.edge * 1_000_000), core: Some(1_000_000_000) };
    let lab = Lab::new(b.cache.clone(), lab, &say)?;
    let mut rig = Rig::start(b, &lab, spec)?;
    let done = case(&mut rig);
    let seen = rig.sentry.lines();
    let skipped = seen.len().saturating_sub(30);
    seen.iter().skip(skipped).for_each(|l| say(l));
    match (done, rig.sentry.two()) {
        (Ok(()), None) => Ok(()),
        (Err(e), None) => bail!("{e:#}\n{}", rig.said()),
        (Ok(()), Some(two)) => bail!("{two}\n{}", rig.said()),
        (Err(e), Some(two)) => bail!("{two}; and {e:#}\n{}", rig.said()),
    }
}

impl<'a> Rig<'a> {
    fn start(b: &'a Bench, lab: &'a Lab, spec: Spec) -> Result<Self> {
        for host in &spec.small {
            Disk::mount(lab, *host)?;
        }
        let sentry = Sentry::start();
        let mut vms = Vec::new();
        for (host, light) in spec.guests {
            let (from, to) = (Host::Source(host), Host::Target(host));
            let source = light.start(lab, &b.qemu, from, "", Begin::Runs)?;
            let target = light.start(lab, &b.qemu_target, to, "", spec.waits)?;
            sentry.watch(&light.name, &from.name(), light.eye(lab, from, ""));
            sentry.watch(&light.name, &to.name(), light.eye(lab, to, ""));
            vms.push(Duo { light, host, source, target });
        }
        let irlm = Irlm::daemons(lab, &b.irlm, spec.args, spec.more)?;
        Ok(Self { b, lab, vms, irlm, sentry, runs: 0 })
    }

    /// A further QEMU of a guest, watched; `tag` tells it from others of that host.
    pub(super) fn further(&self, light: &Light, host: Host, tag: &str, begin: Begin) -> Result<Vm> {
        let qemu = if matches!(host, Host::Target(_)) { &self.b.qemu_target } else { &self.b.qemu };
        let vm = light.start(self.lab, qemu, host, tag, begin)?;
        self.sentry.watch(&light.name, &format!("{}{tag}", host.name()), light.eye(self.lab, host, tag));
        Ok(vm)
    }

    /// Writes the group file of all VMs, each from its source host to its target host.
    pub(super) fn group(&self, extra: &str) -> Result<String> {
        let vms = self.vms.iter();
        let way = |d: &Duo| Way {
            vm: d.light.name.clone(),
            from: Host::Source(d.host),
            to: Host::Target(d.host),
            source_qmp: d.source.agent_qmp.clone(),
            target_qmp: d.target.agent_qmp.clone(),
        };
        self.group_of("own", extra, &vms.map(way).collect::<Vec<_>>())
    }

    /// Writes the group file of these ways.
    pub(super) fn group_of(&self, name: &str, extra: &str, ways: &[Way]) -> Result<String> {
        let path = self.lab.dir(Host::Ctl).join(format!("{name}.toml"));
        let extra = extra.trim();
        let index = format!("{}:7710", Host::Ctl.ip());
        let mut text = format!("name = {name:?}\nindex = {index:?}\ncompress = \"off\"\n{extra}\n");
        let mut hosts: Vec<(&str, Host)> = ways.iter().map(|w| ("source", w.from)).collect();
        hosts.extend(ways.iter().map(|w| ("target", w.to)));
        hosts.sort();
        hosts.dedup();
        for (kind, host) in hosts {
            let (name, ip) = (host.name(), host.ip());
            text.push_str(&format!("[[{kind}]]\nname = {name:?}\nagent = \"{ip}:{CONTROL}\"\n"));
            if kind == "target" {
                text.push_str(&format!("data = \"{ip}:{DATA}\"\n"));
            }
        }
        for w in ways {
            text.push_str(&format!(
                "[[vm]]\nname = {:?}\nsource = {:?}\ntarget = {:?}\nsource_qmp = {:?}\ntarget_qmp = {:?}\n",
                w.vm,
                w.from.name(),
                w.to.name(),
                w.source_qmp,
                w.target_qmp
            ));
        }
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    /// Starts `irlm evacuate`.
    pub(super) fn begin(&mut self, group: &str, args: &[&str]) -> Result<Going> {
        self.runs += 1;
        let json = self.lab.top().join(format!("report-{}.json", self.runs));
        let path = json.display().to_string();
        let mut all = vec!["evacuate", group, "--json", &path];
        all.extend(args);
        let proc = self.irlm.background(&format!("evacuate-{}", self.runs), &all)?;
        Ok(Going { proc, json })
    }

    /// Runs `irlm evacuate` to its end.
    pub(super) fn evacuate(&mut self, group: &str, args: &[&str]) -> Result<Ended> {
        self.begin(group, args)?.end()
    }

    /// Waits until this guest's QEMU has sent so many bytes.
    pub(super) fn streaming(&mut self, i: usize, bytes: u64) -> Result<()> {
        let source = &mut self.vms[i].source;
        until("the guest streams", WAIT, || {
            let said = source.qmp.run("query-migrate", &json!({}))?;
            Ok(said["ram"]["transferred"].as_u64().unwrap_or(0) >= bytes)
        })
    }

    /// How often the agent of a source host has held a guest in a drill.
    pub(super) fn holds_now(&self, host: usize, says: &str) -> usize {
        let log = self.lab.dir(Host::Source(host)).join("agent.log");
        std::fs::read_to_string(&log).unwrap_or_default().matches(says).count()
    }

    /// Waits until it holds one.
    pub(super) fn holds(&self, host: usize, says: &str) -> Result<()> {
        until(says, WAIT, || Ok(self.holds_now(host, says) > 0))
    }

    /// Kills an agent and starts it again; it holds nobody from then on.
    pub(super) fn restart(&mut self, host: Host, pause: Duration) -> Result<()> {
        self.irlm.kill_agent(host)?;
        std::thread::sleep(pause);
        self.irlm.agent_args.clear();
        self.irlm.start_agent(host)
    }

    /// Waits until a guest's copies are in these states, source first; "*" is any but running.
    pub(super) fn comes_to(&mut self, i: usize, source: &str, target: &str, wait: Duration) -> Result<()> {
        let fits = |want: &str, is: &str| want == is || (want == "*" && is != "running");
        let mut last = (String::new(), String::new());
        let vm = &mut self.vms[i];
        let name = vm.light.name.clone();
        let sentry = &self.sentry;
        let so = until("states", wait, || {
            // Worse cannot come.
            last = vm.states();
            ensure!(sentry.two().is_none(), "two copies run");
            Ok(fits(source, &last.0) && fits(target, &last.1))
        });
        so.map_err(|_| {
            let (s, t) = &last;
            anyhow::anyhow!(
                "{name} is {s} at its source and {t} at its target after {wait:?}, not {source} and {target}"
            )
        })
    }

    /// These states, and they stay.
    pub(super) fn stays(&mut self, i: usize, source: &str, target: &str) -> Result<()> {
        self.comes_to(i, source, target, SETTLE)?;
        std::thread::sleep(Duration::from_secs(1));
        self.comes_to(i, source, target, Duration::ZERO)
    }

    /// Nothing was touched: the guest runs at its source, had no migration, and its target still waits.
    pub(super) fn untouched(&mut self, i: usize) -> Result<()> {
        let (source, target) = self.vms[i].states();
        let vm = &mut self.vms[i];
        ensure!(source == "running", "{} is {source} at its source", vm.light.name);
        ensure!(target == "inmigrate", "{}: its waiting QEMU is {target}", vm.light.name);
        let job = migration(&mut vm.source)?;
        ensure!(job == "none", "{}: its source has a migration: {job}", vm.light.name);
        Ok(())
    }

    /// A VM's phase as an agent tells it, and the reason with it; empty if it does not know the VM.
    pub(super) fn phase(&self, host: Host, vm: &str) -> Result<(String, String)> {
        let status = self.irlm.status(host)?;
        let groups = status[0]["groups"].as_array().into_iter().flatten();
        let mut vms = groups.flat_map(|g| g["vms"].as_array().into_iter().flatten());
        let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
        let found = vms.rfind(|v| v["name"] == vm);
        Ok(found.map(|v| (text(v, "phase"), text(v, "error"))).unwrap_or_default())
    }

    /// Whether an agent knows some group.
    pub(super) fn prepares(&self, host: Host) -> Result<bool> {
        Ok(self.irlm.status(host)?[0]["groups"].as_array().is_some_and(|g| !g.is_empty()))
    }

    /// What everybody printed, for an error message.
    pub(super) fn said(&self) -> String {
        let qemus = self.vms.iter().flat_map(|d| {
            [("source", &d.source), ("target", &d.target)]
                .map(|(side, vm)| (d.light.name.clone(), side, vm.said()))
        });
        let qemus = qemus.filter(|q| !q.2.trim().is_empty());
        let qemus: String =
            qemus.map(|(n, side, said)| format!("--- {side} QEMU of {n}\n{said}\n")).collect();
        self.irlm.logs() + &qemus
    }
}

/// One VM's way in a group file.
pub(super) struct Way {
    pub(super) vm: String,
    pub(super) from: Host,
    pub(super) to: Host,
    pub(super) source_qmp: PathBuf,
    pub(super) target_qmp: PathBuf,
}

/// An evacuation under way.
pub(super) struct Going {
    pub(super) proc: Proc,
    json: PathBuf,
}

impl Going {
    /// Waits for its end.
    pub(super) fn end(mut self) -> Result<Ended> {
        let code = self.proc.wait(WAIT).context("irlm evacuate does not end")?;
        let report = match std::fs::read_to_string(&self.json) {
            Ok(text) => serde_json::from_str(&text)?,
            Err(_) => Value::Null,
        };
        let problems = report["problems"].as_array().into_iter().flatten();
        // The log's end may be all tables.
        let said = problems.filter_map(Value::as_str).fold(self.proc.said(), |said, p| said + "\n! " + p);
        let ended = Ended { code, said, report };
        for vm in ended.report["vms"].as_array().into_iter().flatten() {
            let (name, verdict) = (&vm["name"], &vm["verdict"]);
            say(&format!("report: {name} {verdict} {} state {} {}", vm["phase"], vm["state"], vm["error"]));
        }
        say(&format!("irlm evacuate: exit code {code}; {}", ended.report["problems"]));
        Ok(ended)
    }
}

/// How an evacuation ended.
pub(super) struct Ended {
    pub(super) code: i32,
    pub(super) said: String,
    pub(super) report: Value,
}

impl Ended {
    /// The exit code is this.
    pub(super) fn code(&self, code: i32) -> Result<()> {
        ensure!(self.code == code, "irlm evacuate ended with {}, not {code}: {}", self.code, self.why());
        Ok(())
    }

    /// Rows and problems of the report, in one line.
    fn why(&self) -> String {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let rows = self.report["vms"].as_array().into_iter().flatten();
        let rows =
            rows.map(|v| format!("{} {} {}", text(&v["name"]), text(&v["verdict"]), text(&v["error"])));
        let problems = self.report["problems"].as_array().into_iter().flatten().map(text);
        let all: Vec<String> = rows.chain(problems).collect();
        if all.is_empty() { self.said.replace('\n', "; ") } else { all.join("; ") }
    }

    /// A VM's row has this in this column.
    pub(super) fn row(&self, vm: &str, key: &str, value: &str) -> Result<()> {
        let is = self.cell(vm, key)?;
        ensure!(is == value, "the report says {key} {is:?} of {vm}, not {value:?}");
        Ok(())
    }

    /// One column of a VM's row; empty if there is none.
    pub(super) fn cell(&self, vm: &str, key: &str) -> Result<String> {
        let vms = self.report["vms"].as_array().context("there is no report")?;
        let row =
            vms.iter().find(|v| v["name"] == vm).with_context(|| format!("{vm} is not in the report"))?;
        Ok(row[key].as_str().unwrap_or_default().to_owned())
    }
}

/// A small disk for an agent's journal.
pub(super) struct Disk {
    ballast: PathBuf,
    stop: Option<(std::sync::Arc<std::sync::atomic::AtomicBool>, std::thread::JoinHandle<()>)>,
}

impl Disk {
    pub(super) fn mount(lab: &Lab, host: Host) -> Result<()> {
        let at = lab.dir(host).join("state");
        std::fs::create_dir_all(&at)?;
        let mut c = std::process::Command::new("mount");
        let done = c.args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&at).output()?;
        ensure!(done.status.success(), "mount: {}", String::from_utf8_lossy(&done.stderr).trim());
        Ok(())
    }

    /// Fills the disk of a host's agent, and keeps it full until this is dropped.
    pub(super) fn full(lab: &Lab, host: Host) -> Result<Self> {
        use std::io::Write as _;
        use std::sync::atomic::{AtomicBool, Ordering};
        let ballast = lab.dir(host).join("state/ballast");
        let mut file = std::fs::File::create(&ballast)?;
        while file.write_all(&[1; 4096]).is_ok() {}
        let over = std::sync::Arc::new(AtomicBool::new(false));
        let theirs = std::sync::Arc::clone(&over);
        let worker = std::thread::spawn(move || {
            while !theirs.load(Ordering::Relaxed) {
                while file.write_all(&[1; 4096]).is_ok() {}
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self { ballast, stop: Some((over, worker)) })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some((over, worker)) = self.stop.take() {
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            let _ = worker.join();
        }
        let _ = std::fs::remove_file(&self.ballast);
    }
}
