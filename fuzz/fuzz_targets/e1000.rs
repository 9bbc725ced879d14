//! The shipped driver and device of an e1000 over a switch, or a guest without
//! a driver.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pvkit_scripts::e1000(data));
