//! Models on the first CUDA device. Without one each test prints a line `SKIPPED`. `MARLIN_GOLDEN` names the golden models
//! where the source tree is elsewhere.
#![cfg(feature = "cuda")]

mod decode;
#[path = "../../models/tests/common/mod.rs"]
mod golden;

use std::io::Write;
use std::sync::Arc;

use decode::Decoding;
use marlin_gpu::{Cuda, Measured};

fn device(test: &str) -> Option<Cuda> {
    match marlin_gpu::cuda(None) {
        Ok(gpu) => Some(gpu.with_exact(true)),
        Err(error) => {
            std::io::stderr().write_all(format!("SKIPPED: {test}, because {error}\n").as_bytes()).unwrap();
            None
        }
    }
}

#[test]
fn an_absent_device_is_an_error_that_says_what_there_is() {
    let error = marlin_gpu::cuda(Some(99)).err().unwrap().to_string();
    assert!(error.contains("CUDA device 99") && error.contains("there "), "{error}");
}

// One test: a device records one step at a time, and while it does nothing else may use it.
#[test]
fn models_run_unchanged() {
    let Some(gpu) = device("models on CUDA") else { return };
    let gpu = Arc::new(gpu);
    logits_are_the_same_bits_with_graphs(&gpu);
    decode::one_small_read_a_token(&gpu);
    golden::parity::check_all_on(&gpu);
    golden::parity::check_exl3_on(&gpu);
    golden::parity::check_imported_on(&gpu);
    drop(gpu);
    // Where activations of EXL3, and keys and values of latent attention, are rounded.
    let gpu = Arc::new(marlin_gpu::cuda(None).unwrap());
    golden::parity::check_all_on(&gpu);
    golden::parity::check_exl3_on(&gpu);
    golden::parity::check_imported_on(&gpu);
}

/// Tokens enough for shapes to change several times.
const TOKENS: u32 = 300;

fn logits_are_the_same_bits_with_graphs(gpu: &Arc<Cuda>) {
    let logits = |graphs: bool| {
        assert_eq!(gpu.use_graphs(graphs), graphs);
        let mut decoding = Decoding::new(gpu, TOKENS as usize + 2);
        let before = gpu.traffic();
        let logits: Vec<_> = (0..TOKENS).map(|i| decoding.logit_bits(i * 7 % 500)).collect();
        (logits, gpu.traffic().since(&before))
    };
    let (plain, plain_traffic) = logits(false);
    let (replayed, traffic) = logits(true);
    assert_eq!(plain_traffic.replays, 0);
    // Steps are recorded for 4, 8, ... 512 keys.
    assert_eq!(traffic.replays, u64::from(TOKENS) - 8);
    assert!(traffic.launches >= plain_traffic.launches);
    for (token, (plain, replayed)) in plain.iter().zip(&replayed).enumerate() {
        assert_eq!(plain, replayed, "logits of token {token}");
    }
}
