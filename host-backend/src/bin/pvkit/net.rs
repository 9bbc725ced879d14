//! `--net`: a network card and its options.
#![forbid(unsafe_code)]

use crate::options::split_at_commas;
use anyhow::{Context, Result};
use pvkit_host::emulated::e1000::E1000Options;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::link::Link;
use pvkit_host::link::stream::{Stream, StreamOptions};
use pvkit_host::link::tap::{Tap, TapOptions};
use pvkit_host::virtio::net::{Net, NetOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_host::vmm::Vm;
use pvkit_protocol::frame::{MacAddress, Offloads};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::fmt;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Most pairs of queues that may be asked for.
pub(crate) const MAX_PAIRS: u16 = 16;

/// A network card and what it is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetArg {
    pub(crate) wire: Wire,
    pub(crate) bus: Bus,
    pub(crate) mac: Option<MacAddress>,
    /// Pairs of queues.
    pub(crate) queues: Option<u16>,
    /// Leave no work on frames to the other side, either way.
    pub(crate) offload: bool,
    /// As it was written, for messages.
    text: String,
}

/// What a card is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wire {
    /// A tap interface of that name.
    Tap(String),
    /// A tap interface that somebody else opened.
    Fd(RawFd),
    /// A Unix stream on which somebody listens.
    Connect(PathBuf),
    /// A Unix stream on which to listen.
    Listen(PathBuf),
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::Fd(fd) => write!(f, "fd={fd}"),
            Self::Connect(path) => write!(f, "connect={}", path.display()),
            Self::Listen(path) => write!(f, "listen={}", path.display()),
        }
    }
}

/// How the guest reaches a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    /// virtio-net over virtio-mmio.
    VirtioMmio,
    /// virtio-net over virtio-pci.
    VirtioPci,
    /// An Intel 82540EM.
    E1000,
}

/// Longest name of an interface: `IFNAMSIZ` of the kernel, without the zero.
const MAX_NAME: usize = 15;

fn wire(text: &str) -> Result<Wire, String> {
    let missing = || {
        "say what the card is plugged into: tap=NAME, fd=NUMBER, connect=PATH or listen=PATH"
            .to_owned()
    };
    let (kind, place) = text.split_once('=').ok_or_else(missing)?;
    let path = |what: &str| {
        if place.is_empty() {
            Err(format!("{what}= needs the path of a Unix socket"))
        } else {
            Ok(PathBuf::from(place))
        }
    };
    match kind {
        "tap" if place.is_empty() || place.len() > MAX_NAME => Err(format!(
            "{place:?} is no name of an interface: 1 to {MAX_NAME} bytes are possible"
        )),
        "tap" => Ok(Wire::Tap(place.to_owned())),
        "fd" => match place.parse() {
            Ok(fd) if fd > 2 => Ok(Wire::Fd(fd)),
            _ => Err(format!(
                "{place:?} is no file descriptor of a tap interface: a number above 2 is"
            )),
        },
        "connect" => Ok(Wire::Connect(path("connect")?)),
        "listen" => Ok(Wire::Listen(path("listen")?)),
        _ => Err(missing()),
    }
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split_at_commas(text).into_iter();
        let mut net = Self {
            wire: wire(&parts.next().unwrap_or_default())?,
            bus: Bus::VirtioMmio,
            mac: None,
            queues: None,
            offload: true,
            text: text.to_owned(),
        };
        for option in parts {
            match option.split_once('=') {
                Some(("bus", "virtio" | "virtio-mmio")) => net.bus = Bus::VirtioMmio,
                Some(("bus", "virtio-pci")) => net.bus = Bus::VirtioPci,
                Some(("bus", "e1000")) => net.bus = Bus::E1000,
                Some(("bus", bus)) => {
                    return Err(format!(
                        "there is no bus {bus:?}: virtio-mmio, virtio-pci and e1000 are"
                    ));
                }
                Some(("mac", mac)) => {
                    let address: MacAddress =
                        mac.parse().map_err(|error| format!("{mac:?}: {error}"))?;
                    if !address.is_unicast() {
                        return Err(format!(
                            "{mac} is the address of a group, or of nobody: the first byte of a \
                             card's address is even, and not all are 0"
                        ));
                    }
                    net.mac = Some(address);
                }
                Some(("queues", count)) => {
                    let number = count.parse().ok();
                    let possible = number.filter(|n| (1..=MAX_PAIRS).contains(n));
                    net.queues = Some(possible.ok_or_else(|| {
                        format!("{count:?} is no number of queue pairs: 1 to {MAX_PAIRS} are")
                    })?);
                }
                Some(("offload", "on")) => net.offload = true,
                Some(("offload", "off")) => net.offload = false,
                Some(("offload", value)) => {
                    return Err(format!("offload={value}: on and off are possible"));
                }
                _ => {
                    return Err(format!(
                        "{option:?} is no option: bus=BUS, mac=ADDRESS, queues=COUNT and \
                         offload=off are (a comma in a path is written twice)"
                    ));
                }
            }
        }
        let pairs = net.queues.unwrap_or(1);
        if net.bus == Bus::E1000 && pairs > 1 {
            return Err(
                "an e1000 has one pair of queues: leave out queues=COUNT or bus=e1000".to_owned(),
            );
        }
        if net.bus == Bus::E1000 && !net.offload {
            return Err(
                "an e1000 has its offloads: its driver decides about them; leave out offload=off"
                    .to_owned(),
            );
        }
        if pairs > 1 && !matches!(net.wire, Wire::Tap(_)) {
            return Err(format!(
                "queues={pairs}: only a tap interface that is opened by its name has several"
            ));
        }
        Ok(net)
    }
}

impl NetArg {
    /// Opens what the card is plugged into.
    pub(crate) fn open(&self) -> Result<Arc<dyn Link>> {
        Ok(match &self.wire {
            Wire::Tap(name) => {
                let lanes = self.queues.unwrap_or(1);
                Arc::new(Tap::open(name, &TapOptions { lanes })?)
            }
            Wire::Fd(fd) => Arc::new(Tap::from_fd(own(*fd)?)?),
            Wire::Connect(path) => Arc::new(Stream::connect(path, &StreamOptions::default())?),
            Wire::Listen(path) => Arc::new(Stream::listen(path, &StreamOptions::default())?),
        })
    }

    /// Puts the card into a machine.
    pub(crate) fn attach(
        &self,
        vm: &mut Vm,
        link: Arc<dyn Link>,
        mac: MacAddress,
        threads: ThreadOptions,
    ) -> Result<()> {
        if self.bus == Bus::E1000 {
            vm.add_e1000(link, &E1000Options::new(mac), threads)?;
            return Ok(());
        }
        let offloads = if self.offload {
            Offloads::all()
        } else {
            Offloads::empty()
        };
        let options = NetOptions {
            mac,
            pairs: self.queues.unwrap_or(1),
            transmit: offloads,
            receive: offloads,
            ..NetOptions::default()
        };
        let device = Box::new(Net::new(link, options)?);
        if self.bus == Bus::VirtioPci {
            vm.add_virtio_pci(device, threads, PciOptions::default())?;
        } else {
            vm.add_virtio_mmio(device, threads)?;
        }
        Ok(())
    }

    /// Its address: what was asked for, or one that follows from what it is
    /// plugged into, so that it stays the same from run to run, and cards at
    /// different places have different ones.
    pub(crate) fn mac(&self, index: usize) -> MacAddress {
        self.mac.unwrap_or_else(|| {
            let place = self.text.split(',').next().unwrap_or_default();
            // FNV-1a: short texts, and nothing depends on its quality.
            let hash = place
                .bytes()
                .chain(index.to_le_bytes())
                .fold(0x811c_9dc5_u32, |hash, byte| {
                    (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
                });
            MacAddress::local(hash)
        })
    }
}

/// A copy of a descriptor that somebody handed to this program, if it is one.
fn own(fd: RawFd) -> Result<OwnedFd> {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).context("this process")?;
    pidfd_getfd(own, fd, PidfdGetfdFlags::empty())
        .with_context(|| format!("no file is open as descriptor {fd}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetArg, String> {
        text.parse()
    }

    #[test]
    fn cards() {
        let net = parse("tap=tap0").unwrap();
        assert_eq!(net.wire, Wire::Tap("tap0".to_owned()));
        assert_eq!((net.bus, net.queues), (Bus::VirtioMmio, None));
        assert!(net.offload && net.mac.is_none());
        let net = parse("tap=t,bus=virtio-pci,queues=4,mac=52:54:00:1:2:3,offload=off").unwrap();
        assert_eq!((net.bus, net.queues), (Bus::VirtioPci, Some(4)));
        assert_eq!(net.mac(0), MacAddress([0x52, 0x54, 0, 1, 2, 3]));
        assert!(!net.offload);
        assert_eq!(parse("fd=7,bus=e1000").unwrap().wire, Wire::Fd(7));
        assert_eq!(
            parse("listen=/a,,b").unwrap().wire,
            Wire::Listen(PathBuf::from("/a,b"))
        );
    }

    #[test]
    fn cards_that_cannot_be() {
        for (text, word) in [
            ("", "plugged"),
            ("tap0", "plugged"),
            ("tap=", "1 to 15"),
            ("tap=interface-number-1", "1 to 15"),
            ("fd=1", "above 2"),
            ("fd=x", "\"x\""),
            ("connect=", "path"),
            ("bridge=br0", "plugged"),
            ("tap=t,bus=rtl8139", "\"rtl8139\""),
            ("tap=t,mac=1:2:3", "six bytes"),
            ("tap=t,mac=01:00:5e:00:00:01", "group"),
            ("tap=t,mac=00:00:00:00:00:00", "nobody"),
            ("tap=t,queues=0", "1 to 16"),
            ("tap=t,queues=17", "1 to 16"),
            ("tap=t,queues=2,bus=e1000", "one pair"),
            ("connect=/s,queues=2", "only a tap"),
            ("tap=t,offload=off,bus=e1000", "its driver decides"),
            ("tap=t,offload=maybe", "maybe"),
            ("tap=t,vhost=on", "\"vhost=on\""),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_stay_and_differ() {
        let of = |text: &str, index| parse(text).unwrap().mac(index);
        assert_eq!(of("tap=a", 0), of("tap=a,offload=off", 0));
        assert_ne!(of("tap=a", 0), of("tap=b", 0));
        assert_ne!(of("tap=a", 0), of("tap=a", 1));
        assert!(of("tap=a", 0).is_unicast());
    }
}
