//! Who is known by which certificate, and what each may ask for: one table of all pairs.

use super::*;
use crate::units::{HostIx, VmIx};
use crate::wire::messages::Purpose;

fn labels(all: &[&str]) -> Vec<String> {
    all.iter().map(|t| (*t).to_owned()).collect()
}

fn one(role: Role) -> Identity {
    Identity { name: "x".into(), roles: vec![role] }
}

/// Who may ask for what, where it is about tenant `shop` and host `s1`: operator, coordinator of `shop`, viewer, agent of
/// `s1`, index.
const TABLE: &[(&str, &str)] = &[
    ("hello", "ocva-"),
    ("status", "ocv--"),
    ("prepare-status", "ocv--"),
    ("history", "ocv--"),
    ("policy-show", "ocv--"),
    ("preflight", "oc---"),
    ("prepare", "oc---"),
    ("observe", "oc---"),
    ("route", "oc---"),
    ("start", "oc---"),
    ("cancel", "oc---"),
    ("settle", "oc---"),
    ("forget", "oc---"),
    ("budget-share", "oc---"),
    ("budget-claim", "oc---"),
    ("policy-set", "o----"),
    ("released", "---a-"),
    ("a VM connection", "---a-"),
    ("a push connection", "---a-"),
    ("a peer connection", "---a-"),
    ("a settle connection", "---a-"),
    ("a demand connection", "---a-"),
    ("a direct connection", "---a-"),
    ("a stream connection", "---a-"),
    ("a probe connection", "---a-"),
    ("a lend connection", "---a-"),
    ("the index's open", "oc---"),
    ("the index's plan-now", "oc---"),
    ("the index's close", "oc---"),
    ("the index's hello", "---a-"),
    ("the index's register", "---a-"),
    ("the index's register-done", "---a-"),
    ("the index's plan-request", "---a-"),
    ("the index's late", "---a-"),
    ("the index's sketches", "---a-"),
    ("the index's models-request", "---a-"),
];

#[test]
fn who_may_ask_for_what() {
    let shop = labels(&["shop"]);
    let about = Subject { tenants: Some(&shop), host: Some("s1") };
    let actors = [
        ('o', one(Role::Operator)),
        ('c', one(Role::Coordinator(Tenants::Listed(shop.clone())))),
        ('v', one(Role::Viewer)),
        ('a', one(Role::Agent("s1".into()))),
        ('i', one(Role::Index)),
    ];
    let names: Vec<&str> = Ask::ALL.iter().map(|a| a.name()).collect();
    let table: Vec<&str> = TABLE.iter().map(|(n, _)| *n).collect();
    assert_eq!(names, table, "every ask has its line");
    for (ask, (name, want)) in Ask::ALL.iter().zip(TABLE) {
        let got: String =
            actors.iter().map(|(c, who)| if may(who, *ask, about).is_ok() { *c } else { '-' }).collect();
        assert_eq!(&got, want, "{name}");
    }
}

#[test]
fn others_tenants_and_hosts_are_refused_by_name() {
    let both = labels(&["shop", "bank"]);
    let none: [String; 0] = [];
    let shop = one(Role::Coordinator(Tenants::Listed(labels(&["shop"]))));
    let all = one(Role::Coordinator(Tenants::All));
    let of = |tenants| Subject { tenants, host: None };
    for ask in [Ask::Prepare, Ask::Cancel, Ask::Settle, Ask::BudgetClaim, Ask::IndexOpen, Ask::Status] {
        let e = may(&shop, ask, of(Some(&both))).unwrap_err();
        assert!(matches!(&e, Refused::Tenant { tenant, .. } if tenant == "bank"), "{e}");
        may(&all, ask, of(Some(&both))).unwrap();
    }
    // Nothing is known of the group: an operator hears so from the request itself.
    for who in [&shop, &all] {
        assert!(matches!(may(who, Ask::Cancel, of(None)), Err(Refused::NoGroup { .. })));
        assert!(matches!(may(who, Ask::Prepare, of(Some(&none))), Err(Refused::NoGroup { .. })));
        may(who, Ask::Status, of(None)).unwrap();
    }
    may(&one(Role::Operator), Ask::Cancel, of(None)).unwrap();
    // VMs without a label are of tenant "", and not of every tenant.
    assert!(may(&shop, Ask::Start, of(Some(&labels(&[""])))).is_err());

    let s1 = one(Role::Agent("s1".into()));
    let as_host = |host| Subject { tenants: None, host };
    for ask in [Ask::DataVm, Ask::DataPush, Ask::DataSettle, Ask::Released, Ask::IndexHello] {
        let e = may(&s1, ask, as_host(Some("s2"))).unwrap_err();
        assert_eq!(
            e.to_string(),
            format!("x (agent of s1) asks for {} in the name of host \"s2\"", ask.name())
        );
        may(&s1, ask, as_host(Some("s1"))).unwrap();
    }
    assert!(may(&s1, Ask::DataVm, as_host(None)).is_err(), "no such host in the group");
    may(&s1, Ask::IndexHello, as_host(None)).unwrap();
}

#[test]
fn one_of_several_roles_is_enough_and_the_nearest_reason_is_said() {
    let who =
        Identity { name: "h1".into(), roles: vec![Role::Index, Role::Agent("h1".into()), Role::Viewer] };
    may(&who, Ask::Status, Subject::default()).unwrap();
    may(&who, Ask::DataVm, Subject { tenants: None, host: Some("h1") }).unwrap();
    let e = may(&who, Ask::DataVm, Subject { tenants: None, host: Some("h2") }).unwrap_err();
    assert!(matches!(e, Refused::Host { .. }), "{e}");
    let e = may(&who, Ask::Cancel, Subject::default()).unwrap_err();
    assert_eq!(
        e.to_string(),
        "h1 (index, agent of h1, viewer) may not ask for cancel: that takes an operator or a coordinator"
    );
    assert!(who.is_agent("h1") && !who.is_agent("h2") && who.is_index());
}

#[test]
fn what_is_seen_of_several_groups() {
    let shop = one(Role::Coordinator(Tenants::Listed(labels(&["shop"]))));
    assert!(shop.may_see(["shop"].into_iter()));
    assert!(!shop.may_see(["shop", "bank"].into_iter()));
    assert!(!shop.may_see([].into_iter()));
    assert!(one(Role::Viewer).may_see(["bank"].into_iter()));
    assert!(!one(Role::Agent("s1".into())).may_see(["bank"].into_iter()));
}

#[test]
fn every_purpose_and_message_is_an_ask() {
    let (source, vm) = (HostIx(0), VmIx(0));
    assert_eq!(Ask::from(&Purpose::Vm { source, vm }), Ask::DataVm);
    assert_eq!(Ask::from(&Purpose::Settle { source, vm }), Ask::DataSettle);
    use crate::wire::index_msg::IndexMsg;
    assert_eq!(Ask::of_index(&IndexMsg::Close), Some(Ask::IndexClose));
    assert_eq!(Ask::of_index(&IndexMsg::Done), None);
}

#[test]
fn roles_survive_their_uris() {
    let tenants = |t: &[&str]| Role::Coordinator(Tenants::Listed(labels(t)));
    let cases = [
        (Role::Operator, "ann", "irlm:operator/ann"),
        (Role::Viewer, "grafana@noc.example.org", "irlm:viewer/grafana@noc.example.org"),
        (Role::Agent("s1".into()), "s1", "irlm:agent/s1"),
        (Role::Index, "rack-7", "irlm:index/rack-7"),
        (tenants(&["shop"]), "robot", "irlm:coordinator/robot?tenant=shop"),
        (tenants(&["", "a&b=ä*"]), "robot", "irlm:coordinator/robot?tenant=&tenant=a%26b%3D%C3%A4%2A"),
        (tenants(&["*"]), "robot", "irlm:coordinator/robot?tenant=%2A"),
        (Role::Coordinator(Tenants::All), "robot", "irlm:coordinator/robot?tenant=*"),
    ];
    for (role, name, text) in cases {
        let made = RoleUri::new(role, name).unwrap();
        assert_eq!(made.to_string(), text);
        assert_eq!(RoleUri::parse(text).unwrap(), made);
        assert_eq!(RoleUri::parse(&text.replace("irlm:", "IRLM:")).unwrap(), made);
    }
}

#[test]
fn claims_that_say_nothing_usable_are_refused() {
    let long = format!("irlm:operator/{}", "a".repeat(MAX_PERSON_NAME + 1));
    let many = format!("irlm:coordinator/r?{}", vec!["tenant=a"; MAX_TENANTS + 1].join("&"));
    let wide = format!("irlm:coordinator/r?tenant={}", "a".repeat(MAX_TENANT_NAME + 1));
    let cases = [
        ("https://operator/ann", UriError::Scheme),
        ("irlm", UriError::Scheme),
        ("irlm:", UriError::Form),
        ("irlm:operator", UriError::Form),
        ("irlm://operator/ann", UriError::Role),
        ("irlm:root/ann", UriError::Role),
        ("irlm:Operator/ann", UriError::Role),
        ("irlm:operator/", UriError::Name),
        ("irlm:operator/a/b", UriError::Name),
        ("irlm:operator/a%20b", UriError::Name),
        ("irlm:agent/S1", UriError::Name),
        ("irlm:agent/.s1", UriError::Name),
        ("irlm:operator/ann?tenant=a", UriError::Query),
        ("irlm:operator/ann#x", UriError::Query),
        ("irlm:coordinator/r", UriError::Tenants),
        ("irlm:coordinator/r?", UriError::Tenants),
        ("irlm:coordinator/r?tenants=a", UriError::Tenants),
        ("irlm:coordinator/r?tenant=a&tenant=*", UriError::Tenants),
        ("irlm:coordinator/r?tenant=%4", UriError::Tenants),
        ("irlm:coordinator/r?tenant=%ff", UriError::Tenants),
        ("irlm:coordinator/r?tenant=%0A", UriError::Tenants),
        ("irlm:coordinator/r?tenant=a b", UriError::Tenants),
        (&long, UriError::Name),
        (&many, UriError::Tenants),
        (&wide, UriError::Tenants),
    ];
    for (text, want) in cases {
        assert_eq!(RoleUri::parse(text), Err(want), "{text}");
    }
}

fn facts() -> CertFacts {
    CertFacts {
        subject: "CN=Ann Operator".into(),
        common_name: Some("Ann Operator".into()),
        issuer: "CN=CA".into(),
        serial: "01".into(),
        dns: labels(&["s1.hosts.example.org", "*.hosts.example.org", "h2.b.example.org"]),
        uris: labels(&["spiffe://example.org/irlm/h7"]),
        ips: Vec::new(),
        not_before: 0,
        not_after: 1,
        ca: false,
        server: true,
        client: true,
    }
}

#[test]
fn names_of_another_pki_are_mapped() {
    let mapped = |json: &str| {
        let mapping: Mapping = serde_json::from_str(json).unwrap();
        let mut roles = Vec::new();
        mapping.add_to(&facts(), &mut roles);
        roles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    for (json, want) in [
        (r#"{"agent": ["*.hosts.example.org"]}"#, "agent of s1"),
        (r#"{"agent": ["dns:*.HOSTS.example.org", "dns:s1.hosts.example.org"]}"#, "agent of s1"),
        (r#"{"agent": ["h2.b.example.org"]}"#, "agent of h2"),
        (r#"{"agent": ["uri:spiffe://example.org/irlm/*"]}"#, "agent of h7"),
        (r#"{"agent": ["uri:spiffe://example.org/irlm/h7"]}"#, "agent of h7"),
        // A star is one label, and the star of a wildcard certificate is nobody's name.
        (r#"{"agent": ["*.example.org"]}"#, ""),
        (r#"{"operator": ["cn:Ann Operator"], "viewer": ["cn:Ann*"]}"#, "operator"),
        (r#"{"operator": ["cn:ann operator", "Ann Operator"]}"#, ""),
        (r#"{"coordinator": [{"name": "cn:Ann Operator", "tenants": ["a"]}]}"#, "coordinator of \"a\""),
        (r#"{"coordinator": [{"name": "cn:Ann Operator", "tenants": ["*"]}]}"#, "coordinator of all tenants"),
        (r#"{"index": ["h2.b.example.org"], "viewer": ["h2.b.example.org"]}"#, "viewer; index"),
    ] {
        assert_eq!(mapped(json), want, "{json}");
    }
    for bad in [
        r#"{"agent": ["*"]}"#,
        r#"{"agent": ["cn:"]}"#,
        r#"{"agent": ["*.*.example.org"]}"#,
        r#"{"agent": ["mail:x@example.org"]}"#,
        r#"{"agents": []}"#,
    ] {
        assert!(serde_json::from_str::<Mapping>(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_is_no_certificate_is_no_identity() {
    let mapping = Mapping::default();
    assert_eq!(identify(b"", &mapping), Err(NoIdentity::Cert(CertError::Grammar)));
    assert_eq!(
        identify(&vec![0x30; MAX_CERT + 1], &mapping),
        Err(NoIdentity::Cert(CertError::Size(MAX_CERT + 1)))
    );
}
