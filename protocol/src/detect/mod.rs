//! Naming what a machine runs on.
//!
//! [`detect`] is a pure function over a [`Source`]: CPUID leaves, DMI (SMBIOS)
//! strings, and small files of a Linux system. A kernel implements the first
//! two, a program all of them, a test none: it replays what was recorded.
//!
//! ```
//! use pvkit_protocol::detect::{Leaf, Platform, Source, detect};
//!
//! struct Kvm;
//! impl Source for Kvm {
//!     fn cpuid(&self, leaf: u32, _subleaf: u32) -> Option<Leaf> {
//!         Some(match leaf {
//!             1 => Leaf { ecx: 1 << 31, ..Leaf::default() },
//!             0x4000_0000 => Leaf {
//!                 eax: 0x4000_0001,
//!                 ebx: u32::from_le_bytes(*b"KVMK"),
//!                 ecx: u32::from_le_bytes(*b"VMKV"),
//!                 edx: u32::from_le_bytes(*b"M\0\0\0"),
//!             },
//!             _ => Leaf::default(),
//!         })
//!     }
//! }
//! let found = detect(&Kvm);
//! assert_eq!(found.machine().unwrap().platform, Platform::Kvm);
//! ```
//!
//! The answer has one [`Layer`] for each layer that shows, the innermost first:
//! a container, then the virtual machine that its kernel runs in. A hypervisor
//! may hide what it runs on itself, and most do.
//!
//! # What a host can do wrong
//!
//! All of these answers are the host's word. They choose advice, never
//! memory: each is copied once into a buffer of fixed size, strings are compared and
//! never parsed, and no answer makes [`detect`] loop longer.

mod container;
mod cpuid;
mod dmi;
mod interface;
mod machine;
mod platform;

pub use cpuid::Leaf;
pub use dmi::DmiField;
pub use interface::{HyperV, Interfaces, Kvm, KvmFeatures, Xen};
pub use platform::{Cloud, Kind, Monitor, Platform, XenMode};

/// Bytes of a string or file that detection looks at. All that it looks for
/// stands at the beginning.
pub const TEXT_BYTES: usize = 4096;

/// Most layers that can show: a container, the system that it runs in (WSL,
/// OpenVZ), and two machines (UML or dom0 in a virtual machine).
pub const MAX_LAYERS: usize = 4;

/// Where the facts come from. All but [`Source::cpuid`] may be left out.
pub trait Source {
    /// CPUID with `leaf` in EAX and `subleaf` in ECX; `None` where the
    /// processor has no such instruction.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<Leaf>;

    /// Copies the beginning of a DMI string and returns its length; `None` if
    /// there is no such string.
    fn dmi(&self, field: DmiField, into: &mut [u8]) -> Option<usize> {
        let _ = (field, into);
        None
    }

    /// Copies the beginning of a file and returns its length; `None` if it
    /// cannot be read.
    fn file(&self, path: &str, into: &mut [u8]) -> Option<usize> {
        let _ = (path, into);
        None
    }

    /// Copies the target of a symbolic link.
    fn link(&self, path: &str, into: &mut [u8]) -> Option<usize> {
        let _ = (path, into);
        None
    }

    /// True if the path exists, also where it cannot be read.
    fn exists(&self, path: &str) -> bool {
        let _ = path;
        false
    }

    /// Copies the value of a variable in the environment of process 1. The
    /// rest of that environment may hold secrets and is none of our business.
    fn init_variable(&self, name: &str, into: &mut [u8]) -> Option<usize> {
        let _ = (name, into);
        None
    }
}

/// What told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The signature at this CPUID leaf.
    Cpuid(u32),
    /// The hypervisor bit (CPUID.1:ECX\[31\]) without a known signature.
    HypervisorBit,
    /// A DMI string.
    Dmi(DmiField),
    /// A file, its presence, or what is in it.
    File(&'static str),
    /// The variable `container` of process 1.
    InitVariable,
    /// Namespaces that are not the initial ones.
    Namespace(&'static str),
}

impl core::fmt::Display for Evidence {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Cpuid(leaf) => write!(f, "CPUID leaf {leaf:#x}"),
            Self::HypervisorBit => f.write_str("CPUID hypervisor bit"),
            Self::Dmi(field) => write!(f, "DMI {}", field.name()),
            Self::File(path) => f.write_str(path),
            Self::InitVariable => f.write_str("process 1's variable container"),
            Self::Namespace(kind) => write!(f, "{kind} namespace"),
        }
    }
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// What it is.
    pub platform: Platform,
    /// What told.
    pub evidence: Evidence,
}

/// What a machine runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detection {
    layers: [Option<Layer>; MAX_LAYERS],
    /// The kind of Xen domain, where the machine is one.
    pub xen: Option<XenMode>,
    /// The provider, where DMI names one.
    pub cloud: Option<Cloud>,
    /// The monitor program, where DMI or ACPI names it.
    pub monitor: Option<Monitor>,
    /// The paravirtual interfaces that CPUID offers, whoever offers them.
    pub interfaces: Interfaces,
}

impl Detection {
    /// The layers, the innermost first.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().flatten()
    }

    /// The innermost virtual machine, below any container.
    #[must_use]
    pub fn machine(&self) -> Option<&Layer> {
        self.layers().find(|l| l.platform.kind() == Kind::Machine)
    }

    /// The innermost container.
    #[must_use]
    pub fn container(&self) -> Option<&Layer> {
        self.layers().find(|l| l.platform.kind() == Kind::Container)
    }

    /// Appends a layer, unless the layer is known. More than [`MAX_LAYERS`]
    /// cannot be found.
    fn push(&mut self, platform: Platform, evidence: Evidence) {
        if self.layers().any(|layer| layer.platform == platform) {
            return;
        }
        match self.layers.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(Layer { platform, evidence }),
            None => debug_assert!(false, "more layers than can be found"),
        }
    }
}

/// Names what the machine runs on.
#[must_use]
pub fn detect(source: &dyn Source) -> Detection {
    let mut found = Detection::default();
    let leaves = cpuid::Hypervisors::scan(source);
    found.interfaces = Interfaces::read(source, &leaves);
    container::detect(source, &mut found);
    machine::detect(source, &leaves, &mut found);
    found
}

/// A string or the beginning of a file, copied once.
struct Text<const N: usize = TEXT_BYTES> {
    bytes: [u8; N],
    length: usize,
}

impl Text {
    fn file(source: &dyn Source, path: &str) -> Option<Self> {
        Self::read(|into| source.file(path, into))
    }
}

impl<const N: usize> Text<N> {
    fn read(fill: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<Self> {
        let mut bytes = [0; N];
        // The length is the source's word.
        let length = fill(&mut bytes)?.min(N);
        Some(Self { bytes, length })
    }

    /// Without white space and NULs around.
    fn trimmed(&self) -> &[u8] {
        let mut bytes = &self.bytes[..self.length];
        while let [first, rest @ ..] = bytes
            && first.is_ascii_whitespace()
        {
            bytes = rest;
        }
        while let [rest @ .., last] = bytes
            && (last.is_ascii_whitespace() || *last == 0)
        {
            bytes = rest;
        }
        bytes
    }

    fn contains(&self, needle: &str) -> bool {
        let bytes = &self.bytes[..self.length];
        bytes.windows(needle.len()).any(|w| w == needle.as_bytes())
    }

    fn starts_with(&self, prefix: &str) -> bool {
        self.trimmed().starts_with(prefix.as_bytes())
    }

    /// The rest of the first line that starts with `key`, after a colon and
    /// blanks.
    fn value_of(&self, key: &str) -> Option<&[u8]> {
        self.trimmed()
            .split(|byte| *byte == b'\n')
            .find_map(|line| {
                let rest = line.strip_prefix(key.as_bytes())?.trim_ascii_start();
                Some(rest.strip_prefix(b":")?.trim_ascii())
            })
    }
}
