//! Interrupts by message, and doorbells that move: as KVM takes them, without
//! a return to user space.
#![forbid(unsafe_code)]

use super::irq::kvm_event;
use super::{VmError, call, host};
use crate::event::EventFd;
use crate::pci::{Message, Messages};
use crate::sync::lock;
use crate::virtio::transport::{Doorbells, PciTransport};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1 as Route, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd as KvmEventFd;

/// Pins of the I/O APIC; interrupts by message have numbers from here on.
const PINS: u32 = 24;
/// Lines of each of the two old controllers.
const PIC_LINES: u32 = 8;
/// Most routes that KVM takes.
const MOST_ROUTES: usize = 4096;

/// Where every interrupt of a machine goes: KVM takes the whole table at once.
pub(super) struct Routes {
    fd: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    /// The pins, as KVM has them by itself.
    pins: Vec<kvm_irq_routing_entry>,
    /// What the interrupts by message send, from number [`PINS`] on; `None` if
    /// they have not been routed yet.
    messages: Vec<Option<Message>>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = &lock(&self.table).messages;
        f.debug_struct("Routes")
            .field("messages", messages)
            .finish_non_exhaustive()
    }
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: Route {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

impl Routes {
    pub(super) fn new(fd: Arc<VmFd>) -> Self {
        let old = (0..2 * PIC_LINES).map(|gsi| {
            let chip = if gsi < PIC_LINES {
                KVM_IRQCHIP_PIC_MASTER
            } else {
                KVM_IRQCHIP_PIC_SLAVE
            };
            pin(gsi, chip, gsi % PIC_LINES)
        });
        let pins = old.chain((0..PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)));
        Self {
            fd,
            table: Mutex::new(Table {
                pins: pins.collect(),
                messages: Vec::new(),
            }),
        }
    }

    /// Room for the vectors of a function.
    pub(super) fn vectors(self: &Arc<Self>, count: u16) -> Result<Vectors, VmError> {
        let mut table = lock(&self.table);
        let first = table.messages.len();
        let len = first + usize::from(count);
        if table.pins.len() + len > MOST_ROUTES {
            return Err(VmError::TooMany {
                what: "interrupts by message",
                most: MOST_ROUTES,
            });
        }
        let mut events = Vec::new();
        for index in first..len {
            let event = EventFd::new().map_err(host("an event counter"))?;
            let kvm = kvm_event(&event).map_err(host("an event counter"))?;
            self.fd
                .register_irqfd(&kvm, PINS + index as u32)
                .map_err(call("register an interrupt"))?;
            events.push(event);
        }
        table.messages.resize(len, None);
        Ok(Vectors {
            routes: self.clone(),
            first,
            events,
        })
    }

    /// Routes an interrupt, and tells KVM unless it knows.
    fn set(&self, index: usize, message: Message) -> io::Result<()> {
        let mut table = lock(&self.table);
        let Table { pins, messages } = &mut *table;
        let Some(place) = messages.get_mut(index) else {
            return Ok(());
        };
        if *place == Some(message) {
            return Ok(());
        }
        let before = place.replace(message);
        let entries = (PINS..).zip(messages.iter()).filter_map(|(gsi, message)| {
            let Message { address, data } = (*message)?;
            let msi = kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                ..Default::default()
            };
            Some(kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: Route { msi },
                ..Default::default()
            })
        });
        let all: Vec<_> = pins.iter().copied().chain(entries).collect();
        let told = KvmIrqRouting::from_entries(&all)
            .map_err(|error| io::Error::other(format!("{error:?}")))
            .and_then(|routing| {
                self.fd
                    .set_gsi_routing(&routing)
                    .map_err(|error| io::Error::from_raw_os_error(error.errno()))
            });
        if told.is_err()
            && let Some(place) = messages.get_mut(index)
        {
            *place = before;
        }
        told
    }
}

/// The vectors of one function: each is an event counter that KVM takes in the
/// kernel.
#[derive(Debug)]
pub(super) struct Vectors {
    routes: Arc<Routes>,
    /// Index of vector 0 among all interrupts by message.
    first: usize,
    events: Vec<EventFd>,
}

impl Messages for Vectors {
    fn route(&self, vector: u16, message: Option<Message>) {
        let Some(message) = message.filter(|_| usize::from(vector) < self.events.len()) else {
            // Nothing is sent while the vector is masked.
            return;
        };
        if let Err(error) = self.routes.set(self.first + usize::from(vector), message) {
            log::error!("KVM: interrupt {vector} as {message:x?}: {error}");
        }
    }

    fn send(&self, vector: u16, _message: Message) {
        if let Some(event) = self.events.get(usize::from(vector)) {
            event.notify();
        }
    }
}

/// The doorbells of one function.
#[derive(Debug)]
pub(super) struct MovingDoorbells {
    fd: Arc<VmFd>,
    kicks: Vec<KvmEventFd>,
    /// Those that KVM takes now: queue and address.
    taken: Vec<(usize, u64)>,
}

impl MovingDoorbells {
    pub(super) fn new(fd: Arc<VmFd>, kicks: &[Arc<EventFd>]) -> io::Result<Self> {
        let kicks = kicks.iter().map(|kick| kvm_event(kick));
        Ok(Self {
            fd,
            kicks: kicks.collect::<io::Result<_>>()?,
            taken: Vec::new(),
        })
    }

    fn leave(&mut self) {
        for (queue, address) in self.taken.drain(..) {
            let Some(kick) = self.kicks.get(queue) else {
                continue;
            };
            let at = IoEventAddress::Mmio(address);
            if let Err(error) = self.fd.unregister_ioevent(kick, &at, NoDatamatch) {
                log::error!("KVM: doorbell at {address:#x}: {error}");
            }
        }
    }
}

impl Doorbells for MovingDoorbells {
    fn move_to(&mut self, first: Option<u64>) {
        self.leave();
        let Some(first) = first else { return };
        for (queue, kick) in self.kicks.iter().enumerate() {
            // Inside a window, so no address wraps.
            let address = first.wrapping_add(queue as u64 * PciTransport::NOTIFY_BYTES);
            let at = IoEventAddress::Mmio(address);
            match self.fd.register_ioevent(kick, &at, NoDatamatch) {
                Ok(()) => self.taken.push((queue, address)),
                // Whoever rings there leaves the guest, and all goes on. A
                // guest that puts two windows in one place can bring that
                // about.
                Err(error) => log::warn!("KVM: doorbell at {address:#x}: {error}"),
            }
        }
    }
}

impl Drop for MovingDoorbells {
    fn drop(&mut self) {
        self.leave();
    }
}
