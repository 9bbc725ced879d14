//! What is measured: a case on a device in a monitor.

use pvkit_protocol::virtio::Features;
use pvkit_workload::script::{self, Access, Completion, Device};
use std::fmt;

/// The device that a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// virtio-blk over virtio-mmio.
    VirtioBlk,
    /// virtio-blk over virtio-pci; interrupts by MSI-X.
    VirtioBlkPci,
    /// PIIX3 IDE by bus-master DMA.
    IdeDma,
    /// PIIX3 IDE by programmed I/O.
    IdePio,
}

impl DeviceKind {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::VirtioBlk => "virtio-blk",
            Self::VirtioBlkPci => "virtio-blk-pci",
            Self::IdeDma => "ide-dma",
            Self::IdePio => "ide-pio",
        }
    }

    /// How it is attached.
    #[must_use]
    pub fn transport(self) -> &'static str {
        match self {
            Self::VirtioBlk => "virtio-mmio",
            Self::VirtioBlkPci => "virtio-pci",
            Self::IdeDma | Self::IdePio => "pci-ide",
        }
    }

    /// Whether it is paravirtual.
    #[must_use]
    pub fn is_virtio(self) -> bool {
        matches!(self, Self::VirtioBlk | Self::VirtioBlkPci)
    }

    /// The driver's most requests in flight.
    #[must_use]
    pub fn max_depth(self) -> u32 {
        match self {
            Self::VirtioBlk | Self::VirtioBlkPci => 256,
            Self::IdeDma | Self::IdePio => 1,
        }
    }

    /// As the script says it.
    #[must_use]
    pub fn script_device(self) -> Device {
        match self {
            Self::VirtioBlk => Device::VirtioMmio,
            Self::VirtioBlkPci => Device::VirtioPci,
            Self::IdeDma => Device::IdeDma,
            Self::IdePio => Device::IdePio,
        }
    }
}

/// The ring format that the driver negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ring {
    /// Split.
    Split,
    /// Packed.
    Packed,
}

impl Ring {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Packed => "packed",
        }
    }
}

/// The monitor that a row runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vmm {
    /// pvkit's own.
    Pvkit,
    /// QEMU as it comes: its main loop serves the device.
    Qemu,
    /// QEMU at its best: an I/O thread of its own that polls, and io_uring.
    QemuIothread,
}

impl Vmm {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pvkit => "pvkit",
            Self::Qemu => "qemu",
            Self::QemuIothread => "qemu-iothread",
        }
    }

    /// Whether it is QEMU, however set up.
    #[must_use]
    pub fn is_qemu(self) -> bool {
        self != Self::Pvkit
    }
}

/// The guest's driver of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Driver {
    /// Ours.
    PvkitGuest,
    /// The crate `virtio-drivers`, as it comes.
    VirtioDrivers,
    /// The same by somebody who knows it: without the event index, which it
    /// does not use well, and without indirect descriptors, which it allocates,
    /// as long as the requests fit its queue of 16 descriptors as they are.
    VirtioDriversTuned,
}

impl Driver {
    /// All of them.
    pub const ALL: [Self; 3] = [
        Self::PvkitGuest,
        Self::VirtioDrivers,
        Self::VirtioDriversTuned,
    ];

    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PvkitGuest => "pvkit-guest",
            Self::VirtioDrivers => "virtio-drivers",
            Self::VirtioDriversTuned => "virtio-drivers-tuned",
        }
    }

    /// As the script says it.
    #[must_use]
    pub fn script_driver(self) -> script::Driver {
        match self {
            Self::PvkitGuest => script::Driver::Pvkit,
            Self::VirtioDrivers | Self::VirtioDriversTuned => script::Driver::VirtioDrivers,
        }
    }

    /// The driver's most requests in flight.
    #[must_use]
    pub fn max_depth(self) -> u32 {
        match self {
            Self::PvkitGuest => u32::MAX,
            Self::VirtioDrivers | Self::VirtioDriversTuned => u32::from(pvkit_peer::SIZE),
        }
    }

    /// The features that it does without at this depth.
    #[must_use]
    pub fn hidden_features(self, depth: u32) -> Features {
        // Header, data and status.
        let fits = 3 * depth <= u32::from(pvkit_peer::SIZE);
        match self {
            Self::PvkitGuest | Self::VirtioDrivers => Features::empty(),
            Self::VirtioDriversTuned if fits => Features::EVENT_IDX | Features::INDIRECT_DESC,
            Self::VirtioDriversTuned => Features::EVENT_IDX,
        }
    }
}

/// When requests are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Loop {
    /// As soon as another one is done.
    Closed,
    /// At fixed moments, at half the rate that [`Plan::base`] reaches.
    ///
    /// [`Plan::base`]: crate::plan::Plan::base
    Open,
}

impl Loop {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
        }
    }
}

/// One line of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Row {
    /// What is done.
    pub access: Access,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight; for an open loop, the most.
    pub depth: u32,
    /// How the guest learns of completions.
    pub completion: Completion,
    /// When requests are started.
    pub looping: Loop,
    /// On which device.
    pub device: DeviceKind,
    /// The format of its ring, if it has one.
    pub ring: Ring,
    /// By which driver, if it is a virtio device.
    pub driver: Driver,
    /// In which monitor.
    pub vmm: Vmm,
    /// How long the device's worker polls before it sleeps, in microseconds.
    /// `None` if it has no worker of its own, or one that is not ours to set.
    pub spin_us: Option<u32>,
    /// How long a guest that completes by interrupt polls before it halts, in
    /// microseconds.
    pub guest_spin_us: u32,
}

/// Name of an access.
#[must_use]
pub fn access_name(access: Access) -> &'static str {
    match access {
        Access::RandomRead => "randread",
        Access::RandomWrite => "randwrite",
        Access::SequentialRead => "seqread",
        Access::SequentialWrite => "seqwrite",
    }
}

/// Name of a way to complete.
#[must_use]
pub fn completion_name(completion: Completion) -> &'static str {
    match completion {
        Completion::Polled => "polled",
        Completion::Interrupt => "interrupt",
    }
}

impl Row {
    /// The case: all but device, monitor and spinning.
    #[must_use]
    pub fn case(&self) -> String {
        let open = if self.looping == Loop::Open {
            "-open"
        } else {
            ""
        };
        let after = match self.guest_spin_us {
            0 => String::new(),
            spin => format!("-after-{spin}us"),
        };
        format!(
            "{}-{}k-qd{}-{}{after}{open}",
            access_name(self.access),
            self.block_bytes / 1024,
            self.depth,
            completion_name(self.completion),
        )
    }
}

impl Row {
    /// Name of the device, with its ring if that is not the usual one.
    #[must_use]
    pub fn device_name(&self) -> String {
        let name = self.device.name();
        match self.ring {
            Ring::Packed if self.device.is_virtio() => format!("{name}-packed"),
            _ => name.to_owned(),
        }
    }
}

impl fmt::Display for Row {
    /// The row's name, for lists and filters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}/{}",
            self.case(),
            self.device_name(),
            self.vmm.name()
        )?;
        match self.spin_us {
            None => Ok(()),
            Some(0) => write!(f, "/no-spin"),
            Some(spin) => write!(f, "/spin-{spin}us"),
        }?;
        match self.driver {
            Driver::PvkitGuest => Ok(()),
            other => write!(f, "/{}", other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_everything() {
        let row = Row {
            access: Access::RandomRead,
            block_bytes: 4096,
            depth: 32,
            completion: Completion::Polled,
            looping: Loop::Closed,
            device: DeviceKind::VirtioBlk,
            ring: Ring::Split,
            driver: Driver::PvkitGuest,
            vmm: Vmm::Pvkit,
            spin_us: Some(50),
            guest_spin_us: 0,
        };
        assert_eq!(
            row.to_string(),
            "randread-4k-qd32-polled/virtio-blk/pvkit/spin-50us"
        );
        let row = Row {
            looping: Loop::Open,
            ring: Ring::Packed,
            spin_us: Some(0),
            guest_spin_us: 20,
            ..row
        };
        assert_eq!(
            row.to_string(),
            "randread-4k-qd32-polled-after-20us-open/virtio-blk-packed/pvkit/no-spin"
        );
        for (driver, end) in [
            (Driver::VirtioDrivers, "/no-spin/virtio-drivers"),
            (Driver::VirtioDriversTuned, "/no-spin/virtio-drivers-tuned"),
        ] {
            let name = Row { driver, ..row }.to_string();
            assert!(name.ends_with(end), "{name}");
        }
    }
}
