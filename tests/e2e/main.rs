//! End-to-end tests: real processes, real sockets, real files. Run by `cargo test --test e2e`, on the embedded host
//! or, as BDEV_REPL_HOSTS says for each node, on SPDK's.
//! What happens to a volume is seen by RPC, through NVMe/TCP and in the backing files only.

mod awaited;
mod demo;
mod errors;
mod hosts;
mod kill;
mod pairing;
mod sim;
mod split;
mod stage;
mod stop;
