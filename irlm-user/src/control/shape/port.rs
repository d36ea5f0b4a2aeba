//! The qdiscs of a port: whose they are, writing somebody's tree down, putting it back as it was, and finding out
//! beforehand whether the kernel lets it be put back.

use super::error::ShapeError;
use crate::core::policy::{HtbClass, MAJOR};
use crate::host::netns::in_a_fresh_network;
use crate::net::tc::{self, Change, Object, ROOT, Tc, TcError, What, show_handle};
use std::collections::HashSet;

/// The kernel's traffic control as the shaper needs it. A seam: tests put a stand-in here.
pub trait Kernel: Send + std::fmt::Debug {
    /// The number of an interface.
    fn index(&mut self, iface: &str) -> Result<i32, TcError>;
    /// See [`Tc::dump`].
    fn dump(&mut self, what: What, index: i32, parent: u32) -> Result<Vec<Object>, TcError>;
    /// Has a change made.
    fn apply(&mut self, change: &Change) -> Result<(), TcError>;
    /// Makes the tree where nobody sees it, to find out whether it can be made again: what fails there would fail at
    /// exit. Says why not.
    fn rehearse(&mut self, tree: &[Object]) -> Result<(), ShapeError>;
}

impl Kernel for Tc {
    fn index(&mut self, iface: &str) -> Result<i32, TcError> {
        Self::index(self, iface)
    }
    fn dump(&mut self, what: What, index: i32, parent: u32) -> Result<Vec<Object>, TcError> {
        Self::dump(self, what, index, parent)
    }
    fn apply(&mut self, change: &Change) -> Result<(), TcError> {
        Self::apply(self, change)
    }
    fn rehearse(&mut self, tree: &[Object]) -> Result<(), ShapeError> {
        let tried = in_a_fresh_network(|| {
            let mut there = Self::open()?;
            let index = there.index("lo")?;
            make_again(&mut there, index, tree)
        });
        tried.map_err(|e| ShapeError::Port(format!("no network namespace to try it in: {e}")))?
    }
}

/// Whose the port's root qdisc is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The kernel's own: nobody has set anything up (a qdisc that somebody made has a handle).
    Kernel,
    /// An agent's.
    Ours,
    /// Somebody else's.
    Foreign {
        /// "tbf 8001:".
        what: String,
        /// Its handle.
        handle: u32,
    },
}

/// Handle of our root.
pub const OUR_ROOT: u32 = (MAJOR as u32) << 16;

fn beside_the_root(o: &Object) -> bool {
    o.parent() == tc::CLSACT
}

/// Finds out.
pub fn owner(kernel: &mut dyn Kernel, index: i32) -> Result<Owner, TcError> {
    let qdiscs = kernel.dump(What::Qdisc, index, 0)?;
    Ok(match qdiscs.iter().find(|o| o.parent() == ROOT) {
        None => Owner::Kernel,
        Some(o) if o.handle() == 0 => Owner::Kernel,
        Some(o) if o.handle() == OUR_ROOT && o.kind() == "htb" => Owner::Ours,
        Some(o) => {
            Owner::Foreign { what: format!("{} {}", o.kind(), show_handle(o.handle())), handle: o.handle() }
        }
    })
}

/// The whole tree below the root, in an order in which it can be made again: qdiscs before their classes, classes
/// before what hangs on them, filters last. What the kernel made by itself has no handle, and is not in it.
pub fn read_tree(kernel: &mut dyn Kernel, index: i32) -> Result<Vec<Object>, TcError> {
    let mut left = kernel.dump(What::Qdisc, index, 0)?;
    left.retain(|o| !beside_the_root(o) && o.handle() != 0);
    let qdiscs: Vec<u32> = left.iter().map(Object::handle).collect();
    let mut classes = kernel.dump(What::Class, index, 0)?;
    classes.retain(|o| qdiscs.contains(&(o.handle() & 0xffff_0000)));
    let mut filters = Vec::new();
    let places: HashSet<u32> = qdiscs.iter().copied().chain(classes.iter().map(Object::handle)).collect();
    for at in places {
        let found = kernel.dump(What::Filter, index, at)?;
        // The kernel also lists each preference once, as an entry without options.
        filters.extend(found.into_iter().filter(|f| f.parent() == at && f.options().is_some()));
    }
    left.append(&mut classes);
    let mut out: Vec<Object> = Vec::with_capacity(left.len() + filters.len());
    let mut there: HashSet<u32> = HashSet::new();
    while !left.is_empty() {
        let ready = |o: &Object| match (o.what, o.parent()) {
            (What::Qdisc, ROOT) => true,
            // A class at the top says "root", whichever qdisc it is in.
            (What::Class, ROOT) => there.contains(&(o.handle() & 0xffff_0000)),
            (_, parent) => there.contains(&parent),
        };
        let (now, later): (Vec<_>, Vec<_>) = left.into_iter().partition(ready);
        if now.is_empty() {
            // Hangs on something that is not shown; the comparison will tell whether that matters.
            out.extend(later);
            break;
        }
        there.extend(now.iter().map(Object::handle));
        out.extend(now);
        left = later;
    }
    filters.sort_by_key(|f| (f.parent(), f.info() >> 16, f.handle()));
    out.extend(filters);
    Ok(out)
}

/// Makes `tree` on `index`, in the place of whatever root is there; then it must be there as it was.
pub fn make_again(kernel: &mut dyn Kernel, index: i32, tree: &[Object]) -> Result<(), ShapeError> {
    let now = read_tree(kernel, index)?;
    if difference(tree, &now).is_none() {
        return Ok(());
    }
    // A part of it: the kernel replaces a root by one of another handle only.
    if let (Some(root), Some(wanted)) = (now.first(), tree.first())
        && root.parent() == ROOT
        && root.handle() == wanted.handle()
    {
        kernel.apply(&tc::delete_root(index, root.handle()))?;
    }
    for o in tree.iter().filter(|o| !o.comes_by_itself()) {
        match kernel.apply(&tc::recreate(index, o)) {
            Ok(()) => {}
            // Some qdiscs make their classes themselves; the comparison has the last word.
            Err(e)
                if o.what == What::Class
                    && matches!(e.os_error(), Some(libc::EEXIST | libc::EOPNOTSUPP | libc::ENOSYS)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let now = read_tree(kernel, index)?;
    match difference(tree, &now) {
        None => Ok(()),
        Some(what) => Err(ShapeError::NotRestored(format!("{what} did not come back as it was"))),
    }
}

/// The first thing that is not in both.
pub fn difference(a: &[Object], b: &[Object]) -> Option<String> {
    let sorted = |list: &[Object]| {
        let mut v: Vec<_> = list.iter().map(|o| (o.identity(), name(o))).collect();
        v.sort();
        v
    };
    let (a, b) = (sorted(a), sorted(b));
    let missing = a.iter().find(|x| !b.contains(x)).or_else(|| b.iter().find(|x| !a.contains(x)));
    missing.map(|x| x.1.clone())
}

fn name(o: &Object) -> String {
    let what = match o.what {
        What::Qdisc => "qdisc",
        What::Class => "class",
        What::Filter => "filter",
    };
    let at = if o.what == What::Filter { o.parent() } else { o.handle() };
    format!("{what} {} {}", o.kind(), show_handle(at))
}

/// Sets our tree up in the place of whatever root is there.
pub fn set_up(kernel: &mut dyn Kernel, index: i32, tree: &[HtbClass]) -> Result<(), TcError> {
    kernel.apply(&tc::htb_root(index))?;
    change(kernel, index, &[], tree)
}

/// Changes our tree where it differs; nothing is taken away, so no flow is disturbed. What shrinks goes first.
pub fn change(
    kernel: &mut dyn Kernel,
    index: i32,
    old: &[HtbClass],
    new: &[HtbClass],
) -> Result<(), TcError> {
    let was = |c: &HtbClass| old.iter().find(|o| o.minor == c.minor);
    let shrinks = |c: &HtbClass| was(c).is_some_and(|o| o.ceil > c.ceil);
    for pass in [true, false] {
        for c in new.iter().filter(|c| shrinks(c) == pass && was(c) != Some(c)) {
            kernel.apply(&tc::htb_class(index, c))?;
            if c.queue > 0 && was(c).is_none_or(|o| o.queue != c.queue) {
                kernel.apply(&tc::byte_fifo(index, c))?;
            }
        }
    }
    Ok(())
}
