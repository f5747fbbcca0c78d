//! Which launches stand for a row.

use super::case::{Count, Sink};
use super::configuration::Settings;
use super::table::Kernel;
use super::{attention, convert, dequantize, fusion, hadamard, linear, mla, moe, rope, sampling, suite, trellis};

/// Why a row is bound to nothing, or to something.
pub(crate) type Bound = std::result::Result<(), &'static str>;

/// How a row is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// To launches.
    Bound {
        /// How many.
        launches: usize,
        /// Some of them are launches of [`Variants`](super::Variants), which only GPUs have.
        variants: bool,
        /// Keys of the arrangement that the launches leave to the kernel.
        left_to_kernel: Vec<&'static str>,
    },
    /// To nothing yet.
    NotYet(&'static str),
}

/// How a row is bound; runs nothing.
pub fn binding(kernel: &Kernel) -> Binding {
    let mut count = Count::default();
    let settings = Settings::new(&kernel.configuration);
    match bind(kernel, &settings, &mut count) {
        Ok(()) => Binding::Bound {
            launches: count.launches,
            variants: count.needs_variants,
            left_to_kernel: settings.unread().iter().filter(|key| key.arrangement).map(|key| key.name).collect(),
        },
        Err(reason) => Binding::NotYet(reason),
    }
}

/// Hands the launches of a row to `sink`.
pub(crate) fn bind<S: Sink>(kernel: &Kernel, settings: &Settings<'_>, sink: &mut S) -> Bound {
    if let Some(reason) = no_operation(kernel.operation) {
        return Err(reason);
    }
    match kernel.operation {
        "linear_quant" | "linear_dense" | "gemv_quant" | "linear_splitk" | "linear_streamk" | "workspace_zero" => {
            linear::bind(kernel.operation, settings, sink)
        }
        "linear_norm" | "linear_norm_qkv" | "gated_up" | "gated_mlp" => fusion::bind(kernel.operation, settings, sink),
        "dequant_fp4" | "dequant_int4" | "dequant_int8" | "dequant_fp8" | "dequant_sub4" => {
            dequantize::bind(kernel.operation, settings, sink)
        }
        "convert_float" => convert::bind(settings, sink),
        "hadamard_block" => hadamard::bind(settings, sink),
        "attention_fused" | "attention_decode" | "attention_probs" | "attention_pv" | "attention_paged" => {
            attention::bind(kernel.operation, settings, sink)
        }
        "mla_project" => mla::bind(settings, sink),
        "rope_apply" | "rope_table" | "rope_mla_latent" => rope::bind(kernel.operation, settings, sink),
        "moe_expert_mlp" => trellis::bind(settings, sink),
        "moe_route" | "moe_group" | "moe_combine" | "moe_shared_expert" | "moe_forward" => {
            moe::bind(kernel.operation, settings, sink)
        }
        "softmax_rows" | "argmax_rows" | "sample_filtered" | "logits_process" => {
            sampling::bind(kernel.operation, settings, sink)
        }
        "gemm_batched"
        | "epilogue_apply"
        | "attention_split_reduce"
        | "moe_aux_loss"
        | "moe_grouped_gemm"
        | "sample_categorical"
        | "sample_gumbel" => suite::bind(kernel.operation, settings, sink),
        other => unreachable!("data/kernels.tsv: no operation is called `{other}`"),
    }
}

/// Operations that do not exist yet. To bind one, strike it here and hand its launches to the sink in the family's file.
fn no_operation(operation: &str) -> Option<&'static str> {
    Some(match operation {
        "linear_sparse_nm" | "sparse_meta_codec" => "N:M sparsity",
        "attention_tree" | "tree_mask_build" => "tree attention",
        "attention_diff" => "differential attention",
        "rwkv_wkv" | "token_shift" | "squared_relu" => "RWKV",
        "image_resize" | "image_pointwise" | "image_patchify" | "image_center_crop" | "vision_smart_resize" => {
            "vision preprocessing"
        }
        "all_reduce" | "gather_scatter" | "reduce_scatter" => "collectives",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::kernels;

    /// No key that says what is computed is passed over by the binding of its row.
    #[test]
    fn every_key_is_read() {
        for kernel in kernels() {
            let settings = Settings::new(&kernel.configuration);
            let mut count = Count::default();
            if bind(kernel, &settings, &mut count).is_ok() {
                let unread: Vec<&str> =
                    settings.unread().iter().filter(|key| !key.arrangement).map(|key| key.name).collect();
                assert!(unread.is_empty(), "{}: {unread:?} of {}", kernel.name, kernel.configuration);
                assert!(count.launches > 0, "{} has no launches", kernel.name);
            }
        }
    }
}
