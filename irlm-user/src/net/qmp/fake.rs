//! A QEMU for tests: a monitor that keeps capabilities, parameters, a run state and a migration, for one
//! client after the other, and does of its own accord only what a test has it do.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}}}"#;

/// How it is.
#[derive(Debug)]
pub(crate) struct Is {
    pub(crate) status: String,
    pub(crate) migration: String,
    pub(crate) error: Option<String>,
    pub(crate) capabilities: Value,
    pub(crate) parameters: Value,
    /// What it was told to do, questions left out.
    pub(crate) told: Vec<String>,
    /// Commands that it refuses, and why.
    pub(crate) refuses: Vec<(&'static str, &'static str)>,
    /// Commands that it does not answer.
    pub(crate) mute: Vec<&'static str>,
    /// It will not run by itself when it has loaded.
    pub(crate) stays_paused: bool,
    events: Vec<String>,
}

/// A handle on it.
#[derive(Clone, Debug)]
pub(crate) struct FakeQemu(Arc<Mutex<Is>>);

impl FakeQemu {
    /// Starts one in this run state; it listens there as long as the directory is kept.
    pub(crate) fn start(status: &str) -> (Self, tempfile::TempDir, PathBuf) {
        let is = Is {
            status: status.into(),
            migration: "none".into(),
            error: None,
            capabilities: json!({ "events": false, "return-path": false, "multifd": true, "xbzrle": false,
                "pause-before-switchover": false, "late-block-activate": false }),
            parameters: json!({ "max-bandwidth": 1000, "downtime-limit": 77, "multifd-channels": 2 }),
            told: Vec::new(),
            refuses: Vec::new(),
            mute: Vec::new(),
            stays_paused: false,
            events: Vec::new(),
        };
        let this = Self(Arc::new(Mutex::new(is)));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let listener = UnixListener::bind(&path).unwrap();
        let served = this.clone();
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                // A client that goes in the middle is one that a test dropped.
                let _ = served.serve(client);
            }
        });
        (this, dir, path)
    }

    pub(crate) fn is(&self) -> MutexGuard<'_, Is> {
        self.0.lock().unwrap()
    }

    /// Its migration comes into another state, and it says so; and its VM into another one, with an event of
    /// that name.
    pub(crate) fn migration(&self, word: &str) {
        let mut is = self.is();
        is.migration = word.into();
        is.events
            .push(json!({ "event": "MIGRATION", "data": { "status": word }, "timestamp": {} }).to_string());
    }

    pub(crate) fn becomes(&self, status: &str, event: &str) {
        let mut is = self.is();
        is.status = status.into();
        is.events
            .push(json!({ "event": event, "timestamp": { "seconds": 5, "microseconds": 0 } }).to_string());
    }

    fn serve(&self, client: UnixStream) -> std::io::Result<()> {
        client.set_read_timeout(Some(Duration::from_millis(5)))?;
        let mut out = client.try_clone()?;
        let mut lines = BufReader::new(client);
        writeln!(out, "{GREETING}")?;
        let mut line = String::new();
        loop {
            let events = std::mem::take(&mut self.is().events);
            events.iter().try_for_each(|e| writeln!(out, "{e}"))?;
            match lines.read_line(&mut line) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                Err(e) => return Err(e),
            }
            let v: Value = serde_json::from_str(&line).unwrap();
            line.clear();
            let command = v["execute"].as_str().unwrap();
            let mut is = self.is();
            if is.mute.contains(&command) {
                continue;
            }
            let mut reply = match is.refuses.iter().find(|(c, _)| *c == command) {
                Some((_, why)) => json!({ "error": { "class": "GenericError", "desc": why } }),
                None => is.answer(command, &v["arguments"]),
            };
            if command == "quit" {
                return Ok(());
            }
            drop(is);
            reply["id"] = v["id"].clone();
            writeln!(out, "{reply}")?;
        }
    }
}

impl Is {
    fn answer(&mut self, command: &str, args: &Value) -> Value {
        if !command.starts_with("q") || command == "quit" {
            self.told.push(command.to_owned());
        }
        let answer = match command {
            "query-status" => json!({ "running": self.status == "running", "status": self.status }),
            "query-migrate" => match &self.error {
                Some(e) => json!({ "status": self.migration, "error-desc": e }),
                None => json!({ "status": self.migration }),
            },
            "query-uuid" => json!({ "UUID": "u" }),
            "query-memory-size-summary" => json!({ "base-memory": 4096 }),
            "qom-get" => json!("pc-machine"),
            "query-memory-devices" | "query-jobs" => json!([]),
            "query-migrate-parameters" => self.parameters.clone(),
            "query-migrate-capabilities" => {
                let all = self.capabilities.as_object().unwrap().iter();
                all.map(|(k, v)| json!({ "capability": k, "state": v })).collect()
            }
            "migrate-set-capabilities" => {
                for one in args["capabilities"].as_array().unwrap() {
                    let name = one["capability"].as_str().unwrap();
                    assert!(self.capabilities.get(name).is_some(), "{name} is none that it lists");
                    self.capabilities[name] = one["state"].clone();
                }
                json!({})
            }
            "migrate-set-parameters" => {
                args.as_object().unwrap().iter().for_each(|(k, v)| self.parameters[k] = v.clone());
                json!({})
            }
            "migrate" => self.sets(|is| is.migration = "active".into()),
            "migrate-incoming" => self.sets(|is| is.migration = "setup".into()),
            "migrate_cancel" => self.sets(|is| is.migration = "cancelled".into()),
            "stop" if self.status == "inmigrate" => self.sets(|is| is.stays_paused = true),
            "stop" => self.sets(|is| is.status = "paused".into()),
            "cont" => self.sets(|is| is.status = "running".into()),
            _ => json!({}),
        };
        json!({ "return": answer })
    }

    fn sets(&mut self, set: impl FnOnce(&mut Self)) -> Value {
        set(self);
        json!({})
    }
}
