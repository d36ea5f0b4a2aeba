//! The one door to every developer task, so that a stranger with a clean clone needs to know `cargo xtask` only.
//! One file a task; `setup.rs` installs what a task needs and says why.

use clap::{Parser, Subcommand};
use ctx::Ctx;
use std::process::ExitCode;

// Debian packages unpacked into the cache, without touching the system.
mod apt;
// How large a function and a struct may be.
mod bounds;
// House rule: no files that use each other in a circle.
mod circles;
// House rules for other people's crates.
mod crates;
// Where things are, and how programs are run.
mod ctx;
// The door to the eBPF object's build.
mod ebpf;
// The guest's kernel, initramfs and root file system.
mod guest;
// The points of `evidence house`.
mod house;
// Breaking on purpose what was mended.
mod mutate;
// Points of `evidence ownership`.
mod ownership;
// A point that an issue must show.
mod point;
// House rules for pages.
mod prose;
// Source text without comments and literals.
mod rust_text;
// The point of `evidence security` that needs no lab.
mod security;
// What the tasks need from the machine: the table, its checks and installers.
mod setup;
// `cargo xtask bench`.
mod task_bench;
// The eBPF toolchain and build.
mod task_ebpf;
// `cargo xtask evidence`.
mod task_evidence;
// `cargo xtask fuzz`.
mod task_fuzz;
// `cargo xtask lab`.
mod task_lab;
// `cargo xtask mutate`.
mod task_mutate;
// `cargo xtask run`.
mod task_run;
// `cargo xtask test`.
mod task_test;
// `cargo xtask tidy`.
mod task_tidy;
// The fingerprint that ties docs/wire.md to the code.
mod wire_doc;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Every developer task of IRLM", version)]
struct Cli {
    /// Only report what is missing on this machine; install and download nothing
    #[arg(long, global = true)]
    no_install: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Evacuate a rack of real guests in the lab and show what it cost; with arguments: build and run `irlm ARGS`
    Run(task_run::Args),
    /// Everything: format, lints, docs, tidy, unit and property tests, kept fuzz inputs, the lab's tests
    Test(task_test::Args),
    /// Check the house rules that the compiler does not (floors, openings, unsafe, lengths, wire fingerprint)
    Tidy(task_tidy::Args),
    /// Measure the points that an issue must show, afresh
    Evidence(task_evidence::Args),
    /// Break on purpose what was mended, a patch of `tests/mutations` at a time, and see that a test turns red
    Mutate(task_mutate::Args),
    /// Look for inputs that break a parser or what decides, guided by what they reach in the code
    Fuzz(task_fuzz::Args),
    /// Run one benchmark
    Bench(task_bench::Args),
    /// Build the eBPF object
    Ebpf,
    /// Install and build what the other tasks need, or only report it (--no-install)
    Setup,
    /// Build the lab and run `irlm-lab ARGS` as root
    Lab(task_lab::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = Ctx::new(!cli.no_install).and_then(|ctx| match cli.task {
        Task::Run(a) => task_run::run(&ctx, &a),
        Task::Test(a) => task_test::run(&ctx, &a),
        Task::Tidy(a) => task_tidy::run(&ctx, &a),
        Task::Evidence(a) => task_evidence::run(&ctx, &a),
        Task::Mutate(a) => task_mutate::run(&ctx, &a),
        Task::Fuzz(a) => task_fuzz::run(&ctx, &a),
        Task::Bench(a) => task_bench::run(&ctx, &a),
        Task::Ebpf => ebpf::object(&ctx).map(|_| ()),
        Task::Setup => setup::run(&ctx),
        Task::Lab(a) => task_lab::run(&ctx, &a),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
