//! Containers: what shares, or imitates, a kernel.
//!
//! Only a program can see these; a kernel's [`Source`] has no files.

use super::platform::Platform;
use super::{Detection, Evidence, Source, Text};

/// Names that container managers give themselves.
const MANAGERS: &[(&[u8], Platform)] = &[
    (b"lxc", Platform::Lxc),
    (b"lxc-libvirt", Platform::LxcLibvirt),
    (b"systemd-nspawn", Platform::Nspawn),
    (b"docker", Platform::Docker),
    (b"podman", Platform::Podman),
    (b"rkt", Platform::Rkt),
    (b"pouch", Platform::Pouch),
    (b"proot", Platform::Proot),
    (b"wsl", Platform::Wsl),
    (b"zone", Platform::IllumosLx),
];

/// Files in which managers write their name.
const MANAGER_FILES: &[&str] = &["/run/host/container-manager", "/run/systemd/container"];

/// The first namespaces of a kernel (Linux `include/linux/proc_ns.h`). Docker
/// may share one of them with the host, and never shares all.
const INITIAL: &[(&str, &str, &str)] = &[
    ("PID", "/proc/self/ns/pid", "pid:[4026531836]"),
    ("UTS", "/proc/self/ns/uts", "uts:[4026531838]"),
    ("IPC", "/proc/self/ns/ipc", "ipc:[4026531839]"),
];

/// Appends the container that the program runs in, and the system of
/// containers around it.
pub(super) fn detect(source: &dyn Source, found: &mut Detection) {
    if let Some((platform, evidence)) = manager(source).or_else(|| marker(source)) {
        found.push(platform, evidence);
    }
    if let Some((platform, evidence)) = system(source) {
        found.push(platform, evidence);
    }
}

/// What a manager says of itself.
fn manager(source: &dyn Source) -> Option<(Platform, Evidence)> {
    let named = |name: &[u8]| MANAGERS.iter().find(|(n, _)| *n == name).map(|(_, p)| *p);
    let files = MANAGER_FILES.iter().find_map(|path| {
        let text = Text::file(source, path)?;
        // "oci" names a format and not a manager: look further.
        Some((named(text.trimmed())?, Evidence::File(path)))
    });
    files.or_else(|| {
        let text = Text::<64>::read(|into| source.init_variable("container", into))?;
        Some((named(text.trimmed())?, Evidence::InitVariable))
    })
}

/// What managers leave in the file system.
fn marker(source: &dyn Source) -> Option<(Platform, Evidence)> {
    let by_file = if source.exists("/run/.containerenv") {
        Some((Platform::Podman, Evidence::File("/run/.containerenv")))
    } else if source.exists("/.dockerenv") {
        Some((Platform::Docker, Evidence::File("/.dockerenv")))
    } else {
        None
    };
    match namespace(source) {
        Namespaces::Initial => None,
        Namespaces::Unknown => by_file,
        Namespaces::Own(kind) => {
            by_file.or(Some((Platform::OtherContainer, Evidence::Namespace(kind))))
        }
    }
}

enum Namespaces {
    /// Not a container. An image that was made for one may have been started
    /// as a machine, with the manager's files in it.
    Initial,
    Own(&'static str),
    Unknown,
}

fn namespace(source: &dyn Source) -> Namespaces {
    let mut initial_ones = 0;
    for (kind, path, initial) in INITIAL {
        let Some(text) = Text::<64>::read(|into| source.link(path, into)) else {
            continue;
        };
        if text.trimmed() == initial.as_bytes() {
            initial_ones += 1;
        } else if *kind == "PID" {
            return Namespaces::Own(kind);
        }
    }
    if initial_ones == INITIAL.len() {
        Namespaces::Initial
    } else {
        // Hardened services have UTS and IPC namespaces of their own, too:
        // a container needs a file as a second witness.
        Namespaces::Unknown
    }
}

/// Systems whose containers, or whose whole kernel, are of one kind.
fn system(source: &dyn Source) -> Option<(Platform, Evidence)> {
    // The host of OpenVZ has both.
    if source.exists("/proc/vz") && !source.exists("/proc/bc") {
        return Some((Platform::OpenVz, Evidence::File("/proc/vz")));
    }
    let release = "/proc/sys/kernel/osrelease";
    if let Some(text) = Text::file(source, release)
        && (text.contains("Microsoft") || text.contains("WSL"))
    {
        return Some((Platform::Wsl, Evidence::File(release)));
    }
    let version = "/proc/version";
    if let Some(text) = Text::file(source, version)
        && text.contains("BrandZ virtual linux")
    {
        return Some((Platform::IllumosLx, Evidence::File(version)));
    }
    // Zero is the host of Linux-VServer.
    let status = "/proc/self/status";
    let xid = Text::file(source, status);
    let xid = xid.as_ref().and_then(|text| text.value_of("VxID"));
    if xid.is_some_and(|xid| xid != b"0") {
        return Some((Platform::VServer, Evidence::File(status)));
    }
    None
}
