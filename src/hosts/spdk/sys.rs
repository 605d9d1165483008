//! SPDK's C interface: what bindgen makes of the installed headers, and the macros and inline functions that it cannot
//! translate. Used by this host only. Whatever differs between the supported versions of SPDK is settled here.

#![allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unnecessary_transmutes,
    unsafe_op_in_unsafe_fn,
    clippy::all
)]

include!(concat!(env!("OUT_DIR"), "/spdk_bindings.rs"));
