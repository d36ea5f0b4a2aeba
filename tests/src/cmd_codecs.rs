//! `irlm-lab bench codecs`: bytes and processor time of ways to compress what crosses the core link once.

use anyhow::{Context as _, Result};
use irlm_tests::cache::Cache;
use irlm_tests::codecs::{self, Corpus, Finder};
use irlm_tests::qemu::Guest;
use irlm_tests::states;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Guests by host: commas between guests, slashes between hosts
    #[arg(long, default_value = "web0,db0/web1,idle0")]
    rack: String,
    /// Memory of a guest
    #[arg(long, default_value_t = 256)]
    mem: u32,
    /// Only ways whose name contains one of these
    #[arg(long)]
    only: Vec<String>,
    /// Levels of zstd
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3, 9])]
    levels: Vec<i32>,
    /// Which kind of sketch finds references, by its place in the list of kinds
    #[arg(long, default_value_t = 6)]
    finder: usize,
    /// Contents in a row that get one carrier
    #[arg(long, default_value_t = 1)]
    run: usize,
    /// Pages sampled to judge how similar pages are found; 0 leaves that out
    #[arg(long, default_value_t = 0)]
    sample: usize,
}

/// Prints what each way makes of the saved guests.
pub(crate) fn run(a: &Args) -> Result<()> {
    let kinds = Finder::ALL.len();
    let finder = *Finder::ALL.get(a.finder).with_context(|| format!("--finder: 0 to {}", kinds - 1))?;
    let cache = Cache::open()?;
    let mut hosts = Vec::new();
    for host in a.rack.split('/') {
        let saved = host.split(',').map(|name| states::saved(&cache, &Guest::named(name, a.mem)?));
        hosts.push(saved.collect::<Result<Vec<_>>>()?);
    }
    let corpus = Corpus::load(&hosts, a.run)?;
    let plain = corpus.oc_pages as f64 * 4096.0;
    println!(
        "{} pages with content, {} of them distinct ({:.3}), of which {} are pushed",
        corpus.oc_pages,
        corpus.len(),
        corpus.len() as f64 / corpus.oc_pages as f64,
        corpus.pushed()
    );
    if a.sample > 0 {
        recall(&corpus, a.sample);
    }
    for coder in codecs::all(finder, &a.levels) {
        let name = coder.name();
        if !a.only.is_empty() && !a.only.iter().any(|o| name.contains(o)) {
            continue;
        }
        let m = codecs::measure(&corpus, coder)?;
        println!(
            "zstd-{} {name:60} {:6.1} MB ({:.1} pushed) {:.4} of plain, {:.3} of the pages, {:.2} refer, {:5.1} us a page",
            coder.level,
            m.bytes as f64 / 1e6,
            m.pushed as f64 / 1e6,
            m.bytes as f64 / plain,
            m.bytes as f64 / (corpus.len() as f64 * 4096.0),
            m.referring as f64 / corpus.len() as f64,
            m.nanos / 1e3,
        );
    }
    Ok(())
}

fn recall(corpus: &Corpus, sample: usize) {
    let (all, have) = codecs::recall(corpus, sample);
    let mut table = comfy_table::Table::new();
    table.set_header(["sketch", "found", "bytes alike", "ns"]);
    for r in all {
        let cells = [format!("{:.3}", r.found), format!("{:.3}", r.alike), format!("{:.0}", r.nanos)];
        table.add_row(std::iter::once(r.finder.name()).chain(cells));
    }
    println!("{table}\n{have:.3} of the sample has a similar page; shares are of those");
}
