//! The driver of the 82540EM against a chip that does as the test says.

mod fake;
mod life;
mod receive;
mod transmit;
