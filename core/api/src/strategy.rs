//! Strategies: parts of speculative decoding that vary by themselves and are named in a configuration.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::Value;

use crate::Origin;

/// A strategy by name, with parameters if it takes any: written as its name, or as `{"name": …, "parameters": {…}}`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StrategyConfig {
    /// Its name, in lower case.
    pub name: String,
    /// Its parameters, an object of its own; null for the defaults.
    pub parameters: Value,
}

impl StrategyConfig {
    /// A strategy with its default parameters.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.trim().to_ascii_lowercase(), parameters: Value::Null }
    }

    /// With these parameters.
    #[must_use]
    pub fn with(mut self, parameters: Value) -> Self {
        self.parameters = parameters;
        self
    }
}

impl fmt::Display for StrategyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.parameters {
            Value::Null => f.write_str(&self.name),
            parameters => write!(f, "{} {parameters}", self.name),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
    #[serde(default)]
    parameters: Value,
}

impl Serialize for StrategyConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.parameters {
            Value::Null => serializer.serialize_str(&self.name),
            parameters => Named { name: self.name.clone(), parameters: parameters.clone() }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for StrategyConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrategyVisitor)
    }
}

/// By hand, because an untagged enum swallows the name of an unknown field.
struct StrategyVisitor;

impl<'de> Visitor<'de> for StrategyVisitor {
    type Value = StrategyConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name, or { \"name\": name, \"parameters\": { … } }")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<StrategyConfig, E> {
        Ok(StrategyConfig::new(name))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<StrategyConfig, A::Error> {
        let Named { name, parameters } = Named::deserialize(MapAccessDeserializer::new(map))?;
        Ok(StrategyConfig::new(&name).with(parameters))
    }
}

/// What the registration macros of strategies submit.
pub struct StrategyEntry<T: ?Sized> {
    /// Where it comes from.
    pub origin: Origin,
    /// The [`INTERFACE_VERSION`](crate::INTERFACE_VERSION) it was built for.
    pub interface: u32,
    /// The name users select it by.
    pub name: &'static str,
    /// Makes it from its parameters; the error is a sentence.
    pub make: fn(&Value) -> Result<Box<T>, String>,
}

// Derived ones would ask the same of `T`.
impl<T: ?Sized> Clone for StrategyEntry<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: ?Sized> Copy for StrategyEntry<T> {}

impl<T: ?Sized> fmt::Debug for StrategyEntry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StrategyEntry").field("name", &self.name).field("origin", &self.origin).finish()
    }
}

/// Reads parameters as a type of their own; null are the defaults.
///
/// # Errors
/// What is no object of its fields, with the field at fault.
pub fn read<T: DeserializeOwned + Default>(parameters: &Value) -> Result<T, String> {
    match parameters {
        Value::Null => Ok(T::default()),
        // serde would take an array for the fields in order.
        Value::Object(_) => serde_json::from_value(parameters.clone()).map_err(|error| error.to_string()),
        other => Err(format!("{other} is no JSON object")),
    }
}

/// That there are no parameters, for a strategy that takes none.
///
/// # Errors
/// Parameters.
pub fn none(parameters: &Value) -> Result<(), String> {
    match parameters {
        Value::Null => Ok(()),
        Value::Object(fields) if fields.is_empty() => Ok(()),
        other => Err(format!("{other} is given, but it takes no parameters")),
    }
}

/// The strategies of a kind that this crate has.
macro_rules! built_in {
    ($kind:ty, $list:ident: [$($name:literal => $make:expr,)*]) => {
        /// Those that are always there.
        pub(crate) const $list: &[$crate::StrategyEntry<$kind>] = &[$(
            $crate::StrategyEntry {
                origin: $crate::Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") },
                interface: $crate::INTERFACE_VERSION,
                name: $name,
                make: $make,
            },
        )*];
    };
}
pub(crate) use built_in;
