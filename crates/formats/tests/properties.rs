//! Properties that every format keeps for arbitrary weights and codes.

mod common;

use common::bits;
use marlin_formats::{Format, Group, QuantizedMatrix, Scheme};
use proptest::prelude::*;

fn any_format() -> impl Strategy<Value = Format> {
    prop::sample::select(Format::ENCODABLE.to_vec())
}

fn any_scheme() -> impl Strategy<Value = Scheme> {
    (any_format(), 1usize..4).prop_map(|(format, units)| match format {
        Format::Nvfp4 | Format::Mxfp4 => Scheme::with_default_group(format),
        _ => Scheme::new(format, 32 * units).unwrap(),
    })
}

/// Weights across twelve binades with zeros of both signs; the first fixes the range.
fn weights(count: usize) -> impl Strategy<Value = Vec<f32>> {
    let weight = prop_oneof![
        8 => -1f32..1.0,
        4 => (-1f32..1.0, -12i32..0).prop_map(|(m, e)| m * 2f32.powi(e)),
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
    ];
    (prop::collection::vec(weight, count), prop_oneof![Just(1f32), 4f32..500.0]).prop_map(|(mut weights, gain)| {
        weights.iter_mut().for_each(|w| *w *= gain);
        weights
    })
}

fn any_matrix() -> impl Strategy<Value = (Scheme, usize, usize, Vec<f32>)> {
    (any_scheme(), 1usize..4, 1usize..140)
        .prop_flat_map(|(scheme, n, k)| (Just(scheme), Just(n), Just(k), weights(n * k)))
}

/// The values a writer emits, ascending, written out per format.
fn levels(format: Format) -> Vec<f32> {
    let grid = |from: i32, to: i32, shift: f32| (from..=to).map(|q| q as f32 + shift).collect();
    let signed = |positive: Vec<f32>| {
        let negative = positive.iter().rev().map(|v| -v);
        negative.chain([0.0]).chain(positive.iter().copied()).collect()
    };
    let float = |mantissa: u32, bias: i32, count: u32| {
        let steps = 1u32 << mantissa;
        let value = |code: u32| {
            let (e, m) = ((code / steps) as i32, (code % steps) as f32);
            let fraction = m / steps as f32 + f32::from(u8::from(e > 0));
            fraction * 2f32.powi(e.max(1) - bias)
        };
        signed((1..=count).map(value).collect())
    };
    match format {
        Format::Fp4E2m1 | Format::Nvfp4 | Format::Mxfp4 => float(1, 1, 7),
        Format::Fp8E4m3 => float(3, 7, 0x7E),
        Format::Fp8E5m2 => float(2, 15, 0x7B),
        Format::Int4S4 => grid(-8, 7, 0.0),
        Format::Int4U4 => grid(0, 15, 0.0),
        Format::Int8 => grid(-127, 127, 0.0),
        Format::Int8Asym => grid(0, 255, 0.0),
        Format::Int3 => grid(-4, 3, 0.5),
        Format::Int2 => grid(-2, 1, 0.5),
        Format::Nf4 => marlin_formats::normal_float::NF4.to_vec(),
        Format::Nf3 => marlin_formats::normal_float::NF3.to_vec(),
        Format::Nf2 => marlin_formats::normal_float::NF2.to_vec(),
        _ => unreachable!("{format} is not written"),
    }
}

/// Half of the largest gap between levels, and the magnitude up to which no weight is clipped.
///
/// The gaps: E2M1 4..6; S4, U4, INT8, INT3, INT2 1; E4M3 416..448; E5M2 384..448; NF4
/// -1..-0.69619; NF3 0.57828..1; NF2 0.27699..1. For the asymmetric formats the second number is
/// the distance between the ends of the grid.
fn half_gap_and_reach(format: Format) -> (f32, f32) {
    match format {
        Format::Fp4E2m1 | Format::Nvfp4 | Format::Mxfp4 => (1.0, 6.0),
        Format::Int4S4 => (0.5, 7.0),
        Format::Int4U4 => (0.5, 15.0),
        Format::Int8 => (0.5, 127.0),
        Format::Int8Asym => (0.5, 255.0),
        Format::Fp8E4m3 => (16.0, 448.0),
        Format::Fp8E5m2 => (32.0, 448.0),
        Format::Int3 => (0.5, 3.5),
        Format::Int2 => (0.5, 1.5),
        Format::Nf4 => (0.151_904, 1.0),
        Format::Nf3 => (0.210_862, 1.0),
        Format::Nf2 => (0.361_504, 1.0),
        _ => unreachable!("{format} is not written"),
    }
}

/// The most by which a group may exceed the reach of its grid, relative to the grid's reach.
///
/// An f16 scale in the normal range is within 2^-11 of the ideal one. An E4M3 scale is within
/// 2^-4. The MXFP4 rule keeps amax below 7 steps of a grid that ends at 6.
fn clip_allowance(format: Format) -> f32 {
    match format {
        Format::Nvfp4 => 1.0 / 16.0,
        Format::Mxfp4 => 1.0 / 6.0,
        _ => 1.0 / 2048.0,
    }
}

/// Amax of the group, or its range for the asymmetric formats.
fn extent(format: Format, group: &[f32]) -> f32 {
    let max = group.iter().fold(0f32, |a, &w| a.max(w));
    let min = group.iter().fold(0f32, |a, &w| a.min(w));
    if format.has_zeros() { max - min } else { max.max(-min) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn packing_round_trips(
        (scheme, n_total, k_total, raw) in (any_scheme(), 1usize..5, 1usize..140).prop_flat_map(
            |(scheme, n, k)| (Just(scheme), Just(n), Just(k), prop::collection::vec(0u8.., n * k)),
        )
    ) {
        let mask = ((1u32 << scheme.format.code_bits()) - 1) as u8;
        let codes: Vec<u8> = raw.iter().map(|code| code & mask).collect();
        let groups = vec![Group::ZERO; n_total * scheme.groups(k_total)];
        let tensor_scale = scheme.tensor_scale(1.0);
        let matrix = QuantizedMatrix::from_codes(
            scheme, k_total, n_total, &codes, &groups, tensor_scale,
        ).unwrap();
        let mut column = vec![0; k_total];
        for (n, expected) in codes.chunks(k_total).enumerate() {
            scheme.format.layout().load_column(&matrix.codes, n_total, n, &mut column);
            prop_assert_eq!(&column, expected);
            for (k, &code) in expected.iter().enumerate() {
                prop_assert_eq!(matrix.code(n, k), code);
            }
        }
    }

    #[test]
    fn requantizing_with_the_same_scales_changes_nothing(
        (scheme, n_total, k_total, weight) in any_matrix()
    ) {
        let matrix = QuantizedMatrix::encode(scheme, &weight, n_total, k_total).unwrap();
        matrix.validate().unwrap();
        let dense = matrix.decode().unwrap();
        for n in 0..n_total {
            for k in 0..k_total {
                let group = matrix.group(n, k / scheme.group_size).unwrap();
                let code = matrix.code(n, k);
                let again = scheme.code(dense[n * k_total + k], &group);
                // A group of scale 0 always decodes to zeros, whatever its codes.
                prop_assert_eq!(again, code, "{} at {},{}", scheme.format, n, k);
            }
        }
    }

    #[test]
    fn the_matrix_encoder_is_fit_and_code(
        (scheme, n_total, k_total, weight) in any_matrix()
    ) {
        let matrix = QuantizedMatrix::encode(scheme, &weight, n_total, k_total).unwrap();
        let amax = weight.iter().fold(0f32, |a, w| a.max(w.abs()));
        let tensor_scale = scheme.tensor_scale(amax);
        prop_assert_eq!(matrix.tensor_scale, tensor_scale);
        let (mut codes, mut groups) = (Vec::new(), Vec::new());
        for group in weight.chunks(k_total).flat_map(|row| row.chunks(scheme.group_size)) {
            let fitted = scheme.fit(group, tensor_scale).unwrap();
            codes.extend(group.iter().map(|&w| scheme.code(w, &fitted)));
            groups.push(fitted);
        }
        let rebuilt = QuantizedMatrix::from_codes(
            scheme, k_total, n_total, &codes, &groups, tensor_scale,
        ).unwrap();
        prop_assert_eq!(&rebuilt, &matrix);
        let dense: Vec<f32> = codes.chunks(k_total).zip(groups.chunks(scheme.groups(k_total)))
            .flat_map(|(row, groups)| {
                row.chunks(scheme.group_size).zip(groups).flat_map(|(codes, group)| {
                    codes.iter().map(|&code| scheme.dequantize(code, group))
                })
            })
            .collect();
        prop_assert_eq!(bits(&matrix.decode().unwrap()), bits(&dense));
    }

    #[test]
    fn codes_are_nearest_levels(format in any_format(), group in weights(32)) {
        let tensor_scale = format.tensor_scale(group.iter().fold(0f32, |a, w| a.max(w.abs())));
        let fitted = format.fit(&group, tensor_scale).unwrap();
        prop_assume!(fitted.scale > 0.0);
        let levels = levels(format);
        for &w in &group {
            let decoded = f64::from(format.dequantize(format.code(w, &fitted), &fitted));
            let nearest = levels
                .iter()
                .map(|&level| f64::from(level - fitted.zero) * f64::from(fitted.scale))
                .map(|value| (value - f64::from(w)).abs())
                .fold(f64::INFINITY, f64::min);
            // Slack for the f32 rounding of the quotient and of the product.
            let slack = 1e-6 * (f64::from(w).abs() + f64::from(fitted.scale));
            prop_assert!((decoded - f64::from(w)).abs() <= nearest + slack, "{} {}", format, w);
        }
    }

    #[test]
    fn values_are_ordered_as_the_weights(format in any_format(), group in weights(32)) {
        let tensor_scale = format.tensor_scale(group.iter().fold(0f32, |a, w| a.max(w.abs())));
        let fitted = format.fit(&group, tensor_scale).unwrap();
        let mut sorted = group;
        sorted.sort_by(f32::total_cmp);
        let values: Vec<f32> = sorted
            .iter()
            .map(|&w| format.value(format.code(w, &fitted), fitted.zero))
            .collect();
        prop_assert!(values.is_sorted(), "{}: {:?} -> {:?}", format, sorted, values);
    }

    #[test]
    fn errors_stay_within_half_a_gap_and_the_clipped_part(
        format in any_format(), group in weights(32)
    ) {
        let amax = group.iter().fold(0f32, |a, w| a.max(w.abs()));
        let tensor_scale = format.tensor_scale(amax);
        let fitted = format.fit(&group, tensor_scale).unwrap();
        let extent = extent(format, &group);
        let (half_gap, reach) = half_gap_and_reach(format);
        let ideal = extent / reach;
        // f16 scales of subnormal size are rounded more coarsely; the fixed vectors cover them.
        prop_assume!(format == Format::Nvfp4 || ideal > 2f32.powi(-14));
        prop_assume!(format != Format::Nvfp4 || ideal * tensor_scale.unwrap_or(1.0) > 2f32.powi(-6));
        let clipped = (extent - reach * fitted.scale).max(0.0);
        prop_assert!(clipped <= clip_allowance(format) * reach * fitted.scale * 1.001,
            "{}: scale {} for ideal {}", format, fitted.scale, ideal);
        // Nor may the grid reach further than the same allowance (MXFP4: less than one binade).
        let wide = if format == Format::Mxfp4 { 6.0 / 3.5 } else { 1.0 + clip_allowance(format) };
        prop_assert!(fitted.scale <= ideal * wide * 1.001, "{}", format);
        // Inside the grid a weight is at most half a gap from a level; outside, it is off by what
        // is clipped. Rounding the zero moves an asymmetric grid by up to half a step, so that a
        // weight at its end is up to half a step beyond the last level, as inside, plus the clip.
        let bound = if format.has_zeros() {
            half_gap * fitted.scale + clipped
        } else {
            (half_gap * fitted.scale).max(clipped)
        };
        for &w in &group {
            let error = (format.dequantize(format.code(w, &fitted), &fitted) - w).abs();
            prop_assert!(error <= bound + 1e-6 * extent, "{} {}: {} > {}", format, w, error, bound);
        }
    }

    #[test]
    fn stored_bits_read_back_as_the_fitted_group(format in any_format(), group in weights(32)) {
        let tensor_scale = format.tensor_scale(group.iter().fold(0f32, |a, w| a.max(w.abs())));
        let fitted = format.fit(&group, tensor_scale).unwrap();
        let read = format
            .group_from_bits(fitted.scale_bits, fitted.zero_bits, tensor_scale)
            .unwrap();
        if format == Format::Mxfp4 && group.iter().all(|&w| w == 0.0) {
            // Byte 0 is 2^-127; only the writer knows that the group is zero.
            prop_assert_eq!((fitted.scale, read.scale), (0.0, 2f32.powi(-127)));
        } else {
            prop_assert_eq!(read, fitted);
        }
    }
}
