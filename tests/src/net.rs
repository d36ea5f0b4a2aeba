//! Hosts and links: a namespace per host, a bridge per rack as its top-of-rack switch, one core link between the
//! bridges, all rates set with token buckets in both directions.
//!
//! On shaped links segmentation offload is switched off, so that every packet is what a wire would carry (1,500 bytes)
//! and the core link's interface counters are bytes on the wire. Without rates it stays on, as on real ports: what is
//! measured there is speed, and 1,500-byte packets through emulated links would be the limit of everything.

use crate::keys::Keys;
use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Link rates in bit/s; `None` is unshaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Between a host and its rack's switch, each direction.
    pub edge: Option<u64>,
    /// Between the two switches, each direction.
    pub core: Option<u64>,
}

impl Rates {
    /// As fast as the machine can.
    pub const NONE: Self = Self { edge: None, core: None };
}

impl Default for Rates {
    /// The paper's 1:10, scaled to one machine.
    fn default() -> Self {
        Self { edge: Some(100_000_000), core: Some(1_000_000_000) }
    }
}

/// What passed the core link, by the kernel's interface counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct CoreBytes {
    /// Bytes from the source rack to the target rack.
    pub forward: u64,
    /// Bytes back.
    pub back: u64,
    /// Packets from the source rack to the target rack.
    pub forward_packets: u64,
}

impl CoreBytes {
    /// What passed since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            forward: self.forward - earlier.forward,
            back: self.back - earlier.back,
            forward_packets: self.forward_packets - earlier.forward_packets,
        }
    }
}

/// What a network is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetSpec {
    /// Source hosts, and as many target hosts.
    pub hosts: usize,
    /// Pairs of machines of other people, one in each rack. Their edge links have no rate: only the core link is narrow
    /// for them.
    pub others: usize,
    /// Link rates.
    pub rates: Rates,
    /// Whether an edge link's rate is kept by a token bucket on the host's own `eth0`, as by its network card. Without it
    /// `eth0` has no qdisc at all, so that a host may shape it itself, and the rate is kept one hop further, inside the
    /// switch's namespace.
    pub host_qdisc: bool,
    /// TCP's congestion control on all hosts; the machine's own default if not given.
    pub congestion: Option<&'static str>,
    /// Whether IRLM's programs speak TLS; otherwise they are told that the network is trusted.
    pub tls: bool,
}

/// A host of the lab, by rack and number; `Ctl` stands in the source rack and runs index and coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Host {
    /// Where index and coordinator run.
    Ctl,
    /// A host of the source rack.
    Source(usize),
    /// A host of the target rack.
    Target(usize),
    /// A machine in the source rack that belongs to other people.
    OtherSource(usize),
    /// A machine in the target rack that belongs to other people.
    OtherTarget(usize),
}

impl Host {
    /// "ctl", "s0", "t1", "xs0".
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Ctl => "ctl".into(),
            Self::Source(n) => format!("s{n}"),
            Self::Target(n) => format!("t{n}"),
            Self::OtherSource(n) => format!("xs{n}"),
            Self::OtherTarget(n) => format!("xt{n}"),
        }
    }

    /// Its address. Source rack 10.77.1.0/24, target rack 10.77.2.0/24, all on one link layer.
    #[must_use]
    pub fn ip(self) -> String {
        match self {
            Self::Ctl => "10.77.1.1".into(),
            Self::Source(n) => format!("10.77.1.{}", 10 + n),
            Self::Target(n) => format!("10.77.2.{}", 10 + n),
            Self::OtherSource(n) => format!("10.77.1.{}", 220 + n),
            Self::OtherTarget(n) => format!("10.77.2.{}", 220 + n),
        }
    }

    fn switch(self) -> &'static str {
        if matches!(self, Self::Target(_) | Self::OtherTarget(_)) { "tsw" } else { "ssw" }
    }

    /// Whether it stands for somebody who is not part of the evacuation.
    pub(crate) fn is_other(self) -> bool {
        matches!(self, Self::OtherSource(_) | Self::OtherTarget(_))
    }
}

/// The two racks' network.
#[derive(Debug)]
pub struct Net {
    id: String,
    /// A directory of certificates for each host; none: plain text.
    keys: Option<Keys>,
}

impl Net {
    /// Builds the racks; every name begins with `id`.
    pub fn create(id: &str, spec: NetSpec) -> Result<Self> {
        let NetSpec { hosts, others, rates, .. } = spec;
        if hosts == 0 || hosts > 200 || others > 30 {
            bail!("a lab has 1 to 200 hosts a rack and at most 30 others, not {hosts} and {others}");
        }
        let all: Vec<Host> = std::iter::once(Host::Ctl)
            .chain((0..hosts).flat_map(|n| [Host::Source(n), Host::Target(n)]))
            .chain((0..others).flat_map(|n| [Host::OtherSource(n), Host::OtherTarget(n)]))
            .collect();
        let edge = |h: &Host| if h.is_other() { None } else { rates.edge };
        let keys = if spec.tls { Some(Keys::new()?) } else { None };
        if let Some(keys) = &keys {
            keys.hosts(&all)?;
        }
        let net = Self { id: id.to_owned(), keys };
        // The hop stands between such a host and its port at the switch.
        let hop = |h: &Host| !spec.host_qdisc && edge(h).is_some();
        let mut outer = String::new();
        for ns in ["ssw".to_owned(), "tsw".to_owned()].into_iter().chain(all.iter().map(|h| h.name())) {
            outer.push_str(&format!("netns add {id}-{ns}\n"));
        }
        outer.push_str(&format!("link add core netns {id}-ssw type veth peer name core netns {id}-tsw\n"));
        for h in &all {
            let (n, sw) = (h.name(), h.switch());
            let far = if hop(h) { format!("{n}-in") } else { n.clone() };
            outer.push_str(&format!(
                "link add eth0 netns {id}-{n} type veth peer name {far} netns {id}-{sw}\n"
            ));
        }
        batch("ip", None, &outer)?;
        for sw in ["ssw", "tsw"] {
            let mut links = String::from("link add name bridge0 type bridge stp_state 0 mcast_snooping 0\n");
            let mut rules = shape("core", rates.core);
            links.push_str(&up("bridge0", rates));
            links.push_str(&format!("{}link set core master bridge0\n", up("core", rates)));
            // Between real racks is a router, which passes no multicast of the local scope.
            links.push_str("link set core type bridge_slave mcast_flood off\n");
            for h in all.iter().filter(|h| h.switch() == sw) {
                let port = h.name();
                if hop(h) {
                    links.push_str(&hop_links(&port, rates));
                    rules.push_str(&shape(&format!("{port}-out"), edge(h)));
                }
                links.push_str(&format!("{}link set {port} master bridge0\n", up(&port, rates)));
                rules.push_str(&shape(&port, edge(h)));
            }
            batch("ip", Some(&net.namespace(sw)), &links)?;
            batch("tc", Some(&net.namespace(sw)), &rules)?;
        }
        for h in &all {
            let ns = net.namespace(&h.name());
            let mut links =
                format!("{}link set lo up\naddress add {}/16 dev eth0\n", up("eth0", rates), h.ip());
            if let Some(name) = spec.congestion {
                // By route, because a namespace may not choose one that the machine restricts.
                links.push_str(&format!(
                    "route replace 10.77.0.0/16 dev eth0 proto kernel scope link src {} congctl {name}\n",
                    h.ip()
                ));
            }
            batch("ip", Some(&ns), &links)?;
            if !hop(h) {
                batch("tc", Some(&ns), &shape("eth0", edge(h)))?;
            }
        }
        Ok(net)
    }

    /// A command that runs in a host's namespace. It is the process itself, not a child of a wrapper.
    pub fn command(&self, host: Host, program: &Path) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.namespace(&host.name())]).arg(program);
        if let (Host::Ctl, Some(keys)) = (host, self.keys(host)) {
            c.env("IRLM_TLS", keys);
        }
        c
    }

    /// A host's certificates; none where the lab speaks plain text.
    #[must_use]
    pub fn keys(&self, host: Host) -> Option<PathBuf> {
        self.keys.as_ref().map(|keys| keys.of(&host.name()))
    }

    /// The lab's CA; none where the lab speaks plain text.
    #[must_use]
    pub fn ca(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// What a host's agent.toml says of how its connections are secured.
    #[must_use]
    pub fn secured(&self, host: Host) -> String {
        match self.keys(host) {
            Some(dir) => format!("tls = {dir:?}\n"),
            None => "plaintext = \"trusted-network\"\n".to_owned(),
        }
    }

    /// The core link's counters now.
    pub fn core_bytes(&self) -> Result<CoreBytes> {
        let of = self.counters("ssw", "core")?;
        Ok(CoreBytes {
            forward: of("/0/stats64/tx/bytes")?,
            back: of("/0/stats64/rx/bytes")?,
            forward_packets: of("/0/stats64/tx/packets")?,
        })
    }

    /// What a host has sent and received by its `eth0`, bytes.
    pub fn host_bytes(&self, host: Host) -> Result<(u64, u64)> {
        let of = self.counters(&host.name(), "eth0")?;
        Ok((of("/0/stats64/tx/bytes")?, of("/0/stats64/rx/bytes")?))
    }

    /// A link's counters, by their places in what `ip` tells of it.
    fn counters(&self, namespace: &str, link: &str) -> Result<impl Fn(&str) -> Result<u64> + use<>> {
        let what = format!("read the counters of {link} in {namespace}");
        let out = Command::new("ip")
            .args(["-n", &self.namespace(namespace), "-j", "-s", "link", "show", link])
            .output()
            .context(what.clone())?;
        let v: serde_json::Value = serde_json::from_slice(&out.stdout).context(what)?;
        Ok(move |p: &str| v.pointer(p).and_then(serde_json::Value::as_u64).context("a counter is missing"))
    }

    /// Brings up a TAP device that a VM on this host has made, with an address of the host's.
    pub fn tap_up(&self, host: Host, name: &str, address: &str) -> Result<()> {
        let lines = format!("{}address add {address} dev {name}\n", up(name, Rates::NONE));
        batch("ip", Some(&self.namespace(&host.name())), &lines)
    }

    /// Runs `work` on a thread in a host's network: sockets made there stay there.
    pub fn within<T: Send>(&self, host: Host, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.namespace_file(&host.name());
        std::thread::scope(|s| {
            let worker = s.spawn(move || {
                let namespace = std::fs::File::open(&file).with_context(|| file.display().to_string())?;
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).context("enter a namespace")?;
                work()
            });
            worker.join().unwrap_or_else(|_| bail!("a thread in the network of {} panicked", host.name()))
        })
    }

    /// Cuts the core link: packets of both directions are lost until [`Net::mend_core`].
    pub fn cut_core(&self) -> Result<()> {
        batch("ip", Some(&self.namespace("ssw")), "link set core down\n")
    }

    /// Undoes [`Net::cut_core`].
    pub fn mend_core(&self) -> Result<()> {
        batch("ip", Some(&self.namespace("ssw")), "link set core up\n")
    }

    /// Lets no multicast pass between the hosts of the target rack.
    pub fn stop_multicast(&self) -> Result<()> {
        let ns = self.namespace("tsw");
        let out = Command::new("ip").args(["-n", &ns, "-j", "link", "show", "master", "bridge0"]).output()?;
        let links: serde_json::Value =
            serde_json::from_slice(&out.stdout).context("read the switch's ports")?;
        let names = links.as_array().into_iter().flatten().filter_map(|l| l["ifname"].as_str());
        let lines: String =
            names.map(|n| format!("link set {n} type bridge_slave mcast_flood off\n")).collect();
        batch("ip", Some(&ns), &lines)
    }

    /// Opened, it leads into the network of a host or switch ("s0", "ssw").
    #[must_use]
    pub fn namespace_file(&self, name: &str) -> PathBuf {
        Path::new("/run/netns").join(self.namespace(name))
    }

    /// The namespace of a host or, by "ssw" and "tsw", of a rack's switch.
    #[must_use]
    pub fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }
}

/// Commands that bring a link up with nothing of its own to say.
fn up(link: &str, rates: Rates) -> String {
    let offload =
        if rates == Rates::NONE { String::new() } else { format!("link set {link} gso_max_segs 1\n") };
    format!("link set {link} addrgenmode none\n{offload}link set {link} up\n")
}

/// The hop between a host whose `eth0` is free and its port at the switch: what the host sends enters at `-in`, and
/// leaves through `-out`, where its rate is kept.
fn hop_links(port: &str, rates: Rates) -> String {
    let (bridge, inside, outside) = (format!("{port}-hop"), format!("{port}-in"), format!("{port}-out"));
    let mut links = format!(
        "link add name {bridge} type bridge stp_state 0 mcast_snooping 0\n\
         link add {port} type veth peer name {outside}\n{}",
        up(&bridge, rates)
    );
    for end in [inside, outside] {
        links.push_str(&format!("{}link set {end} master {bridge}\n", up(&end, rates)));
    }
    links
}

/// A token bucket on what leaves `link`: bursts of 2 ms, and a queue of 20 ms as in a switch with shallow buffers.
fn shape(link: &str, rate: Option<u64>) -> String {
    let Some(bits) = rate else { return String::new() };
    let bytes = bits / 8;
    let (burst, limit) = ((bytes / 500).max(16_384), (bytes / 50).max(65_536));
    format!("qdisc add dev {link} root tbf rate {bits}bit burst {burst}b limit {limit}b\n")
}

/// Runs a batch of `ip` or `tc` commands in a namespace.
fn batch(tool: &str, namespace: Option<&str>, lines: &str) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut c = Command::new(tool);
    if let Some(ns) = namespace {
        c.args(["-n", ns]);
    }
    let mut child = c
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {tool} (iproute2)"))?;
    child.stdin.take().context("no input")?.write_all(lines.as_bytes())?;
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!(
            "{tool} in {}: {}",
            namespace.unwrap_or("the root"),
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}
