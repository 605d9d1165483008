//! SPDK's own programs against a volume, and both initiators against both targets. Run by
//! `cargo test --features spdk --test spdk`; what is not installed is looked for in BDEV_REPL_SPDK_TREE, an SPDK source
//! tree that has been built.

mod ana;
mod blocking;
mod export;
mod flush;
mod frozen;
#[path = "../e2e/hosts.rs"]
mod hosts;
mod inside;
mod life;
mod links;
mod readme;
mod recognised;
mod register;
mod remote;
mod saved;
mod silent;
#[path = "../e2e/stage.rs"]
#[allow(
    dead_code,
    reason = "the scenarios of the end-to-end tests use what is left over here"
)]
mod stage;
mod starve;
mod targets;
mod tools;
mod trace;
mod wire;
