//! virtio 1.3 on the host: queues, devices and transports.
#![forbid(unsafe_code)]

pub mod block;
pub mod device;
pub mod lanes;
pub mod net;
pub mod queue;
pub mod transport;
