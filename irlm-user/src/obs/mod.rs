//! Logging and human-readable figures.
