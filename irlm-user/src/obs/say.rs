//! Words for people on standard output and standard error. A reader who has gone, or a full disk, must not end a
//! program in the middle of what it does, as `println!` would: what cannot be said is left unsaid.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};
use std::sync::OnceLock;

/// Why standard output could not be written, the first time.
static UNSAID: OnceLock<std::io::Error> = OnceLock::new();

/// Text on standard output.
pub(crate) fn out(text: Arguments<'_>) {
    if let Err(e) = std::io::stdout().write_fmt(text) {
        let _ = UNSAID.set(e);
    }
}

/// Text on standard error.
pub(crate) fn err(text: Arguments<'_>) {
    let _ = std::io::stderr().write_fmt(text);
}

/// At the end: whether something is missing on standard output, and why. A reader who wanted no more misses nothing.
pub(crate) fn unsaid() -> Option<&'static std::io::Error> {
    if let Err(e) = std::io::stdout().flush() {
        let _ = UNSAID.set(e);
    }
    UNSAID.get().filter(|e| e.kind() != ErrorKind::BrokenPipe)
}

/// A line on standard output.
macro_rules! outln {
    ($($text:tt)*) => { $crate::obs::say::out(format_args!("{}\n", format_args!($($text)*))) };
}
/// A line on standard error.
macro_rules! errln {
    ($($text:tt)*) => { $crate::obs::say::err(format_args!("{}\n", format_args!($($text)*))) };
}
pub(crate) use {errln, outln};
