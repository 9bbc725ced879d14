//! Virtual CPUs and the calls that set up a machine.

use super::bus::{Access, Bus};
use super::x86_64::{self, layout};
use super::{ExitCounters, Power, Stop, VmError, call};
use crate::sync::lock;
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_PIT_SPEAKER_DUMMY, KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
    kvm_enable_cap, kvm_pit_config, kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Interrupt controllers, timer and memory.
pub(super) fn set_up_machine(fd: &VmFd, map: &GuestMemoryMmap<()>) -> Result<(), VmError> {
    // Otherwise KVM rewrites a hypercall instruction of the other vendor, and
    // some kernels loop for ever on the result. Old kernels do not know the
    // capability, and their guests work all the same.
    let quirk = kvm_enable_cap {
        cap: KVM_CAP_DISABLE_QUIRKS2,
        args: [u64::from(KVM_X86_QUIRK_FIX_HYPERCALL_INSN), 0, 0, 0],
        ..Default::default()
    };
    if let Err(error) = fd.enable_cap(&quirk) {
        log::debug!("KVM_CAP_DISABLE_QUIRKS2: {error}");
    }
    fd.set_tss_address(layout::TSS_ADDRESS as usize)
        .map_err(call("place the TSS"))?;
    fd.create_irq_chip()
        .map_err(call("create the interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    fd.create_pit2(pit).map_err(call("create the timer"))?;
    for (slot, region) in map.iter().enumerate() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|error| VmError::Memory {
                bytes: region.len(),
                reason: error.to_string(),
            })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the mapping belongs to `map`, which the machine keeps as
        // long as its vCPUs run; regions do not overlap.
        unsafe { fd.set_user_memory_region(region) }.map_err(call("give the guest memory"))?;
    }
    Ok(())
}

/// The signal that makes a vCPU leave the guest.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // Only there to interrupt KVM_RUN.
}

/// Installs the handler of the kick signal.
pub(super) fn prepare_kick() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// A vCPU that is ready to run.
#[derive(Debug)]
pub(super) struct Vcpu {
    fd: VcpuFd,
    id: u8,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    exits: Arc<ExitCounters>,
    power: Arc<Power>,
}

/// Stops the machine if its thread panics: nobody else would notice.
struct PanicGuard(Arc<Power>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(Stop::Vcpu("its thread panicked".to_owned()));
        }
    }
}

/// A vCPU that runs.
#[derive(Debug)]
pub(super) struct VcpuThread(JoinHandle<()>);

impl Vcpu {
    #[expect(clippy::too_many_arguments, reason = "everything that a vCPU touches")]
    pub(super) fn new(
        machine: &VmFd,
        id: u8,
        entry: u64,
        cpuid: &CpuId,
        ports: Arc<Bus>,
        mmio: Arc<Bus>,
        exits: Arc<ExitCounters>,
        power: Arc<Power>,
    ) -> Result<Self, VmError> {
        let fd = machine
            .create_vcpu(u64::from(id))
            .map_err(call("create a vCPU"))?;
        x86_64::set_up_vcpu(&fd, id, entry, cpuid)?;
        Ok(Self {
            fd,
            id,
            ports,
            mmio,
            exits,
            power,
        })
    }

    /// Runs it on a thread, whose kernel id is put into `threads` meanwhile.
    pub(super) fn spawn(mut self, threads: Arc<Mutex<Vec<i32>>>) -> io::Result<VcpuThread> {
        let name = format!("pvkit-vcpu{}", self.id);
        let thread = thread::Builder::new().name(name).spawn(move || {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            lock(&threads).push(tid);
            let _guard = PanicGuard(self.power.clone());
            while !self.power.is_stopped() {
                if let Some(stop) = self.step() {
                    self.power.stop(stop);
                }
            }
            lock(&threads).retain(|other| *other != tid);
        })?;
        Ok(VcpuThread(thread))
    }

    /// Runs the guest until it leaves for user space, and serves the exit.
    fn step(&mut self) -> Option<Stop> {
        let run: *const kvm_run = self.fd.get_kvm_run();
        // SAFETY: a plain read of the mapping that the kernel shares with this
        // vCPU, which lives as long as `self.fd`. `size` is the width of one
        // element of a string access; the KVM crate does not pass it on.
        let element = || usize::from(unsafe { (*run).__bindgen_anon_1.io.size });
        let exits = &self.exits;
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.io_out.add(1);
                self.ports
                    .access(u64::from(port), element(), Access::Write(data));
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.io_in.add(1);
                self.ports
                    .access(u64::from(port), element(), Access::Read(data));
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio_write.add(1);
                self.mmio.access(address, data.len(), Access::Write(data));
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio_read.add(1);
                self.mmio.access(address, data.len(), Access::Read(data));
            }
            Ok(VcpuExit::Hlt) => exits.hlt.add(1),
            Ok(VcpuExit::Shutdown) => {
                exits.other.add(1);
                return Some(Stop::TripleFault);
            }
            Ok(exit) => {
                exits.other.add(1);
                let reason = format!("{exit:?}");
                return Some(Stop::Vcpu(format!("{reason}{}", self.place())));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                exits.interrupted.add(1);
            }
            Err(error) => {
                exits.other.add(1);
                return Some(Stop::Vcpu(format!("KVM_RUN: {error}{}", self.place())));
            }
        }
        None
    }

    /// Where the guest is, for error messages.
    fn place(&self) -> String {
        self.fd
            .get_regs()
            .map_or(String::new(), |regs| format!(" at {:#x}", regs.rip))
    }
}

impl VcpuThread {
    /// Makes the vCPU leave the guest; `false` if its thread has ended.
    fn kick(&self) -> bool {
        !self.0.is_finished() && self.0.kill(kick_signal()).is_ok()
    }

    /// Makes vCPUs leave the guest, and waits until their threads have ended.
    /// The machine has been stopped.
    pub(super) fn end(threads: Vec<Self>) {
        // A signal that comes just before KVM_RUN is entered has no effect, so
        // it is sent until it does; and to all, because one may wait with a
        // device locked that another needs.
        while threads.iter().filter(|thread| thread.kick()).count() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        for thread in threads {
            if thread.0.join().is_err() {
                log::error!("a vCPU thread died");
            }
        }
    }
}
