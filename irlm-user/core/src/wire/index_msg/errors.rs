//! Why the index server refuses, and why bytes are not a message.

/// Why the server refuses. Numbers this side does not know are kept as they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorCode {
    /// No such group, or not its token.
    Refused,
    /// No common version.
    Version,
    /// The server is at its bound of connections or groups.
    Busy,
    /// The message is malformed or out of place; the server hangs up.
    Protocol,
    /// The group was closed or has expired.
    Closed,
    /// The plan was not ready within the time asked for; asking again is fine.
    NotReady,
    /// The host was given up before the plan was made.
    NotInPlan,
    /// Another group of that name, or of another shape, exists.
    NameInUse,
    /// The server is going down.
    Stopping,
    /// A newer server's code.
    Other(u16),
}

impl ErrorCode {
    const KNOWN: [Self; 9] = [
        Self::Refused,
        Self::Version,
        Self::Busy,
        Self::Protocol,
        Self::Closed,
        Self::NotReady,
        Self::NotInPlan,
        Self::NameInUse,
        Self::Stopping,
    ];

    /// The number on the wire: 1 up.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Other(n) => n,
            known => (1..).zip(Self::KNOWN).find(|(_, k)| *k == known).map_or(0, |(n, _)| n),
        }
    }

    /// The code of a number.
    #[must_use]
    pub fn from_number(n: u16) -> Self {
        (1..).zip(Self::KNOWN).find(|(k, _)| *k == n).map_or(Self::Other(n), |(_, k)| k)
    }
}

/// Why bytes are not a message, or a message does not fit its caps.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum IndexMsgError {
    /// The length before a message is zero or above the cap.
    #[error("index message of {len} bytes, allowed are 1 to {cap}: the peer is no irlm index or client")]
    Length {
        /// What the peer said.
        len: u32,
        /// The cap now.
        cap: usize,
    },
    /// The kind byte names no message.
    #[error("unknown index message kind {0}: the peer speaks another protocol or version")]
    UnknownKind(u8),
    /// The message ended inside a field.
    #[error("index message {0} ends inside a field")]
    Short(&'static str),
    /// Bytes after the last field.
    #[error("index message {kind} has {extra} bytes after its last field")]
    Trailing {
        /// Message name.
        kind: &'static str,
        /// How many.
        extra: usize,
    },
    /// A count is above its cap.
    #[error("index message {kind}: {what} is {count}, above the cap of {cap}")]
    TooMany {
        /// Message name.
        kind: &'static str,
        /// What is counted.
        what: &'static str,
        /// How many.
        count: usize,
        /// The cap.
        cap: usize,
    },
    /// A field has a value that is not allowed.
    #[error("index message {kind}: bad {what}")]
    Bad {
        /// Message name.
        kind: &'static str,
        /// Which field.
        what: &'static str,
    },
}
