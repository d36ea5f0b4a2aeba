//! The program's roles, and its front door: the only place that reads the command line and the environment, chooses
//! exit codes and writes to standard output.

mod agent;
mod bpf;
mod caller;
mod cancel;
mod cert;
mod common;
mod evacuate;
mod history;
mod index;
mod policy;
mod settle;
mod show;
mod show_sampling;
mod status;
mod tables;
mod vmm;

use crate::obs::say::{self, errln};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

const ABOUT: &str =
    "Moves a rack of running QEMU guests at once, each distinct page crossing the core link once.";

const LONG_ABOUT: &str = "\
Moves a rack of running QEMU guests at once, each distinct page crossing the core link once.

  0. Hosts, index and operators have certificates: irlm cert --help
  1. Every host runs an agent:             irlm agent --config agent.toml
  2. The source rack runs an index:        irlm index --listen 10.1.0.1:7710 --tls DIR
  3. On the target hosts, QEMUs of the same machines wait with  -S -incoming defer
  4. From anywhere that reaches agents and index: irlm evacuate group.toml

docs/examples/agent.toml and group.toml explain every key. At any moment before a VM's
handover, ^C, `irlm cancel` or the death of anything ends with the VM running on at its source.";

const AFTER: &str = "\
EXIT CODES
  0  done (evacuate: every VM is at its target)
  1  the command line or a configuration file is wrong, or something outside of the group failed
  2  some VM stayed at its source, or some agent did not do as told
  3  some VM is in doubt: its agents keep trying (see `irlm settle --help`); or it was not watched to its end,
     or its old copy runs beside the one that moved
  4  nothing was started: every VM is where it was
  5  some VM is lost: its QEMU has ended, and no copy of it runs

ENVIRONMENT
  IRLM_TLS  as --tls, but not for an agent
  IRLM_LOG  what to log to standard error, e.g. info, debug, irlm_user::flow=debug,warn";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "irlm", version, about = ABOUT, long_about = LONG_ABOUT, after_help = AFTER)]
struct Cli {
    /// Directory with certificates (`irlm cert`): to call agents and index with, or for the index or an agent to serve with
    #[arg(long, global = true, value_name = "DIR")]
    tls: Option<std::path::PathBuf>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Run this host's daemon (both the source's and the target's)
    Agent(agent::AgentArgs),
    /// Serve the rack index: which source host has which content
    Index(index::IndexArgs),
    /// Move a group of VMs: prepare, start, watch, report
    Evacuate(evacuate::EvacuateArgs),
    /// Show what agents are doing; --follow watches a group that someone else started
    Status(status::StatusArgs),
    /// Stop a group: every VM that has not been given up yet runs on at its source
    Cancel(cancel::GroupArgs),
    /// Show what became of VMs, also of groups that agents have forgotten
    History(history::HistoryArgs),
    /// Drop a finished group from its agents now; they forget it by themselves a minute later
    Forget(cancel::GroupArgs),
    /// Decide by hand about a VM that is in doubt
    Settle(settle::SettleArgs),
    /// Look at what the eBPF programs of this host's agents do and count
    Bpf(bpf::BpfArgs),
    /// Show or change what migration may use of the hosts' core-facing ports
    Policy(policy::PolicyArgs),
    /// Make a small CA, issue certificates, look at certificates
    Cert(cert::CertArgs),
    /// Run one VM on KVM, in a process of its own
    Vmm(vmm::VmmArgs),
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors; where they cannot be printed nobody reads them.
            let _ = e.print();
            return ExitCode::from(u8::from(e.use_stderr()));
        }
    };
    let code = run(cli).unwrap_or_else(|e| {
        errln!("irlm: {}", one_line(&e));
        1
    });
    // What was done is done, whoever could be told of it: the exit code says that.
    if let Some(e) = say::unsaid() {
        errln!("irlm: standard output could not be written, and something is missing there: {e}");
    }
    ExitCode::from(code)
}

/// The whole chain on one line: what was tried, and why it failed. A cause that its effect has already quoted is
/// not said twice.
fn one_line(e: &anyhow::Error) -> String {
    let mut out = String::new();
    for cause in e.chain().map(ToString::to_string) {
        if out.is_empty() {
            out = cause;
        } else if !out.contains(&cause) {
            out.push_str(": ");
            out.push_str(&cause);
        }
    }
    out.replace('\n', " ")
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    // Daemons tell what they do; commands show it themselves.
    let level =
        if matches!(cli.role, Role::Index(_) | Role::Agent(_) | Role::Vmm(_)) { "info" } else { "warn" };
    let filter = std::env::var("IRLM_LOG").unwrap_or_else(|_| level.to_owned());
    crate::obs::log::start(&filter)?;
    let daemon = matches!(cli.role, Role::Agent(_) | Role::Index(_) | Role::Vmm(_));
    let named = cli.tls.clone().or_else(|| std::env::var_os("IRLM_TLS").map(Into::into));
    if let Some(dir) = named.as_deref().filter(|_| !daemon) {
        caller::is_in(dir)?;
    }
    match cli.role {
        // Its file says how it serves; the environment is for whoever calls.
        Role::Agent(a) => agent::run(a, cli.tls.as_deref()),
        Role::Index(a) => index::run(&a, named.as_deref()),
        Role::Evacuate(a) => evacuate::run(&a),
        Role::Status(a) => status::run(&a),
        Role::Cancel(a) => cancel::cancel(&a),
        Role::History(a) => history::run(&a),
        Role::Forget(a) => cancel::forget(&a),
        Role::Settle(a) => settle::run(&a),
        Role::Bpf(a) => bpf::run(&a),
        Role::Policy(a) => policy::run(&a),
        Role::Cert(a) => cert::run(&a),
        Role::Vmm(a) => vmm::run(&a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let e = anyhow::anyhow!("disk full").context("cannot write x: disk full").context("report");
        assert_eq!(one_line(&e), "report: cannot write x: disk full");
    }

    #[test]
    fn the_command_line_is_well_formed_and_wrong_ones_are_usage_errors() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
        for good in [
            "irlm evacuate g.toml --method qemu-multifd-zstd --leave-paused --json - --dry-run",
            "irlm status --agent 127.0.0.1:7700 --agent [::1]:7700 --json",
            "irlm status g.toml --follow",
            "irlm cancel g.toml",
            "irlm cancel --agent 127.0.0.1:7700 --name rack-7",
            "irlm settle g.toml web1 --run-at target",
            "irlm history g.toml --json",
            "irlm history --agent 127.0.0.1:7700 --name rack-7",
            "irlm bpf show",
            "irlm bpf show --name s0 --every 2 --json",
            "irlm policy set p.toml --agent 127.0.0.1:7700",
            "irlm policy show g.toml --json",
            "irlm cert init ca --name rack-7 --days 3650",
            "irlm cert issue ca --out s1 --host s1 --ip 10.1.0.11 --ip fd00::1 --role agent --role index",
            "irlm cert issue ca --out robot --name robot --role coordinator --tenant shop --days 30 --force",
            "irlm cert show s1 --ca ca/ca-cert.pem --json",
            "irlm vmm --control v.sock --payload p --memory 64M --slot 16M --vcpus 2 --dirty ring=1024 --paused",
            "irlm vmm --control v.sock --kernel k --initrd i --pages 2M --serial none",
            "irlm vmm --control v.sock --incoming",
        ] {
            parse(good).unwrap();
        }
        for bad in [
            "irlm",
            "irlm evacuate",
            "irlm evacuate g.toml --method magic",
            "irlm status g.toml --agent 127.0.0.1:1",
            "irlm status --agent 127.0.0.1:1 --follow",
            "irlm cancel --agent 127.0.0.1:1 --name ../x",
            "irlm settle g.toml web1",
            "irlm history g.toml --name x",
            "irlm bpf",
            "irlm bpf show --all --name s0",
            "irlm bpf show --every 0",
            "irlm policy",
            "irlm policy set g.toml p.toml extra",
            "irlm cert",
            "irlm cert issue ca --host s1",
            "irlm cert issue ca --out s1 --host s1 --role root",
            "irlm cert issue ca --out s1 --host s1 --ip here",
            "irlm cert init ca --days 0",
            "irlm vmm --payload p",
            "irlm vmm --control v.sock --payload p --incoming",
            "irlm vmm --control v.sock --payload p --memory many",
            "irlm vmm --control v.sock --payload p --dirty sometimes",
            "irlm vmm --control v.sock --initrd i --incoming",
        ] {
            assert!(parse(bad).is_err_and(|e| e.use_stderr()), "{bad}");
        }
        assert!(parse("irlm --help").is_err_and(|e| !e.use_stderr()));
    }
}
