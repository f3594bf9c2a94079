//! Label and field selectors.

use serde_json::Value;

use super::kind::Kind;
use super::status::Failure;

/// Which objects of a kind a request is about.
#[derive(Clone, Debug)]
pub struct Selector {
    /// The kind.
    pub kind: &'static Kind,
    namespace: Option<String>,
    labels: Vec<LabelTerm>,
    fields: Vec<FieldTerm>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct LabelTerm {
    key: String,
    test: LabelTest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum LabelTest {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
}

#[derive(Clone, Debug)]
struct FieldTerm {
    path: String,
    value: String,
    equal: bool,
}

impl Selector {
    /// Reads the selectors of a request; empty ones select all. Fails with 400, as the real
    /// server does, when one can't be read or names a field that the kind doesn't have.
    pub fn parse(
        kind: &'static Kind,
        namespace: Option<&str>,
        labels: &str,
        fields: &str,
    ) -> Result<Self, Failure> {
        Ok(Self {
            kind,
            namespace: namespace.map(str::to_owned),
            labels: parse_labels(labels)?,
            fields: parse_fields(kind, fields)?,
        })
    }

    /// Whether nothing is selected by label or field.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether the object, which must be of the kind, is selected.
    pub fn matches(&self, object: &Value) -> bool {
        let in_namespace = self
            .namespace
            .as_ref()
            .is_none_or(|namespace| text_at(object, "metadata.namespace") == *namespace);
        in_namespace
            && self.labels.iter().all(|term| term.matches(&object["metadata"]["labels"]))
            && self
                .fields
                .iter()
                .all(|term| (text_at(object, &term.path) == term.value) == term.equal)
    }
}

impl LabelTerm {
    fn matches(&self, labels: &Value) -> bool {
        let value = labels[&self.key].as_str();
        match &self.test {
            LabelTest::In(values) => value.is_some_and(|value| values.iter().any(|v| v == value)),
            LabelTest::NotIn(values) => value.is_none_or(|value| values.iter().all(|v| v != value)),
            LabelTest::Exists => value.is_some(),
            LabelTest::Absent => value.is_none(),
        }
    }
}

/// The text at a dotted path; empty when there is none, which is what field selectors compare.
fn text_at(object: &Value, path: &str) -> String {
    let value = path.split('.').try_fold(object, |value, key| value.get(key));
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn parse_fields(kind: &Kind, text: &str) -> Result<Vec<FieldTerm>, Failure> {
    let terms = text.split(',').filter(|term| !term.is_empty());
    terms
        .map(|term| {
            let (path, equal, value) = if let Some((path, value)) = term.split_once("!=") {
                (path, false, value)
            } else if let Some((path, value)) = term.split_once("==") {
                (path, true, value)
            } else if let Some((path, value)) = term.split_once('=') {
                (path, true, value)
            } else {
                return Err(Failure::bad_request(format!(
                    "invalid selector: '{text}'; can't understand '{term}'"
                )));
            };
            let known = path == "metadata.name"
                || (path == "metadata.namespace" && kind.namespaced)
                || kind.fields.contains(&path);
            if !known {
                return Err(Failure::bad_request(format!("field label not supported: {path}")));
            }
            Ok(FieldTerm { path: path.to_owned(), value: value.to_owned(), equal })
        })
        .collect()
}

fn parse_labels(text: &str) -> Result<Vec<LabelTerm>, Failure> {
    split_outside_parentheses(text)
        .into_iter()
        .filter(|term| !term.trim().is_empty())
        .map(|term| {
            parse_label(term.trim()).ok_or_else(|| {
                Failure::bad_request(format!("unable to parse requirement: '{term}' in '{text}'"))
            })
        })
        .collect()
}

fn parse_label(term: &str) -> Option<LabelTerm> {
    let new = |key: &str, test| {
        let key = key.trim();
        let fine =
            !key.is_empty() && !key.contains(|c: char| c.is_whitespace() || "!=(),".contains(c));
        fine.then(|| LabelTerm { key: key.to_owned(), test })
    };
    let one = |value: &str| vec![value.trim().to_owned()];
    if let Some(key) = term.strip_prefix('!') {
        return new(key, LabelTest::Absent);
    }
    if let Some((left, values)) = term.split_once('(') {
        let values = values.strip_suffix(')')?.split(',').map(|v| v.trim().to_owned()).collect();
        let (key, operator) = left.trim().rsplit_once(char::is_whitespace)?;
        return match operator {
            "in" => new(key, LabelTest::In(values)),
            "notin" => new(key, LabelTest::NotIn(values)),
            _ => None,
        };
    }
    if let Some((key, value)) = term.split_once("!=") {
        return new(key, LabelTest::NotIn(one(value)));
    }
    if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return new(key, LabelTest::In(one(value)));
    }
    new(term, LabelTest::Exists)
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut terms, mut depth, mut start) = (Vec::new(), 0_u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pods(labels: &str, fields: &str) -> Result<Selector, Failure> {
        let kind = Kind::of("v1", "Pod").expect("pods are known");
        Selector::parse(kind, None, labels, fields)
    }

    #[test]
    fn selects() {
        let pod = json!({
            "metadata": {"name": "a", "namespace": "shop", "labels": {"app": "cart", "x.io/y": ""}},
            "spec": {"nodeName": "n1"},
        });
        for (labels, fields, wanted) in [
            ("", "", true),
            ("app=cart", "", true),
            ("app == cart", "", true),
            ("app=other", "", false),
            ("app!=other", "", true),
            ("none!=other", "", true),
            ("app in (x, cart),x.io/y", "", true),
            ("app notin (x,cart)", "", false),
            ("none notin (x)", "", true),
            ("none in (x)", "", false),
            ("!none", "", true),
            ("!app", "", false),
            ("none", "", false),
            ("", "spec.nodeName=n1", true),
            ("", "spec.nodeName==n2", false),
            ("", "spec.nodeName!=n2,metadata.name=a", true),
            ("", "status.podIP=", true),
            ("", "metadata.namespace=shop", true),
            ("app=cart", "metadata.namespace!=shop", false),
        ] {
            let selector = pods(labels, fields).expect("it can be read");
            assert_eq!(selector.matches(&pod), wanted, "{labels} {fields}");
        }
    }

    #[test]
    fn refuses() {
        for (labels, fields) in
            [("a in x", ""), ("a in (x", ""), ("=x", ""), ("", "spec.hostPID=true"), ("", "x")]
        {
            let failure = pods(labels, fields).expect_err("it can't be read");
            assert_eq!(failure.code, 400, "{labels} {fields}");
        }
    }
}
