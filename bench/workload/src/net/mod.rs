//! What the benchmark does to a network card.
//!
//! At the other end of the wire is a [`peer`]: the guest asks it in band, by
//! [`control`] frames, to generate frames, to send back what it gets, or to say
//! how many frames it has seen. So every count is that of the receiver, and the
//! same guest works on any monitor.
//!
//! - [`job`] is what the host tells the guest to do, [`report`] what comes of
//!   it.
//! - [`frame`] is what data frames look like, [`stream`] what goes over TCP.
//! - [`run`] does a job; [`tcp`] is the part of it that has a TCP stack.

pub mod control;
mod counted;
mod error;
mod exchange;
pub mod frame;
pub mod job;
pub mod peer;
pub mod report;
pub mod run;
pub mod stream;
pub mod tcp;
#[cfg(test)]
mod tests;
mod timed;
mod verify;
