//! Nothing is generated for the embedded host.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
