//! The `pvkit-bench` program: what it leaves behind, and what it says.

mod common;

use common::skipped;
use pvkit_bench::instructions;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The program without a virtual machine, on the quickest row.
fn bench(filter: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pvkit-bench"));
    command.args(["--join", "--rounds", "1", "--filter", filter]);
    command
}

const ROW: &str = "randread-4k-qd1-polled/ide-dma/pvkit";

#[test]
fn figures_are_written_though_nobody_reads_the_tables() {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("figures.json");
    let mut child = bench(ROW)
        .arg("--json")
        .arg(&json)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The first line, and no more: as `head -1` does.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 16]).unwrap();
    drop(stdout);
    let status = child.wait().unwrap();
    assert!(!status.success(), "the tables were lost");
    assert!(fs::read_to_string(&json).unwrap().contains(ROW_IN_JOIN));
}

const ROW_IN_JOIN: &str = "randread-4k-qd1-polled/ide-dma/join";

#[test]
fn rows_that_are_not_measured_are_named_and_none_at_all_is_an_error() {
    let output = bench("randread-4k-qd1-polled").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(
        text.contains("skipped: ") && text.contains("they need a virtual machine"),
        "{text}"
    );

    let output = bench("/qemu").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "nothing was verified");
    assert!(
        text.contains("nothing was measured") && text.contains("QEMU"),
        "{text}"
    );
}

#[test]
fn virtio_drivers_is_compared_in_the_join_too() {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("figures.json");
    let output = bench("qd8-polled")
        .args(["--vs", "virtio-drivers", "--json"])
        .arg(&json)
        // Without valgrind, wherever this runs.
        .env("PATH", directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        text.contains("skipped: ") && text.contains("apt install valgrind"),
        "{text}"
    );
    let document: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let results = document["results"].as_array().unwrap();
    let of = |driver: &str| {
        let found = results.iter().find(|row| row["driver"] == driver).unwrap();
        found["kicks_per_request"].as_f64().unwrap()
    };
    assert_eq!(of("pvkit-guest"), 0.125);
    assert_eq!(of("virtio-drivers"), 1.0);
    assert_eq!(document["pairs"].as_array().unwrap().len(), 2);
    assert!(document["instructions"].as_array().unwrap().is_empty());
}

#[test]
fn callgrind_counts_what_each_driver_executes() {
    let program = Path::new(env!("CARGO_BIN_EXE_pvkit-bench"));
    let counts = match instructions::count(program, &[1]).unwrap() {
        Ok(counts) => counts,
        Err(why) => return skipped(&why),
    };
    let names: Vec<_> = counts.iter().map(|count| count.driver).collect();
    let expected = ["pvkit-guest", "virtio-drivers", "virtio-drivers-tuned"];
    assert_eq!(names, expected);
    for found in &counts {
        // Not the rest of the program, and not nothing.
        let plausible = 50.0..200_000.0;
        assert!(plausible.contains(&found.without_allocator), "{found:?}");
        assert!(
            plausible.contains(&found.instructions_per_request),
            "{found:?}"
        );
        // Only indirect descriptors are allocated.
        let allocates = found.driver == "virtio-drivers";
        let more = found.instructions_per_request > found.without_allocator;
        assert_eq!(more, allocates, "{found:?}");
    }
}

/// Whether the process has a file of this directory open.
fn has_open(child: &Child, directory: &Path) -> bool {
    let Ok(open) = fs::read_dir(format!("/proc/{}/fd", child.id())) else {
        return false;
    };
    open.flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|link| link.starts_with(directory))
}

#[test]
fn a_run_that_is_killed_leaves_no_file() {
    if pvkit_host::vmm::tsc_khz().is_err() {
        return skipped("/dev/kvm cannot be opened");
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_pvkit-bench"))
        .args(["--rounds", "100", "--no-qemu", "--filter", ROW])
        .env("TMPDIR", directory.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !has_open(&child, directory.path()) {
        assert!(start.elapsed() < Duration::from_secs(60));
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn what_keeps_qemu_from_starting_is_said() {
    use std::os::unix::fs::PermissionsExt;
    if pvkit_host::vmm::tsc_khz().is_err() {
        return skipped("/dev/kvm cannot be opened");
    }
    let directory = tempfile::tempdir().unwrap();
    let qemu = directory.path().join("qemu-system-x86_64");
    let script = "#!/bin/sh\ntest \"$1\" = --version && exit\necho no disk today >&2\nexit 1\n";
    fs::write(&qemu, script).unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_pvkit-bench"))
        .args(["--rounds", "1", "--filter", "/qemu"])
        .env("PATH", directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("qboot.rom is missing") {
        return skipped("QEMU's firmware is missing");
    }
    assert!(!output.status.success());
    assert!(text.contains("no disk today"), "{text}");
}
