//! The network part: what is measured, on which wire, and what came of it.

pub mod wire;
