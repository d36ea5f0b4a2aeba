//! Developer tasks of IRLM.

mod task_ebpf;

fn main() -> anyhow::Result<()> {
    let no_install = std::env::args().any(|argument| argument == "--no-install");
    task_ebpf::ensure(no_install)?;
    Ok(())
}
