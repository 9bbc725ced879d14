//! The interrupts of a virtio function: MSI-X, or its pin with a register that
//! tells the cause.
#![forbid(unsafe_code)]

use crate::pci::{Intx, Messages, Msix, MsixControl, MsixState};
use crate::sync::lock;
use crate::virtio::transport::control::TransportSignals;
use crate::worker::Signal;
use pvkit_protocol::virtio::pci::{IsrStatus, NO_VECTOR};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// Everything that an interrupt depends on, under one lock: signals come from
/// the threads of the lanes.
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

/// The saved interrupts of a function.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SignalState {
    msix: MsixState,
    isr: u8,
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
    pub(super) fn save(&self) -> SignalState {
        let Self {
            msix,
            isr,
            // Follows from the ISR status.
            intx: _,
            config_vector,
            queue_vectors,
        } = self;
        SignalState {
            msix: msix.save(),
            isr: isr.bits(),
            config_vector: *config_vector,
            queue_vectors: queue_vectors.clone(),
        }
    }

    /// Takes over saved interrupts; `None` if a driver of this function cannot
    /// have brought them about.
    pub(super) fn restore(&mut self, state: &SignalState) -> Option<()> {
        let SignalState {
            msix,
            isr,
            config_vector,
            queue_vectors,
        } = state;
        let isr = IsrStatus::from_bits(*isr)?;
        let possible = |vector: u16| vector == NO_VECTOR || vector < self.msix.vectors();
        let vectors = queue_vectors.iter().chain([config_vector]);
        if queue_vectors.len() != self.queue_vectors.len() || !vectors.copied().all(possible) {
            return None;
        }
        self.msix.restore(msix).ok()?;
        self.isr = isr;
        self.config_vector = *config_vector;
        self.queue_vectors.clone_from(queue_vectors);
        self.drive();
        Some(())
    }

    /// The pin follows the ISR status while MSI-X is off (§4.1.4.5.1).
    fn drive(&self) {
        self.intx
            .set(!self.msix.is_enabled() && !self.isr.is_empty());
    }

    /// Reads and clears the ISR status, which releases the pin.
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

    /// The vector, if it exists.
    fn accept(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            // A vector that cannot be mapped reads back so (§4.1.5.1.2.1).
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
        if let Some(entry) = self.queue_vectors.get_mut(usize::from(queue)) {
            *entry = vector;
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
