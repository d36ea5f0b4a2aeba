//! What compression did, and what processor time it and the rest took.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Page contents sent, before and after compression, and processor time by stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Work {
    /// Contents sent, bytes as they were.
    pub raw_bytes: u64,
    /// What they came to on the wire.
    pub wire_bytes: u64,
    /// `raw_bytes` by zstd level, "raw", or "passed on" for what another host had compressed.
    pub by_level: BTreeMap<String, u64>,
    /// Digests, seconds. With the preparation at a source host, the reading of guests included.
    pub hash_s: f64,
    /// Compression, seconds.
    pub compress_s: f64,
    /// Decompression, seconds.
    pub decompress_s: f64,
    /// Similar pages and differences, seconds.
    pub similar_s: f64,
    /// Parsing, tables, sockets, seconds.
    pub other_s: f64,
}

impl Work {
    /// Adds another's figures.
    pub fn add(&mut self, o: &Self) {
        self.raw_bytes += o.raw_bytes;
        self.wire_bytes += o.wire_bytes;
        for (level, n) in &o.by_level {
            *self.by_level.entry(level.clone()).or_default() += n;
        }
        self.hash_s += o.hash_s;
        self.compress_s += o.compress_s;
        self.decompress_s += o.decompress_s;
        self.similar_s += o.similar_s;
        self.other_s += o.other_s;
    }

    /// Processor time of all stages, seconds.
    #[must_use]
    pub fn cpu_s(&self) -> f64 {
        self.hash_s + self.compress_s + self.decompress_s + self.similar_s + self.other_s
    }
}

fn name(level: i32) -> String {
    if level == 0 { "raw".to_owned() } else { level.to_string() }
}

impl From<crate::flow::work::Worked> for Work {
    fn from(w: crate::flow::work::Worked) -> Self {
        let passed_on = (w.passed_on > 0).then(|| ("passed on".to_owned(), w.passed_on));
        let [hash, compress, decompress, similar, other] = w.cpu.map(|d| d.as_secs_f64());
        Self {
            raw_bytes: w.raw_bytes,
            wire_bytes: w.wire_bytes,
            by_level: w.by_level.into_iter().map(|(l, n)| (name(l), n)).chain(passed_on).collect(),
            hash_s: hash,
            compress_s: compress,
            decompress_s: decompress,
            similar_s: similar,
            other_s: other,
        }
    }
}
