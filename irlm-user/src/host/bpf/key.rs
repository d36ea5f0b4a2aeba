//! How the classifiers' tables name a flow.

use irlm_common::FlowKey;
use std::net::{IpAddr, SocketAddr};

/// The key of a flow between this host and another.
pub(super) fn key(proto: u8, local: SocketAddr, remote: SocketAddr) -> FlowKey {
    FlowKey {
        local_addr: address(local.ip()),
        remote_addr: address(remote.ip()),
        local_port: local.port(),
        remote_port: remote.port(),
        proto: proto.into(),
    }
}

/// As the parser writes them: IPv4 mapped into IPv6, which is also how a dual-stack socket names
/// its IPv4 peer.
pub(super) fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => irlm_common::parse::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}
