//! The stream grammar against real QEMU: whatever the unit tests believe, a stock QEMU must load what the emitter
//! writes and end with the same RAM, and must run on when its stream is refused.
//!
//! `IRLM_QEMU` names the QEMU (default: `qemu-system-x86_64` in PATH), `IRLM_QEMU_TARGET` another one for the target,
//! `IRLM_QEMU_MACHINES` the machine types (default `q35,pc`), `IRLM_KEEP_STREAMS` a directory to keep the streams in.
//! Without a QEMU the tests say so and pass.

use irlm_user::core::qemu::{Emitter, Event, Parser, RpError, RpKind, RpParser, StreamError};
use irlm_user::core::units::{PAGE_SIZE, PageAddr};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// The guest's RAM.
const RAM_BYTES: usize = 64 << 20;
/// Nothing here takes a tenth of it on an idle machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// The QEMU to use on one side; none, with the reason printed, where there is none.
fn qemu(target: bool) -> Option<PathBuf> {
    let named =
        target.then(|| env::var_os("IRLM_QEMU_TARGET")).flatten().or_else(|| env::var_os("IRLM_QEMU"));
    if let Some(path) = named {
        return Some(path.into());
    }
    let found =
        env::split_paths(&env::var_os("PATH")?).map(|d| d.join("qemu-system-x86_64")).find(|p| p.exists());
    if found.is_none() {
        eprintln!("skipped: no qemu-system-x86_64 in PATH and IRLM_QEMU is not set");
    }
    found
}

fn machines() -> Vec<String> {
    let list = env::var("IRLM_QEMU_MACHINES").unwrap_or_else(|_| "q35,pc".into());
    list.split(',').map(str::to_owned).collect()
}

/// Calls `done` until it gives something.
fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(t) = done() {
            return t;
        }
        assert!(start.elapsed() < DEADLINE, "waited too long for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Guest {
    /// The usual firmware, with nothing to boot.
    Firmware,
    /// A payload in the firmware's place that writes 128 pages round and round.
    Writer,
}

/// Real-mode code: count in `ax`, and write it to the first word of each page from 64 KiB to 576 KiB, for ever.
fn writer_image() -> Vec<u8> {
    let mut image = vec![0; 64 << 10];
    let code = [
        0xbb, 0x00, 0x10, // 00 mov bx, 0x1000
        0x8e, 0xc3, // 03 mov es, bx
        0x40, // 05 inc ax
        0x26, 0xa3, 0x00, 0x00, // 06 mov es:[0], ax
        0x81, 0xc3, 0x00, 0x01, // 0a add bx, 0x100
        0x81, 0xfb, 0x00, 0x90, // 0e cmp bx, 0x9000
        0x72, 0xef, // 12 jb 03
        0xeb, 0xea, // 14 jmp 00
    ];
    image[..code.len()].copy_from_slice(&code);
    // The reset vector: jmp f000:0000.
    image[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    image
}

/// One running QEMU; dies with the value.
struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Qemu {
    fn start(program: &Path, dir: &Path, side: &str, machine: &str, guest: Guest, more: &[&str]) -> Self {
        let socket = dir.join(format!("{side}.qmp"));
        let mut command = Command::new(program);
        // A software KVM takes minutes for a firmware, but runs a payload well, and its dirty log can be trusted.
        if guest == Guest::Writer {
            command.args(["-accel", "kvm"]);
        }
        command.args(["-accel", "tcg", "-machine", &format!("{machine},memory-backend=m0"), "-m", "64"]);
        command.args(["-object", "memory-backend-memfd,id=m0,size=64M,share=on", "-nodefaults"]);
        command.args(["-display", "none", "-serial", "none", "-monitor", "none", "-no-user-config"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        if guest == Guest::Writer {
            let image = dir.join(format!("{side}.bin"));
            fs::write(&image, writer_image()).expect("write the payload");
            command.arg("-bios").arg(image);
        }
        let child = command.args(more).stdin(Stdio::null()).spawn().expect("start QEMU");
        let mut child = Some(child);
        let stream = until("QMP", || {
            if let Ok(Some(status)) = child.as_mut().expect("started").try_wait() {
                panic!("QEMU ended at once: {status}");
            }
            UnixStream::connect(&socket).ok()
        });
        stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
        let mut this = Self { child: child.take().expect("started"), qmp: BufReader::new(stream) };
        this.line();
        this.command("qmp_capabilities", &json!({}));
        this
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.qmp.read_line(&mut line).expect("read QMP");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP said {line:?}: {e}"))
    }

    fn try_command(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        let command = json!({ "execute": name, "arguments": arguments });
        writeln!(self.qmp.get_mut(), "{command}").expect("write QMP");
        loop {
            let mut reply = self.line();
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = reply.get("error") {
                return Err(error.to_string());
            }
        }
    }

    fn command(&mut self, name: &str, arguments: &Value) -> Value {
        self.try_command(name, arguments).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Whether this QEMU's dirty log may miss writes: TCG's did until 9.0, with or without anything in the stream's
    /// path (docs/qemu-stream.md).
    fn loses_writes(&mut self) -> bool {
        let major = self.command("query-version", &json!({}))["qemu"]["major"].as_u64();
        let kvm = self.command("query-kvm", &json!({}))["enabled"] == json!(true);
        !kvm && major.is_none_or(|m| m < 9)
    }

    fn capability(&mut self, name: &str) -> Result<(), String> {
        let on = json!({ "capabilities": [{ "capability": name, "state": true }] });
        self.try_command("migrate-set-capabilities", &on).map(drop)
    }

    fn migrate(&mut self, socket: &Path) {
        self.command("migrate", &json!({ "uri": format!("unix:{}", socket.display()) }));
    }

    /// Waits until the migration has ended, and says how.
    fn outcome(&mut self) -> String {
        until("the migration's end", || {
            let status =
                self.command("query-migrate", &json!({}))["status"].as_str().unwrap_or("").to_owned();
            ["completed", "failed", "cancelled"].contains(&status.as_str()).then_some(status)
        })
    }

    fn runs(&mut self) -> bool {
        self.command("query-status", &json!({}))["running"] == json!(true)
    }

    /// The guest's RAM, open for reading and writing.
    fn memory(&self) -> fs::File {
        let fds = format!("/proc/{}/fd", self.child.id());
        let fd = fs::read_dir(fds).expect("list QEMU's files").flatten().find(|fd| {
            fs::read_link(fd.path())
                .is_ok_and(|l| l.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
        });
        let path = fd.expect("QEMU has a memfd").path();
        fs::File::options().read(true).write(true).open(path).expect("open the guest's RAM")
    }

    fn ram(&self) -> Vec<u8> {
        let mut ram = vec![0; RAM_BYTES];
        self.memory().read_exact_at(&mut ram, 0).expect("read the guest's RAM");
        ram
    }
}

/// How the pages travel.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    /// As they come, the sections as QEMU had them.
    Straight,
    /// All kept until the end of RAM, only the newest versions, in another order.
    HeldBack,
}

/// What went over a connection.
#[derive(Default)]
struct Carried {
    stream: Vec<u8>,
    newest: BTreeMap<PageAddr, Option<Box<[u8; PAGE_SIZE]>>>,
    pages: u64,
    zeroes: u64,
    sections: u64,
    stopped: bool,
    machine: String,
    blocks: Vec<String>,
}

/// What may go wrong with a stream.
#[derive(Debug)]
enum Failure {
    Stream(StreamError),
    Io(std::io::Error),
}

impl From<StreamError> for Failure {
    fn from(e: StreamError) -> Self {
        Self::Stream(e)
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::Io(e)
    }
}

/// Reads the source's stream to its end, and writes it anew to the target.
fn carry(mut source: UnixStream, mut target: Option<UnixStream>, way: Way) -> Result<Carried, Failure> {
    let mut carried = Carried::default();
    let mut parser = Parser::new();
    let mut emitter = None::<Emitter>;
    let mut held = Vec::new();
    let mut piece = vec![0; 300_000];
    loop {
        let n = match source.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => break,
            Err(e) => return Err(e.into()),
        };
        held.extend_from_slice(&piece[..n]);
        carried.stream.extend_from_slice(&piece[..n]);
        let mut out = Vec::new();
        let used = parser.parse::<Failure>(&held, &mut |event| {
            match (event, &mut emitter) {
                (Event::Verbatim(bytes), emitter) => {
                    if let Some(e) = emitter {
                        e.close_section(&mut out);
                    }
                    out.extend_from_slice(bytes);
                }
                (Event::Blocks(list), emitter) => {
                    carried.blocks = list.blocks().iter().map(|b| b.name.to_string()).collect();
                    *emitter = Some(Emitter::new(list));
                }
                (Event::Page { addr, bytes }, Some(e)) => {
                    carried.pages += 1;
                    carried.newest.insert(addr, Some(Box::new(*bytes)));
                    if way == Way::Straight {
                        e.page_header(addr, &mut out).expect("a listed page");
                        out.extend_from_slice(bytes);
                    }
                }
                (Event::Zero { addr }, Some(e)) => {
                    carried.zeroes += 1;
                    carried.newest.insert(addr, None);
                    if way == Way::Straight {
                        e.zero(addr, &mut out).expect("a listed page");
                    }
                }
                (Event::SectionEnd, Some(e)) => {
                    carried.sections += 1;
                    e.close_section(&mut out);
                }
                (Event::Stopped, _) => carried.stopped = true,
                (Event::RamEnd, Some(e)) => {
                    if way == Way::HeldBack {
                        let mut order: Vec<_> = carried.newest.iter().collect();
                        order.sort_by_key(|(a, _)| (a.page % 3, a.block, std::cmp::Reverse(a.page)));
                        for (n, (addr, bytes)) in order.into_iter().enumerate() {
                            if n % 1000 == 999 {
                                e.close_section(&mut out);
                            }
                            match bytes {
                                Some(bytes) => {
                                    e.page_header(*addr, &mut out).expect("a listed page");
                                    out.extend_from_slice(&bytes[..]);
                                }
                                None => e.zero(*addr, &mut out).expect("a listed page"),
                            }
                        }
                    }
                    e.end(&mut out);
                }
                (other, None) => panic!("{other:?} before the block list"),
            }
            Ok(())
        })?;
        held.drain(..used);
        if let Some(target) = &mut target {
            target.write_all(&out)?;
        }
    }
    parser.finish()?;
    carried.machine = parser.machine().unwrap_or("").to_owned();
    Ok(carried)
}

/// Passes the return path on, until its end; says which SHUTs came.
fn carry_back(mut target: UnixStream, mut source: UnixStream) -> Vec<bool> {
    let mut parser = RpParser::new();
    let (mut held, mut shuts, mut piece) = (Vec::new(), Vec::new(), [0; 512]);
    while let Ok(n) = target.read(&mut piece) {
        if n == 0 {
            break;
        }
        held.extend_from_slice(&piece[..n]);
        let used = parser.parse::<RpError>(&held, &mut |message| {
            if let RpKind::Shut { ok } = message.kind {
                shuts.push(ok);
            }
            source.write_all(message.bytes).expect("write to the source");
            Ok(())
        });
        held.drain(..used.expect("a good return path"));
    }
    shuts
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).expect("make the listener ask");
    let (stream, _) = until("QEMU's connection", || listener.accept().ok());
    stream.set_nonblocking(false).expect("make the connection wait");
    stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
    stream
}

fn connect(path: &Path) -> UnixStream {
    let stream = until("the target's socket", || UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(DEADLINE)).expect("set a time limit");
    stream
}

/// Fills 12 MiB of the guest's RAM from outside, half of the pages alike, so that there is something to send.
fn fill(memory: &fs::File) {
    let mut x = 88_172_645_463_325_252u64;
    let mut bytes = vec![0; 12 << 20];
    for (n, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        if n % 2 == 0 {
            x = 88_172_645_463_325_252;
        }
        for b in page {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *b = x as u8;
        }
    }
    memory.write_all_at(&bytes, 32 << 20).expect("fill the guest's RAM");
}

fn move_one(machine: &str, guest: Guest, way: Way) {
    let (Some(program), Some(target_program)) = (qemu(false), qemu(true)) else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let (agent, incoming) = (dir.path().join("agent"), dir.path().join("incoming"));
    let listener = UnixListener::bind(&agent).expect("listen");
    let mut source = Qemu::start(&program, dir.path(), "source", machine, guest, &[]);
    let uri = format!("unix:{}", incoming.display());
    let mut target =
        Qemu::start(&target_program, dir.path(), "target", machine, guest, &["-S", "-incoming", &uri]);
    fill(&source.memory());
    thread::sleep(Duration::from_millis(300));
    source.capability("return-path").expect("return-path");
    source.capability("events").expect("events");
    source.migrate(&agent);

    let (from, to) = (accept(&listener), connect(&incoming));
    let back = (to.try_clone().expect("clone"), from.try_clone().expect("clone"));
    let back = thread::spawn(move || carry_back(back.0, back.1));
    let finish = to.try_clone().expect("clone");
    let carried = carry(from, Some(to), way).unwrap_or_else(|e| panic!("{machine} {guest:?} {way:?}: {e:?}"));
    finish.shutdown(std::net::Shutdown::Both).ok();
    assert_eq!(back.join().expect("the return path"), [true], "one SHUT, and a good one");

    assert_eq!(source.outcome(), "completed");
    assert_eq!(target.outcome(), "completed");
    assert!(!source.runs() && !target.runs());
    // Rule 2: what the target holds is what the source sent, page by page the newest version.
    let (kept, loaded) = (source.ram(), target.ram());
    let block = carried.blocks.iter().position(|b| b.ends_with("m0")).expect("the RAM's block is listed");
    let mut sent = vec![0; RAM_BYTES];
    for (addr, bytes) in carried.newest.iter().filter(|(a, _)| usize::from(a.block.0) == block) {
        let at = addr.page as usize * PAGE_SIZE;
        if let Some(bytes) = bytes {
            sent[at..at + PAGE_SIZE].copy_from_slice(&bytes[..]);
        }
    }
    let differ = |a: &[u8], b: &[u8]| -> Vec<usize> {
        let pages = a.chunks(PAGE_SIZE).zip(b.chunks(PAGE_SIZE)).enumerate();
        pages.filter_map(|(n, (a, b))| (a != b).then_some(n)).collect()
    };
    assert_eq!(differ(&sent, &loaded), [0; 0], "{machine} {guest:?} {way:?}: loaded otherwise than sent");
    // And what it sent should be its RAM.
    let lost = differ(&sent, &kept);
    if !lost.is_empty() && source.loses_writes() {
        eprintln!(
            "{machine} {guest:?}: TCG of this QEMU lost the last writes to {} pages by itself",
            lost.len()
        );
    } else {
        assert_eq!(lost, [0; 0], "{machine} {guest:?} {way:?}: not all of the source's RAM was sent");
    }
    assert!(carried.stopped && carried.zeroes > 0);
    assert!(carried.pages >= 3072, "the filled pages were sent");
    any_cut_is_the_same(&carried.stream);

    target.command("cont", &json!({}));
    assert!(target.runs());
    if guest == Guest::Writer {
        until("the guest to write again", || (target.ram() != loaded).then_some(()));
    }
    eprintln!(
        "{machine} ({}) {guest:?} {way:?}: {} bytes, {} pages, {} zero pages, {} sections, {} blocks; RAM identical",
        carried.machine,
        carried.stream.len(),
        carried.pages,
        carried.zeroes,
        carried.sections,
        carried.blocks.len()
    );
    if let Some(keep) = env::var_os("IRLM_KEEP_STREAMS") {
        let name = format!("{}-{guest:?}-{way:?}.stream", carried.machine);
        fs::write(Path::new(&keep).join(name), &carried.stream).expect("keep the stream");
    }
}

/// A cheap fingerprint of each event; cuts inside of verbatim bytes do not show.
fn fingerprints(stream: &[u8], mut piece: impl FnMut() -> usize) -> Vec<(u8, u64)> {
    let (mut parser, mut seen, mut held) = (Parser::new(), Vec::<(u8, u64)>::new(), Vec::new());
    let mut rest = stream;
    while !rest.is_empty() {
        let (next, after) = rest.split_at(piece().clamp(1, rest.len()));
        held.extend_from_slice(next);
        rest = after;
        let used = parser.parse::<StreamError>(&held, &mut |event| {
            let at = |a: PageAddr| u64::from(a.block.0) << 32 | u64::from(a.page);
            let next = match event {
                Event::Verbatim(bytes) => match seen.last_mut() {
                    Some((0, n)) => {
                        *n += bytes.len() as u64;
                        return Ok(());
                    }
                    _ => (0, bytes.len() as u64),
                },
                Event::Blocks(list) => (1, u64::from(list.pages())),
                Event::Page { addr, bytes } => {
                    let sum = bytes.chunks_exact(8).fold(0u64, |s, w| {
                        s.rotate_left(5) ^ u64::from_le_bytes(w.try_into().expect("eight bytes"))
                    });
                    (2, at(addr) ^ sum)
                }
                Event::Zero { addr } => (3, at(addr)),
                Event::SectionEnd => (4, 0),
                Event::Stopped => (5, 0),
                Event::RamEnd => (6, 0),
            };
            seen.push(next);
            Ok(())
        });
        held.drain(..used.expect("a good stream"));
    }
    parser.finish().expect("a whole stream");
    seen
}

fn any_cut_is_the_same(stream: &[u8]) {
    let whole = fingerprints(stream, || usize::MAX);
    let mut x = 1u32;
    let ragged = fingerprints(stream, || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 18) as usize
    });
    assert!(whole == ragged, "cuts change the events");
    // Byte by byte, only the last part: what comes before costs much and says little more.
    let mut first = Some(stream.len().saturating_sub(200_000));
    assert!(whole == fingerprints(stream, || first.take().unwrap_or(1)), "single bytes change the events");
}

#[test]
fn firmware_guests_arrive_identical_straight() {
    for machine in machines() {
        move_one(&machine, Guest::Firmware, Way::Straight);
    }
}

#[test]
fn writing_guests_arrive_identical_straight() {
    for machine in machines() {
        move_one(&machine, Guest::Writer, Way::Straight);
    }
}

#[test]
fn writing_guests_arrive_identical_held_back_and_shuffled() {
    for machine in machines() {
        move_one(&machine, Guest::Writer, Way::HeldBack);
    }
}

/// Capabilities whose streams are refused: the source must run on when the connection is dropped.
#[test]
fn refused_streams_leave_the_source_running() {
    let Some(program) = qemu(false) else { return };
    for capability in ["x-ignore-shared", "multifd", "xbzrle", "compress"] {
        // A guest that gets no processor writes nothing: then no page comes a second time, and QEMU waits for its target.
        let met = (0..TRIES).find_map(|_| refusal(&program, capability));
        let Some(met) = met else { panic!("{capability}: in {TRIES} moves nothing came that is refused") };
        let Some((mut source, refused)) = met else { continue };
        let fits = match (capability, &refused) {
            ("x-ignore-shared", Some(StreamError::Capability { name, .. })) => name == capability,
            ("multifd", Some(StreamError::Multifd | StreamError::RamFeature { name: "multifd", .. })) => true,
            ("xbzrle" | "compress", Some(StreamError::RamFeature { name, .. })) => *name == capability,
            _ => false,
        };
        assert!(fits, "{capability}: {refused:?}");
        assert_eq!(source.outcome(), "failed");
        until("the source to run on", || source.runs().then_some(()));
        eprintln!("{capability}: {}", refused.expect("refused"));
    }
}

/// Moves that are begun until one brings what is refused.
const TRIES: u32 = 5;
/// How long QEMU may say nothing before it is taken to have said all.
const SILENCE: Duration = Duration::from_secs(10);

/// One move with this capability, up to what is refused. Outer none: nothing came that is. Inner none: this QEMU does not have
/// the capability.
fn refusal(program: &Path, capability: &str) -> Option<Option<(Qemu, Option<StreamError>)>> {
    let dir = tempfile::tempdir().expect("a directory");
    let agent = dir.path().join("agent");
    let listener = UnixListener::bind(&agent).expect("listen");
    let mut source = Qemu::start(program, dir.path(), "source", "q35", Guest::Writer, &[]);
    fill(&source.memory());
    source.capability("return-path").expect("return-path");
    if let Err(e) = source.capability(capability) {
        eprintln!("skipped: this QEMU has no capability {capability}: {e}");
        return Some(None);
    }
    // So slow that the writing guest cannot be stopped in time: pages are sent again and again.
    source.command("migrate-set-parameters", &json!({ "downtime-limit": 1, "max-bandwidth": 8 << 20 }));
    source.migrate(&agent);
    let mut connections = vec![accept(&listener)];
    if capability == "multifd" {
        connections.push(accept(&listener));
    }
    let mut refused = None;
    for c in connections.into_iter().rev() {
        c.set_read_timeout(Some(SILENCE)).expect("set a time limit");
        match carry(c, None, Way::Straight) {
            Err(Failure::Stream(e)) => {
                refused = Some(e);
                break;
            }
            Err(Failure::Io(e)) if e.kind() == ErrorKind::WouldBlock => return None,
            Err(Failure::Io(e)) => panic!("{capability}: {e}"),
            Ok(_) => {}
        }
    }
    Some(Some((source, refused)))
}
