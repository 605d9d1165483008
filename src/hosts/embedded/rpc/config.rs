//! SPDK's JSON configurations: what `framework_get_config` writes, and loading one at start.
//! Called by the method and by the command `tgt`. Knows calls, not what they do.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use serde_json::{Value, json};
use thiserror::Error;

use super::{nvme, nvmf};
use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::registry::{BdevEntry, BdevOrigin};
use crate::hosts::embedded::volume;
use crate::rpc::{Reply, RpcError};

/// The subsystems that have a configuration, with what they depend on, in the order of loading.
pub(super) const SUBSYSTEMS: &[(&str, &[&str])] = &[("bdev", &[]), ("nvmf", &["bdev"])];

/// The calls that make a subsystem what it is now; `None` if there is no such subsystem.
pub(super) fn of_subsystem(core: &Core, name: &str) -> Option<Value> {
    match name {
        "bdev" => Some(bdevs(core).into()),
        "nvmf" => Some(nvmf::configuration(core).into()),
        _ => None,
    }
}

fn call(method: &str, params: Value) -> Value {
    json!({"method": method, "params": params})
}

fn bdevs(core: &Core) -> Vec<Value> {
    let mut calls: Vec<Value> = core.registry.iter().filter_map(bdev).collect();
    calls.extend(nvme::configuration(core));
    calls.extend(volume::config(core).iter().map(|request| {
        let (method, params) = request.to_call();
        call(method, params)
    }));
    calls.push(json!({"method": "bdev_wait_for_examine"}));
    calls
}

fn bdev(entry: &BdevEntry) -> Option<Value> {
    match &entry.origin {
        BdevOrigin::Malloc => Some(call(
            "bdev_malloc_create",
            json!({
                "name": entry.name,
                "num_blocks": entry.num_blocks,
                "block_size": entry.block_size,
                "uuid": entry.uuid,
            }),
        )),
        BdevOrigin::Aio(file) => Some(call(
            "bdev_aio_create",
            json!({
                "name": entry.name,
                "filename": file.path,
                "block_size": entry.block_size,
                "readonly": file.read_only,
                "uuid": entry.uuid,
            }),
        )),
        BdevOrigin::Uring(file) => Some(call(
            "bdev_uring_create",
            json!({
                "name": entry.name,
                "filename": file.path,
                "block_size": entry.block_size,
                "uuid": entry.uuid,
            }),
        )),
        // Made by their controller, or by the volume.
        BdevOrigin::Nvme { .. } | BdevOrigin::Volume | BdevOrigin::Endpoint => None,
    }
}

/// Why a configuration could not be loaded.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a configuration.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A call of it failed. The ones before it have been carried out.
    #[error("{}: subsystem {subsystem}: {method}: {error}", path.display())]
    Call {
        /// The file.
        path: PathBuf,
        /// The subsystem that the call is part of.
        subsystem: String,
        /// The method called.
        method: String,
        /// The answer.
        error: RpcError,
    },
}

/// One call of a configuration.
#[derive(Clone, Debug, PartialEq)]
struct ConfigCall {
    subsystem: String,
    method: String,
    params: Option<Value>,
}

/// A configuration that has been read.
#[derive(Debug)]
pub struct Config {
    path: PathBuf,
    calls: Vec<ConfigCall>,
}

impl Config {
    /// Reads a file in SPDK's format: `{"subsystems": [{"subsystem": NAME, "config": [{"method": …, "params": …},
    /// …] or null}, …]}`; a list among the calls is a batch, carried out in order.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let malformed = |reason: String| ConfigError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let root: Value = serde_json::from_slice(&text)
            .map_err(|error| malformed(format!("not JSON: {error}")))?;
        let calls = parse(&root).map_err(malformed)?;
        Ok(Config {
            path: path.to_owned(),
            calls,
        })
    }

    /// Carries the calls out in order, each after the answer of the one before. Stops at the first that fails,
    /// or with `ignore_errors` logs it and goes on. Blocks; not for a reactor's thread.
    pub fn load(
        self,
        handler: impl Fn(String, Option<Value>, Reply),
        ignore_errors: bool,
    ) -> Result<(), ConfigError> {
        for ConfigCall {
            subsystem,
            method,
            params,
        } in self.calls
        {
            let (sender, receiver) = sync_channel(1);
            let deliver = move |result| {
                // Nobody waits any more only after the answer has come.
                let _ = sender.send(result);
            };
            handler(method.clone(), params, Reply::new(deliver));
            let result = receiver
                .recv()
                .unwrap_or_else(|_| Err(RpcError::cancelled("no answer")));
            if let Err(error) = result {
                let path = self.path.clone();
                let error = ConfigError::Call {
                    path,
                    subsystem,
                    method,
                    error,
                };
                if !ignore_errors {
                    return Err(error);
                }
                tracing::error!("{error}");
            }
        }
        Ok(())
    }
}

fn parse(root: &Value) -> Result<Vec<ConfigCall>, String> {
    let subsystems = root
        .get("subsystems")
        .and_then(Value::as_array)
        .ok_or("it has no list \"subsystems\"; save_config of a running target shows the format")?;
    let mut calls = Vec::new();
    for (position, subsystem) in subsystems.iter().enumerate() {
        let name = subsystem
            .get("subsystem")
            .and_then(Value::as_str)
            .ok_or_else(|| {
                format!("entry {position} of \"subsystems\" has no name \"subsystem\"")
            })?;
        let entries = match subsystem.get("config") {
            None | Some(Value::Null) => continue,
            Some(Value::Array(entries)) => entries,
            Some(_) => return Err(format!("subsystem {name}: \"config\" is not a list")),
        };
        for (position, entry) in entries.iter().enumerate() {
            let batch = entry
                .as_array()
                .map_or(std::slice::from_ref(entry), Vec::as_slice);
            for entry in batch {
                let method = entry.get("method").and_then(Value::as_str).ok_or_else(|| {
                    format!("subsystem {name}: entry {position} of \"config\" has no \"method\"")
                })?;
                calls.push(ConfigCall {
                    subsystem: name.to_owned(),
                    method: method.to_owned(),
                    params: entry
                        .get("params")
                        .filter(|params| !params.is_null())
                        .cloned(),
                });
            }
        }
    }
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Vec<String>, String> {
        load_with(text, false)
    }

    fn load_with(text: &str, ignore_errors: bool) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let called = std::cell::RefCell::new(Vec::new());
        let config = Config::read(file.path()).map_err(|error| error.to_string())?;
        let handler = |method: String, _params, reply: Reply| {
            called.borrow_mut().push(method.clone());
            if method == "fails" {
                reply.fail(RpcError::no_file("no such thing"));
            } else if method != "never" {
                reply.ok(true);
            }
        };
        let name = file.path().display().to_string();
        config
            .load(handler, ignore_errors)
            .map_err(|error| error.to_string().replace(&name, "FILE"))?;
        Ok(called.into_inner())
    }

    #[test]
    fn calls_come_in_order_and_batches_too() {
        let text = r#"{"subsystems": [
            {"subsystem": "sock", "config": null},
            {"subsystem": "bdev", "config": [{"method": "a", "params": {"x": 1}}, [{"method": "b"}, {"method": "c"}]]},
            {"subsystem": "nvmf", "config": [{"method": "d"}]}
        ]}"#;
        assert_eq!(load(text).unwrap(), ["a", "b", "c", "d"]);
    }

    #[test]
    fn a_call_that_fails_is_named_with_its_file_and_subsystem() {
        let text = r#"{"subsystems": [{"subsystem": "bdev", "config": [{"method": "fails"}, {"method": "b"}]}]}"#;
        assert_eq!(
            load(text).unwrap_err(),
            "FILE: subsystem bdev: fails: no such thing (code -2)"
        );
        let text = r#"{"subsystems": [{"subsystem": "bdev", "config": [{"method": "never"}]}]}"#;
        assert!(
            load(text).unwrap_err().contains("never"),
            "a call that is dropped ends the loading"
        );
    }

    #[test]
    fn what_is_no_configuration_is_told() {
        for (text, part) in [
            ("{", "not JSON"),
            ("[]", "no list \"subsystems\""),
            (r#"{"subsystems": [{}]}"#, "entry 0"),
            (
                r#"{"subsystems": [{"subsystem": "bdev", "config": {}}]}"#,
                "subsystem bdev",
            ),
            (
                r#"{"subsystems": [{"subsystem": "bdev", "config": [{"params": {}}]}]}"#,
                "no \"method\"",
            ),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(
            Config::read(Path::new("/nonexistent/x.json"))
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }
}
