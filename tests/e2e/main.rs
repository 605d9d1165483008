//! End-to-end tests: real processes `bdev-repl`, real sockets, real files. Run by `cargo test --test e2e`.
//! What happens to a volume is seen by RPC, through NVMe/TCP and in the backing files only.

mod demo;
mod errors;
mod kill;
mod pairing;
mod split;
mod stage;
mod stop;
