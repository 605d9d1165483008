//! The one-shot handle through which a call is answered, at once or later.
//! Handed to every method; made by whoever received the call. Knows neither the client nor the method.

use serde_json::Value;

use super::RpcError;

/// Answers one call, exactly once: dropped unanswered, it answers with an error, so that no client waits
/// for ever.
pub struct Reply {
    deliver: Option<Box<Deliver>>,
}

type Deliver = dyn FnOnce(Result<Value, RpcError>) + Send;

impl Reply {
    /// A handle that passes the answer to `deliver`.
    pub fn new(deliver: impl FnOnce(Result<Value, RpcError>) + Send + 'static) -> Reply {
        Reply {
            deliver: Some(Box::new(deliver)),
        }
    }

    /// Answers the call.
    pub fn answer(mut self, result: Result<Value, RpcError>) {
        if let Some(deliver) = self.deliver.take() {
            deliver(result);
        }
    }

    /// Answers with success.
    pub fn ok(self, value: impl Into<Value>) {
        self.answer(Ok(value.into()));
    }

    /// Answers with an error.
    pub fn fail(self, error: RpcError) {
        self.answer(Err(error));
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(deliver) = self.deliver.take() {
            deliver(Err(RpcError::cancelled(
                "the request was given up: the target is going down",
            )));
        }
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_dropped_reply_answers_with_an_error() {
        let (sender, receiver) = mpsc::channel();
        drop(Reply::new(move |result| sender.send(result).unwrap()));
        assert_eq!(receiver.recv().unwrap().unwrap_err().code, -125);
        assert!(receiver.recv().is_err(), "answered twice");
    }

    #[test]
    fn an_answered_reply_answers_once() {
        let (sender, receiver) = mpsc::channel();
        Reply::new(move |result| sender.send(result).unwrap()).ok(true);
        assert_eq!(receiver.recv().unwrap(), Ok(Value::Bool(true)));
        assert!(receiver.recv().is_err(), "answered twice");
    }
}
