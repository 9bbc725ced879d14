//! What paravirtual interfaces offer by CPUID.

use super::Source;
use super::cpuid::{Hypervisors, Interface, Leaf};
use super::platform::Platform;

bitflags::bitflags! {
    /// Features of KVM (Linux Documentation/virt/kvm/x86/cpuid.rst, leaf
    /// base + 1, EAX).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct KvmFeatures: u32 {
        /// The clock by the old registers.
        const CLOCKSOURCE = 1 << 0;
        /// The clock by the new registers.
        const CLOCKSOURCE2 = 1 << 3;
        /// Page faults that do not stop the processor.
        const ASYNC_PF = 1 << 4;
        /// Time that the host gave to others.
        const STEAL_TIME = 1 << 5;
        /// End of interrupt without an exit.
        const PV_EOI = 1 << 6;
        /// Spin locks that sleep.
        const PV_UNHALT = 1 << 7;
        /// TLB flushes without interrupts to processors that do not run.
        const PV_TLB_FLUSH = 1 << 9;
        /// Interrupts to many processors in one call.
        const PV_SEND_IPI = 1 << 11;
        /// The guest may poll before it halts.
        const POLL_CONTROL = 1 << 12;
        /// The clock needs no comparison between processors.
        const CLOCKSOURCE_STABLE = 1 << 24;
        const _ = !0;
    }
}

/// KVM's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kvm {
    /// Its first leaf.
    pub base: u32,
    /// Its features.
    pub features: KvmFeatures,
}

/// Hyper-V's interface (Hypervisor Top Level Functional Specification §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HyperV {
    /// Its first leaf.
    pub base: u32,
    /// Privileges of the partition (leaf base + 3, EAX): bit 1 a reference
    /// counter, bit 9 a reference TSC page.
    pub privileges: u32,
    /// What the host recommends (leaf base + 4, EAX).
    pub recommendations: u32,
    /// True if the host follows the specification (`Hv#1` in leaf base + 1).
    pub conforms: bool,
}

impl HyperV {
    /// The host has a TSC page: a clock that is read without an exit.
    #[must_use]
    pub const fn has_tsc_page(&self) -> bool {
        self.privileges & (1 << 9) != 0
    }
}

/// Xen's interface (`xen/include/public/arch-x86/cpuid.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xen {
    /// Its first leaf.
    pub base: u32,
    /// The version, as major and minor.
    pub version: (u16, u16),
}

/// The interfaces that show, which may be several: KVM, Xen and others also
/// speak Hyper-V's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// KVM's.
    pub kvm: Option<Kvm>,
    /// Hyper-V's.
    pub hyperv: Option<HyperV>,
    /// Xen's.
    pub xen: Option<Xen>,
}

const HV_1: u32 = u32::from_le_bytes(*b"Hv#1");

impl Interfaces {
    pub(super) fn read(source: &dyn Source, leaves: &Hypervisors) -> Self {
        // A leaf beyond the highest may hold anything.
        let leaf = |interface: &Interface, offset: u32| -> Leaf {
            if interface.max < interface.base + offset {
                return Leaf::default();
            }
            source.cpuid(interface.base + offset, 0).unwrap_or_default()
        };
        // Hyper-V's leaves start where any hypervisor that has them says so:
        // KVM poses under its own signature, "Linux KVM Hv", too.
        let hyperv = leaves.iter().find_map(|i| {
            let conforms = leaf(i, 1).eax == HV_1;
            (conforms || i.platform == Platform::HyperV).then(|| HyperV {
                base: i.base,
                privileges: leaf(i, 3).eax,
                recommendations: leaf(i, 4).eax,
                conforms,
            })
        });
        let kvm = leaves
            .iter()
            .find(|i| i.platform == Platform::Kvm && leaf(i, 1).eax != HV_1)
            .map(|i| Kvm {
                base: i.base,
                features: KvmFeatures::from_bits_retain(leaf(i, 1).eax),
            });
        let xen = leaves.get(Platform::Xen).map(|i| {
            let version = leaf(i, 1).eax;
            Xen {
                base: i.base,
                version: ((version >> 16) as u16, version as u16),
            }
        });
        Self { kvm, hyperv, xen }
    }
}
