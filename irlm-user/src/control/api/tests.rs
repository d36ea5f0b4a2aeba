//! The control protocol's lines, as they are and as they must not be.

use super::heard::decode_request;
use super::*;
use crate::control::config::GroupTimeouts;
use crate::control::recipe::{Contents, Proxied, Rack, Recipe, Sharing};
use crate::core::digest::Algorithm;
use crate::core::direct::Direct;
use crate::core::handover::GuestState;
use crate::core::migration::Migration;
use crate::flow::Front;

fn spec() -> GroupSpec {
    let addr = |p: u16| SocketAddr::from(([127, 0, 0, 1], p));
    GroupSpec {
        share: Some(50_000_000),
        name: "g".into(),
        token: Token([0xab; 32]),
        method: Method::Irlm,
        recipe: Recipe::Proxied(Proxied {
            digest: Algorithm::Sha1,
            contents: Contents::Squeezed { level: Some(3), differences: true },
            hold_back: true,
            verify: crate::core::account::Pages::Off,
            migration: Migration::Hybrid,
            sharing: Sharing::Rack(Rack {
                index: addr(9),
                models: true,
                direct: Direct::Never,
                multicast: None,
            }),
        }),
        downtime_ms: 300,
        parallel: None,
        sources: vec![SourceSpec { name: "s".into(), agent: addr(1), data: Some(addr(4)) }],
        targets: vec![TargetSpec { name: "t".into(), agent: addr(2), data: addr(3) }],
        my_source: Some(0),
        my_target: None,
        tenants: vec![String::new()],
        vms: vec![VmSpec {
            ix: 7,
            name: "v".into(),
            source: 0,
            target: 0,
            tenant: String::new(),
            source_front: Front::Qmp("/q".into()),
            target_front: Front::Qmp("/r".into()),
            identity: Some(Identity {
                uuid: "0".into(),
                name: "v".into(),
                machine: "pc".into(),
                memory: 1 << 30,
            }),
        }],
        timeouts: GroupTimeouts::default(),
    }
}

#[test]
fn requests_and_replies_survive_the_wire() {
    let group = || "g".to_owned();
    let requests = [
        Request::Hello,
        Request::Prepare { spec: Box::new(spec()) },
        Request::PrepareStatus { group: group() },
        Request::Start {
            group: group(),
            leave_paused: true,
            incoming: vec![Incoming { vm: 1, addr: "[::1]:5".parse().unwrap() }],
            part: StartPart::Sources,
        },
        Request::Preflight { spec: Box::new(spec()), vms_only: true },
        Request::Route { group: group(), token: Token([2; 32]), direct: true },
        Request::Status { group: None },
        Request::Cancel { group: group() },
        Request::Settle { group: group(), vm: "v".into(), decision: Decision::Resume },
        Request::Forget { group: group() },
        Request::Released { group: group(), token: Token([1; 32]), vm: 3, guest: GuestState::Paused },
    ];
    for r in requests {
        let line = encode_request(&r);
        assert!(!line.contains('\n'));
        assert_eq!(decode_request(line.as_bytes()), Ok(r), "{line}");
    }
    let keys = None;
    let status = Reply::Status { name: "s1".into(), now_ns: 5, groups: vec![], samplers: vec![], keys };
    for r in [Ok(Reply::Done), Ok(status), Err(Refusal::new(Code::NotNow, "later"))] {
        assert_eq!(decode_reply(encode_reply(&r).as_bytes()), Ok(r));
    }
    assert_eq!(
        encode_request(&Request::Status { group: Some(group()) }),
        r#"{"req":{"do":"status","group":"g"},"v":1}"#
    );
    assert!(!format!("{:?}", spec()).contains("171"), "a token stays out of logs");
}

#[test]
fn a_strange_line_gets_a_named_refusal_and_later_fields_are_ignored() {
    let code = |l: &str| decode_request(l.as_bytes()).unwrap_err().code;
    assert_eq!(code("nonsense"), Code::BadRequest);
    assert_eq!(code("[]"), Code::Version);
    assert_eq!(code(r#"{"v":2,"req":{"do":"hello"}}"#), Code::Version);
    assert_eq!(code(r#"{"v":1,"req":{"do":"dance"}}"#), Code::UnknownRequest);
    assert_eq!(code(r#"{"v":1,"req":{"do":"cancel"}}"#), Code::BadRequest);
    assert_eq!(code(r#"{"v":1}"#), Code::BadRequest);
    let settle = r#"{"v":1,"req":{"do":"settle","group":"g","vm":"v","decision":"pray"}}"#;
    assert_eq!(code(settle), Code::BadRequest);
    let later = br#"{"v":1,"x":1,"req":{"do":"status","shade":"blue"}}"#;
    assert_eq!(decode_request(later), Ok(Request::Status { group: None }));
    let later = br#"{"v":1,"err":{"code":"too-blue","msg":"m"}}"#;
    assert_eq!(decode_reply(later), Ok(Err(Refusal::new(Code::Other, "m"))));
    assert!(decode_reply(b"{}").is_err());
    for token in ["", "zz", &"zz".repeat(32), &"ä".repeat(32)] {
        assert!(serde_json::from_value::<Token>(token.into()).is_err(), "{token}");
    }
}

#[test]
fn a_line_is_read_into_the_request_it_names_and_into_nothing_else() {
    let refused = |l: &str| decode_request(l.as_bytes()).unwrap_err();
    // The name may come behind the fields, and fields that no version knows may be anything.
    let late = br#"{"req":{"group":"g","x":[[1,{}]],"do":"cancel"},"y":{},"v":1}"#;
    assert_eq!(decode_request(late), Ok(Request::Cancel { group: "g".into() }));
    let deep =
        |n: usize| format!(r#"{{"v":1,"req":{{"do":"hello","x":{}{}}}}}"#, "[".repeat(n), "]".repeat(n));
    assert_eq!(decode_request(deep(30).as_bytes()), Ok(Request::Hello));
    for n in [31, 100, 1_000_000] {
        let e = refused(&deep(n));
        assert!(e.code == Code::BadRequest && e.msg.contains("nested more than 32 deep"), "{e}");
    }
    let brackets = format!(r#"{{"v":1,"req":{{"do":"cancel","group":"{}\\\"["}}}}"#, "[{".repeat(99));
    assert!(decode_request(brackets.as_bytes()).is_ok(), "brackets in strings are text");
    let e = refused(&format!(r#"{{"v":1,"req":{{"do":"{}"}}}}"#, "ä".repeat(100_000)));
    assert!(e.code == Code::UnknownRequest && e.msg.len() < 200, "{} bytes", e.msg.len());
    for l in [
        r#"{"v":1,"req":["hello"]}"#,
        r#"{"v":1,"req":{"do":"hello"},"req":{"do":"hello"}}"#,
        r#"{"v":1,"req":{"do":"cancel","do":"hello","group":"g"}}"#,
        r#"{"v":1,"req":{"do":"hello"}} x"#,
        r#"{"v":1,"req":{"do":"hello"}"#,
        r#"{"v":1,"req":{"do":7}}"#,
        r#"{"v":1,"req":7}"#,
        r#"[1,{"do":"hello"}]"#,
    ] {
        assert_eq!(refused(l).code, Code::BadRequest, "{l}");
    }
}

#[test]
fn a_spec_that_does_not_fit_together_is_refused() {
    assert_eq!(spec().check(), Ok(()));
    let breakages: [fn(&mut GroupSpec); 12] = [
        |s| s.name = "../x".into(),
        |s| s.my_source = Some(1),
        |s| s.my_target = Some(1),
        |s| s.vms[0].source = 1,
        |s| s.vms[0].target = 1,
        |s| s.vms[0].name = "a b".into(),
        |s| s.vms[0].source_front = Front::Qmp("q".into()),
        |s| s.vms[0].target_front = Front::Vmm("/r".into()),
        |s| s.vms.push(s.vms[0].clone()),
        |s| s.my_source = None,
        |s| s.tenants.push(s.tenants[0].clone()),
        |s| s.tenants.extend((0..9000).map(|n| n.to_string())),
    ];
    for (i, b) in breakages.iter().enumerate() {
        let mut s = spec();
        b(&mut s);
        assert!(s.check().is_err(), "case {i}");
    }
}

#[test]
fn a_refusal_is_one_line_whatever_it_cites() {
    let asked = r#"{"v":1,"req":{"do":"settle","group":"g","vm":"v","decision":"a\nb\u001b[2J"}}"#;
    let why = decode_request(asked.as_bytes()).unwrap_err();
    assert!(why.code == Code::BadRequest && why.msg.contains("`a b [2J`"), "{why}");
    let long = format!(r#"{{"v":1,"req":{{"do":"{}"}}}}"#, "é".repeat(MAX_MSG));
    let why = decode_request(long.as_bytes()).unwrap_err();
    assert!(why.code == Code::UnknownRequest && why.msg.len() <= MAX_MSG);
    // An agent's words come to an operator's terminal.
    let said = r#"{"v":1,"err":{"code":"failed","msg":"a\nb\u001b[2J"}}"#;
    assert_eq!(decode_reply(said.as_bytes()), Ok(Err(Refusal::new(Code::Failed, "a b [2J"))));
    assert!(!decode_reply(br#"{"v":1,"ok":{"is":"a\nb"}}"#).unwrap_err().contains('\n'));
}
