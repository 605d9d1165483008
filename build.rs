//! With the feature `spdk`: finds SPDK, generates its bindings and says what to link. Without it: nothing.
//! The work is in `build/`; this file is the entry that Cargo calls.

#[cfg(feature = "spdk")]
#[path = "build/spdk.rs"]
mod spdk;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "spdk")]
    if let Err(message) = spdk::prepare() {
        println!("cargo::error={message}");
    }
}
