//! The fields of index messages, one function each way, so that every cap is checked in one place.

use super::{IndexMsgError, MAX_BATCH, MAX_GROUP_NAME, MAX_SET_BYTES, MAX_TEXT, MAX_VERSIONS, Token};
use crate::digest::{DIGEST_LEN, Digest};
use crate::index::{HostSet, LateItem, MAX_HOSTS, Registration};
use crate::models::SketchItem;
use crate::plan::{Carry, Remote};
use crate::units::{HostIx, PageId};

/// Appends fields.
pub(super) struct Put<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) kind: &'static str,
}

impl Put<'_> {
    pub(super) fn u16(&mut self, v: u16) {
        self.out.extend_from_slice(&v.to_le_bytes());
    }

    pub(super) fn u32(&mut self, v: u32) {
        self.out.extend_from_slice(&v.to_le_bytes());
    }

    pub(super) fn u64(&mut self, v: u64) {
        self.out.extend_from_slice(&v.to_le_bytes());
    }

    pub(super) fn digest(&mut self, d: &Digest) {
        self.out.extend_from_slice(&d.0);
    }

    pub(super) fn maybe_id(&mut self, id: Option<PageId>) {
        let id = id.unwrap_or(PageId { bucket: u32::MAX, index: u32::MAX });
        self.u32(id.bucket);
        self.u32(id.index);
    }

    pub(super) fn hosts(&mut self, set: &HostSet) {
        let at = self.out.len();
        self.out.push(0);
        set.words().for_each(|w| self.out.extend_from_slice(&w.to_le_bytes()));
        while self.out.len() > at + 1 && self.out.last() == Some(&0) {
            self.out.pop();
        }
        // At most MAX_SET_BYTES, 128: a HostSet holds no host above MAX_HOSTS.
        self.out[at] = (self.out.len() - at - 1) as u8;
    }

    pub(super) fn carry(&mut self, c: &Carry) {
        self.digest(&c.digest);
        self.maybe_id(Some(c.id));
        self.u16(c.first.0);
        self.hosts(&c.forward);
    }

    pub(super) fn remote(&mut self, r: &Remote) {
        self.digest(&r.digest);
        self.maybe_id(Some(r.id));
        self.u16(r.carrier.0);
        self.hosts(&r.targets);
    }

    pub(super) fn registration(&mut self, r: &Registration) {
        self.digest(&r.digest);
        self.u32(r.pages);
        self.hosts(&r.targets);
    }

    pub(super) fn late(&mut self, i: &LateItem) {
        self.digest(&i.digest);
        self.u16(i.target.0);
        self.out.push(u8::from(i.kept));
    }

    pub(super) fn sketch(&mut self, i: &SketchItem) {
        self.digest(&i.digest);
        self.u16(i.target.0);
        i.sketch.features().iter().for_each(|f| self.u32(*f));
    }

    /// A count of at most [`MAX_BATCH`].
    pub(super) fn count(&mut self, what: &'static str, count: usize) -> Result<(), IndexMsgError> {
        let n = self.capped(what, count, MAX_BATCH)?;
        self.u16(n);
        Ok(())
    }

    /// A count and as many items.
    pub(super) fn list<T>(
        &mut self,
        what: &'static str,
        items: &[T],
        mut item: impl FnMut(&mut Self, &T),
    ) -> Result<(), IndexMsgError> {
        self.count(what, items.len())?;
        items.iter().for_each(|i| item(self, i));
        Ok(())
    }

    pub(super) fn text(&mut self, text: &str) -> Result<(), IndexMsgError> {
        let n = self.capped("text length", text.len(), MAX_TEXT)?;
        self.u16(n);
        self.out.extend_from_slice(text.as_bytes());
        Ok(())
    }

    /// The start of `Hello` and `Open`.
    pub(super) fn first(
        &mut self,
        versions: &[u16],
        group: &str,
        token: &Token,
    ) -> Result<(), IndexMsgError> {
        let n = self.capped("versions", versions.len(), MAX_VERSIONS)?;
        self.out.push(n as u8);
        versions.iter().for_each(|v| self.u16(*v));
        let n = self.capped("group name length", group.len(), MAX_GROUP_NAME)?;
        if !is_group_name(group) {
            return Err(IndexMsgError::Bad { kind: self.kind, what: "group name" });
        }
        self.out.push(n as u8);
        self.out.extend_from_slice(group.as_bytes());
        self.out.extend_from_slice(&token.0);
        Ok(())
    }

    fn capped(&self, what: &'static str, count: usize, cap: usize) -> Result<u16, IndexMsgError> {
        match u16::try_from(count) {
            Ok(n) if count <= cap => Ok(n),
            _ => Err(IndexMsgError::TooMany { kind: self.kind, what, count, cap }),
        }
    }
}

/// Takes fields off the front.
pub(super) struct Fields<'a> {
    pub(super) rest: &'a [u8],
    pub(super) kind: &'static str,
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], IndexMsgError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(IndexMsgError::Short(self.kind))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], IndexMsgError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(IndexMsgError::Short(self.kind))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn bad(&self, what: &'static str) -> IndexMsgError {
        IndexMsgError::Bad { kind: self.kind, what }
    }

    fn u8(&mut self) -> Result<u8, IndexMsgError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, IndexMsgError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, IndexMsgError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, IndexMsgError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn flag(&mut self) -> Result<bool, IndexMsgError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad("flag")),
        }
    }

    pub(super) fn digest(&mut self) -> Result<Digest, IndexMsgError> {
        self.array::<DIGEST_LEN>().map(Digest)
    }

    /// A host number.
    pub(super) fn host(&mut self) -> Result<HostIx, IndexMsgError> {
        match self.u16()? {
            n if n < MAX_HOSTS => Ok(HostIx(n)),
            _ => Err(self.bad("host number")),
        }
    }

    /// How many hosts a side has.
    pub(super) fn side(&mut self) -> Result<u16, IndexMsgError> {
        match self.u16()? {
            n @ 1..=MAX_HOSTS => Ok(n),
            _ => Err(self.bad("number of hosts")),
        }
    }

    pub(super) fn maybe_id(&mut self) -> Result<Option<PageId>, IndexMsgError> {
        match (self.u32()?, self.u32()?) {
            (u32::MAX, u32::MAX) => Ok(None),
            (bucket, index) if bucket < 1 << 31 => Ok(Some(PageId { bucket, index })),
            _ => Err(self.bad("page id")),
        }
    }

    pub(super) fn id(&mut self) -> Result<PageId, IndexMsgError> {
        self.maybe_id()?.ok_or(self.bad("page id"))
    }

    pub(super) fn hosts(&mut self) -> Result<HostSet, IndexMsgError> {
        let n = usize::from(self.u8()?);
        if n > MAX_SET_BYTES {
            let kind = self.kind;
            return Err(IndexMsgError::TooMany {
                kind,
                what: "bytes of a host set",
                count: n,
                cap: MAX_SET_BYTES,
            });
        }
        let bits = self.bytes(n)?;
        if bits.last() == Some(&0) {
            return Err(self.bad("host set"));
        }
        let mut set = HostSet::new();
        for (i, byte) in (0u16..).zip(bits) {
            (0..8).filter(|b| byte >> b & 1 == 1).for_each(|b| {
                set.insert(HostIx(i * 8 + b));
            });
        }
        Ok(set)
    }

    pub(super) fn carry(&mut self) -> Result<Carry, IndexMsgError> {
        let (digest, id) = (self.digest()?, self.id()?);
        Ok(Carry { digest, id, first: self.host()?, forward: self.hosts()? })
    }

    /// A count of at most [`MAX_BATCH`].
    pub(super) fn count(&mut self, what: &'static str) -> Result<usize, IndexMsgError> {
        let count = usize::from(self.u16()?);
        self.capped(what, count, MAX_BATCH)
    }

    fn capped(&self, what: &'static str, count: usize, cap: usize) -> Result<usize, IndexMsgError> {
        if count > cap {
            return Err(IndexMsgError::TooMany { kind: self.kind, what, count, cap });
        }
        Ok(count)
    }

    /// A count and as many items of at least `least` bytes.
    pub(super) fn list<T>(
        &mut self,
        what: &'static str,
        least: usize,
        item: impl FnMut(&mut Self) -> Result<T, IndexMsgError>,
    ) -> Result<Vec<T>, IndexMsgError> {
        let n = self.count(what)?;
        self.items(n, least, item)
    }

    /// `n` items, if their least length is there: a short message allocates nothing.
    pub(super) fn items<T>(
        &mut self,
        n: usize,
        least: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, IndexMsgError>,
    ) -> Result<Vec<T>, IndexMsgError> {
        if self.rest.len() < n * least {
            return Err(IndexMsgError::Short(self.kind));
        }
        let mut out = Vec::with_capacity(n);
        for _ in 0..n {
            out.push(item(self)?);
        }
        Ok(out)
    }

    /// The start of `Hello` and `Open`.
    pub(super) fn first(&mut self) -> Result<(Vec<u16>, String, Token), IndexMsgError> {
        let n = usize::from(self.u8()?);
        let n = self.capped("versions", n, MAX_VERSIONS)?;
        let versions = self.items(n, 2, Self::u16)?;
        let n = usize::from(self.u8()?);
        let n = self.capped("group name length", n, MAX_GROUP_NAME)?;
        let name = self.bytes(n)?;
        let group =
            std::str::from_utf8(name).ok().filter(|s| is_group_name(s)).ok_or(self.bad("group name"))?;
        Ok((versions, group.to_owned(), Token(self.array()?)))
    }

    /// A line of text; what would move a terminal's cursor is replaced.
    pub(super) fn text(&mut self) -> Result<String, IndexMsgError> {
        let n = usize::from(self.u16()?);
        let n = self.capped("text length", n, MAX_TEXT)?;
        let text = std::str::from_utf8(self.bytes(n)?).map_err(|_| self.bad("text"))?;
        Ok(text.replace(char::is_control, " "))
    }
}

fn is_group_name(s: &str) -> bool {
    !s.is_empty() && !s.contains(char::is_control)
}
