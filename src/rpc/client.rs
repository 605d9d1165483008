//! A small blocking JSON-RPC client over a Unix socket.
//! Used by `status`, the demo and tests. Knows no method.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use super::RpcError;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket could not be reached.
    #[error("cannot connect to {}: {source}; is the target running with this RPC socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer did not come in time.
    #[error("{method} on {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The method called.
        method: String,
        /// Why.
        source: io::Error,
    },
    /// The answer is none.
    #[error("{method} on {}: the answer is not JSON-RPC 2.0", path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// The method called.
        method: String,
    },
    /// The target answered with an error.
    #[error("{method}: {error}")]
    Rpc {
        /// The method called.
        method: String,
        /// The target's answer.
        error: RpcError,
    },
}

impl ClientError {
    /// The code of the target's answer, if it answered.
    pub fn code(&self) -> Option<i32> {
        match self {
            ClientError::Rpc { error, .. } => Some(error.code),
            _ => None,
        }
    }
}

/// A connection to a target.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    input: Vec<u8>,
    id: u64,
}

impl Client {
    /// Connects; each answer is then waited for at most `timeout`.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Client, ClientError> {
        let path = path.as_ref().to_owned();
        let connect = || {
            let stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            Ok(stream)
        };
        match connect() {
            Ok(stream) => Ok(Client {
                stream,
                path,
                input: Vec::new(),
                id: 0,
            }),
            Err(source) => Err(ClientError::Connect { path, source }),
        }
    }

    /// Calls a method and waits for its answer. `Value::Null` sends no parameters.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, ClientError> {
        self.id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.id, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        let io = |path: &Path, source| ClientError::Io {
            path: path.to_owned(),
            method: method.to_owned(),
            source,
        };
        self.stream
            .write_all(request.to_string().as_bytes())
            .map_err(|error| io(&self.path, error))?;
        loop {
            let malformed = || ClientError::Malformed {
                path: self.path.clone(),
                method: method.to_owned(),
            };
            let mut answers =
                serde_json::Deserializer::from_slice(&self.input).into_iter::<Value>();
            match answers.next() {
                Some(Ok(mut answer)) => {
                    let end = answers.byte_offset();
                    self.input.drain(..end);
                    if answer.get("id") != Some(&json!(self.id)) {
                        // The late answer of a call that was given up.
                        continue;
                    }
                    if let Some(result) = answer.get_mut("result") {
                        return Ok(result.take());
                    }
                    let error = answer.get("error").ok_or_else(malformed)?;
                    let code = error
                        .get("code")
                        .and_then(Value::as_i64)
                        .and_then(|code| i32::try_from(code).ok());
                    let message = error.get("message").and_then(Value::as_str);
                    let (Some(code), Some(message)) = (code, message) else {
                        return Err(malformed());
                    };
                    return Err(ClientError::Rpc {
                        method: method.to_owned(),
                        error: RpcError::new(code, message),
                    });
                }
                Some(Err(error)) if !error.is_eof() => return Err(malformed()),
                _ => {}
            }
            let mut piece = [0; 16 * 1024];
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    let source = io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the target closed the connection",
                    );
                    return Err(io(&self.path, source));
                }
                Ok(length) => self
                    .input
                    .extend_from_slice(piece.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let source = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
                    return Err(io(&self.path, source));
                }
                Err(error) => return Err(io(&self.path, error)),
            }
        }
    }
}
