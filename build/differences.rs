//! What the generated bindings say about the SPDK that they were made from: the supported versions differ, and the source
//! asks by `#[cfg]`. Nothing but text goes in. Called by the build script.

/// Names that the source may ask for by `#[cfg]`. Each is set where its condition holds for the SPDK that was found.
pub const CFGS: &[&str] = &[
    "spdk_bdev_flag_bits",
    "spdk_multipath_names",
    "spdk_multipath_opts",
    "spdk_nvmf_subsystem_opts",
    "spdk_subsystems",
    "spdk_trace_sections",
    "spdk_with_vfio_user",
    "spdk_with_vhost",
];

/// The condition of each of [`CFGS`].
pub fn holds(name: &str, bindings: &Bindings) -> bool {
    match name {
        "spdk_bdev_flag_bits" => !bindings.has_field("spdk_bdev", "md_interleave"),
        "spdk_multipath_names" => {
            bindings.has_constant("SPDK_BDEV_NVME_MULTIPATH_POLICY_ACTIVE_ACTIVE")
        }
        "spdk_multipath_opts" => {
            bindings.has_field("spdk_bdev_nvme_ctrlr_opts", "multipath_policy")
        }
        "spdk_nvmf_subsystem_opts" => bindings.has_function("spdk_nvmf_subsystem_create_ext"),
        "spdk_subsystems" => bindings.has_function("spdk_add_subsystem"),
        "spdk_trace_sections" => bindings.has_field("spdk_trace_file", "section_offsets"),
        "spdk_with_vfio_user" => bindings.has_constant("SPDK_CONFIG_VFIO_USER"),
        "spdk_with_vhost" => bindings.has_constant("SPDK_CONFIG_VHOST"),
        _ => false,
    }
}

/// Generated bindings, as formatted text.
pub struct Bindings(pub String);

impl Bindings {
    /// True if a structure or union has a field of this name. Fields in an anonymous part of it do not count.
    pub fn has_field(&self, structure: &str, field: &str) -> bool {
        let wanted = format!("pub {field}:");
        ["struct", "union"]
            .iter()
            .filter_map(|kind| self.0.split_once(&format!("\npub {kind} {structure} {{\n")))
            .filter_map(|(_, body)| body.split_once("\n}"))
            .any(|(body, _)| {
                body.lines()
                    .any(|line| line.trim_start().starts_with(&wanted))
            })
    }

    /// True if there is a constant of this name, of an enumeration too.
    pub fn has_constant(&self, name: &str) -> bool {
        self.0.contains(&format!("\npub const {name}: "))
    }

    /// True if there is a function of this name.
    pub fn has_function(&self, name: &str) -> bool {
        self.0.contains(&format!("pub fn {name}("))
    }
}

/// Bindgen aligns a structure of bit fields by an attribute. Rust refuses such a structure in a packed one, of which SPDK
/// has several; a field of no length that is aligned does the same and is allowed.
pub fn align_by_field(bindings: &str) -> String {
    let mut lines: Vec<String> = bindings.lines().map(str::to_owned).collect();
    let mut attribute = None;
    for at in 0..lines.len() {
        let line = lines[at].trim();
        if let Some(rest) = line.strip_prefix("#[repr(align(") {
            attribute = rest
                .strip_suffix("))]")
                .and_then(|bytes| bytes.parse::<u32>().ok())
                .map(|bytes| (at, bytes));
        } else if line.starts_with("pub _bitfield_align_1:") {
            if let Some((attribute_at, bytes)) = attribute.take() {
                lines[at] = format!("    pub _bitfield_align_1: [u{}; 0],", bytes * 8);
                lines[attribute_at].clear();
            }
        } else if line == "}" {
            attribute = None;
        }
    }
    lines.join("\n") + "\n"
}
