//! `irlm-lab`: makes a rack of real guests on this machine and moves it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod selftest;

#[derive(Parser)]
#[command(name = "irlm-lab", about = "The rack lab: real QEMU guests in network namespaces", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Prove the lab itself with plain QEMU: bytes on the core link, memory identical, services answer
    Selftest(selftest::Args),
    /// Remove what a crashed lab left behind
    Sweep,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Cmd::Selftest(a) => selftest::run(&a),
        Cmd::Sweep => irlm_tests::janitor::sweep(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("irlm-lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}
