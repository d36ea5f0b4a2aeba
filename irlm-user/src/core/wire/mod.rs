//! What crosses a socket between IRLM's programs: grammars only, no sockets.

/// Agent and coordinator to index server, and back.
pub mod index_msg;
