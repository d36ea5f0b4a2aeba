//! A QEMU's memory backends, and having their memory there before a guest needs it.

use super::{Qmp, Result};
use serde_json::{Value, json};

/// One backend (`query-memdev`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Its name below `/objects`.
    pub id: String,
    /// `memory-backend-memfd` and the like.
    pub kind: String,
    /// Bytes.
    pub size: u64,
    /// Whether others can map it.
    pub share: bool,
    /// Whether all of it is there already.
    pub prealloc: bool,
}

impl Qmp {
    /// The backends with a name.
    pub fn memory_backends(&mut self) -> Result<Vec<Backend>> {
        let answer = self.execute("query-memdev", Value::Null)?;
        let list = answer.as_array().ok_or_else(|| self.grammar("query-memdev", "no list in the reply"))?;
        let mut out = Vec::new();
        for v in list {
            let (Some(id), Some(size)) = (v["id"].as_str(), v["size"].as_u64()) else { continue };
            let path = format!("/objects/{id}");
            let kind = self.execute("qom-get", json!({ "path": path, "property": "type" }))?;
            out.push(Backend {
                id: id.to_owned(),
                kind: kind.as_str().unwrap_or_default().to_owned(),
                size,
                share: v["share"].as_bool().unwrap_or(false),
                prealloc: v["prealloc"].as_bool().unwrap_or(false),
            });
        }
        Ok(out)
    }

    /// Has all of a backend's memory be there, made by so many threads. Answers when it is; until then QEMU answers nobody.
    /// How many threads it would have taken by itself is put back.
    pub fn populate(&mut self, id: &str, threads: u32) -> Result<()> {
        let path = format!("/objects/{id}");
        let found = self.execute("qom-get", json!({ "path": path, "property": "prealloc-threads" }))?;
        let mut set = |property: &str, value: Value| {
            self.execute("qom-set", json!({ "path": path, "property": property, "value": value })).map(drop)
        };
        set("prealloc-threads", json!(threads))?;
        let made = set("prealloc", json!(true));
        set("prealloc-threads", found)?;
        made
    }
}
