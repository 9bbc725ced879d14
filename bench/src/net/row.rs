//! What is measured: some work on a network card in a monitor.

use pvkit_workload::net::job::{NetDevice, NetWork};
use pvkit_workload::script::Completion;
use std::fmt;

/// A network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Card {
    /// virtio-net over virtio-mmio.
    VirtioNet,
    /// virtio-net over virtio-pci; interrupts by MSI-X.
    VirtioNetPci,
    /// An 82540EM; interrupts by a pin.
    E1000,
}

impl Card {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net",
            Self::VirtioNetPci => "virtio-net-pci",
            Self::E1000 => "e1000",
        }
    }

    /// How it is attached.
    #[must_use]
    pub fn transport(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-mmio",
            Self::VirtioNetPci => "virtio-pci",
            Self::E1000 => "pci",
        }
    }

    /// Whether it is paravirtual.
    #[must_use]
    pub fn is_virtio(self) -> bool {
        self != Self::E1000
    }

    /// As the script says it.
    #[must_use]
    pub fn script_device(self) -> NetDevice {
        match self {
            Self::VirtioNet => NetDevice::VirtioMmio,
            Self::VirtioNetPci => NetDevice::VirtioPci,
            Self::E1000 => NetDevice::E1000,
        }
    }
}

/// The monitor that a row runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NetVmm {
    /// pvkit's own.
    Pvkit,
    /// QEMU as it comes: a batch of frames is sent by its main loop, soon.
    Qemu,
    /// QEMU with `tx=timer`: a batch is sent when a timer ends, or the queue
    /// is full.
    QemuTimer,
}

impl NetVmm {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pvkit => "pvkit",
            Self::Qemu => "qemu",
            Self::QemuTimer => "qemu-tx-timer",
        }
    }

    /// Whether it is QEMU, however set up.
    #[must_use]
    pub fn is_qemu(self) -> bool {
        self != Self::Pvkit
    }
}

/// What the host is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireKind {
    /// A tap in a network namespace of its own.
    Tap,
    /// A link that answers in the device's thread.
    InProcess,
}

impl WireKind {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::InProcess => "in-process",
        }
    }
}

/// Bytes of the TCP streams of quick runs.
pub const STREAM_MIB: u32 = 16;

/// One line of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetRow {
    /// What is done.
    pub work: NetWork,
    /// Bytes of a frame, without check sequence.
    pub frame_bytes: u32,
    /// Frames a second that the peer sends; 0 for as many as it can.
    pub rate: u32,
    /// Mebibytes of a TCP stream.
    pub stream_mib: u32,
    /// How the guest learns of frames.
    pub completion: Completion,
    /// On which card.
    pub card: Card,
    /// Checksums and segmentation are left to the card, and to the guest, as
    /// far as they are agreed on.
    pub offloads: bool,
    /// An e1000 holds its interrupts back.
    pub moderation: bool,
    /// In which monitor.
    pub vmm: NetVmm,
    /// On which wire.
    pub wire: WireKind,
    /// How long the device's worker polls before it sleeps, in microseconds;
    /// `None` if that is not ours to set.
    pub spin_us: Option<u32>,
}

/// Name of a way that frames go.
#[must_use]
pub fn direction_name(work: NetWork) -> &'static str {
    match work {
        NetWork::Transmit => "transmit",
        NetWork::Receive => "receive",
        NetWork::RoundTrip => "round-trip",
        NetWork::TcpReceive => "tcp-receive",
        NetWork::TcpSend => "tcp-send",
        NetWork::Exchange => "exchange",
    }
}

impl NetRow {
    /// Whether it is a TCP stream.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        matches!(self.work, NetWork::TcpReceive | NetWork::TcpSend)
    }

    /// Whether moderation makes a difference.
    #[must_use]
    pub fn is_moderable(&self) -> bool {
        self.card == Card::E1000 && self.completion == Completion::Interrupt
    }

    /// The case: all but card, monitor and spinning.
    #[must_use]
    pub fn case(&self) -> String {
        let mut case = direction_name(self.work).to_owned();
        if self.is_stream() {
            case.push_str(&format!("-{}m", self.stream_mib));
        } else {
            case.push_str(&format!("-{}", self.frame_bytes));
        }
        if self.rate > 0 {
            case.push_str(&format!("-{}k/s", self.rate / 1000));
        }
        case.push_str(match self.completion {
            Completion::Polled => "-polled",
            Completion::Interrupt => "-interrupt",
        });
        case
    }

    /// Name of the card, with how it is used.
    #[must_use]
    pub fn card_name(&self) -> String {
        let mut name = self.card.name().to_owned();
        if !self.offloads {
            name.push_str("-no-offloads");
        }
        if self.is_moderable() {
            name.push_str(if self.moderation {
                "-moderated"
            } else {
                "-unmoderated"
            });
        }
        name
    }
}

impl fmt::Display for NetRow {
    /// The row's name, for lists and filters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (case, card) = (self.case(), self.card_name());
        write!(f, "{case}/{card}/{}", self.vmm.name())?;
        match self.spin_us {
            None => Ok(()),
            Some(0) => write!(f, "/no-spin"),
            Some(spin) => write!(f, "/spin-{spin}us"),
        }?;
        match self.wire {
            WireKind::Tap => Ok(()),
            wire => write!(f, "/{}", wire.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_everything() {
        let row = NetRow {
            work: NetWork::Receive,
            frame_bytes: 64,
            rate: 100_000,
            stream_mib: 0,
            completion: Completion::Interrupt,
            card: Card::E1000,
            offloads: true,
            moderation: false,
            vmm: NetVmm::Pvkit,
            wire: WireKind::Tap,
            spin_us: Some(0),
        };
        assert_eq!(
            row.to_string(),
            "receive-64-100k/s-interrupt/e1000-unmoderated/pvkit/no-spin"
        );
        let row = NetRow {
            work: NetWork::TcpSend,
            stream_mib: 16,
            rate: 0,
            completion: Completion::Polled,
            card: Card::VirtioNetPci,
            offloads: false,
            vmm: NetVmm::QemuTimer,
            wire: WireKind::InProcess,
            spin_us: None,
            ..row
        };
        assert_eq!(
            row.to_string(),
            "tcp-send-16m-polled/virtio-net-pci-no-offloads/qemu-tx-timer/in-process"
        );
    }
}
