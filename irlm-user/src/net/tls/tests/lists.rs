//! Certificates that a CA has taken back.

use super::*;

/// A list of the CA's that has these certificates.
fn list(pki: &Pki, revoked: &[&Pems]) -> String {
    let of = |p: &&Pems| rustls::pki_types::CertificateDer::from_pem_slice(p.cert.as_bytes()).unwrap();
    pki.ca.list(&revoked.iter().map(of).collect::<Vec<_>>(), days(-1, 30)).unwrap()
}

#[test]
fn whoever_is_on_a_list_is_refused_and_knows_it_beforehand() {
    let pki = Pki::new("ca");
    for (side, cert, key) in [(Side::Server, SERVER, SERVER_KEY), (Side::Client, CLIENT, CLIENT_KEY)] {
        let dir = pki.host("s1", days(-1, 90));
        let pems = pki.issue("s1", side, days(-1, 90));
        put(dir.path(), cert, &pems.cert);
        put(dir.path(), key, &pems.key);
        let at_peer = pki.host("t1", days(-1, 90));
        put(at_peer.path(), CRL, &list(&pki, &[&pems]));
        let (host, peer) = (open(&dir, 0), open(&at_peer, 0));
        let (at_server, at_client) =
            if side == Side::Server { between(&host, &peer) } else { between(&peer, &host) };
        let (says, told) = if side == Side::Server { (at_client, at_server) } else { (at_server, at_client) };
        expect(&says, "its certificate has been revoked (ca-crl.pem)");
        expect(&told, "refuses this side's certificate: it has been revoked");
        // With the list in its own directory.
        put(dir.path(), CRL, &list(&pki, &[&pems]));
        let e = Credentials::open(dir.path(), Use::Both).unwrap_err().to_string();
        assert!(
            e.contains(&format!("{cert}: no peer would take it: its certificate has been revoked")),
            "{e}"
        );
    }
}

/// The CA's list was taken away by mistake: whom it has taken back is not let in again.
#[test]
fn a_list_that_is_gone_is_missed() {
    let pki = Pki::new("ca");
    let (dir, theirs) = (pki.host("t1", days(-1, 90)), pki.host("s1", days(-1, 90)));
    let text = list(
        &pki,
        &[&Pems { cert: fs::read_to_string(theirs.path().join(CLIENT)).unwrap(), key: String::new() }],
    );
    put(dir.path(), CRL, &text);
    let (creds, peer) = (open(&dir, 0), open(&theirs, 0));
    fs::remove_file(dir.path().join(CRL)).unwrap();
    for _ in 0..2 {
        let e = creds.look_now(UnixTime::now(), false).unwrap().to_string();
        assert!(e.contains("ca-crl.pem: was there and is gone: put it back, or restart"), "{e}");
    }
    assert!(creds.problem().unwrap().contains("ca-crl.pem: was there"));
    let (at_server, _) = between(&creds, &peer);
    expect(&at_server, "has been revoked");
    assert!(creds.reload().is_err());
    // It is put back, with others' certificates.
    put(dir.path(), CRL, &list(&pki, &[]));
    assert_eq!(creds.look_now(UnixTime::now(), false), None);
    assert_eq!(creds.problem(), None);
    let (at_server, _) = between(&creds, &peer);
    at_server.unwrap();
    // A link to a list that is not there now is no word of none.
    fs::remove_file(dir.path().join(CRL)).unwrap();
    std::os::unix::fs::symlink("not-mounted/crl.pem", dir.path().join(CRL)).unwrap();
    let e = Credentials::open(dir.path(), Use::Both).unwrap_err().to_string();
    assert!(e.contains("ca-crl.pem: is a link, and what it leads to is not there"), "{e}");
    // Who begins without one has none to miss.
    fs::remove_file(dir.path().join(CRL)).unwrap();
    open(&dir, 0);
}
