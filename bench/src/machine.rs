//! The machine that is measured on.

use serde::Serialize;
use std::fs;
use std::path::Path;

/// What has to be known to understand the figures.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor's model.
    pub cpu: String,
    /// Number of processors.
    pub cpus: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The kind of KVM: `kvm_intel`, `kvm_amd`, `kvm_pvm`, or `none`.
    pub kvm: String,
    /// KVM works without the processor's virtualization: exits cost a few
    /// times more than with it.
    pub software_kvm: bool,
    /// Ticks of the time stamp counter in a millisecond; 0 if not known.
    pub tsc_khz: u32,
    /// The file system below the test file, by its magic number.
    pub file_system: String,
    /// The version of QEMU, if it is measured.
    pub qemu: Option<String>,
    /// The version of this program.
    pub pvkit: String,
}

impl Machine {
    /// Looks at this machine.
    #[must_use]
    pub fn look(directory: &Path, tsc_khz: u32) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            info.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
        };
        let flags = field("flags").unwrap_or_default();
        let hardware = flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
            .into_iter()
            .find(|name| Path::new("/sys/module").join(name).exists());
        let present = Path::new("/dev/kvm").exists();
        let kvm = match module {
            _ if !present => "none",
            Some(module) => module,
            None => "kvm",
        };
        Self {
            cpu: field("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            kvm: kvm.to_owned(),
            software_kvm: present && !hardware,
            tsc_khz,
            file_system: file_system(directory),
            qemu: None,
            pvkit: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The first lines of the output.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!(
            "{} CPUs {}, Linux {}, KVM: {}{}, test file on {}",
            self.cpus,
            self.cpu,
            self.kernel,
            self.kvm,
            if self.software_kvm { " (software)" } else { "" },
            self.file_system,
        );
        if self.software_kvm {
            text.push_str(
                "\nKVM works in software here: an exit costs 4 to 17 µs and guest interrupts are \
                 emulated,\nso ratios of time are larger than on hardware. Counts carry over.",
            );
        }
        text
    }
}

/// The name of the file system that a directory is on.
fn file_system(directory: &Path) -> String {
    let Ok(fs) = rustix::fs::statfs(directory) else {
        return "unknown".to_owned();
    };
    // linux/magic.h
    match fs.f_type as u64 {
        0xef53 => "ext4".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        other => format!("{other:#x}"),
    }
}
