//! One pass: a list of network jobs, run once, by one monitor.

use super::plan::base_row;
use super::row::{Card, NetRow, NetVmm, WireKind};
use super::wire::in_process::InProcess;
use super::wire::tap::TapWire;
use crate::pass::kvm::{self, Pass, pci_options, threads_spinning};
use crate::pass::qemu::{self, Qemu};
use crate::pass::{
    HostCounts, MAX_SAMPLES, Progress, Report, Settings, check_outcome, patience, script_header,
    ticks,
};
use crate::plan::SPIN_US;
use anyhow::{Context, Result, anyhow, ensure};
use pvkit_host::emulated::e1000::E1000Options;
use pvkit_host::link::Link;
use pvkit_host::link::tap::Tap;
use pvkit_host::memory::GuestMemory;
use pvkit_host::virtio::net::{Net, NetOptions};
use pvkit_host::vmm::Vm;
use pvkit_protocol::frame::{MacAddress, Offloads};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::NetFeatures;
use pvkit_workload::net::job::{NetJob, NetWork};
use pvkit_workload::net::report::NetReport;
use pvkit_workload::pattern;
use pvkit_workload::report::{net_reports_offset, samples_offset};
use pvkit_workload::script::Completion;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::{FromZeros, IntoBytes};

/// Descriptors of each queue, or as many as the device has.
const QUEUE_SIZE: u16 = 1024;
/// Frames that are shown to the device at once.
const BURST: u32 = 256;
/// Frames in each direction that are compared byte by byte.
const VERIFY: u32 = 64;

/// How long two guests may exchange frames.
const PATIENCE: Duration = Duration::from_secs(120);

/// A row that is to be measured in a pass.
#[derive(Debug, Clone, Copy)]
pub struct NetTask {
    /// Its index in the plan.
    pub index: usize,
    /// What it is.
    pub row: NetRow,
    /// The number of this measurement, for the data that is sent.
    pub round: u32,
    /// Streams are hashed at both ends, besides being compared.
    pub hash: bool,
}

/// What a pass brought for one row.
#[derive(Debug, Clone)]
pub struct NetMeasurement {
    /// Its index in the plan.
    pub index: usize,
    /// What the guest reports.
    pub report: NetReport,
    /// Time of each round trip, in ticks.
    pub latencies: Vec<u64>,
    /// What the host counted meanwhile, if it can.
    pub host: Option<HostCounts>,
}

/// A card in a machine; rows that have it in common use the same one.
type Socket = (Card, WireKind, Option<u32>);

fn socket(row: &NetRow) -> Socket {
    (row.card, row.wire, row.spin_us)
}

/// All cards that the tasks need.
fn sockets(tasks: &[NetTask]) -> Vec<Socket> {
    let mut sockets = Vec::new();
    for task in tasks {
        let socket = socket(&task.row);
        if !sockets.contains(&socket) {
            sockets.push(socket);
        }
    }
    sockets
}

/// Which one of its kind a row's card is.
fn index_of(sockets: &[Socket], row: &NetRow) -> usize {
    let own = socket(row);
    let same_kind = sockets.iter().filter(|(card, ..)| *card == row.card);
    same_kind.take_while(|socket| **socket != own).count()
}

/// All bits by which work is left to the other side.
fn offload_features() -> Features {
    let all = Offloads::all();
    let both = NetFeatures::of_transmit_offloads(all) | NetFeatures::of_receive_offloads(all);
    Features::from(both)
}

fn job(task: &NetTask, index: usize, settings: &Settings, samples: u64) -> NetJob {
    let row = &task.row;
    let mut job = NetJob::new_zeroed();
    job.device = row.card.script_device().code();
    job.index.set(index as u32);
    job.work = row.work.code();
    job.completion = row.completion.code();
    job.frame_bytes.set(row.frame_bytes);
    job.burst.set(BURST);
    job.rate.set(row.rate);
    job.verify.set(VERIFY);
    job.stream_bytes.set(u64::from(row.stream_mib) << 20);
    job.duration_ticks.set(ticks(settings, settings.duration));
    let us = u32::try_from(settings.duration.as_micros());
    job.duration_us.set(us.unwrap_or(u32::MAX));
    job.ticks_per_ms.set(settings.tsc_khz);
    job.max_samples
        .set(u32::try_from(samples).unwrap_or(u32::MAX));
    job.seed.set(pattern::mix(u64::from(task.round)) as u32);
    let mut allow = settings.allow;
    if !row.offloads {
        allow -= offload_features();
    }
    // One ring format: split is what all monitors have.
    allow.remove(Features::RING_PACKED);
    job.allow_features.set(allow.bits());
    job.queue_size.set(QUEUE_SIZE);
    job.moderation = u8::from(row.moderation);
    // QEMU gathers writes to most registers of its e1000; an interrupt, which
    // reads one, has them arrive, and a driver that polls has none.
    let polled = row.completion == Completion::Polled;
    job.read_back = u8::from(row.vmm.is_qemu() && polled);
    job.hash = u8::from(task.hash);
    job
}

fn script(tasks: &[NetTask], settings: &Settings) -> Vec<u8> {
    let sockets = sockets(tasks);
    let mut script = script_header(0, tasks.len()).as_bytes().to_vec();
    let samples = (MAX_SAMPLES / (tasks.len() as u64 + 1)).max(1000);
    for task in tasks {
        let index = index_of(&sockets, &task.row);
        script.extend_from_slice(job(task, index, settings, samples).as_bytes());
    }
    script
}

/// Takes the report out of a guest's memory.
fn read_report(memory: &GuestMemory, tasks: &[NetTask]) -> Result<Vec<NetMeasurement>> {
    let source = Report::open(memory)?;
    let samples = samples_offset(0, tasks.len());
    let mut measurements = Vec::new();
    for (number, task) in tasks.iter().enumerate() {
        let name = || task.row.to_string();
        let at = net_reports_offset(0) + number * size_of::<NetReport>();
        let report: NetReport = source.read(at)?;
        check_outcome(&report.job).with_context(name)?;
        ensure!(
            report.job.requests.get() > 0,
            "{}: no frame arrived",
            task.row
        );
        let latencies = source.latencies(&report.job, samples).with_context(name)?;
        measurements.push(NetMeasurement {
            index: task.index,
            report,
            latencies,
            host: None,
        });
    }
    Ok(measurements)
}

fn pass<'a>(
    image: &'a Path,
    script: &'a [u8],
    tasks: &[NetTask],
    settings: &Settings,
    progress: Progress<'a>,
) -> Pass<'a> {
    Pass {
        image,
        script,
        names: tasks.iter().map(|task| task.row.to_string()).collect(),
        patience: patience(tasks.len(), settings),
        progress,
    }
}

/// Runs the tasks in pvkit's own monitor.
///
/// # Errors
/// If the machine or a wire cannot be made, the guest fails or hangs, or data
/// is wrong.
pub fn run(
    image: &Path,
    tasks: &[NetTask],
    settings: &Settings,
    progress: Progress<'_>,
) -> Result<Vec<NetMeasurement>> {
    let script = script(tasks, settings);
    let pass = pass(image, &script, tasks, settings, progress);
    let mut wires = Vec::new();
    let ran = kvm::run_machine(&pass, |vm| {
        for (card, wire, spin_us) in sockets(tasks) {
            let link: Arc<dyn Link> = match wire {
                WireKind::InProcess => Arc::new(InProcess::default()),
                WireKind::Tap => {
                    let mut wire = TapWire::new()?;
                    let tap = Tap::from_fd(wire.take()?)?;
                    wires.push(wire);
                    Arc::new(tap)
                }
            };
            let mac = MacAddress::local(1);
            add_card(vm, card, link, mac, spin_us.unwrap_or(0), settings)?;
        }
        Ok(())
    });
    drop(wires);
    let ran = ran?;
    let mut measurements = read_report(&ran.memory, tasks).context("pvkit")?;
    for (measurement, host) in measurements.iter_mut().zip(ran.host) {
        measurement.host = host;
    }
    Ok(measurements)
}

fn add_card(
    vm: &mut Vm,
    card: Card,
    link: Arc<dyn Link>,
    mac: MacAddress,
    spin_us: u32,
    settings: &Settings,
) -> Result<()> {
    let threads = threads_spinning(spin_us);
    let options = NetOptions {
        mac,
        queue_size: QUEUE_SIZE,
        ..NetOptions::default()
    };
    match card {
        Card::VirtioNet => {
            let device = Net::new(link, options)?;
            vm.add_virtio_mmio(Box::new(device), threads)?;
        }
        Card::VirtioNetPci => {
            let device = Net::new(link, options)?;
            vm.add_virtio_pci(Box::new(device), threads, pci_options(settings))?;
        }
        Card::E1000 => {
            vm.add_e1000(link, &E1000Options::new(mac), threads)?;
        }
    }
    Ok(())
}

/// Two guests that exchange frames, each in a machine of its own.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    /// The card of both.
    pub card: Card,
    /// Bytes of a frame.
    pub frame_bytes: u32,
    /// Frames that the first and the second one send.
    pub frames: [u64; 2],
    /// Most of them on their way; 0 for no bound.
    pub window: u32,
}

/// Runs both guests until they are done; says what each reports.
///
/// # Errors
/// If a machine cannot be made, a guest fails or hangs, or data is wrong.
pub fn exchange(
    image: &Path,
    what: &Exchange,
    links: [Arc<dyn Link>; 2],
    settings: &Settings,
) -> Result<[NetReport; 2]> {
    let task = NetTask {
        index: 0,
        row: NetRow {
            frame_bytes: what.frame_bytes,
            wire: WireKind::InProcess,
            ..base_row(what.card, NetWork::Exchange)
        },
        round: 1,
        hash: false,
    };
    let run = |number: u32, link: Arc<dyn Link>, frames: u64| {
        let mut job = job(&task, 0, settings, 0);
        job.frames.set(frames);
        job.window.set(what.window);
        let mut script = script_header(0, 1).as_bytes().to_vec();
        script.extend_from_slice(job.as_bytes());
        let tasks = [task];
        let pass = Pass {
            patience: PATIENCE,
            ..pass(image, &script, &tasks, settings, &|_| {})
        };
        let mac = MacAddress::local(number);
        let spin = SPIN_US;
        let ran = kvm::run_machine(&pass, |vm| {
            add_card(vm, what.card, link, mac, spin, settings)
        })?;
        let source = Report::open(&ran.memory)?;
        let report: NetReport = source.read(net_reports_offset(0))?;
        check_outcome(&report.job).with_context(|| format!("guest {number}"))?;
        anyhow::Ok(report)
    };
    let [one, two] = links;
    let [first, second] = what.frames;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(2, two, second));
        let own = run(1, one, first);
        let other = other
            .join()
            .map_err(|_| anyhow!("the thread of a machine panicked"))?;
        Ok([own?, other?])
    })
}

/// Runs the tasks in QEMU, each card on a tap as ours is.
///
/// # Errors
/// If QEMU does not start, the guest fails or hangs, or data is wrong.
pub fn run_in_qemu(
    qemu: &Qemu,
    image: &Path,
    tasks: &[NetTask],
    settings: &Settings,
    progress: Progress<'_>,
) -> Result<Vec<NetMeasurement>> {
    let script = script(tasks, settings);
    let pass = pass(image, &script, tasks, settings, progress);
    let timer = tasks.iter().any(|task| task.row.vmm == NetVmm::QemuTimer);
    let mut wires = Vec::new();
    let mut cards = Vec::new();
    for (card, ..) in sockets(tasks) {
        let mut wire = TapWire::new()?;
        cards.push((card, inheritable(wire.take()?)?));
        wires.push(wire);
    }
    let (memory, said) = qemu::run_machine(qemu, &pass, |command| {
        for (number, (card, tap)) in cards.iter().enumerate() {
            add_to_qemu(command, number, *card, tap, timer);
        }
    })?;
    read_report(&memory, tasks).context(said)
}

/// A descriptor that programs inherit which this one starts.
fn inheritable(fd: OwnedFd) -> Result<OwnedFd> {
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
    Ok(fd)
}

fn add_to_qemu(command: &mut Command, number: usize, card: Card, tap: &OwnedFd, timer: bool) {
    let tap = tap.as_raw_fd();
    command.args(["-netdev", &format!("tap,id=net{number},fd={tap},vhost=off")]);
    let common = format!("netdev=net{number},mac=02:70:00:00:00:01,romfile=");
    command.args([
        "-device",
        &match card {
            Card::E1000 => format!("e1000,{common}"),
            Card::VirtioNet | Card::VirtioNetPci => {
                let tx = if timer { "timer" } else { "bh" };
                // The most that it has: a transmit queue on a tap is shorter.
                format!("virtio-net-pci,{common},disable-legacy=on,rx_queue_size=1024,tx={tx}")
            }
        },
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvkit_workload::script::parse;

    #[test]
    fn rows_share_cards_and_jobs_name_them() {
        let row = |card, wire, spin| NetRow {
            wire,
            spin_us: Some(spin),
            ..base_row(card, NetWork::Transmit)
        };
        let rows = [
            row(Card::E1000, WireKind::Tap, 50),
            row(Card::VirtioNet, WireKind::Tap, 50),
            row(Card::VirtioNet, WireKind::InProcess, 50),
            row(Card::VirtioNet, WireKind::Tap, 0),
            NetRow {
                offloads: false,
                ..row(Card::VirtioNet, WireKind::InProcess, 50)
            },
        ];
        let tasks: Vec<NetTask> = rows
            .into_iter()
            .enumerate()
            .map(|(index, row)| NetTask {
                index,
                row,
                round: 1,
                hash: false,
            })
            .collect();
        let settings = Settings::new(1_000_000, Duration::from_millis(10));
        let script = script(&tasks, &settings);
        let script = parse(&script).unwrap();
        let indices: Vec<u32> = script.net_jobs.iter().map(|job| job.index.get()).collect();
        assert_eq!(indices, [0, 0, 1, 2, 1]);
        let csum = NetFeatures::CSUM.bits();
        let with: Vec<bool> = script
            .net_jobs
            .iter()
            .map(|job| job.allow_features.get() & csum != 0)
            .collect();
        assert_eq!(with, [true, true, true, true, false]);
        assert_eq!(script.net_jobs[0].duration_ticks.get(), 10_000_000);
    }
}
