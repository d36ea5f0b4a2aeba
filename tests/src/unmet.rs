//! The moment that a test is about may not come: on a crowded machine a guest has left before it could be harmed, or has
//! written nothing in time. Then the test has shown nothing, neither good nor bad. It says so with [`Unmet`], and is run once
//! more with the machine to itself. A promise that was broken is never told this way.

/// Why the moment did not come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unmet(pub String);

impl std::fmt::Display for Unmet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unmet {}

/// Ends a test whose moment did not come.
///
/// # Errors
/// Always: [`Unmet`], with this reason.
pub fn unmet<T>(why: impl Into<String>) -> anyhow::Result<T> {
    Err(Unmet(why.into()).into())
}

/// Ends a test whose move was over before it could be harmed: that is no failure if all moved, and one if not.
///
/// # Errors
/// Always.
pub fn over<T>(code: i32, said: &str) -> anyhow::Result<T> {
    if code == 0 {
        return unmet("the move was over before anything could fail");
    }
    anyhow::bail!("the move ended with {code} before anything could fail: {said}")
}

/// The reason, if an error says that a moment did not come.
#[must_use]
pub fn reason(e: &anyhow::Error) -> Option<&str> {
    e.downcast_ref::<Unmet>().map(|u| u.0.as_str())
}

#[cfg(test)]
mod tests {
    use super::{over, reason, unmet};
    use anyhow::Context as _;

    #[test]
    fn a_moment_that_did_not_come_is_told_from_a_failure() {
        let e = unmet::<()>("no page changed").context("case a").unwrap_err();
        assert_eq!(reason(&e), Some("no page changed"));
        assert!(reason(&over::<()>(0, "all moved").unwrap_err()).is_some());
        assert!(reason(&over::<()>(2, "some stayed").unwrap_err()).is_none());
        assert!(reason(&anyhow::anyhow!("two copies run")).is_none());
    }
}
