//! Where a connection comes from, as far as that counts for how many one may have.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One address of IPv4, or one network of IPv6: whoever has one address of a /64 has all of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Origin(IpAddr);

impl Origin {
    /// Stands for all that are not told apart any more.
    pub const OTHERS: Self = Self(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
}

impl From<IpAddr> for Origin {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V6(v6) if !v6.is_loopback() => {
                let net = v6.to_bits() & !u128::from(u64::MAX);
                Self(IpAddr::V6(Ipv6Addr::from_bits(net)))
            }
            one => Self(one),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(net) if !net.is_loopback() => write!(f, "{net}/64"),
            _ if *self == Self::OTHERS => f.write_str("others"),
            ip => write!(f, "{ip}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_one_caller_may_have_at_will_are_one_origin() {
        let of = |s: &str| Origin::from(s.parse::<IpAddr>().unwrap());
        assert_eq!(of("fd00:0:0:7::1"), of("fd00:0:0:7:ffff::2"));
        assert_ne!(of("fd00:0:0:7::1"), of("fd00:0:0:8::1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"), "one way to write it is another's");
        assert_ne!(of("::1"), of("::2"));
        let said = ["fd00:0:0:7::1", "10.0.0.1", "::1"].map(|s| of(s).to_string());
        assert_eq!(said, ["fd00:0:0:7::/64", "10.0.0.1", "::1"]);
        assert_eq!(Origin::OTHERS.to_string(), "others");
    }
}
