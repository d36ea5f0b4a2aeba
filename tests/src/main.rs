//! `irlm-lab`: makes a rack of real guests on this machine and moves it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

// The tests on real guests.
mod cases;
// `irlm-lab bench`.
mod cmd_bench;
// `irlm-lab bench codecs`.
mod cmd_codecs;
// `irlm-lab evidence`.
mod evidence;
// `irlm-lab run`.
mod cmd_run;
// `irlm-lab test`.
mod cmd_test;
// Options that commands share.
mod opts;
// `irlm-lab selftest`.
mod selftest;

#[derive(Parser)]
#[command(name = "irlm-lab", about = "The rack lab: real QEMU guests in network namespaces", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Move the rack once by every method, and say what each cost
    Run(cmd_run::Args),
    /// Measure what IRLM costs
    Bench(cmd_bench::Args),
    /// Measure the points that an issue must show, and say of each whether it is shown
    Evidence(evidence::Args),
    /// Run the tests on real guests
    Test(cmd_test::Args),
    /// Move random groups while random things fail, and look whether anything was lost, doubled or untrue
    Campaign(irlm_tests::campaign::Args),
    /// Prove the lab itself with plain QEMU: bytes on the core link, memory identical, services answer
    Selftest(selftest::Args),
    /// Remove what a crashed lab left behind
    Sweep,
    /// The lab's round trip, from inside it
    #[command(hide = true)]
    Echo {
        /// Answer on this address
        #[arg(long)]
        serve: bool,
        ip: String,
    },
    /// Make an empty lab and hold it until this process is ended (a test kills it)
    #[command(hide = true)]
    Hold,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Cmd::Run(a) => cmd_run::run(&a),
        Cmd::Bench(a) => cmd_bench::run(&a),
        Cmd::Evidence(a) => evidence::run(&a),
        Cmd::Test(a) => cmd_test::run(&a),
        Cmd::Campaign(a) => irlm_tests::campaign::run(&a),
        Cmd::Hold => hold(),
        Cmd::Echo { serve: true, ip } => irlm_tests::echo::serve(&ip),
        Cmd::Echo { ip, .. } => irlm_tests::echo::ask(&ip, 300),
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

/// An empty lab of one host and one pair of others, with processes in it, held until we are killed.
fn hold() -> anyhow::Result<()> {
    use irlm_tests::{janitor::Run, net};
    let run = Run::start()?;
    let rates = net::Rates::default();
    let spec = net::NetSpec { hosts: 1, others: 1, rates, host_qdisc: false, congestion: None, tls: false };
    let net = net::Net::create(run.id(), spec)?;
    let _held = net.command(net::Host::Source(0), "sleep".as_ref()).arg("600").spawn()?;
    let _other = net.command(net::Host::OtherSource(0), "sleep".as_ref()).arg("600").spawn()?;
    println!("holding");
    std::thread::sleep(std::time::Duration::from_secs(600));
    Ok(())
}
