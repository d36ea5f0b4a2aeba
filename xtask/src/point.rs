//! A point that an issue must show: one line of JSON, in the words of `irlm-lab evidence`.

use crate::ctx::Ctx;
use anyhow::Result;
use serde::Serialize;

/// One of them, as it was measured just now.
#[derive(Serialize)]
pub(crate) struct Point {
    pub(crate) id: &'static str,
    what: &'static str,
    value: f64,
    bound: f64,
    pub(crate) holds: bool,
    how: String,
}

/// A point's name, and what measures it.
pub(crate) type Measure = (&'static str, fn(&Ctx) -> Result<Point>);

/// A value that may be so large at most.
pub(crate) fn at_most(
    id: &'static str,
    what: &'static str,
    (value, bound): (f64, f64),
    how: String,
) -> Point {
    Point { id, what, value, bound, holds: value <= bound, how }
}

/// A value that must be so large at least.
pub(crate) fn at_least(
    id: &'static str,
    what: &'static str,
    (value, bound): (f64, f64),
    how: String,
) -> Point {
    Point { id, what, value, bound, holds: value >= bound, how }
}

/// One that nobody has measured: it does not hold.
pub(crate) fn not_measured(id: &'static str, what: &'static str) -> Point {
    Point { id, what, value: 0.0, bound: 0.0, holds: false, how: "not measured".to_owned() }
}
