//! Which headers of SPDK are read, and what of them is translated. Called by the build script.

use std::fs;
use std::path::{Path, PathBuf};

use super::differences::{Bindings, CFGS, align_by_field, holds};

const HEADERS: &[&str] = &[
    "spdk/stdinc.h",
    "spdk/config.h",
    "spdk/bdev_module.h",
    "spdk/bdev_zone.h",
    "spdk/cpuset.h",
    "spdk/dma.h",
    "spdk/env.h",
    "spdk/event.h",
    "spdk/init.h",
    "spdk/json.h",
    "spdk/jsonrpc.h",
    "spdk/keyring.h",
    "spdk/log.h",
    "spdk/module/bdev/nvme.h",
    "spdk/nvme.h",
    "spdk/nvmf.h",
    "spdk/rpc.h",
    "spdk/string.h",
    "spdk/thread.h",
    "spdk/trace.h",
    "spdk/util.h",
    "spdk/uuid.h",
    "spdk/version.h",
];

const FUNCTIONS: &[&str] = &[
    "spdk_(app|bdev|cpuset|dma|env|for_each|framework|io_channel|io_device|iobuf|json|jsonrpc|log|memory_domain|poller|rpc|subsystem|thread|trace|uuid)_.*",
    "spdk_(key|keyring|notify|spin)_.*",
    "spdk_nvme_(ctrlr|host|ns|transport|trid|cpl|print|qpair)_.*",
    "spdk_nvme_transport_id_.*",
    "spdk_nvmf_.*",
    "spdk_bdev_nvme_.*",
    "spdk_(zmalloc|malloc|free|realloc|mempool_.*|ring_.*)",
    "spdk_(get|set)_(thread|io_channel|ticks.*|shutdown.*)",
    "spdk_put_io_channel",
    "spdk_add_subsystem",
    "spdk_for_each_.*",
    "spdk_(log|vlog|strerror.*|delay_us|flog)",
    "_spdk_trace_record",
];

const TYPES: &[&str] = &[
    "spdk_(app|bdev|cpuset|dma|env|io|iobuf|json|jsonrpc|key|log|memory_domain|nvme|nvmf|poller|rpc|subsystem|thread|trace|uuid)(_.*)?",
];

const VARIABLES: &[&str] = &[
    "SPDK_.*",
    "BDEV_NVME_.*",
    "g_trace_file",
    "OBJECT_NONE",
    "OWNER_TYPE_NONE",
];

/// Of the right size, without fields: bindgen lays out its bit fields wrongly, and nothing here needs them.
const OPAQUE: &[&str] = &["spdk_nvme_feat_async_event_configuration__bindgen_ty_1"];

/// Not wanted: the PDU of NVMe/TCP that would contain that one.
const BLOCKED: &[&str] = &["spdk_nvme_tcp_cmd"];

pub fn generate(include: &[PathBuf], output: &Path) -> Result<(), String> {
    clang_sys::load().map_err(|_| {
        "the feature `spdk` needs libclang to read SPDK's headers and it is not found: install it (libclang-dev on \
         Debian and Ubuntu, clang-devel on Fedora), or set LIBCLANG_PATH to the folder of libclang.so"
    })?;
    let contents: String = HEADERS
        .iter()
        .map(|header| format!("#include <{header}>\n"))
        .collect();
    let mut builder = bindgen::Builder::default()
        .header_contents("spdk.h", &contents)
        .clang_args(
            include
                .iter()
                .map(|folder| format!("-I{}", folder.display())),
        )
        .rust_target(bindgen::RustTarget::stable(85, 0).map_err(|error| error.to_string())?)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_default(true)
        // Sizes and offsets are asserted when the library is compiled: a layout that bindgen gets wrong cannot go unnoticed.
        .layout_tests(true)
        .generate_comments(false)
        .generate_cstr(true);
    for name in OPAQUE {
        builder = builder.opaque_type(name);
    }
    for name in BLOCKED {
        builder = builder.blocklist_type(name);
    }
    for name in FUNCTIONS {
        builder = builder.allowlist_function(name);
    }
    for name in TYPES {
        builder = builder.allowlist_type(name);
    }
    for name in VARIABLES {
        builder = builder.allowlist_var(name);
    }
    let generated = builder.generate().map_err(|error| {
        let error = error.to_string();
        let first = error.lines().next().unwrap_or_default();
        format!(
            "SPDK's headers cannot be read by libclang ({first}): install the headers of the compiler and of what \
             SPDK was built with (libclang-dev, libc6-dev, uuid-dev, libssl-dev)"
        )
    })?;
    let bindings = Bindings(align_by_field(&generated.to_string()));
    for name in CFGS {
        if holds(name, &bindings) {
            println!("cargo::rustc-cfg={name}");
        }
    }
    fs::write(output, &bindings.0)
        .map_err(|error| format!("{} cannot be written: {error}", output.display()))
}
