//! The error of a JSON-RPC answer, with the codes that SPDK's server uses.
//! Made by every method; sent by the server. Knows nothing of what failed but its text.

use thiserror::Error;

/// Code and text of a failed call.
///
/// Codes below -32000 are JSON-RPC 2.0's (and SPDK's use of them, `spdk/jsonrpc.h`); the small ones are
/// negated errno values, as SPDK's methods answer them.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message} (code {code})")]
pub struct RpcError {
    /// What clients test for.
    pub code: i32,
    /// What was attempted, on what, why it failed and what the user can do.
    pub message: String,
}

impl RpcError {
    /// Malformed JSON.
    pub const PARSE_ERROR: i32 = -32700;
    /// Not a JSON-RPC 2.0 request.
    pub const INVALID_REQUEST: i32 = -32600;
    /// No method of that name.
    pub const METHOD_NOT_FOUND: i32 = -32601;
    /// Parameters where none are taken.
    pub const INVALID_PARAMETERS: i32 = -32602;
    /// SPDK's answer to a wrong, unknown or missing parameter.
    pub const INTERNAL_ERROR: i32 = -32603;
    /// The method cannot be called before (or after) the framework's start.
    pub const INVALID_STATE: i32 = -1;

    /// An error with a code of the caller's choice.
    pub fn new(code: i32, message: impl Into<String>) -> RpcError {
        RpcError {
            code,
            message: message.into(),
        }
    }

    /// An errno value (positive), answered as its negation.
    pub fn errno(errno: i32, message: impl Into<String>) -> RpcError {
        RpcError::new(errno.saturating_abs().saturating_neg(), message)
    }

    /// -32603: a parameter is wrong, unknown or missing.
    pub fn parameters(message: impl Into<String>) -> RpcError {
        RpcError::new(Self::INTERNAL_ERROR, message)
    }

    /// -32601.
    pub fn method_not_found(method: &str) -> RpcError {
        RpcError::new(
            Self::METHOD_NOT_FOUND,
            format!("Method not found: {method}"),
        )
    }

    /// -1 (EPERM): the state does not allow it.
    pub fn not_permitted(message: impl Into<String>) -> RpcError {
        RpcError::new(-1, message)
    }

    /// -2 (ENOENT): a file or a thing in a list that is not there.
    pub fn no_file(message: impl Into<String>) -> RpcError {
        RpcError::new(-2, message)
    }

    /// -5 (EIO): a device failed.
    pub fn io(message: impl Into<String>) -> RpcError {
        RpcError::new(-5, message)
    }

    /// -12 (ENOMEM).
    pub fn no_memory(message: impl Into<String>) -> RpcError {
        RpcError::new(-12, message)
    }

    /// -16 (EBUSY): in use by something else, or an operation is going on.
    pub fn busy(message: impl Into<String>) -> RpcError {
        RpcError::new(-16, message)
    }

    /// -17 (EEXIST): the name is taken.
    pub fn exists(message: impl Into<String>) -> RpcError {
        RpcError::new(-17, message)
    }

    /// -19 (ENODEV): no bdev or volume of that name.
    pub fn no_device(message: impl Into<String>) -> RpcError {
        RpcError::new(-19, message)
    }

    /// -22 (EINVAL): well-formed, but the value cannot be.
    pub fn invalid(message: impl Into<String>) -> RpcError {
        RpcError::new(-22, message)
    }

    /// -28 (ENOSPC): the device or a table has no room.
    pub fn no_space(message: impl Into<String>) -> RpcError {
        RpcError::new(-28, message)
    }

    /// -95 (EOPNOTSUPP): not something that this version does.
    pub fn not_supported(message: impl Into<String>) -> RpcError {
        RpcError::new(-95, message)
    }

    /// -110 (ETIMEDOUT).
    pub fn timed_out(message: impl Into<String>) -> RpcError {
        RpcError::new(-110, message)
    }

    /// -125 (ECANCELED): the thing that it was for went away.
    pub fn cancelled(message: impl Into<String>) -> RpcError {
        RpcError::new(-125, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_answered_negative_whatever_its_sign() {
        assert_eq!(RpcError::errno(17, "x").code, -17);
        assert_eq!(RpcError::errno(-17, "x").code, -17);
        assert_eq!(RpcError::errno(i32::MIN, "x").code, -i32::MAX);
    }
}
