//! `irlm cert show`.

use crate::core::identity::{CertFacts, Mapping, identify};
use crate::net::tls::{CA, CLIENT, Credentials, SERVER, Use, check, day, fingerprint};
use crate::obs::say::outln;
use crate::roles::common::write_json;
use crate::roles::tables::table;
use clap::Args;
use rustls::pki_types::{CertificateDer, UnixTime};
use std::path::{Path, PathBuf};

/// Exit code: something would not be taken by a peer.
const NOT_GOOD: u8 = 2;

/// Arguments of `irlm cert show`.
#[derive(Debug, Args)]
#[command(after_help = "\
Roles are those of irlm: URIs; what [roles] of an agent's file adds is not known here.\n\n\
Exit codes: 0 shown, and peers with that CA would take all of it; 1 it cannot be read; 2 shown, and something is expired, \
of another CA, or not usable as it lies there.")]
pub(super) struct ShowArgs {
    /// A directory of certificates, or one file
    path: PathBuf,
    /// The CAs to compare with; default: ca-cert.pem in the same directory
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// JSON on standard output instead of a table
    #[arg(long)]
    json: bool,
}

/// One certificate.
#[derive(Debug, serde::Serialize)]
struct Row {
    file: String,
    subject: String,
    roles: Vec<String>,
    dns: Vec<String>,
    uris: Vec<String>,
    ips: Vec<String>,
    ca: bool,
    not_before: i64,
    not_after: i64,
    issuer: String,
    serial: String,
    /// SHA-256.
    fingerprint: String,
    verifies: bool,
    why_not: Option<String>,
}

#[derive(Debug, serde::Serialize)]
struct Shown {
    certificates: Vec<Row>,
    /// What is wrong with the files as they lie there.
    problems: Vec<String>,
}

pub(super) fn show(args: &ShowArgs) -> anyhow::Result<u8> {
    let shown = gather(args)?;
    if args.json {
        write_json(Path::new("-"), &shown)?;
    } else {
        print(&shown);
    }
    let good = shown.problems.is_empty() && shown.certificates.iter().all(|r| r.verifies);
    Ok(if good { 0 } else { NOT_GOOD })
}

fn gather(args: &ShowArgs) -> anyhow::Result<Shown> {
    let whole = args.path.is_dir();
    let dir = if whole { args.path.as_path() } else { args.path.parent().unwrap_or(Path::new("")) };
    let files: Vec<PathBuf> = if whole {
        [CA, SERVER, CLIENT].iter().map(|n| dir.join(n)).filter(|p| p.exists()).collect()
    } else {
        vec![args.path.clone()]
    };
    if files.is_empty() {
        anyhow::bail!("{}: there is no ca-cert.pem, server-cert.pem or client-cert.pem", dir.display());
    }
    let beside = dir.join(CA);
    let cas = match &args.ca {
        Some(file) => check::certificates(file)?,
        None if beside.exists() => check::certificates(&beside)?,
        None => Vec::new(),
    };
    let now = UnixTime::now();
    let mut certificates = Vec::new();
    for file in files {
        let chain = check::certificates(&file)?;
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        // Of a host's own file the first is the host's, and the others lead from it to its CA.
        let bundle = name == CA || !whole;
        for (n, der) in chain.iter().enumerate().filter(|(n, _)| bundle || *n == 0) {
            certificates.push(row(&name, der, &chain[n..], &cas, now)?);
        }
    }
    let problems = if whole { problem(dir).into_iter().collect() } else { Vec::new() };
    Ok(Shown { certificates, problems })
}

/// Why a program could not use the directory; none if it has no host's certificates at all.
fn problem(dir: &Path) -> Option<String> {
    let wants = match (dir.join(SERVER).exists(), dir.join(CLIENT).exists()) {
        (true, true) => Use::Both,
        (true, false) => Use::Server,
        (false, true) => Use::Client,
        (false, false) => return None,
    };
    Credentials::open(dir, wants).err().map(|e| e.to_string())
}

fn row(
    file: &str,
    der: &CertificateDer<'static>,
    chain: &[CertificateDer<'static>],
    cas: &[CertificateDer<'static>],
    now: UnixTime,
) -> anyhow::Result<Row> {
    let facts = CertFacts::parse(der).map_err(|e| anyhow::anyhow!("{file}: {e}"))?;
    let verdict = check::verdict(chain, cas, now);
    let roles = identify(der, &Mapping::default());
    Ok(Row {
        file: file.to_owned(),
        subject: facts.subject,
        roles: roles.map(|who| who.roles.iter().map(ToString::to_string).collect()).unwrap_or_default(),
        dns: facts.dns,
        uris: facts.uris,
        ips: facts.ips.iter().map(ToString::to_string).collect(),
        ca: facts.ca,
        not_before: facts.not_before,
        not_after: facts.not_after,
        issuer: facts.issuer,
        serial: facts.serial,
        fingerprint: fingerprint(der),
        verifies: verdict.is_ok(),
        why_not: verdict.err().map(|e| e.0),
    })
}

fn print(shown: &Shown) {
    let mut t = table(&["file", "subject", "role", "names", "valid", "issuer", "SHA-256", "taken by peers"]);
    for r in &shown.certificates {
        let roles = if r.ca { "CA".to_owned() } else { r.roles.join("\n") };
        let names: Vec<&str> = r.ips.iter().chain(&r.dns).chain(&r.uris).map(String::as_str).collect();
        t.add_row([
            r.file.clone(),
            r.subject.clone(),
            if roles.is_empty() { "none".into() } else { roles },
            names.join("\n"),
            format!("{}\nto {}", day(r.not_before), day(r.not_after)),
            r.issuer.clone(),
            format!("{}…", &r.fingerprint[..16]),
            r.why_not.clone().map_or_else(|| "yes".to_owned(), |why| format!("no: {why}")),
        ]);
    }
    outln!("{t}");
    shown.problems.iter().for_each(|p| outln!("! {p}"));
}
