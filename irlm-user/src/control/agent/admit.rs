//! Who may ask this agent for what (`core::identity`): by the certificate that a caller has shown.

use super::Shared;
use crate::control::api::{Code, GroupSpec, Refusal, Reply, Request};
use crate::core::identity::{Identity, NoIdentity, Refused, Subject, identify, may};

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
        may(who, request.ask(), about).map_err(|e| {
            // As everybody is told of a group that is not known here.
            let code =
                if matches!(e, Refused::NoGroup { .. }) { Code::UnknownGroup } else { Code::NotAllowed };
            Refusal::new(code, e.to_string())
        })
    }

    /// An answer without what concerns trust domains that this caller may not see.
    pub(super) fn seen_by(&self, who: Option<&Identity>, mut reply: Reply) -> Reply {
        let Some(who) = who else { return reply };
        let may_see = |group: &str| {
            let known = self.group(group).ok();
            // Nobody knows any more whose a forgotten group was.
            let tenants = known.as_ref().map_or(&[][..], |g| &g.spec.tenants);
            who.may_see(tenants.iter().map(String::as_str))
        };
        match &mut reply {
            Reply::Status { groups, .. } => groups.retain(|g| may_see(&g.group)),
            Reply::History { rows, .. } => rows.retain(|r| may_see(&r.group)),
            _ => {}
        }
        reply
    }
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
    use crate::core::identity::{Role, Tenants};
    use crate::flow::lock;

    fn who(role: Role) -> Identity {
        Identity { name: "n".into(), roles: vec![role] }
    }

    #[test]
    fn a_caller_is_told_and_given_only_what_its_role_allows() {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path());
        let mut group = spec("g", 1, &dir.path().join("v.qmp"));
        group.tenants = vec!["shop".into()];
        group.sources[0].name = "s1".into();
        let work = Work::InPath(
            InPath::new(&agent, (&group, group.recipe.proxied().unwrap()), &std::sync::Arc::default())
                .unwrap(),
        );
        lock(&agent.groups).insert("g".into(), std::sync::Arc::new(Group::taken_up(group.clone(), work)));
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
            (of(&["bank"]), cancel("g"), Err(Code::NotAllowed)),
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
            let reply = agent.handle(Request::Status { group: None }).unwrap();
            let Reply::Status { groups, .. } = agent.seen_by(Some(caller), reply) else { panic!() };
            groups.len()
        };
        assert_eq!((seen(&who(Role::Viewer)), seen(&of(&["shop"])), seen(&of(&["bank"]))), (1, 1, 0));
        // Plain text: nobody is asked.
        assert_eq!(agent.admit(None, &cancel("g")), Ok(()));
        assert_eq!(agent.admission(None), Ok(None));
    }
}
