//! What the agent does to its core-facing port: tags by policy, IRLM's class tree where the port is free (or is to be
//! taken over), changes while it runs, and nothing left behind.
//!
//! Shaping helps others and the operator; a VM's safety does not hang on it. So nothing here keeps an agent from
//! starting: what cannot be done is logged, shown by `irlm policy show`, and left undone.

// Why it is not done.
pub mod error;
// Whose qdiscs they are, and putting them back.
pub mod port;
// What was there before, on disk.
pub mod record;

use super::api::{PolicyClass, PolicyStatus};
use super::policy;
use crate::core::policy::{Class, HtbClass, Marks, Policy, Shaping, markings};
use crate::net::tc::{self, Tc, TcError, What, show_handle};
use error::ShapeError;
use port::{Kernel, OUR_ROOT, Owner};
use record::{Place, Record};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Who tags packets: the eBPF classifier, or a stand-in.
pub trait Tagger: Send + std::fmt::Debug {
    /// Why no packet is tagged; `None` if they are.
    fn off(&self) -> Option<String>;
    /// Gives the packets of each class their marks from now on.
    fn set(&mut self, marks: &Marks, racks: &[(IpAddr, u8)]) -> Result<(), ShapeError>;
}

/// What is in force on the port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// Neither tags nor tree.
    Off,
    /// Tags; the qdiscs are somebody else's, or the kernel's.
    TagOnly,
    /// Our tree, where the kernel's default was.
    Own,
    /// Our tree, where somebody else's was.
    TakenOver,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::TagOnly => "tag-only",
            Self::Own => "own",
            Self::TakenOver => "taken-over",
        }
    }

    const fn has_tree(self) -> bool {
        matches!(self, Self::Own | Self::TakenOver)
    }
}

#[derive(Debug)]
struct State {
    iface: Option<String>,
    place: Place,
    kernel: Option<Box<dyn Kernel>>,
    tagger: Box<dyn Tagger>,
    policy: Option<Policy>,
    /// Whether the policy came by `irlm policy set`.
    live: bool,
    mode: Mode,
    why: String,
    index: i32,
    /// Our tree as it is in the kernel.
    tree: Vec<HtbClass>,
    budget: Option<u64>,
}

/// The port's keeper; dropping it takes away what it set up.
#[derive(Debug)]
pub struct Shaper(Mutex<State>);

impl Shaper {
    /// Removes or restores what a dead agent left on the port, and does what the policy says. `iface`: the port that
    /// agent.toml names; `policy`: what its policy file says.
    #[must_use]
    pub fn start(
        iface: Option<&str>,
        state_dir: &Path,
        policy: Option<Policy>,
        tagger: Box<dyn Tagger>,
    ) -> Self {
        let kernel = Tc::open().map(|tc| Box::new(tc) as Box<dyn Kernel>);
        Self::start_with(iface, state_dir, policy, tagger, kernel)
    }

    fn start_with(
        iface: Option<&str>,
        state_dir: &Path,
        policy: Option<Policy>,
        tagger: Box<dyn Tagger>,
        kernel: Result<Box<dyn Kernel>, TcError>,
    ) -> Self {
        let kernel = match kernel {
            Ok(k) => Some(k),
            Err(e) => {
                tracing::warn!("shaping: {e}");
                None
            }
        };
        let mut st = State {
            iface: iface.map(str::to_owned),
            place: Place::new(state_dir),
            kernel,
            tagger,
            policy: None,
            live: false,
            mode: Mode::Off,
            why: "no policy".into(),
            index: 0,
            tree: vec![],
            budget: None,
        };
        // What a killed agent left: its tags in the pinned maps, its tree on the port.
        if let Err(e) = st.tagger.set(&Marks::default(), &[]).and_then(|()| st.clean_up("a dead agent's")) {
            tracing::error!("shaping: {e}");
        }
        if let Some(p) = policy
            && let Err(e) = st.enforce(p)
        {
            tracing::error!("shaping: {e}");
            st.why = e.to_string();
        }
        if let Some(p) = &st.policy {
            let iface = st.iface.as_deref().unwrap_or("-");
            tracing::info!("shaping {} on {iface} ({} asked): {}", st.mode.name(), p.shaping.name(), st.why);
        }
        Self(Mutex::new(st))
    }

    /// Another policy from now on. If it cannot be had the old one stays.
    pub fn set_policy(&self, text: &str) -> Result<(), ShapeError> {
        let new = policy::parse(text)?;
        let mut st = self.lock();
        let old = st.policy.clone();
        if let Err(e) = st.enforce(new) {
            if let Some(old) = old
                && let Err(again) = st.enforce(old)
            {
                tracing::error!("shaping: the old policy cannot be had again either: {again}");
            }
            return Err(ShapeError::OldPolicyStays(Box::new(e)));
        }
        st.live = true;
        tracing::info!("shaping {}: {}", st.mode.name(), st.why);
        Ok(())
    }

    /// Whether our tree is there, so that [`Shaper::set_budget`] holds.
    #[must_use]
    pub fn has_tree(&self) -> bool {
        self.lock().mode.has_tree()
    }

    /// Most that what crosses the core link may use, bit/s; none: what the policy says. Without our tree it is only
    /// noted.
    pub fn set_budget(&self, bits: Option<u64>) -> Result<(), ShapeError> {
        let mut st = self.lock();
        if st.budget == bits {
            return Ok(());
        }
        let before = std::mem::replace(&mut st.budget, bits);
        // What is not in force is not to be believed in force.
        st.adjust().inspect_err(|_| st.budget = before)
    }

    /// What migration may use of the port by its policy, bit/s; none: no policy says.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        let st = self.lock();
        let p = st.policy.as_ref()?;
        Some(p.class(Class::Bulk).ceil.min(p.migration()))
    }

    /// What is in force, and what the kernel counted.
    #[must_use]
    pub fn status(&self) -> PolicyStatus {
        self.lock().status()
    }

    /// Takes away what was set up, and puts back what was there.
    pub fn stop(&self) {
        let mut st = self.lock();
        if let Err(e) = st.tear_down() {
            tracing::error!("shaping: {e}; the next start of the agent tries again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each step leaves a state that the next one can start from.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    /// Takes away what is ours on the port and puts back what was there. `whose`: for the log.
    fn clean_up(&mut self, whose: &str) -> Result<(), ShapeError> {
        let Some(kernel) = self.kernel.as_deref_mut() else { return Ok(()) };
        let path = self.place.path().display().to_string();
        let left = match self.place.load() {
            Ok(r) => r,
            Err(e) => {
                // Without it nobody knows what was there, but what is ours is known by its handle.
                tracing::error!("{path}: what was on the port before cannot be read: {e}");
                None
            }
        };
        // A port that the configuration does not name any more, too.
        let iface = left.as_ref().map(|r| r.iface.clone()).or_else(|| self.iface.clone());
        let Some(iface) = iface else { return Ok(()) };
        let index = match kernel.index(&iface) {
            Ok(i) => i,
            Err(TcError::NoInterface(_)) if left.is_some() => {
                tracing::warn!("shaping: {iface} is gone, and with it {whose} tree");
                return self.place.remove().map_err(|source| ShapeError::Record { path, source });
            }
            Err(e) => return Err(e.into()),
        };
        let before = left.as_ref().map_or(&[][..], |r| &r.before);
        match port::owner(kernel, index)? {
            Owner::Ours if before.is_empty() => {
                kernel.apply(&tc::delete_root(index, OUR_ROOT))?;
                tracing::info!("{iface}: {whose} class tree is removed");
            }
            Owner::Kernel if before.is_empty() => {}
            Owner::Foreign { what, handle } if before.first().is_none_or(|o| o.handle() != handle) => {
                if left.is_some() {
                    tracing::warn!("{iface}: {whose} tree is gone, {what} is there now: left alone");
                }
            }
            // Ours, or nothing yet or again, or a part of what was there.
            _ => {
                port::make_again(kernel, index, before)
                    .map_err(|e| ShapeError::NotRestored(format!("{iface}: restoring: {e} ({path})")))?;
                tracing::info!("{iface}: the qdiscs that were there before {whose} tree are restored");
            }
        }
        self.place.remove().map_err(|source| ShapeError::Record { path, source })
    }

    /// Does what `new` says, from whatever is in force now.
    fn enforce(&mut self, new: Policy) -> Result<(), ShapeError> {
        if let Some(reason) = self.tagger.off() {
            // A tree without tags would take all migration for others.
            self.tear_down()?;
            self.policy = Some(new);
            self.mode = Mode::Off;
            self.why = format!("packets cannot be told apart: {reason}");
            return Ok(());
        }
        let keeps = match (self.mode, new.shaping) {
            (Mode::Own | Mode::TakenOver, Shaping::Own | Shaping::TakeOver) => true,
            (Mode::Own | Mode::TakenOver, Shaping::Off) => {
                self.tear_down()?;
                false
            }
            _ => false,
        };
        if keeps {
            let tree = new.tree(self.budget);
            self.change_to(tree)?;
        } else {
            (self.mode, self.why) = self.choose(&new)?;
        }
        let marks = markings(Some(&new), self.mode.has_tree());
        self.tagger.set(&marks, &new.rack_prefixes)?;
        self.policy = Some(new);
        Ok(())
    }

    /// Sets the tree up if it may be there.
    fn choose(&mut self, new: &Policy) -> Result<(Mode, String), ShapeError> {
        if new.shaping == Shaping::Off {
            return Ok((Mode::TagOnly, "the policy says so".into()));
        }
        let iface = self
            .iface
            .clone()
            .ok_or_else(|| ShapeError::Port("no core_iface in agent.toml: which port?".into()))?;
        let Some(kernel) = self.kernel.as_deref_mut() else {
            return Err(ShapeError::Port("no rtnetlink".into()));
        };
        let index = kernel.index(&iface)?;
        self.index = index;
        let (mode, before, why) = match port::owner(kernel, index)? {
            Owner::Kernel => (Mode::Own, vec![], "the port was free".to_owned()),
            Owner::Ours => {
                return Err(ShapeError::Port(format!("{iface}: another agent's class tree is there")));
            }
            Owner::Foreign { what, .. } if new.shaping == Shaping::Own => {
                let why = format!("{iface} has {what}, which is somebody else's: left alone");
                return Ok((Mode::TagOnly, why));
            }
            Owner::Foreign { what, .. } => {
                let before = port::read_tree(kernel, index)?;
                if let Err(e) = kernel.rehearse(&before) {
                    let why =
                        format!("{iface}: {what} is not taken over, because it could not be restored: {e}");
                    tracing::error!("shaping: {why}");
                    return Ok((Mode::TagOnly, why));
                }
                (Mode::TakenOver, before, format!("{what} was there, and comes back when the agent ends"))
            }
        };
        let path = self.place.path().display().to_string();
        self.place.save(&Record { iface, before }).map_err(|source| ShapeError::Record { path, source })?;
        self.mode = mode;
        let tree = new.tree(self.budget);
        if let Err(e) = port::set_up(kernel, index, &tree) {
            if let Err(e) = self.tear_down() {
                tracing::error!("shaping: {e}");
            }
            return Err(e.into());
        }
        self.tree = tree;
        Ok((mode, why))
    }

    /// Changes the tree in place.
    fn change_to(&mut self, tree: Vec<HtbClass>) -> Result<(), ShapeError> {
        let Some(kernel) = self.kernel.as_deref_mut() else {
            return Err(ShapeError::Port("no rtnetlink".into()));
        };
        if let Err(e) = port::change(kernel, self.index, &self.tree, &tree) {
            // Some of it may be in force: back to where it was, as far as that goes.
            if let Err(back) = port::change(kernel, self.index, &tree, &self.tree) {
                tracing::error!("shaping: {back}");
            }
            return Err(e.into());
        }
        self.tree = tree;
        Ok(())
    }

    /// Fits the tree to the budget.
    fn adjust(&mut self) -> Result<(), ShapeError> {
        match &self.policy {
            Some(p) if self.mode.has_tree() => {
                let tree = p.tree(self.budget);
                self.change_to(tree)
            }
            _ => Ok(()),
        }
    }

    fn tear_down(&mut self) -> Result<(), ShapeError> {
        if !self.mode.has_tree() {
            return Ok(());
        }
        self.mode = Mode::TagOnly;
        self.tree.clear();
        self.clean_up("this agent's")
    }

    fn status(&mut self) -> PolicyStatus {
        let mut classes: Vec<PolicyClass> = self
            .tree
            .iter()
            .map(|c| PolicyClass {
                name: c.name.to_owned(),
                id: show_handle(c.classid()),
                parent: (c.parent != 0).then(|| show_handle(c.parent_id())),
                rate: c.rate,
                ceil: c.ceil,
                prio: (c.queue > 0).then_some(c.prio),
                queue: c.queue,
                ..PolicyClass::default()
            })
            .collect();
        let mut note = None;
        if let (true, Some(kernel)) = (self.mode.has_tree(), self.kernel.as_deref_mut()) {
            match kernel.dump(What::Class, self.index, 0) {
                Ok(all) => {
                    for (c, own) in classes.iter_mut().zip(&self.tree) {
                        let Some(o) = all.iter().find(|o| o.handle() == own.classid()) else {
                            note = Some(format!("class {} is gone: somebody took it away", c.id));
                            continue;
                        };
                        let s = o.stats();
                        (c.bytes, c.packets, c.dropped) =
                            (s.bytes, u64::from(s.packets), u64::from(s.dropped));
                        c.backlog = u64::from(s.backlog);
                    }
                }
                Err(e) => note = Some(e.to_string()),
            }
        }
        if let Some(p) = &self.policy {
            for class in Class::ALL {
                let set = p.class(class);
                let at = classes.iter().position(|c| c.name == class.name());
                let c = match at {
                    Some(i) => &mut classes[i],
                    None => {
                        let (name, id) = (class.name().to_owned(), "-".to_owned());
                        classes.push(PolicyClass {
                            name,
                            id,
                            rate: set.min,
                            ceil: set.ceil,
                            ..PolicyClass::default()
                        });
                        let last = classes.len() - 1;
                        &mut classes[last]
                    }
                };
                (c.dscp, c.mark) = (set.dscp, set.mark);
                let own = class.classid();
                let priority = if self.mode.has_tree() { own } else { set.priority.unwrap_or(own) };
                c.priority = (self.mode != Mode::Off).then(|| show_handle(priority));
            }
        }
        PolicyStatus {
            mode: self.mode.name().to_owned(),
            why: note.unwrap_or_else(|| self.why.clone()),
            iface: self.iface.clone(),
            asked: self.policy.as_ref().map(|p| p.shaping.name().to_owned()),
            live: self.live,
            link: self.policy.as_ref().map(|p| p.link),
            others: self.policy.as_ref().map(|p| p.others),
            migration: self.policy.as_ref().map(Policy::migration),
            share: self.budget,
            shared_by: None,
            classes,
        }
    }
}

#[cfg(test)]
mod tests;
