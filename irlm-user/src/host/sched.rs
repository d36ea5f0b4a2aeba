//! What the preparation asks of the kernel about threads and processes: to run only when nobody else wants to, and
//! which process is behind a monitor socket. std and rustix have no call for the first, and none that is sound for
//! a process of another PID namespace for the second.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// How the thread was made to give way.
#[derive(Debug)]
pub enum GivesWay {
    /// SCHED_IDLE: runs only on time nobody else wants.
    Idle,
    /// The kernel refused SCHED_IDLE, and the thread runs at nice 19: about 1.5 % of a contended core.
    Nice {
        /// Why not SCHED_IDLE.
        refused: io::Error,
    },
}

/// Puts the calling thread into SCHED_IDLE; where that is refused, to nice 19. An error means that neither worked
/// and the thread runs as before.
pub fn idle_this_thread() -> io::Result<GivesWay> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: pid 0 is the calling thread; `param` outlives the call and the kernel only reads it.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) } == 0 {
        return Ok(GivesWay::Idle);
    }
    let refused = io::Error::last_os_error();
    rustix::process::setpriority_process(None, 19)?;
    Ok(GivesWay::Nice { refused })
}

/// Processor time that the calling thread has used so far.
#[must_use]
pub fn thread_cpu() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec.cast_unsigned(), t.tv_nsec as u32)
}

/// Time that the host's processors were idle so far, all together (`/proc/stat`, proc(5)): waiting for a disk counts as idle.
pub fn idle_time() -> io::Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let mut fields = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(4);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let idle = ticks().zip(ticks()).map(|(idle, waiting)| idle + waiting);
    let idle = idle.ok_or_else(|| io::Error::other("/proc/stat: no idle time in its first line"))?;
    Ok(Duration::from_millis(idle * 1000 / rustix::param::clock_ticks_per_second().max(1)))
}

/// Bytes that new processes could have without swapping (`MemAvailable` of `/proc/meminfo`, proc(5)).
pub fn memory_available() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|k| k << 10).ok_or_else(|| io::Error::other("no MemAvailable"))
}

/// The process that called listen() on the socket that `fd` is connected to: QEMU itself, unless its starter passed
/// the monitor socket in (libvirt does: then this is libvirt). `None`: it is not visible in this PID namespace.
pub fn peer_pid(fd: impl AsFd) -> io::Result<Option<u32>> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` is a plain C struct of exactly `len` bytes, and both outlive the call; the kernel writes no
    // more than `len` bytes.
    let rc = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(cred.pid).ok().filter(|p| *p != 0))
}

/// One run of the host's kernel, from its start to its end (`/proc/sys/kernel/random/boot_id`, random(4)).
/// Unknown in records of before this was kept, and where /proc cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct BootId(u128);

impl BootId {
    /// Of a record of before this was kept.
    pub const UNKNOWN: Self = Self(0);

    /// The boot that runs now.
    #[must_use]
    pub fn now() -> Self {
        static NOW: std::sync::OnceLock<BootId> = std::sync::OnceLock::new();
        *NOW.get_or_init(|| {
            let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            text.parse().unwrap_or_default()
        })
    }
}

impl std::str::FromStr for BootId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        match u128::from_str_radix(&digits, 16) {
            Ok(id) if digits.len() == 32 => Ok(Self(id)),
            _ => Err(format!("not the number of a boot: {text:?}")),
        }
    }
}

impl From<BootId> for String {
    fn from(id: BootId) -> Self {
        format!("{:032x}", id.0)
    }
}

impl serde::Serialize for BootId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&String::from(*self))
    }
}

impl<'de> serde::Deserialize<'de> for BootId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A process, told apart from a later one with the same number: what "QEMU is gone" must mean before anybody acts on
/// it, since a monitor connection can be lost without its QEMU dying.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks after boot (proc(5), stat field 22).
    pub started: u64,
    /// After which boot: after another one, the same number and ticks are another process.
    #[serde(default)]
    pub boot_id: BootId,
}

impl Process {
    /// The process that has this number now.
    pub fn of(pid: u32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let stat = std::fs::read_to_string(&path)?;
        // The name in parentheses may hold anything; the state follows the last one.
        let fields = stat.rfind(')').map(|at| &stat[at + 1..]);
        let mut fields = fields.unwrap_or("").split_ascii_whitespace();
        let state = fields.next();
        let started = fields.nth(18).and_then(|f| f.parse().ok());
        match (state, started) {
            (Some("Z" | "X"), _) => Err(io::ErrorKind::NotFound.into()),
            (Some(_), Some(started)) => Ok(Self { pid, started, boot_id: BootId::now() }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, path)),
        }
    }

    /// When it was started, in seconds of Unix time, as far as the host's clock was not set since.
    #[must_use]
    pub fn started_at(self) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let boot = text.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse::<u64>().ok()?;
        Some(boot + self.started / rustix::param::clock_ticks_per_second().max(1))
    }

    /// Whether it has certainly ended: its number is free, a zombie's, or another process's. One whose boot
    /// is not known is never taken for the one that is there now, and its end is not concluded from that.
    #[must_use]
    pub fn is_gone(self) -> bool {
        match Self::of(self.pid) {
            Ok(now) => now.started != self.started || self.of_another_boot(),
            Err(e) => e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH),
        }
    }

    /// Waits until it has ended, but no longer than this; whether it has.
    #[must_use]
    pub fn wait_gone(self, at_most: Duration) -> bool {
        let until = std::time::Instant::now() + at_most;
        loop {
            if self.is_gone() {
                return true;
            }
            if std::time::Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn of_another_boot(self) -> bool {
        let known = |id: BootId| id != BootId::default();
        known(self.boot_id) && known(BootId::now()) && self.boot_id != BootId::now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_gives_way_and_its_neighbours_do_not() {
        // In a thread of its own: a test runner at SCHED_IDLE would spoil the others.
        let class = std::thread::spawn(|| {
            let how = idle_this_thread().unwrap();
            // SAFETY: pid 0 is the calling thread; no memory is involved.
            let class = unsafe { libc::sched_getscheduler(0) };
            match how {
                GivesWay::Idle => assert_eq!(class, libc::SCHED_IDLE),
                GivesWay::Nice { refused } => println!("SCHED_IDLE refused here: {refused}"),
            }
        });
        class.join().unwrap();
        // SAFETY: as above.
        assert_ne!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_IDLE);
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&a).unwrap(), Some(std::process::id()));
    }

    #[test]
    fn a_process_is_gone_when_it_has_ended_and_not_before() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let p = Process::of(child.id()).unwrap();
        assert!(!p.is_gone());
        assert!(Process { started: p.started + 1, ..p }.is_gone(), "another process with its number");
        let earlier = Process { boot_id: BootId(7), ..p };
        assert!(earlier.is_gone() && earlier != p, "the same number and ticks, before a reboot");
        let old =
            serde_json::from_value::<Process>(serde_json::json!({ "pid": p.pid, "started": p.started }));
        let old = old.unwrap();
        assert!(old != p && !old.is_gone(), "a record that does not know its boot concludes nothing");
        let text = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Process>(&text).unwrap(), p, "{text}");
        child.kill().unwrap();
        // A zombie cannot run a VM.
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while !p.is_gone() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(p.is_gone());
        child.wait().unwrap();
        assert!(p.is_gone());
    }
}
