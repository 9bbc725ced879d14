//! Signatures in the CPUID leaves that processors leave to hypervisors.

use super::{Platform, Source};

/// The registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// CPUID.1:ECX\[31\], which processors keep zero and hypervisors set.
const HYPERVISOR_BIT: u32 = 1 << 31;

/// The first leaf of hypervisors; each interface starts a multiple of 0x100
/// after it.
const BASE: u32 = 0x4000_0000;

/// Bases that are looked at, as Xen's public headers and Linux have it: below
/// `0x4001_0000`.
const BASES: u32 = 0x100;

/// Signatures by EBX, ECX, EDX.
const SIGNATURES: &[(&[u8; 12], Platform)] = &[
    (b"KVMKVMKVM\0\0\0", Platform::Kvm),
    // KVM whose Hyper-V leaves come first; its own follow at +0x100.
    (b"Linux KVM Hv", Platform::Kvm),
    (b"XenVMMXenVMM", Platform::Xen),
    (b"Microsoft Hv", Platform::HyperV),
    (b"VMwareVMware", Platform::VMware),
    (b"VBoxVBoxVBox", Platform::VirtualBox),
    (b"bhyve bhyve ", Platform::Bhyve),
    (b"BHyVE BHyVE ", Platform::Bhyve),
    (b"TCGTCGTCGTCG", Platform::QemuTcg),
    (b" lrpepyh  vr", Platform::Parallels),
    (b"prl hyperv  ", Platform::Parallels),
    (b"ACRNACRNACRN", Platform::Acrn),
    (b"QNXQVMBSQG\0\0", Platform::Qnx),
    (b"Jailhouse\0\0\0", Platform::Jailhouse),
    (b"OpenBSDVMM58", Platform::OpenBsdVmm),
    (b"___ NVMM ___", Platform::Nvmm),
    (b"HAXMHAXMHAXM", Platform::Haxm),
    (b"LKVMLKVMLKVM", Platform::Kvmtool),
    (b"SRESRESRESRE", Platform::Sre),
    (b"UnisysSpar64", Platform::Spar),
    (b"EVMMEVMMEVMM", Platform::Evmm),
    (b"Apple VZ\0\0\0\0", Platform::Apple),
];

/// Vendor signatures (leaf 0: EBX, EDX, ECX) of x86 that another processor
/// imitates.
const VENDORS: &[(&[u8; 12], Platform)] = &[
    (b"VirtualApple", Platform::Apple),
    (b"MicrosoftXTA", Platform::OtherMachine),
];

fn join(a: u32, b: u32, c: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&a.to_le_bytes());
    bytes[4..8].copy_from_slice(&b.to_le_bytes());
    bytes[8..].copy_from_slice(&c.to_le_bytes());
    bytes
}

/// An interface that answers at one base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) platform: Platform,
    pub(super) base: u32,
    /// The highest leaf that it says it has.
    pub(super) max: u32,
}

/// The interfaces that CPUID shows, in the order of their leaves.
#[derive(Debug, Default)]
pub(super) struct Hypervisors {
    /// The processor is virtual.
    pub(super) present: bool,
    /// An imitated processor.
    pub(super) vendor: Option<Platform>,
    found: [Option<Interface>; 4],
}

impl Hypervisors {
    pub(super) fn scan(source: &dyn Source) -> Self {
        let mut this = Self::default();
        let Some(vendor) = source.cpuid(0, 0) else {
            return this;
        };
        let vendor = join(vendor.ebx, vendor.edx, vendor.ecx);
        this.vendor = VENDORS
            .iter()
            .find(|(signature, _)| **signature == vendor)
            .map(|(_, platform)| *platform);
        let one = source.cpuid(1, 0).unwrap_or_default();
        this.present = one.ecx & HYPERVISOR_BIT != 0;
        if !this.present {
            // Without a hypervisor the leaves return those of the processor.
            return this;
        }
        for number in 0..BASES {
            let base = BASE + number * 0x100;
            let leaf = source.cpuid(base, 0).unwrap_or_default();
            let signature = join(leaf.ebx, leaf.ecx, leaf.edx);
            let Some((_, platform)) = SIGNATURES.iter().find(|(s, _)| **s == signature) else {
                continue;
            };
            let interface = Interface {
                platform: *platform,
                base,
                // KVM of long ago: zero means the one leaf after the base.
                max: if leaf.eax == 0 { base + 1 } else { leaf.eax },
            };
            let Some(slot) = this.found.iter_mut().find(|slot| slot.is_none()) else {
                break;
            };
            *slot = Some(interface);
        }
        this
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Interface> {
        self.found.iter().flatten()
    }

    pub(super) fn get(&self, platform: Platform) -> Option<&Interface> {
        self.iter().find(|interface| interface.platform == platform)
    }
}
