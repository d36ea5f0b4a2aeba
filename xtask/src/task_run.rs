//! tmp
#[derive(clap::Args)]
pub(crate) struct Args {}
pub(crate) fn run(_: &crate::ctx::Ctx, _: &Args) -> anyhow::Result<()> {
    Ok(())
}
