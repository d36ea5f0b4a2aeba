//! How many of something one caller may have, so that nobody uses up what all share: groups at an agent and at an
//! index, requests in hand.
//!
//! A caller is known by its certificate's name. In plain text there are only addresses. Operators may use up everything:
//! who can end all moves need not be kept from making some.

use crate::origin::Origin;
use std::fmt;

/// Whose something is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Owner {
    /// An operator, by the name in its certificate.
    Operator(String),
    /// Anybody else with a certificate, by the name in it.
    Named(String),
    /// Whoever calls from there in plain text.
    From(Origin),
}

impl Owner {
    /// Whether both may be the same people, as far as is known: in plain text everybody may do everything.
    #[must_use]
    pub fn is_as_good_as(&self, other: &Self) -> bool {
        self == other || matches!((self, other), (Self::From(_), Self::From(_)))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator(name) | Self::Named(name) => f.write_str(name),
            Self::From(origin) => origin.fmt(f),
        }
    }
}

/// A bound, and what one caller may have of it. An eighth is left to operators.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Of all together.
    pub most: usize,
    /// Of one that is no operator.
    pub each: usize,
}

/// Why there is no place for one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Full {
    /// Its own part is used up.
    Own(usize),
    /// Nobody else may have more.
    All(usize),
}

impl Quota {
    /// `most` in all, of which one caller may have the `part`th part: at least one.
    #[must_use]
    pub const fn new(most: usize, part: usize) -> Self {
        let each = most / part;
        Self { most, each: if each == 0 { 1 } else { each } }
    }

    /// Whether `owner` may have one more beside those that are there. Whose a thing is may be unknown.
    ///
    /// # Errors
    /// Which bound is met.
    pub fn admits<'a>(
        self,
        owner: &Owner,
        there: impl Iterator<Item = Option<&'a Owner>>,
    ) -> Result<(), Full> {
        let (mut all, mut own) = (0, 0);
        for other in there {
            all += 1;
            own += usize::from(other == Some(owner));
        }
        if own >= self.of(owner) {
            return Err(Full::Own(own));
        }
        let most = if matches!(owner, Owner::Operator(_)) { self.most } else { self.others() };
        if all >= most { Err(Full::All(all)) } else { Ok(()) }
    }

    /// What `owner` may have.
    #[must_use]
    pub fn of(self, owner: &Owner) -> usize {
        if matches!(owner, Owner::Operator(_)) { self.most } else { self.each }
    }

    /// What all may have together who are no operators.
    #[must_use]
    pub const fn others(self) -> usize {
        let others = self.most - self.most / 8;
        if others == 0 { 1 } else { others }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Owner {
        Owner::Named(name.into())
    }

    #[test]
    fn one_caller_cannot_use_up_what_all_share_nor_can_many_shut_operators_out() {
        let quota = Quota::new(16, 4);
        let mut there: Vec<Owner> = Vec::new();
        let admits = |there: &[Owner], who: &Owner| quota.admits(who, there.iter().map(Some));
        while admits(&there, &named("a")).is_ok() {
            there.push(named("a"));
        }
        assert_eq!((there.len(), admits(&there, &named("a"))), (4, Err(Full::Own(4))));
        for other in ["b", "c", "d", "e", "f"] {
            while admits(&there, &named(other)).is_ok() {
                there.push(named(other));
            }
        }
        assert_eq!((there.len(), admits(&there, &named("g"))), (14, Err(Full::All(14))));
        let operator = Owner::Operator("ann".into());
        while admits(&there, &operator).is_ok() {
            there.push(operator.clone());
        }
        assert_eq!((there.len(), admits(&there, &operator)), (16, Err(Full::All(16))));
        let unknown = std::iter::repeat_n(None, 14);
        assert_eq!(quota.admits(&named("a"), unknown), Err(Full::All(14)), "they count, for nobody");
    }

    #[test]
    fn a_small_bound_leaves_one_to_everybody() {
        assert_eq!(Quota::new(2, 4), Quota { most: 2, each: 1 });
        let from = |ip: &str| Owner::From(ip.parse::<std::net::IpAddr>().unwrap().into());
        assert_eq!(Quota::new(1, 1).admits(&from("10.0.0.1"), std::iter::empty()), Ok(()));
        assert!(from("10.0.0.1").is_as_good_as(&from("10.0.0.2")));
        assert!(!from("10.0.0.1").is_as_good_as(&named("10.0.0.1")) && named("a").is_as_good_as(&named("a")));
        let operator = Owner::Operator("a".into());
        assert!(!named("a").is_as_good_as(&operator), "a name is none without its role");
    }
}
