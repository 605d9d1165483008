//! The demo as a user runs it: exit code 0, and 1 when a replica is not what it should be.

use std::path::Path;
use std::process::{Command, Output};

/// Its addresses are fixed, so one at a time; the input is small. It runs on the embedded host always.
fn demo(more: &[&str]) -> Output {
    let _turn = crate::hosts::turn(&crate::hosts::launchers());
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let output = Command::new(env!("CARGO_BIN_EXE_bdev-repl"))
        .arg("demo")
        .arg("--input")
        .arg(input)
        .arg("--dir")
        .arg(directory.path())
        .args(more)
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn the_demo_ends_well() {
    let output = demo(&[]);
    assert_eq!(output.status.code(), Some(0));
    let story = String::from_utf8_lossy(&output.stdout);
    for part in ["SIGKILL", "byte for byte", "e2fsck", "% of the device"] {
        assert!(story.contains(part), "{part}");
    }
}

#[test]
fn a_byte_flipped_behind_its_back_is_found() {
    let output = demo(&["--flip-byte"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("first differing block"), "{error}");
}
