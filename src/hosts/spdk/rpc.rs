//! Our methods in SPDK's RPC server: what it has parsed becomes JSON of ours, goes to the one implementation of the
//! methods, and its answer goes back. Registered by the constructor; called on the application's thread.

use std::ffi::{CString, c_char, c_void};

use serde_json::{Map, Value};

use super::core::{State, manager_core};
use super::{node, sys};
use crate::rpc::volume::{METHODS, VolumeRequest, VolumeService};
use crate::rpc::{Reply, RpcError, volume};

impl VolumeService for State {
    fn volume_request(&mut self, request: VolumeRequest, reply: Reply) {
        node::request(self, request, reply);
    }
}

/// A request that waits for its answer.
struct Pending(*mut sys::spdk_jsonrpc_request);

// SAFETY: answered on the application's thread only, on which core 0 is.
unsafe impl Send for Pending {}

impl Pending {
    fn answer(self, outcome: Result<Value, RpcError>) {
        // SAFETY: SPDK keeps the request until it is answered, once.
        unsafe {
            match outcome {
                Ok(value) => {
                    let text = value.to_string();
                    let w = sys::spdk_jsonrpc_begin_result(self.0);
                    sys::spdk_json_write_val_raw(w, text.as_ptr().cast(), text.len());
                    sys::spdk_jsonrpc_end_result(self.0, w);
                }
                Err(error) => {
                    let text = CString::new(error.message.replace('\0', " ")).unwrap_or_default();
                    sys::spdk_jsonrpc_send_error_response(self.0, error.code, text.as_ptr());
                }
            }
        }
    }
}

/// A method's handler does not learn which method it is called for: each has its own.
macro_rules! handlers {
    ($($index:literal),*) => {
        [$({
            unsafe extern "C" fn handler(
                request: *mut sys::spdk_jsonrpc_request,
                params: *const sys::spdk_json_val,
            ) {
                // SAFETY: as SPDK calls a handler.
                unsafe { called(METHODS.get($index).copied().unwrap_or_default(), request, params) };
            }
            handler as unsafe extern "C" fn(*mut sys::spdk_jsonrpc_request, *const sys::spdk_json_val)
        }),*]
    };
}

/// Makes the methods known to SPDK; by the constructor, before anything of SPDK runs.
pub fn register() {
    let handlers = handlers!(
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
        25, 26, 27, 28, 29, 30, 31
    );
    const { assert!(METHODS.len() <= 32, "a method has no handler") };
    for (method, handler) in METHODS.iter().zip(handlers) {
        let name = CString::new(*method).unwrap_or_default();
        // SAFETY: SPDK copies the name.
        unsafe {
            sys::spdk_rpc_register_method(name.as_ptr(), Some(handler), sys::SPDK_RPC_RUNTIME);
        }
    }
}

/// # Safety
/// `request` waits for an answer; `params` is null or a parsed value.
unsafe fn called(
    method: &'static str,
    request: *mut sys::spdk_jsonrpc_request,
    params: *const sys::spdk_json_val,
) {
    let request = Pending(request);
    // SAFETY: the caller's word.
    let params = match unsafe { json_of(params) } {
        Ok(params) => params,
        Err(error) => return request.answer(Err(error)),
    };
    let reply = Reply::new(move |outcome| request.answer(outcome));
    match manager_core() {
        Some(core) => core.send(move |state| {
            volume::call(state, method, params, reply);
        }),
        None => reply.fail(RpcError::not_permitted(
            "the bdev subsystem is not initialised yet",
        )),
    }
}

/// The JSON that SPDK has parsed.
///
/// # Safety
/// As [`called`].
unsafe fn json_of(params: *const sys::spdk_json_val) -> Result<Option<Value>, RpcError> {
    if params.is_null() {
        return Ok(None);
    }
    let mut next = params;
    // SAFETY: the caller's word.
    let value = unsafe { take_value(&mut next) };
    value.map(Some).ok_or_else(|| {
        RpcError::parameters("parameters with text that is no UTF-8, or with a number that is none")
    })
}

/// Takes the value at `next` and what belongs to it.
///
/// # Safety
/// `next` is within a parsed value.
unsafe fn take_value(next: &mut *const sys::spdk_json_val) -> Option<Value> {
    // SAFETY: the caller's word; SPDK's values end with their end marks.
    let value = unsafe { &**next };
    // SAFETY: as above.
    *next = unsafe { next.add(1) };
    Some(match value.type_ {
        sys::SPDK_JSON_VAL_NULL => Value::Null,
        sys::SPDK_JSON_VAL_TRUE => Value::Bool(true),
        sys::SPDK_JSON_VAL_FALSE => Value::Bool(false),
        // SAFETY: as above.
        sys::SPDK_JSON_VAL_NUMBER => serde_json::from_str(&unsafe { text_of(value) }?).ok()?,
        // SAFETY: as above.
        sys::SPDK_JSON_VAL_STRING | sys::SPDK_JSON_VAL_NAME => {
            Value::String(unsafe { text_of(value) }?)
        }
        sys::SPDK_JSON_VAL_ARRAY_BEGIN => {
            let mut values = Vec::new();
            // SAFETY: as above: the end mark comes before the end of the whole.
            while unsafe { (**next).type_ } != sys::SPDK_JSON_VAL_ARRAY_END {
                // SAFETY: as above.
                values.push(unsafe { take_value(next) }?);
            }
            // SAFETY: as above.
            *next = unsafe { next.add(1) };
            Value::Array(values)
        }
        sys::SPDK_JSON_VAL_OBJECT_BEGIN => {
            let mut values = Map::new();
            // SAFETY: as above.
            while unsafe { (**next).type_ } != sys::SPDK_JSON_VAL_OBJECT_END {
                // SAFETY: as above: a name and its value.
                let name = unsafe { text_of(&**next) }?;
                // SAFETY: as above.
                *next = unsafe { next.add(1) };
                // SAFETY: as above.
                values.insert(name, unsafe { take_value(next) }?);
            }
            // SAFETY: as above.
            *next = unsafe { next.add(1) };
            Value::Object(values)
        }
        _ => return None,
    })
}

/// # Safety
/// A parsed value.
unsafe fn text_of(value: &sys::spdk_json_val) -> Option<String> {
    // SAFETY: SPDK says where the text is, in memory that it keeps during the call.
    let bytes = unsafe { std::slice::from_raw_parts(value.start.cast::<u8>(), value.len as usize) };
    String::from_utf8(bytes.to_vec()).ok()
}

/// Writes calls that make volumes again into a configuration that is being saved.
///
/// # Safety
/// `w` writes inside an array.
pub unsafe fn write_config(
    calls: impl FnOnce(&mut State) -> Vec<VolumeRequest>,
    w: *mut sys::spdk_json_write_ctx,
) {
    let calls = manager_core().and_then(|core| core.look(calls));
    for request in calls.unwrap_or_default() {
        let (method, params) = request.to_call();
        let text = serde_json::json!({"method": method, "params": params}).to_string();
        let start: *const c_char = text.as_ptr().cast();
        // SAFETY: the text lives during the call.
        unsafe { sys::spdk_json_write_val_raw(w, start.cast::<c_void>(), text.len()) };
    }
}
