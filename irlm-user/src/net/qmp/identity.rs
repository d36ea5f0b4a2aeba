//! Who a QEMU's VM is, and what it is busy with: what is compared and looked at before anything is done to
//! it.

use super::{Qmp, QmpError, Result};
use serde_json::{Value, json};

/// Something that QEMU does beside running the VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Job {
    /// Its name.
    pub id: String,
    /// `snapshot-save`, `mirror`, …
    pub kind: String,
    /// `running`, `concluded`, …
    pub status: String,
}

/// How much memory a VM has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    /// Bytes, those that virtio-mem could give included: how much of them is plugged is the guest's state,
    /// which moves.
    pub bytes: u64,
    /// Whether it has virtio-mem devices.
    pub virtio_mem: bool,
}

impl Qmp {
    /// `-uuid`; all zeros without it.
    pub fn vm_uuid(&mut self) -> Result<String> {
        let v = self.execute("query-uuid", Value::Null)?;
        v["UUID"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| self.grammar("query-uuid", "no UUID in the reply"))
    }

    /// `-name`; empty without it.
    pub fn vm_name(&mut self) -> Result<String> {
        let v = self.execute("query-name", Value::Null)?;
        Ok(v["name"].as_str().unwrap_or_default().to_owned())
    }

    /// The machine type, with its version.
    pub fn machine(&mut self) -> Result<String> {
        let v = self.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?;
        let kind = v.as_str().ok_or_else(|| self.grammar("qom-get", "no text in the reply"))?;
        Ok(kind.strip_suffix("-machine").unwrap_or(kind).to_owned())
    }

    /// How much memory the VM has.
    pub fn memory(&mut self) -> Result<Memory> {
        let base = self.execute("query-memory-size-summary", Value::Null)?;
        let bytes = base["base-memory"].as_u64();
        let bytes =
            bytes.ok_or_else(|| self.grammar("query-memory-size-summary", "no base-memory in the reply"))?;
        let mut memory = Memory { bytes, virtio_mem: false };
        let devices = self.if_known("query-memory-devices")?;
        for d in devices.as_array().map(Vec::as_slice).unwrap_or_default() {
            let size = match d["type"].as_str() {
                Some("virtio-mem") => {
                    memory.virtio_mem = true;
                    "max-size"
                }
                // virtio-pmem and the like are disks.
                Some("dimm" | "nvdimm") => "size",
                _ => continue,
            };
            memory.bytes = memory.bytes.saturating_add(d["data"][size].as_u64().unwrap_or(0));
        }
        Ok(memory)
    }

    /// Jobs that are not over.
    pub fn jobs(&mut self) -> Result<Vec<Job>> {
        let all = self.if_known("query-jobs")?;
        let list = all.as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |v: &Value| v.as_str().unwrap_or("?").to_owned();
        let jobs = list.iter().map(|j| Job {
            id: text(&j["id"]),
            kind: text(&j["type"]),
            status: text(&j["status"]),
        });
        Ok(jobs.filter(|j| !matches!(j.status.as_str(), "concluded" | "null")).collect())
    }

    /// The answer to a question that not every QEMU knows; null from one that does not.
    fn if_known(&mut self, command: &str) -> Result<Value> {
        match self.execute(command, Value::Null) {
            Err(QmpError::Refused { class, .. }) if class == "CommandNotFound" => Ok(Value::Null),
            other => other,
        }
    }
}
