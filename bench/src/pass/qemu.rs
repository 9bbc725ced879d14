//! A pass in QEMU, with the same guest image on the same file.

use super::kvm::Pass;
use super::{MEMORY_BYTES, Measurement, Progress, Settings, Task};
use super::{patience, read_report, script};
use crate::scratch::Scratch;
use anyhow::{Context, Result, bail, ensure};
use pvkit_host::memory::GuestMemory;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// The program.
const QEMU: &str = "qemu-system-x86_64";
/// A firmware that starts PVH images at once.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";

/// A QEMU that can be used.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// What it says of its version.
    pub version: String,
    firmware: PathBuf,
    /// KVM is in software, and lacks a register that QEMU asks for.
    software_kvm: bool,
    /// The device is served by a thread of its own, which polls, with
    /// io_uring.
    iothread: bool,
}

impl Qemu {
    /// Whether its virtio-blk can use requests in their order (since 10.0).
    #[must_use]
    pub fn has_in_order(&self) -> bool {
        let help = Command::new(QEMU)
            .args(["-device", "virtio-blk-pci,help"])
            .output();
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains(" in_order="))
    }

    /// The same at its best (`iothread`), or as it comes.
    #[must_use]
    pub fn set_up(&self, iothread: bool) -> Self {
        Self {
            iothread,
            ..self.clone()
        }
    }
}

/// Looks for QEMU.
///
/// # Errors
/// Says what to install.
pub fn find(software_kvm: bool) -> Result<Qemu> {
    let output = Command::new(QEMU)
        .arg("--version")
        .output()
        .ok()
        .filter(|output| output.status.success())
        .with_context(|| {
            format!("{QEMU} is not installed (Debian: apt install qemu-system-x86)")
        })?;
    let version = String::from_utf8_lossy(&output.stdout);
    let version = version.lines().next().unwrap_or("QEMU").to_owned();
    let firmware = PathBuf::from(FIRMWARE);
    ensure!(
        firmware.exists(),
        "{FIRMWARE} is missing (Debian: apt install qemu-system-data)"
    );
    Ok(Qemu {
        version,
        firmware,
        software_kvm,
        iothread: false,
    })
}

/// Kills the process if it still runs when this is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the tasks in QEMU.
///
/// # Errors
/// If QEMU does not start, the guest fails or hangs, or data is wrong.
pub fn run(
    qemu: &Qemu,
    image: &Path,
    disk: &Path,
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
    let (memory, said) = run_machine(qemu, &pass, |command| {
        add_disks(command, qemu, disk, settings);
    })?;
    read_report(&memory, tasks).context(said)
}

/// Runs a script in QEMU with the devices that `devices` adds to its command
/// line. Returns the guest's memory, and what QEMU said.
pub(crate) fn run_machine(
    qemu: &Qemu,
    pass: &Pass<'_>,
    devices: impl FnOnce(&mut Command),
) -> Result<(GuestMemory, String)> {
    let Pass {
        patience, progress, ..
    } = *pass;
    let module = Scratch::with(pass.script).context("the script")?;
    // The guest's memory, for the report. In memory, if there is such a place.
    let shm = Path::new("/dev/shm");
    let directory = if shm.is_dir() {
        shm.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    let ram = Scratch::new(&directory).context("the guest's memory")?;
    ram.file().set_len(MEMORY_BYTES)?;

    let mut command = command(qemu, pass.image, module.path(), ram.path());
    devices(&mut command);
    let mut child = Guard(command.spawn()?);
    // It may have descriptors that nobody else is to keep.
    drop(command);
    let stdout = child.0.stdout.take().context("no output")?;
    let stderr = child.0.stderr.take().context("no errors")?;
    let over = AtomicBool::new(false);
    let (status, console, errors) = thread::scope(|scope| {
        let console = scope.spawn(|| {
            let mut text = String::new();
            let mut done = 0;
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.trim_end().ends_with("done") && line.starts_with("job ") {
                    done += 1;
                    progress(done);
                } else if text.len() < 64 * 1024 {
                    text.push_str(&line);
                    text.push('\n');
                }
            }
            text
        });
        let errors = scope.spawn(|| {
            let mut text = String::new();
            let _ = stderr.take(64 * 1024).read_to_string(&mut text);
            text
        });
        let status = wait(&mut child.0, patience);
        if status.is_err() {
            // Ends the readers above.
            let _ = child.0.kill();
        }
        over.store(true, Ordering::Relaxed);
        (
            status,
            console.join().unwrap_or_default(),
            errors.join().unwrap_or_default(),
        )
    });
    let said = format!("QEMU\n{console}{errors}").trim_end().to_owned();
    // The guest's code c ends QEMU with 2c + 1. But 1 is also how QEMU itself
    // fails: then there is no report.
    let status = status.with_context(|| said.clone())?;
    if status != Some(1) {
        bail!("{said}\nit ended with {status:?}");
    }
    let map = GuestMemoryMmap::<()>::from_ranges_with_files([(
        GuestAddress(0),
        MEMORY_BYTES as usize,
        Some(FileOffset::new(ram.file().try_clone()?, 0)),
    )]);
    let memory = GuestMemory::new(Arc::new(map.context("the guest's memory")?))?;
    Ok((memory, said))
}

/// QEMU without devices.
fn command(qemu: &Qemu, image: &Path, module: &Path, ram: &Path) -> Command {
    let mut command = Command::new(QEMU);
    let cpu = if qemu.software_kvm {
        "host,arch-capabilities=off"
    } else {
        "host"
    };
    command
        .args(["-accel", "kvm", "-cpu", cpu])
        .args(["-m", &format!("{}M", MEMORY_BYTES >> 20)])
        .args(["-machine", "pc,memory-backend=ram"])
        .args([
            "-object",
            &format!(
                "memory-backend-file,id=ram,size={MEMORY_BYTES},share=on,mem-path={}",
                option_path(ram)
            ),
        ])
        .args(["-bios", &option_path(&qemu.firmware)])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-kernel", &image.display().to_string()])
        .args(["-initrd", &module.display().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A path inside an option.
fn option_path(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn add_disks(command: &mut Command, qemu: &Qemu, disk: &Path, settings: &Settings) {
    let mut virtio = "virtio-blk-pci,drive=disk,share-rw=on,disable-legacy=on,packed=on".to_owned();
    if settings.in_order {
        virtio.push_str(",in_order=on");
    }
    if let Some(vectors) = settings.vectors {
        virtio.push_str(&format!(",vectors={vectors}"));
    }
    let mut node = String::new();
    if qemu.iothread {
        virtio.push_str(",iothread=io");
        node.push_str(",file.aio=io_uring");
    }
    // One file behind two devices, of which one at a time is used.
    command.args([
        "-blockdev",
        &format!(
            "driver=raw,node-name=disk,file.driver=file,file.filename={}{node}",
            option_path(disk)
        ),
    ]);
    if qemu.iothread {
        command.args(["-object", "iothread,id=io"]);
    } else {
        // IDE cannot share the disk with another thread.
        command.args(["-device", "ide-hd,drive=disk,bus=ide.0,share-rw=on"]);
    }
    command.args(["-device", &virtio]);
}

/// Waits for the process; says its exit code.
fn wait(child: &mut Child, patience: Duration) -> Result<Option<i32>> {
    let end = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        ensure!(
            Instant::now() < end,
            "the guest hung for {} s",
            patience.as_secs()
        );
        thread::sleep(Duration::from_millis(5));
    }
}
