//! Watching a group from outside, for `evacuate` and for `status --follow` alike: one poller an agent, so
//! that a dead one holds up nobody, and what may be concluded about a VM from the words of its two agents.

use super::calls;
use super::plan::Plan;
use crate::control::api::{
    Code, GroupSpec, GroupStatus, LEFT_AGAIN, Phase, Reply, Request, Role, VmFacts, VmStatus,
};
use crate::control::client::{AgentClient, CallError};
use crate::core::handover::GuestState;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often each agent is asked.
pub const POLL: Duration = Duration::from_millis(200);

/// How often an agent is asked what it sees of VMs of which it cannot say how they stand: it asks their QEMUs.
const FACTS_EVERY: Duration = Duration::from_secs(5);

/// What is known of one agent.
#[derive(Clone, Debug)]
pub struct AgentView {
    /// Its host's name.
    pub name: String,
    /// Its control address.
    pub addr: SocketAddr,
    /// When it last answered.
    pub heard: Option<Instant>,
    /// Whether the last call was answered.
    pub answers: bool,
    /// The last call's error.
    pub error: Option<String>,
    /// Its groups, by its last answer.
    pub groups: Vec<GroupStatus>,
    /// What it sees of its VMs of the group where it cannot say how they stand, by its last answer to that.
    pub facts: Vec<VmFacts>,
}

impl AgentView {
    /// The group, by the agent's last answer.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<&GroupStatus> {
        self.groups.iter().find(|g| g.group == name)
    }

    fn vm(&self, group: &str, vm: &str, role: Role) -> Option<&VmStatus> {
        self.group(group)?.vms.iter().find(|v| v.name == vm && v.role == role)
    }
}

/// Pollers of a set of agents; they stop when this is dropped.
#[derive(Debug)]
pub struct Watch {
    views: Arc<Mutex<Vec<AgentView>>>,
    _pollers: JoinSet<()>,
}

impl Watch {
    /// Starts asking each agent of `plan` for the group.
    #[must_use]
    pub fn start(plan: &Plan, timeout: Duration) -> Self {
        let blank = |(name, addr): (&str, SocketAddr)| AgentView {
            name: name.to_owned(),
            addr,
            heard: None,
            answers: false,
            error: None,
            groups: vec![],
            facts: vec![],
        };
        let views = plan.agents.iter().map(|a| blank((&a.name, a.addr))).collect();
        let views = Arc::new(Mutex::new(views));
        let mut pollers = JoinSet::new();
        for (i, a) in plan.agents.iter().enumerate() {
            let views = Arc::clone(&views);
            let mut client = AgentClient::new(plan.at(i), timeout);
            let spec = a.spec.clone();
            let request = Request::Status { group: Some(plan.config.name.clone()) };
            pollers.spawn(async move {
                let mut asked: Option<Instant> = None;
                loop {
                    let answer = client.call(&request).await;
                    let lacks = match lock(&views).get_mut(i) {
                        Some(view) => {
                            view.take(answer);
                            view.answers && view.error.is_none() && view.lacks(&spec)
                        }
                        None => false,
                    };
                    // An agent that has restarted may know nothing of a VM, or not how it stands: what is there it can
                    // still see.
                    if lacks && asked.is_none_or(|t| t.elapsed() >= FACTS_EVERY) {
                        asked = Some(Instant::now());
                        let facts = calls::facts(client.call(&calls::vms_only(&spec)).await);
                        if let (Some(view), Some(facts)) = (lock(&views).get_mut(i), facts) {
                            view.facts = facts;
                        }
                    }
                    tokio::time::sleep(POLL).await;
                }
            });
        }
        Self { views, _pollers: pollers }
    }

    /// What is known now.
    #[must_use]
    pub fn views(&self) -> Vec<AgentView> {
        lock(&self.views).clone()
    }

    /// For a task that looks beside this.
    pub fn look(&self) -> impl Fn() -> Vec<AgentView> + Send + 'static {
        let views = Arc::clone(&self.views);
        move || lock(&views).clone()
    }
}

fn lock(views: &Mutex<Vec<AgentView>>) -> MutexGuard<'_, Vec<AgentView>> {
    // A view is replaced whole; a poller that panicked left none half-written.
    views.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AgentView {
    /// Whether it does not know some VM of its part, or how one stands that is here.
    fn lacks(&self, spec: &GroupSpec) -> bool {
        let known = |name: &str, role| self.vm(&spec.name, name, role).is_some_and(|s| !untold(s));
        spec.vms.iter().any(|v| {
            (Some(v.source) == spec.my_source && !known(&v.name, Role::Source))
                || (Some(v.target) == spec.my_target && !known(&v.name, Role::Target))
        })
    }

    /// What it sees of a VM, if it was asked.
    fn seen(&self, vm: &str, role: Role) -> Option<&VmFacts> {
        self.facts.iter().find(|f| f.name == vm && f.role == role)
    }

    fn take(&mut self, answer: Result<Reply, CallError>) {
        self.answers = true;
        self.error = None;
        match answer {
            Ok(Reply::Status { groups, .. }) => self.groups = groups,
            Ok(_) => self.error = Some(format!("agent {}: an answer to another question", self.addr)),
            Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => {
                // A group that is over is forgotten by itself: what was final then still is.
                let over = |g: &GroupStatus| !g.vms.is_empty() && g.vms.iter().all(|v| v.phase.is_final());
                self.groups.retain(over);
            }
            Err(e @ CallError::Refused { .. }) => self.error = Some(e.to_string()),
            Err(e) => {
                self.answers = false;
                self.error = Some(e.to_string());
            }
        }
        if self.answers {
            self.heard = Some(Instant::now());
        }
    }
}

/// Whether its owner's agent has not seen how it stands: it never began to leave, or it was settled before a restart.
fn untold(s: &VmStatus) -> bool {
    let owner = match s.role {
        Role::Source => matches!(s.phase, Phase::Failed | Phase::Cancelled),
        Role::Target => matches!(s.phase, Phase::Running | Phase::LeftPaused),
    };
    owner && s.state.is_empty()
}

/// What one agent says of a VM.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// It says so now.
    Now(VmStatus),
    /// It said so, and does not answer now.
    Last(VmStatus),
    /// It answers, and does not know the VM: it has restarted, and had written nothing down. What it sees
    /// of the VM, once it was asked for that.
    Absent(Option<Box<VmFacts>>),
    /// It has never answered about it.
    Silent,
    /// It has not been asked yet.
    Pending,
}

impl Word {
    /// The VM's status, however old.
    #[must_use]
    pub fn status(&self) -> Option<&VmStatus> {
        match self {
            Self::Now(s) | Self::Last(s) => Some(s),
            Self::Absent(_) | Self::Silent | Self::Pending => None,
        }
    }

    /// The VM's phase, however old.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.status().map(|s| s.phase)
    }

    /// What the agent sees of the VM without knowing it.
    #[must_use]
    pub fn facts(&self) -> Option<&VmFacts> {
        match self {
            Self::Absent(facts) => facts.as_deref(),
            _ => None,
        }
    }

    /// What the VM's process at that side last said of it; empty if nobody has looked.
    #[must_use]
    pub fn state(&self) -> &str {
        self.status().map(|s| &*s.state).or_else(|| self.facts().map(|f| &*f.state)).unwrap_or("")
    }

    fn reachable(&self) -> bool {
        matches!(self, Self::Now(_) | Self::Absent(_) | Self::Pending)
    }
}

/// The state of a VM whose process was seen to have ended.
pub const ENDED: &str = "ended";

/// The phase, as shown, of a VM that an earlier run has moved.
pub const ALREADY: &str = "already moved";

/// How a VM stands at its target: its QEMU's own word. "Left paused" is said only of one that is paused.
#[must_use]
pub fn stands<'a>(phase: &'a str, state: &'a str) -> &'a str {
    match state {
        // Nobody has looked.
        "" => "moved",
        "paused" if phase == Phase::LeftPaused.name() => phase,
        state => state,
    }
}

/// What its two agents' words say about a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Still under way.
    Open,
    /// The target owns it: it runs there, or stands there as its owner left it or as was asked.
    Moved,
    /// The source owns it; its state says what it does there.
    Stayed,
    /// Neither can be told; its agents keep trying to settle it.
    InDoubt,
    /// Its process has ended while it was the owner's: no copy of it runs.
    Lost,
}

/// Concludes from words alone: only the owner's own word is final, the target's that it has it, the
/// source's that it kept it. From silence nothing follows but doubt, and that only if both are silent; the
/// caller gives a verdict of doubt time to settle before it believes it.
#[must_use]
pub fn judge(source: &Word, target: &Word) -> Verdict {
    if target.phase() == Some(Phase::Lost) {
        return Verdict::Lost;
    }
    if matches!(target.phase(), Some(Phase::Running | Phase::LeftPaused))
        || source.phase() == Some(Phase::Done)
    {
        return Verdict::Moved;
    }
    if matches!(source.phase(), Some(Phase::Failed | Phase::Cancelled)) {
        return if source.state() == ENDED { Verdict::Lost } else { Verdict::Stayed };
    }
    if source.phase() == Some(Phase::InDoubt) || target.phase() == Some(Phase::InDoubt) {
        return Verdict::InDoubt;
    }
    let thrown_away = matches!(target.phase(), Some(Phase::Failed | Phase::Cancelled));
    if thrown_away && source.phase() == Some(Phase::GaveUp) {
        // Against the rules of the handover: a person must look.
        return Verdict::InDoubt;
    }
    // Both agents have forgotten the group, and what they wrote of the VM agrees.
    if let (Some(moved), Some(there)) = (source.facts().and_then(|f| f.moved.as_ref()), target.facts())
        && there.arrived.as_deref() == Some(&*moved.group)
    {
        return Verdict::Moved;
    }
    // Its agent has written nothing of it, so it was never given up; but what is there must be seen.
    if let Some(facts) = source.facts().filter(|f| f.moved.is_none()) {
        if facts.state == ENDED {
            return Verdict::Lost;
        }
        if GuestState::parse(&facts.state).is_some() {
            return Verdict::Stayed;
        }
    }
    match (source.reachable(), target.reachable()) {
        // By the target's own word nobody but the source has it. What it does there is not known.
        (false, _) if thrown_away => Verdict::Stayed,
        (false, false) => Verdict::InDoubt,
        _ => Verdict::Open,
    }
}

/// One VM of the group, as both agents see it.
#[derive(Clone, Debug)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its source host.
    pub source_host: String,
    /// Its target host.
    pub target_host: String,
    /// The source agent's word.
    pub source: Word,
    /// The target agent's word.
    pub target: Word,
    /// What follows.
    pub verdict: Verdict,
    /// An earlier run has moved it, and this one leaves it: what its target's QEMU said of it.
    pub already: Option<String>,
    /// Why it is waited for no longer, if it is under way and not settled.
    pub reason: Option<String>,
}

impl VmView {
    /// Whether it is under way, and waited for.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.verdict == Verdict::Open && self.reason.is_none()
    }

    /// What to show: the later of the two agents' phases.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        match self.verdict {
            Verdict::Moved if self.already.is_some() => ALREADY,
            Verdict::Moved => match self.target.phase() {
                Some(p) if p.is_final() => p.name(),
                // The source has heard that it arrived; what it does there only the target knows.
                _ => "moved",
            },
            Verdict::Stayed => self.source.phase().map_or("stayed", Phase::name),
            Verdict::InDoubt => Phase::InDoubt.name(),
            Verdict::Lost => Phase::Lost.name(),
            Verdict::Open => match (self.source.phase(), self.target.phase()) {
                (_, Some(p @ (Phase::Loaded | Phase::Fetching))) => p.name(),
                (Some(p), _) | (None, Some(p)) => p.name(),
                (None, None) => "?",
            },
        }
    }

    /// What its process says of it now at the side that owns it: QEMU's run state, `ended`; empty if it is
    /// not known.
    #[must_use]
    pub fn state(&self) -> &str {
        match (&self.already, self.verdict) {
            (Some(state), _) => state,
            (None, Verdict::Moved) => self.target.state(),
            (None, Verdict::Stayed) if matches!(self.source, Word::Now(_) | Word::Absent(_)) => {
                self.source.state()
            }
            // What an agent said that is silent now may not hold any more.
            (None, Verdict::Stayed) => "",
            (None, Verdict::Lost) => ENDED,
            (None, Verdict::InDoubt | Verdict::Open) => "",
        }
    }

    /// What people are told of it while it moves: its phase, and once its target owns it its QEMU's word.
    #[must_use]
    pub fn now(&self) -> &str {
        match self.verdict {
            Verdict::Moved if self.already.is_none() => stands(self.phase_name(), self.state()),
            _ => self.phase_name(),
        }
    }

    /// Whether it belongs to its target, and the source agent sees its old copy run. While it moves its
    /// source says "running", too: that word may be older than the target's.
    #[must_use]
    pub fn old_copy_runs(&self) -> bool {
        let left = |p| !matches!(p, Phase::Prepared | Phase::Pushing | Phase::Migrating | Phase::Stopped);
        let looked = match &self.source {
            Word::Now(s) => left(s.phase),
            Word::Absent(facts) => facts.is_some(),
            _ => false,
        };
        self.verdict == Verdict::Moved && looked && self.source.state() == GuestState::Running.name()
    }

    /// Whether its process has ended since it moved. One that has moved on is elsewhere.
    #[must_use]
    pub fn ended_since(&self) -> bool {
        let error = self.target.status().and_then(|s| s.error.as_deref());
        let left = error.is_some_and(|e| e.contains(LEFT_AGAIN));
        self.verdict == Verdict::Moved && self.state() == ENDED && !left
    }

    /// Whether it was lost at its target, and its source agent still has the copy that it gave up.
    #[must_use]
    pub fn copy_at_source(&self) -> bool {
        let stands = |s: &VmStatus| {
            matches!(s.phase, Phase::GaveUp | Phase::Done | Phase::InDoubt) && s.state != ENDED
        };
        self.verdict == Verdict::Lost && matches!(&self.source, Word::Now(s) if stands(s))
    }

    /// Which agents do not answer about it, or answer and know nothing of it.
    #[must_use]
    pub fn not_heard(&self) -> Option<String> {
        let side = |what: &str, host: &str, w: &Word| match w {
            Word::Now(_) | Word::Pending => None,
            Word::Absent(_) => Some(format!("the {what} agent ({host}) knows nothing of it")),
            Word::Last(_) | Word::Silent => Some(format!("the {what} agent ({host}) does not answer")),
        };
        let source = side("source", &self.source_host, &self.source);
        let target = side("target", &self.target_host, &self.target);
        match (source, target) {
            (Some(s), Some(t)) => Some(format!("{s}, and {t}")),
            (one, other) => one.or(other),
        }
    }

    /// The last judgement, when nothing more is waited for: a target that was never called has no copy, and
    /// nobody but the source agent, which began nothing, could call it.
    pub fn conclude(&mut self) {
        let never_called = match &self.target {
            Word::Now(t) => t.phase == Phase::Prepared,
            // It waits for its stream, which it takes only once.
            Word::Absent(Some(facts)) => facts.state == "inmigrate",
            _ => false,
        };
        if self.verdict == Verdict::Open && !self.source.reachable() && never_called {
            self.verdict = Verdict::Stayed;
        }
    }

    /// Why it did not move, or is not settled, by whichever agent says so.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        let said =
            [&self.source, &self.target].into_iter().find_map(|w| w.status().and_then(|s| s.error.clone()));
        match self.verdict {
            Verdict::Moved if self.old_copy_runs() || self.ended_since() => {
                let (s, t) = (&self.source_host, &self.target_host);
                let what = match (self.old_copy_runs(), self.state()) {
                    (false, _) => "its process has ended since it moved".to_owned(),
                    (true, "running") => {
                        format!("two copies of it run: one at {t}, where it belongs, and its old one at {s}")
                    }
                    (true, "") => format!("its old copy runs at {s}, and it belongs to {t}"),
                    (true, state) => {
                        format!("its old copy runs at {s}, and it belongs to {t} ({state} there)")
                    }
                };
                match said {
                    // Its agent has seen it, and says it itself.
                    Some(s) if !self.old_copy_runs() && s.contains("its process has ended") => Some(s),
                    Some(s) => Some(format!("{what}: {s}")),
                    None => Some(what),
                }
            }
            Verdict::Moved if self.state().is_empty() => {
                let heard = if self.target.reachable() { "has yet to look" } else { "does not answer" };
                let unseen = format!(
                    "the target agent ({}) {heard}, and what it does there was not seen",
                    self.target_host
                );
                Some(said.map_or_else(|| unseen.clone(), |s| format!("{s}; {unseen}")))
            }
            Verdict::Moved => said,
            Verdict::Open => self.reason.clone().or(said),
            Verdict::InDoubt => said.or_else(|| self.not_heard()),
            Verdict::Lost if self.target.phase() == Some(Phase::Lost) => said,
            Verdict::Lost => {
                let ended = "its QEMU has ended at the source";
                Some(said.map_or_else(|| ended.to_owned(), |s| format!("{ended}: {s}")))
            }
            Verdict::Stayed if !self.source.reachable() => {
                let silent = "the source agent cannot be reached";
                Some(said.map_or_else(|| silent.to_owned(), |s| format!("{s}; {silent}")))
            }
            Verdict::Stayed if self.source.status().is_none() => said.or_else(|| {
                Some(
                    "the source agent knows nothing of it: it was restarted before the VM began to move"
                        .to_owned(),
                )
            }),
            Verdict::Stayed => said,
        }
    }
}

/// Puts the agents' words together, a VM at a time, in the group file's order.
#[must_use]
pub fn vm_views(plan: &Plan, views: &[AgentView]) -> Vec<VmView> {
    let group = &plan.config.name;
    let word = |agent: Option<usize>, vm: &str, role| {
        let Some(view) = agent.and_then(|i| views.get(i)) else { return Word::Silent };
        let facts = || view.seen(vm, role).cloned().map(Box::new);
        match (view.vm(group, vm, role), view.answers) {
            (Some(s), true) if untold(s) => {
                let state = view.seen(vm, role).map(|f| f.state.clone()).unwrap_or_default();
                Word::Now(VmStatus { state, ..s.clone() })
            }
            (Some(s), true) => Word::Now(s.clone()),
            (Some(s), false) => Word::Last(s.clone()),
            (None, _) if view.heard.is_none() && view.error.is_none() => Word::Pending,
            (None, true) if view.error.is_none() => Word::Absent(facts()),
            (None, _) => Word::Silent,
        }
    };
    let one = |(ix, v): (usize, &crate::control::config::VmConfig)| {
        let already = plan.moved.iter().find(|m| usize::from(m.ix) == ix).map(|m| m.state.clone());
        let (source, target) = match &already {
            // No agent was asked for it in this run: what they say of it under this name is an earlier run's.
            Some(_) => (Word::Pending, Word::Pending),
            None => (
                word(plan.source_agent(&v.source), &v.name, Role::Source),
                word(plan.target_agent(&v.target), &v.name, Role::Target),
            ),
        };
        VmView {
            name: v.name.clone(),
            source_host: v.source.clone(),
            target_host: v.target.clone(),
            verdict: if already.is_some() { Verdict::Moved } else { judge(&source, &target) },
            source,
            target,
            already,
            reason: None,
        }
    };
    plan.config.vm.iter().enumerate().map(one).collect()
}
