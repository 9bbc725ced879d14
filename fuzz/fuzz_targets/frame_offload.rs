//! Any frame, and anything that is said of it, checked and finished in
//! software.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pvkit_scripts::frame_offload(data));
