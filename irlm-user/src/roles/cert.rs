//! `irlm cert`: a small CA for whoever has none, and a look at certificates whoever issued them.

// New certificates.
mod issue;
// Names that certificates are issued for.
mod names;
// What is there.
mod show;

use clap::{Args, Subcommand};

/// Arguments of `irlm cert`.
#[derive(Debug, Args)]
#[command(after_help = "\
The directories are those that QEMU and libvirt use: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, \
client-key.pem. What a certificate lets its owner do is said by a URI in it, such as irlm:agent/s1 or \
irlm:operator/ann (docs/identity.md).\n\n\
  irlm cert init ca\n  \
  irlm cert issue ca --out s1 --host s1 --ip 10.1.0.11\n  \
  irlm cert issue ca --out ann --host ann --role operator\n  \
  irlm cert show s1")]
pub(super) struct CertArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Make a CA: ca-cert.pem for every host, and ca-key.pem, which stays here
    Init(issue::InitArgs),
    /// Issue certificates for a host, a person or a program
    Issue(issue::IssueArgs),
    /// Show certificates, and whether peers would take them
    Show(show::ShowArgs),
}

pub(super) fn run(args: &CertArgs) -> anyhow::Result<u8> {
    match &args.what {
        What::Init(a) => issue::init(a),
        What::Issue(a) => issue::issue(a),
        What::Show(a) => show::show(a),
    }
}
