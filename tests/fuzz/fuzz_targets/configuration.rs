#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyattn_fuzz::configuration(data));
