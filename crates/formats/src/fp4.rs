//! E2M1, the four-bit float `s e e m` of OCP Microscaling (exponent bias 1, no Inf, no NaN).

use crate::{Format, FormatError, Group};

/// The value of each code; codes 8..=15 are the negatives of 0..=7 and code 8 is -0.0.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Largest finite magnitude.
pub const MAX: f32 = 6.0;

/// Candidate scales of [`fit_search`].
const SEARCH_CANDIDATES: u8 = 40;

/// The nearest code, ties to the even code, magnitudes above 6 saturated, sign of -0.0 kept.
///
/// NaN has no code and gives 0.
#[inline]
pub fn encode(t: f32) -> u8 {
    if t.is_nan() {
        return 0;
    }
    let a = t.abs();
    // Each boundary belongs to the even neighbour, hence the alternating comparison.
    let magnitude = u8::from(a > 0.25)
        + u8::from(a >= 0.75)
        + u8::from(a > 1.25)
        + u8::from(a >= 1.75)
        + u8::from(a > 2.5)
        + u8::from(a >= 3.5)
        + u8::from(a > 5.0);
    magnitude | ((t.to_bits() >> 28) as u8 & 8)
}

/// The value of a code; only the low four bits are looked at.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[usize::from(code & 15)]
}

/// The f16 scale with the smallest squared error among 40 candidates
/// `f16(amax/6 * (1 - j/80))`, the largest on a tie.
///
/// # Errors
/// As [`Format::fit`] for [`Format::Fp4E2m1`].
pub fn fit_search(group: &[f32]) -> Result<Group, FormatError> {
    let format = Format::Fp4E2m1;
    let mut best = format.fit(group, None)?;
    let ideal = group.iter().fold(0.0f32, |amax, w| amax.max(w.abs())) / MAX;
    let mut least = squared_error(format, group, &best);
    for j in 1..SEARCH_CANDIDATES {
        let candidate = Group::from_ideal_f16_scale(ideal * (1.0 - f32::from(j) / 80.0))?;
        let error = squared_error(format, group, &candidate);
        if error < least {
            (least, best) = (error, candidate);
        }
    }
    Ok(best)
}

fn squared_error(format: Format, group: &[f32], candidate: &Group) -> f64 {
    group
        .iter()
        .map(|&w| {
            let decoded = format.dequantize(format.code(w, candidate), candidate);
            (f64::from(decoded) - f64::from(w)).powi(2)
        })
        .sum()
}
