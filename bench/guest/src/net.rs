//! Running network jobs, each on the card that it names.

use crate::counting::CountingRegisters;
use crate::jobs::{Guest, JobMachine};
use crate::memory::PageBuf;
use crate::virtio_pci;
use alloc::format;
use alloc::string::{String, ToString};
use pvkit_guest::dma::LinearSpace;
use pvkit_guest::emulated::e1000::{
    E1000, E1000Interrupts, E1000Options, E1000Rx, E1000Tx, Masking, attach,
};
use pvkit_guest::net::NetLimits;
use pvkit_guest::pci::PciConfig;
use pvkit_guest::virtio::net::{Net, NetOptions, RxOf, TxOf};
use pvkit_guest::virtio::transport::{MmioTransport, Transport};
use pvkit_protocol::emulated::e1000::pci;
use pvkit_protocol::pci::Command;
use pvkit_protocol::virtio::{Features, device_id};
use pvkit_workload::net::job::{NetDevice, NetJob};
use pvkit_workload::net::run::{NetOutcome, NetTarget, run};
use pvkit_workload::report::Sample;
use pvkit_workload::script::Completion;

/// Bytes of a buffer for a frame that is received.
const BUFFER_BYTES: usize = 2048;
/// Interrupts in a second to which a moderated e1000 is bound, as Linux' driver
/// bounds it under load.
const MODERATED: u32 = 20_000;

type Outcome = Result<(NetOutcome, Features), String>;

impl Guest<'_> {
    /// Runs one network job.
    pub(crate) fn run_net_job(&self, job: &NetJob, number: u32, samples: &mut [Sample]) -> Outcome {
        let device = NetDevice::from_code(job.device)
            .ok_or_else(|| format!("network card {} is not known", job.device))?;
        match device {
            NetDevice::VirtioMmio => {
                let place = self.mmio_place(job.index)?;
                let transport =
                    MmioTransport::new(place.registers()?).map_err(|error| error.to_string())?;
                let machine = self.machine(place.gsi)?;
                run_virtio(transport, None, machine, job, number, samples)
            }
            NetDevice::VirtioPci => self.run_virtio_net_pci(job, number, samples),
            NetDevice::E1000 => self.run_e1000(job, number, samples),
        }
    }

    fn run_virtio_net_pci(&self, job: &NetJob, number: u32, samples: &mut [Sample]) -> Outcome {
        let by_interrupt = Completion::from_code(job.completion) == Some(Completion::Interrupt);
        let found = virtio_pci::open(
            self.ports,
            self.interrupts,
            &mut self.free.borrow_mut(),
            device_id::NETWORK,
            job.index.get() as usize,
            by_interrupt,
        )?;
        let machine = self.machine_with(found.line);
        let vector = found.vector;
        let (mut outcome, features) =
            run_virtio(found.transport, vector, machine, job, number, samples)?;
        // Here the doorbells are among the writes.
        let counts = &mut outcome.common.counts;
        counts.mmio_writes = counts.mmio_writes.saturating_sub(counts.kicks);
        Ok((outcome, features))
    }

    fn run_e1000(&self, job: &NetJob, number: u32, samples: &mut [Sample]) -> Outcome {
        let config = PciConfig::new(self.ports.clone());
        let index = job.index.get();
        let function = config
            .functions()
            .filter(|found| (found.vendor, found.device) == (pci::VENDOR, pci::DEVICE))
            .nth(index as usize)
            .ok_or_else(|| format!("no e1000 {index}"))?;
        let mut free = self.free.borrow_mut();
        let registers = attach(&config, &function, &mut free, virtio_pci::map)
            .map_err(|error| error.to_string())?;
        let pin = virtio_pci::pin_of(&config, function.place);
        let by_interrupt = Completion::from_code(job.completion) == Some(Completion::Interrupt);
        let mut machine = self.machine(u32::from(pin))?;
        if by_interrupt {
            config.disable(function.place, Command::INTX_DISABLE);
        } else {
            config.enable(function.place, Command::INTX_DISABLE);
        }
        let moderated = job.moderation != 0;
        let options = E1000Options {
            transmit_descriptors: job.queue_size.get(),
            receive_descriptors: job.queue_size.get(),
            max_segments: 1,
            masking: if moderated {
                Masking::Never
            } else {
                Masking::Claimed
            },
            interrupts_per_second: if moderated { MODERATED } else { 0 },
            read_back: job.read_back != 0,
            ..E1000Options::default()
        };
        // SAFETY: memory is identity mapped, for devices too, and coherent.
        let space = unsafe { LinearSpace::new(0) };
        let (card, tx, rx) = E1000::open(registers, space, options, &mut receive_buffer)
            .map_err(|error| error.to_string())?;
        let interrupts = card.interrupts();
        let mut target = Emulated {
            card,
            interrupts,
            tx,
            rx,
        };
        let outcome = run(job, number, &mut target, &mut machine, samples);
        let Emulated { card, tx, rx, .. } = target;
        card.close(tx, rx, &mut drop, &mut drop)
            .map_err(|error| error.to_string())?;
        Ok((
            outcome.map_err(|error| error.to_string())?,
            Features::empty(),
        ))
    }
}

fn receive_buffer() -> Option<PageBuf> {
    PageBuf::new(BUFFER_BYTES)
}

fn run_virtio<T: Transport>(
    transport: T,
    queue_vector: Option<u16>,
    mut machine: JobMachine<'_>,
    job: &NetJob,
    number: u32,
    samples: &mut [Sample],
) -> Outcome {
    // SAFETY: memory is identity mapped, for devices too, and coherent.
    let space = unsafe { LinearSpace::new(0) };
    let options = NetOptions {
        queue_size: job.queue_size.get(),
        receive_buffers: job.queue_size.get(),
        max_segments: 1,
        buffer_bytes: BUFFER_BYTES,
        allow: Features::from_bits_retain(job.allow_features.get()),
        queue_vector,
        ..NetOptions::default()
    };
    let (net, (tx, rx)) = Net::open(transport, space, options, &mut receive_buffer)
        .map_err(|error| error.to_string())?;
    let features = net.features();
    let mut target = Virtio { net, tx, rx };
    let outcome = run(job, number, &mut target, &mut machine, samples);
    let Virtio { net, tx, rx } = target;
    net.close([(tx, rx)], &mut drop)
        .map_err(|error| error.to_string())?;
    Ok((outcome.map_err(|error| error.to_string())?, features))
}

struct Virtio<T: Transport> {
    net: Net<T, LinearSpace>,
    tx: TxOf<PageBuf, LinearSpace, T>,
    rx: RxOf<PageBuf, LinearSpace, T>,
}

impl<T: Transport> NetTarget<PageBuf> for Virtio<T> {
    type Tx = TxOf<PageBuf, LinearSpace, T>;
    type Rx = RxOf<PageBuf, LinearSpace, T>;
    fn halves(&mut self) -> (&mut Self::Tx, &mut Self::Rx) {
        (&mut self.tx, &mut self.rx)
    }
    fn limits(&self) -> NetLimits {
        *self.net.limits()
    }
    fn acknowledge(&mut self) {
        self.net.claim_events();
    }
    fn kicks(&self) -> u64 {
        self.tx.counters().queue.kicks + self.rx.counters().queue.kicks
    }
    fn buffer(&mut self, bytes: usize) -> Option<PageBuf> {
        PageBuf::new(bytes)
    }
}

struct Emulated {
    card: E1000<CountingRegisters>,
    interrupts: E1000Interrupts<CountingRegisters>,
    tx: E1000Tx<PageBuf, LinearSpace, CountingRegisters>,
    rx: E1000Rx<PageBuf, LinearSpace, CountingRegisters>,
}

impl NetTarget<PageBuf> for Emulated {
    type Tx = E1000Tx<PageBuf, LinearSpace, CountingRegisters>;
    type Rx = E1000Rx<PageBuf, LinearSpace, CountingRegisters>;
    fn halves(&mut self) -> (&mut Self::Tx, &mut Self::Rx) {
        (&mut self.tx, &mut self.rx)
    }
    fn limits(&self) -> NetLimits {
        *self.card.limits()
    }
    /// A fault is found by the halves, too.
    fn acknowledge(&mut self) {
        let _ = self.interrupts.claim();
    }
    /// Each is a register write, and counted as such.
    fn kicks(&self) -> u64 {
        self.tx.counters().doorbells + self.rx.counters().doorbells
    }
    fn buffer(&mut self, bytes: usize) -> Option<PageBuf> {
        PageBuf::new(bytes)
    }
}
