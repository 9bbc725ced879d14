//! The network part: what is measured, on which wire, and what came of it.
//!
//! - [`row`] says what is measured, [`plan`] which of it in this run.
//! - [`wire`] is what cards are plugged into, and the peer at the other end.
//! - [`pass`] runs a list of jobs once, [`run`] all of them in rounds.
//! - [`result`] adds up, [`table`] prints.

pub mod pass;
pub mod plan;
pub mod result;
pub mod row;
pub mod run;
pub mod table;
pub mod wire;
