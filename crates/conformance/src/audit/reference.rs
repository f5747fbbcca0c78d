//! What the launches of [`Variants`] give, in f64.

use marlin_formats::DType;
use marlin_ops::attention::{AttentionArgs, PagedAttentionArgs};
use marlin_ops::linear::{GatedUpArgs, LinearArgs};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::oracle::{Oracle, Values, round_to};
use marlin_ops::{AttentionOps, Device, LinearOps, MoeOps, PagedAttentionOps, Result, Tensor};

use super::variants::{AttentionKernel, ExpertKernel, LinearKernel, Variants};

/// The launches of [`Variants`] on the oracle.
pub(crate) struct Reference;

/// Replaces the elements of a float tensor, each rounded once.
pub(crate) fn store(out: &mut Tensor<Oracle>, values: impl IntoIterator<Item = f64>) {
    let dtype = out.dtype();
    let values = values.into_iter().map(|value| round_to(dtype, value)).collect();
    *out.buffer_mut() = Values::Floats(values);
}

impl Variants<Oracle> for Reference {
    const GPU: bool = false;

    fn linear(&self, oracle: &Oracle, _: LinearKernel, args: LinearArgs<'_, Oracle>) -> Result<()> {
        oracle.linear(args)
    }

    fn attention(&self, oracle: &Oracle, _: AttentionKernel, args: AttentionArgs<'_, Oracle>) -> Result<()> {
        oracle.attention(args)
    }

    fn gated_up(&self, oracle: &Oracle, _: LinearKernel, args: GatedUpArgs<'_, Oracle>) -> Result<()> {
        oracle.gated_up(args)
    }

    fn paged_attention(&self, oracle: &Oracle, _: AttentionKernel, args: PagedAttentionArgs<'_, Oracle>) -> Result<()> {
        oracle.paged_attention(args)
    }

    fn expert_mlp(&self, oracle: &Oracle, _: ExpertKernel, args: ExpertMlpArgs<'_, Oracle>) -> Result<()> {
        oracle.moe_expert_mlp(args)
    }

    fn convert_toward_zero(&self, oracle: &Oracle, x: &Tensor<Oracle>, out: &mut Tensor<Oracle>) -> Result<()> {
        let dtype = out.dtype();
        let values = oracle.read_f64(x)?;
        *out.buffer_mut() = Values::Floats(values.into_iter().map(|value| toward_zero(dtype, value)).collect());
        Ok(())
    }

    fn softmax(&self, oracle: &Oracle, x: &Tensor<Oracle>, out: &mut Tensor<Oracle>) -> Result<()> {
        let columns = x.columns();
        let values = oracle.read_f64(x)?;
        store(out, values.chunks(columns).flat_map(softmax_row));
        Ok(())
    }
}

/// `value` rounded toward zero; what lies beyond the largest finite value becomes that.
fn toward_zero(dtype: DType, value: f64) -> f64 {
    let rounded = round_to(dtype, value);
    if rounded.is_nan() || rounded.abs() <= value.abs() {
        return rounded;
    }
    // One step of the type back.
    match dtype {
        DType::F16 => half::f16::from_bits(half::f16::from_f64(rounded).to_bits() - 1).to_f64(),
        DType::BF16 => half::bf16::from_bits(half::bf16::from_f64(rounded).to_bits() - 1).to_f64(),
        _ => value,
    }
}

/// Softmax of one row.
pub(crate) fn softmax_row(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}
