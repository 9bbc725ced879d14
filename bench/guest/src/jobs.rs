//! Running the jobs of the script, each on the device that it names.

use crate::boot::Start;
use crate::counting::{self, CountingPorts, CountingRegisters};
use crate::cpu::{Console, ticks};
use crate::interrupts::{Interrupts, Line, halts};
use crate::memory::PageBuf;
use crate::peer;
use crate::virtio_pci;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt::Write;
use core::ptr::NonNull;
use pvkit_guest::dma::{DmaBufMut, LinearSpace};
use pvkit_guest::emulated::ata::{self, Ata, AtaOptions, Mode, find_controller};
use pvkit_guest::pci::{MemoryPool, PciConfig, PortPool};
use pvkit_guest::register::PortIo;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::transport::{MmioTransport, Transport};
use pvkit_protocol::emulated::ata::PRIMARY;
use pvkit_protocol::virtio::mmio::QUEUE_NOTIFY;
use pvkit_protocol::virtio::{Features, device_id};
use pvkit_workload::net::report::NetReport;
use pvkit_workload::report::{
    Header, JobReport, MAGIC, OUTCOME_FAILED, Sample, net_reports_offset, samples_offset,
};
use pvkit_workload::run::{Counts, Machine, Outcome, Target, run};
use pvkit_workload::script::{Completion, Device, Driver, Job, MARK_PORT, Mark, Script};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Runs all jobs; what happens is in the report.
pub(crate) fn run_all(
    start: &Start,
    script: &Script<'_>,
    report: &mut [u8],
    ports: CountingPorts,
    interrupts: Interrupts,
) {
    let Script { jobs, net_jobs, .. } = script;
    let samples_at = samples_offset(jobs.len(), net_jobs.len());
    let Some((reports, samples)) = report.split_at_mut_checked(samples_at) else {
        let count = jobs.len() + net_jobs.len();
        let _ = writeln!(Console, "the report has no room for {count} jobs");
        return;
    };
    let Ok((samples, _)) = <[Sample]>::mut_from_prefix(samples) else {
        return;
    };
    let guest = Guest {
        start,
        ports: &ports,
        interrupts: &interrupts,
        // What one job has assigned stays assigned.
        free: &RefCell::new(virtio_pci::FREE),
    };
    let mut out = Reports {
        reports,
        ports: &ports,
        done: 0,
    };
    let mut first_sample = 0;
    for (index, job) in jobs.iter().enumerate() {
        let room = samples.get_mut(first_sample..).unwrap_or(&mut []);
        let mut report = JobReport::new_zeroed();
        report.first_sample.set(first_sample as u64);
        match guest.run_job(job, out.done, room) {
            Ok((outcome, features)) => {
                report.start.set(outcome.start);
                report.end.set(outcome.end);
                report.samples.set(outcome.samples as u64);
                report.set_counts(&outcome, features);
                first_sample += outcome.samples;
            }
            Err(message) => {
                report.outcome.set(OUTCOME_FAILED);
                report.set_message(&message);
            }
        }
        let at = size_of::<Header>() + index * size_of::<JobReport>();
        out.write(at, report.as_bytes());
    }
    for (index, job) in net_jobs.iter().enumerate() {
        let room = samples.get_mut(first_sample..).unwrap_or(&mut []);
        let mut report = NetReport::new_zeroed();
        match guest.run_net_job(job, out.done, room) {
            Ok((outcome, features)) => {
                report.set(&outcome, features);
                report.job.first_sample.set(first_sample as u64);
                first_sample += outcome.common.samples;
            }
            Err(message) => {
                report.job.outcome.set(OUTCOME_FAILED);
                report.job.set_message(&message);
            }
        }
        let at = net_reports_offset(jobs.len()) + index * size_of::<NetReport>();
        out.write(at, report.as_bytes());
    }
}

/// Where reports go.
struct Reports<'a> {
    reports: &'a mut [u8],
    ports: &'a CountingPorts,
    /// Jobs that are over.
    done: u32,
}

impl Reports<'_> {
    /// Writes the report of the job that is over.
    fn write(&mut self, at: usize, report: &[u8]) {
        if let Some(place) = self.reports.get_mut(at..at + report.len()) {
            place.copy_from_slice(report);
        }
        let number = self.done;
        self.done += 1;
        let header = Header {
            magic: MAGIC,
            done: U32::new(self.done),
            reserved: U32::ZERO,
        };
        if let Some(place) = self.reports.get_mut(..size_of::<Header>()) {
            place.copy_from_slice(header.as_bytes());
        }
        // For monitors that do not take marks.
        let _ = writeln!(Console, "job {number} done");
        // SAFETY: a port of the monitor, which tells no device an address.
        unsafe { self.ports.write_u32(MARK_PORT, Mark::Done(number).encode()) };
    }
}

pub(crate) struct Guest<'a> {
    start: &'a Start,
    pub(crate) ports: &'a CountingPorts,
    pub(crate) interrupts: &'a Interrupts,
    /// Addresses for windows that firmware left without.
    pub(crate) free: &'a RefCell<MemoryPool>,
}

/// The counters and the interrupt line that belong to a job.
pub(crate) struct JobMachine<'a> {
    ports: &'a CountingPorts,
    line: Line,
}

impl Machine for JobMachine<'_> {
    fn now(&self) -> u64 {
        ticks()
    }
    fn wait(&mut self) {
        self.line.wait();
    }
    fn mark(&mut self, mark: Mark) {
        // SAFETY: a port of the monitor, which tells no device an address.
        unsafe { self.ports.write_u32(MARK_PORT, mark.encode()) };
    }
    fn counts(&self) -> Counts {
        Counts {
            interrupts: self.line.count(),
            halts: halts(),
            ..counting::counts()
        }
    }
}

impl Guest<'_> {
    fn run_job(
        &self,
        job: &Job,
        number: u32,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        let device = Device::from_code(job.device)
            .ok_or_else(|| format!("device {} is not known", job.device))?;
        let mut buffers = Vec::new();
        for _ in 0..job.depth.get() {
            buffers.push(PageBuf::new(job.block_bytes.get() as usize).ok_or("no memory")?);
        }
        let driver = Driver::from_code(job.driver)
            .ok_or_else(|| format!("driver {} is not known", job.driver))?;
        match device {
            Device::VirtioMmio if driver == Driver::VirtioDrivers => {
                self.run_peer(job, number, buffers, samples)
            }
            _ if driver != Driver::Pvkit => Err(format!("no such driver for {device:?}")),
            Device::VirtioMmio => self.run_virtio_mmio(job, number, buffers, samples),
            Device::VirtioPci => self.run_virtio_pci(job, number, buffers, samples),
            Device::IdeDma => self.run_ide(job, number, Mode::Dma, buffers, samples),
            Device::IdePio => self.run_ide(job, number, Mode::Pio, buffers, samples),
        }
    }

    pub(crate) fn machine(&self, pin: u32) -> Result<JobMachine<'_>, String> {
        let line = self
            .interrupts
            .line(pin)
            .ok_or_else(|| format!("no interrupt pin {pin}"))?;
        Ok(self.machine_with(line))
    }

    pub(crate) fn machine_with(&self, line: Line) -> JobMachine<'_> {
        JobMachine {
            ports: self.ports,
            line,
        }
    }

    fn run_ide(
        &self,
        job: &Job,
        number: u32,
        mode: Mode,
        mut buffers: Vec<PageBuf>,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        let pci = PciConfig::new(self.ports.clone());
        // Where QEMU's firmware leaves room, for a BAR that nobody assigned.
        // SAFETY: no device of this machine is there.
        let mut free = unsafe { PortPool::new(0xc000, 0xcfff) };
        let controller = find_controller(&pci, &mut free).map_err(|error| error.to_string())?;
        let [primary, _] = controller.ok_or("no IDE controller")?;
        let completion = match Completion::from_code(job.completion) {
            Some(Completion::Interrupt) => ata::Completion::Interrupt,
            _ => ata::Completion::Polled,
        };
        // SAFETY: memory is identity mapped, for devices too, and coherent.
        let space = unsafe { LinearSpace::new(0) };
        let options = AtaOptions {
            mode,
            completion,
            ..AtaOptions::default()
        };
        // The line is routed first: a drive may interrupt as soon as it is
        // used.
        let mut machine = self.machine(u32::from(PRIMARY.irq))?;
        let disk = Ata::open(self.ports.clone(), space, primary, options)
            .map_err(|error| error.to_string())?;
        let mut target = Ide(disk);
        let outcome = run(
            job,
            number,
            &mut target,
            &mut machine,
            &mut buffers,
            samples,
        );
        target
            .0
            .close(&mut |_| {})
            .map_err(|error| error.to_string())?;
        Ok((
            outcome.map_err(|error| error.to_string())?,
            Features::empty(),
        ))
    }

    fn run_virtio_mmio(
        &self,
        job: &Job,
        number: u32,
        buffers: Vec<PageBuf>,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        let place = self.mmio_place(job.index)?;
        let registers = place.registers()?;
        let transport = MmioTransport::new(registers).map_err(|error| error.to_string())?;
        let machine = self.machine(place.gsi)?;
        self.run_virtio(transport, None, machine, job, number, buffers, samples)
    }

    /// The same by the driver of the crate `virtio-drivers`.
    fn run_peer(
        &self,
        job: &Job,
        number: u32,
        mut buffers: Vec<PageBuf>,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        if Completion::from_code(job.completion) != Some(Completion::Polled) {
            return Err("this driver is only measured polled".to_string());
        }
        let place = self.mmio_place(job.index)?;
        let line = self.interrupts.masked_line(place.gsi);
        let line = line.ok_or_else(|| format!("no interrupt pin {}", place.gsi))?;
        let mut machine = self.machine_with(line);
        let registers = place.registers()?;
        // The driver writes the status for a reset, and does not wait for it.
        let mut resets =
            MmioTransport::new(place.registers()?).map_err(|error| error.to_string())?;
        resets.reset().map_err(|error| error.to_string())?;
        let allow = Features::from_bits_retain(job.allow_features.get());
        let mut target = peer::open(place.base()?, place.bytes, registers, allow)?;
        let features = target.features();
        let outcome = run(
            job,
            number,
            &mut target,
            &mut machine,
            &mut buffers,
            samples,
        );
        // Before the driver's memory goes.
        resets.reset().map_err(|error| error.to_string())?;
        drop(target);
        Ok((outcome.map_err(|error| error.to_string())?, features))
    }

    /// The virtio-mmio device that a job names.
    pub(crate) fn mmio_place(&self, index: U32) -> Result<MmioPlace, String> {
        mmio_places(self.start.command_line)
            .nth(index.get() as usize)
            .ok_or_else(|| format!("no virtio-mmio device {index}"))
    }

    fn run_virtio_pci(
        &self,
        job: &Job,
        number: u32,
        buffers: Vec<PageBuf>,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        let by_interrupt = Completion::from_code(job.completion) == Some(Completion::Interrupt);
        let index = job.index.get() as usize;
        let mut free = self.free.borrow_mut();
        let kind = device_id::BLOCK;
        let found = virtio_pci::open(
            self.ports,
            self.interrupts,
            &mut free,
            kind,
            index,
            by_interrupt,
        )?;
        let machine = self.machine_with(found.line);
        let vector = found.vector;
        let (mut outcome, features) = self.run_virtio(
            found.transport,
            vector,
            machine,
            job,
            number,
            buffers,
            samples,
        )?;
        // Here the doorbells are among the writes.
        let counts = &mut outcome.counts;
        counts.mmio_writes = counts.mmio_writes.saturating_sub(counts.kicks);
        Ok((outcome, features))
    }

    #[expect(clippy::too_many_arguments, reason = "a device and a job")]
    fn run_virtio<T: Transport>(
        &self,
        transport: T,
        queue_vector: Option<u16>,
        mut machine: JobMachine<'_>,
        job: &Job,
        number: u32,
        mut buffers: Vec<PageBuf>,
        samples: &mut [Sample],
    ) -> Result<(Outcome, Features), String> {
        // SAFETY: memory is identity mapped, for devices too, and coherent.
        let space = unsafe { LinearSpace::new(0) };
        let options = BlockOptions {
            queue_size: job.queue_size.get(),
            allow: Features::from_bits_retain(job.allow_features.get()),
            queue_vector,
            ..BlockOptions::default()
        };
        let (block, queue) =
            Block::open(transport, space, options).map_err(|error| error.to_string())?;
        let features = block.features();
        let mut target = Virtio { block, queue };
        let outcome = run(
            job,
            number,
            &mut target,
            &mut machine,
            &mut buffers,
            samples,
        );
        let Virtio { block, queue } = target;
        block
            .close(queue, &mut |_| {})
            .map_err(|error| error.to_string())?;
        Ok((outcome.map_err(|error| error.to_string())?, features))
    }
}

struct Virtio<B: DmaBufMut, T: Transport> {
    block: Block<T>,
    queue: QueueOf<B, LinearSpace, T>,
}

impl<B: DmaBufMut, T: Transport> Target<B> for Virtio<B, T> {
    type Queue = QueueOf<B, LinearSpace, T>;
    fn queue(&mut self) -> &mut Self::Queue {
        &mut self.queue
    }
    fn acknowledge(&mut self) {
        self.block.claim_events();
    }
    fn kicks(&self) -> u64 {
        self.queue.counters().kicks
    }
}

struct Ide<B: DmaBufMut>(Ata<B, CountingPorts, LinearSpace>);

impl<B: DmaBufMut> Target<B> for Ide<B> {
    type Queue = Ata<B, CountingPorts, LinearSpace>;
    fn queue(&mut self) -> &mut Self::Queue {
        &mut self.0
    }
    /// The driver reads the drive's status when it completes a request, and
    /// that acknowledges the interrupt.
    fn acknowledge(&mut self) {}
    fn kicks(&self) -> u64 {
        0
    }
}

/// Where a virtio-mmio device is.
pub(crate) struct MmioPlace {
    base: usize,
    bytes: usize,
    pub(crate) gsi: u32,
}

impl MmioPlace {
    fn base(&self) -> Result<NonNull<u8>, String> {
        let base = core::ptr::with_exposed_provenance_mut(self.base);
        Ok(NonNull::new(base).ok_or("a device at address 0")?)
    }

    pub(crate) fn registers(&self) -> Result<CountingRegisters, String> {
        let base = self.base()?;
        // SAFETY: the monitor says that the window is there; it is mapped
        // uncached, and one driver uses it at a time.
        Ok(unsafe { CountingRegisters::new(base, self.bytes, Some(QUEUE_NOTIFY)) })
    }
}

/// The devices on the command line, each as `virtio_mmio.device=512@ADDR:IRQ`.
fn mmio_places(command_line: &str) -> impl Iterator<Item = MmioPlace> {
    command_line.split_whitespace().filter_map(|word| {
        let device = word.strip_prefix("virtio_mmio.device=")?;
        let (bytes, rest) = device.split_once('@')?;
        let (base, gsi) = rest.split_once(':')?;
        Some(MmioPlace {
            base: parse_number(base)? as usize,
            bytes: parse_number(bytes)? as usize,
            gsi: parse_number(gsi)? as u32,
        })
    })
}

/// A number as Linux reads it on its command line: with `0x`, and with K or M.
fn parse_number(text: &str) -> Option<u64> {
    let (text, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        _ => (text, 0),
    };
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => text.parse().ok()?,
    };
    Some(number << shift)
}
