//! The `pvkit` program.
fn main() {}
