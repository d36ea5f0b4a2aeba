//! Every combination that a group file can write down, and what it comes to.

use super::*;
use crate::control::config::{GroupConfig, VmConfig};
use crate::core::account::Pages;
use std::collections::{BTreeMap, BTreeSet, HashSet};

const METHODS: [Method; 4] = [Method::Oc, Method::QemuMultifdZstd, Method::Gm, Method::Irlm];

/// A group of so many target hosts, and who runs its VM.
fn group(targets: usize, kind: &str) -> GroupConfig {
    let mut text = "name='g'\n[[source]]\nname='s0'\nagent='127.0.0.1:1'\n\
                    [[source]]\nname='s1'\nagent='127.0.0.1:2'\n"
        .to_owned();
    for t in 0..targets {
        text += &format!("[[target]]\nname='t{t}'\nagent='127.0.0.1:{}'\ndata='127.0.0.1:9'\n", 10 + t);
    }
    text += &format!("[[vm]]\nname='v'\nsource='s0'\ntarget='t0'\nsource_{kind}='/a'\ntarget_{kind}='/b'\n");
    GroupConfig::parse(&text).unwrap()
}

/// Everything that can be written down together, with the method.
fn all() -> Vec<(GroupConfig, Method)> {
    let cast = MulticastConfig {
        group: "239.1.1.1:7000".parse().unwrap(),
        mtu: 1500,
        floor_mbit: 5,
        ceiling_mbit: None,
    };
    let mut out = Vec::new();
    for method in METHODS {
        for (targets, kind) in [(1, "qmp"), (3, "qmp"), (3, "vmm")] {
            let group = group(targets, kind);
            for bits in 0..384_u32 {
                for compress in [Mode::Auto, Mode::Off, Mode::Forwarded, Mode::Level(3)] {
                    for direct in [Direct::Auto, Direct::Never, Direct::Always] {
                        for migration in [Migration::PreCopy, Migration::PostCopy, Migration::Hybrid] {
                            let bit = |n: u32| bits >> n & 1 == 1;
                            let mut c = group.clone();
                            (c.compress, c.direct, c.migration) = (compress, direct, migration);
                            (c.differences, c.models, c.hold_back) = (bit(0), bit(1), bit(2));
                            c.index = bit(3).then(|| "127.0.0.1:8".parse().unwrap());
                            c.budget_mbit = bit(4).then_some(100);
                            c.multicast = bit(5).then_some(cast);
                            c.digest = if bit(6) { Algorithm::Sha1 } else { Algorithm::Blake3 };
                            c.verify.pages = [Pages::Off, Pages::Stream, Pages::Ram][(bits >> 7) as usize];
                            out.push((c, method));
                        }
                    }
                }
            }
        }
    }
    out
}

#[test]
fn every_combination_comes_to_one_of_the_recipes_that_there_are_or_is_refused_with_its_reason() {
    let mut recipes: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut refused = HashSet::new();
    for (c, method) in all() {
        let found = Recipe::resolve(&c, method);
        match &found {
            Ok(r) => {
                recipes.entry(method.name()).or_default().insert(r.to_string());
                let text = serde_json::to_string(r).unwrap();
                assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), *r, "{text}");
                for v in &c.vm {
                    assert!(r.takes(&v.fronts().unwrap().0), "{r}");
                }
                let Some(rack) = r.rack() else { continue };
                let differs = r.proxied().unwrap().contents.differences();
                assert!(differs || !rack.models, "nothing differs from what is lent: {r}");
                assert!(rack.multicast.is_none() || c.target.len() > 2, "{r}");
                assert!(rack.direct == Direct::Never || c.budget_mbit.is_none(), "nobody keeps it: {r}");
            }
            Err(e) => drop(refused.insert(std::mem::discriminant(e))),
        }
        let vmm = c.vm[0].source_vmm.is_some();
        let why = match method {
            Method::Oc | Method::QemuMultifdZstd => vmm.then_some("choose --method irlm or gm"),
            Method::Irlm if c.index.is_none() => Some("needs `index"),
            Method::Irlm if c.direct == Direct::Always && c.budget_mbit.is_some() => Some("budget_mbit"),
            // The memory of a VM that runs before it is there cannot be compared.
            Method::Gm | Method::Irlm => {
                (vmm && c.verify.pages == Pages::Ram && c.migration != Migration::PreCopy)
                    .then_some("choose migration = \"pre-copy\"")
            }
        };
        let says = found.err().map(|e| e.to_string());
        assert_eq!(says.is_some(), why.is_some(), "{method} {c:?}: {says:?}");
        assert!(says.is_none_or(|s| s.contains(why.unwrap())));
    }
    assert_eq!(refused.len(), 4);
    let counts: Vec<_> = recipes.iter().map(|(m, r)| (*m, r.len())).collect();
    // By digest, held-back pages, verification and migration, for each form of contents: raw, forwarded, and twice (as it pays,
    // a level) with and without differences.
    let gm = 36 * 6;
    // For each form of contents: models where there are differences, direct (asked of the link only where compression
    // is as it pays), multicast.
    let irlm = 36 * 2 * (2 + 2 + (3 + 2 * 3) + (2 + 2 * 2));
    assert_eq!(counts, [("gm", gm), ("irlm", irlm), ("oc", 1), ("qemu-multifd-zstd", 1)]);
}

#[test]
fn what_is_asked_for_and_not_used_is_said() {
    let mut c = group(1, "qmp");
    c.index = Some("127.0.0.1:8".parse().unwrap());
    let unused = |c: &GroupConfig, m| Recipe::resolve(c, m).unwrap().unused(c);
    for m in METHODS {
        assert_eq!(unused(&c, m), Vec::<String>::new(), "{m}: nothing was asked for");
    }
    c.compress = Mode::Level(3);
    c.direct = Direct::Always;
    c.migration = Migration::Hybrid;
    c.verify.pages = Pages::Ram;
    c.multicast = all().into_iter().find_map(|(c, _)| c.multicast);
    let plain = unused(&c, Method::Oc);
    assert_eq!(plain.len(), 5);
    assert!(
        plain.iter().any(|l| l.contains("pages = \"ram\"") && l.ends_with("nothing is verified")),
        "{plain:?}"
    );
    assert_eq!(unused(&c, Method::Gm).len(), 3);
    let said = unused(&c, Method::Irlm);
    assert!(
        said.len() == 2 && said[0].starts_with("migration") && said[1].starts_with("multicast"),
        "{said:?}"
    );
}

#[test]
fn vms_whose_pages_no_agent_sees_are_said_to_be_not_verified() {
    let mut c = group(1, "qmp");
    c.index = Some("127.0.0.1:8".parse().unwrap());
    c.vm.push(VmConfig { name: "w".into(), source: "s1".into(), ..c.vm[0].clone() });
    let says = |c: &GroupConfig, m| Recipe::resolve(c, m).unwrap().unverified(c);
    let plain = says(&c, Method::Oc).unwrap();
    assert!(plain.starts_with("not verified: all VMs") && !plain.contains('\n'), "{plain}");
    assert_eq!(says(&c, Method::Gm), None);
    let auto = says(&c, Method::Irlm).unwrap();
    assert!(auto.starts_with("not verified, if the link is faster than the agents: v, w ("), "{auto}");
    c.direct = Direct::Always;
    let always = says(&c, Method::Irlm).unwrap();
    assert!(always.starts_with("not verified: v, w (") && always.contains("pages = \"ram\""), "{always}");
    // A host that is not all QEMU's keeps its agent in the path, and without being asked all do.
    let mut mixed = c.clone();
    (mixed.vm[1].source_vmm, mixed.vm[1].source_qmp) = (mixed.vm[1].source_qmp.take(), None);
    assert!(says(&mixed, Method::Irlm).unwrap().starts_with("not verified: v ("));
    mixed.direct = Direct::Auto;
    assert_eq!(says(&mixed, Method::Irlm), None);
    c.direct = Direct::Never;
    assert_eq!(says(&c, Method::Irlm), None);
    // Memory that is compared is verified, and what nobody wants is not missed.
    c.direct = Direct::Always;
    for pages in [Pages::Ram, Pages::Off] {
        c.verify.pages = pages;
        assert_eq!((says(&c, Method::Irlm), says(&c, Method::Oc)), (None, None), "{pages:?}");
    }
    c.verify.pages = Pages::Stream;
    c.vm = (0..11).map(|n| VmConfig { name: format!("v{n}"), ..c.vm[0].clone() }).collect();
    assert!(says(&c, Method::Irlm).unwrap().contains("v6, v7 and 3 more ("));
}

/// Post-copy moves VMs of `irlm vmm` alone. QEMUs go by pre-copy whatever the file says, and their memory is compared.
#[test]
fn post_copy_with_memory_compared_is_refused_for_our_vmm_and_not_used_for_qemu() {
    let with = |kind: &str| {
        let mut c = group(1, kind);
        (c.migration, c.verify.pages) = (Migration::PostCopy, Pages::Ram);
        c
    };
    let vmm = Recipe::resolve(&with("vmm"), Method::Gm).unwrap_err();
    assert!(matches!(vmm, RecipeError::RamNeedsPreCopy { .. }), "{vmm}");
    let qemu = Recipe::resolve(&with("qmp"), Method::Gm).unwrap();
    assert_eq!(
        qemu.unused(&with("qmp")),
        ["migration is not used: VMs of QEMU move by pre-copy, and no `irlm vmm` runs one of the group"]
    );
}
