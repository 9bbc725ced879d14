//! A pass in pvkit's own monitor.

use super::{HostCounts, MEMORY_BYTES, Measurement, Progress, Settings, Task};
use super::{patience, read_report, script};
use crate::plan::SPIN_US;
use anyhow::{Context, Result, bail};
use pvkit_host::bus::BusDevice;
use pvkit_host::disk::FileDisk;
use pvkit_host::emulated::ata::DriveOptions;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::memory::GuestMemory;
use pvkit_host::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_host::vmm::{
    ExitCounters, Stop, Vm, VmOptions, VmThreads, kernel_worker_time, thread_time,
};
use pvkit_workload::script::{MARK_PORT, Mark};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What the guest's marks brought so far.
#[derive(Debug, Default)]
struct Marks {
    started: HashMap<u32, HostCounts>,
    ended: HashMap<u32, HostCounts>,
    done: usize,
}

/// The port that the guest writes its marks to. It is written from the vCPU's
/// thread, so the counters stand still while they are read.
#[derive(Debug)]
struct MarkPort {
    marks: Arc<Mutex<Marks>>,
    exits: Arc<ExitCounters>,
    threads: Option<VmThreads>,
    done: mpsc::Sender<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MarkPort {
    fn counts(&self) -> HostCounts {
        let Some(threads) = &self.threads else {
            return HostCounts::default();
        };
        HostCounts {
            exits: self.exits.read(),
            vcpu: threads.vcpus().into_iter().map(thread_time).sum(),
            worker: threads
                .lanes()
                .into_iter()
                .map(|lane| thread_time(lane.tid))
                .sum(),
            kernel_workers: kernel_worker_time(),
        }
    }
}

impl BusDevice for MarkPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let mut marks = lock(&self.marks);
        match Mark::decode(u32::from_le_bytes(bytes)) {
            Some(Mark::Start(job)) => _ = marks.started.insert(job, self.counts()),
            Some(Mark::End(job)) => {
                let mut counts = self.counts();
                // The mark itself is a port write.
                counts.exits.io_out = counts.exits.io_out.saturating_sub(1);
                marks.ended.insert(job, counts);
            }
            Some(Mark::Done(_)) => {
                marks.done += 1;
                let _ = self.done.send(marks.done);
            }
            None => {}
        }
    }
}

/// What the guest prints, kept for error messages.
#[derive(Debug, Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut text = lock(&self.0);
        // A guest that prints for ever must not fill the host's memory.
        if text.len() < 64 * 1024 {
            text.extend_from_slice(data);
        }
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// The last lines but progress.
    fn tail(&self) -> String {
        let text = lock(&self.0);
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("job "))
            .collect();
        let from = lines.len().saturating_sub(5);
        lines.get(from..).unwrap_or(&[]).join("\n")
    }
}

/// Runs the tasks in a virtual machine on `disk`.
///
/// # Errors
/// If the machine cannot be made, the guest fails or hangs, or data is wrong.
pub fn run(
    image: &Path,
    disk: &FileDisk,
    tasks: &[Task],
    settings: &Settings,
    progress: Progress<'_>,
) -> Result<Vec<Measurement>> {
    let pass = Pass {
        image,
        script: &script(tasks, settings),
        names: tasks.iter().map(|task| task.row.to_string()).collect(),
        patience: patience(tasks.len(), settings),
        progress,
    };
    let ran = run_machine(&pass, |vm| add_disks(vm, disk, settings))?;
    let mut measurements = read_report(&ran.memory, tasks).context("pvkit")?;
    for (measurement, host) in measurements.iter_mut().zip(ran.host) {
        measurement.host = host;
    }
    Ok(measurements)
}

/// The same disk twice on each transport: behind a worker that spins, and one
/// that does not.
fn add_disks(vm: &mut Vm, disk: &FileDisk, settings: &Settings) -> Result<()> {
    let block = BlockOptions {
        in_order: settings.in_order,
        ..BlockOptions::default()
    };
    for spin in [SPIN_US, 0] {
        let device = Block::new(Arc::new(disk.clone()), block.clone())?;
        let threads = threads_spinning(spin);
        vm.add_virtio_mmio(Box::new(device), threads)?;
        let device = Block::new(Arc::new(disk.clone()), block.clone())?;
        vm.add_virtio_pci(Box::new(device), threads, pci_options(settings))?;
    }
    vm.add_ide([Some(DriveOptions::new(Arc::new(disk.clone()))), None])?;
    Ok(())
}

/// Threads that poll for so many microseconds before they sleep.
pub(crate) fn threads_spinning(us: u32) -> ThreadOptions {
    ThreadOptions {
        spin: Duration::from_micros(u64::from(us)),
        ..ThreadOptions::default()
    }
}

pub(crate) fn pci_options(settings: &Settings) -> PciOptions {
    match settings.vectors {
        Some(vectors) => PciOptions::default().with_vectors(vectors),
        None => PciOptions::default(),
    }
}

/// What a machine is to run.
pub(crate) struct Pass<'a> {
    pub(crate) image: &'a Path,
    pub(crate) script: &'a [u8],
    /// Of the jobs, for messages.
    pub(crate) names: Vec<String>,
    pub(crate) patience: Duration,
    pub(crate) progress: Progress<'a>,
}

/// What is left of a machine that did all its jobs.
pub(crate) struct Ran {
    pub(crate) memory: GuestMemory,
    /// What the host counted, by job.
    pub(crate) host: Vec<Option<HostCounts>>,
}

/// Runs a script in a virtual machine with the devices that `devices` adds.
pub(crate) fn run_machine(
    pass: &Pass<'_>,
    devices: impl FnOnce(&mut Vm) -> Result<()>,
) -> Result<Ran> {
    let mut vm = Vm::new(VmOptions {
        memory_bytes: MEMORY_BYTES,
        vcpus: 1,
    })?;
    let console = Console::default();
    vm.add_serial(Box::new(console.clone()))?;
    let marks = Arc::new(Mutex::new(Marks::default()));
    let (done, jobs_done) = mpsc::channel();
    let port = MarkPort {
        marks: marks.clone(),
        exits: vm.exits(),
        threads: None,
        done,
    };
    let port = Arc::new(Mutex::new(port));
    vm.add_ports(MARK_PORT, 4, port.clone());
    devices(&mut vm)?;
    vm.load(pass.image, "", Some(pass.script))?;
    lock(&port).threads = Some(vm.threads());

    let memory = vm.memory().clone();
    let stopper = vm.stopper();
    let stop = thread::scope(|scope| {
        let watch = scope.spawn(move || {
            loop {
                match jobs_done.recv_timeout(pass.patience) {
                    Ok(count) => (pass.progress)(count),
                    Err(RecvTimeoutError::Timeout) => {
                        stopper.stop();
                        return true;
                    }
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            }
        });
        let stop = vm.run();
        // Ends the watch: the last sender goes.
        drop(port);
        let hung = watch.join().unwrap_or(false);
        stop.map(|stop| (stop, hung))
    });
    let (stop, hung) = stop?;
    let marks = lock(&marks);
    let at = || pass.names.get(marks.done).map_or("the end", String::as_str);
    if hung {
        bail!(
            "the guest hung for {} s at {}",
            pass.patience.as_secs(),
            at()
        );
    }
    match stop {
        Stop::DebugExit(0) => {}
        stop => bail!("{stop} at {}\n{}", at(), console.tail()),
    }
    let host = (0..pass.names.len() as u32)
        .map(|number| {
            let start = marks.started.get(&number)?;
            Some(marks.ended.get(&number)?.since(start))
        })
        .collect();
    Ok(Ran { memory, host })
}
