//! How a virtio function interrupts: by message, or by its pin with a register
//! that says why.
#![forbid(unsafe_code)]

use crate::pci::{Intx, Messages, Msix, MsixControl};
use crate::sync::lock;
use crate::virtio::transport::control::TransportSignals;
use crate::worker::Signal;
use pvkit_protocol::virtio::pci::{IsrStatus, NO_VECTOR};
use std::sync::{Arc, Mutex, MutexGuard};

/// Everything that decides about an interrupt, under one lock: signals come
/// from the threads of the lanes.
#[derive(Debug)]
pub(super) struct PciSignals(Mutex<State>);

#[derive(Debug)]
pub(super) struct State {
    pub(super) msix: Msix,
    isr: IsrStatus,
    intx: Intx,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl PciSignals {
    pub(super) fn new(queues: u16, vectors: u16, messages: Arc<dyn Messages>, intx: Intx) -> Self {
        Self(Mutex::new(State {
            msix: Msix::new(vectors, messages),
            isr: IsrStatus::empty(),
            intx,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; usize::from(queues)],
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl State {
    /// The pin follows the ISR status while MSI-X is off (§4.1.4.5.1).
    fn drive(&self) {
        self.intx
            .set(!self.msix.is_enabled() && !self.isr.is_empty());
    }

    /// The ISR status, which the read clears; so the pin is released.
    pub(super) fn take_isr(&mut self) -> u8 {
        let isr = std::mem::take(&mut self.isr);
        self.drive();
        isr.bits()
    }

    /// Follows the message control of the MSI-X capability.
    pub(super) fn set_control(&mut self, control: MsixControl) {
        if self.msix.vectors() > 0 {
            self.msix.set_control(control);
            self.drive();
        }
    }

    /// The vector, if there is such a one.
    fn accept(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            // §4.1.5.1.2.1: a vector that cannot be mapped reads back so.
            NO_VECTOR
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(super) fn set_config_vector(&mut self, vector: u16) {
        self.config_vector = self.accept(vector);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.copied().unwrap_or(NO_VECTOR)
    }

    pub(super) fn set_queue_vector(&mut self, queue: u16, vector: u16) {
        let vector = self.accept(vector);
        if let Some(place) = self.queue_vectors.get_mut(usize::from(queue)) {
            *place = vector;
        }
    }
}

impl TransportSignals for PciSignals {
    fn config(&self) {
        let mut state = self.lock();
        // Set whether MSI-X is on or off (§4.1.4.5.1).
        state.isr |= IsrStatus::CONFIG_CHANGE;
        let vector = state.config_vector;
        state.msix.signal(vector);
        state.drive();
    }

    fn queue(self: Arc<Self>, queue: u16) -> Arc<dyn Signal> {
        Arc::new(QueueSignal {
            signals: self,
            queue,
        })
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.isr = IsrStatus::empty();
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        state.msix.forget();
        state.drive();
    }
}

#[derive(Debug)]
struct QueueSignal {
    signals: Arc<PciSignals>,
    queue: u16,
}

impl Signal for QueueSignal {
    fn signal(&self) {
        let mut state = self.signals.lock();
        if state.msix.is_enabled() {
            let vector = state.queue_vector(self.queue);
            state.msix.signal(vector);
        } else {
            state.isr |= IsrStatus::QUEUE;
            state.drive();
        }
    }
}
