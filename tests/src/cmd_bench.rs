//! `irlm-lab bench`: what IRLM costs where it saves nothing, and what it costs everybody else.

use anyhow::{Context as _, Result};
use clap::Subcommand;
use irlm_tests::bpf_cost;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{Irlm, Method, beside};
use irlm_tests::lab::{Guests, Lab, LabSpec};
use irlm_tests::net::Rates;
use irlm_tests::plain;
use irlm_tests::profile::Profile;
use irlm_tests::qemu::{Guest, Role};
use irlm_tests::sampling::{self, Cost, Mode};
use irlm_tests::speeds::{self, SPEEDS, Speed};
use irlm_tests::squeezed::Streams;
use irlm_user::core::account::{Account, Marker};
use irlm_user::core::digest::{Algorithm, Hasher};
use irlm_user::core::seal::Sealer;
use irlm_user::core::units::{BlockIx, PageAddr};
use irlm_user::core::wire::frame::{Header, Kind};
use irlm_user::host::dirty::Tracer;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Which,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long, global = true)]
    irlm: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Which {
    /// Nanoseconds that the classifier costs a packet, by the way it takes through the programs
    Bpf {
        /// Measurements of each way; the median counts
        #[arg(long, default_value_t = 9)]
        times: usize,
        /// Runs in one measurement
        #[arg(long, default_value_t = 1_000_000)]
        repeat: u32,
    },
    /// One 512 MiB guest of content that cannot be shared, on an unshaped link: IRLM's rate beside plain QEMU's
    Proxy {
        /// Measurements of each; the median counts
        #[arg(long, default_value_t = 3)]
        times: usize,
    },
    /// Bytes on the core link, group time and processor time of every method at several link speeds, same guests for all
    Bytes {
        /// Source hosts
        #[arg(long, default_value_t = 2)]
        hosts: usize,
        /// Guests a host
        #[arg(long, default_value_t = 2)]
        guests: usize,
        /// Moves by each method at each speed; the median counts
        #[arg(long, default_value_t = 1)]
        times: usize,
        /// Only this speed: 100-mbit, 1-gbit or unshaped
        #[arg(long)]
        speed: Option<String>,
        /// Only these methods
        #[arg(long, value_enum, num_args = 1..)]
        method: Vec<Method>,
        /// Pages a second that each guest writes meanwhile, all over 8 MiB
        #[arg(long, default_value_t = 0)]
        writers: u32,
        /// A further line of the group file, for all of them
        #[arg(long, default_value = "")]
        group: String,
    },
    /// Pages a second that are hashed one by one and side by side
    Digest {
        /// Measurements of each; the median counts
        #[arg(long, default_value_t = 9)]
        times: usize,
    },
    /// Bytes a second over loopback from thread to thread, in plain text and under TLS, and the processor time of both
    Tls {
        /// Measurements of each; the median counts
        #[arg(long, default_value_t = 5)]
        times: usize,
    },
    /// What compression leaves of what a move puts on the core link, by window and level, and how fast
    Squeeze {
        /// Source hosts
        #[arg(long, default_value_t = 2)]
        hosts: usize,
        /// Guests on each
        #[arg(long, default_value_t = 2)]
        guests: usize,
        /// Windows as powers of two; 0: each frame by itself
        #[arg(long, value_delimiter = ',', default_value = "0,20,23")]
        windows: Vec<u8>,
        /// Levels
        #[arg(long, value_delimiter = ',', allow_hyphen_values = true, default_value = "-1,1,3,6,9")]
        levels: Vec<i32>,
        /// Contents in a frame
        #[arg(long, value_delimiter = ',', default_value = "64")]
        frames: Vec<usize>,
        /// Shared contents in a row that get one carrier
        #[arg(long, default_value_t = 1)]
        run: usize,
    },
    /// Bytes and processor time of ways to compress what crosses the core link once, from the saved guests alone
    Codecs(crate::cmd_codecs::Args),
    /// What sampling of dirtied pages costs a guest that dirties memory as fast as it can
    Dirty {
        /// Measurements of each mode; the median counts
        #[arg(long, default_value_t = 3)]
        times: usize,
        /// Seconds a measurement
        #[arg(long, default_value_t = 4)]
        seconds: u64,
    },
}

/// Hashes 16 MiB, which no cache holds, as preparation (256 pages at a time) and a departing VM (64) do.
fn digest(times: usize) {
    let pages: Vec<[u8; 4096]> = (0..4096u32)
        .map(|n| std::array::from_fn(|i| (n.wrapping_mul(2_654_435_761) >> (i % 25)) as u8 ^ i as u8))
        .collect();
    for algorithm in [Algorithm::Blake3, Algorithm::Sha1] {
        let hasher = Hasher::new(algorithm, &[7; 32], "");
        for batch in [1, 4, 16, 64, 256] {
            let mut all: Vec<f64> = (0..times)
                .map(|_| {
                    let began = Instant::now();
                    for some in pages.chunks(batch) {
                        hasher.pages(some, |d| {
                            std::hint::black_box(d);
                        });
                    }
                    pages.len() as f64 / began.elapsed().as_secs_f64()
                })
                .collect();
            all.sort_by(f64::total_cmp);
            let median = all[all.len() / 2];
            println!(
                "digest: {algorithm:?}, {batch:3} pages at a time: {median:9.0} pages/s, {:5.2} GB/s",
                median * 4096.0 / 1e9
            );
        }
    }
}

/// What is added to each page that passes: its mark at both ends, and its part of a frame's seal.
fn verify(times: usize) {
    let pages: Vec<[u8; 4096]> = (0..4096u32)
        .map(|n| std::array::from_fn(|i| (n.wrapping_mul(2_654_435_761) >> (i % 25)) as u8 ^ i as u8))
        .collect();
    let at = |n: usize| PageAddr { block: BlockIx(0), page: n as u32 };
    let median = |work: &mut dyn FnMut()| {
        let mut all: Vec<f64> = (0..times)
            .map(|_| {
                let began = Instant::now();
                work();
                began.elapsed().as_secs_f64() / 4096.0 * 1e9
            })
            .collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let mut account = Account::new(Marker::new(&[7; 32]), [4096]);
    let mark = median(&mut || pages.iter().enumerate().for_each(|(n, p)| account.page(at(n), p)));
    let zero = median(&mut || account.uniform(at(0), 4096, 0));
    std::hint::black_box(account.tally());
    // As a page that was just read is.
    let hot = median(&mut || {
        for _ in 0..64 {
            pages[..64].iter().enumerate().for_each(|(n, p)| account.page(at(n), p));
        }
    });
    println!("account: {mark:4.0} ns a page from memory, {hot:4.0} from a cache; {zero:4.0} a zero page");
    let header = Header::new(Kind::Pages, 0, 64 * 4096).encode();
    for (what, parts) in [("as one piece", 64), ("page by page", 1)] {
        let mut sealer = Sealer::new([7; 32]);
        let seal = median(&mut || {
            for frame in pages.chunks(64) {
                let parts = frame.chunks(parts).map(<[[u8; 4096]]>::as_flattened);
                std::hint::black_box(sealer.seal(&header, &[], parts));
            }
        });
        println!("seal, 64 pages {what}: {seal:6.0} ns a page, {:5.2} GB/s", 4096.0 / seal);
    }
}

/// MiB of distinct pages that the guest holds; the rest is its system.
const FILL_MIB: u32 = 400;

pub(crate) fn run(a: &Args) -> Result<()> {
    match &a.which {
        Which::Squeeze { hosts, guests, windows, levels, frames, run } => {
            squeeze((*hosts, *guests), windows, levels, frames, *run)
        }
        Which::Codecs(a) => crate::cmd_codecs::run(a),
        Which::Digest { times } => {
            digest((*times).max(1));
            verify((*times).max(1));
            Ok(())
        }
        Which::Tls { times } => irlm_tests::tls_speed::run((*times).max(1)),
        Which::Bpf { times, repeat } => bpf((*times).max(1), *repeat),
        Which::Proxy { times } => {
            let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
            proxy(&irlm, (*times).max(1)).map(|_| ())
        }
        Which::Bytes { hosts, guests, times, speed, method, writers, group } => {
            let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
            let speeds: Vec<Speed> =
                SPEEDS.into_iter().filter(|s| speed.as_ref().is_none_or(|n| s.name == n)).collect();
            anyhow::ensure!(!speeds.is_empty(), "there is no such speed: 100-mbit, 1-gbit or unshaped");
            let methods: Vec<_> = Method::ALL
                .into_iter()
                .filter(|m| method.is_empty() || method.contains(m))
                .map(|m| (m, group.as_str()))
                .collect();
            let rack = ((*hosts).max(1), (*guests).max(1));
            let all =
                speeds::measure(&Cache::open()?, rack, &speeds, &methods, &irlm, (*times).max(1), *writers)?;
            println!("{}", speeds::table(&all));
            let out = Path::new("target/lab");
            speeds::json(&all, &out.join("bytes.json"))?;
            speeds::picture(&all, &out.join("bytes.svg"))?;
            println!("written: {} and {}", out.join("bytes.json").display(), out.join("bytes.svg").display());
            Ok(())
        }
        Which::Dirty { times, seconds } => {
            let tracer =
                sampling::tracer().map_err(|why| anyhow::anyhow!("cannot be measured here: {why}"))?;
            dirty(&Cache::open()?, &tracer, (*times).max(1), (*seconds).max(1)).map(|_| ())
        }
    }
}

fn squeeze(
    (hosts, guests): (usize, usize),
    windows: &[u8],
    levels: &[i32],
    frames: &[usize],
    run: usize,
) -> Result<()> {
    anyhow::ensure!(hosts > 0 && guests > 0, "at least one host with one guest");
    anyhow::ensure!(run > 0 && !frames.contains(&0), "at least one content in a run and in a frame");
    let one_carrier = run;
    let cache = Cache::open()?;
    let spec = LabSpec::new(&cache, hosts, guests, 256);
    let run = irlm_tests::janitor::Run::start()?;
    let all: Vec<Guest> = spec.hosts.concat();
    let states = irlm_tests::states::ensure(&cache, run.dir(), &all, &|line| eprintln!("{line}"))?;
    let by_host: Vec<_> = states.chunks(guests).map(<[_]>::to_vec).collect();
    let streams = Streams::load(&by_host, one_carrier)?;
    println!(
        "{hosts} hosts with {guests} guests: {} pages with content, {} cross the core link ({:.3})",
        streams.content,
        streams.pages(),
        streams.pages() as f64 / streams.content as f64
    );
    let mut table = comfy_table::Table::new();
    table.set_header([
        "window",
        "level",
        "frame",
        "leaves",
        "pushed leave",
        "of OC",
        "MB/s",
        "unpacks MB/s",
        "memory KiB, sender, receiver",
    ]);
    let levels = || levels.iter().flat_map(|&l| frames.iter().map(move |&f| (l, f)));
    for &window in windows {
        for (level, frame) in levels() {
            let s = streams.squeeze(window, level, frame)?;
            let of_oc = s.leaves * streams.pages() as f64 / streams.content as f64;
            table.add_row([
                if window == 0 {
                    "-".to_owned()
                } else {
                    format!("{} MiB", (1u64 << window) as f64 / 1048576.0)
                },
                level.to_string(),
                frame.to_string(),
                format!("{:.3}", s.leaves),
                format!("{:.3}", s.leaves_pushed),
                format!("{of_oc:.4}"),
                format!("{:.0}", s.packs),
                format!("{:.0}", s.unpacks),
                format!("{}, {}", s.memory[0] >> 10, s.memory[1] >> 10),
            ]);
        }
    }
    println!("{table}");
    Ok(())
}

/// Measures and prints; gives the median of each mode, and what guest it was measured with.
pub(crate) fn dirty(
    cache: &Cache,
    tracer: &Tracer,
    times: usize,
    seconds: u64,
) -> Result<(Vec<(Mode, Cost)>, String)> {
    // Held while it is measured: the kernel clocks its programs only if somebody asks.
    let _clock = irlm_user::host::dirty::clock_programs()?;
    let (guest, word) = sampling::fastest(&cache.qemu("10.0"))?;
    eprintln!("dirty: {word}");
    let mut costs = vec![Vec::new(); Mode::ALL.len()];
    for _ in 0..times {
        // Modes in turn, so that what else the machine does falls on all alike.
        for (n, mode) in Mode::ALL.into_iter().enumerate() {
            costs[n].push(sampling::cost(&guest, tracer, mode, Duration::from_secs(seconds))?);
        }
    }
    let mut out: Vec<(Mode, Cost)> = Vec::new();
    for (mode, all) in Mode::ALL.into_iter().zip(costs) {
        let median = |of: fn(&Cost) -> f64| {
            let mut values: Vec<f64> = all.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let cost = Cost {
            rate: median(|c| c.rate),
            nanos: median(|c| c.nanos),
            lost: all.iter().map(|c| c.lost).sum(),
        };
        let off = out.first().map_or(cost.rate, |(_, c)| c.rate);
        eprintln!(
            "dirty: {:28} {:8.0} pages/s, {:6.3} of off, {:5.0} ns a dirtying in the program, {} lost",
            mode.name(),
            cost.rate,
            cost.rate / off,
            cost.nanos,
            cost.lost
        );
        out.push((mode, cost));
    }
    eprintln!("dirty: by {}, median of {times}, {seconds} s each", tracer.best(true).name());
    Ok((out, word))
}

/// Prints what a packet costs; fails if any way costs more than it may.
fn bpf(times: usize, repeat: u32) -> Result<()> {
    let costs = bpf_cost::measure(times, repeat)?;
    let mut table = comfy_table::Table::new();
    table.set_header(["packet", "ns", "best", "without harness", "allowed"]);
    for c in &costs.ways {
        let net = c.ns.saturating_sub(costs.nothing_ns);
        table.add_row([
            c.what.to_owned(),
            c.ns.to_string(),
            c.best_ns.to_string(),
            net.to_string(),
            c.allowed_ns.to_string(),
        ]);
    }
    println!("{table}");
    println!(
        "harness alone (a program that does nothing): {} ns; median of {times} x {repeat} runs",
        costs.nothing_ns
    );
    let dear: Vec<_> = costs.ways.iter().filter(|c| c.ns > c.allowed_ns).map(|c| c.what).collect();
    anyhow::ensure!(dear.is_empty(), "costs more than it may: {}", dear.join(", "));
    Ok(())
}

/// Measures and prints; gives IRLM's rate as a share of plain QEMU's.
pub(crate) fn proxy(program: &Path, times: usize) -> Result<f64> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 1, 1, 512);
    spec.hosts = vec![vec![Guest { role: Role::Idle, seed: 0, mem_mib: 512 }]];
    spec.rates = Rates::NONE;
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    let mut rates = [const { Vec::new() }; 2];
    for n in 0..times {
        for (kind, all) in rates.iter_mut().enumerate() {
            let mut guests = filled(&lab)?;
            let content = guests.census()?.content as f64 * 4096e-6;
            let (ms, profile) =
                if kind == 0 { plain(&lab, &mut guests)? } else { through(&lab, &mut guests, program)? };
            let rate = content / ms * 1e3;
            eprintln!(
                "{}: {content:.0} MB of content in {ms:.0} ms: {rate:.0} MB/s",
                ["plain QEMU", "irlm"][kind]
            );
            if n + 1 == times {
                for (thread, seconds) in profile.seconds().iter().take(12) {
                    eprintln!("    {seconds:6.2} s of processor time in {thread}");
                }
            }
            for p in &mut guests.pairs {
                lab.compare(p)?;
            }
            all.push(rate);
        }
    }
    let [plain, irlm] = rates.map(|mut r| {
        r.sort_by(f64::total_cmp);
        r[r.len() / 2]
    });
    eprintln!(
        "proxy: irlm moves at {:.2} of plain QEMU's rate ({irlm:.0} of {plain:.0} MB/s, median of {times})",
        irlm / plain
    );
    Ok(irlm / plain)
}

/// A guest whose memory is mostly pages of its own.
fn filled(lab: &Lab) -> Result<Guests> {
    let guests = lab.start_guests()?;
    let p = guests.pairs.first().context("no guest")?;
    let mut service = p.source.service()?;
    service.ask(&format!("fill {FILL_MIB}"), Duration::from_secs(20))?;
    let until = Instant::now() + Duration::from_secs(240);
    while service.ask("filled", Duration::from_secs(20))? != FILL_MIB.to_string() {
        anyhow::ensure!(Instant::now() < until, "the guest does not get its memory filled");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(guests)
}

fn plain(lab: &Lab, guests: &mut Guests) -> Result<(f64, Profile)> {
    let pids: Vec<(&str, u32)> = guests
        .pairs
        .iter()
        .flat_map(|p| [("source QEMU", p.source.pid()), ("target QEMU", p.target.pid())])
        .collect();
    let done = AtomicBool::new(false);
    // QEMU's migration threads end with the migration, so they must be looked at while it runs.
    let (moved, profile) = std::thread::scope(|s| {
        let looking = s.spawn(|| {
            let mut profile = Profile::default();
            let mut first = true;
            while !done.load(Ordering::Relaxed) {
                pids.iter().for_each(|(label, pid)| profile.look(label, *pid, first));
                first = false;
                std::thread::sleep(Duration::from_millis(50));
            }
            profile
        });
        let moved = plain::migrate(lab, guests, false, Duration::from_secs(300));
        done.store(true, Ordering::Relaxed);
        (moved, looking.join().unwrap_or_default())
    });
    let (moved, _) = moved?;
    Ok((moved.first().context("nothing moved")?.total_ms as f64, profile))
}

/// By `gm`: the same proxy in the path as with `irlm`, but no preparation, so that only the path is measured.
fn through(lab: &Lab, guests: &mut Guests, program: &Path) -> Result<(f64, Profile)> {
    let mut irlm = Irlm::start(lab, program, guests, "")?;
    let json = lab.top().join("bench.json");
    let mut profile = Profile::default();
    look(&mut profile, guests, &irlm, true);
    let mut evacuate = irlm.evacuate(Method::Gm, &json, true)?;
    let code = loop {
        if let Some(code) = evacuate.ended()? {
            break code;
        }
        look(&mut profile, guests, &irlm, false);
        std::thread::sleep(Duration::from_millis(50));
    };
    look(&mut profile, guests, &irlm, false);
    anyhow::ensure!(code == 0, "irlm evacuate ended with {code}: {}\n{}", evacuate.said(), irlm.logs());
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    irlm.agents.clear();
    Ok((report["vms"][0]["total_ms"].as_f64().context("the report has no total_ms")?, profile))
}

fn look(profile: &mut Profile, guests: &Guests, irlm: &Irlm<'_>, first: bool) {
    for p in &guests.pairs {
        profile.look("source QEMU", p.source.pid(), first);
        profile.look("target QEMU", p.target.pid(), first);
    }
    for (host, agent) in &irlm.agents {
        profile.look(&format!("agent {}", host.name()), agent.pid(), first);
    }
}
