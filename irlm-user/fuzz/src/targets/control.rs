//! Lines of the control protocol, both ways: no line makes its reader panic, a refusal is one line, and what was read is
//! read again from what is written of it.

use irlm_user::control::api::{
    Code, Decision, Refusal, Reply, Request, StartPart, Token, decode_reply, encode_reply,
    encode_request,
};
use irlm_user::control::api::heard::decode_request;
use irlm_user::control::config::GroupConfig;
use irlm_user::control::coordinator::plan::Plan;

pub(crate) fn target(line: &[u8]) {
    match decode_request(line) {
        Ok(request) => {
            let again = encode_request(&request);
            assert_eq!(decode_request(again.as_bytes()).as_ref(), Ok(&request), "{again}");
            assert!(!again.contains('\n'));
            let _ = request.ask();
            let _ = request.group();
            if let Request::Prepare { spec } | Request::Preflight { spec, .. } | Request::Observe { spec, .. } =
                &request
            {
                let checked = spec.check();
                assert!(checked.is_ok() || checked.is_err_and(|e| !e.0.contains('\n')));
            }
        }
        Err(why) => assert!(!why.msg.contains('\n'), "{why:?}"),
    }
    match decode_reply(line) {
        Err(why) => assert!(!why.contains('\n')),
        Ok(reply) => said(&reply),
    }
}

fn said(reply: &Result<Reply, Refusal>) {
    if let Err(why) = reply {
        assert!(!why.msg.contains(char::is_control), "{why:?}");
    }
    let again = encode_reply(reply);
    assert!(!again.contains('\n'));
    let twice = decode_reply(again.as_bytes()).expect("what was written here");
    // Fractions are rounded where they are read: what comes of them stays.
    assert_eq!(encode_reply(&twice), again);
}

/// Requests about the group of the example, and replies.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let example = include_str!("../../../../docs/examples/group.toml");
    let config = GroupConfig::parse(example).expect("the example is valid");
    let specs = Plan::new(config, None).expect("it can be moved").agents.into_iter().map(|a| {
        let mut spec = a.spec;
        // Seeds are the same each time.
        spec.token = Token([7; 32]);
        Box::new(spec)
    });
    let (group, token) = (|| "rack-7".to_owned(), Token([7; 32]));
    let mut requests = vec![
        Request::Hello,
        Request::Status { group: None },
        Request::PrepareStatus { group: group() },
        Request::History { group: Some(group()) },
        Request::PolicyShow,
        Request::PolicySet { text: include_str!("../../../../docs/examples/policy.toml").to_owned() },
        Request::Route { group: group(), token, direct: false },
        Request::Start { group: group(), leave_paused: true, incoming: vec![], part: StartPart::Targets },
        Request::Cancel { group: group() },
        Request::Settle { group: group(), vm: "web1".into(), decision: Decision::Resume },
        Request::Forget { group: group() },
        Request::BudgetShare { group: group(), token, seq: 1 << 32, bits: 50_000_000 },
        Request::BudgetClaim { group: group(), token, term: 1 },
        Request::Released { group: group(), token, vm: 3, guest: Default::default() },
    ];
    requests.extend(specs.map(|spec| Request::Prepare { spec }));
    let replies = [
        Ok(Reply::Done),
        Ok(Reply::Share { seq: 1, bits: 2 }),
        Ok(Reply::Settled { line: "it runs".into(), done: true }),
        Ok(Reply::Hello { name: "s1".into(), version: "0.1.0".into(), now_ns: 1, data: None, you: None }),
        Ok(Reply::Status { name: "s1".into(), now_ns: 1, groups: vec![], samplers: vec![], keys: None }),
        Err(Refusal::new(Code::NotNow, "not at this point")),
    ];
    let lines = requests.iter().map(encode_request).chain(replies.iter().map(encode_reply));
    lines.map(String::into_bytes).collect()
}
