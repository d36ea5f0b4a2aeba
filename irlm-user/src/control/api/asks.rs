//! What each request asks for, and of which group: for who may ask for it (`core::identity`).

use super::Request;
use crate::core::identity::Ask;

impl Request {
    /// Its line in the table of who may ask for what.
    #[must_use]
    pub fn ask(&self) -> Ask {
        match self {
            Self::Hello => Ask::Hello,
            Self::Preflight { .. } => Ask::Preflight,
            Self::Prepare { .. } => Ask::Prepare,
            Self::PrepareStatus { .. } => Ask::PrepareStatus,
            Self::Observe { .. } => Ask::Observe,
            Self::Route { .. } => Ask::Route,
            Self::Start { .. } => Ask::Start,
            Self::Status { .. } => Ask::Status,
            Self::Cancel { .. } => Ask::Cancel,
            Self::Settle { .. } => Ask::Settle,
            Self::Forget { .. } => Ask::Forget,
            Self::History { .. } => Ask::History,
            Self::Released { .. } => Ask::Released,
            Self::PolicySet { .. } => Ask::PolicySet,
            Self::PolicyShow => Ask::PolicyShow,
            Self::BudgetShare { .. } => Ask::BudgetShare,
            Self::BudgetClaim { .. } => Ask::BudgetClaim,
        }
    }

    /// The group that it names, if it names one.
    #[must_use]
    pub fn group(&self) -> Option<&str> {
        match self {
            Self::Preflight { spec, .. } | Self::Prepare { spec } | Self::Observe { spec, .. } => {
                Some(&spec.name)
            }
            Self::PrepareStatus { group }
            | Self::Route { group, .. }
            | Self::Start { group, .. }
            | Self::Cancel { group }
            | Self::Settle { group, .. }
            | Self::Forget { group }
            | Self::Released { group, .. }
            | Self::BudgetShare { group, .. }
            | Self::BudgetClaim { group, .. } => Some(group),
            Self::Status { group } | Self::History { group } => group.as_deref(),
            Self::Hello | Self::PolicySet { .. } | Self::PolicyShow => None,
        }
    }

    /// The trust domains that the request itself lists: all that its VMs are of, if [`super::GroupSpec::check`] lets it pass.
    /// Of other requests the group's own count, where it is known.
    #[must_use]
    pub fn tenants(&self) -> Option<&[String]> {
        match self {
            Self::Preflight { spec, .. } | Self::Prepare { spec } | Self::Observe { spec, .. } => {
                Some(&spec.tenants)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_and_its_ask_have_one_name() {
        let requests = [
            Request::Hello,
            Request::Status { group: Some("g".into()) },
            Request::Cancel { group: "g".into() },
            Request::PolicyShow,
            Request::History { group: None },
        ];
        for r in requests {
            let on_the_wire = serde_json::to_value(&r).unwrap()["do"].clone();
            assert_eq!(on_the_wire, r.ask().name());
            assert_eq!(r.group().is_some(), serde_json::to_value(&r).unwrap()["group"].is_string());
        }
    }
}
