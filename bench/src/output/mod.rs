//! Printing the figures.

pub mod json;
pub mod table;
