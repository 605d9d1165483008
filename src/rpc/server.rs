//! One JSON-RPC connection without its socket: bytes in, calls out; answers in, bytes out.
//! Driven by a host's socket loop. Must not know sockets, threads or what a method does.
//!
//! As SPDK's server: objects follow each other on the stream with no length and no separator, several
//! calls or a batch on one connection; malformed JSON ends the connection, since nothing says where the
//! next request would begin.

use std::collections::HashMap;

use serde_json::{Value, json};
use thiserror::Error;

use super::RpcError;

/// Longest request in bytes, as SPDK's server has it.
pub const REQUEST_BYTES_MAX: usize = 256 * 1024;
/// Objects and lists inside each other, as SPDK's JSON parser has it.
pub const DEPTH_MAX: usize = 64;
/// Calls under way on one connection above which no more is read from it.
pub const CALLS_MAX: usize = 64;
/// Answers waiting to be sent on one connection, in bytes, above which no more is read from it.
pub const OUTPUT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A call to carry out. [`Connection::answer`] takes its number back.
#[derive(Debug, PartialEq)]
pub struct Call {
    /// Number of the call on its connection.
    pub number: u64,
    /// Name of the method.
    pub method: String,
    /// An object or a list, if any.
    pub params: Option<Value>,
}

/// Why a connection has to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Close {
    /// What came is not JSON.
    #[error("malformed JSON")]
    Malformed,
    /// More than [`REQUEST_BYTES_MAX`] without an end.
    #[error("a request of more than {REQUEST_BYTES_MAX} bytes")]
    TooLong,
}

/// Where a call's answer goes.
struct Pending {
    /// `None`: the caller wants no answer.
    id: Option<Value>,
    batch: Option<u64>,
}

/// A batch that is not answered completely yet.
struct Batch {
    answers: Vec<Value>,
    calls_left: usize,
}

/// One connection.
#[derive(Default)]
pub struct Connection {
    input: Vec<u8>,
    end: EndScanner,
    /// Input length at the last look whether what has come so far can be JSON at all.
    checked_bytes: usize,
    output: Vec<u8>,
    output_sent: usize,
    calls: HashMap<u64, Pending>,
    batches: HashMap<u64, Batch>,
    number: u64,
}

impl Connection {
    /// A fresh connection.
    pub fn new() -> Connection {
        Connection::default()
    }

    /// Takes bytes from the client and appends the calls that they complete to `calls`. Requests that are
    /// not calls are answered here.
    pub fn receive(&mut self, bytes: &[u8], calls: &mut Vec<Call>) -> Result<(), Close> {
        self.input.extend_from_slice(bytes);
        loop {
            match self.end.scan(&self.input)? {
                Some(end) => {
                    if end > REQUEST_BYTES_MAX {
                        return Err(Close::TooLong);
                    }
                    let request = serde_json::from_slice::<Value>(&self.input[..end]);
                    self.input.drain(..end);
                    self.end = EndScanner::default();
                    self.checked_bytes = 0;
                    self.request(request.map_err(|_| Close::Malformed)?, calls);
                }
                None => {
                    if self.input.len() > REQUEST_BYTES_MAX {
                        return Err(Close::TooLong);
                    }
                    return self.check_beginning();
                }
            }
        }
    }

    /// Looks whether the unfinished request is malformed already. Only when it has doubled since the last
    /// look, so that many small pieces do not cost the square of their sum.
    fn check_beginning(&mut self) -> Result<(), Close> {
        if self.input.len() < self.checked_bytes.saturating_mul(2) {
            return Ok(());
        }
        self.checked_bytes = self.input.len();
        match serde_json::from_slice::<serde::de::IgnoredAny>(&self.input) {
            Err(error) if !error.is_eof() => Err(Close::Malformed),
            _ => Ok(()),
        }
    }

    fn request(&mut self, request: Value, calls: &mut Vec<Call>) {
        match request {
            Value::Array(requests) if requests.is_empty() => {
                self.send(&error_answer(
                    Value::Null,
                    &invalid_request("the batch is empty"),
                ));
            }
            Value::Array(requests) => {
                self.number += 1;
                let batch = self.number;
                self.batches.insert(
                    batch,
                    Batch {
                        answers: Vec::new(),
                        calls_left: requests.len(),
                    },
                );
                for request in requests {
                    self.single(request, Some(batch), calls);
                }
            }
            other => self.single(other, None, calls),
        }
    }

    fn single(&mut self, request: Value, batch: Option<u64>, calls: &mut Vec<Call>) {
        match Request::parse(request) {
            Ok(Request { id, method, params }) => {
                self.number += 1;
                self.calls.insert(self.number, Pending { id, batch });
                calls.push(Call {
                    number: self.number,
                    method,
                    params,
                });
            }
            Err((id, error)) => self.deliver(Some(error_answer(id, &error)), batch),
        }
    }

    /// Answers the call with this number; an unknown number (answered already) is ignored.
    pub fn answer(&mut self, number: u64, result: Result<Value, RpcError>) {
        let Some(pending) = self.calls.remove(&number) else {
            return;
        };
        let answer = pending.id.map(|id| match result {
            Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
            Err(error) => error_answer(id, &error),
        });
        self.deliver(answer, pending.batch);
    }

    fn deliver(&mut self, answer: Option<Value>, batch: Option<u64>) {
        let Some(number) = batch else {
            if let Some(answer) = answer {
                self.send(&answer);
            }
            return;
        };
        let Some(batch) = self.batches.get_mut(&number) else {
            return;
        };
        batch.answers.extend(answer);
        batch.calls_left = batch.calls_left.saturating_sub(1);
        if batch.calls_left > 0 {
            return;
        }
        let answers = self
            .batches
            .remove(&number)
            .map(|batch| batch.answers)
            .unwrap_or_default();
        if !answers.is_empty() {
            self.send(&Value::Array(answers));
        }
    }

    fn send(&mut self, answer: &Value) {
        self.output
            .extend_from_slice(to_ascii(&answer.to_string()).as_bytes());
        self.output.push(b'\n');
    }

    /// What is to be sent to the client.
    pub fn output(&self) -> &[u8] {
        self.output.get(self.output_sent..).unwrap_or(&[])
    }

    /// `bytes` of the output have been sent.
    pub fn sent(&mut self, bytes: usize) {
        self.output_sent = (self.output_sent + bytes).min(self.output.len());
        if self.output_sent == self.output.len() {
            self.output.clear();
            self.output_sent = 0;
        }
    }

    /// The client's next bytes may be read.
    pub fn wants_input(&self) -> bool {
        self.calls.len() < CALLS_MAX && self.output().len() < OUTPUT_BYTES_MAX
    }

    /// Nothing is under way and nothing is left to send.
    pub fn is_idle(&self) -> bool {
        self.calls.is_empty() && self.output().is_empty()
    }
}

/// Finds where the first JSON object or list of a growing input ends, looking at each byte once.
#[derive(Default)]
struct EndScanner {
    looked_at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl EndScanner {
    /// The end of the first value; `None` until it has come. An input that begins with anything but an
    /// object or a list is malformed.
    fn scan(&mut self, input: &[u8]) -> Result<Option<usize>, Close> {
        for (position, byte) in input.iter().enumerate().skip(self.looked_at) {
            self.looked_at = position + 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'{' | b'[' if self.depth == DEPTH_MAX => return Err(Close::Malformed),
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth == 1 => return Ok(Some(position + 1)),
                b'}' | b']' if self.depth > 1 => self.depth -= 1,
                b'"' if self.depth > 0 => self.in_string = true,
                b' ' | b'\t' | b'\r' | b'\n' => {}
                _ if self.depth == 0 => return Err(Close::Malformed),
                _ => {}
            }
        }
        Ok(None)
    }
}

struct Request {
    id: Option<Value>,
    method: String,
    params: Option<Value>,
}

impl Request {
    /// The parts of a request; for one that is none, the id to answer with (null if there is none) and the
    /// error.
    fn parse(request: Value) -> Result<Request, (Value, RpcError)> {
        let Value::Object(mut members) = request else {
            return Err((Value::Null, invalid_request("a request must be an object")));
        };
        let id = match members.remove("id") {
            None => None,
            Some(id @ (Value::Null | Value::String(_) | Value::Number(_))) => Some(id),
            Some(_) => {
                return Err((
                    Value::Null,
                    invalid_request("the id must be a number, a string or null"),
                ));
            }
        };
        let refuse = |text: &str| (id.clone().unwrap_or(Value::Null), invalid_request(text));
        match members.remove("jsonrpc") {
            None => {}
            Some(Value::String(version)) if version == "2.0" => {}
            Some(_) => return Err(refuse("the version must be \"2.0\"")),
        }
        let Some(Value::String(method)) = members.remove("method") else {
            return Err(refuse("the method must be a string"));
        };
        let params = match members.remove("params") {
            None | Some(Value::Null) => None,
            Some(params @ (Value::Object(_) | Value::Array(_))) => Some(params),
            Some(_) => return Err(refuse("params must be an object or a list")),
        };
        if let Some(unknown) = members.keys().next() {
            return Err(refuse(&format!("unknown member '{unknown}'")));
        }
        Ok(Request { id, method, params })
    }
}

fn invalid_request(text: &str) -> RpcError {
    RpcError::new(
        RpcError::INVALID_REQUEST,
        format!("Invalid request: {text}"),
    )
}

fn error_answer(id: Value, error: &RpcError) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "error": {"code": error.code, "message": error.message}})
}

/// JSON text with everything that is not ASCII as `\uXXXX`. SPDK's client decodes each piece of 4096 bytes
/// by itself, and would lose a character that two pieces share.
pub fn to_ascii(text: &str) -> String {
    if text.is_ascii() {
        return text.to_owned();
    }
    let mut ascii = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if character.is_ascii() {
            ascii.push(character);
        } else {
            // Only strings of a JSON text hold other characters, so an escape is right wherever they are.
            for unit in character.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn receive(connection: &mut Connection, text: &str) -> Result<Vec<Call>, Close> {
        let mut calls = Vec::new();
        connection.receive(text.as_bytes(), &mut calls)?;
        Ok(calls)
    }

    fn output(connection: &mut Connection) -> Vec<Value> {
        let bytes = connection.output().to_vec();
        connection.sent(bytes.len());
        assert!(bytes.is_ascii());
        serde_json::Deserializer::from_slice(&bytes)
            .into_iter()
            .map(Result::unwrap)
            .collect()
    }

    fn error_code(answer: &Value) -> i64 {
        answer["error"]["code"].as_i64().unwrap()
    }

    #[test]
    fn a_call_is_answered_with_its_id() {
        let mut connection = Connection::new();
        let text = r#"{ "jsonrpc": "2.0", "method": "m", "id": "x", "params": {"a": 1} }"#;
        let calls = receive(&mut connection, text).unwrap();
        assert_eq!(
            calls,
            [Call {
                number: 1,
                method: "m".to_owned(),
                params: Some(json!({"a": 1}))
            }]
        );
        connection.answer(1, Ok(json!([1])));
        assert_eq!(
            output(&mut connection),
            [json!({"jsonrpc": "2.0", "id": "x", "result": [1]})]
        );
        connection.answer(1, Ok(json!([2])));
        assert!(connection.is_idle(), "answered twice");
    }

    #[test]
    fn a_request_that_comes_byte_by_byte_is_one_call() {
        let mut connection = Connection::new();
        let text = r#"{"method":"m","id":1,"params":{"name":"}]\\\"{"}}"#;
        let mut calls = Vec::new();
        for byte in text.as_bytes() {
            connection.receive(&[*byte], &mut calls).unwrap();
        }
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].params, Some(json!({"name": "}]\\\"{"})));
    }

    #[test]
    fn several_calls_may_come_in_one_piece() {
        let mut connection = Connection::new();
        let calls = receive(
            &mut connection,
            "{\"method\":\"a\",\"id\":1}\n{\"method\":\"b\",\"id\":2}{\"met",
        );
        assert_eq!(
            calls
                .unwrap()
                .iter()
                .map(|call| call.method.as_str())
                .collect::<Vec<_>>(),
            ["a", "b"]
        );
        connection.answer(2, Ok(Value::Null));
        assert_eq!(output(&mut connection)[0]["id"], 2);
        assert_eq!(
            receive(&mut connection, "hod\":\"c\",\"id\":3}")
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn a_batch_is_answered_as_one_list_when_the_last_call_is() {
        let mut connection = Connection::new();
        let text = r#"[{"method":"a","id":1}, 5, {"method":"quiet"}, {"method":"b","id":2}]"#;
        assert_eq!(receive(&mut connection, text).unwrap().len(), 3);
        let numbers: Vec<u64> = connection.calls.keys().copied().collect();
        for number in numbers {
            assert!(connection.output().is_empty());
            connection.answer(number, Ok(Value::Bool(true)));
        }
        let answers = output(&mut connection);
        assert_eq!(answers.len(), 1);
        let answers = answers[0].as_array().unwrap();
        assert_eq!(answers.len(), 3, "the call without an id has no answer");
        assert_eq!(error_code(&answers[0]), -32600);
    }

    #[test]
    fn a_call_without_an_id_gets_no_answer_alone_and_in_a_batch() {
        let mut connection = Connection::new();
        receive(&mut connection, r#"{"method":"m"}[{"method":"n"}]"#).unwrap();
        for number in 1..=3 {
            connection.answer(number, Err(RpcError::busy("x")));
        }
        assert!(connection.is_idle());
        assert!(connection.batches.is_empty());
    }

    #[test]
    fn what_is_no_request_is_32600_with_the_id_where_there_is_one() {
        for (text, id) in [
            ("[]", Value::Null),
            ("[5]", Value::Null),
            (r#"{"jsonrpc":"1.0","method":"m","id":4}"#, json!(4)),
            (r#"{"jsonrpc":2.0,"method":"m","id":4}"#, json!(4)),
            (r#"{"jsonrpc":"2.0","id":4}"#, json!(4)),
            (r#"{"method":5,"id":4}"#, json!(4)),
            (r#"{"method":"m","id":{}}"#, Value::Null),
            (r#"{"method":"m","id":4,"params":"p"}"#, json!(4)),
            (r#"{"method":"m","id":4,"colour":"red"}"#, json!(4)),
            ("{}", Value::Null),
        ] {
            let mut connection = Connection::new();
            assert_eq!(receive(&mut connection, text).unwrap(), [], "{text}");
            let answers = output(&mut connection);
            let answer = answers[0].as_array().map_or(&answers[0], |list| &list[0]);
            assert_eq!((error_code(answer), &answer["id"]), (-32600, &id), "{text}");
        }
    }

    #[test]
    fn malformed_json_closes_the_connection_at_once() {
        for text in [
            "x",
            "}",
            "nonsense{}",
            "{nonsense",
            "{\"a\":1]",
            "[1,,",
            "\"text\"",
            "5",
            "{\"a\" 1",
        ] {
            assert_eq!(
                receive(&mut Connection::new(), text),
                Err(Close::Malformed),
                "{text}"
            );
        }
        let deep = "[".repeat(10_000);
        assert_eq!(
            receive(&mut Connection::new(), &deep),
            Err(Close::Malformed)
        );
        let mut connection = Connection::new();
        assert_eq!(
            connection.receive(b"{\"a\":\"\xff\"}", &mut Vec::new()),
            Err(Close::Malformed)
        );
    }

    #[test]
    fn a_request_may_have_256_kib_and_no_more() {
        let with_length = |length: usize| {
            let frame = r#"{"method":"m","id":1,"params":{"a":""}}"#.len();
            format!(
                r#"{{"method":"m","id":1,"params":{{"a":"{}"}}}}"#,
                "x".repeat(length - frame)
            )
        };
        assert_eq!(
            receive(&mut Connection::new(), &with_length(REQUEST_BYTES_MAX))
                .unwrap()
                .len(),
            1
        );
        let long = with_length(REQUEST_BYTES_MAX + 1);
        assert_eq!(receive(&mut Connection::new(), &long), Err(Close::TooLong));
        let mut connection = Connection::new();
        let unfinished = &long[..long.len() - 1];
        assert_eq!(
            receive(&mut connection, unfinished).map(|calls| calls.len()),
            Ok(0)
        );
        assert_eq!(receive(&mut connection, "xx"), Err(Close::TooLong));
    }

    #[test]
    fn a_client_that_does_not_read_or_calls_too_much_is_not_read() {
        let mut connection = Connection::new();
        for _ in 0..CALLS_MAX {
            assert!(connection.wants_input());
            receive(&mut connection, r#"{"method":"m","id":1}"#).unwrap();
        }
        assert!(!connection.wants_input());
        connection.answer(1, Ok(Value::String("x".repeat(OUTPUT_BYTES_MAX))));
        connection.answer(2, Ok(Value::Null));
        assert!(!connection.wants_input());
        let length = connection.output().len();
        connection.sent(length);
        assert!(connection.wants_input());
    }

    proptest! {
        #[test]
        fn answers_are_ascii_and_mean_the_same(text in any::<String>()) {
            let ascii = to_ascii(&Value::String(text.clone()).to_string());
            prop_assert!(ascii.is_ascii());
            prop_assert_eq!(serde_json::from_str::<String>(&ascii).unwrap(), text);
        }

        #[test]
        fn however_the_stream_is_cut_the_calls_are_the_same(cuts in proptest::collection::vec(1usize..20, 1..60)) {
            let text = r#" {"method":"a\u00e9\"","id":1} [{"method":"b","id":2},{"method":"c","id":3,"params":["]"]}]
                {"method":"ü","id":null,"params":{}}"#;
            let mut connection = Connection::new();
            let mut calls = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, left) = rest.split_at((*cut).min(rest.len()));
                connection.receive(piece, &mut calls).unwrap();
                rest = left;
            }
            let methods: Vec<&str> = calls.iter().map(|call| call.method.as_str()).collect();
            prop_assert_eq!(methods, ["aé\"", "b", "c", "ü"]);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Connection::new().receive(&bytes, &mut Vec::new());
        }

        #[test]
        fn no_json_panics(text in "[\\[\\]{}\",:0-9a-z\\\\ ]{0,60}") {
            let _ = Connection::new().receive(text.as_bytes(), &mut Vec::new());
        }
    }
}
