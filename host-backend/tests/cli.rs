//! The `pvkit` program: what it says when something is wrong.
#![cfg(feature = "vmm")]

mod common;

use common::{Code, elf, have_kvm, write};
use pvkit_protocol::virtio::{block, mmio};
use std::path::Path;
use std::process::{Command, Output};

fn pvkit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pvkit"))
        .arg("run")
        .args(args)
        .output()
        .unwrap()
}

/// One clear line on standard error, with these words, and a bad exit code.
fn refuses(args: &[&str], words: &[&str]) {
    let output = pvkit(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded");
    let line = text
        .lines()
        .find(|line| words.iter().all(|word| line.contains(word)));
    assert!(
        line.is_some(),
        "{args:?}: none of these lines has {words:?}:\n{text}"
    );
    assert!(!text.contains("panicked"), "{text}");
    assert!(text.matches("os error").count() <= 1, "said twice: {text}");
}

fn path(directory: &Path, name: &str, bytes: &[u8]) -> String {
    write(directory, name, bytes).display().to_string()
}

#[test]
fn bad_disks_are_named_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = path(directory.path(), "guest", &elf(&Code::new().exit(0).0));
    let run = |disk: &str, words: &[&str]| {
        refuses(&["--kernel", &kernel, "--disk", disk], words);
    };
    let missing = directory.path().join("missing.img").display().to_string();
    run(&missing, &["missing.img", "no such file", "truncate"]);
    assert!(!Path::new(&missing).exists());
    let empty = path(directory.path(), "empty.img", b"");
    run(&empty, &["empty.img", "empty", "truncate"]);
    assert_eq!(std::fs::read(&empty).unwrap(), b"");
    let odd = path(directory.path(), "odd.img", &[7; 513]);
    run(&odd, &["odd.img", "513 bytes", "512", "truncate -s 1024"]);
    assert_eq!(std::fs::read(&odd).unwrap(), [7; 513]);
    run(
        &directory.path().display().to_string(),
        &["neither a file nor a block device"],
    );
    let good = path(directory.path(), "good.img", &[0; 1024]);
    run(&format!("{good},rw"), &["\"rw\"", "ro"]);
    run(
        &format!("{good},id=a-name-that-is-too-long"),
        &["23 bytes", "20"],
    );
    run(
        &format!("{good},bus=scsi"),
        &["\"scsi\"", "virtio-mmio, virtio-pci and ide"],
    );
    run(&format!("{good},queues=65"), &["\"65\"", "1 to 64"]);
    run(
        &format!("{good},bus=ide,queues=2"),
        &["IDE", "queues=COUNT"],
    );
    run("", &["path is missing"]);
    let ide = format!("{good},bus=ide");
    refuses(
        &[
            "--kernel", &kernel, "--disk", &ide, "--disk", &ide, "--disk", &ide,
        ],
        &["good.img", "2 disks", "bus=ide"],
    );
    refuses(
        &["--kernel", &kernel, "--disk", &good, "--disk", &good],
        &["good.img", "twice", "ro"],
    );
}

#[test]
fn a_disk_on_ide_is_read_through_its_ports() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut sectors = vec![0; 4096];
    sectors[512] = 77;
    let disk = path(directory.path(), "disk.img", &sectors);
    for (option, code) in [("bus=ide", 77), ("bus=virtio", 0xff)] {
        // READ SECTORS, one, from LBA 1; nothing there reads as ones.
        let code_bytes = Code::new()
            .out8(0x1f2, 1)
            .out8(0x1f3, 1)
            .out8(0x1f4, 0)
            .out8(0x1f5, 0)
            .out8(0x1f6, 0xe0)
            .out8(0x1f7, 0x20)
            .rep_insw(0x1f0, 0x2000, 256)
            .exit_with(0x2000);
        let kernel = path(directory.path(), "guest", &elf(&code_bytes.0));
        let output = pvkit(&[
            "--kernel",
            &kernel,
            "--disk",
            &format!("{disk},ro,{option}"),
        ]);
        assert_eq!(output.status.code(), Some(code), "{option}: {output:?}");
    }
}

#[test]
fn a_disk_on_virtio_pci_is_a_function_with_registers_that_decode() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = path(directory.path(), "disk.img", &[0; 77 * 512]);
    // The vendor of slot 2, and the first byte of the capacity.
    let vendor = Code::new().out32(0xcf8, 0x8000_1000).exit_with_port(0xcfc);
    let capacity = Code::new().exit_with(0xe000_2000);
    for (option, code, expected) in [
        ("virtio-pci", &vendor, 0xf4),
        ("virtio-mmio", &vendor, 0xff),
        ("virtio-pci", &capacity, 77),
        ("virtio", &capacity, 0xff),
    ] {
        let kernel = path(directory.path(), "guest", &elf(&code.0));
        let output = pvkit(&[
            "--kernel",
            &kernel,
            "--disk",
            &format!("{disk},ro,bus={option}"),
        ]);
        assert_eq!(output.status.code(), Some(expected), "{option}: {output:?}");
    }
}

#[test]
fn bad_sizes_and_images_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = path(directory.path(), "guest", &elf(&Code::new().exit(0).0));
    refuses(&["--kernel", &kernel, "--memory", "lots"], &["lots", "MiB"]);
    refuses(&["--kernel", &kernel, "--memory", "1.5GiB"], &["1.5GiB"]);
    refuses(&["--kernel", &kernel, "--cpus", "many"], &["many"]);
    refuses(&[], &["--kernel"]);
    if !have_kvm() {
        return;
    }
    refuses(
        &["--kernel", &kernel, "--memory", "4096"],
        &["4096 bytes", "--memory"],
    );
    refuses(
        &["--kernel", &kernel, "--memory", "33554433"],
        &["33554433", "4096"],
    );
    refuses(&["--kernel", &kernel, "--cpus", "0"], &["vCPUs"]);
    refuses(&["--kernel", "/no/such/image"], &["/no/such/image"]);
    let text = path(directory.path(), "text", b"not an image");
    refuses(&["--kernel", &text], &["text", "ELF"]);
    let fifo = directory.path().join("fifo").display().to_string();
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for other in [&fifo, &directory.path().display().to_string()] {
        refuses(&["--kernel", other], &[other, "no regular file"]);
    }
    refuses(
        &["--kernel", &kernel, "--module", "/dev/zero"],
        &["a module of", "use a larger --memory"],
    );
    refuses(
        &["--kernel", &kernel, "--module", "/no/such/module"],
        &["/no/such/module"],
    );
}

#[test]
fn the_exit_code_is_the_guest_s() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for code in [0, 42] {
        let kernel = path(directory.path(), "guest", &elf(&Code::new().exit(code).0));
        let output = pvkit(&["--kernel", &kernel]);
        assert_eq!(output.status.code(), Some(i32::from(code)));
    }
    let kernel = path(directory.path(), "guest", &elf(&Code::new().halt().0));
    refuses(
        &["--kernel", &kernel, "--timeout", "1"],
        &["1 s", "--timeout"],
    );
}

#[test]
fn a_size_that_direct_io_cannot_have_is_named() {
    // A file system in memory has blocks of 4096 bytes, if it knows them.
    let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
        return common::skipped("/dev/shm is missing");
    };
    file.as_file().set_len(1536).unwrap();
    let disk = format!("{},direct", file.path().display());
    let output = pvkit(&["--kernel", "/no/such/image", "--disk", &disk]);
    let text = String::from_utf8_lossy(&output.stderr);
    if !text.contains("1536 bytes") {
        return common::skipped(&format!("another size fits here: {text}"));
    }
    let words = ["4096", "leave `direct` away", "truncate -s 4096"];
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

/// A guest that writes sector 16 of its disk by a queue, and ends with the request's
/// status.
fn writer(queue: u32) -> Code {
    const REGISTERS: u32 = 0xd000_0000;
    let (table, avail, used) = (0x20_0000, 0x20_1000, 0x20_2000);
    let (header, data, status) = (0x20_3000, 0x20_4000, 0x20_5000);
    let mut code = Code::new().store(header, 1).store(header + 8, 16);
    code = code.store8(status, 0xff).store(avail, 1 << 16);
    // Length, then flags (1: another follows, 2: written) and what follows.
    for (index, (addr, len, rest)) in [
        (header, 16, 1 | 1 << 16),
        (data, 512, 1 | 2 << 16),
        (status, 1, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let at = table + 16 * index as u32;
        code = code.store(at, addr).store(at + 8, len).store(at + 12, rest);
    }
    for (register, value) in [
        (mmio::STATUS, 0),
        (mmio::STATUS, 3),
        // FLUSH, and MQ for all queues but the first.
        (mmio::DRIVER_FEATURES, 1 << 9 | u32::from(queue > 0) << 12),
        (mmio::DRIVER_FEATURES_SEL, 1),
        (mmio::DRIVER_FEATURES, 1), // VERSION_1
        (mmio::STATUS, 11),
        (mmio::QUEUE_SEL, queue),
        (mmio::QUEUE_SIZE, 4),
        (mmio::QUEUE_DESC_LOW, table),
        (mmio::QUEUE_DRIVER_LOW, avail),
        (mmio::QUEUE_DEVICE_LOW, used),
        (mmio::QUEUE_READY, 1),
        (mmio::STATUS, 15),
        (mmio::QUEUE_NOTIFY, queue),
    ] {
        code = code.store(REGISTERS + register as u32, value);
    }
    code.wait_while8(status, 0xff).exit_with(status)
}

#[test]
fn every_queue_of_a_disk_is_served() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for queue in [0, 1, 3] {
        let kernel = path(directory.path(), "guest", &elf(&writer(queue).0));
        let disk = path(directory.path(), "disk.img", &[0; 64 * 1024]);
        let output = pvkit(&[
            "--timeout",
            "20",
            "--kernel",
            &kernel,
            "--disk",
            &format!("{disk},queues=4"),
        ]);
        let text = String::from_utf8_lossy(&output.stderr);
        let code = i32::from(block::status::OK);
        assert_eq!(output.status.code(), Some(code), "queue {queue}: {text}");
        assert_eq!(text, "");
    }
}

#[test]
fn a_limit_of_file_sizes_fails_the_request_and_not_the_machine() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = path(directory.path(), "guest", &elf(&writer(0).0));
    let disk = path(directory.path(), "disk.img", &[0; 64 * 1024]);
    for (limit, expected) in [
        ("unlimited", block::status::OK),
        ("1", block::status::IOERR),
    ] {
        let script = format!("ulimit -f {limit}; exec \"$@\"");
        let output = Command::new("sh")
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_pvkit"), "run"])
            .args(["--timeout", "20", "--kernel", &kernel, "--disk", &disk])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(i32::from(expected)), "{text}");
        assert_eq!(text, "");
    }
}

#[test]
fn four_devices_cost_less_than_eight_mebibytes() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = path(directory.path(), "guest", &elf(&Code::new().exit(0).0));
    let disks: Vec<String> = ["virtio-mmio", "virtio-pci", "virtio-pci", "ide"]
        .iter()
        .enumerate()
        .map(|(index, bus)| {
            let name = format!("disk{index}.img");
            let disk = path(directory.path(), &name, &[0; 1 << 20]);
            format!("{disk},bus={bus}")
        })
        .collect();
    let mut args = vec!["--kernel", kernel.as_str(), "--stats"];
    for disk in &disks {
        args.extend(["--disk", disk]);
    }
    let output = pvkit(&args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let mib = text
        .lines()
        .find_map(|line| line.strip_prefix("memory besides the guest's: "))
        .and_then(|line| line.strip_suffix(" MiB resident"))
        .and_then(|mib| mib.parse::<f64>().ok())
        .unwrap_or_else(|| panic!("no figure in {text}"));
    println!("{mib} MiB with four devices");
    assert!(mib > 0.1 && mib < 8.0, "{mib} MiB");
    assert!(text.contains("exits: "), "{text}");
}

#[test]
fn a_user_without_rights_is_told_how_to_get_them() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let Ok(device) = std::fs::metadata("/dev/kvm") else {
        common::skipped("there is no /dev/kvm");
        return;
    };
    if device.mode() & 0o006 != 0 {
        common::skipped("/dev/kvm is open to everybody");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), everybody.clone()).unwrap();
    let kernel = path(directory.path(), "guest", &elf(&Code::new().exit(0).0));
    let program = directory.path().join("pvkit");
    std::fs::copy(env!("CARGO_BIN_EXE_pvkit"), &program).unwrap();
    std::fs::set_permissions(&program, everybody).unwrap();
    let locked = path(directory.path(), "locked.img", &[0; 1024]);
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o600)).unwrap();

    let as_nobody = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("run").args(args).uid(NOBODY).gid(NOBODY);
        command
            .output()
            .map(|output| String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let Ok(text) = as_nobody(&["--kernel", &kernel]) else {
        common::skipped("only root can try this as another user");
        return;
    };
    assert!(
        text.contains("/dev/kvm") && text.contains("usermod -aG kvm"),
        "{text}"
    );
    assert_eq!(text.matches("os error").count(), 1, "{text}");
    let text = as_nobody(&["--kernel", &kernel, "--disk", &locked]).unwrap();
    assert!(
        text.contains("locked.img") && text.contains("permission denied"),
        "{text}"
    );
}
