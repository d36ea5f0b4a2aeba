//! The log: one line an event on standard error, so that a service manager keeps it and tables on standard output
//! stay clean. Levels by what the reader should do: error: act; warn: look; info: know; debug: for us.

use std::io::IsTerminal as _;
use tracing_subscriber::EnvFilter;

/// Starts the log with a filter such as `info` or `irlm_user::flow=debug,warn`.
///
/// # Errors
/// The filter is not understood, or a log is running already.
pub fn start(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|e| anyhow::anyhow!("IRLM_LOG={filter}: {e}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would say so on standard error, and panic when that cannot be written either: on a full disk, for one.
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init()
        .map_err(anyhow::Error::msg)
}
