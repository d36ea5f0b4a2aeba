//! Files that people write, `agent.toml`, `group.toml` and `policy.toml`: each is taken or refused with one line, and a
//! group that is taken can be told to its agents, who take it too.

use irlm_user::control::config::{AgentConfig, GroupConfig};
use irlm_user::control::coordinator::plan::Plan;
use irlm_user::control::policy;
use irlm_user::control::terms::Method;
use irlm_user::core::policy::{Policy, markings};

pub(crate) fn target(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(e) = AgentConfig::parse(text) {
        assert!(!e.0.contains('\n'), "{e}");
    }
    match GroupConfig::parse(text) {
        Ok(config) => told(&config),
        Err(e) => assert!(!e.0.contains('\n'), "{e}"),
    }
    match policy::parse(text) {
        Ok(p) => in_force(&p),
        Err(e) => assert!(!e.0.contains('\n'), "{e}"),
    }
}

/// Every agent checks what it is told: a file that `irlm evacuate` takes must not fail there.
fn told(config: &GroupConfig) {
    for method in [None, Some(Method::Irlm), Some(Method::Gm), Some(Method::Oc), Some(Method::QemuMultifdZstd)] {
        let Ok(plan) = Plan::new(config.clone(), method) else { continue };
        for agent in &plan.agents {
            if let Err(e) = agent.spec.check() {
                panic!("{} refuses what the group's file says: {e}", agent.name);
            }
        }
    }
    let _ = Plan::to_watch(config.clone());
}

/// Whatever share of the core link a host has, no class has more than its parent.
fn in_force(p: &Policy) {
    for budget in [None, Some(0), Some(1_000_000), Some(u64::MAX)] {
        let tree = p.tree(budget);
        for class in &tree {
            assert!(class.rate <= class.ceil, "{class:?}");
            if let Some(parent) = tree.iter().find(|c| c.minor == class.parent && c.minor != class.minor) {
                assert!(class.ceil <= parent.ceil, "{class:?} in {parent:?}");
            }
        }
    }
    for tree in [false, true] {
        let _ = markings(Some(p), tree);
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let agent = include_str!("../../../../docs/examples/agent.toml");
    let group = include_str!("../../../../docs/examples/group.toml");
    let policy = include_str!("../../../../docs/examples/policy.toml");
    // Keys without the words about them are what mutations should meet.
    let bare = |text: &str| -> String {
        let key = |l: &&str| !l.is_empty() && !l.starts_with("# ");
        text.lines().filter(key).flat_map(|l| [l.trim_start_matches('#'), "\n"]).collect()
    };
    let roles = "[roles]\nuris = false\noperator = [\"cn:Ann*\"]\nagent = [\"*.example.org\"]\n\
                 coordinator = [{ name = \"uri:spiffe://example.org/*\", tenants = [\"shop\"] }]\n";
    let list = [agent.to_owned(), group.to_owned(), policy.to_owned(), bare(agent), bare(group), bare(policy)];
    let mut seeds: Vec<Vec<u8>> = list.into_iter().map(String::into_bytes).collect();
    seeds.push(format!("name = \"s1\"\n{roles}").into_bytes());
    seeds
}
