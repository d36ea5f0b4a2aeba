//! Directories that others may write to.

use super::*;

/// Whoever writes to a directory can put another key there, or take the list of what is revoked away.
#[test]
fn files_that_others_could_exchange_are_refused_however_one_gets_to_them() {
    let pki = Pki::new("ca");
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let says = |dir: &Path| Credentials::open(dir, Use::Both).err().map(|e| e.to_string());
    #[track_caller]
    fn one_line(said: Option<String>, names: &Path, want: &str) {
        let said = said.expect(want);
        assert!(said.starts_with(&format!("{}: ", names.display())), "{said} does not begin with {names:?}");
        assert!(said.contains(want) && !said.contains('\n'), "{said:?} does not say {want:?}");
    }
    let top = TempDir::new().unwrap();
    // As the kernel knows it: the way to a temporary directory may have links.
    let top = top.path().canonicalize().unwrap();
    let [parent, open] = ["parent", "open"].map(|name| top.join(name));
    let dir = parent.join("tls");
    fs::create_dir_all(&dir).unwrap();
    fs::create_dir(&open).unwrap();
    for (dir, bits) in [(&parent, 0o755), (&dir, 0o755), (&open, 0o777)] {
        mode(dir, bits);
    }
    pki.fill(&dir, "s1", days(-1, 90));
    assert_eq!(says(&dir), None);
    for bad in [0o777, 0o1777, 0o702] {
        mode(&dir, bad);
        one_line(says(&dir), &dir, &format!("(mode {bad:04o}): chmod go-w"));
    }
    mode(&dir, 0o755);
    mode(&parent, 0o777);
    one_line(says(&dir), &parent, "in the place of");
    // As /tmp is.
    mode(&parent, 0o1777);
    assert_eq!(says(&dir), None);
    mode(&parent, 0o755);
    // A key that lies elsewhere, a directory that is reached by a link from there, and one of such a link.
    fs::rename(dir.join(CLIENT_KEY), open.join("key")).unwrap();
    std::os::unix::fs::symlink("../../open/key", dir.join(CLIENT_KEY)).unwrap();
    one_line(says(&dir), &open, "(client-key.pem leads there)");
    mode(&open, 0o755);
    assert_eq!(says(&dir), None);
    mode(&open, 0o777);
    fs::rename(open.join("key"), parent.join("key")).unwrap();
    put(&dir, CLIENT_KEY, &fs::read_to_string(parent.join("key")).unwrap());
    std::os::unix::fs::symlink(&dir, open.join("tls")).unwrap();
    one_line(says(&open.join("tls")), &open, "in the place of");
    std::os::unix::fs::symlink(open.join("tls"), top.join("tls")).unwrap();
    one_line(says(&top.join("tls")), &open, "leads there)");
    // Others' directories, and those of their groups.
    if rustix::process::geteuid().is_root() {
        let own = |uid: Option<u32>, gid: Option<u32>| std::os::unix::fs::chown(&dir, uid, gid).unwrap();
        own(Some(54_321), None);
        one_line(says(&dir), &dir, "belongs to user 54321");
        own(Some(0), Some(54_321));
        mode(&dir, 0o775);
        one_line(says(&dir), &dir, "(mode 0775)");
        own(None, Some(0));
        assert_eq!(says(&dir), None);
    }
}
