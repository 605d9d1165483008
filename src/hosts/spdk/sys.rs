//! SPDK's C interface: what bindgen makes of the installed headers, and the inline functions and macros that it cannot
//! translate. Used by this host only. What differs between the supported versions of SPDK is settled here: `build.rs`
//! sets a `cfg` for each difference, by what the bindings hold.

#[allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unnecessary_transmutes,
    unsafe_op_in_unsafe_fn,
    clippy::all
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/spdk_bindings.rs"));
}

use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, size_of};

pub use bindings::*;

/// A structure that SPDK fills with its defaults, by a function that takes the size that this side knows.
///
/// # Safety
///
/// `T` must be a structure of C for which all zeroes is a value, and `fill` must take one of `size_of::<T>()` bytes.
unsafe fn filled<T>(fill: impl FnOnce(*mut T, usize)) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    fill(value.as_mut_ptr(), size_of::<T>());
    // SAFETY: all zeroes is a value, and `fill` has changed some of it.
    unsafe { value.assume_init() }
}

/// Options of an application.
pub fn app_opts() -> spdk_app_opts {
    // SAFETY: numbers, flags and pointers only.
    unsafe { filled(|opts, size| spdk_app_opts_init(opts, size)) }
}

/// Options of an NVMe controller as the driver wants them.
pub fn nvme_ctrlr_opts() -> spdk_nvme_ctrlr_opts {
    // SAFETY: numbers, flags, characters and pointers only.
    unsafe { filled(|opts, size| spdk_nvme_ctrlr_get_default_ctrlr_opts(opts, size)) }
}

/// Options of an NVMe controller as the bdev module wants them: reconnect, multipath, keys.
pub fn bdev_nvme_ctrlr_opts() -> spdk_bdev_nvme_ctrlr_opts {
    // SAFETY: numbers, flags and pointers only.
    unsafe { filled(|opts, _| spdk_bdev_nvme_get_default_ctrlr_opts(opts)) }
}

/// Options of a namespace of the NVMe-oF target.
pub fn nvmf_ns_opts() -> spdk_nvmf_ns_opts {
    // SAFETY: numbers, flags and pointers only.
    unsafe { filled(|opts, size| spdk_nvmf_ns_opts_get_defaults(opts, size)) }
}

/// Makes a subsystem for I/O that has a model name and room for this many namespaces; null if there is one of this name.
///
/// # Safety
/// On the application's thread, with a target that lives.
pub unsafe fn nvmf_subsystem_create(
    target: *mut spdk_nvmf_tgt,
    nqn: &CStr,
    max_namespaces: u32,
    model: &str,
) -> *mut spdk_nvmf_subsystem {
    const KIND: spdk_nvmf_subtype = SPDK_NVMF_SUBTYPE_NVME;
    // SAFETY: the caller's word; options are numbers, flags and characters only, and what is passed is copied.
    #[cfg(spdk_nvmf_subsystem_opts)]
    unsafe {
        let mut opts: spdk_nvmf_subsystem_opts =
            filled(|opts, size| spdk_nvmf_subsystem_opts_init(KIND, opts, size));
        opts.__bindgen_anon_1.max_namespaces = max_namespaces;
        set_text(&mut opts.mn, model);
        spdk_nvmf_subsystem_create_ext(target, nqn.as_ptr(), KIND, &raw const opts)
    }
    // SAFETY: as above.
    #[cfg(not(spdk_nvmf_subsystem_opts))]
    unsafe {
        let subsystem = spdk_nvmf_subsystem_create(target, nqn.as_ptr(), KIND, max_namespaces);
        let model = std::ffi::CString::new(model).unwrap_or_default();
        if !subsystem.is_null() {
            spdk_nvmf_subsystem_set_mn(subsystem, model.as_ptr());
        }
        subsystem
    }
}

/// Options of a listener of the NVMe-oF target.
pub fn nvmf_listen_opts() -> spdk_nvmf_listen_opts {
    // SAFETY: numbers, flags and pointers only.
    unsafe { filled(|opts, size| spdk_nvmf_listen_opts_init(opts, size)) }
}

/// Options of a listener of a subsystem.
pub fn nvmf_listener_opts() -> spdk_nvmf_listener_opts {
    // SAFETY: numbers, flags and pointers only.
    unsafe { filled(|opts, size| spdk_nvmf_subsystem_listener_opts_init(opts, size)) }
}

/// What a bdev says of itself in flags: bits since 26.01, fields of their own before.
pub struct BdevFlags {
    pub split_on_optimal_io_boundary: bool,
    pub split_on_write_unit: bool,
    pub md_interleave: bool,
    pub dif_is_head_of_md: bool,
}

impl BdevFlags {
    /// What another bdev says.
    pub fn of(bdev: &spdk_bdev) -> Self {
        #[cfg(spdk_bdev_flag_bits)]
        return Self {
            split_on_optimal_io_boundary: bdev.__bindgen_anon_1.split_on_optimal_io_boundary() != 0,
            split_on_write_unit: bdev.__bindgen_anon_1.split_on_write_unit() != 0,
            md_interleave: bdev.__bindgen_anon_1.md_interleave() != 0,
            dif_is_head_of_md: bdev.__bindgen_anon_1.dif_is_head_of_md() != 0,
        };
        #[cfg(not(spdk_bdev_flag_bits))]
        return Self {
            split_on_optimal_io_boundary: bdev.split_on_optimal_io_boundary,
            split_on_write_unit: bdev.split_on_write_unit,
            md_interleave: bdev.md_interleave,
            dif_is_head_of_md: bdev.dif_is_head_of_md,
        };
    }

    /// To be called before the bdev is registered.
    pub fn set(&self, bdev: &mut spdk_bdev) {
        #[cfg(spdk_bdev_flag_bits)]
        {
            let flags = &mut bdev.__bindgen_anon_1;
            flags.set_split_on_optimal_io_boundary(self.split_on_optimal_io_boundary.into());
            flags.set_split_on_write_unit(self.split_on_write_unit.into());
            flags.set_md_interleave(self.md_interleave.into());
            flags.set_dif_is_head_of_md(self.dif_is_head_of_md.into());
        }
        #[cfg(not(spdk_bdev_flag_bits))]
        {
            bdev.split_on_optimal_io_boundary = self.split_on_optimal_io_boundary;
            bdev.split_on_write_unit = self.split_on_write_unit;
            bdev.md_interleave = self.md_interleave;
            bdev.dif_is_head_of_md = self.dif_is_head_of_md;
        }
    }
}

/// The identifier of a trace point: the number of a group and a number in it.
pub const fn trace_point(group: u16, point: u16) -> u16 {
    group * 64 + point
}

/// True if somebody wants to see a trace point. Nothing is recorded, and no argument is worth computing, where not.
#[inline]
pub fn trace_is_on(point: u16) -> bool {
    // SAFETY: SPDK sets the pointer before the first subsystem starts and clears it after the last has ended. What it
    // points to is shared memory in which other processes change whole words.
    unsafe {
        let file = g_trace_file;
        if file.is_null() {
            return false;
        }
        let group = usize::from(point >> 6);
        #[cfg(spdk_trace_sections)]
        let masks = {
            let offset = (*file).section_offsets[SPDK_TRACE_SECTION_TPOINT_MASK as usize] as usize;
            let section: *const spdk_trace_section_tpoint_mask = file.byte_add(offset).cast();
            (&raw const (*section).tpoint_mask).cast::<u64>()
        };
        #[cfg(not(spdk_trace_sections))]
        let masks = (&raw const (*file).tpoint_mask).cast::<u64>();
        (masks.add(group).read_volatile() >> (point & 63)) & 1 != 0
    }
}

/// Policies and selectors of bdev_nvme's multipath, whose names have changed.
pub mod multipath {
    use super::bindings;

    #[cfg(spdk_multipath_names)]
    pub use bindings::{
        SPDK_BDEV_NVME_MULTIPATH_POLICY_ACTIVE_ACTIVE as ACTIVE_ACTIVE,
        SPDK_BDEV_NVME_MULTIPATH_POLICY_ACTIVE_PASSIVE as ACTIVE_PASSIVE,
        SPDK_BDEV_NVME_MULTIPATH_SELECTOR_QUEUE_DEPTH as QUEUE_DEPTH,
        SPDK_BDEV_NVME_MULTIPATH_SELECTOR_ROUND_ROBIN as ROUND_ROBIN,
    };

    #[cfg(not(spdk_multipath_names))]
    pub use bindings::{
        BDEV_NVME_MP_POLICY_ACTIVE_ACTIVE as ACTIVE_ACTIVE,
        BDEV_NVME_MP_POLICY_ACTIVE_PASSIVE as ACTIVE_PASSIVE,
        BDEV_NVME_MP_SELECTOR_QUEUE_DEPTH as QUEUE_DEPTH,
        BDEV_NVME_MP_SELECTOR_ROUND_ROBIN as ROUND_ROBIN,
    };
}

/// Fills in a command: its opcode, and `words` as CDW2, CDW3 and CDW10 to CDW15 (NVM Express Base Specification,
/// common command format). The namespace is bdev_nvme's to fill in.
pub fn set_command(command: &mut spdk_nvme_cmd, opcode: u8, words: [u32; 8]) {
    let mut raw = [0_u32; 16];
    raw[0] = u32::from(opcode);
    raw[2..4].copy_from_slice(&words[..2]);
    raw[10..].copy_from_slice(&words[2..]);
    // SAFETY: a command is 64 bytes of plain data, which bindgen asserts.
    *command = unsafe { std::mem::transmute::<[u32; 16], spdk_nvme_cmd>(raw) };
}

/// Opcode and the words that [`set_command`] sets.
pub fn command_words(command: &spdk_nvme_cmd) -> (u8, [u32; 8]) {
    let source: *const spdk_nvme_cmd = command;
    // SAFETY: as above; a command may be aligned to less than a word.
    let raw = unsafe { source.cast::<[u32; 16]>().read_unaligned() };
    let mut words = [0; 8];
    words[..2].copy_from_slice(&raw[2..4]);
    words[2..].copy_from_slice(&raw[10..]);
    (raw[0] as u8, words)
}

pub fn uuid_from(uuid: &uuid::Uuid) -> spdk_uuid {
    // SAFETY: 16 bytes of plain data.
    unsafe { std::mem::transmute::<[u8; 16], spdk_uuid>(*uuid.as_bytes()) }
}

pub fn uuid_of(uuid: &spdk_uuid) -> uuid::Uuid {
    // SAFETY: as above.
    uuid::Uuid::from_bytes(unsafe { std::mem::transmute::<spdk_uuid, [u8; 16]>(*uuid) })
}

/// A string of SPDK's; empty for null.
///
/// # Safety
/// `text` is null, or ends with a zero.
pub unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// Puts a text into an array of C, with its end; false if it is too long.
pub fn set_text(to: &mut [c_char], text: &str) -> bool {
    if text.len() >= to.len() {
        return false;
    }
    for (to, from) in to.iter_mut().zip(text.bytes().chain([0])) {
        *to = from as c_char;
    }
    true
}

/// The module that has claimed a bdev for itself alone; null if none has.
///
/// # Safety
/// `bdev` lives.
pub unsafe fn claiming_module(bdev: *const spdk_bdev) -> *mut spdk_bdev_module {
    // SAFETY: the caller's word; the union has this part with this kind of claim.
    unsafe {
        if (*bdev).internal.claim_type == SPDK_BDEV_CLAIM_EXCL_WRITE {
            (*bdev).internal.claim.v1.module
        } else {
            std::ptr::null_mut()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_put_with_its_end_or_not_at_all() {
        let mut array = [1; 4];
        assert!(set_text(&mut array, "ab"));
        // SAFETY: it has an end.
        assert_eq!(unsafe { text(array.as_ptr()) }, "ab");
        assert!(set_text(&mut array, "abc"));
        assert!(!set_text(&mut array, "abcd"));
        // SAFETY: as above.
        assert_eq!(unsafe { text(array.as_ptr()) }, "abc");
    }

    #[test]
    fn spdk_sees_the_flags_of_a_bdev_as_they_were_set() {
        for interleave in [false, true] {
            let mut bdev = spdk_bdev {
                md_len: 8,
                ..Default::default()
            };
            let flags = BdevFlags {
                split_on_optimal_io_boundary: !interleave,
                split_on_write_unit: !interleave,
                md_interleave: interleave,
                dif_is_head_of_md: !interleave,
            };
            flags.set(&mut bdev);
            let seen = BdevFlags::of(&bdev);
            assert_eq!(seen.md_interleave, interleave);
            assert_eq!(seen.dif_is_head_of_md, !interleave);
            assert_eq!(seen.split_on_write_unit, !interleave);
            assert_eq!(seen.split_on_optimal_io_boundary, !interleave);
            // SAFETY: SPDK reads the fields that are set.
            assert_eq!(unsafe { spdk_bdev_is_md_interleaved(&bdev) }, interleave);
        }
    }

    #[test]
    fn options_carry_the_size_that_this_side_knows() {
        assert_eq!({ app_opts().opts_size }, size_of::<spdk_app_opts>());
        assert_eq!(
            { nvmf_listen_opts().opts_size },
            size_of::<spdk_nvmf_listen_opts>()
        );
        assert_eq!({ nvmf_ns_opts().opts_size }, size_of::<spdk_nvmf_ns_opts>());
    }

    #[test]
    fn a_trace_point_is_on_where_spdk_says_that_it_is() {
        const POINT: u16 = trace_point(3, 5);
        assert!(!trace_is_on(POINT), "there is no trace");
        let mut memory = vec![0u64; size_of::<spdk_trace_file>() / 8 + 1024];
        let file: *mut spdk_trace_file = memory.as_mut_ptr().cast();
        // SAFETY: the memory has room for the file and a section of masks behind it, and outlives its use. No other test
        // looks at trace points.
        unsafe {
            #[cfg(spdk_trace_sections)]
            let masks = {
                let offset = size_of::<spdk_trace_file>().next_multiple_of(8);
                (*file).num_sections = SPDK_TRACE_NUM_SECTIONS as u16;
                (*file).section_offsets[SPDK_TRACE_SECTION_TPOINT_MASK as usize] = offset as u64;
                let section: *mut spdk_trace_section_tpoint_mask = file.byte_add(offset).cast();
                (*section).count = 20;
                (&raw mut (*section).tpoint_mask).cast::<u64>()
            };
            #[cfg(not(spdk_trace_sections))]
            let masks = (&raw mut (*file).tpoint_mask).cast::<u64>();
            masks.add(3).write(1 << 5);
            g_trace_file = file;
            assert_eq!(spdk_trace_get_tpoint_mask(3), 1 << 5);
            assert!(trace_is_on(POINT));
            assert!(!trace_is_on(trace_point(3, 4)));
            assert!(!trace_is_on(trace_point(2, 5)));
            g_trace_file = std::ptr::null_mut();
        }
    }
}
