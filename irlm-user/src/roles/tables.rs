//! What tables for people have in common.

use crate::control::api::PageCounts;
use comfy_table::{Cell, CellAlignment, Table, presets};

pub(super) fn table(header: &[&str]) -> Table {
    let mut t = Table::new();
    t.load_style(presets::UTF8_BORDERS_ONLY);
    t.set_header(header.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    t
}

pub(super) fn right(text: impl std::fmt::Display) -> Cell {
    Cell::new(text.to_string()).set_alignment(CellAlignment::Right)
}

pub(super) fn pages(p: &PageCounts) -> [Cell; 6] {
    [p.unique, p.shared, p.reference, p.remote_reference, p.uniform, p.answered].map(right)
}
