#![no_main]
//! The text of an annotation: ports, IP ranges, users with ports.

libfuzzer_sys::fuzz_target!(|text: &str| sidestep_fuzz::check_lists(text));
