//! Rows that cases of the conformance suite stand for.

use std::fmt;

use marlin_formats::DType;
use marlin_ops::linear::Activation;
use marlin_ops::{Backend, Result};

use super::bind::Bound;
use super::case::{AuditCase, Sink};
use super::configuration::Settings;
use super::variants::Variants;
use crate::case::{Case, Mode};
use crate::input::Output;
use crate::tolerance::Tolerance;
use crate::{attention_reduce, linear_batched, moe_grouped, sampling_draws};

/// A case of the suite as a launch of a row.
struct Launch<C>(C);

impl<C: Case> fmt::Debug for Launch<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", C::OPERATION, self.0.configuration())
    }
}

impl<C: Case> AuditCase for Launch<C> {
    fn configuration(&self) -> String {
        self.0.configuration()
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        self.0.run(b)
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        self.0.tolerances(Mode::Exact)
    }
}

fn check_all<S: Sink, C: Case>(sink: &mut S, cases: Vec<C>) {
    cases.into_iter().for_each(|case| sink.check(&Launch(case)));
}

/// Types of inputs and outputs, f16 where the row does not say.
fn io(settings: &Settings<'_>) -> Vec<DType> {
    match settings.types("io") {
        types if types.is_empty() => vec![DType::F16],
        types => types,
    }
}

/// Bias and activation of an epilogue of the table.
fn epilogue(name: &str) -> (bool, Activation) {
    let (bias, activation) = match name.split_once('+') {
        Some((_, activation)) => (true, activation),
        None => (name == "bias", name),
    };
    let activation = match activation {
        "silu" => Activation::Silu,
        "relu" => Activation::Relu,
        "gelu_tanh" => Activation::GeluTanh,
        "gelu_erf" => Activation::GeluErf,
        _ => Activation::None,
    };
    (bias, activation)
}

/// Sums are in f32 wherever a row allows f16.
pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "gemm_batched" if settings.has("gqa") => {
            settings.implied(&["format", "b_transposed", "acc"]);
            io(settings).into_iter().for_each(|io| check_all(sink, linear_batched::grouped_heads(io)));
        }
        "gemm_batched" => {
            settings.implied(&["format", "layout", "acc"]);
            let broadcast = settings.words("broadcast");
            for io in io(settings) {
                check_all(sink, linear_batched::quantized_batches(io, &broadcast));
            }
        }
        "epilogue_apply" => {
            settings.implied(&["inplace"]);
            for io in io(settings) {
                for name in settings.words("epilogue") {
                    let (bias, activation) = epilogue(name);
                    check_all(sink, linear_batched::standalone_epilogues(io, bias, activation));
                }
            }
        }
        "attention_split_reduce" => {
            // The partitions are joined whatever their size.
            settings.implied(&["partials", "partition"]);
            io(settings).into_iter().for_each(|io| check_all(sink, attention_reduce::joined(io)));
        }
        "moe_aux_loss" => {
            settings.implied(&["score", "load", "counts"]);
            check_all(sink, moe_grouped::aux_loss_cases());
        }
        "moe_grouped_gemm" => {
            // moe_combine, a row of its own, joins the products.
            settings.implied(&["format", "acc", "combine"]);
            let sorted = settings.word("order") == Some("sorted");
            let k_max = settings.count("k_max").unwrap_or(2);
            for io in io(settings) {
                check_all(sink, moe_grouped::grouped_products(io, sorted, k_max));
            }
        }
        "sample_categorical" => {
            settings.implied(&["input", "rng"]);
            check_all(sink, sampling_draws::by_probability());
        }
        _ => {
            settings.implied(&["rng"]);
            io(settings).into_iter().for_each(|io| check_all(sink, sampling_draws::by_noise(io)));
        }
    }
    Ok(())
}
