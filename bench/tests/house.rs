//! Rules of the house that a compiler does not know.

use std::fs;
use std::path::{Path, PathBuf};

/// The only files of the two halves, and of the protocol, with unsafe code.
/// Adding one is a decision, not an accident.
const UNSAFE: [&str; 28] = [
    "guest-drivers/src/barrier.rs",
    "guest-drivers/src/bounce/copy.rs",
    "guest-drivers/src/bounce/mod.rs",
    "guest-drivers/src/bounce/tests.rs",
    "guest-drivers/src/dma.rs",
    "guest-drivers/src/dma/linear.rs",
    "guest-drivers/src/emulated/ata/direct.rs",
    "guest-drivers/src/emulated/ata/engine.rs",
    "guest-drivers/src/emulated/e1000/ring.rs",
    "guest-drivers/src/lent.rs",
    "guest-drivers/src/pci/bar.rs",
    "guest-drivers/src/pci/mod.rs",
    "guest-drivers/src/pci/msix.rs",
    "guest-drivers/src/quiesce.rs",
    "guest-drivers/src/register.rs",
    "guest-drivers/src/register/owned.rs",
    "guest-drivers/src/virtio/queue/mod.rs",
    "guest-drivers/src/virtio/transport/mmio.rs",
    "guest-drivers/src/virtio/transport/mod.rs",
    "guest-drivers/src/virtio/transport/pci.rs",
    "host-backend/src/disk/file/lane.rs",
    "host-backend/src/link/tap/sys.rs",
    "host-backend/src/memory/bufs.rs",
    "host-backend/src/memory/mapped.rs",
    "host-backend/src/memory/mod.rs",
    "host-backend/src/vmm/irq.rs",
    "host-backend/src/vmm/threads.rs",
    "host-backend/src/vmm/vcpu.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn sources(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Lines of code that use the keyword; comments and lint names do not count.
fn uses_unsafe(text: &str) -> bool {
    text.lines().any(|line| {
        let code = line.split("//").next().unwrap_or("");
        code.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| word == "unsafe")
    })
}

#[test]
fn unsafe_code_is_only_where_it_belongs() {
    let root = root();
    let mut files = Vec::new();
    for crate_ in ["protocol/src", "guest-drivers/src", "host-backend/src"] {
        sources(&root.join(crate_), &mut files);
    }
    assert!(files.len() > 40, "the sources are where they were");
    for file in files {
        let name = file.strip_prefix(&root).unwrap().display().to_string();
        let text = fs::read_to_string(&file).unwrap();
        assert!(
            UNSAFE.contains(&name.as_str()) || !uses_unsafe(&text),
            "{name} has unsafe code, and is not on the list"
        );
    }
}

#[test]
fn listed_files_exist() {
    for name in UNSAFE {
        assert!(
            root().join(name).exists(),
            "{name} is on the list, and gone"
        );
    }
}

#[test]
fn the_two_halves_do_not_know_each_other() {
    for (half, other) in [
        ("guest-drivers", "pvkit_host"),
        ("host-backend", "pvkit_guest"),
    ] {
        let mut files = Vec::new();
        sources(&root().join(half), &mut files);
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            assert!(!text.contains(other), "{} names {other}", file.display());
        }
    }
}

#[test]
fn files_stay_readable() {
    let mut files = Vec::new();
    for folder in ["protocol", "guest-drivers", "host-backend", "bench", "fuzz"] {
        sources(&root().join(folder), &mut files);
    }
    for file in files {
        let path = file.display().to_string();
        if path.contains("/target/") {
            continue;
        }
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= 700, "{path} has {lines} lines: split it");
    }
}
