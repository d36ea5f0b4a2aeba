//! The rack index on a socket: the server that keeps it, the client that agents ask.
