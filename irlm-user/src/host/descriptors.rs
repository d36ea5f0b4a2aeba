//! How many files and sockets this process may have open. What ports hold is derived from it (`net::gate`), so that enough
//! is left for journals, monitors and peers that were let in.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What is asked for where the kernel names no upper limit.
const MANY: u64 = 1 << 20;

/// Raises the process's limit as far as it may by itself, and says what it is then.
pub fn raise() -> u64 {
    let now = getrlimit(Resource::Nofile);
    let most = now.maximum.unwrap_or(MANY);
    let had = now.current.unwrap_or(MANY);
    if had >= most {
        return had;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: now.maximum }) {
        Ok(()) => most,
        Err(e) => {
            tracing::warn!("the limit of open files stays {had}: {e}");
            had
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_may_be_had() {
        let before = getrlimit(Resource::Nofile);
        let got = raise();
        let after = getrlimit(Resource::Nofile);
        assert_eq!((after.current, after.maximum), (Some(got), before.maximum));
        assert!(before.maximum.is_none_or(|most| most == got) && before.current <= after.current);
    }
}
