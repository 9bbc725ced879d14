//! `pvkit run --net`: what it says when something is wrong, and cards of both
//! kinds in a machine.
#![cfg(feature = "vmm")]

mod common;

use common::{Code, elf, have_kvm, write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

fn pvkit(directory: &Path, code: &Code, nets: &[&str]) -> Output {
    let kernel = write(directory, "guest", &elf(&code.0));
    let mut command = Command::new(env!("CARGO_BIN_EXE_pvkit"));
    command.arg("run").arg("--kernel").arg(kernel);
    command.args(["--timeout", "20"]);
    for net in nets {
        command.args(["--net", net]);
    }
    command.output().unwrap()
}

#[test]
fn bad_cards_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("file"), b"mine").unwrap();
    let _taken = UnixListener::bind(at("taken")).unwrap();
    for (net, words) in [
        (String::new(), &["plugged into", "tap=NAME"][..]),
        ("tap=a/b".to_owned(), &["a/b", "no name of an interface"]),
        ("tap=t,bus=rtl8139".to_owned(), &["rtl8139", "e1000"]),
        ("tap=t,mac=ff:ff:ff:ff:ff:ff".to_owned(), &["group"]),
        ("tap=t,queues=99".to_owned(), &["\"99\"", "1 to 16"]),
        ("fd=400".to_owned(), &["fd=400", "400"]),
        (
            format!("connect={}", at("nobody")),
            &["nobody", "start the other end first"],
        ),
        (format!("connect={}", at("file")), &["file"]),
        (format!("listen={}", at("file")), &["file", "no socket"]),
        (
            format!("listen={}", at("taken")),
            &["taken", "another process"],
        ),
        (
            format!("listen={}", at(&"long".repeat(40))),
            &["a socket's path", "bytes"],
        ),
    ] {
        let output = pvkit(directory.path(), &Code::new().exit(0), &[&net]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{net} succeeded");
        let says = |line: &str| words.iter().all(|word| line.contains(word));
        assert!(
            text.lines().any(says),
            "{net}: none of these lines has {words:?}:\n{text}"
        );
        assert!(!text.contains("panicked"), "{text}");
    }
    assert_eq!(std::fs::read(at("file")).unwrap(), b"mine");
}

#[test]
fn cards_of_all_kinds_are_in_a_machine() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let _other_end = UnixListener::bind(at("other")).unwrap();
    let nets = [
        format!("connect={},bus=virtio-mmio", at("other")),
        format!("listen={},bus=virtio-pci,offload=off", at("a")),
        format!("listen={},bus=e1000,mac=52:54:00:12:34:56", at("b")),
    ];
    let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
    // Configuration mechanism 1: the device number of the function in slot 3,
    // which is the second on the bus. Its low byte says that it is an 82540EM.
    let code = Code::new()
        .out32(0xcf8, 0x8000_0000 | 3 << 11)
        .exit_with_port(0xcfc + 2);
    let output = pvkit(directory.path(), &code, &nets);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0x0e), "{text}");
    assert!(!Path::new(&at("a")).exists(), "a socket is left behind");
}
