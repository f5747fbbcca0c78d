//! The specification's bounds for 16-bit inputs and outputs (operations.md section 0, "Numeric policy").

use marlin_formats::DType;

use crate::tolerance;

/// Unit round-off of a type.
pub(crate) fn round_off(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => tolerance::U32,
    }
}

/// The bound for this type of input and output.
fn by_type(dtype: DType, f32: f64, f16: f64, bf16: f64) -> f64 {
    match dtype {
        DType::F16 => f16,
        DType::BF16 => bf16,
        _ => f32,
    }
}

/// LIN32, LIN16, LINB16: linear layers, relF.
pub(crate) fn linear(dtype: DType) -> f64 {
    by_type(dtype, tolerance::LINEAR, 6e-4, 5e-3)
}

/// ACC16(K): linear layers with an f16 accumulator, relF.
pub(crate) fn f16_accumulator(k: usize) -> f64 {
    2f64.powi(-11) * (k as f64 / 6.0).sqrt() + 6e-4
}

/// gated_mlp and what is made of it, relF.
pub(crate) fn gated_mlp(dtype: DType) -> f64 {
    by_type(dtype, 8e-4, 8e-4, 6e-3)
}

/// linear_norm with the normalised rows rounded in between, relF.
pub(crate) fn norm_linear(dtype: DType) -> f64 {
    linear(dtype) + by_type(dtype, 0.0, 3e-4, 2.5e-3)
}

/// ATT16, ATTB16: attention, relF per head.
pub(crate) fn attention(dtype: DType) -> f64 {
    by_type(dtype, tolerance::ATTENTION, 8e-4, 6e-3)
}

/// Largest difference of attention as a share of max |V|.
pub(crate) fn attention_of_max_v(dtype: DType) -> f64 {
    by_type(dtype, tolerance::attention_of_max_v(tolerance::ATTENTION), 1e-3, 8e-3)
}

/// attention_probs: probabilities.
pub(crate) fn probabilities(dtype: DType) -> f64 {
    by_type(dtype, tolerance::ATTENTION, 6e-4, 5e-3)
}

/// hadamard_block, relF per block.
pub(crate) fn hadamard(dtype: DType) -> f64 {
    by_type(dtype, tolerance::HADAMARD, 4e-4, 3e-3)
}

/// softmax_rows in f32, relative.
pub(crate) const SOFTMAX: f64 = 3e-6;
