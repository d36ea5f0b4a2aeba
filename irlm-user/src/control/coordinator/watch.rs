//! Watching a group from outside, for `evacuate` and for `status --follow` alike: one poller an agent, so that a
//! dead one holds up nobody, and what may be concluded about a VM from the words of its two agents.

use super::plan::Plan;
use crate::control::api::{Code, GroupStatus, Phase, Reply, Request, Role, VmStatus};
use crate::control::client::{AgentClient, CallError};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often each agent is asked.
pub const POLL: Duration = Duration::from_millis(200);

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
    /// Starts asking each of `agents` (name, control address) for `group`, or for all groups.
    #[must_use]
    pub fn start(agents: &[(String, SocketAddr)], group: Option<&str>, timeout: Duration) -> Self {
        let views = agents
            .iter()
            .map(|(name, addr)| AgentView {
                name: name.clone(),
                addr: *addr,
                heard: None,
                answers: false,
                error: None,
                groups: vec![],
            })
            .collect();
        let views = Arc::new(Mutex::new(views));
        let mut pollers = JoinSet::new();
        for (i, (_, addr)) in agents.iter().enumerate() {
            let views = Arc::clone(&views);
            let mut client = AgentClient::new(*addr, timeout);
            let request = Request::Status { group: group.map(str::to_owned) };
            pollers.spawn(async move {
                loop {
                    let answer = client.call(&request).await;
                    if let Some(view) = lock(&views).get_mut(i) {
                        view.take(answer);
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
    fn take(&mut self, answer: Result<Reply, CallError>) {
        self.answers = true;
        self.error = None;
        match answer {
            Ok(Reply::Status { groups, .. }) => self.groups = groups,
            Ok(_) => self.error = Some(format!("agent {}: an answer to another question", self.addr)),
            Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => {
                self.groups.clear();
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

/// What one agent says of a VM.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// It says so now.
    Now(VmStatus),
    /// It said so, and does not answer now.
    Last(VmStatus),
    /// It answers, and does not know the VM: it has restarted, and had written nothing down.
    Absent,
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
            Self::Absent | Self::Silent | Self::Pending => None,
        }
    }

    /// The VM's phase, however old.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.status().map(|s| s.phase)
    }

    fn reachable(&self) -> bool {
        matches!(self, Self::Now(_) | Self::Absent | Self::Pending)
    }
}

/// What its two agents' words say about a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Still under way.
    Open,
    /// The target owns it: it runs there, or is left paused there as asked.
    Moved,
    /// It runs on at the source.
    Stayed,
    /// Neither can be told; its agents keep trying to settle it.
    InDoubt,
}

/// Concludes. An agent counts as unreachable once its last call failed; the caller gives a verdict of doubt time to
/// settle before it believes it.
#[must_use]
pub fn judge(source: &Word, target: &Word) -> Verdict {
    // Only the owner's own word is final: the target's that it runs, the source's that it kept it.
    if matches!(target.phase(), Some(Phase::Running | Phase::LeftPaused))
        || source.phase() == Some(Phase::Done)
    {
        return Verdict::Moved;
    }
    if matches!(source.phase(), Some(Phase::Failed | Phase::Cancelled)) || *source == Word::Absent {
        return Verdict::Stayed;
    }
    if source.phase() == Some(Phase::InDoubt) || target.phase() == Some(Phase::InDoubt) {
        return Verdict::InDoubt;
    }
    let thrown_away = matches!(target.phase(), Some(Phase::Failed | Phase::Cancelled));
    if thrown_away && source.phase() == Some(Phase::GaveUp) {
        // Against the rules of the handover: a person must look.
        return Verdict::InDoubt;
    }
    match (source.reachable(), target.reachable()) {
        // A target that threw its copy away never runs it, so the VM is where it was.
        (false, _) if thrown_away => Verdict::Stayed,
        (false, false) => Verdict::InDoubt,
        (true, false) if source.phase() == Some(Phase::GaveUp) => Verdict::InDoubt,
        // Loaded: only the source can say more. Prepared: only the source could begin. Fetching: it runs, and what it lacks
        // only the source has.
        (false, true)
            if matches!(target.phase(), Some(Phase::Loaded | Phase::Prepared | Phase::Fetching) | None) =>
        {
            Verdict::InDoubt
        }
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
}

impl VmView {
    /// What to show: the later of the two agents' phases.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        match self.verdict {
            Verdict::Moved => match self.target.phase() {
                Some(p) if p.is_final() => p.name(),
                _ => Phase::Running.name(),
            },
            Verdict::Stayed => self.source.phase().map_or("stayed", Phase::name),
            Verdict::InDoubt => Phase::InDoubt.name(),
            Verdict::Open => match (self.source.phase(), self.target.phase()) {
                (_, Some(p @ (Phase::Loaded | Phase::Fetching))) => p.name(),
                (Some(p), _) | (None, Some(p)) => p.name(),
                (None, None) => "?",
            },
        }
    }

    /// The last judgement, when nothing more is waited for: a target that was never called has no copy, and nobody but
    /// the silent source agent, which began nothing, could call it.
    pub fn conclude(&mut self) {
        let never_called = self.target.reachable() && self.target.phase() == Some(Phase::Prepared);
        if self.verdict == Verdict::InDoubt && !self.source.reachable() && never_called {
            self.verdict = Verdict::Stayed;
        }
    }

    /// Why it failed or is in doubt, by whichever agent says so.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        let said = [&self.source, &self.target]
            .into_iter()
            .find_map(|w| w.status().and_then(|s| s.error.as_deref()));
        let silent = self.verdict == Verdict::Stayed && !self.source.reachable();
        said.or_else(|| silent.then_some("the source agent cannot be reached"))
    }
}

/// Puts the agents' words together, a VM at a time, in the group file's order.
#[must_use]
pub fn vm_views(plan: &Plan, views: &[AgentView]) -> Vec<VmView> {
    let group = &plan.config.name;
    let word = |agent: Option<usize>, vm: &str, role| {
        let Some(view) = agent.and_then(|i| views.get(i)) else { return Word::Silent };
        match (view.vm(group, vm, role), view.answers) {
            (Some(s), true) => Word::Now(s.clone()),
            (Some(s), false) => Word::Last(s.clone()),
            (None, _) if view.heard.is_none() && view.error.is_none() => Word::Pending,
            (None, true) if view.error.is_none() => Word::Absent,
            (None, _) => Word::Silent,
        }
    };
    plan.config
        .vm
        .iter()
        .map(|v| {
            let source = word(plan.source_agent(&v.source), &v.name, Role::Source);
            let target = word(plan.target_agent(&v.target), &v.name, Role::Target);
            VmView {
                name: v.name.clone(),
                source_host: v.source.clone(),
                target_host: v.target.clone(),
                verdict: judge(&source, &target),
                source,
                target,
            }
        })
        .collect()
}
