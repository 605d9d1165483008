//! What the build script decides from texts: which SPDK is accepted, and in what its versions differ.

#[allow(dead_code)]
#[path = "../build/differences.rs"]
mod differences;
#[allow(dead_code)]
#[path = "../build/version.rs"]
mod version;

use differences::{Bindings, CFGS, align_by_field, holds};

fn header(year: u32, month: u32) -> String {
    format!(
        "/* a comment */\n#define SPDK_VERSION_MAJOR\t{year}\n#define SPDK_VERSION_MINOR\t{month}\n\
         #define SPDK_VERSION_PATCH\t1\n"
    )
}

#[test]
fn the_supported_versions_of_spdk_are_accepted_and_no_others() {
    for (year, month) in [(25, 9), (26, 1), (26, 5)] {
        assert_eq!(version::check(&header(year, month)), Ok(()));
    }
    let too_old = version::check(&header(25, 5)).unwrap_err();
    assert_eq!(
        too_old,
        "SPDK 25.05 is too old: install SPDK 25.09 to 26.05"
    );
    let too_new = version::check(&header(26, 9)).unwrap_err();
    assert!(too_new.starts_with("SPDK 26.09 is newer than"), "{too_new}");
    assert!(
        too_new.ends_with(": install SPDK 25.09 to 26.05"),
        "{too_new}"
    );
    let unknown = version::check("#define SPDK_VERSION_MAJOR 26\n").unwrap_err();
    assert!(
        unknown.ends_with(": install SPDK 25.09 to 26.05"),
        "{unknown}"
    );
}

const BINDINGS: &str = "
#[repr(C)]
#[repr(align(4))]
#[derive(Copy, Clone)]
pub struct bits {
    pub _bitfield_align_1: [u8; 0],
    pub _bitfield_1: __BindgenBitfieldUnit<[u8; 4usize]>,
}
#[repr(C)]
#[repr(align(8))]
pub struct aligned {
    pub number: u32,
}
#[repr(C)]
pub struct outer {
    pub first: bits,
    pub second: u32,
}
#[repr(C)]
pub struct outer_too {
    pub third: u32,
}
pub const LIMIT: u32 = 4;
unsafe extern \"C\" {
    pub fn there(argument: u32);
}
";

#[test]
fn a_field_is_found_in_its_own_structure_only() {
    let bindings = Bindings(BINDINGS.to_owned());
    assert!(bindings.has_field("outer", "second"));
    assert!(!bindings.has_field("outer", "third"));
    assert!(!bindings.has_field("outer", "sec"));
    assert!(!bindings.has_field("out", "second"));
    assert!(bindings.has_function("there"));
    assert!(!bindings.has_function("the"));
    assert!(bindings.has_constant("LIMIT"));
    assert!(!bindings.has_constant("LIM"));
    for name in CFGS {
        // None but the one that is told by the absence of a field.
        assert_eq!(
            holds(name, &bindings),
            *name == "spdk_bdev_flag_bits",
            "{name}"
        );
    }
}

#[test]
fn bit_fields_keep_their_alignment_without_the_attribute_and_other_structures_keep_theirs() {
    let text = align_by_field(BINDINGS);
    assert!(!text.contains("align(4)"), "{text}");
    assert!(text.contains("pub _bitfield_align_1: [u32; 0],"), "{text}");
    assert!(
        text.contains("#[repr(align(8))]\npub struct aligned"),
        "{text}"
    );
}
