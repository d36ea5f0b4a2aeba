//! Two hosts and a wire: network namespaces with a veth pair, the classifier on the near end, a capture at the far end.

use crate::frames::{self, Seen};
use anyhow::{Context as _, Result, anyhow, bail};
use irlm_user::core::units::{HostIx, VmIx};
use irlm_user::core::wire::messages::Purpose;
use irlm_user::host::bpf::{Classifier, FlowClass, FlowGuard, TagPolicy};
use irlm_user::net::connection::Security;
use irlm_user::net::greeting::{Greeting, dial};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const NEAR: &str = "near";
const FAR: &str = "far";
const IFACE: &str = "wire0";
/// `ETH_P_ALL`, in network order as the kernel wants it.
const ALL_PROTOCOLS: i32 = (0x0003_u16).to_be() as i32;

/// The two namespaces; removed when dropped.
#[derive(Debug)]
pub struct Wire {
    id: String,
}

/// One connection that was made.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    /// Its class; `Other` was not registered.
    pub class: FlowClass,
    /// The near end.
    pub local: SocketAddr,
    /// The far end.
    pub remote: SocketAddr,
}

/// What passed.
#[derive(Debug)]
pub struct Traffic {
    /// The connections.
    pub flows: Vec<Flow>,
    /// TCP packets as the far end saw them.
    pub packets: Vec<Seen>,
}

impl Wire {
    /// Builds it; every name begins with `id`.
    pub fn new(id: &str) -> Result<Self> {
        let wire = Self { id: id.to_owned() };
        let (near, far) = (wire.namespace(NEAR), wire.namespace(FAR));
        ip(&format!("netns add {near}"))?;
        ip(&format!("netns add {far}"))?;
        ip(&format!("link add {IFACE} netns {near} type veth peer name {IFACE} netns {far}"))?;
        for (namespace, host) in [(&near, 1), (&far, 2)] {
            // Whole frames and no super-packets: as on a cable.
            ip(&format!("-n {namespace} link set {IFACE} gso_max_segs 1"))?;
            ip(&format!("-n {namespace} link set {IFACE} up"))?;
            ip(&format!("-n {namespace} addr add 10.77.9.{host}/24 dev {IFACE}"))?;
            ip(&format!("-n {namespace} addr add fd77:9::{host}/64 dev {IFACE} nodad"))?;
        }
        Ok(wire)
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }

    fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.namespace(name), work)
    }

    /// One connection of every class after another, `bytes` each way forth; all that the far end saw of them.
    pub fn traffic(&self, v6: bool, policy: &TagPolicy, bytes: usize) -> Result<Traffic> {
        let at = if v6 { "[fd77:9::2]:0" } else { "10.77.9.2:0" };
        let listener = self.inside(FAR, || {
            ecn()?;
            Ok(TcpListener::bind(at)?)
        })?;
        let capture = Capture::start(&self.namespace(FAR))?;
        let flows = self.inside(NEAR, || {
            ecn()?;
            let classifier = Classifier::attach(IFACE, None)?;
            classifier.set_policy(policy)?;
            let flows = FlowClass::ALL.iter().map(|class| connection(&classifier, &listener, *class, bytes));
            flows.collect::<Result<Vec<_>>>()
        });
        let packets = capture.stop()?;
        Ok(Traffic { flows: flows?, packets })
    }
}

/// Runs `work` on a thread of its own in a namespace. Sockets made there stay there.
fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("/run/netns/{namespace}");
    let namespace = File::open(&path).with_context(|| path)?;
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        });
        worker.join().map_err(|_| anyhow!("a thread in a namespace panicked"))?
    })
}

/// The TCP packets of all interfaces of a namespace; at a switch each is seen at every port it passes.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Seen>>>,
}

impl Capture {
    /// Captures from now on.
    pub fn start(namespace: &str) -> Result<Self> {
        let socket = inside(namespace, || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))?;
            socket.set_recv_buffer_size(64 << 20)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            Ok(socket)
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || captured(&socket, &told));
        Ok(Self { stop, thread })
    }

    /// What was seen until now; the last packets may still be on their way.
    pub fn stop(self) -> Result<Vec<Seen>> {
        thread::sleep(Duration::from_millis(300));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in [NEAR, FAR] {
            let _ = ip(&format!("netns del {}", self.namespace(name)));
        }
    }
}

/// Lets this namespace's connections use the ECN bits.
fn ecn() -> Result<()> {
    std::fs::write("/proc/sys/net/ipv4/tcp_ecn", "1").context("switch ECN on")
}

/// Connects as agents do, and sends.
fn connection(
    classifier: &Classifier,
    listener: &TcpListener,
    class: FlowClass,
    bytes: usize,
) -> Result<Flow> {
    let remote = listener.local_addr()?;
    let hello = Greeting::new("wire", [0; 32], Purpose::Vm { source: HostIx(0), vm: VmIx(0) });
    let announce = |ends: Option<(SocketAddr, SocketAddr)>| -> Option<FlowGuard> {
        let (local, remote) = ends.filter(|_| class != FlowClass::Other)?;
        Some(classifier.track_ends(local, remote, class))
    };
    let (near, _guard) = dial(remote, &hello, Duration::from_secs(5), &Security::Plain, announce)?;
    let (far, _) = listener.accept()?;
    let flow = Flow { class, local: near.local_addr()?, remote };
    thread::scope(|scope| -> Result<()> {
        let reading = scope.spawn(|| drain(&far));
        (&near).write_all(&vec![0x5a; bytes])?;
        near.shutdown(std::net::Shutdown::Write)?;
        let got = reading.join().map_err(|_| anyhow!("the reader panicked"))??;
        if got < bytes {
            bail!("{} of {bytes} bytes arrived", got);
        }
        Ok(())
    })?;
    // The far end closes first, so that the guard outlives the last packet.
    drop(far);
    (&near).read_to_end(&mut Vec::new())?;
    thread::sleep(Duration::from_millis(50));
    Ok(flow)
}

fn drain(mut from: &TcpStream) -> Result<usize> {
    let mut buffer = vec![0; 256 << 10];
    let mut all = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(all),
            n => all += n,
        }
    }
}

fn captured(mut socket: &Socket, stop: &AtomicBool) -> Result<Vec<Seen>> {
    let mut packets = Vec::new();
    let mut buffer = vec![0; 70_000];
    loop {
        match socket.read(&mut buffer) {
            Ok(n) => packets.extend(buffer.get(..n).and_then(frames::read)),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(packets);
                }
            }
            Err(e) => return Err(e).context("capture"),
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    let out = Command::new("ip").args(arguments.split(' ')).output().context("start ip (iproute2)")?;
    if !out.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
