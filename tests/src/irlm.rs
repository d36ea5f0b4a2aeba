//! IRLM's daemons and commands on the lab's hosts, started and killed as an operator (or a power cut) would.

use crate::lab::{Guests, Lab};
use crate::net::{Host, Net};
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The group's name in every round.
pub const GROUP: &str = "lab";
/// Where agents are told what to do.
pub const CONTROL: u16 = 7700;
/// Where agents get pages.
pub const DATA: u16 = 7701;
const INDEX: u16 = 7710;

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// Plain QEMU pre-copy.
    Oc,
    /// Plain QEMU with compressed channels.
    QemuMultifdZstd,
    /// Deduplication among the guests of one host.
    Gm,
    /// The full system.
    Irlm,
}

impl Method {
    /// All, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Oc, Self::QemuMultifdZstd, Self::Gm, Self::Irlm];

    /// As on the command line of `irlm evacuate`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Oc => "oc",
            Self::QemuMultifdZstd => "qemu-multifd-zstd",
            Self::Gm => "gm",
            Self::Irlm => "irlm",
        }
    }
}

/// A process of ours on a host; dropping it ends it.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    what: String,
    log: PathBuf,
}

impl Proc {
    /// Starts a command whose output goes to `log`.
    pub(crate) fn spawn(mut command: Command, what: &str, log: PathBuf) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start {what}"))?;
        Ok(Self { child, what: what.to_owned(), log })
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once (SIGKILL), as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal, such as ^C's.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid =
            i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw).context("pid")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("signal {}", self.what))
    }

    /// Its exit code, once it has ended by itself.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        Ok(self.child.try_wait()?.map(|s| s.code().unwrap_or(-1)))
    }

    /// Waits for it to end by itself and gives its exit code; -1 if a signal ended it.
    pub fn wait(&mut self, wait: Duration) -> Result<i32> {
        let until = Instant::now() + wait;
        loop {
            if let Some(code) = self.ended()? {
                return Ok(code);
            }
            if Instant::now() > until {
                bail!("{} still runs after {wait:?}; its log ends: {}", self.what, self.said());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The end of what it printed.
    #[must_use]
    pub fn said(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits until its log has this in it.
    pub(crate) fn says(&mut self, what: &str, wait: Duration) -> Result<()> {
        let until = Instant::now() + wait;
        loop {
            if std::fs::read_to_string(&self.log).unwrap_or_default().contains(what) {
                return Ok(());
            }
            if let Some(code) = self.ended()? {
                bail!("{} ended with {code}: {}", self.what, self.said());
            }
            if Instant::now() > until {
                bail!("{} does not say {what:?}: {}", self.what, self.said());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it listens on `port`, seen from inside its own network.
    pub(crate) fn listening(&mut self, port: u16, wait: Duration) -> Result<()> {
        let until = Instant::now() + wait;
        // local address, remote address, state: 0A is LISTEN (proc_net_tcp).
        let (tail, tables) = (format!(":{port:04X}"), ["tcp", "tcp6"]);
        loop {
            for t in tables {
                let table =
                    std::fs::read_to_string(format!("/proc/{}/net/{t}", self.child.id())).unwrap_or_default();
                let hit = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
                if hit.into_iter().any(|f| f.len() > 3 && f[1].ends_with(&tail) && f[3] == "0A") {
                    return Ok(());
                }
            }
            if let Some(code) = self.ended()? {
                bail!("{} ended with {code}: {}", self.what, self.said());
            }
            if Instant::now() > until {
                bail!("{} does not listen on port {port}: {}", self.what, self.said());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Source hosts from which on a rack is a crowd on one machine.
const CROWD: usize = 3;

/// One round's daemons: an index, an agent on every host, and the group file.
#[derive(Debug)]
pub struct Irlm<'a> {
    lab: &'a Lab,
    program: PathBuf,
    group: PathBuf,
    /// The index server; `None` once it is killed.
    pub index: Option<Proc>,
    /// The agents that run.
    pub agents: BTreeMap<Host, Proc>,
    /// Further arguments of the agents started from now on.
    pub agent_args: Vec<String>,
    /// What stands at the end of the configuration of the agents started from now on.
    pub agent_more: String,
}

impl<'a> Irlm<'a> {
    /// Writes all configuration files and starts the daemons for `guests`. `extra` is put at the top of the group file.
    pub fn start(lab: &'a Lab, program: &Path, guests: &Guests, extra: &str) -> Result<Self> {
        Self::start_with(lab, program, guests, extra, Vec::new())
    }

    /// As [`Self::start`], with further arguments for every agent.
    pub fn start_with(
        lab: &'a Lab,
        program: &Path,
        guests: &Guests,
        extra: &str,
        agent_args: Vec<String>,
    ) -> Result<Self> {
        let group = lab.dir(Host::Ctl).join("group.toml");
        let index = format!("{}:{INDEX}", Host::Ctl.ip());
        let mut text = format!("name = {GROUP:?}\nindex = {index:?}\n{extra}\n");
        let hosts = lab.spec.hosts.len();
        for h in 0..hosts {
            for (kind, host) in [("source", Host::Source(h)), ("target", Host::Target(h))] {
                let (name, ip) = (host.name(), host.ip());
                text.push_str(&format!("[[{kind}]]\nname = {name:?}\nagent = \"{ip}:{CONTROL}\"\n"));
                if kind == "target" {
                    text.push_str(&format!("data = \"{ip}:{DATA}\"\n"));
                }
            }
        }
        for p in &guests.pairs {
            let (s, t) = (Host::Source(p.host).name(), Host::Target(p.host).name());
            text.push_str(&format!(
                "[[vm]]\nname = {:?}\nsource = {s:?}\ntarget = {t:?}\nsource_qmp = {:?}\ntarget_qmp = {:?}\n",
                p.name, p.source.agent_qmp, p.target.agent_qmp
            ));
        }
        std::fs::write(&group, text)?;
        Self::daemons(lab, program, agent_args, "")
    }

    /// Only the daemons: no group file is written. `more` stands at the end of every agent's configuration.
    pub fn daemons(lab: &'a Lab, program: &Path, agent_args: Vec<String>, more: &str) -> Result<Self> {
        if !program.is_file() {
            bail!("there is no irlm at {}: run `cargo xtask lab …`, which builds it", program.display());
        }
        let hosts = lab.spec.hosts.len();
        let mut irlm = Self {
            lab,
            program: program.to_path_buf(),
            group: lab.dir(Host::Ctl).join("group.toml"),
            index: None,
            agents: BTreeMap::new(),
            agent_args,
            agent_more: more.to_owned(),
        };
        // A new round is a new world: an agent that found the last one's journal would remember its guests.
        let all = (0..hosts).flat_map(|h| [Host::Source(h), Host::Target(h)]).chain([Host::Ctl]);
        for dir in all.map(|host| lab.dir(host)) {
            let _ = std::fs::remove_dir_all(dir.join("state"));
            for log in ["agent.log", "index.log", "evacuate.log"] {
                let _ = std::fs::remove_file(dir.join(log));
            }
        }
        irlm.start_index()?;
        for h in 0..hosts {
            irlm.start_agent(Host::Source(h))?;
            irlm.start_agent(Host::Target(h))?;
        }
        Ok(irlm)
    }

    /// Starts the index server.
    pub fn start_index(&mut self) -> Result<()> {
        let listen = format!("{}:{INDEX}", Host::Ctl.ip());
        let mut args = vec!["index", "--listen", &listen];
        if self.lab.net.keys(Host::Ctl).is_none() {
            args.extend(["--plaintext", "trusted-network"]);
        }
        let mut p = self.spawn(Host::Ctl, "index", &args)?;
        p.listening(INDEX, Duration::from_secs(10))?;
        self.index = Some(p);
        Ok(())
    }

    /// Starts (or, after a kill, restarts) the agent of a host; its state directory is kept.
    pub fn start_agent(&mut self, host: Host) -> Result<()> {
        let place = (&self.lab.net, host, &*self.lab.dir(host));
        // A few processors that play a dozen hosts let each wait for longer than any real host is silent.
        let crowded = self.lab.spec.hosts.len() > CROWD;
        let patience = if crowded { "[timeouts]\npeer_ms = 60000\n" } else { "" };
        let hurry = self.lab.spec.hurry && !self.agent_more.contains("[prepare]");
        let hurry = if hurry { "[prepare]\nidle = false\n" } else { "" };
        let more = format!("{}{hurry}{patience}", self.agent_more);
        let p = agent(place, &self.program, self.lab.spec.policy.as_deref(), &more, &self.agent_args)?;
        self.agents.insert(host, p);
        Ok(())
    }

    /// Kills the agent of a host.
    pub fn kill_agent(&mut self, host: Host) -> Result<()> {
        self.agents.remove(&host).with_context(|| format!("no agent runs on {}", host.name()))?.kill();
        Ok(())
    }

    /// Sends a signal to the agent of a host.
    pub fn signal_agent(&self, host: Host, signal: rustix::process::Signal) -> Result<()> {
        let agent = self.agents.get(&host).with_context(|| format!("no agent runs on {}", host.name()))?;
        agent.signal(signal)
    }

    /// Starts `irlm evacuate`; `json` is its report. With `leave_paused` the lab resumes the targets itself.
    pub fn evacuate(&self, method: Method, json: &Path, leave_paused: bool) -> Result<Proc> {
        let (group, json) = (self.group.display().to_string(), json.display().to_string());
        let mut args = vec!["evacuate", &group, "--method", method.name(), "--json", &json];
        if leave_paused {
            args.push("--leave-paused");
        }
        self.spawn(Host::Ctl, "evacuate", &args)
    }

    /// Starts a command in the source rack that goes on by itself; what it says goes to `LOG.log` there.
    pub fn background(&self, log: &str, args: &[&str]) -> Result<Proc> {
        let dir = self.lab.dir(Host::Ctl);
        let file = dir.join(format!("{log}.log"));
        let _ = std::fs::remove_file(&file);
        self.spawn(Host::Ctl, log, args)
    }

    /// The group's file.
    #[must_use]
    pub fn group_file(&self) -> String {
        self.group.display().to_string()
    }

    /// Runs a command in the source rack and gives its exit code and output.
    pub fn command(&self, args: &[&str]) -> Result<(i32, String)> {
        let out = self.lab.net.command(Host::Ctl, &self.program).args(args).output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        Ok((out.status.code().unwrap_or(-1), text))
    }

    /// `irlm status --json` of one agent.
    pub fn status(&self, host: Host) -> Result<Value> {
        let agent = format!("{}:{CONTROL}", host.ip());
        let out = self
            .lab
            .net
            .command(Host::Ctl, &self.program)
            .args(["status", "--agent", &agent, "--json"])
            .output()?;
        if !out.status.success() {
            bail!("irlm status of {}: {}", host.name(), String::from_utf8_lossy(&out.stderr).trim());
        }
        serde_json::from_slice(&out.stdout).context("irlm status --json")
    }

    /// What the daemons printed last, for an error message.
    #[must_use]
    pub fn logs(&self) -> String {
        let index = self.index.iter().map(|p| ("index".to_owned(), p.said()));
        let agents = self.agents.iter().map(|(h, p)| (format!("agent {}", h.name()), p.said()));
        index.chain(agents).map(|(who, said)| format!("--- {who}\n{said}\n")).collect()
    }

    fn spawn(&self, host: Host, what: &str, args: &[&str]) -> Result<Proc> {
        spawn((&self.lab.net, host, &self.lab.dir(host)), &self.program, what, args)
    }
}

/// Starts an agent on a host and waits until it listens. In the host's directory are its configuration, `more` at its end,
/// its state, which is kept, and its log.
pub fn agent(
    (net, host, dir): (&Net, Host, &Path),
    program: &Path,
    policy: Option<&str>,
    more: &str,
    extra_args: &[String],
) -> Result<Proc> {
    let (ip, name) = (host.ip(), host.name());
    let (config, state) = (dir.join("agent.toml"), dir.join("state"));
    std::fs::create_dir_all(&state)?;
    let mut text = format!(
        "name = {name:?}\ncontrol = \"{ip}:{CONTROL}\"\ndata = \"{ip}:{DATA}\"\nstate_dir = {state:?}\n\
         core_iface = \"eth0\"\n{}",
        net.secured(host)
    );
    if let Some(policy) = policy {
        let file = dir.join("policy.toml");
        std::fs::write(&file, policy)?;
        text.push_str(&format!("policy = {file:?}\n"));
    }
    text.push_str(more);
    text.push_str(&allow(dir));
    std::fs::write(&config, text)?;
    let config = config.display().to_string();
    let mut args = vec!["agent", "--config", &config];
    args.extend(extra_args.iter().map(String::as_str));
    let mut p = spawn((net, host, dir), program, "agent", &args)?;
    p.listening(CONTROL, Duration::from_secs(20))?;
    Ok(p)
}

/// `[allow]` of an agent whose host has this directory: the guests' sockets are beside it, not where the default has them.
pub(crate) fn allow(dir: &Path) -> String {
    let top = dir.parent().unwrap_or(dir);
    format!("\n[allow]\nsockets = [\"{}/**\"]\n", top.display())
}

/// A file in a host's directory: what is started there has nobody to read its standard output and error.
pub const UNHEARD: &str = "unheard";

/// Starts the program on a host; its output goes to `WHAT.log` in the host's directory, or nowhere ([`UNHEARD`]).
pub(crate) fn spawn(
    (net, host, dir): (&Net, Host, &Path),
    program: &Path,
    what: &str,
    args: &[&str],
) -> Result<Proc> {
    let log = dir.join(format!("{what}.log"));
    let out = File::options().append(true).create(true).open(&log)?;
    let mut c: Command = net.command(host, program);
    c.args(args).stdin(Stdio::null());
    if dir.join(UNHEARD).exists() {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        c.stdout(writer.try_clone()?).stderr(writer);
    } else {
        c.stdout(out.try_clone()?).stderr(out);
    }
    Proc::spawn(c, &format!("irlm {what} on {}", host.name()), log)
}

/// Where `irlm` lies if nothing else is said: beside the lab's own program.
pub fn beside() -> Result<PathBuf> {
    Ok(std::env::current_exe().context("find the lab's own program")?.with_file_name("irlm"))
}
