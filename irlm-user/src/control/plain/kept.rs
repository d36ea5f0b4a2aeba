//! What a QEMU's migration settings were before this program changed them, so that they are so again when the attempt is
//! over, whatever ended it: the owner's own migration must not meet settings of somebody else.

use crate::net::qmp::settings::Settings;
use crate::net::qmp::{Qmp, QmpError};

/// Capabilities that must be off so that runs compare: each changes what or how QEMU sends. `multifd` is set apart.
pub(super) const OFF: [&str; 13] = [
    "xbzrle",
    "compress",
    "auto-converge",
    "rdma-pin-all",
    "postcopy-ram",
    "x-colo",
    "block",
    "zero-blocks",
    "pause-before-switchover",
    "background-snapshot",
    "zero-copy-send",
    "x-ignore-shared",
    "dirty-limit",
];

/// Capabilities that are set to on or off here, besides [`OFF`].
const SET: [&str; 3] = ["multifd", "events", "return-path"];
/// Parameters that are set here.
const PARAMETERS: [&str; 4] = ["max-bandwidth", "downtime-limit", "multifd-channels", "multifd-compression"];

/// Settings as they were found; those of them that are changed here and that this QEMU has.
#[derive(Clone, Debug, Default)]
pub struct Kept(pub Settings);

impl Kept {
    /// Reads them; changes nothing.
    pub fn of(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let mut capabilities = qmp.capabilities()?;
        capabilities.retain(|name, _| OFF.contains(&&**name) || SET.contains(&&**name));
        let all = qmp.parameters()?;
        let found = |name: &&'static str| Some(((*name).to_owned(), all.get(*name)?.clone()));
        Ok(Self(Settings { capabilities, parameters: PARAMETERS.iter().filter_map(found).collect() }))
    }

    /// Puts back what is different now.
    pub fn restore(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        qmp.put_back(&self.0)
    }
}
