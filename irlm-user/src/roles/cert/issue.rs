//! `irlm cert init` and `irlm cert issue`.

use super::names::{self, BadName};
use crate::core::identity::{CertFacts, Role, RoleUri, Tenants};
use crate::net::tls::make::{Authority, Holder, Side, Validity, pem};
use crate::net::tls::write::{Secret, directory, file};
use crate::net::tls::{CA, CA_KEY, CLIENT, CLIENT_KEY, SERVER, SERVER_KEY, TlsError, check, day};
use crate::obs::say::outln;
use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use rustls::pki_types::{CertificateDer, UnixTime};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

const DAY: i64 = 86_400;
/// Certificates are valid from a little before now: clocks differ.
const SKEW: i64 = 3600;
/// Longest validity, days: a hundred years.
const MAX_DAYS: i64 = 36_525;

/// Arguments of `irlm cert init`.
#[derive(Debug, Args)]
#[command(after_help = "\
ca-key.pem can make anybody an operator. Keep the directory on a machine that is not on the network, or on an encrypted \
medium, and give hosts what `irlm cert issue` writes, never this directory. Nothing is ever replaced.\n\n\
Exit codes: 0 made, 1 nothing was made.")]
pub(super) struct InitArgs {
    /// The CA's directory; it is made
    dir: PathBuf,
    /// The CA's name, for people; of its own if none is given: lists of revoked certificates tell CAs apart by it
    #[arg(long)]
    name: Option<String>,
    /// For how long it is valid
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(i64).range(1..=MAX_DAYS))]
    days: i64,
}

/// Arguments of `irlm cert issue`.
#[derive(Debug, Args)]
#[command(after_help = "\
An agent gets both pairs of files, an index server-*.pem, a person or program client-*.pem; all get ca-cert.pem. If the \
directory has a ca-cert.pem of other CAs, --force adds this CA to it, so that both are believed while certificates are \
replaced. An agent takes new files up by itself.\n\n\
Exit codes: 0 issued, 1 not issued (files that are there stay as they are unless --force is given).")]
pub(super) struct IssueArgs {
    /// The CA's directory: ca-cert.pem and ca-key.pem
    dir: PathBuf,
    /// The directory to fill; it is made
    #[arg(long, value_name = "HOSTDIR")]
    out: PathBuf,
    /// The host's name in group.toml; of a person or program: their name
    #[arg(long, visible_alias = "name", value_name = "NAME")]
    host: String,
    /// An address at which others reach the host; may be repeated
    #[arg(long)]
    ip: Vec<IpAddr>,
    /// A DNS name of the host; may be repeated. A host's NAME is one by itself
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
    /// What its owner may act as; may be repeated
    #[arg(long, value_enum, default_value = "agent")]
    role: Vec<RoleName>,
    /// A trust domain that a coordinator may move, as in group.toml; may be repeated; * for all
    #[arg(long, value_name = "LABEL")]
    tenant: Vec<String>,
    /// For how long it is valid; at most as long as the CA
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(i64).range(1..=MAX_DAYS))]
    days: i64,
    /// Replace what is in HOSTDIR
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum RoleName {
    /// May ask for everything
    Operator,
    /// May move VMs of the listed tenants
    Coordinator,
    /// May look
    Viewer,
    /// A host's daemon
    Agent,
    /// A rack's index server
    Index,
}

fn now() -> i64 {
    UnixTime::now().as_secs().cast_signed()
}

pub(super) fn init(args: &InitArgs) -> anyhow::Result<u8> {
    let name = args.name.clone().unwrap_or_else(|| format!("IRLM CA {:08x}", rand::random::<u32>()));
    names::common(&name)?;
    let now = now();
    let valid = Validity { from: now - SKEW, to: now + args.days * DAY };
    absent(&args.dir, &[CA, CA_KEY])?;
    let (_, pems) = Authority::create(&name, valid)?;
    directory(&args.dir)?;
    file(&args.dir, CA_KEY, &pems.key, Secret::Yes, false)?;
    file(&args.dir, CA, &pems.cert, Secret::No, false)?;
    outln!("{}: CA {:?}, valid to {}", args.dir.display(), name, day(valid.to));
    outln!("Keep {} offline: whoever has it can make anybody an operator.", args.dir.join(CA_KEY).display());
    Ok(0)
}

pub(super) fn issue(args: &IssueArgs) -> anyhow::Result<u8> {
    let roles = roles(args)?;
    let (ca, ca_der) = authority(&args.dir)?;
    let (valid, cut) = validity(&ca_der, args.days)?;
    let (server, client) = sides(&roles);
    let mut wanted = Vec::new();
    if server {
        wanted.push((Side::Server, SERVER, SERVER_KEY));
    }
    if client {
        wanted.push((Side::Client, CLIENT, CLIENT_KEY));
    }
    if !args.force {
        let names: Vec<&str> = wanted.iter().flat_map(|(_, cert, key)| [*cert, *key]).collect();
        absent(&args.out, &names)?;
    }
    let dns = dns_names(args, server)?;
    let holder = Holder { name: &args.host, dns: &dns, ips: &args.ip, roles: &roles };
    let mut made = Vec::new();
    for (side, cert, key) in wanted {
        made.push((cert, key, ca.issue(&holder, side, valid)?));
    }
    directory(&args.out)?;
    let added = put_ca(args, &ca_der)?;
    for (cert, key, pems) in &made {
        file(&args.out, key, &pems.key, Secret::Yes, args.force)?;
        file(&args.out, cert, &pems.cert, Secret::No, args.force)?;
    }
    let uris: Vec<String> = roles.iter().map(ToString::to_string).collect();
    outln!("{}: {}, valid to {}{cut}", args.out.display(), uris.join(", "), day(valid.to));
    if added {
        outln!(
            "{} believes other CAs, too: take them out when nobody needs them",
            args.out.join(CA).display()
        );
    }
    Ok(0)
}

/// The DNS names that go into the certificate: of a host its own name, too.
fn dns_names(args: &IssueArgs, server: bool) -> Result<Vec<String>, BadName> {
    args.dns.iter().try_for_each(|name| names::dns("--dns", name))?;
    let mut all = args.dns.clone();
    if server && !all.contains(&args.host) {
        names::dns("--host", &args.host)?;
        all.insert(0, args.host.clone());
    }
    Ok(all)
}

/// Refuses if one of these files is there: before anything is made.
fn absent(dir: &Path, names: &[&str]) -> anyhow::Result<()> {
    match names.iter().map(|n| dir.join(n)).find(|p| p.symlink_metadata().is_ok()) {
        Some(path) => bail!("{}: is there already: nothing was made", path.display()),
        None => Ok(()),
    }
}

fn authority(dir: &Path) -> anyhow::Result<(Authority, CertificateDer<'static>)> {
    let certs = check::certificates(&dir.join(CA))?;
    let (cert, key) = check::authority(&certs, &dir.join(CA_KEY))?;
    let ca = Authority::open(&cert, &key).with_context(|| format!("{}", dir.join(CA).display()))?;
    Ok((ca, cert))
}

/// From now on, and not beyond the CA's last day.
fn validity(ca: &CertificateDer<'_>, days: i64) -> anyhow::Result<(Validity, &'static str)> {
    let facts = CertFacts::parse(ca).context("the CA's certificate")?;
    let now = now();
    if !(facts.not_before..=facts.not_after).contains(&now) {
        let (from, to) = (day(facts.not_before), day(facts.not_after));
        bail!("the CA {} is valid from {from} to {to} only: make a new one", facts.who());
    }
    let to = now + days * DAY;
    let cut = if to > facts.not_after { ", the CA's last day" } else { "" };
    Ok((Validity { from: (now - SKEW).max(facts.not_before), to: to.min(facts.not_after) }, cut))
}

fn roles(args: &IssueArgs) -> anyhow::Result<Vec<RoleUri>> {
    names::tenants(&args.tenant)?;
    let mut out: Vec<RoleUri> = Vec::new();
    for name in &args.role {
        let role = match name {
            RoleName::Operator => Role::Operator,
            RoleName::Viewer => Role::Viewer,
            RoleName::Index => Role::Index,
            RoleName::Agent => Role::Agent(args.host.clone()),
            RoleName::Coordinator if args.tenant.iter().any(|t| t == "*") => Role::Coordinator(Tenants::All),
            RoleName::Coordinator => Role::Coordinator(Tenants::Listed(args.tenant.clone())),
        };
        let uri = RoleUri::new(role, &args.host)
            .with_context(|| format!("--host {:?} as {}", args.host, name_of(*name)))?;
        if !out.contains(&uri) {
            out.push(uri);
        }
    }
    if !args.tenant.is_empty() && !args.role.contains(&RoleName::Coordinator) {
        bail!("--tenant goes with --role coordinator");
    }
    if sides(&out).0 && args.ip.is_empty() && args.dns.is_empty() {
        bail!(
            "give --ip (or --dns) as others reach the host: they believe no certificate that does not name it"
        );
    }
    Ok(out)
}

fn name_of(role: RoleName) -> String {
    role.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

/// Whether connections are taken, and made.
fn sides(roles: &[RoleUri]) -> (bool, bool) {
    let server = |r: &RoleUri| matches!(r.role, Role::Agent(_) | Role::Index);
    (roles.iter().any(server), roles.iter().any(|r| r.role != Role::Index))
}

/// Puts the CA where its certificates go; whether it stands beside others there.
fn put_ca(args: &IssueArgs, ca: &CertificateDer<'static>) -> Result<bool, TlsError> {
    let path = args.out.join(CA);
    let text = pem(ca);
    if path.symlink_metadata().is_err() {
        file(&args.out, CA, &text, Secret::No, false)?;
        return Ok(false);
    }
    let there = check::certificates(&path)?;
    if there.contains(ca) {
        return Ok(there.len() > 1);
    }
    if !args.force {
        let what = "is of another CA: --force adds this one to it, and both are believed".to_owned();
        return Err(TlsError { file: path, what });
    }
    let text: String = there.iter().map(pem).chain([text]).collect();
    file(&args.out, CA, &text, Secret::No, true)?;
    Ok(true)
}
