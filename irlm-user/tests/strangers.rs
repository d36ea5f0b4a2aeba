//! Callers of which nobody knows who they are, by the hundred, at the ports of a real agent and a real index server: idle
//! ones, slow ones, some that never read, garbage, and storms of connections. Whoever has a question is answered all the
//! same, files and memory come back, and the log says what came without being flooded.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

use irlm_user::flow::index::client::IndexOpener;
use irlm_user::host::descriptors;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an answer may take here, where other tests want the processors, too.
const SOON: Duration = Duration::from_secs(5);
/// Files that a daemon may have open in these tests, as many a service manager has it.
const FILES: u64 = 1024;
/// What strangers may add to a daemon's memory, KiB: a thread's stack as far as it was used, a TLS session, small buffers.
const MEMORY: u64 = 48 << 10;

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A daemon of the program, which ends with this.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, args: &[&str]) -> Self {
        let log = dir.join("log");
        // The shell becomes the program, with a limit that it cannot raise.
        let child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {FILES} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_irlm")])
            .args(args)
            .current_dir(dir)
            .env("IRLM_LOG", "info")
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// VmRSS, KiB.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until no more files are open than before, and says so if that does not come.
    #[track_caller]
    fn settles(&self, files: usize) {
        let until = Instant::now() + Duration::from_secs(15);
        while self.open_files() > files {
            assert!(Instant::now() < until, "{} files are open, {files} before", self.open_files());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = std::fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("{}", said.lines().take(40).collect::<Vec<_>>().join("\n"));
        }
    }
}

/// An agent, and where it listens.
struct Agent {
    daemon: Daemon,
    control: SocketAddr,
    data: SocketAddr,
    dir: PathBuf,
    /// Arguments that every command wants.
    tls: Vec<&'static str>,
}

impl Agent {
    fn start(dir: &Path, tls: bool) -> Self {
        let (control, data) = (free(), free());
        let keys = if tls { "tls = \"a\"\n" } else { "" };
        let text = format!(
            "name = \"a\"\ncontrol = \"{control}\"\ndata = \"{data}\"\nstate_dir = \"state\"\nbpf = false\n{keys}\
             [sampling]\nkernel = false\n"
        );
        std::fs::write(dir.join("agent.toml"), text).unwrap();
        let daemon = Daemon::start(dir, &["agent", "--config", "agent.toml"]);
        let tls = if tls { vec!["--tls", "ann"] } else { vec![] };
        let agent = Self { daemon, control, data, dir: dir.to_owned(), tls };
        let until = Instant::now() + Duration::from_secs(10);
        while agent.run(&["status"]).0 != 0 {
            assert!(Instant::now() < until, "the agent does not answer: {}", agent.daemon.said());
            std::thread::sleep(Duration::from_millis(50));
        }
        agent
    }

    /// A command about this agent: its exit code, what it said, and how long it took.
    fn run(&self, args: &[&str]) -> (i32, String, Duration) {
        let begun = Instant::now();
        let control = self.control.to_string();
        let out = Command::new(env!("CARGO_BIN_EXE_irlm"))
            .args(&self.tls)
            .args(args)
            .args(["--agent", control.as_str()])
            .current_dir(&self.dir)
            .output()
            .unwrap();
        let said = [out.stdout, out.stderr].concat();
        (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned(), begun.elapsed())
    }

    #[track_caller]
    fn answers(&self, when: &str) {
        let (code, said, took) = self.run(&["status"]);
        println!("status {when}: {took:?}, {} files open", self.daemon.open_files());
        assert!(code == 0 && took < SOON, "status {when}: exit code {code} after {took:?}: {said}");
        let (code, said, took) = self.run(&["cancel", "--name", "none"]);
        let heard = said.contains("does not know group none");
        assert!(heard && took < SOON, "cancel {when}: exit code {code} after {took:?}: {said}");
    }
}

/// Callers that say one thing and stay.
fn stay(to: SocketAddr, count: usize, say: &[u8]) -> Vec<TcpStream> {
    let call = |_| {
        let mut s = TcpStream::connect(to).unwrap();
        // Whoever was sent away already does not mind.
        let _ = s.write_all(say);
        s
    };
    (0..count).map(call).collect()
}

/// What goes on until it is told to end.
struct Busy {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn begin(mut step: impl FnMut() + Send + 'static) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (halt, counter) = (stop.clone(), count.clone());
        let run = move || {
            while !halt.load(Ordering::Relaxed) {
                step();
                counter.fetch_add(1, Ordering::Relaxed);
            }
        };
        Self { stop, count, thread: Some(std::thread::spawn(run)) }
    }

    /// Connections that come as fast as they can, each with some bytes of nonsense.
    fn storm(to: SocketAddr) -> Self {
        let mut n = 0u8;
        let mut kept = std::collections::VecDeque::new();
        Self::begin(move || {
            n = n.wrapping_add(41);
            if let Ok(mut s) = TcpStream::connect(to) {
                let _ = s.write_all(&[n; 20]);
                kept.push_back(s);
            }
            if kept.len() > 100 {
                kept.pop_front();
            }
        })
    }

    /// Callers that say a byte now and then.
    fn drip(to: SocketAddr, count: usize, byte: u8) -> Self {
        let mut callers = stay(to, count, &[byte]);
        Self::begin(move || {
            for s in &mut callers {
                let _ = s.write_all(&[byte]);
            }
            std::thread::sleep(Duration::from_millis(100));
        })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_none_or(|e| e.is_ok()) || std::thread::panicking());
    }
}

const HELLO: &[u8] = b"{\"v\":1,\"req\":{\"do\":\"hello\"}}\n";

#[test]
fn an_agent_answers_whoever_asks_beside_any_number_of_strangers() {
    descriptors::raise();
    let tmp = tempfile::tempdir().unwrap();
    let agent = Agent::start(tmp.path(), false);
    let (files, memory) = (agent.daemon.open_files(), agent.daemon.memory());

    let mut idle = stay(agent.control, 1000, b"");
    idle.extend(stay(agent.data, 1000, b""));
    agent.answers("beside idle ones");
    let slow = [Busy::drip(agent.control, 250, b' '), Busy::drip(agent.data, 250, 1)];
    agent.answers("beside slow ones");
    // They were let in, and ask nothing more; or ask again and again and take no answer.
    let sitting = stay(agent.control, 300, HELLO);
    let deaf = stay(agent.control, 200, &HELLO.repeat(1000));
    agent.answers("beside those who sit and those who never read");
    // A frame of a megabyte, where a hello is due.
    let pages = [&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0][..], &[7; 100_000]].concat();
    let garbage = [stay(agent.data, 200, &pages), stay(agent.control, 200, &[b'['; 60_000])];
    let storms: Vec<Busy> = [agent.data, agent.control].into_iter().map(Busy::storm).collect();
    agent.answers("in a storm");
    std::thread::sleep(Duration::from_secs(1));
    agent.answers("in a storm that lasts");
    let came: usize = storms.iter().map(|s| s.count.load(Ordering::Relaxed)).sum();
    println!(
        "{came} connections in the storm; {} KiB more memory",
        agent.daemon.memory().saturating_sub(memory)
    );
    assert!(agent.daemon.open_files() as u64 <= FILES / 8 * 7, "{} files", agent.daemon.open_files());
    assert!(agent.daemon.memory() < memory + MEMORY, "{} KiB before, {} now", memory, agent.daemon.memory());

    drop((idle, slow, sitting, deaf, garbage, storms));
    agent.daemon.settles(files + 2);
    agent.answers("afterwards");
    let said = agent.daemon.said();
    for want in
        ["data port: refused", "control port: not understood", "control port: full", "data port: full"]
    {
        assert!(said.contains(want), "no line says {want:?}: {said}");
    }
    assert!(!said.contains("Too many open files"), "{said}");
    assert!(said.lines().count() < 100, "{} lines of {came} connections and more", said.lines().count());
}

#[test]
fn with_tls_strangers_come_no_further_than_their_handshake() {
    descriptors::raise();
    let tmp = tempfile::tempdir().unwrap();
    let cert = |line: &str| {
        let out = Command::new(env!("CARGO_BIN_EXE_irlm"))
            .arg("cert")
            .args(line.split_whitespace())
            .current_dir(tmp.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    };
    cert("init ca");
    cert("issue ca --out a --host a --ip 127.0.0.1 --role agent");
    cert("issue ca --out ann --host ann --role operator");
    let agent = Agent::start(tmp.path(), true);
    let (files, memory) = (agent.daemon.open_files(), agent.daemon.memory());
    let both = |count, say: &[u8]| [stay(agent.control, count, say), stay(agent.data, count, say)];
    // The beginning of a record of sixteen KiB that never ends; and words in plain text.
    let strangers = [both(400, b""), both(200, &[0x16, 3, 1, 0x3f, 0xff, 1, 0, 0x3f]), both(100, HELLO)];
    agent.answers("under TLS, beside idle and slow ones");
    let storms: Vec<Busy> = [agent.data, agent.control].into_iter().map(Busy::storm).collect();
    agent.answers("under TLS, in a storm");
    assert!(agent.daemon.memory() < memory + MEMORY, "{} KiB before, {} now", memory, agent.daemon.memory());
    drop((strangers, storms));
    agent.daemon.settles(files + 2);
    let said = agent.daemon.said();
    assert!(said.contains("data port: not let in") && said.contains("control port: "), "{said}");
    assert!(said.lines().count() < 100, "{} lines", said.lines().count());
}

#[test]
fn an_index_server_opens_groups_beside_any_number_of_strangers() {
    descriptors::raise();
    let tmp = tempfile::tempdir().unwrap();
    let at = free();
    let index = Daemon::start(tmp.path(), &["index", "--listen", &at.to_string()]);
    let opens = |name: &str| {
        let begun = Instant::now();
        let open = || IndexOpener::open(at, name, &[7; 32], 2, 2, SOON);
        // Of a storm from one's own host one may be a part for a moment.
        let group = open().or_else(|_| open()).or_else(|_| open());
        println!("opened {name:?} in {:?}, {} files open", begun.elapsed(), index.open_files());
        group.unwrap().close().unwrap();
    };
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(at).is_err() {
        assert!(Instant::now() < until, "{}", index.said());
        std::thread::sleep(Duration::from_millis(20));
    }
    opens("before");
    std::thread::sleep(Duration::from_millis(300));
    let (files, memory) = (index.open_files(), index.memory());
    let idle = stay(at, 1200, b"");
    opens("beside-idle-ones");
    let slow = Busy::drip(at, 250, 9);
    let garbage = stay(at, 300, &[0xff; 50_000]);
    opens("beside-slow-ones-and-garbage");
    let storm = Busy::storm(at);
    opens("in-a-storm");
    assert!(index.open_files() as u64 <= FILES / 8 * 7, "{} files", index.open_files());
    assert!(index.memory() < memory + MEMORY, "{} KiB before, {} now", memory, index.memory());
    drop((idle, slow, garbage, storm));
    index.settles(files + 2);
    opens("afterwards");
    let said = index.said();
    assert!(said.contains("index: connection lost") || said.contains("index: hung up"), "{said}");
    assert!(said.lines().count() < 100, "{} lines", said.lines().count());
}

#[test]
fn a_caller_that_says_nothing_is_told_to_go_in_time() {
    let tmp = tempfile::tempdir().unwrap();
    let agent = Agent::start(tmp.path(), false);
    let begun = Instant::now();
    let mut strangers = [agent.data, agent.control].map(|to| TcpStream::connect(to).unwrap());
    for (s, most) in strangers.iter_mut().zip([10, 15]) {
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(s.read(&mut [0; 1]).unwrap(), 0);
        assert!(begun.elapsed() < Duration::from_secs(most), "after {:?}", begun.elapsed());
    }
    let until = Instant::now() + SOON;
    let told = |said: &str| said.contains("data port: no hello") && said.contains("no request in time");
    while !told(&agent.daemon.said()) {
        assert!(Instant::now() < until, "{}", agent.daemon.said());
        std::thread::sleep(Duration::from_millis(20));
    }
}
