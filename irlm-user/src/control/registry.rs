//! Who owns a VM, as far as this host knows: all records of its journal, over all groups, roles and fronts, in memory and on
//! disk. What may be done with a process is what the *newest* record about it allows, whichever group wrote it; an older
//! one is history. Two groups, two coordinators or crossed runs meet here, and one of them is refused.
//!
//! Records are written without the lock held. What is being written, or could not be written for sure, counts as much as
//! what is on disk: of the two the one that forbids more decides.

// What a record allows.
mod standing;

pub use standing::{Asker, Standing, outcome};

use super::api::{Code, Identity, Refusal, Role, Token};
use super::journal::{Journal, JournalError, JournalState, VmRecord};
use crate::flow::{Front, lock, unix_ns};
use crate::host::sched::Process;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Mutex;

/// Records of groups that are over that are kept; beyond it the oldest go. Those of processes that live stay.
pub const MAX_HISTORY: usize = 10_000;
/// And for how long: 90 days, by the wall clock.
const HISTORY_NS: u64 = 90 * 24 * 3600 * 1_000_000_000;

/// A process that something is to be done with, or was.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The process, if it is known.
    pub process: Option<Process>,
    /// How it is reached.
    pub front: &'a Front,
    /// Who the VM says it is, if it was asked.
    pub identity: Option<&'a Identity>,
}

impl<'a> Subject<'a> {
    /// Whom the record is about.
    #[must_use]
    pub fn of(r: &'a VmRecord) -> Self {
        Self { process: r.process, front: &r.front, identity: r.identity.as_ref() }
    }
}

/// Names a record: there is one for each run of a group, VM and role.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    group: String,
    token: [u8; 32],
    vm: String,
    source: bool,
}

impl Key {
    fn new(group: &str, token: &Token, vm: &str, role: Role) -> Self {
        Self { group: group.to_owned(), token: token.0, vm: vm.to_owned(), source: role == Role::Source }
    }
    fn of(r: &VmRecord) -> Self {
        Self::new(&r.group, &r.token, &r.vm, r.role)
    }
}

#[derive(Debug, Default)]
struct Kept {
    /// What is on disk for sure, unless `maybe` is there instead.
    written: Option<VmRecord>,
    /// What is being written, or may have been.
    maybe: Option<VmRecord>,
    /// Why it could not be written.
    problem: Option<String>,
}

impl Kept {
    fn all(&self) -> impl Iterator<Item = &VmRecord> {
        self.maybe.iter().chain(&self.written)
    }
    fn seq(&self) -> (u64, u64) {
        self.all().map(|r| (r.seq, r.at_ns)).max().unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct State {
    seq: u64,
    records: HashMap<Key, Kept>,
    /// QEMUs that wait for a plain migration and were let go again: they may listen already.
    listen: HashSet<Process>,
}

impl State {
    fn next(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    journal: Journal,
    state: Mutex<State>,
    gone: fn(Process) -> bool,
}

impl Registry {
    /// Reads all records of the state directory back, and locks it against a second agent. Files that cannot be read are
    /// reported and left alone.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        Self::over(Journal::open(dir)?, Process::is_gone)
    }

    fn over(journal: Journal, gone: fn(Process) -> bool) -> Result<Self, JournalError> {
        let loaded = journal.load_all()?;
        for e in &loaded.corrupt {
            tracing::error!("{e}");
        }
        let mut st = State::default();
        let mut converted = Vec::new();
        for (i, r) in loaded.records.iter().enumerate() {
            st.seq = st.seq.max(r.seq);
            let old = loaded.old.iter().find(|(n, _)| *n == i).map(|(_, path)| path);
            let kept = st.records.entry(Key::of(r)).or_default();
            // An old file beside the one that was made of it is left from a crash between the two.
            if kept.written.as_ref().is_none_or(|k| k.seq < r.seq || old.is_none()) {
                kept.written = Some(r.clone());
            }
            converted.extend(old.map(|path| (Key::of(r), path)));
        }
        for (key, path) in converted {
            let Some(r) = st.records.get(&key).and_then(|k| k.written.as_ref()) else { continue };
            // Under its new name first; until then the old file counts.
            if let Err(e) = journal.put(r).and_then(|()| journal.remove_file(path)) {
                tracing::warn!("{e}");
            }
        }
        let this = Self { journal, state: Mutex::new(st), gone };
        this.prune(unix_ns());
        Ok(this)
    }

    /// Writes the record, as the newest of the host; on return it is on disk. What was known of the process and is not said
    /// again is kept, and put into `r` too. An error: it is not on disk for sure, and must not be acted on.
    pub fn put(&self, r: &mut VmRecord) -> Result<(), JournalError> {
        let key = Key::of(r);
        {
            let mut st = lock(&self.state);
            r.seq = st.next();
            let kept = st.records.entry(key.clone()).or_default();
            if let Some(k) = kept.all().next() {
                r.process = r.process.or(k.process);
                r.identity = r.identity.take().or_else(|| k.identity.clone());
                r.settings = r.settings.take().or_else(|| k.settings.clone());
                r.begun |= k.begun;
            }
            kept.maybe = Some(r.clone());
        }
        self.write(&key, r)
    }

    /// Writes what `maybe` holds, and notes what came of it.
    fn write(&self, key: &Key, r: &VmRecord) -> Result<(), JournalError> {
        let end = self.journal.put(r);
        let mut st = lock(&self.state);
        let Some(kept) = st.records.get_mut(key) else { return end };
        match &end {
            Ok(()) => {
                kept.written = Some(r.clone());
                kept.problem = None;
            }
            Err(e) => kept.problem = Some(e.to_string()),
        }
        // A later one may be on its way.
        let unsure = end.as_ref().is_err_and(|e| e.maybe);
        if !unsure && kept.maybe.as_ref().is_some_and(|m| m.seq == r.seq) {
            kept.maybe = None;
        }
        end
    }

    /// Takes a process in hand for a VM of a group, unless the newest record about it forbids that: writes `r`, which must be
    /// in its first state. Of several that claim one process at a time one gets it. A claim of before stands.
    pub fn claim(&self, mut r: VmRecord) -> Result<VmRecord, Refusal> {
        let key = Key::of(&r);
        {
            let mut st = lock(&self.state);
            let asker = Asker { group: &r.group, token: &r.token, vm: &r.vm };
            self.standing_in(&st, &Subject::of(&r), &asker, r.role).allowed(&r.vm)?;
            if let Some(have) = st.records.get(&key).and_then(|k| k.all().next()) {
                return Ok(have.clone());
            }
            r.seq = st.next();
            st.records.insert(key.clone(), Kept { maybe: Some(r.clone()), ..Kept::default() });
        }
        self.write(&key, &r).map(|()| r.clone()).map_err(|e| {
            // If it is on disk all the same it says that nothing was begun, and the next start makes nothing of it.
            lock(&self.state).records.remove(&key);
            if e.maybe {
                let _ = self.journal.remove([&r]);
            }
            Refusal::new(Code::Failed, format!("{}: {e}", r.vm))
        })
    }

    /// Lets a claim go with which nothing was begun. The caller knows that nobody will begin.
    pub fn release(&self, group: &str, token: &Token, vm: &str, role: Role) {
        let key = Key::new(group, token, vm, role);
        let claim = {
            let st = lock(&self.state);
            let newest = st.records.get(&key).and_then(|k| k.all().next());
            newest.filter(|r| r.state == JournalState::Started && !r.begun).cloned()
        };
        let Some(claim) = claim else { return };
        // A file that stays says that nothing was begun.
        if let Err(e) = self.journal.remove([&claim]) {
            tracing::warn!("{e}");
        }
        let mut st = lock(&self.state);
        st.records.remove(&key);
        if claim.role == Role::Target && !claim.method.in_path() {
            st.listen.retain(|p| !(self.gone)(*p));
            st.listen.extend(claim.process);
        }
    }

    /// Whether that QEMU may listen already because a plain group of this agent told it to and came to nothing.
    /// A group that was let go before it started is forgotten when the agent is restarted.
    #[must_use]
    pub fn may_listen(&self, process: &Process) -> bool {
        let discarded =
            |r: VmRecord| r.role == Role::Target && r.state == JournalState::Discarded && !r.method.in_path();
        let told = lock(&self.state).listen.contains(process);
        told || self.newest(process).is_some_and(discarded)
    }

    /// The newest record of any process, alive or not, that was reached at that place.
    #[must_use]
    pub fn last_at(&self, front: &Front) -> Option<VmRecord> {
        self.newest_of(|r| r.front == *front)
    }

    /// The newest record of a VM of that name in that role.
    #[must_use]
    pub fn last_of(&self, vm: &str, role: Role) -> Option<VmRecord> {
        self.newest_of(|r| r.vm == vm && r.role == role)
    }

    /// The newest record about that very process.
    #[must_use]
    pub fn newest(&self, process: &Process) -> Option<VmRecord> {
        self.newest_of(|r| r.process.as_ref() == Some(process))
    }

    fn newest_of(&self, about: impl Fn(&VmRecord) -> bool) -> Option<VmRecord> {
        let st = lock(&self.state);
        let kept = st.records.values().filter(|k| k.all().any(&about)).max_by_key(|k| k.seq());
        kept.and_then(|k| k.all().next().cloned())
    }

    /// How a process stands that is to leave this host (`role` source) or to be filled here (target).
    #[must_use]
    pub fn standing(&self, subject: &Subject<'_>, asker: &Asker<'_>, role: Role) -> Standing {
        self.standing_in(&lock(&self.state), subject, asker, role)
    }

    /// Whether it may leave.
    pub fn may_leave(&self, subject: &Subject<'_>, asker: &Asker<'_>) -> Result<(), Refusal> {
        self.standing(subject, asker, Role::Source).allowed(asker.vm)
    }

    /// Whether it may be filled.
    pub fn may_arrive(&self, subject: &Subject<'_>, asker: &Asker<'_>) -> Result<(), Refusal> {
        self.standing(subject, asker, Role::Target).allowed(asker.vm)
    }

    fn standing_in(&self, st: &State, subject: &Subject<'_>, asker: &Asker<'_>, role: Role) -> Standing {
        let Some(kept) = self.newest_about(st, subject) else { return Standing::Free };
        let says = |r| match role {
            Role::Source => Standing::leaving(r, asker),
            Role::Target => Standing::arriving(r, asker),
        };
        kept.all().map(says).find(|s| *s != Standing::Free).unwrap_or(Standing::Free)
    }

    fn newest_about<'a>(&self, st: &'a State, subject: &Subject<'_>) -> Option<&'a Kept> {
        st.records.values().filter(|k| k.all().any(|r| self.is_about(r, subject))).max_by_key(|k| k.seq())
    }

    /// Whether the record is about this process. Where one of the two does not say which process it means (it is not
    /// visible from here, or its starter holds its monitor), the place where it is reached stands for it, with the VM's
    /// identity as far as both know one: a record of a process that has ended is about none that is there.
    fn is_about(&self, r: &VmRecord, subject: &Subject<'_>) -> bool {
        let same_place = || {
            let alike = match (&r.identity, subject.identity) {
                (Some(a), Some(b)) => a == b,
                _ => true,
            };
            r.front == *subject.front && alike
        };
        match (r.process, subject.process) {
            (Some(a), Some(b)) => a == b,
            (Some(a), None) => same_place() && !(self.gone)(a),
            (None, _) => same_place(),
        }
    }

    /// Whether a record may be acted on: no newer one is about its process.
    #[must_use]
    pub fn act_on(&self, r: &VmRecord) -> bool {
        let st = lock(&self.state);
        let newest = self.newest_about(&st, &Subject::of(r));
        newest.is_none_or(|k| k.all().any(|n| Key::of(n) == Key::of(r)))
    }

    /// The record of a VM in a run of a group.
    #[must_use]
    pub fn get(&self, group: &str, token: &Token, vm: &str, role: Role) -> Option<VmRecord> {
        let st = lock(&self.state);
        st.records.get(&Key::new(group, token, vm, role))?.all().next().cloned()
    }

    /// What its journal could not write last.
    #[must_use]
    pub fn problem(&self, group: &str, token: &Token, vm: &str, role: Role) -> Option<String> {
        lock(&self.state).records.get(&Key::new(group, token, vm, role))?.problem.clone()
    }

    /// All records, of one group or of all, the newest first.
    #[must_use]
    pub fn records(&self, group: Option<&str>) -> Vec<VmRecord> {
        let st = lock(&self.state);
        let mut all: Vec<VmRecord> = st
            .records
            .iter()
            .filter(|(k, _)| group.is_none_or(|g| k.group == g))
            .filter_map(|(_, k)| k.all().next().cloned())
            .collect();
        all.sort_by_key(|r| std::cmp::Reverse((r.seq, r.at_ns)));
        all
    }

    /// The records of the newest run of a group, by the VMs' numbers.
    #[must_use]
    pub fn last_run(&self, group: &str) -> Vec<VmRecord> {
        let mut all = self.records(Some(group));
        let token = all.first().map(|r| r.token);
        all.retain(|r| Some(r.token) == token);
        all.sort_by_key(|r| (r.ix, r.role == Role::Target));
        all
    }

    /// Whether the process of a record lives, as far as it is known.
    #[must_use]
    pub fn lives(&self, r: &VmRecord) -> Option<bool> {
        r.process.map(|p| !(self.gone)(p))
    }

    /// Nothing more is done for a run of a group, on an operator's word: what is final there counts as settled.
    pub fn close(&self, group: &str, token: &Token, why: &str) {
        let run = self.records(Some(group)).into_iter().filter(|r| r.token == *token);
        for r in run.filter(|r| r.state.is_final() && !r.settled) {
            self.shelve(r, why);
        }
    }

    /// The record is history from now on. It stays the one that it was, and is not a newer one about its process.
    pub fn shelve(&self, mut r: VmRecord, why: &str) {
        r.settled = true;
        r.why.get_or_insert_with(|| why.to_owned());
        let key = Key::of(&r);
        lock(&self.state).records.entry(key.clone()).or_default().maybe = Some(r.clone());
        if let Err(e) = self.write(&key, &r) {
            tracing::warn!("{e}");
        }
    }

    /// Removes records that are over, too old or too many, and about no process that lives.
    pub fn prune(&self, now_ns: u64) {
        let mut over: Vec<VmRecord> = self.records(None);
        over.retain(|r| r.is_over());
        let (gone, since) = (self.gone, now_ns.saturating_sub(HISTORY_NS));
        let stale: Vec<VmRecord> = over
            .into_iter()
            .enumerate()
            .filter(|(n, r)| *n >= MAX_HISTORY || r.at_ns < since)
            .filter(|(_, r)| r.process.is_none_or(gone))
            .map(|(_, r)| r)
            .collect();
        if stale.is_empty() {
            return;
        }
        if let Err(e) = self.journal.remove(&stale) {
            tracing::warn!("{e}");
            return;
        }
        let mut st = lock(&self.state);
        for r in &stale {
            st.records.remove(&Key::of(r));
        }
    }
}

#[cfg(test)]
mod tests;
