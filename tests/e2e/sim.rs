//! Simulated runs from the command line.

use std::process::{Command, Stdio};

#[test]
fn runs_go_on_when_nobody_reads_what_is_told() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_bdev-repl"))
        .args(["sim", "--seed", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
}
