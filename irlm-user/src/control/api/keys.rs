//! The control protocol's words about the certificates that an agent uses.

use serde::{Deserialize, Serialize};

/// One certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Its file's name in the agent's directory.
    pub file: String,
    /// Its subject.
    pub subject: String,
    /// Valid to, Unix seconds.
    pub not_after: i64,
}

/// How an agent's connections are secured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysStatus {
    /// What is in use.
    pub certificates: Vec<Certificate>,
    /// Why what is in the directory now is not in use.
    #[serde(default)]
    pub problem: Option<String>,
}
