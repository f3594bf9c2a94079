#![no_main]
//! A file of manifests, as the agent reads it.

use sidestep::source::manifests::{documents, pod_of};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(documents) = documents(text) else {
        return;
    };
    let pods: Vec<_> = documents
        .iter()
        .enumerate()
        .filter_map(|(n, document)| match pod_of(n + 1, document) {
            Ok(pod) => pod,
            Err(error) => {
                assert!(error.to_string().starts_with(&format!("document {}: ", n + 1)), "{error}");
                None
            }
        })
        .collect();
    sidestep_fuzz::check_pods(&pods);
});
