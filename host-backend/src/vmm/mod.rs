//! A small virtual machine monitor on KVM: it boots an ELF image by PVH, and
//! gives it virtio devices by virtio-mmio or PCI, an IDE controller, network
//! cards of old and a serial port.
//!
//! Put a machine together with [`Vm::new`] and the `add_…` calls, load an
//! image ([`Vm::load`]), and [`run`](Vm::run) it. Each vCPU and each lane of a
//! device has a thread. Whatever goes wrong ends the machine and says why; the
//! guest cannot hang it: a [`Stopper`] ends it from any thread.

mod bus;
mod e1000;
mod error;
mod exits;
mod footprint;
#[allow(unsafe_code)]
mod irq;
mod msi;
mod power;
mod ram;
#[allow(unsafe_code)]
mod threads;
#[allow(unsafe_code)]
mod vcpu;
mod x86_64;

pub use error::VmError;
pub use exits::{ExitCounters, ExitCounts};
pub use footprint::Footprint;
pub use power::{Stop, Stopper};
pub use threads::{ThreadTime, kernel_worker_time, thread_time};
pub use x86_64::LoadError;

use crate::bus::BusDevice;
use crate::emulated::ata::{DriveOptions, Ide, IdeWorker, legacy_ports};
use crate::emulated::serial::{self, SerialPort};
use crate::event::EventFd;
use crate::executor::{Executor, LaneThread, ThreadOptions, Threads};
use crate::memory::GuestMemory;
use crate::pci::{ConfigPorts, MemoryPool, PciFunction, PciRoot, assign_memory, bridge};
use crate::sync::lock;
use crate::virtio::device::Device;
use crate::virtio::transport::{MmioTransport, PciOptions, PciTransport};
use crate::worker::{Failure, LaneEvents, Signal};
use bus::{Bus, Space};
use error::{call, host};
use irq::{Lines, PciLines};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use msi::{MovingDoorbells, Routes};
use power::Power;
use pvkit_protocol::emulated::ata;
use pvkit_protocol::pci::{self, Bdf, header, intx_line};
use pvkit_protocol::virtio::mmio;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vcpu::{Vcpu, VcpuThread};
use vm_memory::GuestMemoryMmap;
use x86_64::layout;

/// What a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmOptions {
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
}

impl Default for VmOptions {
    fn default() -> Self {
        Self {
            memory_bytes: 256 << 20,
            vcpus: 1,
        }
    }
}

/// Where a virtio-mmio device was placed, for the guest's command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioPlace {
    /// First address of the window.
    pub base: u64,
    /// Bytes of the window.
    pub bytes: u64,
    /// Global interrupt: the pin of the I/O APIC.
    pub gsi: u32,
}

impl std::fmt::Display for MmioPlace {
    /// As Linux wants it: `virtio_mmio.device=512@0xd0000000:5`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "virtio_mmio.device={}@{:#x}:{}",
            self.bytes, self.base, self.gsi
        )
    }
}

/// Threads of a machine, by what they do.
#[derive(Debug, Clone, Default)]
pub struct VmThreads {
    vcpus: Arc<Mutex<Vec<i32>>>,
    lanes: Vec<Arc<Mutex<Vec<LaneThread>>>>,
}

impl VmThreads {
    /// Kernel thread ids of the vCPUs that run now.
    #[must_use]
    pub fn vcpus(&self) -> Vec<i32> {
        lock(&self.vcpus).clone()
    }

    /// The lanes that run now.
    #[must_use]
    pub fn lanes(&self) -> Vec<LaneThread> {
        self.lanes
            .iter()
            .flat_map(|list| lock(list).clone())
            .collect()
    }
}

/// A virtual machine that is being put together.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    options: VmOptions,
    map: Arc<GuestMemoryMmap<()>>,
    memory: GuestMemory,
    lines: Lines,
    ports: Bus,
    mmio: Bus,
    mmio_places: Vec<MmioPlace>,
    exits: Arc<ExitCounters>,
    footprint: Option<Footprint>,
    power: Arc<Power>,
    entry: Option<u64>,
    threads: VmThreads,
    /// Doorbells that KVM takes: kept open as long as KVM may use them.
    doorbells: Vec<Arc<EventFd>>,
    pci: Option<Arc<PciRoot>>,
    /// Addresses for the registers of PCI functions.
    pci_memory: MemoryPool,
    /// Ports for them.
    pci_ports: MemoryPool,
    /// The next free slot of the PCI bus.
    pci_slot: u8,
    routes: Arc<Routes>,
    /// Threads of devices that are not virtio's.
    executors: Vec<Threads>,
}

/// Logs the failure of an emulated device's worker. It does not break by what
/// its guest does.
#[derive(Debug)]
struct LogFailure(&'static str);

impl LaneEvents for LogFailure {
    fn failed(&self, _lane: u16, why: &Failure) {
        log::error!("{}: {why}", self.0);
    }
}

impl Vm {
    /// A machine with memory and interrupt controllers, and nothing else.
    ///
    /// # Errors
    /// [`VmError`] says what the host lacks and what would help.
    pub fn new(options: VmOptions) -> Result<Self, VmError> {
        let kvm = open_kvm()?;
        for (cap, name) in [
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::ImmediateExit, "immediate exit"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(VmError::Capability(name));
            }
        }
        let most = kvm.get_max_vcpus().min(usize::from(layout::MAX_VCPUS));
        if options.vcpus == 0 || usize::from(options.vcpus) > most {
            return Err(VmError::TooMany {
                what: "vCPUs (or none)",
                most,
            });
        }
        let fd = Arc::new(kvm.create_vm().map_err(call("create a machine"))?);
        let map = ram::allocate(options.memory_bytes)?;
        vcpu::set_up_machine(&fd, &map)?;
        let map = Arc::new(map);
        let memory = GuestMemory::new(map.clone()).map_err(|error| VmError::Memory {
            bytes: options.memory_bytes,
            reason: error.to_string(),
        })?;
        let power = Arc::new(Power::default());
        let mut vm = Self {
            kvm,
            lines: Lines::new(fd.clone()),
            routes: Arc::new(Routes::new(fd.clone())),
            fd,
            options,
            map,
            memory,
            ports: Bus::new(Space::Port),
            mmio: Bus::new(Space::Memory),
            mmio_places: Vec::new(),
            exits: Arc::default(),
            footprint: None,
            power: power.clone(),
            entry: None,
            threads: VmThreads::default(),
            doorbells: Vec::new(),
            pci: None,
            pci_memory: MemoryPool::new(layout::PCI_MEMORY.start, layout::PCI_MEMORY.end),
            pci_ports: MemoryPool::new(layout::PCI_PORTS.start, layout::PCI_PORTS.end),
            pci_slot: layout::PCI_FIRST_SLOT,
            executors: Vec::new(),
        };
        for (base, count, device) in power::devices(&power) {
            vm.add_ports(base, count, device);
        }
        Ok(vm)
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How often the guest has left for user space, by reason.
    #[must_use]
    pub fn exits(&self) -> Arc<ExitCounters> {
        self.exits.clone()
    }

    /// Ends the machine from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper::new(self.power.clone())
    }

    /// The machine's threads, for their CPU time.
    #[must_use]
    pub fn threads(&self) -> VmThreads {
        self.threads.clone()
    }

    /// What the machine costs the host in memory, besides the guest's RAM. Only
    /// a machine that was asked looks when it stops: that takes a while.
    #[must_use]
    pub fn footprint(&mut self) -> Footprint {
        self.footprint
            .get_or_insert_with(|| Footprint::new(&self.map))
            .clone()
    }

    /// A clone of this handle on guest memory as `vm-memory` knows it.
    #[must_use]
    pub fn memory_map(&self) -> Arc<GuestMemoryMmap<()>> {
        self.map.clone()
    }

    /// Puts a device at `count` ports from `base` on. If ranges overlap, the
    /// device that was added first is meant.
    pub fn add_ports(&mut self, base: u16, count: u16, device: Arc<Mutex<dyn BusDevice>>) {
        self.ports.add(u64::from(base), u64::from(count), device);
    }

    /// An interrupt line to the pin `gsi` of the I/O APIC (and to the same
    /// line of the old controllers, below 16), triggered by edges.
    ///
    /// # Errors
    /// [`VmError`] if KVM or the host refuses.
    pub fn add_edge_line(&mut self, gsi: u32) -> Result<Arc<dyn Signal>, VmError> {
        self.lines.edge(gsi)
    }

    /// Adds COM1, whose output goes to `out`; see [`SerialPort`] for what may
    /// block.
    ///
    /// # Errors
    /// [`VmError`] if KVM or the host refuses.
    pub fn add_serial(&mut self, out: Box<dyn Write + Send>) -> Result<(), VmError> {
        let line = self.lines.edge(serial::COM1_IRQ)?;
        let port = SerialPort::new(out, line);
        self.add_ports(serial::COM1, serial::PORTS, Arc::new(Mutex::new(port)));
        Ok(())
    }

    /// Adds a virtio device behind a window of registers. Its doorbells do not
    /// leave the kernel; its lanes run on threads.
    ///
    /// # Errors
    /// [`VmError`] if there are too many devices, or KVM or the host refuses.
    pub fn add_virtio_mmio(
        &mut self,
        device: Box<dyn Device>,
        threads: ThreadOptions,
    ) -> Result<MmioPlace, VmError> {
        let index = self.mmio_places.len();
        let Some(&gsi) = layout::MMIO_GSIS.get(index) else {
            let most = layout::MMIO_GSIS.len();
            return Err(VmError::TooMany {
                what: "virtio-mmio devices",
                most,
            });
        };
        let bytes = MmioTransport::WINDOW_BYTES;
        let place = MmioPlace {
            base: layout::MMIO_BASE + bytes * index as u64,
            bytes,
            gsi,
        };
        let executor = Threads::new(&format!("pvkit-{index}"), threads);
        self.threads.lanes.push(executor.running());
        let line = self.lines.edge(gsi)?;
        let transport = MmioTransport::new(device, self.memory.clone(), Box::new(executor), line)
            .map_err(host("an event counter"))?;
        for (queue, kick) in transport.kicks().iter().enumerate() {
            let address = IoEventAddress::Mmio(place.base + mmio::QUEUE_NOTIFY as u64);
            let event = irq::kvm_event(kick).map_err(host("an event counter"))?;
            self.fd
                .register_ioevent(&event, &address, queue as u32)
                .map_err(call("register a doorbell"))?;
            self.doorbells.push(kick.clone());
        }
        self.mmio
            .add(place.base, bytes, Arc::new(Mutex::new(transport)));
        self.mmio_places.push(place);
        Ok(place)
    }

    /// Adds a virtio device as a function of the PCI bus, in the next free
    /// slot, and does what firmware would: its registers have addresses and
    /// decode them, and its pin's interrupt line is in configuration space.
    ///
    /// Neither doorbells nor interrupts by message leave the kernel; its lanes
    /// run on threads.
    ///
    /// # Errors
    /// [`VmError`] if there are too many devices, or KVM or the host refuses.
    pub fn add_virtio_pci(
        &mut self,
        device: Box<dyn Device>,
        threads: ThreadOptions,
        options: PciOptions,
    ) -> Result<Bdf, VmError> {
        let root = self.pci()?;
        let place = self.free_slot()?;
        let executor = Threads::new(&format!("pvkit-pci{}", place.slot), threads);
        let running = executor.running();
        let vectors = self
            .routes
            .vectors(PciTransport::vectors_for(&*device, options)?)?;
        let mut function = PciTransport::new(
            device,
            self.memory.clone(),
            Box::new(executor),
            Arc::new(vectors),
            options,
        )?;
        let doorbells = MovingDoorbells::new(self.fd.clone(), function.kicks());
        let doorbells = doorbells.map_err(host("an event counter"))?;
        function.set_doorbells(Box::new(doorbells));
        assign_memory(&mut function, &mut self.pci_memory)?;
        set_interrupt_line(place, &mut function);
        root.attach(place, Arc::new(Mutex::new(function)))?;
        self.threads.lanes.push(running);
        self.pci_slot += 1;
        Ok(place)
    }

    /// The next free slot of the PCI bus; who uses it counts `pci_slot` up.
    fn free_slot(&self) -> Result<Bdf, VmError> {
        if self.pci_slot >= pci::SLOTS {
            return Err(VmError::TooMany {
                what: "PCI devices",
                most: usize::from(pci::SLOTS - layout::PCI_FIRST_SLOT),
            });
        }
        Ok(Bdf::new(self.pci_slot, 0))
    }

    /// The PCI bus, with its host bridge and ISA bridge; made when it is first
    /// asked for.
    ///
    /// # Errors
    /// [`VmError::Pci`], which does not happen on a fresh bus.
    pub fn pci(&mut self) -> Result<Arc<PciRoot>, VmError> {
        if let Some(root) = &self.pci {
            return Ok(root.clone());
        }
        let lines = Arc::new(PciLines::new(self.fd.clone(), layout::PCI_GSIS));
        let root = Arc::new(PciRoot::new(lines));
        bridge::attach(&root)?;
        let config = ConfigPorts::new(root.clone());
        self.add_ports(
            ConfigPorts::BASE,
            ConfigPorts::COUNT,
            Arc::new(Mutex::new(config)),
        );
        self.ports.set_pci(root.clone());
        self.mmio.set_pci(root.clone());
        self.pci = Some(root.clone());
        Ok(root)
    }

    /// Adds the IDE controller, with a drive on each channel for which there
    /// is one. There can be one controller.
    ///
    /// # Errors
    /// [`VmError`] if a disk cannot be a drive, there is a controller already,
    /// or KVM or the host refuses.
    pub fn add_ide(
        &mut self,
        drives: [Option<DriveOptions>; 2],
    ) -> Result<Arc<Mutex<Ide>>, VmError> {
        let irq = |ports: ata::ChannelPorts| u32::from(ports.irq);
        let interrupts = [
            self.lines.edge(irq(ata::PRIMARY))?,
            self.lines.edge(irq(ata::SECONDARY))?,
        ];
        let ide = Ide::new(self.memory.clone(), drives, interrupts)?;
        self.pci()?.attach(Ide::PLACE, ide.clone())?;
        for ports in legacy_ports(&ide) {
            self.add_ports(ports.base, ports.count, Arc::new(Mutex::new(ports.device)));
        }
        // Requests that a disk serves at once never get to the worker, so it
        // need not spin for those that take long anyway.
        let threads = ThreadOptions {
            spin: Duration::ZERO,
            ..ThreadOptions::default()
        };
        let mut executor = Threads::new("pvkit-ide", threads);
        self.threads.lanes.push(executor.running());
        let worker = IdeWorker::new(ide.clone()).map_err(host("an event counter"))?;
        executor
            .start(0, Box::new(worker), Arc::new(LogFailure("IDE")))
            .map_err(host("a thread for the disks"))?;
        self.executors.push(executor);
        Ok(ide)
    }

    /// Where the virtio-mmio devices are, in the order in which they were
    /// added.
    #[must_use]
    pub fn mmio_places(&self) -> &[MmioPlace] {
        &self.mmio_places
    }

    /// Loads an ELF image with a PVH entry, its command line, and a module (an
    /// initial RAM disk). Where the virtio-mmio devices are is added to the
    /// command line.
    ///
    /// # Errors
    /// [`LoadError`] if the image is not one that can be started, or does not
    /// fit.
    pub fn load(
        &mut self,
        kernel: &Path,
        command_line: &str,
        module: Option<&[u8]>,
    ) -> Result<(), VmError> {
        let mut line = command_line.to_owned();
        for place in &self.mmio_places {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&place.to_string());
        }
        self.entry = Some(x86_64::load(
            &self.map,
            &self.memory,
            kernel,
            &line,
            module,
        )?);
        Ok(())
    }

    /// Runs the machine until it stops, and waits for everything in flight.
    ///
    /// # Errors
    /// [`VmError`] if it cannot be started. What happens once it runs is a
    /// [`Stop`].
    pub fn run(self) -> Result<Stop, VmError> {
        let entry = self.entry.ok_or(VmError::NotLoaded)?;
        let Self {
            kvm,
            fd,
            options,
            ports,
            mmio,
            exits,
            power,
            threads,
            ..
        } = self;
        let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
        vcpu::prepare_kick().map_err(host("a signal handler"))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(call("ask for CPUID"))?;
        let mut vcpus = Vec::new();
        for id in 0..options.vcpus {
            vcpus.push(Vcpu::new(
                &fd,
                id,
                entry,
                &cpuid,
                ports.clone(),
                mmio.clone(),
                exits.clone(),
                power.clone(),
            )?);
        }
        let mut running: Vec<VcpuThread> = Vec::new();
        for vcpu in vcpus {
            match vcpu.spawn(threads.vcpus.clone()) {
                Ok(thread) => running.push(thread),
                Err(error) => {
                    power.stop(Stop::Requested);
                    VcpuThread::end(running);
                    return Err(host("a vCPU thread")(error));
                }
            }
        }
        let stop = power.wait();
        if let Some(footprint) = &self.footprint {
            footprint.record();
        }
        VcpuThread::end(running);
        Ok(stop)
    }
}

/// Tells the guest where the pin of a function ends, as firmware would.
fn set_interrupt_line(place: Bdf, function: &mut dyn PciFunction) {
    let line = intx_line(place.slot, function.config().interrupt_pin());
    if let Some(gsi) = layout::PCI_GSIS.get(usize::from(line)) {
        function
            .config_mut()
            .set(header::INTERRUPT_LINE, &[*gsi as u8]);
    }
}

/// Ticks of the guests' time stamp counter in a millisecond, on this host.
///
/// # Errors
/// [`VmError`] if KVM is not there, or does not know.
pub fn tsc_khz() -> Result<u32, VmError> {
    let machine = open_kvm()?.create_vm().map_err(call("create a machine"))?;
    let vcpu = machine.create_vcpu(0).map_err(call("create a vCPU"))?;
    vcpu.get_tsc_khz()
        .map_err(call("ask for the frequency of the time stamp counter"))
}

fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                "; load the kvm modules (`modprobe kvm-intel` or `kvm-amd`), and turn \
                 virtualization on in the firmware, or nested virtualization in the outer machine"
            }
            io::ErrorKind::PermissionDenied => {
                "; add yourself to its group (`sudo usermod -aG kvm $USER`) and log in again"
            }
            _ => "",
        };
        VmError::Kvm { source, hint }
    })
}
