//! `irlm cert` as people use it: the program is run, and its files are looked at.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

use irlm_user::core::identity::{Mapping, Role, Tenants, identify};
use irlm_user::net::tls::{Credentials, Use, check};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

/// Exit code, standard output, standard error.
fn irlm(dir: &Path, line: &str) -> (i32, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_irlm"))
        .arg("cert")
        .args(line.split_whitespace())
        .current_dir(dir)
        .output()
        .unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

#[track_caller]
fn good(dir: &Path, line: &str) -> String {
    let (code, out, err) = irlm(dir, line);
    assert_eq!((code, err.as_str()), (0, ""), "{line}: {out}");
    out
}

#[track_caller]
fn refused(dir: &Path, line: &str, want: &str) {
    let (code, out, err) = irlm(dir, line);
    assert_eq!((code, out.as_str()), (1, ""), "{line}: {err}");
    assert!(err.contains(want), "{line}: {err:?} does not say {want:?}");
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn shown(dir: &Path, line: &str) -> (i32, serde_json::Value) {
    let (code, out, err) = irlm(dir, line);
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}")))
}

#[test]
fn a_ca_is_made_and_issues_certificates_that_agents_take() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let said = good(dir, "init ca --name rack-7");
    assert!(said.contains("offline"), "{said}");
    good(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11 --ip fd00::11 --role agent --role index");
    good(dir, "issue ca --out ann --host ann --role operator");
    good(dir, "issue ca --out robot --name robot --role coordinator --tenant shop --tenant bank");
    for (file, want) in [
        ("ca", 0o700),
        ("ca/ca-key.pem", 0o600),
        ("ca/ca-cert.pem", 0o644),
        ("s1", 0o700),
        ("s1/server-key.pem", 0o600),
        ("s1/client-key.pem", 0o600),
        ("s1/server-cert.pem", 0o644),
        ("s1/ca-cert.pem", 0o644),
    ] {
        assert_eq!(format!("{:o}", mode(&dir.join(file))), format!("{want:o}"), "{file}");
    }
    assert!(!dir.join("s1/ca-key.pem").exists() && !dir.join("ann/server-cert.pem").exists());
    let left: Vec<_> = std::fs::read_dir(dir.join("s1")).unwrap().collect();
    assert_eq!(left.len(), 5, "nothing is left beside them: {left:?}");

    Credentials::open(&dir.join("s1"), Use::Both).unwrap();
    Credentials::open(&dir.join("ann"), Use::Client).unwrap();
    let roles = |file: &str| {
        let chain = check::certificates(&dir.join(file)).unwrap();
        identify(&chain[0], &Mapping::default()).unwrap().roles
    };
    let s1 = [Role::Agent("s1".into()), Role::Index];
    assert_eq!(roles("s1/client-cert.pem"), s1);
    assert_eq!(roles("s1/server-cert.pem"), s1);
    assert_eq!(roles("ann/client-cert.pem"), [Role::Operator]);
    let tenants = Tenants::Listed(vec!["shop".into(), "bank".into()]);
    assert_eq!(roles("robot/client-cert.pem"), [Role::Coordinator(tenants)]);
}

#[test]
fn nothing_is_replaced_unless_asked() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    good(dir, "init ca");
    good(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11");
    let read = |file: &str| std::fs::read(dir.join(file)).unwrap();
    let (ca, key) = (read("ca/ca-key.pem"), read("s1/server-key.pem"));
    refused(dir, "init ca", "ca-cert.pem: is there already: nothing was made");
    refused(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11", "server-cert.pem: is there already");
    assert_eq!((read("ca/ca-key.pem"), read("s1/server-key.pem")), (ca, key.clone()));
    good(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11 --force");
    assert_ne!(read("s1/server-key.pem"), key);
    Credentials::open(&dir.join("s1"), Use::Both).unwrap();
    // A second CA stands beside the first one while certificates are replaced.
    good(dir, "init ca2");
    let said = good(dir, "issue ca2 --out s1 --host s1 --ip 10.1.0.11 --force");
    assert!(said.contains("believes other CAs, too"), "{said}");
    assert_eq!(check::certificates(&dir.join("s1/ca-cert.pem")).unwrap().len(), 2);
    Credentials::open(&dir.join("s1"), Use::Both).unwrap();
}

#[test]
fn what_cannot_be_issued_has_one_line() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    good(dir, "init ca");
    good(dir, "init other");
    for (line, want) in [
        ("issue ca --out s1 --host s1", "give --ip"),
        ("issue ca --out s1 --host S1 --ip 10.1.0.11", "the name is not"),
        ("issue ca --out s1 --host s1 --ip 10.1.0.11 --tenant a", "--tenant goes with --role coordinator"),
        ("issue ca --out r --host r --role coordinator", "a coordinator lists 1 to 32 tenants"),
        (
            "issue ca --out r --host r --role coordinator --tenant * --tenant shop",
            "means all tenants: give it alone",
        ),
        ("issue ca --out s1 --host s1 --dns *", "--dns \"*\" is no DNS name"),
        ("issue ca --out s1 --host a..b --ip 10.1.0.11", "--host \"a..b\" is no DNS name"),
        ("issue ca --out s1 --host s1 --dns 10.1.0.11", "give --ip 10.1.0.11"),
        ("init s1 --name \u{1b}", "--name \"\\u{1b}\": give 1 to 64 characters"),
        ("issue none --out s1 --host s1 --ip 10.1.0.11", "none/ca-cert.pem: is not there"),
    ] {
        refused(dir, line, want);
        assert!(!dir.join("s1").exists() && !dir.join("r").exists(), "{line}");
    }
    std::fs::copy(dir.join("other/ca-key.pem"), dir.join("ca/ca-key.pem")).unwrap();
    refused(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11", "ca-key.pem: is the key of no certificate");
    std::fs::set_permissions(dir.join("other/ca-key.pem"), Permissions::from_mode(0o644)).unwrap();
    refused(dir, "issue other --out s1 --host s1 --ip 10.1.0.11", "everybody on this host may use");
}

#[test]
fn what_peers_would_not_take_is_shown_as_such() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    good(dir, "init ca --days 30");
    good(dir, "init other");
    let said = good(dir, "issue ca --out s1 --host s1 --ip 10.1.0.11 --days 365");
    assert!(said.contains("the CA's last day"), "{said}");
    let (code, all) = shown(dir, "show s1 --json");
    assert_eq!(code, 0, "{all}");
    let rows = all["certificates"].as_array().unwrap();
    let files: Vec<&str> = rows.iter().map(|r| r["file"].as_str().unwrap()).collect();
    assert_eq!(files, ["ca-cert.pem", "server-cert.pem", "client-cert.pem"]);
    let server = &rows[1];
    assert_eq!(server["uris"], serde_json::json!(["irlm:agent/s1"]));
    assert_eq!(server["ips"], serde_json::json!(["10.1.0.11"]));
    assert_eq!(server["roles"], serde_json::json!(["agent of s1"]));
    assert_eq!(server["not_after"], rows[0]["not_after"]);
    assert_eq!(server["fingerprint"].as_str().unwrap().len(), 64);
    // Compared with another CA, each is refused.
    let (code, all) = shown(dir, "show s1/server-cert.pem --ca other/ca-cert.pem --json");
    assert_eq!(code, 2);
    assert!(all["certificates"][0]["why_not"].as_str().unwrap().contains("issued by somebody else"), "{all}");
    // As it lies there.
    std::fs::set_permissions(dir.join("s1/client-key.pem"), Permissions::from_mode(0o644)).unwrap();
    let (code, all) = shown(dir, "show s1 --json");
    assert_eq!(code, 2);
    assert!(all["problems"][0].as_str().unwrap().contains("client-key.pem"), "{all}");
    let (code, out, _) = irlm(dir, "show s1");
    assert_eq!(code, 2);
    assert!(out.contains("server-cert.pem") && out.contains("! "), "{out}");
    refused(dir, "show nothing", "nothing: is not there");
}
