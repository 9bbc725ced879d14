//! From reset to FEATURES_OK, and reading configuration (virtio 1.3 §3.1, §2.5).
#![forbid(unsafe_code)]

use super::net::ControlError;
use super::queue::QueueError;
use super::transport::{ResetTimeout, Transport, VectorError};
use crate::quiesce::Quiesced;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use thiserror::Error;

/// Why a device cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InitError {
    /// It is a device of another type.
    #[error("the device has type {found}, not {expected}")]
    DeviceId {
        /// The type that the driver is for.
        expected: u32,
        /// The device's type.
        found: u32,
    },
    /// It does not reset.
    #[error(transparent)]
    Reset(#[from] ResetTimeout),
    /// It does not run since a recovery failed, so that no queue of it can be
    /// reset alone.
    #[error("the device does not run: recover it first")]
    NotRunning,
    /// It lacks features that the driver or its user insists on.
    #[error("the device lacks features {missing:?}")]
    Missing {
        /// Those features.
        missing: Features,
    },
    /// It refuses a subset of the features that it offers.
    #[error("the device refuses features {asked:?}")]
    Refused {
        /// What the driver asked for.
        asked: Features,
    },
    /// After a reset it no longer offers what was in use.
    #[error("the device offered {before:?} before its reset and accepts only {after:?} now")]
    Changed {
        /// Features before the reset.
        before: Features,
        /// What could be negotiated now.
        after: Features,
    },
    /// Its configuration never holds still.
    #[error("the configuration still changes after {0} reads")]
    ConfigUnstable(u32),
    /// A field of its configuration makes no sense.
    #[error("the device's configuration says {field} = {value}")]
    Config {
        /// The field's name in the specification.
        field: &'static str,
        /// What it reads as.
        value: u64,
    },
    /// A queue cannot be set up.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// It, or its transport, does not give the interrupts that were asked for.
    #[error(transparent)]
    Vector(#[from] VectorError),
    /// It did not become ready: the status after DRIVER_OK was this.
    #[error("the device broke while it was set up: status {0:?}")]
    NotReady(DeviceStatus),
    /// Some queues of the device are missing: a reset is about all of them.
    #[error("{given} queues were handed in, and the device has {open}")]
    Queues {
        /// Queues that were handed in.
        given: usize,
        /// Queues that the driver opened.
        open: u16,
    },
    /// Receive buffers are too short for the frames of this device.
    #[error("receive buffers of {have} bytes, where frames need {need}")]
    BufferBytes {
        /// Bytes of a buffer.
        have: usize,
        /// How many it has to have.
        need: usize,
    },
    /// There is no receive buffer, or none that the device can reach.
    #[error("there are no receive buffers that the device can reach")]
    NoBuffers,
    /// The device runs again, but did not take over what was set before.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The queue that was handed in belongs to another device.
    #[error("the queue belongs to another device")]
    ForeignQueue,
}

/// How often a configuration that changes under the driver is read again.
const CONFIG_READS: u32 = 64;

/// Resets the device and negotiates features: all of `supported` that the
/// device offers, but for those that `settle` takes out because they make no
/// sense without others. Leaves the device at `FEATURES_OK`, or at FAILED.
pub(super) fn negotiate<T: Transport>(
    transport: &mut T,
    device_id: u32,
    supported: Features,
    required: Features,
    settle: impl FnOnce(Features) -> Features,
) -> Result<(Features, Quiesced), InitError> {
    let found = transport.device_id();
    if found != device_id {
        return Err(InitError::DeviceId {
            expected: device_id,
            found,
        });
    }
    let proof = transport.reset()?;
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    // No bit is ever cleared but by a reset (§2.1.1), not even by FAILED.
    let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    transport.set_status(driver);
    let features = settle(transport.device_features() & supported);
    // A driver for virtio 1 must not use a device without VERSION_1 (§6.1).
    let missing = (required | Features::VERSION_1) & !features;
    if !missing.is_empty() {
        transport.set_status(driver | DeviceStatus::FAILED);
        return Err(InitError::Missing { missing });
    }
    transport.set_driver_features(features);
    let negotiated = driver | DeviceStatus::FEATURES_OK;
    transport.set_status(negotiated);
    if !transport.status().contains(DeviceStatus::FEATURES_OK) {
        transport.set_status(negotiated | DeviceStatus::FAILED);
        return Err(InitError::Refused { asked: features });
    }
    Ok((features, proof))
}

/// Sets DRIVER_OK. Queues are live from then on.
pub(super) fn driver_ok<T: Transport>(transport: &mut T) -> Result<(), InitError> {
    transport.set_status(
        DeviceStatus::ACKNOWLEDGE
            | DeviceStatus::DRIVER
            | DeviceStatus::FEATURES_OK
            | DeviceStatus::DRIVER_OK,
    );
    let status = transport.status();
    let broken = DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::FAILED;
    // Only a reset clears bits (§2.1): a device that lost DRIVER_OK does not
    // run.
    if !status.contains(DeviceStatus::DRIVER_OK) || status.intersects(broken) {
        return Err(InitError::NotReady(status));
    }
    Ok(())
}

/// Reads fields of the configuration space, all of one generation (§2.5.1).
/// `read` reads them, possibly several times.
pub(super) fn read_config<T: Transport, C>(
    transport: &T,
    read: impl Fn(&T) -> C,
) -> Result<C, InitError> {
    for _ in 0..CONFIG_READS {
        let before = transport.config_generation();
        let config = read(transport);
        if transport.config_generation() == before {
            return Ok(config);
        }
    }
    Err(InitError::ConfigUnstable(CONFIG_READS))
}
