//! Round to nearest: every weight to the nearest code of its group, without calibration.

use marlin_formats::{FormatError, Group, QuantizedMatrix, Scheme};
use rayon::prelude::*;

use crate::scale::{ScaleSearch, fit_group};
use crate::{QuantizeError, Result};

/// Quantizes `weight`, `[out_features, in_features]` row-major, in parallel over output features.
///
/// With [`ScaleSearch::Range`] the result is that of [`QuantizedMatrix::encode`], bit for bit.
///
/// # Errors
/// A NaN or infinite weight with its index, a scale overflow with its group, a wrong group size,
/// length or shape.
pub fn rtn(
    scheme: Scheme,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
    search: ScaleSearch,
) -> Result<QuantizedMatrix> {
    rtn_weighted(scheme, weight, out_features, in_features, None, search)
}

/// [`rtn`] with an importance of each input feature, which weights the squared errors of
/// [`ScaleSearch::Mse`].
pub(crate) fn rtn_weighted(
    scheme: Scheme,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
    importance: Option<&[f32]>,
    search: ScaleSearch,
) -> Result<QuantizedMatrix> {
    check_weight(scheme, weight, out_features, in_features)?;
    let tensor_scale = scheme.tensor_scale(largest_magnitude(weight));
    let groups_per_row = scheme.groups(in_features);
    let mut codes = vec![0u8; weight.len()];
    let mut groups = vec![Group::ZERO; out_features * groups_per_row];
    weight
        .par_chunks_exact(in_features)
        .zip(codes.par_chunks_exact_mut(in_features))
        .zip(groups.par_chunks_exact_mut(groups_per_row))
        .enumerate()
        .try_for_each(|(n, ((row, codes), groups))| {
            let row = Row { n, weights: row, importance };
            quantize_row(scheme, row, tensor_scale, search, codes, groups)
        })?;
    Ok(QuantizedMatrix::from_codes(scheme, in_features, out_features, &codes, &groups, tensor_scale)?)
}

/// Output feature `n`.
struct Row<'a> {
    n: usize,
    /// `[K]`.
    weights: &'a [f32],
    /// `[K]`.
    importance: Option<&'a [f32]>,
}

/// Codes and groups of an output feature.
fn quantize_row(
    scheme: Scheme,
    row: Row<'_>,
    tensor_scale: Option<f32>,
    search: ScaleSearch,
    codes: &mut [u8],
    groups: &mut [Group],
) -> Result<()> {
    let chunks = row.weights.chunks(scheme.group_size).zip(codes.chunks_mut(scheme.group_size));
    for (g, ((weights, codes), group)) in chunks.zip(groups).enumerate() {
        let importance = row.importance.map(|importance| &importance[g * scheme.group_size..][..weights.len()]);
        *group =
            fit_group(scheme, weights, importance, tensor_scale, search).map_err(|error| in_group(error, row.n, g))?;
        for (code, &w) in codes.iter_mut().zip(weights) {
            *code = scheme.code(w, group);
        }
    }
    Ok(())
}

/// Checks group size, shape, length and that every weight is finite.
pub(crate) fn check_weight(scheme: Scheme, weight: &[f32], out_features: usize, in_features: usize) -> Result<()> {
    scheme.format.check_group_size(scheme.group_size)?;
    let expected = out_features
        .checked_mul(in_features)
        .filter(|&count| count > 0)
        .ok_or(FormatError::Shape { out_features, in_features })?;
    if weight.len() != expected {
        return Err(QuantizeError::Length { what: "weight", expected, found: weight.len() });
    }
    match weight.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(index) => {
            Err(FormatError::NonFiniteWeight { n: index / in_features, k: index % in_features, value: weight[index] }
                .into())
        }
    }
}

/// `max |w|`, 0 for no weights.
pub(crate) fn largest_magnitude(weight: &[f32]) -> f32 {
    weight.iter().fold(0.0f32, |amax, w| amax.max(w.abs()))
}

/// Adds the group's position to a format error.
pub(crate) fn in_group(error: QuantizeError, n: usize, g: usize) -> QuantizeError {
    match error {
        QuantizeError::Format(source) => QuantizeError::Format(FormatError::InGroup { n, g, source: Box::new(source) }),
        other => other,
    }
}
