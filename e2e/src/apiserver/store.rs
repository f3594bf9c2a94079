//! The objects and their history.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::kind::Kind;

/// Where an object is: kind, namespace (empty where there is none), name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The kind.
    pub kind: &'static Kind,
    /// Its namespace, or nothing.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// One write.
#[derive(Clone, Debug)]
pub struct Change {
    /// The resource version that it made.
    pub version: u64,
    /// Of which object.
    pub key: Key,
    /// As it was; none when it was created.
    pub before: Option<Value>,
    /// As it is; none when it was deleted.
    pub after: Option<Value>,
}

/// All objects and all that was ever done to them.
pub struct Store {
    version: u64,
    compacted: u64,
    objects: BTreeMap<Key, Value>,
    changes: Vec<Change>,
}

impl Store {
    /// An empty store. Versions don't begin at 1, as those of a cluster in use don't.
    pub fn new() -> Self {
        Self { version: 1000, compacted: 1000, objects: BTreeMap::new(), changes: Vec::new() }
    }

    /// The version of the last write.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The oldest version that a watch may start from.
    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Forgets all older versions.
    pub fn compact(&mut self) {
        self.version += 1;
        self.compacted = self.version;
    }

    /// An object as it is.
    pub fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    /// Writes an object, new or not, and gives it as it is then: with kind, name, uid, time of
    /// creation and version. A write that changes nothing makes no version.
    pub fn write(&mut self, key: Key, mut object: Value) -> Value {
        let before = self.objects.get(&key).cloned();
        object["apiVersion"] = json!(key.kind.api_version());
        object["kind"] = json!(key.kind.kind);
        if !object["metadata"].is_object() {
            object["metadata"] = Value::Object(Map::new());
        }
        let metadata = &mut object["metadata"];
        metadata["name"] = json!(key.name);
        if key.kind.namespaced {
            metadata["namespace"] = json!(key.namespace);
        }
        if let Some(before) = &before {
            for fixed in ["uid", "creationTimestamp", "resourceVersion"] {
                metadata[fixed] = before["metadata"][fixed].clone();
            }
            if *before == object {
                return object;
            }
        } else {
            if !metadata["uid"].is_string() {
                metadata["uid"] = json!(Uuid::new_v4().to_string());
            }
            metadata["creationTimestamp"] = json!(now());
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(key.clone(), object.clone());
        let after = Some(object.clone());
        self.changes.push(Change { version: self.version, key, before, after });
        object
    }

    /// Deletes an object and gives it as it was, with the version of its deletion.
    pub fn remove(&mut self, key: &Key) -> Option<Value> {
        let before = self.objects.remove(key)?;
        self.version += 1;
        let mut last = before.clone();
        last["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = key.clone();
        self.changes.push(Change { version: self.version, key, before: Some(before), after: None });
        Some(last)
    }

    /// The objects of a kind, in the order of namespaces and names, as they were at `version`.
    pub fn list(&self, kind: &'static Kind, version: u64) -> BTreeMap<Key, Value> {
        let mut objects: BTreeMap<Key, Value> = self
            .objects
            .iter()
            .filter(|(key, _)| key.kind == kind)
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        for change in self.since(version).iter().rev().filter(|change| change.key.kind == kind) {
            match &change.before {
                Some(before) => objects.insert(change.key.clone(), before.clone()),
                None => objects.remove(&change.key),
            };
        }
        objects
    }

    /// What was written after `version`.
    pub fn since(&self, version: u64) -> &[Change] {
        let start = self.changes.partition_point(|change| change.version <= version);
        &self.changes[start..]
    }
}

/// The time in the form of Kubernetes' metadata: whole seconds.
pub fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Applies a JSON merge patch (RFC 7386).
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.as_str()).or_insert(Value::Null), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_the_past() {
        let kind = Kind::of("v1", "Pod").expect("pods are known");
        let key = |name: &str| Key { kind, namespace: "shop".into(), name: name.into() };
        let mut store = Store::new();
        store.write(key("a"), json!({"spec": {"x": 1}}));
        store.write(key("b"), json!({}));
        let then = store.version();
        store.write(key("a"), json!({"spec": {"x": 2}}));
        store.remove(&key("b"));
        store.write(key("c"), json!({}));
        let names = |version| {
            let list = store.list(kind, version);
            list.iter().map(|(key, pod)| format!("{}{}", key.name, pod["spec"]["x"])).collect()
        };
        let (past, present): (Vec<_>, Vec<_>) = (names(then), names(store.version()));
        assert_eq!(past, ["a1", "bnull"]);
        assert_eq!(present, ["a2", "cnull"]);
    }

    #[test]
    fn writing_the_same_makes_no_version() {
        let kind = Kind::of("v1", "Namespace").expect("namespaces are known");
        let key = Key { kind, namespace: String::new(), name: "a".into() };
        let mut store = Store::new();
        let written = store.write(key.clone(), json!({"spec": {}}));
        assert_eq!(store.write(key.clone(), json!({"spec": {}})), written);
        assert_eq!(store.write(key, written.clone()), written);
    }

    #[test]
    fn merges() {
        let mut value = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut value, &json!({"a": {"b": null, "e": {"f": null}}, "d": [2]}));
        assert_eq!(value, json!({"a": {"c": 2, "e": {}}, "d": [2]}));
    }
}
