//! The modules that serve every family of devices name none of them.

use std::fs;
use std::path::{Path, PathBuf};

/// Files and folders below `src/` that know no family.
const NEUTRAL: [&str; 12] = [
    "bus.rs",
    "disk",
    "event.rs",
    "executor",
    "link",
    "log_limit.rs",
    "memory",
    "message.rs",
    "pci",
    "state.rs",
    "sync.rs",
    "worker.rs",
];

/// What they must not name.
const FAMILIES: [&str; 2] = ["virtio::", "emulated::"];

/// The frame header of Linux's taps is virtio's (`IFF_VNET_HDR`,
/// linux/if_tun.h): the format only, of the crate that has formats.
const TAP_HEADER: (&str, &str) = ("link/tap", "use pvkit_protocol::virtio::net::");

fn files(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            files(&entry.unwrap().path(), found);
        }
    } else {
        found.push(path.to_owned());
    }
}

/// The lines of code that name a family, where that is not allowed.
fn violations(name: &str, text: &str) -> Vec<String> {
    let (folder, import) = TAP_HEADER;
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let names_family = |line: &&str| FAMILIES.iter().any(|family| line.contains(family));
    let is_allowed = |line: &&str| name.starts_with(folder) && line.starts_with(import);
    text.lines()
        .filter(is_code)
        .filter(names_family)
        .filter(|line| !is_allowed(line))
        .map(|line| format!("{name}: {}", line.trim()))
        .collect()
}

#[test]
fn neutral_modules_name_no_family() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for name in NEUTRAL {
        let path = root.join(name);
        assert!(path.exists(), "{name} has moved: change the list");
        files(&path, &mut found);
    }
    let mut wrong = Vec::new();
    for file in &found {
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap();
        wrong.extend(violations(name, &fs::read_to_string(file).unwrap()));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_import_of_a_family_is_found() {
    let import = "use crate::virtio::queue::Fault;";
    assert_eq!(violations("worker.rs", import).len(), 1);
    assert_eq!(violations("link/tap/lane.rs", import).len(), 1);
    assert_eq!(violations("worker.rs", &format!("// {import}")).len(), 0);
    let header = "use pvkit_protocol::virtio::net::NetHeader;";
    assert_eq!(violations("link/tap/lane.rs", header).len(), 0);
    assert_eq!(violations("link/switch/lane.rs", header).len(), 1);
}
