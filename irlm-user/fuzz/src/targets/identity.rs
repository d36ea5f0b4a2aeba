//! Certificates of strangers, and the names in them: whatever they hold, they give a role or one line of why not.

use irlm_user::core::identity::{Mapping, RoleUri, identify};
use std::sync::LazyLock;

/// All kinds of patterns, so that every kind of name is compared.
static MAPPING: LazyLock<Mapping> = LazyLock::new(|| {
    let pattern = |p: &str| vec![p.to_owned().try_into().expect("a pattern")];
    Mapping {
        agent: pattern("*.example.org"),
        operator: pattern("cn:Ann*"),
        viewer: pattern("uri:spiffe://example.org/*"),
        ..Mapping::default()
    }
});

pub(crate) fn target(data: &[u8]) {
    match identify(data, &MAPPING) {
        Ok(who) => assert!(!who.roles.is_empty() && !who.to_string().contains('\n')),
        Err(why) => assert!(!why.to_string().contains('\n')),
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(uri) = RoleUri::parse(text)
    {
        assert_eq!(RoleUri::parse(&uri.to_string()), Ok(uri), "a role survives its URI");
    }
}

/// Names; whole certificates are among the kept inputs.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    ["irlm:agent/s1", "irlm:operator/ann@example.org", "irlm:coordinator/robot?tenant=shop&tenant=%2A", "irlm:index/rack-7"]
        .map(|uri| uri.as_bytes().to_vec())
        .into()
}
