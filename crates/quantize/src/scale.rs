//! How the scale (and zero) of one group of weights is chosen.

use marlin_formats::{Format, Group, Scheme, fp4};

use crate::Result;

/// How a group's scale is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleSearch {
    /// The format's own rule: the largest magnitude maps to the end of the grid.
    #[default]
    Range,
    /// The smallest squared error among 40 shrunken ranges, ties to the largest range.
    ///
    /// Eight-bit formats keep the range rule: their error is dominated by rounding, which
    /// clipping does not reduce.
    Mse,
}

/// Ranges tried by [`ScaleSearch::Mse`], the full one included.
const CANDIDATES: u16 = 40;

/// The smallest range tried, as a fraction of the full one. The best clipping point of a normal
/// sample lies near 1.5 standard deviations at two bits and near 2.5 at four, while the largest of
/// a group of 128 is near 2.7.
fn smallest_fraction(format: Format) -> f32 {
    match format.code_bits() {
        2 => 0.3,
        3 => 0.4,
        _ => 0.5,
    }
}

/// Chooses the scale and zero of one group of finite weights.
///
/// `importance` weights the squared errors of [`ScaleSearch::Mse`] (one non-negative value a
/// weight; all equal when absent). `tensor_scale` is as in [`Format::fit`].
///
/// # Errors
/// As [`Format::fit`].
pub fn fit_group(
    scheme: Scheme,
    group: &[f32],
    importance: Option<&[f32]>,
    tensor_scale: Option<f32>,
    search: ScaleSearch,
) -> Result<Group> {
    let format = scheme.format;
    if search == ScaleSearch::Range || format.code_bits() == 8 {
        return Ok(format.fit(group, tensor_scale)?);
    }
    match (format, importance) {
        (Format::Fp4E2m1, None) => Ok(fp4::fit_search(group)?),
        _ => search_ranges(format, group, importance, tensor_scale),
    }
}

/// Tries the groups that the format would choose for shrunken copies of the weights' range.
fn search_ranges(
    format: Format,
    group: &[f32],
    importance: Option<&[f32]>,
    tensor_scale: Option<f32>,
) -> Result<Group> {
    let mut best = format.fit(group, tensor_scale)?;
    if best.scale == 0.0 {
        return Ok(best);
    }
    let (min, max) = group.iter().fold((0.0f32, 0.0f32), |(min, max), &w| (min.min(w), max.max(w)));
    let mut least = squared_error(format, group, importance, &best);
    let mut previous = best;
    let step = (1.0 - smallest_fraction(format)) / f32::from(CANDIDATES - 1);
    for j in 1..CANDIDATES {
        let fraction = 1.0 - f32::from(j) * step;
        let candidate = format.fit(&[min * fraction, max * fraction], tensor_scale)?;
        // Coarse scale types (E4M3, E8M0) give the same group for several ranges.
        if candidate == previous {
            continue;
        }
        previous = candidate;
        let error = squared_error(format, group, importance, &candidate);
        if error < least {
            (least, best) = (error, candidate);
        }
    }
    Ok(best)
}

fn squared_error(format: Format, group: &[f32], importance: Option<&[f32]>, candidate: &Group) -> f64 {
    let error = |w: f32| {
        let decoded = format.dequantize(format.code(w, candidate), candidate);
        (f64::from(decoded) - f64::from(w)).powi(2)
    };
    match importance {
        None => group.iter().map(|&w| error(w)).sum(),
        Some(importance) => group.iter().zip(importance).map(|(&w, &weight)| error(w) * f64::from(weight)).sum(),
    }
}
