//! What was on the port before IRLM changed it, on disk before it was changed: after a crash the next start knows what
//! to remove and what to put back.

use crate::net::tc::{Object, What};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Version of the record's form.
const FORM: u32 = 1;
/// Largest record read back, bytes: a tree of some 50,000 classes.
const MAX_RECORD: u64 = 64 << 20;
/// Its name in the state directory; not `.json`, which is the journal's.
const NAME: &str = "port.shape";

/// What an agent has set up, and what was there before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// The port.
    pub iface: String,
    /// The operator's tree, in the order in which it can be made again; empty: the kernel's default was there.
    pub before: Vec<Object>,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    form: u32,
    iface: String,
    before: Vec<Raw>,
}

/// A netlink message behind its header, in hexadecimal.
#[derive(Serialize, Deserialize)]
struct Raw {
    what: What,
    hex: String,
}

/// Where the record is kept.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    /// In `state_dir`.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self(state_dir.join(NAME))
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The record that an agent left; `None` if there is none.
    pub fn load(&self) -> io::Result<Option<Record>> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut text = Vec::new();
        match File::open(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
            Ok(f) => f.take(MAX_RECORD + 1).read_to_end(&mut text)?,
        };
        if text.len() as u64 > MAX_RECORD {
            return Err(bad("too long"));
        }
        let d: OnDisk = serde_json::from_slice(&text).map_err(|e| bad(&e.to_string()))?;
        if d.form != FORM {
            return Err(bad(&format!("form {}, this program reads form {FORM}", d.form)));
        }
        let object = |r: &Raw| Object::from_raw(r.what, unhex(&r.hex)?);
        let before = d.before.iter().map(object).collect::<Option<_>>();
        Ok(Some(Record { iface: d.iface, before: before.ok_or_else(|| bad("an object that is none"))? }))
    }

    /// Writes the record; on return it is on disk.
    pub fn save(&self, r: &Record) -> io::Result<()> {
        let before = r.before.iter().map(|o| Raw { what: o.what, hex: hex(o.raw()) }).collect();
        let text = serde_json::to_vec(&OnDisk { form: FORM, iface: r.iface.clone(), before })?;
        let tmp = self.0.with_extension("tmp");
        let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
        f.write_all(&text)?;
        f.sync_all()?;
        std::fs::rename(&tmp, &self.0)?;
        self.sync_dir()
    }

    /// Nothing of ours is on the port any more.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.sync_dir(),
        }
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(self.0.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

fn unhex(s: &str) -> Option<Vec<u8>> {
    if !s.is_ascii() || !s.len().is_multiple_of(2) {
        return None;
    }
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tc::{htb_root, payload};

    #[test]
    fn what_was_written_is_read_back_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path());
        assert_eq!(place.load().unwrap(), None);
        let r = Record { iface: "eth0".into(), before: vec![payload(&htb_root(3)).2] };
        place.save(&r).unwrap();
        assert_eq!(place.load().unwrap(), Some(r));
        let text = std::fs::read_to_string(place.path()).unwrap();
        for bad in
            [text.replacen("hex\":\"", "hex\":\"zz", 1), text.replace("\"form\":1", "\"form\":9"), "{".into()]
        {
            assert_ne!(bad, text);
            std::fs::write(place.path(), bad).unwrap();
            place.load().unwrap_err();
        }
        place.remove().unwrap();
        place.remove().unwrap();
        assert_eq!(place.load().unwrap(), None);
    }
}
