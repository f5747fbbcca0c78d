//! Activations as int8 for dot-product instructions: what the fast CPU mode rounds for formats of integer codes,
//! defined once for its kernels and for the oracle. What its kernels of EXL3 weights round is theirs: it stays within
//! the tolerance of that format, and the oracle knows nothing of it.

use marlin_formats::{Levels, Scheme};

/// Consecutive channels that share one activation scale.
pub const ACTIVATION_BLOCK: usize = 32;

/// Quantizes one block of at most [`ACTIVATION_BLOCK`] values symmetrically: `scale = amax / 127`,
/// `code = rint(x * (127 / amax))`, both in f32. Returns the scale: 0 for an all-zero block, NaN when a value is not
/// finite, so that it reaches the output.
pub fn quantize_activation_block(x: &[f32], codes: &mut [i8]) -> f32 {
    let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if amax == 0.0 && !x.iter().any(|v| v.is_nan()) {
        codes[..x.len()].fill(0);
        return 0.0;
    }
    if !x.iter().all(|v| v.is_finite()) {
        codes[..x.len()].fill(0);
        return f32::NAN;
    }
    let inverse = 127.0 / amax;
    for (code, v) in codes.iter_mut().zip(x) {
        *code = (v * inverse).round_ties_even() as i8;
    }
    amax / 127.0
}

/// True for the schemes whose levels are small integers (times a constant), which the fast mode multiplies with int8
/// activations, in groups of whole blocks, or of half a block where the format fixes them; all other schemes take f32
/// activations in both modes.
pub fn takes_int8_activations(scheme: &Scheme) -> bool {
    let integer_codes = match scheme.format.levels() {
        Levels::E2m1 | Levels::Signed8 | Levels::Minus { .. } => true,
        Levels::E4m3 | Levels::E5m2 => false,
        Levels::Table(levels) => levels.iter().all(|level| level.fract() == 0.0),
    };
    let half_blocks = scheme.format.fixed_group_size() == Some(ACTIVATION_BLOCK / 2);
    integer_codes && (scheme.group_size.is_multiple_of(ACTIVATION_BLOCK) || half_blocks)
}

#[cfg(test)]
mod tests {
    use marlin_formats::Format;

    use super::*;

    #[test]
    fn integer_levels_take_int8_activations() {
        let takes = |format, group_size| takes_int8_activations(&Scheme::new(format, group_size).unwrap());
        for format in Format::ALL {
            let floats = matches!(format, Format::Fp8E4m3 | Format::Fp8E5m2 | Format::Fp8E4m3F32);
            let table = matches!(format, Format::Nf4 | Format::Nf3 | Format::Nf2);
            assert_eq!(takes(format, format.default_group_size()), !floats && !table, "{format}");
        }
        assert!(!takes(Format::Int4S4, 16) && !takes(Format::Affine4, 48) && takes(Format::Affine4, 96));
    }

    #[test]
    fn block_codes() {
        let mut codes = [9i8; 5];
        let scale = quantize_activation_block(&[1.0, -2.0, 0.5, 0.0, 1.984], &mut codes);
        assert_eq!(scale, 2.0 / 127.0);
        assert_eq!(codes, [64, -127, 32, 0, 126]);
        assert_eq!(quantize_activation_block(&[0.0, -0.0], &mut codes), 0.0);
        assert_eq!(codes[..2], [0, 0]);
        assert!(quantize_activation_block(&[1.0, f32::NAN], &mut codes).is_nan());
        assert!(quantize_activation_block(&[f32::INFINITY, 1.0], &mut codes).is_nan());
    }
}
