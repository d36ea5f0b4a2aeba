//! The one binary, `irlm`: everything is in the library, so that tests and the lab can use it.

fn main() -> std::process::ExitCode {
    irlm_user::roles::main()
}
