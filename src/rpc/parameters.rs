//! Takes the parameters of a call apart, with an error text that names the parameter.
//! Used by every method, ours (strict) and SPDK's (lenient). Knows no method.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::RpcError;

/// The error for parameters that are not what a method takes. SPDK's modules differ in its code: those of
/// bdevs and logs answer "internal error".
fn undecodable(method: &str, text: String) -> RpcError {
    let answers_invalid = ["nvmf_", "framework_", "rpc_", "spdk_"];
    if answers_invalid
        .iter()
        .any(|prefix| method.starts_with(prefix))
    {
        RpcError::new(RpcError::INVALID_PARAMETERS, text)
    } else {
        RpcError::parameters(text)
    }
}

/// The parameters of one call. Each is taken out by name; what is left when a strict method calls
/// [`Parameters::finish`] is unknown.
#[derive(Debug)]
pub struct Parameters {
    method: String,
    /// Prefix of nested objects in texts, such as `listen_address.`.
    prefix: String,
    values: Map<String, Value>,
    asked: BTreeSet<&'static str>,
}

impl Parameters {
    /// Opens `params` of `method`; absent parameters are an empty object.
    pub fn new(method: &str, params: Option<Value>) -> Result<Parameters, RpcError> {
        let values = match params {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(values)) => values,
            Some(other) => {
                let text = format!(
                    "{method}: parameters must be an object with names, not {}",
                    kind(&other)
                );
                return Err(undecodable(method, text));
            }
        };
        Ok(Parameters::from_map(method, values))
    }

    fn from_map(method: &str, values: Map<String, Value>) -> Parameters {
        Parameters {
            method: method.to_owned(),
            prefix: String::new(),
            values,
            asked: BTreeSet::new(),
        }
    }

    /// The method, for texts.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Takes a parameter as it is; null is absent.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.asked.insert(name);
        self.values.remove(name).filter(|value| !value.is_null())
    }

    /// Refuses whatever has not been taken.
    pub fn finish(self) -> Result<(), RpcError> {
        let Some(unknown) = self.values.keys().next() else {
            return Ok(());
        };
        let known: Vec<&str> = self.asked.iter().copied().collect();
        Err(undecodable(
            &self.method,
            format!(
                "{}: unknown parameter '{}{}'; it takes {}",
                self.method,
                self.prefix,
                unknown,
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            ),
        ))
    }

    fn wrong(&self, name: &str, expected: &str, got: &Value) -> RpcError {
        undecodable(
            &self.method,
            format!(
                "{}: parameter '{}{name}' must be {expected}, not {}",
                self.method,
                self.prefix,
                kind(got)
            ),
        )
    }

    /// The error for a parameter that has to be there.
    pub fn missing(&self, name: &str) -> RpcError {
        undecodable(
            &self.method,
            format!(
                "{}: parameter '{}{name}' is missing",
                self.method, self.prefix
            ),
        )
    }

    /// A string.
    pub fn string(&mut self, name: &'static str) -> Result<Option<String>, RpcError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a string", &other)),
        }
    }

    /// A string that has to be there.
    pub fn required_string(&mut self, name: &'static str) -> Result<String, RpcError> {
        self.string(name)?.ok_or_else(|| self.missing(name))
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, RpcError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(name, "true or false", &other)),
        }
    }

    /// A boolean that is false when absent.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, RpcError> {
        Ok(self.boolean(name)?.unwrap_or(false))
    }

    /// A whole number. Like SPDK's decoder, `2.0` and `2e3` count as whole.
    pub fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let whole = match &value {
            Value::Number(number) => number.as_u64().or_else(|| {
                let float = number.as_f64()?;
                // 2^53: above it a double does not hold every whole number.
                (float >= 0.0 && float.fract() == 0.0 && float <= 9_007_199_254_740_992.0)
                    .then_some(float as u64)
            }),
            _ => None,
        };
        let shown = if let Value::Number(number) = &value {
            number.to_string()
        } else {
            kind(&value).to_owned()
        };
        match whole {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(undecodable(
                &self.method,
                format!(
                    "{}: parameter '{}{name}' must be a whole number from {} to {}, not {shown}",
                    self.method,
                    self.prefix,
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    /// A whole number that has to be there.
    pub fn required_number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<u64, RpcError> {
        self.number(name, range)?.ok_or_else(|| self.missing(name))
    }

    /// A whole number that fits in 32 bits.
    pub fn number_u32(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, RpcError> {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        Ok(self
            .number(name, wide)?
            .and_then(|number| u32::try_from(number).ok()))
    }

    /// A whole number that fits in 8 bits.
    pub fn number_u8(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u8>,
    ) -> Result<Option<u8>, RpcError> {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        Ok(self
            .number(name, wide)?
            .and_then(|number| u8::try_from(number).ok()))
    }

    /// A whole number from `least`, which may be negative, to what fits in 32 bits with sign.
    pub fn number_i32(&mut self, name: &'static str, least: i32) -> Result<Option<i32>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let number = value
            .as_i64()
            .and_then(|number| i32::try_from(number).ok())
            .filter(|number| *number >= least);
        match number {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a whole number from {least} to {}", i32::MAX);
                Err(self.wrong(name, &expected, &value))
            }
        }
    }

    /// A UUID in its usual text form.
    pub fn uuid(&mut self, name: &'static str) -> Result<Option<uuid::Uuid>, RpcError> {
        let Some(text) = self.string(name)? else {
            return Ok(None);
        };
        match uuid::Uuid::try_parse(&text) {
            Ok(uuid) => Ok(Some(uuid)),
            Err(_) => Err(self.wrong(name, "a UUID", &Value::String(text))),
        }
    }

    /// A nested object, whose parameters are taken in the same way.
    pub fn object(&mut self, name: &'static str) -> Result<Option<Parameters>, RpcError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(values)) => {
                let mut nested = Parameters::from_map(&self.method, values);
                nested.prefix = format!("{}{name}.", self.prefix);
                Ok(Some(nested))
            }
            Some(other) => Err(self.wrong(name, "an object", &other)),
        }
    }

    /// A list of nested objects, each with its number in texts.
    pub fn objects(&mut self, name: &'static str) -> Result<Option<Vec<Parameters>>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let Value::Array(items) = value else {
            return Err(self.wrong(name, "a list of objects", &value));
        };
        let mut objects = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            let Value::Object(values) = item else {
                return Err(self.wrong(name, "a list of objects", &item));
            };
            let mut nested = Parameters::from_map(&self.method, values);
            nested.prefix = format!("{}{name}[{index}].", self.prefix);
            objects.push(nested);
        }
        Ok(Some(objects))
    }

    /// A list of strings.
    pub fn strings(&mut self, name: &'static str) -> Result<Option<Vec<String>>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let Value::Array(items) = value else {
            return Err(self.wrong(name, "a list of strings", &value));
        };
        items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                other => Err(self.wrong(name, "a list of strings", &other)),
            })
            .collect::<Result<Vec<String>, RpcError>>()
            .map(Some)
    }
}

/// What a value is, in words, short enough for an error text.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) if text.chars().count() <= 40 => format!("the string \"{text}\""),
        Value::String(_) => "a long string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parameters(value: Value) -> Parameters {
        Parameters::new("bdev_test", Some(value)).unwrap()
    }

    #[test]
    fn an_unknown_parameter_is_named_with_what_is_taken() {
        let mut all = parameters(json!({"name": "a", "nmae": "b"}));
        all.required_string("name").unwrap();
        let error = all.finish().unwrap_err();
        assert_eq!(error.code, -32603);
        assert_eq!(
            error.message,
            "bdev_test: unknown parameter 'nmae'; it takes name"
        );
    }

    #[test]
    fn a_missing_parameter_is_named() {
        let error = parameters(json!({})).required_string("name").unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (-32603, "bdev_test: parameter 'name' is missing")
        );
    }

    #[test]
    fn null_is_the_same_as_absent() {
        let mut all = parameters(json!({"name": null}));
        assert_eq!(all.string("name").unwrap(), None);
        all.finish().unwrap();
    }

    #[test]
    fn a_wrong_type_is_told_with_what_was_sent() {
        let error = parameters(json!({"name": 5}))
            .required_string("name")
            .unwrap_err();
        assert_eq!(
            error.message,
            "bdev_test: parameter 'name' must be a string, not the number 5"
        );
        let error = parameters(json!({"force": "yes"}))
            .flag("force")
            .unwrap_err();
        assert_eq!(
            error.message,
            "bdev_test: parameter 'force' must be true or false, not the string \"yes\""
        );
        let error = parameters(json!({"n": "7"}))
            .number("n", 0..=9)
            .unwrap_err();
        assert!(
            error.message.contains("from 0 to 9, not the string \"7\""),
            "{}",
            error.message
        );
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats_and_nothing_else_passes() {
        for (value, expected) in [
            (json!(3), Some(3)),
            (json!(3.0), Some(3)),
            (json!(3e2), Some(300)),
        ] {
            assert_eq!(
                parameters(json!({"n": value}))
                    .number("n", 0..=1000)
                    .unwrap(),
                expected
            );
        }
        for value in [
            json!(-1),
            json!(0.5),
            json!(1001),
            json!(1e300),
            json!(true),
            json!([1]),
        ] {
            assert!(
                parameters(json!({"n": value.clone()}))
                    .number("n", 0..=1000)
                    .is_err(),
                "{value}"
            );
        }
    }

    #[test]
    fn a_nested_parameter_is_named_with_its_path() {
        let mut all = parameters(json!({"listen_address": {"traddr": 1}}));
        let mut nested = all.object("listen_address").unwrap().unwrap();
        let error = nested.required_string("traddr").unwrap_err();
        assert!(
            error.message.contains("'listen_address.traddr'"),
            "{}",
            error.message
        );
    }

    #[test]
    fn a_number_with_sign_is_whole_and_in_its_range() {
        for (value, expected) in [(json!(-1), Some(-1)), (json!(i32::MAX), Some(i32::MAX))] {
            let mut all = parameters(json!({"n": value}));
            assert_eq!(all.number_i32("n", -1).unwrap(), expected);
        }
        for value in [json!(-2), json!(1u64 << 31), json!(0.5), json!("1")] {
            let error = parameters(json!({"n": value}))
                .number_i32("n", -1)
                .unwrap_err();
            assert!(error.message.contains("from -1 to"), "{}", error.message);
        }
    }

    #[test]
    fn positional_parameters_are_refused() {
        assert_eq!(
            Parameters::new("bdev_test", Some(json!(["a"])))
                .unwrap_err()
                .code,
            -32603
        );
    }
}
