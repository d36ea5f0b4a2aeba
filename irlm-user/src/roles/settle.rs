//! `irlm settle`: an operator's decision about a VM in doubt. Both sides are asked first, and nothing is
//! changed unless the one that is to run has a copy that may. The side that must not run is told first, and
//! only when it is seen not to (or the operator vouches for it) may the other one run: never two copies, and
//! always one that can.

use super::caller;
use super::common::runtime;
use crate::control::api::{Code, Decision, HistoryRow, LEFT_AGAIN, Phase, Reply, Request, Role, VmStatus};
use crate::control::client::{AgentClient, CallError};
use crate::control::config::GroupConfig;
use crate::obs::say::outln;
use anyhow::Context as _;
use clap::{Args, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Longest wait for one answer: an agent waits for what the decision comes to.
const PATIENCE: Duration = Duration::from_secs(20);
/// And for what an agent knows of the VM beforehand, a question at a time.
const ASK: Duration = Duration::from_secs(3);

/// Exit code: the agents keep trying.
const NOT_YET: u8 = 3;
/// Exit code: nothing was decided.
const REFUSED: u8 = 4;
/// Exit code: an agent did not answer.
const SILENT: u8 = 2;

/// Arguments of `irlm settle`.
#[derive(Debug, Args)]
#[command(after_help = "\
A VM is in doubt when its two agents lost each other between the words of its handover: both copies are paused, and \
the agents settle it themselves as soon as they can talk. Settle it by hand only if they will not talk again soon. A copy \
that is not in doubt is not decided about.\n\n\
Both sides are asked first; nothing is changed unless the side that is to run has a copy that may run. The \
side that is not to run is told first and must agree. If its agent does not answer, make sure yourself that \
its copy cannot run (host powered off, QEMU killed), and say so with --other-side-is-dead. An agent that \
answers is believed all the same: if it has the VM, or a copy that may be it, that word is refused.\n\n\
A VM that has moved and was lost by its target stays away until somebody continues its old copy by hand, on its own \
monitor, knowing that its disks may have changed since; --run-at source then says that this copy is the VM.\n\n\
Exit codes: 0 settled, and seen to be so; 1 usage; 2 an agent did not answer, or refused after the other one \
had agreed (nothing runs that did not run before; run it again); 3 decided, and not carried out yet: the \
agents keep trying; 4 refused, nothing was changed: the copy is not in doubt, or the other side's may be the \
VM.")]
pub(super) struct SettleArgs {
    /// The group file
    group: PathBuf,
    /// The VM's name
    vm: String,
    /// Where it is to run
    #[arg(long, value_enum)]
    run_at: Side,
    /// The other side's agent does not answer, and you have made sure that its copy cannot run
    #[arg(long)]
    other_side_is_dead: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Side {
    /// At its source host; the target's copy is thrown away
    Source,
    /// At its target host; the source's copy is given up
    Target,
}

pub(super) fn run(args: &SettleArgs) -> anyhow::Result<u8> {
    let config = GroupConfig::load(&args.group)?;
    let vm = config
        .vm
        .iter()
        .find(|v| v.name == args.vm)
        .with_context(|| format!("{}: no [[vm]] is named {:?}", args.group.display(), args.vm))?;
    let source = config.source.iter().find(|h| h.name == vm.source).map(|h| (&h.name, h.agent));
    let target = config.target.iter().find(|h| h.name == vm.target).map(|h| (&h.name, h.agent));
    let (Some(source), Some(target)) = (source, target) else {
        anyhow::bail!("{}: the hosts of {:?} are not in it", args.group.display(), args.vm)
    };
    let (stops, runs, decision) = match args.run_at {
        Side::Target => (source, target, Decision::Run),
        Side::Source => (target, source, Decision::Resume),
    };
    let word = |decision| Request::Settle { group: config.name.clone(), vm: vm.name.clone(), decision };
    runtime()?.block_on(async {
        let other = args.run_at.other();
        let (stops_says, runs_says) = tokio::join!(
            ask(stops.1, &config.name, &vm.name, other.role()),
            ask(runs.1, &config.name, &vm.name, args.run_at.role()),
        );
        let to_stop = Asked { host: stops.0, says: &stops_says };
        let to_run = Asked { host: runs.0, says: &runs_says };
        let tell = match weigh(args.run_at, args.other_side_is_dead, to_stop, to_run) {
            Ok(tell) => tell,
            Err((code, why)) => {
                for a in [to_stop, to_run] {
                    outln!("  host {}: {}", a.host, a.says.line());
                }
                outln!("! {why}; nothing was changed");
                return Ok(code);
            }
        };
        if tell {
            let code = say(stops.0, stops.1, &word(Decision::Discard)).await;
            match code {
                0 => {}
                NOT_YET => {
                    outln!("host {}: not told before that is so; run this again", runs.0);
                    return Ok(code);
                }
                _ => {
                    outln!("host {}: not told; nothing runs that did not run before", runs.0);
                    return Ok(code);
                }
            }
        } else if matches!(stops_says, Says::Silent(_)) {
            outln!("host {}: taken for dead on your word", stops.0);
        } else {
            outln!("host {}: {}", stops.0, stops_says.line());
        }
        let code = say(runs.0, runs.1, &word(decision)).await;
        Ok(after(tell, code))
    })
}

/// The exit code of the second word: once the other side has agreed, a refusal is not one that changed
/// nothing.
fn after(told: bool, code: u8) -> u8 {
    if told && code == REFUSED { SILENT } else { code }
}

impl Side {
    fn role(self) -> Role {
        match self {
            Self::Source => Role::Source,
            Self::Target => Role::Target,
        }
    }
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// What an agent says of its copy, before anything is decided.
#[derive(Debug)]
enum Says {
    /// It does not answer.
    Silent(String),
    /// It answers, but not this.
    Odd(String),
    /// It answers, and knows nothing of the VM.
    Nothing,
    /// It has a copy, or had one.
    Has {
        phase: Phase,
        /// What its process does, if that is known.
        state: String,
        why: Option<String>,
        /// An operator's word would be heard; not known of agents of an earlier version.
        doubt: Option<bool>,
    },
}

/// A host, and what its agent says.
#[derive(Clone, Copy, Debug)]
struct Asked<'a> {
    host: &'a str,
    says: &'a Says,
}

impl Says {
    fn of(vm: &VmStatus, rows: &[HistoryRow]) -> Self {
        // The newest run comes first.
        let row = rows.iter().find(|r| r.vm == vm.name && r.role == vm.role);
        Self::Has {
            phase: vm.phase,
            state: vm.state.clone(),
            why: vm.error.clone(),
            doubt: row.and_then(|r| r.doubt),
        }
    }

    /// By the agent's own word the copy there is not the VM, and will not be.
    fn is_free(&self, role: Role) -> bool {
        match (self, role) {
            (Self::Nothing, _) => true,
            (Self::Has { phase, .. }, Role::Source) => *phase == Phase::Done,
            (Self::Has { phase, .. }, Role::Target) => {
                matches!(phase, Phase::Failed | Phase::Cancelled | Phase::Lost) || self.is_lost()
            }
            _ => false,
        }
    }

    /// It has moved there, and its process has ended without having passed it on.
    fn is_lost(&self) -> bool {
        match self {
            Self::Has { state, why, .. } => {
                state == "ended" && !why.as_ref().is_some_and(|w| w.contains(LEFT_AGAIN))
            }
            _ => false,
        }
    }

    /// The VM is there, and nothing has to be decided about that.
    fn owns(&self, role: Role) -> bool {
        match (self, role) {
            // Stayed; or somebody has continued by hand what had been given up.
            (Self::Has { phase, state, .. }, Role::Source) => {
                let given = matches!(phase, Phase::GaveUp | Phase::InDoubt);
                matches!(phase, Phase::Failed | Phase::Cancelled) || (given && state == "running")
            }
            (Self::Has { phase, state, .. }, Role::Target) if !self.is_lost() => {
                matches!(phase, Phase::Running | Phase::LeftPaused | Phase::Fetching) || state == "running"
            }
            _ => false,
        }
    }

    /// A copy that may be the VM, of which its agent hears an operator's word.
    fn may_be_decided(&self) -> bool {
        match self {
            Self::Has { phase, doubt, .. } => {
                doubt.unwrap_or(matches!(phase, Phase::InDoubt | Phase::GaveUp))
            }
            _ => false,
        }
    }

    fn line(&self) -> String {
        match self {
            Self::Silent(e) => format!("does not answer: {e}"),
            Self::Odd(e) => format!("its agent answers: {e}"),
            Self::Nothing => "its agent answers, and knows nothing of it".to_owned(),
            Self::Has { phase, state, why, .. } => {
                let mut out = phase.name().to_owned();
                if !state.is_empty() && state != phase.name() {
                    out.push_str(&format!(" ({state})"));
                }
                if let Some(why) = why {
                    let why = why.strip_prefix("in doubt: ").unwrap_or(why);
                    out.push_str(&format!(": {why}"));
                }
                out
            }
        }
    }
}

/// Whether the decision may be said, by what both sides say of their copies; if so, whether the side that is
/// not to run is told first. Otherwise an exit code, and why.
fn weigh(run_at: Side, vouched: bool, stops: Asked<'_>, runs: Asked<'_>) -> Result<bool, (u8, String)> {
    let (to_run, to_stop) = (run_at.role(), run_at.other().role());
    let refuse = |why: String| Err((REFUSED, why));
    match runs.says {
        Says::Silent(_) => {
            return Err((SILENT, format!("host {} does not answer, and is to run it", runs.host)));
        }
        Says::Odd(_) => return refuse(format!("host {} does not say how its copy stands", runs.host)),
        Says::Nothing => {
            return refuse(format!("host {} knows nothing of it, and has no copy that could run", runs.host));
        }
        says if says.owns(to_run) || says.may_be_decided() => {}
        // It has left. If its target has lost it, the agent looks whether somebody has continued it here.
        says if to_run == Role::Source && says.is_free(to_run) => return left(vouched, stops),
        Says::Has { phase, .. } => {
            return refuse(format!(
                "the copy at host {} is not in doubt ({}): there is nothing to decide",
                runs.host,
                phase.name()
            ));
        }
    }
    let host = stops.host;
    match stops.says {
        Says::Silent(_) if vouched => Ok(false),
        Says::Silent(_) => Err((
            SILENT,
            format!("host {host} does not answer: if its copy cannot run, say --other-side-is-dead"),
        )),
        says if vouched && says.is_free(to_stop) => Ok(false),
        // It is so already, and nothing is decided.
        Says::Nothing if runs.says.owns(to_run) && !runs.says.may_be_decided() => Ok(false),
        Says::Nothing => refuse(format!(
            "host {host} knows nothing of it: if no copy can run there, say --other-side-is-dead"
        )),
        says if says.owns(to_stop) => {
            let (side, first) = match to_stop {
                Role::Target => ("target", "end its process"),
                Role::Source => ("source", "pause it"),
            };
            refuse(format!(
                "it is at host {host} ({}): settle with --run-at {side}, or {first} there first",
                says.line()
            ))
        }
        says if vouched => refuse(format!(
            "host {host} is not dead: its agent answers, and its copy may be the VM ({}); leave out \
             --other-side-is-dead",
            says.line()
        )),
        Says::Odd(_) => refuse(format!("host {host} does not say how its copy stands")),
        // Its agent says so, or refuses; it is told before the other.
        says if says.is_free(to_stop) || says.may_be_decided() => Ok(true),
        says => refuse(format!("the copy at host {host} is not in doubt ({})", says.line())),
    }
}

/// Whether a VM that has left may be its source's again: only if its target does not have it.
fn left(vouched: bool, target: Asked<'_>) -> Result<bool, (u8, String)> {
    let host = target.host;
    match target.says {
        Says::Silent(_) | Says::Nothing if vouched => Ok(false),
        Says::Silent(_) => Err((
            SILENT,
            format!(
                "it has left for host {host}, which does not answer: if no copy can run there, say --other-side-is-dead"
            ),
        )),
        Says::Nothing => Err((
            REFUSED,
            format!(
                "it has left for host {host}, which knows nothing of it: if no copy can run there, say --other-side-is-dead"
            ),
        )),
        says if says.is_free(Role::Target) => Ok(false),
        says => Err((
            REFUSED,
            format!("it has left for host {host} ({}): there is nothing to decide", says.line()),
        )),
    }
}

/// Asks an agent how its copy stands; changes nothing there.
async fn ask(agent: SocketAddr, group: &str, vm: &str, role: Role) -> Says {
    let mut client = AgentClient::new(caller::at(agent), ASK);
    let status = client.call(&Request::Status { group: Some(group.to_owned()) }).await;
    let found = match known(status, vm, role) {
        Ok(found) => found,
        Err(says) => return says,
    };
    let history = client.call(&Request::History { group: Some(group.to_owned()) }).await;
    let rows = match history {
        Ok(Reply::History { rows, .. }) => rows,
        _ => Vec::new(),
    };
    Says::of(&found, &rows)
}

/// The VM in the answer to a status; else what the answer comes to.
fn known(answer: Result<Reply, CallError>, vm: &str, role: Role) -> Result<VmStatus, Says> {
    match answer {
        Ok(Reply::Status { groups, .. }) => {
            let all = groups.into_iter().flat_map(|g| g.vms);
            all.into_iter().find(|v| v.name == vm && v.role == role).ok_or(Says::Nothing)
        }
        Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => Err(Says::Nothing),
        Ok(_) => Err(Says::Odd("an answer to another question".to_owned())),
        Err(e @ CallError::Refused { .. }) => Err(Says::Odd(e.to_string())),
        Err(e) => Err(Says::Silent(e.to_string())),
    }
}

/// Tells one side, prints what came of it, and gives the exit code.
async fn say(host: &str, agent: SocketAddr, word: &Request) -> u8 {
    let answer = AgentClient::new(caller::at(agent), PATIENCE).call(word).await;
    let (mark, line, code) = read(answer);
    outln!("{mark}host {host}: {line}");
    code
}

/// What an answer says: a mark, a line, an exit code.
fn read(answer: Result<Reply, CallError>) -> (&'static str, String, u8) {
    match answer {
        Ok(Reply::Settled { line, done: true }) => ("", line, 0),
        Ok(Reply::Settled { line, done: false }) => ("! ", line, NOT_YET),
        // An agent of an earlier version takes the decision in hand, and does not say what came of it.
        Ok(_) => ("! ", "its agent has heard it, and does not say what came of it".to_owned(), NOT_YET),
        Err(e @ CallError::Refused { .. }) => ("! ", e.to_string(), REFUSED),
        Err(e) => ("! ", e.to_string(), SILENT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Refusal;

    #[test]
    fn only_what_was_seen_is_called_settled() {
        let code = |answer| read(answer).2;
        let settled = |done| Ok(Reply::Settled { line: "x".into(), done });
        assert_eq!(code(settled(true)), 0);
        assert_eq!(code(settled(false)), NOT_YET);
        assert_eq!(code(Ok(Reply::Done)), NOT_YET);
        let agent = "127.0.0.1:1".parse().unwrap();
        let refusal = Refusal::new(Code::NotNow, "not in doubt");
        assert_eq!(code(Err(CallError::Refused { agent, refusal })), REFUSED);
        assert_eq!(code(Err(CallError::Grammar { agent, what: String::new() })), SILENT);
    }

    fn has(phase: Phase, state: &str, doubt: Option<bool>) -> Says {
        Says::Has { phase, state: state.into(), why: None, doubt }
    }

    fn weighed(run_at: Side, vouched: bool, stops: &Says, runs: &Says) -> Result<bool, u8> {
        let (stops, runs) = (Asked { host: "stops", says: stops }, Asked { host: "runs", says: runs });
        weigh(run_at, vouched, stops, runs).map_err(|(code, why)| {
            assert!(why.contains("stops") || why.contains("runs"), "{why}");
            code
        })
    }

    fn silent() -> Says {
        Says::Silent("nobody".into())
    }

    #[test]
    fn an_agent_that_answers_is_not_taken_for_dead() {
        let source = has(Phase::InDoubt, "", Some(true));
        for phase in [Phase::InDoubt, Phase::Loaded, Phase::Running, Phase::Fetching, Phase::Migrating] {
            for (state, doubt) in [("", Some(true)), ("running", Some(false)), ("", None)] {
                let target = has(phase, state, doubt);
                assert_eq!(weighed(Side::Source, true, &target, &source), Err(REFUSED), "{phase:?}");
            }
        }
        assert_eq!(weighed(Side::Source, true, &Says::Odd("?".into()), &source), Err(REFUSED));
        // What it says is not the VM, or nobody who answers.
        for target in [
            silent(),
            Says::Nothing,
            has(Phase::Failed, "", None),
            has(Phase::Cancelled, "", None),
            has(Phase::Lost, "ended", None),
        ] {
            assert_eq!(weighed(Side::Source, true, &target, &source), Ok(false), "{target:?}");
        }
        let target = has(Phase::InDoubt, "", Some(true));
        for phase in [Phase::Failed, Phase::Migrating, Phase::Stopped, Phase::GaveUp, Phase::InDoubt] {
            let source = has(phase, "", Some(true));
            assert_eq!(weighed(Side::Target, true, &source, &target), Err(REFUSED), "{phase:?}");
        }
        assert_eq!(weighed(Side::Target, true, &has(Phase::Done, "", None), &target), Ok(false));
    }

    #[test]
    fn nothing_is_given_up_for_a_side_that_cannot_run() {
        let source = has(Phase::InDoubt, "", Some(true));
        for vouched in [false, true] {
            let other = if vouched { silent() } else { has(Phase::InDoubt, "", Some(true)) };
            assert_eq!(weighed(Side::Target, vouched, &other, &Says::Nothing), Err(REFUSED));
            assert_eq!(weighed(Side::Target, vouched, &other, &silent()), Err(SILENT));
            assert_eq!(weighed(Side::Source, vouched, &other, &Says::Nothing), Err(REFUSED));
            for phase in [Phase::Prepared, Phase::Migrating, Phase::Failed, Phase::Cancelled, Phase::Lost] {
                let target = has(phase, "", Some(false));
                assert_eq!(weighed(Side::Target, vouched, &other, &target), Err(REFUSED), "{phase:?}");
            }
        }
        // An agent that says whether it would hear the word is believed before its phase.
        assert_eq!(
            weighed(Side::Target, false, &source, &has(Phase::InDoubt, "", Some(false))),
            Err(REFUSED)
        );
        let loaded = has(Phase::InDoubt, "", Some(true));
        assert_eq!(weighed(Side::Target, false, &source, &loaded), Ok(true));
        assert_eq!(weighed(Side::Target, false, &source, &has(Phase::InDoubt, "", None)), Ok(true));
        assert_eq!(weighed(Side::Target, false, &source, &has(Phase::Running, "running", None)), Ok(true));
        assert_eq!(weighed(Side::Target, false, &silent(), &loaded), Err(SILENT), "nobody has vouched");
        assert_eq!(weighed(Side::Target, true, &silent(), &loaded), Ok(false));
    }

    #[test]
    fn a_copy_that_runs_at_the_target_is_not_thrown_away() {
        let source = has(Phase::InDoubt, "", Some(true));
        for target in
            [has(Phase::Running, "running", Some(false)), has(Phase::InDoubt, "running", Some(true))]
        {
            assert_eq!(weighed(Side::Source, false, &target, &source), Err(REFUSED), "{target:?}");
        }
        for target in [has(Phase::InDoubt, "", Some(true)), has(Phase::Lost, "ended", Some(false))] {
            assert_eq!(weighed(Side::Source, false, &target, &source), Ok(true), "{target:?}");
        }
        // What is so already is said again, also if the other agent has forgotten it.
        let stayed = has(Phase::Failed, "running", Some(false));
        assert_eq!(weighed(Side::Source, false, &Says::Nothing, &stayed), Ok(false));
        assert_eq!(weighed(Side::Source, false, &Says::Nothing, &source), Err(REFUSED));
        // Nor one that somebody has continued at its source.
        let loaded = has(Phase::InDoubt, "", Some(true));
        let back = has(Phase::InDoubt, "running", Some(true));
        assert_eq!(weighed(Side::Target, false, &back, &loaded), Err(REFUSED));
        assert_eq!(weighed(Side::Source, false, &loaded, &back), Ok(true));
        // Served pages, and its target has lost it.
        let served = has(Phase::GaveUp, "", Some(true));
        assert_eq!(weighed(Side::Source, false, &has(Phase::Lost, "", None), &served), Ok(true));
    }

    #[test]
    fn a_vm_that_has_left_is_its_sources_again_only_if_its_target_does_not_have_it() {
        let moved = has(Phase::Done, "postmigrate", Some(false));
        let lost = has(Phase::Running, "ended", Some(false));
        for vouched in [false, true] {
            for target in [&lost, &has(Phase::Lost, "", None), &has(Phase::LeftPaused, "ended", None)] {
                assert_eq!(weighed(Side::Source, vouched, target, &moved), Ok(false), "{target:?}");
            }
            for phase in [Phase::Running, Phase::LeftPaused, Phase::Fetching, Phase::InDoubt] {
                let there = has(phase, "paused", Some(false));
                assert_eq!(weighed(Side::Source, vouched, &there, &moved), Err(REFUSED), "{phase:?}");
            }
            // It is somewhere else by now.
            let on = Says::Has {
                phase: Phase::Running,
                state: "ended".into(),
                why: Some(LEFT_AGAIN.into()),
                doubt: None,
            };
            assert_eq!(weighed(Side::Source, vouched, &on, &moved), Err(REFUSED));
        }
        for (vouched, code) in [(false, Err(SILENT)), (true, Ok(false))] {
            assert_eq!(weighed(Side::Source, vouched, &silent(), &moved), code);
        }
        for (vouched, code) in [(false, Err(REFUSED)), (true, Ok(false))] {
            assert_eq!(weighed(Side::Source, vouched, &Says::Nothing, &moved), code);
        }
    }

    #[test]
    fn a_refusal_after_the_other_side_agreed_is_not_one_that_changed_nothing() {
        assert_eq!((after(false, REFUSED), after(true, REFUSED)), (REFUSED, SILENT));
        assert_eq!((after(true, 0), after(true, NOT_YET)), (0, NOT_YET));
    }

    #[test]
    fn an_agent_without_the_group_knows_nothing_and_one_that_refuses_is_no_dead_one() {
        let agent = "127.0.0.1:1".parse().unwrap();
        let refused = |code| Err(CallError::Refused { agent, refusal: Refusal::new(code, "no") });
        let says = |answer| known(answer, "v", Role::Source).unwrap_err();
        assert!(matches!(says(refused(Code::UnknownGroup)), Says::Nothing));
        assert!(matches!(says(refused(Code::Failed)), Says::Odd(_)));
        assert!(matches!(says(Ok(Reply::Done)), Says::Odd(_)));
        assert!(matches!(says(Err(CallError::Grammar { agent, what: String::new() })), Says::Silent(_)));
    }
}
