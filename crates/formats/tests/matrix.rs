//! The packed matrix: slots, tails, padding, edge cases of groups, and refused input.

mod common;

use common::{bits, encode_column};
use marlin_formats::{Format, FormatError, Group, QuantizedMatrix, Scheme};

/// Group size that every packing unit divides, unless the format fixes it.
fn scheme(format: Format) -> Scheme {
    match format {
        Format::Nvfp4 | Format::Mxfp4 => Scheme::with_default_group(format),
        _ => Scheme::new(format, 32).unwrap(),
    }
}

fn tensor_scale(format: Format) -> Option<f32> {
    (format == Format::Nvfp4).then_some(2.0)
}

/// A valid group with a scale of one half (for NVFP4 after the tensor scale of 2).
fn half_group(format: Format) -> Group {
    let scale_bits = match format {
        Format::Nvfp4 => 0x38,
        Format::Mxfp4 => 126,
        _ => 0x3800,
    };
    let zero_bits = if format.has_zeros() { 0x4500 } else { 0 };
    let group = format.group_from_bits(scale_bits, zero_bits, tensor_scale(format)).unwrap();
    assert_eq!((group.scale, group.zero), (0.5, if format.has_zeros() { 5.0 } else { 0.0 }));
    group
}

/// Words of one column with `code` at `k`, written out from the layout's description.
fn expected_words(format: Format, rows: usize, k: usize, code: u8) -> Vec<u32> {
    let mut words = vec![0u32; rows];
    let code = u32::from(code);
    match format.code_bits() {
        3 => {
            let (unit, i) = (k / 32, k % 32);
            words[3 * unit + i / 16] = (code & 3) << (2 * (i % 16));
            words[3 * unit + 2] = (code >> 2) << i;
        }
        b => {
            let per_word = 32 / b as usize;
            words[k / per_word] = code << (b as usize * (k % per_word));
        }
    }
    words
}

#[test]
fn every_code_of_every_format_in_every_slot() {
    let (k_total, n_total) = (64, 2);
    for format in Format::ENCODABLE {
        let scheme = scheme(format);
        let groups = vec![half_group(format); n_total * scheme.groups(k_total)];
        for code in 0..1u32 << format.code_bits() {
            let code = code as u8;
            for k in 0..k_total {
                let mut codes = vec![0u8; n_total * k_total];
                codes[k_total + k] = code;
                let scale = tensor_scale(format);
                let matrix = QuantizedMatrix::from_codes(scheme, k_total, n_total, &codes, &groups, scale).unwrap();
                let column: Vec<u32> = matrix.codes.iter().skip(1).step_by(2).copied().collect();
                assert_eq!(column, expected_words(format, column.len(), k, code));
                assert!(matrix.codes.iter().step_by(2).all(|&word| word == 0));
                assert_eq!(matrix.code(1, k), code);
                let mut row = vec![0.0; k_total];
                matrix.decode_row(1, &mut row).unwrap();
                let expected = format.dequantize(code, &groups[0]);
                assert!(row[k].to_bits() == expected.to_bits() || expected.is_nan());
                assert_eq!(row[k].is_nan(), expected.is_nan());
            }
        }
    }
}

#[test]
fn rows_columns_and_groups_are_not_mixed_up() {
    // Distinct scale and code for each (n, k); K has a short last group and a partial word.
    for format in Format::ENCODABLE {
        let scheme = scheme(format);
        let (n_total, k_total) = (3, 2 * scheme.group_size + 5);
        let group_count = scheme.groups(k_total);
        let limit = 1usize << format.code_bits();
        // FP8 codes stop short of the infinities and NaNs.
        let codes: Vec<u8> = (0..n_total * k_total).map(|i| (i * 7 % limit.min(120)) as u8).collect();
        let groups: Vec<Group> = (0..n_total * group_count)
            .map(|i| {
                let base = half_group(format);
                let (scale, zero) = (base.scale_bits + i as u16, base.zero_bits);
                format.group_from_bits(scale, zero, tensor_scale(format)).unwrap()
            })
            .collect();
        let scale = tensor_scale(format);
        let matrix = QuantizedMatrix::from_codes(scheme, k_total, n_total, &codes, &groups, scale).unwrap();
        assert_eq!(matrix.codes.len(), scheme.code_rows(k_total) * n_total);
        let dense = matrix.decode().unwrap();
        let mut row = vec![0.0; k_total];
        for n in 0..n_total {
            matrix.decode_row(n, &mut row).unwrap();
            assert_eq!(bits(&row), bits(&dense[n * k_total..][..k_total]));
            for g in 0..group_count {
                assert_eq!(matrix.group(n, g).unwrap(), groups[n * group_count + g]);
                assert_eq!(matrix.scales[g * n_total + n], groups[n * group_count + g].scale_bits);
            }
            for k in 0..k_total {
                let code = codes[n * k_total + k];
                assert_eq!(matrix.code(n, k), code);
                let group = &groups[n * group_count + k / scheme.group_size];
                assert_eq!(row[k].to_bits(), format.dequantize(code, group).to_bits());
            }
        }
    }
}

#[test]
fn tails_are_padded_with_zero_codes_that_readers_ignore() {
    for format in Format::ENCODABLE {
        for k_total in [1, 3, 5, 17, 31, 33, 47, 65] {
            let weights: Vec<f32> = (0..k_total).map(|k| (k as f32 * 0.7).sin() + 0.01).collect();
            let matrix = encode_column(format, scheme(format).group_size, &weights);
            let layout = format.layout();
            let padded = layout.rows(k_total) / layout.words_per_unit() * layout.codes_per_unit();
            let mut unpacked = vec![0xFF; padded];
            layout.load_column(&matrix.codes, 1, 0, &mut unpacked);
            assert!(unpacked[k_total..].iter().all(|&code| code == 0), "{format} {k_total}");

            let mut garbage = matrix.clone();
            unpacked[k_total..].fill(((1u32 << format.code_bits()) - 1) as u8);
            layout.store_column(&unpacked, &mut garbage.codes, 1, 0);
            assert_eq!(padded == k_total, garbage == matrix);
            assert_eq!(bits(&garbage.decode().unwrap()), bits(&matrix.decode().unwrap()));
            assert_eq!(common::codes(&garbage), common::codes(&matrix));
        }
    }
}

#[test]
fn the_last_group_uses_its_own_elements_only() {
    for format in Format::ENCODABLE {
        let group_size = scheme(format).group_size;
        let mut weights = vec![1000.0; group_size];
        weights.extend([0.25, -0.5, 0.125]);
        let matrix = encode_column(format, group_size, &weights);
        assert_eq!(matrix.scales.len(), 2);
        let alone = format.fit(&[0.25, -0.5, 0.125], matrix.tensor_scale).unwrap();
        assert_eq!(matrix.group(0, 1).unwrap(), alone);
    }
}

#[test]
fn a_group_size_above_k_gives_one_group() {
    let matrix = encode_column(Format::Int8, 4096, &[1.0, -2.0, 3.0, 4.0, 5.0]);
    assert_eq!((matrix.scales.len(), matrix.codes.len()), (1, 2));
}

/// The code of +0 of an all-zero group.
fn zero_code(format: Format) -> u8 {
    match format {
        Format::Int4S4 => 8,
        Format::Int3 => 4,
        Format::Int2 => 2,
        Format::Nf4 => 7,
        Format::Nf3 => 3,
        Format::Nf2 => 1,
        _ => 0,
    }
}

#[test]
fn all_zero_groups() {
    for format in Format::ENCODABLE {
        let weights = [0.0, -0.0, 0.0, -0.0, -0.0];
        let matrix = encode_column(format, scheme(format).group_size, &weights);
        assert_eq!(matrix.scales, [0], "{format}");
        assert!(matrix.zeros.iter().all(|&z| z == 0), "{format}");
        assert_eq!(common::codes(&matrix), [zero_code(format); 5], "{format}");
        assert!(matrix.decode().unwrap().iter().all(|&w| w == 0.0), "{format}");
        // A weight that a later update made nonzero still has no other code to go to.
        assert_eq!(format.code(3.0, &Group::ZERO), zero_code(format), "{format}");
    }
}

#[test]
fn readers_accept_any_scale_on_a_zero_group() {
    for format in Format::ENCODABLE {
        let scheme = scheme(format);
        let codes = vec![if format.has_zeros() { 5 } else { zero_code(format) }; 8];
        let scale = tensor_scale(format);
        let group = half_group(format);
        let matrix = QuantizedMatrix::from_codes(scheme, 8, 1, &codes, &[group], scale).unwrap();
        let symmetric_without_zero = matches!(format, Format::Int3 | Format::Int2 | Format::Nf3 | Format::Nf2);
        assert_eq!(matrix.decode().unwrap() == [0.0; 8], !symmetric_without_zero, "{format}");
    }
}

#[test]
fn negative_zero_next_to_other_weights() {
    for format in Format::ENCODABLE {
        let weights = [1.0, -0.0, 0.0, -1.0];
        let matrix = encode_column(format, scheme(format).group_size, &weights);
        let (negative, positive) = (matrix.code(0, 1), matrix.code(0, 2));
        let sign = match format {
            Format::Fp4E2m1 | Format::Nvfp4 | Format::Mxfp4 => 8,
            Format::Fp8E4m3 | Format::Fp8E5m2 => 0x80,
            _ => 0,
        };
        assert_eq!(negative, positive | sign, "{format}");
    }
}

/// Formats whose scale is an f16.
fn f16_formats() -> impl Iterator<Item = Format> {
    Format::ENCODABLE.into_iter().filter(|format| !matches!(format, Format::Nvfp4 | Format::Mxfp4))
}

#[test]
fn underflowing_scales_become_the_smallest_f16() {
    for format in f16_formats() {
        for amax in [1e-9f32, 1e-40, f32::from_bits(1)] {
            let group = format.fit(&[amax, -amax / 2.0], None).unwrap();
            assert_eq!((group.scale_bits, group.scale), (1, 2f32.powi(-24)), "{format} {amax}");
        }
        let matrix = encode_column(format, scheme(format).group_size, &[1e-9, 0.0]);
        assert_eq!(matrix.scales, [1]);
    }
}

#[test]
fn vector_8c_tiny_scales() {
    let row = [1e-6, -2e-6, 0.0, 5e-7, 3e-6, -1e-6, 2.5e-6, 0.0];
    let codes = |format: Format| {
        let group = format.fit(&row, None).unwrap();
        (group.scale_bits, row.map(|w| format.code(w, &group)))
    };
    let fp8 = [0x58, 0xE0, 0x00, 0x50, 0x65, 0xD8, 0x62, 0x00];
    assert_eq!(codes(Format::Fp8E4m3), (1, fp8));
    let int8 = [17i8, -34, 0, 8, 50, -17, 42, 0].map(|q| q as u8);
    assert_eq!(codes(Format::Int8), (1, int8));
    assert_eq!(codes(Format::Int4S4), (7, [10, 3, 8, 9, 15, 6, 14, 8]));
    assert_eq!(codes(Format::Fp4E2m1), (8, [4, 14, 0, 2, 7, 12, 7, 0]));
}

#[test]
fn vector_8a_row() {
    let row = [0.11, -2.3, 0.875, 4.1, -0.02, 1.6, -3.3, 0.0];
    let codes = |format: Format| {
        let group = format.fit(&row, None).unwrap();
        (group.scale_bits, row.map(|w| format.code(w, &group)))
    };
    let fp8 = [0x54, 0xF8, 0x6C, 0x7E, 0xC1, 0x73, 0xFB, 0x00];
    assert_eq!(codes(Format::Fp8E4m3), (0x20B0, fp8));
    let int8 = [3i8, -71, 27, 127, -1, 50, -102, 0].map(|q| q as u8);
    assert_eq!(codes(Format::Int8), (0x2822, int8));
    assert_eq!(codes(Format::Int4S4), (0x38B0, [8, 4, 9, 15, 8, 11, 2, 8]));
    assert_eq!(codes(Format::Fp4E2m1), (0x3977, [0, 13, 3, 7, 8, 4, 14, 0]));
}

#[test]
fn overflowing_scales_are_refused_with_their_group() {
    for format in f16_formats() {
        // 65520 is the first value that rounds to infinity in f16.
        let levels = match format {
            Format::Fp4E2m1 => 6.0,
            Format::Int4U4 => 15.0,
            Format::Int4S4 => 7.0,
            Format::Int8 => 127.0,
            Format::Int8Asym => 255.0,
            Format::Fp8E4m3 | Format::Fp8E5m2 => 448.0,
            Format::Int3 => 3.5,
            Format::Int2 => 1.5,
            _ => 1.0,
        };
        let largest = format.fit(&[65519.0 * levels], None).unwrap();
        assert_eq!(largest.scale, 65504.0, "{format}");
        let overflow = format.fit(&[0.0, 65521.0 * levels], None);
        assert!(matches!(overflow, Err(FormatError::ScaleOverflow { .. })), "{format}");

        let scheme = scheme(format);
        let k = scheme.group_size + 1;
        let mut weights = vec![0.5; 2 * k];
        weights[2 * k - 1] = 65521.0 * levels;
        match QuantizedMatrix::encode(scheme, &weights, 2, k) {
            Err(FormatError::InGroup { n: 1, g: 1, source }) => {
                assert!(matches!(*source, FormatError::ScaleOverflow { .. }), "{format}");
            }
            other => panic!("{format}: {other:?}"),
        }
    }
    // An asymmetric range that overflows f32 itself.
    let range = Format::Int4U4.fit(&[f32::MAX, -f32::MAX], None);
    assert!(matches!(range, Err(FormatError::ScaleOverflow { .. })));
}

#[test]
fn non_finite_weights_are_refused_with_their_index() {
    for format in Format::ENCODABLE {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = vec![0.5; 3 * 40];
            weights[2 * 40 + 33] = bad;
            match QuantizedMatrix::encode(scheme(format), &weights, 3, 40) {
                Err(FormatError::NonFiniteWeight { n: 2, k: 33, value }) => {
                    assert_eq!(value.to_bits(), bad.to_bits());
                }
                other => panic!("{format}: {other:?}"),
            }
            let fit = format.fit(&[1.0, bad], tensor_scale(format));
            assert!(matches!(fit, Err(FormatError::NonFinite { index: 1, .. })), "{format}");
        }
    }
    let error = QuantizedMatrix::encode(scheme(Format::Nf4), &[0.0, f32::NAN], 1, 2).unwrap_err();
    assert_eq!(error.to_string(), "weight[0, 1] is NaN; weights must be finite");
}

#[test]
fn invalid_scales_are_refused_wherever_they_are_read() {
    for format in Format::ENCODABLE {
        let scheme = scheme(format);
        let k = scheme.group_size + 1;
        let good = QuantizedMatrix::encode(scheme, &vec![0.5; 3 * k], 3, k).unwrap();
        let bad_bits: &[u16] = match format {
            Format::Nvfp4 => &[0x7F, 0x80, 0xB8, 0xFF, 0x138],
            Format::Mxfp4 => &[0xFF, 0x17F],
            _ => &[0x7C00, 0xFC00, 0x7E00, 0xFE01],
        };
        for &scale_bits in bad_bits {
            let mut bad = good.clone();
            // Group 1 of output feature 2.
            bad.scales[3 + 2] = scale_bits;
            let kind = format.scale_kind().name();
            let source = Box::new(FormatError::InvalidScale { bits: scale_bits, kind });
            let error = Err(FormatError::InGroup { n: 2, g: 1, source });
            assert_eq!(bad.validate(), error, "{format}");
            assert_eq!(bad.decode().map(drop), error);
            assert_eq!(bad.group(2, 1).map(drop), error);
            assert_eq!(bad.decode_row(2, &mut vec![0.0; k]), error);
            bad.decode_row(1, &mut vec![0.0; k]).unwrap();
        }
    }
}

#[test]
fn invalid_zeros_are_refused() {
    for format in [Format::Int4U4, Format::Int8Asym] {
        let mut matrix = encode_column(format, 8, &[0.5, -0.5]);
        matrix.zeros[0] = 0x7C00;
        let source = Box::new(FormatError::InvalidZero { bits: 0x7C00 });
        assert_eq!(matrix.validate(), Err(FormatError::InGroup { n: 0, g: 0, source }));
    }
}

#[test]
fn wrong_lengths_shapes_and_indices_are_refused() {
    let scheme = scheme(Format::Int4U4);
    let good = QuantizedMatrix::encode(scheme, &[0.5; 80], 2, 40).unwrap();
    let length = |what, expected, found| Err(FormatError::Length { what, expected, found });
    for (change, what, expected, found) in [
        ((|m| m.codes.push(0)) as fn(&mut QuantizedMatrix), "codes", 10, 11),
        (|m| m.scales.truncate(3), "scales", 4, 3),
        (|m| m.zeros.clear(), "zeros", 4, 0),
    ] {
        let mut bad = good.clone();
        change(&mut bad);
        assert_eq!(bad.validate(), length(what, expected, found));
        assert_eq!(bad.decode().map(drop), length(what, expected, found));
        assert_eq!(bad.decode_row(0, &mut [0.0; 40]), length(what, expected, found));
        assert_eq!(bad.group(0, 0).map(drop), length(what, expected, found));
    }
    let mut bad = good.clone();
    bad.scheme.group_size = 12;
    assert!(matches!(bad.validate(), Err(FormatError::GroupSize { .. })));

    assert_eq!(QuantizedMatrix::encode(scheme, &[0.5; 79], 2, 40).map(drop), length("weight", 80, 79));
    assert_eq!(good.decode_row(0, &mut [0.0; 39]), length("out", 40, 39));
    let index = |what, index, count| Err(FormatError::Index { what, index, count });
    assert_eq!(good.decode_row(2, &mut [0.0; 40]), index("out_features", 2, 2));
    assert_eq!(good.group(2, 0).map(drop), index("out_features", 2, 2));
    assert_eq!(good.group(0, 2).map(drop), index("groups", 2, 2));
    for (n, k) in [(0, 4), (4, 0), (usize::MAX, 4), (usize::MAX, usize::MAX)] {
        let error = FormatError::Shape { out_features: n, in_features: k };
        assert_eq!(QuantizedMatrix::encode(scheme, &[], n, k), Err(error));
    }
}

#[test]
fn from_codes_refuses_what_it_cannot_store() {
    let scheme = scheme(Format::Int3);
    let group = half_group(Format::Int3);
    let build = |codes: &[u8], groups: &[Group], scale| {
        QuantizedMatrix::from_codes(scheme, 3, 2, codes, groups, scale).map(drop)
    };
    assert_eq!(build(&[0; 6], &[group; 2], None), Ok(()));
    assert_eq!(
        build(&[0, 0, 0, 0, 0, 8], &[group; 2], None),
        Err(FormatError::CodeOutOfRange { n: 1, k: 2, code: 8, bits: 3 })
    );
    assert_eq!(build(&[0; 5], &[group; 2], None), Err(FormatError::Length { what: "codes", expected: 6, found: 5 }));
    assert_eq!(build(&[0; 6], &[group], None), Err(FormatError::Length { what: "groups", expected: 2, found: 1 }));
    assert!(matches!(build(&[0; 6], &[group; 2], Some(1.0)), Err(FormatError::UnexpectedTensorScale { .. })));
    let infinite = Group { scale_bits: 0x7C00, ..group };
    assert!(matches!(build(&[0; 6], &[group, infinite], None), Err(FormatError::InGroup { n: 1, g: 0, .. })));
    let missing = QuantizedMatrix::from_codes(
        Scheme::with_default_group(Format::Nvfp4),
        3,
        1,
        &[0; 3],
        &[half_group(Format::Nvfp4)],
        None,
    );
    assert_eq!(missing, Err(FormatError::MissingTensorScale { format: Format::Nvfp4 }));
}

#[test]
fn the_tensor_scale_covers_the_whole_matrix() {
    let mut weights = vec![0.25; 2 * 32];
    weights[40] = -5.25;
    let scheme = Scheme::with_default_group(Format::Nvfp4);
    let matrix = QuantizedMatrix::encode(scheme, &weights, 2, 32).unwrap();
    assert_eq!(matrix.tensor_scale, Some(512.0));
    assert_eq!(matrix.group(1, 0).unwrap().scale_bits, 0x7E);
    let zero = QuantizedMatrix::encode(scheme, &[0.0; 64], 2, 32).unwrap();
    assert_eq!(zero.tensor_scale, Some(1.0));
}
