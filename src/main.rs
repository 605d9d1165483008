//! The command `bdev-repl`.

fn main() -> std::process::ExitCode {
    bdev_repl::cli::main()
}
