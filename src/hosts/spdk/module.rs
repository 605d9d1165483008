//! What an SPDK application learns of this library when it is loaded: the bdev module. Called by the dynamic loader, or
//! by the start of the program that it is linked into.

/// The loader calls what stands in this section. By the name, a linker takes it out of `libbdev_repl.a`
/// (`-u bdev_repl_register`).
#[used]
#[allow(non_upper_case_globals)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".init_array")]
pub static bdev_repl_register: extern "C" fn() = register;

extern "C" fn register() {}
