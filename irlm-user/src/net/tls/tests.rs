//! Certificates that are good, foreign, expired or swapped, in handshakes inside one process; and new ones put in their places.

use super::make::{Authority, Holder, Pems, Side, Validity};
use super::*;
use crate::core::identity::{Role, RoleUri};
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

// Revocation lists.
mod lists;
// Who could exchange a file.
mod way;

const DAY: i64 = 86_400;

fn now() -> i64 {
    UnixTime::now().as_secs().cast_signed()
}

fn at(unix: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(unix.cast_unsigned()))
}

/// Days from today.
fn days(from: i64, to: i64) -> Validity {
    Validity { from: now() + from * DAY, to: now() + to * DAY }
}

/// As careful tools do: a new file in the place of the old one. Its times may be the old one's, within a tick.
fn put(dir: &Path, name: &str, text: &str) {
    let beside = dir.join("beside");
    fs::write(&beside, text).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(beside, dir.join(name)).unwrap();
}

/// A CA and the text of its certificate.
struct Pki {
    ca: Authority,
    pem: String,
}

impl Pki {
    fn new(name: &str) -> Self {
        let (ca, pems) = Authority::create(name, days(-100, 1000)).unwrap();
        Self { ca, pem: pems.cert }
    }

    fn issue(&self, name: &str, side: Side, valid: Validity) -> Pems {
        let role = RoleUri::new(Role::Agent(name.to_owned()), name).unwrap();
        let dns = [format!("{name}.example.org")];
        let holder = Holder { name, dns: &dns, ips: &["127.0.0.1".parse().unwrap()], roles: &[role] };
        self.ca.issue(&holder, side, valid).unwrap()
    }

    fn fill(&self, dir: &Path, name: &str, valid: Validity) {
        put(dir, CA, &self.pem);
        let server = self.issue(name, Side::Server, valid);
        put(dir, SERVER, &server.cert);
        put(dir, SERVER_KEY, &server.key);
        let client = self.issue(name, Side::Client, valid);
        put(dir, CLIENT, &client.cert);
        put(dir, CLIENT_KEY, &client.key);
    }

    /// A directory of a host whose certificates are valid on these days.
    fn host(&self, name: &str, valid: Validity) -> TempDir {
        let dir = TempDir::new().unwrap();
        self.fill(dir.path(), name, valid);
        dir
    }
}

/// Opens a directory as of a day when its certificates are valid.
fn open(dir: &TempDir, day: i64) -> Credentials {
    Credentials::open_at(dir.path(), Use::Both, at(now() + day * DAY)).unwrap()
}

/// What a side says of the other one after the handshake and one byte.
type Said = Result<Identity, String>;

fn said(e: &std::io::Error) -> String {
    why_io(e).unwrap_or_else(|| e.to_string())
}

fn serve(config: Arc<ServerConfig>, mut socket: UnixStream) -> Said {
    let mut tls = ServerConnection::new(config).unwrap();
    while tls.is_handshaking() {
        tls.complete_io(&mut socket).map_err(|e| said(&e))?;
    }
    let mut tls = rustls::StreamOwned::new(tls, socket);
    tls.write_all(b"x").and_then(|()| tls.flush()).map_err(|e| said(&e))?;
    peer_identity(&tls.conn, &Mapping::default()).map_err(|e| e.to_string())
}

fn call(config: Arc<ClientConfig>, name: ServerName<'static>, socket: UnixStream) -> Said {
    let mut tls = rustls::StreamOwned::new(ClientConnection::new(config, name).unwrap(), socket);
    tls.read_exact(&mut [0]).map_err(|e| said(&e))?;
    peer_identity(&tls.conn, &Mapping::default()).map_err(|e| e.to_string())
}

fn pair() -> (UnixStream, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    for s in [&a, &b] {
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (a, b)
}

/// What the server, and what the client says.
fn shake(server: Arc<ServerConfig>, client: Arc<ClientConfig>, name: ServerName<'static>) -> (Said, Said) {
    let (a, b) = pair();
    let serving = std::thread::spawn(move || serve(server, a));
    let called = call(client, name, b);
    (serving.join().unwrap(), called)
}

fn here() -> ServerName<'static> {
    server_name("127.0.0.1".parse().unwrap(), None).unwrap()
}

fn between(server: &Credentials, client: &Credentials) -> (Said, Said) {
    shake(server.server().unwrap(), client.client().unwrap(), here())
}

#[track_caller]
fn expect(said: &Said, want: &str) {
    let e = said.as_ref().expect_err(want);
    assert!(e.contains(want) && !e.contains('\n'), "{e:?} does not say {want:?}");
}

#[test]
fn two_hosts_of_one_ca_know_each_other() {
    let pki = Pki::new("ca");
    let (a, b) = (open(&pki.host("s1", days(-1, 90)), 0), open(&pki.host("t1", days(-1, 90)), 0));
    let (at_server, at_client) = between(&b, &a);
    assert_eq!(at_server.unwrap().to_string(), "s1 (agent of s1)");
    assert!(at_client.unwrap().is_agent("t1"));
    // By name as well as by address.
    let name = server_name("10.0.0.1".parse().unwrap(), Some("t1.example.org")).unwrap();
    let (at_server, at_client) = shake(b.server().unwrap(), a.client().unwrap(), name);
    at_server.and(at_client).unwrap();
    assert!(server_name("10.0.0.1".parse().unwrap(), Some("no name")).is_err());
}

#[test]
fn a_server_at_another_address_is_not_believed() {
    let pki = Pki::new("ca");
    let (a, b) = (open(&pki.host("s1", days(-1, 90)), 0), open(&pki.host("t1", days(-1, 90)), 0));
    for name in [
        server_name("10.9.9.9".parse().unwrap(), None).unwrap(),
        server_name("127.0.0.1".parse().unwrap(), Some("t2.example.org")).unwrap(),
    ] {
        let want = format!("its certificate is not that of {}; it names", name.to_str());
        let (at_server, at_client) = shake(b.server().unwrap(), a.client().unwrap(), name);
        expect(&at_client, &want);
        expect(&at_server, "refuses this side's certificate");
    }
}

#[test]
fn strangers_are_refused_by_both_sides() {
    let (ours, theirs) = (Pki::new("ours"), Pki::new("theirs"));
    let host = open(&ours.host("t1", days(-1, 90)), 0);
    let stranger = open(&theirs.host("s1", days(-1, 90)), 0);
    let (_, at_client) = between(&host, &stranger);
    expect(&at_client, "issued by somebody else than the CAs in ca-cert.pem");
    // One that believes us, with a certificate of its own CA.
    let dir = theirs.host("s1", days(-1, 90));
    let both = TempDir::new().unwrap();
    for name in [SERVER, SERVER_KEY, CLIENT, CLIENT_KEY] {
        put(both.path(), name, &fs::read_to_string(dir.path().join(name)).unwrap());
    }
    put(both.path(), CA, &format!("{}{}", theirs.pem, ours.pem));
    let (at_server, at_client) = between(&host, &open(&both, 0));
    expect(&at_server, "issued by somebody else than the CAs in ca-cert.pem");
    expect(&at_client, "refuses this side's certificate: it was issued by somebody else");
}

#[test]
fn what_is_expired_or_not_valid_yet_is_refused_with_its_day() {
    let pki = Pki::new("ca");
    let good = open(&pki.host("t1", days(-1, 90)), 0);
    for (valid, then, client_says, server_says) in [
        (days(-9, -2), -3, "its certificate expired on ", "it has expired"),
        (days(5, 90), 6, "its certificate is valid from ", "it has expired, or is not valid yet"),
    ] {
        let bad = open(&pki.host("s1", valid), then);
        let day_said = day(if then < 0 { valid.to } else { valid.from });
        let (at_server, at_client) = between(&good, &bad);
        expect(&at_server, client_says);
        expect(&at_server, &day_said);
        expect(&at_client, server_says);
        let (at_server, at_client) = between(&bad, &good);
        expect(&at_client, client_says);
        expect(&at_client, &day_said);
        expect(&at_server, server_says);
    }
}

#[test]
fn a_client_shows_a_certificate_and_one_for_clients() {
    let pki = Pki::new("ca");
    let host = open(&pki.host("t1", days(-1, 90)), 0);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(pki.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = || {
        let b = ClientConfig::builder_with_provider(Arc::clone(&provider));
        b.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_root_certificates(roots.clone())
    };
    let bare = builder().with_no_client_auth();
    let (at_server, at_client) = shake(host.server().unwrap(), Arc::new(bare), here());
    expect(&at_server, "it shows no certificate");
    expect(&at_client, "this side has shown none");
    let server = pki.issue("s1", Side::Server, days(-1, 90));
    let wrong = builder()
        .with_client_auth_cert(
            vec![rustls::pki_types::CertificateDer::from_pem_slice(server.cert.as_bytes()).unwrap()],
            rustls::pki_types::PrivateKeyDer::from_pem_slice(server.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let (at_server, _) = shake(host.server().unwrap(), Arc::new(wrong), here());
    expect(&at_server, "may not be used on that side");
}

#[test]
fn older_tls_and_plain_text_are_refused_in_words() {
    let pki = Pki::new("ca");
    let host = open(&pki.host("t1", days(-1, 90)), 0);
    // A ClientHello of TLS 1.2 (RFC 5246, 7.4.1.2): random, no session, two suites, no compression; it says which
    // signatures and curves it takes.
    let mut hello = vec![0x03, 0x03];
    hello.extend([7; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    hello.extend([0, 22, 0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0]);
    let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4, 1, 0, 0, hello.len() as u8];
    record.extend(hello);
    for (bytes, want) in [
        (record, "it does not speak TLS 1.3 as this side does"),
        (b"IRLM\x01\x02\x00\x00\x00\x00 and more".to_vec(), "does not speak TLS"),
        (b"{\"v\":1,\"req\":{\"do\":\"hello\"}}\n".to_vec(), "is one side set to plain text?"),
    ] {
        let (a, mut b) = pair();
        let config = host.server().unwrap();
        let serving = std::thread::spawn(move || serve(config, a));
        b.write_all(&bytes).unwrap();
        expect(&serving.join().unwrap(), want);
    }
}

#[test]
fn both_cas_of_a_roll_are_believed() {
    let (old, new) = (Pki::new("ca 2026"), Pki::new("ca 2027"));
    let (dir_a, dir_b) = (old.host("s1", days(-1, 90)), new.host("t1", days(-1, 90)));
    let bundle = format!("{}{}", old.pem, new.pem);
    put(dir_a.path(), CA, &bundle);
    put(dir_b.path(), CA, &bundle);
    let (a, b) = (open(&dir_a, 0), open(&dir_b, 0));
    for (server, client) in [(&a, &b), (&b, &a)] {
        let (at_server, at_client) = between(server, client);
        at_server.and(at_client).unwrap();
    }
    assert_eq!(a.expiry().iter().filter(|e| e.file == CA).count(), 2);
}

#[test]
fn an_expired_ca_is_left_out_and_alone_is_refused() {
    let pki = Pki::new("ca");
    let (_, gone) = Authority::create("gone", days(-20, -10)).unwrap();
    let dir = pki.host("s1", days(-1, 90));
    put(dir.path(), CA, &format!("{}{}", gone.cert, pki.pem));
    open(&dir, 0);
    put(dir.path(), CA, &gone.cert);
    let e = Credentials::open(dir.path(), Use::Both).unwrap_err().to_string();
    assert!(e.contains("ca-cert.pem: no CA in it is valid today"), "{e}");
}

#[test]
fn each_bad_directory_has_one_line_that_names_the_file() {
    let pki = Pki::new("ca");
    let other = Pki::new("other");
    let mode = |d: &Path, name: &str, mode: u32| {
        fs::set_permissions(d.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    type Spoil<'a> = &'a dyn Fn(&Path);
    let cases: &[(Spoil<'_>, &str)] = &[
        (&|d| fs::remove_file(d.join(CA)).unwrap(), "ca-cert.pem: is not there"),
        (&|d| fs::remove_file(d.join(SERVER_KEY)).unwrap(), "server-key.pem: is not there"),
        (&|d| fs::remove_file(d.join(CLIENT)).unwrap(), "client-cert.pem: is not there"),
        (
            &|d| mode(d, SERVER_KEY, 0o644),
            "server-key.pem: is a key that everybody on this host may use (mode 0644)",
        ),
        (
            &|d| mode(d, CLIENT_KEY, 0o660),
            "client-key.pem: may be changed by others than its owner (mode 0660)",
        ),
        (&|d| mode(d, CA, 0o666), "ca-cert.pem: may be changed by others"),
        (&|d| put(d, CA, "hello"), "ca-cert.pem: holds no certificate in PEM form"),
        (
            &|d| put(d, CA, "-----BEGIN CERTIFICATE-----\n&&&&\n-----END CERTIFICATE-----\n"),
            "ca-cert.pem: is damaged",
        ),
        (
            &|d| put(d, CA, &pki.pem.replace("END CERTIFICATE", "END CERTIFICAT")),
            "ca-cert.pem: is damaged: the line -----END CERTIFICATE----- is missing: copy it",
        ),
        (&|d| put(d, CA, &"x".repeat(2 << 20)), "ca-cert.pem: is larger than"),
        (&|d| put(d, SERVER_KEY, "-----BEGIN ENCRYPTED PRIVATE KEY-----"), "server-key.pem: is encrypted"),
        (
            &|d| put(d, SERVER_KEY, &pki.issue("s1", Side::Server, days(-1, 9)).key),
            "server-cert.pem: does not belong to server-key.pem",
        ),
        (&|d| put(d, CA, &pki.issue("s1", Side::Server, days(-1, 9)).cert), "is not a CA's"),
        (&|d| put(d, CA, &other.pem), "no peer would take it: its certificate was issued by somebody else"),
        (&|d| put(d, CRL, "hello"), "ca-crl.pem: holds no revocation list in PEM form"),
        (
            &|d| put(d, CRL, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
            "ca-crl.pem: is damaged, or no X.509 revocation list: put the CA's whole list there",
        ),
        (&|d| pki.fill(d, "s1", days(-9, -3)), "server-cert.pem: expired on "),
        (&|d| pki.fill(d, "s1", days(3, 9)), "server-cert.pem: is valid from "),
        (
            &|d| {
                let client = pki.issue("s1", Side::Client, days(-1, 9));
                put(d, SERVER, &client.cert);
                put(d, SERVER_KEY, &client.key);
            },
            "server-cert.pem: no peer would take it: its certificate may not be used on that side",
        ),
    ];
    for (spoil, want) in cases {
        let dir = pki.host("s1", days(-1, 90));
        Credentials::open(dir.path(), Use::Both).unwrap();
        spoil(dir.path());
        let e = Credentials::open(dir.path(), Use::Both).unwrap_err().to_string();
        assert!(e.contains(want) && !e.contains('\n'), "{e:?} does not say {want:?}");
        assert!(e.starts_with(&dir.path().display().to_string()), "{e}");
    }
    // What a program does not need may be missing.
    let dir = pki.host("s1", days(-1, 90));
    fs::remove_file(dir.path().join(SERVER)).unwrap();
    let client = Credentials::open(dir.path(), Use::Client).unwrap();
    assert!(client.server().unwrap_err().to_string().contains("client only"));
    // A group may read a key: QEMU's, for one.
    mode(dir.path(), CLIENT_KEY, 0o640);
    Credentials::open(dir.path(), Use::Client).unwrap();
}

#[test]
fn certificates_are_replaced_while_connections_stand() {
    let pki = Pki::new("ca");
    let dir = pki.host("s1", days(-1, 90));
    let creds = open(&dir, 0);
    let peer = open(&pki.host("t1", days(-1, 90)), 0);
    let (a, b) = pair();
    let mut server = rustls::StreamOwned::new(ServerConnection::new(peer.server().unwrap()).unwrap(), a);
    let client = creds.client().unwrap();
    let calling = std::thread::spawn(move || {
        let mut tls = rustls::StreamOwned::new(ClientConnection::new(client, here()).unwrap(), b);
        let mut got = [0; 2];
        tls.read_exact(&mut got[..1]).unwrap();
        tls.write_all(b"y").unwrap();
        tls.read_exact(&mut got[1..]).unwrap();
        got
    });
    server.write_all(b"1").unwrap();
    server.read_exact(&mut [0]).unwrap();
    let before = creds.expiry();
    pki.fill(dir.path(), "s9", days(-1, 91));
    assert_eq!(creds.look_now(UnixTime::now(), false), None);
    assert_ne!(creds.expiry(), before);
    let (at_server, _) = between(&peer, &creds.clone());
    assert!(at_server.unwrap().is_agent("s9"), "new connections use the new certificate");
    server.write_all(b"2").unwrap();
    assert_eq!(&calling.join().unwrap(), b"12");
}

#[test]
fn a_bad_new_set_keeps_the_old_one_and_is_said_once() {
    let pki = Pki::new("ca");
    let dir = pki.host("s1", days(-1, 90));
    let creds = open(&dir, 0);
    let peer = open(&pki.host("t1", days(-1, 90)), 0);
    let before = creds.expiry();
    // Somebody is in the middle of replacing files: no word before they stand still.
    put(dir.path(), SERVER_KEY, &pki.issue("s1", Side::Server, days(-1, 9)).key);
    assert!(creds.look_now(UnixTime::now(), false).is_some());
    assert_eq!(creds.problem(), None);
    assert!(creds.look_now(UnixTime::now(), false).is_some());
    let problem = creds.problem().unwrap();
    assert!(problem.contains("does not belong to server-key.pem"), "{problem}");
    // It is not read again and again.
    assert_eq!(creds.look_now(UnixTime::now(), false), None);
    assert_eq!(creds.expiry(), before);
    let (at_server, at_client) = between(&creds, &peer);
    at_server.and(at_client).unwrap();
    assert!(creds.reload().unwrap_err().to_string().contains("does not belong"));
    pki.fill(dir.path(), "s1", days(-1, 80));
    creds.reload().unwrap();
    assert_eq!(creds.problem(), None);
    assert_ne!(creds.expiry(), before);
}

#[test]
fn a_ca_that_expires_meanwhile_is_believed_no_more() {
    let (old, new) = (Pki::new("old"), Pki::new("new"));
    let (ca, short) = Authority::create("short", days(-20, 10)).unwrap();
    let short = Pki { ca, pem: short.cert };
    let dir = new.host("t1", days(-1, 90));
    put(dir.path(), CA, &format!("{}{}", short.pem, new.pem));
    let creds = open(&dir, 0);
    let theirs = short.host("s1", days(-1, 9));
    put(theirs.path(), CA, &format!("{}{}{}", short.pem, new.pem, old.pem));
    let peer = open(&theirs, 0);
    let (at_server, _) = between(&creds, &peer);
    at_server.unwrap();
    assert_eq!(creds.look_now(at(now() + 11 * DAY), false), None);
    let (at_server, _) = between(&creds, &peer);
    expect(&at_server, "issued by somebody else");
}

#[test]
fn expiry_is_warned_of_at_thirty_days_at_seven_and_every_day() {
    use super::credentials::warning_level;
    let levels: Vec<Option<i64>> =
        [31, 30, 8, 7, 6, 1, 0, -1, -2].iter().map(|d| warning_level(d * DAY)).collect();
    let want = [None, Some(30), Some(30), Some(7), Some(6), Some(1), Some(0), Some(-1), Some(-2)];
    assert_eq!(levels, want);
}

#[test]
fn each_day_after_a_certificate_has_expired_says_so_once() {
    let pki = Pki::new("ca");
    let creds = open(&pki.host("s1", days(-1, 2)), 0);
    let lines = |at: i64| creds.due_lines(now() + at);
    assert_eq!(lines(0), Vec::<String>::new(), "it was said when it was opened");
    let soon = lines(2 * DAY - 7300);
    assert!(soon.len() == 2 && soon[0].contains("in 2 hours"), "{soon:?}");
    for day in 0..3 {
        let said = lines(2 * DAY + 60 + day * DAY);
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(
            said.iter().all(|l| l.contains("-cert.pem: the certificate \"CN=s1\" HAS EXPIRED on ")),
            "{said:?}"
        );
        assert_eq!(lines(2 * DAY + 600 + day * DAY), Vec::<String>::new());
    }
}

/// Whoever made a certificate has chosen its names, also those that are no server's.
#[test]
fn a_certificates_names_are_said_as_they_are_and_not_as_the_library_has_them() {
    let presented =
        ["DnsName(\"t1.example.org\")", "IpAddress(127.0.0.1)", "DirectoryName", "Unsupported(0x81)"];
    let uri = "UniformResourceIdentifier(\"irlm:agent/t1\")";
    let presented =
        presented.into_iter().chain([uri, "DnsName(\"a\nb\u{1b}\")"]).map(str::to_owned).collect();
    let expected = ServerName::try_from("10.9.9.9").unwrap();
    let e = rustls::CertificateError::NotValidForNameContext { expected, presented };
    assert_eq!(
        why(&rustls::Error::InvalidCertificate(e)),
        "its certificate is not that of 10.9.9.9; it names t1.example.org, 127.0.0.1, a name of another kind, a name of \
         another kind, irlm:agent/t1, a\\nb\\u{1b}"
    );
    let e = rustls::CertificateError::Other(rustls::OtherError(Arc::new(std::io::Error::other(
        "CaUsedAsEndEntity",
    ))));
    assert_eq!(
        why(&rustls::Error::InvalidCertificate(e)),
        "its certificate is not usable (ca used as end entity)"
    );
}

#[test]
fn nothing_is_resumed_and_nothing_is_early() {
    let pki = Pki::new("ca");
    let creds = open(&pki.host("t1", days(-1, 90)), 0);
    let server = creds.server().unwrap();
    assert!(!server.session_storage.can_cache());
    assert_eq!((server.send_tls13_tickets, server.max_early_data_size), (0, 0));
    let client = creds.client().unwrap();
    assert!(!client.enable_early_data && !client.enable_sni);
}

#[test]
fn a_damaged_certificate_is_no_identity_and_no_end() {
    let pki = Pki::new("ca");
    let pems = pki.issue("s1", Side::Client, days(-1, 90));
    let good = rustls::pki_types::CertificateDer::from_pem_slice(pems.cert.as_bytes()).unwrap();
    let mut refused = 0;
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.to_vec();
            bad[at] ^= 1 << bit;
            match identify(&bad, &Mapping::default()) {
                Ok(who) => assert!(!who.roles.is_empty()),
                Err(e) => {
                    assert!(!e.to_string().contains('\n'), "{e}");
                    refused += 1;
                }
            }
        }
        assert!(identify(&good[..at], &Mapping::default()).is_err(), "cut at {at}");
    }
    assert!(refused > good.len(), "{refused}");
}
