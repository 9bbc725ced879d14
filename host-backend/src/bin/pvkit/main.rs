//! The `pvkit` program: runs a virtual machine.
#![forbid(unsafe_code)]

mod disk;
mod net;
mod options;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use disk::{Bus, DiskArg};
use net::NetArg;
use pvkit_host::disk::{Disk, FileDisk};
use pvkit_host::emulated::ata::DriveOptions;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::one_line;
use pvkit_host::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_host::vmm::{ExitCounts, Stop, Vm, VmOptions};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::signal::register_signal_handler;

#[derive(Debug, Parser)]
#[command(version, about = "Paravirtual devices for virtual machines")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a virtual machine until it stops.
    ///
    /// The exit code is what the guest writes to port 0xf4, 0 if it switches
    /// itself off, and 1 if anything goes wrong.
    Run(Run),
}

#[derive(Debug, Args)]
struct Run {
    /// Uncompressed ELF image with a PVH entry.
    #[arg(long, value_name = "IMAGE")]
    kernel: PathBuf,
    /// Command line of the image. Where the devices are is added to it.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// File to hand over as the first module (initial RAM disk).
    #[arg(long, value_name = "FILE")]
    module: Option<PathBuf>,
    /// Disk: a raw file or block device, with options behind commas (a comma
    /// in the path is written twice). `ro`: read-only. `direct`: bypass the
    /// page cache. `id=TEXT`: serial number, up to 20 bytes. What
    /// the guest sees: `bus=virtio-mmio` (the default, also called `virtio`),
    /// `bus=virtio-pci` or `bus=ide`; there can be two on IDE. `queues=COUNT`
    /// (virtio only): request queues, each with a thread of its own; 1 unless
    /// said otherwise.
    #[arg(
        long,
        value_name = "PATH[,ro][,direct][,id=TEXT][,bus=BUS][,queues=COUNT]"
    )]
    disk: Vec<DiskArg>,
    /// Network card, and what it is plugged into: `tap=NAME` (a tap interface,
    /// which is made if it is not there), `fd=NUMBER` (one that is open
    /// already), `connect=PATH` or `listen=PATH` (a Unix stream, as QEMU's
    /// `-netdev stream` speaks it). What the guest sees: `bus=virtio-mmio` (the
    /// default), `bus=virtio-pci` or `bus=e1000` (an Intel 82540EM).
    /// `mac=ADDRESS`: its address, unless it is to follow from what it is
    /// plugged into. `queues=COUNT` (virtio and tap=NAME only): pairs of
    /// queues, each with a thread of its own. `offload=off` (virtio only):
    /// leave neither checksums nor segmentation to the other side.
    #[arg(
        long,
        value_name = "WIRE[,bus=BUS][,mac=ADDRESS][,queues=COUNT][,offload=off]"
    )]
    net: Vec<NetArg>,
    /// Memory, in bytes or with KiB, MiB, GiB.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: Size,
    /// Virtual CPUs.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    cpus: u8,
    /// How long a device polls for more work before it sleeps, in
    /// microseconds.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    spin_us: u64,
    /// Stop the machine after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// When the machine has stopped, say on standard error how often it left
    /// for user space, and what memory it took besides the guest's.
    #[arg(long)]
    stats: bool,
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no size: write bytes, or a number with KiB, MiB or GiB");
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(bad()),
        };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let Command::Run(run) = Cli::parse().command;
    match start(&run) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pvkit: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Reads a file; of one that is larger than the guest's memory, just enough to
/// show that it does not fit. It may be a pipe, or a device without an end.
fn read_module(path: &Path, memory: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path)?;
    file.take(memory.saturating_add(1))
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn print_stats(exits: &ExitCounts, own_bytes: Option<u64>) {
    let by_reason = exits.by_reason();
    let counts: Vec<String> = by_reason
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    eprintln!("exits: {} ({})", exits.total(), counts.join(", "));
    match own_bytes {
        Some(bytes) => {
            let mib = bytes as f64 / f64::from(1 << 20);
            eprintln!("memory besides the guest's: {mib:.1} MiB resident");
        }
        None => eprintln!("memory besides the guest's: /proc/self/smaps cannot be read"),
    }
}

/// The limit of file sizes (`ulimit -f`) sends a signal that ends the program;
/// handled, the write fails, and so the guest's request.
extern "C" fn on_size_limit(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
}

fn start(run: &Run) -> Result<ExitCode> {
    register_signal_handler(libc::SIGXFSZ, on_size_limit)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    let on_ide: Vec<_> = run.disk.iter().filter(|arg| arg.bus == Bus::Ide).collect();
    if let Some(third) = on_ide.get(2) {
        bail!(
            "disk {}: the IDE controller has room for 2 disks; leave out its bus=ide",
            third.path.display()
        );
    }
    // Files first: they are what is most often wrong.
    let mut disks = Vec::new();
    for arg in &run.disk {
        disks.push((FileDisk::open(&arg.path, arg.file)?, arg));
    }
    let mut links = Vec::new();
    for arg in &run.net {
        let link = arg.open().with_context(|| format!("net {}", arg.wire))?;
        links.push((link, arg));
    }
    let module = match &run.module {
        Some(path) => {
            let read = read_module(path, run.memory.0);
            Some(read.with_context(|| format!("module {}", path.display()))?)
        }
        None => None,
    };
    let mut vm = Vm::new(VmOptions {
        memory_bytes: run.memory.0,
        vcpus: run.cpus,
    })?;
    // Not `Stdout`: a full pipe must not keep the machine from stopping.
    let console = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    vm.add_serial(Box::new(console))?;
    let threads = ThreadOptions {
        spin: Duration::from_micros(run.spin_us),
        ..ThreadOptions::default()
    };
    let mut drives = Vec::new();
    for (index, (disk, arg)) in disks.into_iter().enumerate() {
        let id = arg.id.clone().unwrap_or_else(|| format!("pvkit-{index}"));
        let shape = disk.shape();
        log::info!("disk {}: {} sectors", arg.path.display(), shape.sectors);
        let disk: Arc<dyn Disk> = Arc::new(disk);
        match arg.bus {
            Bus::VirtioMmio | Bus::VirtioPci => {
                let options = BlockOptions {
                    queues: arg.queues.unwrap_or(1),
                    id,
                    ..BlockOptions::default()
                };
                let device = Box::new(Block::new(disk, options)?);
                if arg.bus == Bus::VirtioPci {
                    vm.add_virtio_pci(device, threads, PciOptions::default())?;
                } else {
                    vm.add_virtio_mmio(device, threads)?;
                }
            }
            Bus::Ide => drives.push(DriveOptions {
                serial: id,
                ..DriveOptions::new(disk)
            }),
        }
    }
    if !drives.is_empty() {
        let mut drives = drives.into_iter();
        vm.add_ide([drives.next(), drives.next()])?;
    }
    for (index, (link, arg)) in links.into_iter().enumerate() {
        let mac = arg.mac(index);
        log::info!("net {}: address {mac}", arg.wire);
        arg.attach(&mut vm, link, mac, threads)?;
    }
    vm.load(&run.kernel, &run.cmdline, module.as_deref())?;
    if let Some(seconds) = run.timeout {
        let stopper = vm.stopper();
        std::thread::Builder::new()
            .name("pvkit-timeout".to_owned())
            .spawn(move || {
                std::thread::sleep(Duration::from_secs(seconds));
                stopper.stop();
            })?;
    }
    let stats = run.stats.then(|| (vm.exits(), vm.footprint()));
    let stop = vm.run()?;
    if let Some((exits, footprint)) = stats {
        print_stats(&exits.read(), footprint.at_stop());
    }
    match stop {
        Stop::DebugExit(code) => Ok(ExitCode::from(code)),
        Stop::PowerOff | Stop::Reset => Ok(ExitCode::SUCCESS),
        Stop::Requested => match run.timeout {
            Some(seconds) => bail!("the guest still ran after {seconds} s (--timeout)"),
            None => bail!("the machine was stopped"),
        },
        stop => bail!("{stop}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("16KiB", 16 << 10),
            ("256MiB", 256 << 20),
            ("256m", 256 << 20),
            ("1 GiB", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "MiB",
            "-1",
            "1.5G",
            "12XB",
            "99999999999G",
            "18446744073709551616",
        ] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
