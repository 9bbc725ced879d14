//! The shipped network driver and device over a switch, with memory and
//! registers between them that change under both.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pvkit_scripts::net_join(data));
