//! A vCPU's state at the PVH entry: 32-bit protected mode, paging off, flat
//! segments, `ebx` pointing to the start info (Xen `pvh.pandoc`).
#![forbid(unsafe_code)]

use super::layout;
use crate::vmm::{VmError, call};
use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

/// CPUID leaf 1, ECX: a hypervisor is present.
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// CR0: protection on, extension type.
const CR0_PE_ET: u64 = 0x11;
/// RFLAGS bit 1 is always set.
const RFLAGS: u64 = 2;

fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Gives a vCPU its CPUID, and the first one its registers; the others wait
/// for the guest to start them.
pub(in crate::vmm) fn set_up_vcpu(
    fd: &VcpuFd,
    id: u8,
    entry: u64,
    cpuid: &CpuId,
) -> Result<(), VmError> {
    let mut cpuid = cpuid.clone();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => {
                leaf.ecx |= HYPERVISOR_PRESENT;
                leaf.ebx = (leaf.ebx & 0x00ff_ffff) | (u32::from(id) << 24);
            }
            // x2APIC id.
            0xb | 0x1f => leaf.edx = u32::from(id),
            _ => {}
        }
    }
    fd.set_cpuid2(&cpuid).map_err(call("set CPUID"))?;
    if id != 0 {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(call("read registers"))?;
    // Execute/read and read/write, both accessed.
    sregs.cs = flat_segment(8, 0b1011);
    let data = flat_segment(16, 0b0011);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    // A 32-bit task state segment, busy.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0b1011,
        s: 0,
        db: 0,
        g: 0,
        ..flat_segment(0, 0)
    };
    sregs.cr0 = CR0_PE_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    fd.set_sregs(&sregs).map_err(call("set registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rbx: layout::START_INFO,
        rflags: RFLAGS,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(call("set registers"))
}
