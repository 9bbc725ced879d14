//! Virtual machines: which hypervisor, and what lies below it where that shows.

use super::cpuid::Hypervisors;
use super::dmi::Names;
use super::platform::{Platform, XenMode};
use super::{Detection, Evidence, Source, Text};

/// Appends the layers that are machines.
pub(super) fn detect(source: &dyn Source, leaves: &Hypervisors, found: &mut Detection) {
    let names = Names::read(source);
    found.cloud = names.cloud;
    found.monitor = names.monitor;

    // A process of UML is one of its host, whose CPUID it sees: go on below.
    let cpu = "/proc/cpuinfo";
    let info = Text::file(source, cpu);
    let vendor = info.as_ref().and_then(|text| text.value_of("vendor_id"));
    if vendor.is_some_and(|vendor| vendor == b"User Mode Linux" || vendor == b"UML") {
        found.push(Platform::Uml, Evidence::File(cpu));
    }

    if let Some((mode, evidence)) = xen(source, leaves, &names) {
        found.xen = mode;
        found.push(Platform::Xen, evidence);
        // Xen gives dom0 the tables of the machine that Xen itself runs on.
        if mode == Some(XenMode::Dom0)
            && let Some((below, field)) = names.machine
        {
            found.push(below, Evidence::Dmi(field));
        }
        return;
    }

    if let Some((platform, evidence)) = by_cpuid_and_dmi(leaves, &names) {
        found.push(platform, evidence);
    } else if let Some((platform, evidence)) = by_file(source) {
        found.push(platform, evidence);
    } else if leaves.present {
        found.push(Platform::OtherMachine, Evidence::HypervisorBit);
    }
}

/// Xen, and the kind of domain. A PV domain's CPUID shows nothing without a
/// special prefix, so files go first.
fn xen(
    source: &dyn Source,
    leaves: &Hypervisors,
    names: &Names,
) -> Option<(Option<XenMode>, Evidence)> {
    let kind = "/sys/hypervisor/type";
    let by_leaf = leaves.get(Platform::Xen);
    let evidence = if let Some(interface) = by_leaf {
        Evidence::Cpuid(interface.base)
    } else if Text::file(source, kind).is_some_and(|text| text.trimmed() == b"xen") {
        Evidence::File(kind)
    } else if source.exists("/proc/xen") {
        Evidence::File("/proc/xen")
    } else {
        return None;
    };
    let control =
        Text::file(source, "/proc/xen/capabilities").is_some_and(|text| text.contains("control_d"));
    // Bit 11, dom0, of the features as a hexadecimal number (Xen's
    // public/features.h).
    let features = Text::file(source, "/sys/hypervisor/properties/features");
    let features = features
        .as_ref()
        .and_then(|text| core::str::from_utf8(text.trimmed()).ok())
        .and_then(|text| u64::from_str_radix(text, 16).ok());
    if control || features.is_some_and(|bits| bits & (1 << 11) != 0) {
        return Some((Some(XenMode::Dom0), evidence));
    }
    let guest = Text::file(source, "/sys/hypervisor/guest_type");
    let mode = match guest.as_ref().map(Text::trimmed) {
        Some(b"PV") => Some(XenMode::Pv),
        Some(b"HVM") => Some(XenMode::Hvm),
        Some(b"PVH") => Some(XenMode::Pvh),
        // Kernels before 4.13 have no such file. Only an emulated PC has DMI.
        _ if matches!(names.machine, Some((Platform::Xen, _))) => Some(XenMode::Hvm),
        _ => None,
    };
    Some((mode, evidence))
}

/// Signatures and strings together. Either may be another's: `VirtualBox` shows
/// the interface of KVM or Hyper-V, KVM that of Hyper-V, and a provider's
/// strings hide QEMU's.
fn by_cpuid_and_dmi(leaves: &Hypervisors, names: &Names) -> Option<(Platform, Evidence)> {
    if let Some(platform) = leaves.vendor {
        return Some((platform, Evidence::Cpuid(0)));
    }
    let dmi = names.machine.map(|(p, field)| (p, Evidence::Dmi(field)));
    if let Some((Platform::VirtualBox | Platform::Parallels, _)) = dmi {
        return dmi;
    }
    // Hyper-V's signature is the one that others borrow.
    let own = leaves.iter().find(|i| i.platform != Platform::HyperV);
    if let Some(interface) = own {
        return Some((interface.platform, Evidence::Cpuid(interface.base)));
    }
    if let Some(interface) = leaves.get(Platform::HyperV) {
        return match dmi {
            None | Some((Platform::VirtualPc, _)) => {
                Some((Platform::HyperV, Evidence::Cpuid(interface.base)))
            }
            other => other,
        };
    }
    if names.bare_metal { None } else { dmi }
}

/// Machines without CPUID leaves or DMI: POWER, s390, and device trees.
fn by_file(source: &dyn Source) -> Option<(Platform, Evidence)> {
    let compatible = "/proc/device-tree/hypervisor/compatible";
    if let Some(text) = Text::file(source, compatible) {
        let platform = match text.trimmed() {
            b"linux,kvm" => Platform::Kvm,
            b"vmware" => Platform::VMware,
            text if text.starts_with(b"xen") => Platform::Xen,
            _ => Platform::OtherMachine,
        };
        return Some((platform, Evidence::File(compatible)));
    }
    let partition = "/proc/device-tree/ibm,partition-name";
    if source.exists(partition) && source.exists("/proc/device-tree/hmc-managed?") {
        return Some((Platform::PowerVm, Evidence::File(partition)));
    }
    let sysinfo = "/proc/sysinfo";
    let text = Text::file(source, sysinfo)?;
    let control = text.value_of("VM00 Control Program")?;
    let platform = if control.starts_with(b"z/VM") {
        Platform::Zvm
    } else {
        Platform::Kvm
    };
    Some((platform, Evidence::File(sysinfo)))
}
