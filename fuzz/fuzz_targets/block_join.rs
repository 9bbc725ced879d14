//! The shipped block driver and device, with memory and registers between them
//! that change under both.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pvkit_scripts::block_join(data));
