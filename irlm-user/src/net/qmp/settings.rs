//! A QEMU's migration capabilities and parameters as they were found, so that they can be put back: an
//! operator's own migration must work afterwards as if nobody had been there.

use super::{Qmp, Result};
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
