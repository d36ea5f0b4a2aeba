//! A QEMU's migration capabilities and parameters as they were found, so that they can be put back: an
//! operator's own migration must work afterwards as if nobody had been there.

use super::{MigrateStatus, Qmp, QmpError, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// What was found, of all that was changed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Capabilities, and whether they were on.
    #[serde(default)]
    pub capabilities: BTreeMap<String, bool>,
    /// Parameters, in the units of `query-migrate-parameters`.
    #[serde(default)]
    pub parameters: BTreeMap<String, Value>,
}

impl Settings {
    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty() && self.parameters.is_empty()
    }

    /// What was found before this was found, and has not been put back yet, is how it was.
    pub fn after(&mut self, before: Self) {
        self.capabilities.extend(before.capabilities);
        self.parameters.extend(before.parameters);
    }
}

impl Qmp {
    /// All capabilities that this QEMU lists, and whether they are on.
    pub fn capabilities(&mut self) -> Result<BTreeMap<String, bool>> {
        let all = self.execute("query-migrate-capabilities", Value::Null)?;
        let list = all
            .as_array()
            .ok_or_else(|| self.grammar("query-migrate-capabilities", "no list in the reply"))?;
        Ok(list
            .iter()
            .filter_map(|c| Some((c["capability"].as_str()?.to_owned(), c["state"].as_bool()?)))
            .collect())
    }

    /// All parameters.
    pub fn parameters(&mut self) -> Result<Map<String, Value>> {
        match self.execute("query-migrate-parameters", Value::Null)? {
            Value::Object(all) => Ok(all),
            _ => Err(self.grammar("query-migrate-parameters", "no object in the reply")),
        }
    }

    /// What [`Qmp::set_capabilities`] of `capabilities` and setting the named parameters, perhaps more than
    /// once, would change.
    pub fn found(&mut self, capabilities: &[(&str, bool)], parameters: &[&str]) -> Result<Settings> {
        let listed = self.capabilities()?;
        let changed = |(name, on): &&(&str, bool)| listed.get(*name).is_some_and(|was| was != on);
        let capabilities =
            capabilities.iter().filter(changed).map(|(name, on)| ((*name).to_owned(), !on)).collect();
        let mut found = Settings { capabilities, parameters: BTreeMap::new() };
        if !parameters.is_empty() {
            let now = self.parameters()?;
            let named = parameters.iter().filter_map(|p| Some(((*p).to_owned(), now.get(*p)?.clone())));
            found.parameters = named.collect();
        }
        Ok(found)
    }

    /// Frees somebody else's migration that stands still because of a capability that is to be put back: who began it does
    /// not know that it waits. Only when none of this program can be under way.
    ///
    /// With a return path it would wait next for a word that only a QEMU says: a save to a file then hangs for ever, and its
    /// VM with it (seen with 7.2). So if that is to be put back too it is cancelled, while nothing can have been loaded yet.
    pub fn let_pass(&mut self, found: &Settings) -> Result<()> {
        let ours = |name: &str| found.capabilities.get(name) == Some(&false);
        if !ours("pause-before-switchover") || self.query_migrate()?.status != MigrateStatus::PreSwitchover {
            return Ok(());
        }
        if !ours("return-path") {
            return self.migrate_continue();
        }
        tracing::warn!(
            "QMP {}: its owner's own migration, begun before the settings were his again, waits for ever: cancelled",
            self.path().display()
        );
        self.migrate_cancel()
    }

    /// Puts back what was found; somebody else's migration that is in the way because of it is let pass. The error says that
    /// one is in the way still.
    pub fn put_back_after(&mut self, found: &Settings) -> Result<()> {
        let first = self.put_back(found);
        if !matches!(first, Err(QmpError::Refused { .. })) {
            return first;
        }
        self.let_pass(found)?;
        self.put_back(found)
    }

    /// Puts back what was found, where it is different now.
    pub fn put_back(&mut self, found: &Settings) -> Result<()> {
        // Parameters of multifd are only taken while it may be on.
        if !found.parameters.is_empty() {
            let now = self.parameters()?;
            let differ = found.parameters.iter().filter(|(name, was)| now.get(*name) != Some(*was));
            let map: Map<String, Value> = differ.map(|(name, was)| (name.clone(), was.clone())).collect();
            if !map.is_empty() {
                self.set_parameters(map)?;
            }
        }
        if !found.capabilities.is_empty() {
            let listed = self.capabilities()?;
            let differ = found.capabilities.iter().filter(|(name, was)| listed.get(*name) == Some(&!**was));
            let list: Vec<Value> =
                differ.map(|(name, was)| json!({ "capability": name, "state": was })).collect();
            if !list.is_empty() {
                self.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
            }
        }
        Ok(())
    }
}
