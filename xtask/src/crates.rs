//! House rules for other people's crates: licences, what must not come in, and from where (`xtask/deny.toml`).

use crate::ctx::{self, Ctx};
use std::path::Path;

/// What is wrong with them; `Err` says why nobody has looked.
pub(crate) fn check(ctx: &Ctx) -> Result<Option<String>, String> {
    if !installed() {
        return Err("cargo-deny is not installed (`cargo install cargo-deny`)".into());
    }
    // Its rules are found beside this manifest by every version; the option that names them has moved about.
    let mut c = ctx.cargo();
    c.args(["deny", "--manifest-path", "xtask/Cargo.toml", "--workspace", "--locked", "check"]);
    c.args(["--hide-inclusion-graph", "bans", "licenses", "sources"]);
    Ok(ctx::output(&mut c).err().map(|e| format!("{e:#}")))
}

/// cargo finds its subcommands beside itself too.
fn installed() -> bool {
    let beside =
        std::env::var_os("CARGO").is_some_and(|c| Path::new(&c).with_file_name("cargo-deny").is_file());
    let home = std::env::var_os("CARGO_HOME")
        .map(Into::into)
        .or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".cargo")));
    beside || ctx::has_tool("cargo-deny") || home.is_some_and(|h| h.join("bin/cargo-deny").is_file())
}
