//! Who may ask this agent for what (`core::identity`): by the certificate that a caller has shown.

use super::Shared;
use crate::control::allow::NotAllowed;
use crate::control::api::{
    Certificate, Code, GroupSpec, Incoming, KeysStatus, Refusal, Reply, Request, VmSpec,
};
use crate::control::journal::run_of;
use crate::core::identity::{Identity, NoIdentity, Refused, Role, Subject, identify, may};
use crate::flow::Front;
use crate::net::tls::{CLIENT, Expiry};
use std::net::SocketAddr;

impl Shared {
    /// Who a caller is: nobody in particular in plain text, where everybody may do everything.
    pub(super) fn admission(&self, leaf: Option<&[u8]>) -> Result<Option<Identity>, Refusal> {
        if self.keys.is_none() {
            return Ok(None);
        }
        let leaf = leaf.ok_or(NoIdentity::Absent);
        let who = leaf.and_then(|leaf| identify(leaf, &self.config.roles));
        who.map(Some).map_err(|e| Refusal::new(Code::NotAllowed, e.to_string()))
    }

    /// Refuses what this caller may not ask for.
    pub(super) fn admit(&self, who: Option<&Identity>, request: &Request) -> Result<(), Refusal> {
        let Some(who) = who else { return Ok(()) };
        let known = request.group().and_then(|name| self.group(name).ok());
        let spec = known.as_ref().map(|g| &g.spec);
        let tenants = request.tenants().or(spec.map(|s| &s.tenants[..]));
        let host = match request {
            Request::Released { vm, .. } => spec.and_then(|s| source_of(s, *vm)),
            _ => None,
        };
        let about = Subject { tenants, host };
        may(who, request.ask(), about).map_err(|e| match e {
            // Whose a group is that the caller only names, he is not told, nor whether there is one.
            Refused::Tenant { who, ask, .. } | Refused::NoGroup { who, ask }
                if request.tenants().is_none() =>
            {
                Refusal::new(Code::UnknownGroup, Refused::NoGroup { who, ask }.to_string())
            }
            e => Refusal::new(Code::NotAllowed, e.to_string()),
        })
    }

    /// The hosts whose agent this one is to the others, by the certificate with which it calls them; `None` in plain text.
    pub(super) fn calls_as(&self) -> Option<Vec<String>> {
        let leaf = self.keys.as_ref()?.client_leaf()?;
        // Without a role it is no host's.
        Some(identify(&leaf, &self.config.roles).map(|who| hosts_of(&who)).unwrap_or_default())
    }

    /// Why other agents would take this one for no agent, or for another host's, if they know it by its own name.
    pub(super) fn other_name(&self) -> Option<String> {
        let keys = self.keys.as_ref()?;
        let (leaf, name) = (keys.client_leaf()?, &self.config.name);
        let says = match identify(&leaf, &self.config.roles) {
            Ok(who) if who.is_agent(name) => return None,
            Ok(who) if hosts_of(&who).is_empty() => format!("it is that of {who}"),
            Ok(who) => format!("it is that of the agent of {}", hosts_of(&who).join(", ")),
            Err(e) => e.to_string(),
        };
        Some(format!(
            "{CLIENT}: other agents do not take this one for that of host {name} by its certificate, so groups in which the \
             host has this name are refused: {says}"
        ))
    }

    /// What is said of this agent's certificates.
    pub(super) fn keys_status(&self) -> Option<KeysStatus> {
        let keys = self.keys.as_ref()?;
        let of = |e: Expiry| Certificate { file: e.file, subject: e.subject, not_after: e.not_after };
        Some(KeysStatus {
            certificates: keys.expiry().into_iter().map(of).collect(),
            problem: keys.problem(),
        })
    }

    /// Refuses a group that makes no sense, or that would have this agent touch what it may not (`[allow]`).
    pub(super) fn usable(&self, spec: &GroupSpec) -> Result<(), Refusal> {
        spec.check().map_err(|e| Refusal::new(Code::BadRequest, e.0))?;
        let allow = &self.config.allow;
        let mut outside: Vec<NotAllowed> =
            spec.tenants.iter().filter_map(|t| allow.tenant(t).err()).collect();
        outside.extend(
            spec.vms.iter().flat_map(|v| here(spec, v)).filter_map(|f| allow.socket(f.socket()).err()),
        );
        outside.extend(dialled(spec).into_iter().filter_map(|(what, addr)| allow.network(what, addr).err()));
        if outside.is_empty() {
            return Ok(());
        }
        let outside: Vec<String> = outside.iter().map(ToString::to_string).collect();
        Err(Refusal::new(Code::OffLimits, format!("agent {}: {}", self.config.name, outside.join("; "))))
    }

    /// Refuses to send VMs elsewhere than to their target hosts, whoever says that they listen there.
    pub(super) fn may_leave_to(&self, spec: &GroupSpec, incoming: &[Incoming]) -> Result<(), Refusal> {
        for i in incoming {
            let vm = spec.vms.iter().find(|v| v.ix == i.vm && Some(v.source) == spec.my_source);
            let Some(target) = vm.and_then(|v| spec.targets.get(usize::from(v.target))) else { continue };
            let what = format!("target host {}: QEMU", target.name);
            if !self.config.allow.takes(i.addr)
                || ![target.data.ip(), target.agent.ip()].contains(&i.addr.ip())
            {
                let what = format!(
                    "agent {}: {what} cannot listen on {}: that is not its host",
                    self.config.name, i.addr
                );
                return Err(Refusal::new(Code::OffLimits, what));
            }
        }
        Ok(())
    }

    /// An answer with what is said to this caller alone, and without what concerns trust domains that it may not see.
    pub(super) fn seen_by(&self, who: Option<&Identity>, mut reply: Reply) -> Reply {
        let Some(who) = who else { return reply };
        // A name may have been another's before.
        let may_see = |group: &str, run: Option<&str>| {
            let known = self.group(group).ok();
            let known = known.filter(|g| run.is_none_or(|run| run == run_of(&g.spec.token)));
            // Nobody knows any more whose a forgotten group was.
            let tenants = known.as_ref().map_or(&[][..], |g| &g.spec.tenants);
            who.may_see(tenants.iter().map(String::as_str))
        };
        match &mut reply {
            Reply::Hello { you, .. } => *you = Some(hosts_of(who)),
            Reply::Status { groups, .. } => groups.retain(|g| may_see(&g.group, None)),
            Reply::History { rows, .. } => rows.retain(|r| may_see(&r.group, Some(&r.run))),
            _ => {}
        }
        reply
    }
}

/// The hosts whose agent somebody is.
fn hosts_of(who: &Identity) -> Vec<String> {
    let host = |r: &Role| if let Role::Agent(host) = r { Some(host.clone()) } else { None };
    who.roles.iter().filter_map(host).collect()
}

/// The sockets of a VM that are this host's.
fn here<'a>(spec: &GroupSpec, v: &'a VmSpec) -> impl Iterator<Item = &'a Front> + use<'a> {
    let source = (spec.my_source == Some(v.source)).then_some(&v.source_front);
    let target = (spec.my_target == Some(v.target)).then_some(&v.target_front);
    source.into_iter().chain(target)
}

/// Where the group may have this host connect.
fn dialled(spec: &GroupSpec) -> Vec<(String, SocketAddr)> {
    let mut out = Vec::new();
    for t in &spec.targets {
        out.push((format!("target host {}: agent", t.name), t.agent));
        out.push((format!("target host {}: data", t.name), t.data));
    }
    for s in &spec.sources {
        out.push((format!("source host {}: agent", s.name), s.agent));
        out.extend(s.data.map(|data| (format!("source host {}: data", s.name), data)));
    }
    out.extend(spec.recipe.rack().map(|r| ("index".to_owned(), r.index)));
    out
}

/// The source host of a VM of the group, by its name there.
fn source_of(spec: &GroupSpec, vm: u16) -> Option<&str> {
    let vm = spec.vms.iter().find(|v| v.ix == vm)?;
    spec.sources.get(usize::from(vm.source)).map(|s| s.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::super::inpath::InPath;
    use super::super::tests::{agent, spec};
    use super::super::{Group, Work};
    use super::*;
    use crate::control::api::HistoryRow;
    use crate::core::identity::Tenants;
    use crate::flow::lock;
    use crate::net::connection::tests::credentials_of;
    use std::path::Path;
    use std::sync::Arc;

    fn who(role: Role) -> Identity {
        Identity { name: "n".into(), roles: vec![role] }
    }

    /// A group of tenant `shop`, whose source is `s1`, that the agent keeps.
    fn kept(agent: &Arc<Shared>, dir: &Path) -> GroupSpec {
        let mut group = spec("g", 1, &dir.join("v.qmp"));
        group.tenants = vec!["shop".into()];
        group.sources[0].name = "s1".into();
        let recipe = group.recipe.proxied().unwrap();
        let work = Work::InPath(InPath::new(agent, (&group, recipe), &Arc::default()).unwrap());
        lock(&agent.groups).insert("g".into(), Arc::new(Group::taken_up(group.clone(), work)));
        group
    }

    #[test]
    fn a_caller_is_told_and_given_only_what_its_role_allows() {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path());
        let group = kept(&agent, dir.path());
        let of = |tenants: &[&str]| {
            who(Role::Coordinator(Tenants::Listed(tenants.iter().map(|t| (*t).to_owned()).collect())))
        };
        let cancel = |group: &str| Request::Cancel { group: group.into() };
        let prepare = Request::Prepare { spec: Box::new(group.clone()) };
        let released = |vm| Request::Released {
            group: "g".into(),
            token: group.token,
            vm,
            guest: crate::core::handover::GuestState::Running,
        };
        let vm = group.vms[0].ix;
        let code = |who: &Identity, request: &Request| agent.admit(Some(who), request).map_err(|e| e.code);
        let cases: [(Identity, Request, Result<(), Code>); 15] = [
            (who(Role::Operator), cancel("g"), Ok(())),
            (who(Role::Operator), cancel("none"), Ok(())),
            (who(Role::Operator), released(vm), Err(Code::NotAllowed)),
            (who(Role::Viewer), Request::Status { group: None }, Ok(())),
            (who(Role::Viewer), cancel("g"), Err(Code::NotAllowed)),
            (who(Role::Viewer), prepare.clone(), Err(Code::NotAllowed)),
            (of(&["shop"]), cancel("g"), Ok(())),
            (of(&["shop", "bank"]), prepare.clone(), Ok(())),
            (of(&["bank"]), cancel("g"), Err(Code::UnknownGroup)),
            (of(&["bank"]), prepare, Err(Code::NotAllowed)),
            (of(&["shop"]), cancel("none"), Err(Code::UnknownGroup)),
            (of(&["shop"]), Request::PolicySet { text: String::new() }, Err(Code::NotAllowed)),
            (who(Role::Agent("s1".into())), released(vm), Ok(())),
            (who(Role::Agent("s2".into())), released(vm), Err(Code::NotAllowed)),
            (who(Role::Agent("s1".into())), cancel("g"), Err(Code::NotAllowed)),
        ];
        for (caller, request, want) in &cases {
            assert_eq!(code(caller, request), *want, "{caller}: {request:?}");
        }
        let seen = |caller: &Identity| {
            let reply = agent.does(Request::Status { group: None }).unwrap();
            let Reply::Status { groups, .. } = agent.seen_by(Some(caller), reply) else { panic!() };
            groups.len()
        };
        assert_eq!((seen(&who(Role::Viewer)), seen(&of(&["shop"])), seen(&of(&["bank"]))), (1, 1, 0));
        // Plain text: nobody is asked.
        assert_eq!(agent.admit(None, &cancel("g")), Ok(()));
        assert_eq!(agent.admission(None), Ok(None));
    }

    /// The peers of an agent go by its certificate, whatever its own file calls the host.
    #[test]
    fn an_agent_says_whose_agent_its_certificate_makes_it_and_if_that_is_not_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let with = |role: Option<Role>| {
            let mut agent = agent(dir.path());
            Arc::get_mut(&mut agent).unwrap().keys = role.map(|role| credentials_of(&[role]).remove(0));
            (agent.calls_as(), agent.other_name())
        };
        // Its name in agent.toml is `a`.
        assert_eq!(with(None), (None, None));
        assert_eq!(with(Some(Role::Agent("a".into()))), (Some(vec!["a".into()]), None));
        let (hosts, line) = with(Some(Role::Agent("s9".into())));
        assert_eq!(hosts, Some(vec!["s9".into()]));
        let line = line.unwrap();
        assert!(
            line.contains("host a") && line.contains("that of the agent of s9") && !line.contains("  "),
            "{line}"
        );
        let (hosts, line) = with(Some(Role::Viewer));
        assert_eq!(hosts, Some(vec![]));
        assert!(line.unwrap().contains("(viewer)"));
    }

    /// A group of a name that another one had before shows nothing of that one.
    #[test]
    fn the_records_of_an_earlier_group_are_not_those_of_whoever_takes_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path());
        let group = kept(&agent, dir.path());
        let row = |run: String| HistoryRow {
            group: "g".into(),
            run,
            method: crate::control::terms::Method::Irlm,
            vm: "bank2".into(),
            role: crate::control::api::Role::Source,
            outcome: "moved".into(),
            over: true,
            peer: "127.0.0.1:9".parse().unwrap(),
            started_ns: 1,
            at_ns: 2,
            alive: None,
            doubt: None,
            why: None,
        };
        let rows = vec![row(run_of(&group.token)), row("01020304".into())];
        let reply = Reply::History { name: "a".into(), rows, left_off: 0 };
        let shop = who(Role::Coordinator(Tenants::Listed(vec!["shop".into()])));
        let Reply::History { rows, .. } = agent.seen_by(Some(&shop), reply.clone()) else { panic!() };
        assert_eq!(rows.iter().map(|r| &*r.run).collect::<Vec<_>>(), [run_of(&group.token)]);
        let Reply::History { rows, .. } = agent.seen_by(Some(&who(Role::Viewer)), reply) else { panic!() };
        assert_eq!(rows.len(), 2);
    }

    /// Whoever starts a group says where plain QEMUs listen.
    #[test]
    fn a_vm_is_sent_nowhere_but_to_its_target_host() {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(dir.path());
        Arc::get_mut(&mut agent).unwrap().config.allow =
            toml::from_str("networks = [\"127.0.0.1/32\"]").unwrap();
        let group = spec("g", 1, &dir.path().join("v.qmp"));
        let to = |addr: &str| {
            agent.may_leave_to(&group, &[Incoming { vm: group.vms[0].ix, addr: addr.parse().unwrap() }])
        };
        let target = group.targets[0].data.ip();
        assert_eq!(to(&format!("{target}:4444")), Ok(()));
        for elsewhere in ["127.0.0.77:17888", "198.51.100.1:4444"] {
            let refused = to(elsewhere).unwrap_err();
            assert!(refused.code == Code::OffLimits && refused.msg.contains(elsewhere), "{refused}");
        }
        // Its host's, and not one that this agent may use.
        let mut only = agent;
        Arc::get_mut(&mut only).unwrap().config.allow =
            toml::from_str("networks = [\"10.0.0.0/8\"]").unwrap();
        let addr = format!("{target}:4444").parse().unwrap();
        let refused = only.may_leave_to(&group, &[Incoming { vm: group.vms[0].ix, addr }]).unwrap_err();
        assert_eq!(refused.code, Code::OffLimits);
    }

    #[test]
    fn a_group_is_held_against_all_that_it_would_have_this_agent_touch() {
        let dir = tempfile::tempdir().unwrap();
        let only = |text: &str| {
            let mut agent = agent(dir.path());
            Arc::get_mut(&mut agent).unwrap().config.allow = toml::from_str(text).unwrap();
            agent
        };
        let mut group = spec("g", 1, &dir.path().join("v.qmp"));
        let here = format!("sockets = [\"{}/*\"]\n", dir.path().display());
        let said = |text: &str, spec: &GroupSpec| only(text).usable(spec).err().map(|e| (e.code, e.msg));
        assert_eq!(said(&here, &group), None);
        let (code, why) = said(&format!("{here}networks = [\"10.0.0.0/8\"]"), &group).unwrap();
        assert!(code == Code::OffLimits && why.contains("index 127.0.0.1:9 is not in a network"), "{why}");
        let (_, why) = said(&format!("{here}tenants = [\"shop-*\"]"), &group).unwrap();
        assert!(why.contains("tenant \"\" is not among"), "{why}");
        // Whatever it is that a caller asks for.
        let agent = only("sockets = [\"/nowhere/*\"]");
        for request in [
            Request::Preflight { spec: Box::new(group.clone()), vms_only: true },
            Request::Prepare { spec: Box::new(group.clone()) },
            Request::Observe { spec: Box::new(group.clone()), seconds: 1, one_in: 1 },
        ] {
            assert_eq!(agent.does(request.clone()).unwrap_err().code, Code::OffLimits, "{request:?}");
        }
        // The other side's sockets are the other agent's matter.
        (group.my_source, group.my_target) = (None, Some(group.vms[0].target));
        group.vms[0].target_front = Front::Qmp("/nowhere/v.qmp".into());
        assert_eq!(agent.usable(&group), Ok(()));
    }
}
