//! One file per command.

pub mod bench;
pub mod chat;
pub mod convert;
pub mod devices;
#[cfg(feature = "gpu")]
pub mod emit_msl;
pub mod generate;
pub mod inspect;
pub mod kernels;
pub mod logits;
pub mod perplexity;
pub mod quantize;
pub mod synth;
pub mod verify;

use indicatif::{ProgressBar, ProgressStyle};

/// A progress bar with an estimate of the time left on a terminal, nothing in a pipe.
pub fn progress_bar(length: u64, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let template = format!("{{bar:30}} {{pos}}/{{len}} {unit}, {{eta}} left {{msg}}");
    match ProgressStyle::with_template(&template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// The same for a number of weights.
pub fn weights_bar(weights: u64) -> ProgressBar {
    let bar = ProgressBar::new(weights);
    match ProgressStyle::with_template("{bar:30} {human_pos}/{human_len} weights, {eta} left {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
