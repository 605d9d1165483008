//! JSON-RPC methods, parameters and errors: one implementation for all hosts.
