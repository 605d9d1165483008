//! The command line: `tgt`, `status`, `meta`, `demo`.

pub mod meta;

/// Runs the command and returns its exit code.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
