//! Sockets, networks and users that are listed, and those that are not.

use super::*;
use std::os::unix::net::UnixListener;

fn allow(text: &str) -> Allow {
    toml::from_str(text).unwrap()
}

fn only(dir: &Path) -> Allow {
    allow(&format!("sockets = [\"{}/**\"]", dir.display()))
}

#[test]
fn only_listed_sockets_are_opened_and_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    for d in [&inside, &outside] {
        std::fs::create_dir(d).unwrap();
    }
    let a = only(&inside);
    let listens = |p: PathBuf| {
        // The file stays when the listener is gone.
        drop(UnixListener::bind(&p).unwrap());
        p
    };
    let socket = listens(inside.join("v.qmp"));
    a.socket(&socket).unwrap();
    // Of a QEMU that has ended.
    a.socket(&inside.join("gone.qmp")).unwrap();
    let other = listens(outside.join("v.qmp"));
    assert!(matches!(a.socket(&other), Err(NotAllowed::Socket { .. })));
    let around = inside.join("../out/v.qmp");
    assert!(matches!(a.socket(&around), Err(NotAllowed::Socket { .. })));
    let link = inside.join("link.qmp");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    assert!(matches!(a.socket(&link), Err(NotAllowed::Leads { .. })));
    let folder = inside.join("folder");
    std::os::unix::fs::symlink(&outside, &folder).unwrap();
    assert!(matches!(a.socket(&folder.join("v.qmp")), Err(NotAllowed::Leads { .. })));
    let within = inside.join("within.qmp");
    std::os::unix::fs::symlink(&socket, &within).unwrap();
    a.socket(&within).unwrap();
    let file = inside.join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(a.socket(&file), Err(NotAllowed::Kind { .. })));
}

#[test]
fn a_socket_of_another_user_is_refused_unless_he_is_listed() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can give a file away");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.qmp");
    let _listener = UnixListener::bind(&path).unwrap();
    std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
    assert!(matches!(only(dir.path()).socket(&path), Err(NotAllowed::Owner { uid: 4711, .. })));
    let text = format!("sockets = [\"{}/*\"]\nowners = [4711]", dir.path().display());
    allow(&text).socket(&path).unwrap();
}

#[test]
fn by_default_memory_stays_in_private_networks_and_sockets_where_the_examples_have_them() {
    let a = Allow::default();
    for ok in ["10.2.0.11:7701", "192.168.1.1:1", "[fd00::1]:7701", "[::ffff:10.0.0.1]:1", "127.0.0.1:1"] {
        a.network("data".into(), ok.parse().unwrap()).unwrap();
    }
    for bad in ["203.0.113.9:7701", "[2001:db8::1]:7701", "172.32.0.1:1", "0.0.0.0:1"] {
        assert!(a.network("data".into(), bad.parse().unwrap()).is_err(), "{bad}");
    }
    for ok in ["/run/vm/web1.qmp", "/run/irlm/a/b", "/var/lib/libvirt/qemu/domain-1-web/monitor.sock"] {
        assert!(a.listed(Path::new(ok)), "{ok}");
    }
    for bad in ["/tmp/web1.qmp", "/run/vmx/a", "/run/docker.sock", "/run/systemd/private"] {
        assert!(!a.listed(Path::new(bad)), "{bad}");
    }
    a.tenant("").unwrap();
    a.tenant("shop").unwrap();
}

#[test]
fn what_cannot_be_used_is_said_when_the_file_is_read() {
    let said = |text: &str| toml::from_str::<Allow>(text).unwrap_err().to_string();
    assert!(said("sockets = [\"run/vm/*\"]").contains("must begin with /"));
    assert!(said("sockets = [\"/run/***\"]").contains("no pattern"));
    assert!(said("owners = [\"nobody-of-that-name\"]").contains("no user"));
    assert!(
        said("networks = [\"10.0.0.0/99\"]").contains("networks")
            || said("networks = [\"10.0.0.0/99\"]").contains("10.0.0.0/99")
    );
    assert!(said("paths = []").contains("unknown field"));
    assert_eq!(allow("owners = [\"root\", 7]").owners, [0, 7]);
}
