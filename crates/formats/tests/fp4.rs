//! FP4 (E2M1), NVFP4 and MXFP4: element codes, scales and the vectors of the format document.
// Expected values are written with every digit of their exact decimal expansion.
#![allow(clippy::excessive_precision)]

mod common;

use common::{bits, bytes, codes, encode_column, f16_bits, group_with_scale};
use marlin_formats::e8m0::{self, ScaleRule};
use marlin_formats::{Format, FormatError, Group, fp4};

const WEIGHTS_1B: [f32; 8] = [0.02, -0.5, 0.26, 1.0, -1.3, 3.0, -6.0, 0.0];

#[test]
fn every_code_has_its_value() {
    let expected: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    assert_eq!(bits(&fp4::VALUES), bits(&expected));
    assert_eq!(fp4::MAX, 6.0);
    for code in 0..16u8 {
        let value = expected[usize::from(code)];
        assert_eq!(fp4::decode(code).to_bits(), value.to_bits());
        assert_eq!(fp4::encode(value), code);
        for format in [Format::Fp4E2m1, Format::Nvfp4, Format::Mxfp4] {
            assert_eq!(format.value(code, 0.0).to_bits(), value.to_bits());
        }
    }
}

#[test]
fn decoding_equals_the_f16_bit_trick() {
    for code in 0..16u16 {
        let h = half::f16::from_bits((code & 8) << 12 | (code & 7) << 9);
        assert_eq!(fp4::decode(code as u8).to_bits(), (h.to_f32() * 16384.0).to_bits());
    }
}

#[test]
fn vector_1a_ties_to_even_and_saturation() {
    let cases = [
        (0.25, 0),
        (0.2500001, 1),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (5.0001, 7),
        (7.0, 7),
        (1e9, 7),
        (-0.25, 8),
        (-0.1, 8),
        (-0.0, 8),
        (f32::INFINITY, 7),
        (f32::NEG_INFINITY, 15),
        (f32::NAN, 0),
        (-f32::NAN, 0),
    ];
    for (t, code) in cases {
        assert_eq!(fp4::encode(t), code, "{t}");
    }
}

#[test]
fn both_sides_of_every_boundary() {
    let boundaries = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    for (lower, boundary) in (0u8..).zip(boundaries) {
        assert_eq!(fp4::encode(boundary.next_down()), lower);
        assert_eq!(fp4::encode(boundary.next_up()), lower + 1);
        assert_eq!(fp4::encode(-boundary.next_down()), lower | 8);
        assert_eq!(fp4::encode(-boundary.next_up()), (lower + 1) | 8);
    }
}

#[test]
fn vector_1b() {
    let matrix = encode_column(Format::Fp4E2m1, 8, &WEIGHTS_1B);
    assert_eq!(matrix.scales, [0x3C00]);
    assert_eq!(codes(&matrix), [0, 9, 1, 2, 11, 5, 15, 0]);
    assert_eq!(matrix.codes, [0x0F5B_2190]);
    assert_eq!(matrix.decode().unwrap(), [0.0, -0.5, 0.5, 1.0, -1.5, 3.0, -6.0, 0.0]);
    assert!(matrix.zeros.is_empty());
    assert_eq!(matrix.tensor_scale, None);
}

#[test]
fn vector_1c() {
    let weights = [0.013, -0.004, 0.031, -0.027, 0.009, 0.0021, -0.0188, 0.0245];
    let matrix = encode_column(Format::Fp4E2m1, 8, &weights);
    assert_eq!(matrix.scales, [0x1D4A]);
    assert_eq!(matrix.group(0, 0).unwrap().scale, 0.00516510009765625);
    assert_eq!(codes(&matrix), [5, 10, 7, 15, 3, 1, 14, 6]);
    assert_eq!(matrix.codes, [0x6E13_F7A5]);
    assert_eq!(f16_bits(&matrix.decode().unwrap()), [0x23EF, 0x9D4A, 0x27EF, 0xA7EF, 0x1FEF, 0x194A, 0xA54A, 0x254A]);
}

#[test]
fn vector_1g_short_tail_and_negative_zero() {
    let mut weights = WEIGHTS_1B.to_vec();
    weights.extend([0.75, -1.5, 0.3, -0.0]);
    let matrix = encode_column(Format::Fp4E2m1, 8, &weights);
    assert_eq!(matrix.scales, [0x3C00, 0x3400]);
    assert_eq!(codes(&matrix)[8..], [5, 15, 2, 8]);
    assert_eq!(matrix.codes, [0x0F5B_2190, 0x0000_82F5]);
    assert_eq!(bits(&matrix.decode().unwrap()[8..]), bits(&[0.75, -1.5, 0.25, -0.0]));
}

#[test]
fn fp4_scale_search_keeps_the_best_of_forty() {
    // Every candidate checked by brute force with the document's formula.
    let mut state = 7u32;
    let mut below_the_default = 0;
    for _ in 0..20 {
        let group: Vec<f32> = (0..32)
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 8) as f32 / 8388608.0 - 1.0
            })
            .collect();
        let amax = group.iter().fold(0.0f32, |a, w| a.max(w.abs()));
        let mut best = (f64::INFINITY, 0);
        for j in 0..40u8 {
            let scale = half::f16::from_f32(amax / 6.0 * (1.0 - f32::from(j) / 80.0));
            let decoded = |w: f32| fp4::decode(fp4::encode(w / scale.to_f32())) * scale.to_f32();
            let error: f64 = group.iter().map(|&w| (f64::from(decoded(w)) - f64::from(w)).powi(2)).sum();
            if error < best.0 {
                best = (error, scale.to_bits());
            }
        }
        assert_eq!(fp4::fit_search(&group).unwrap().scale_bits, best.1);
        let default = Format::Fp4E2m1.fit(&group, None).unwrap();
        below_the_default += usize::from(best.1 < default.scale_bits);
    }
    assert!(below_the_default > 5, "{below_the_default}");
}

#[test]
fn fp4_scale_search_reaches_the_last_candidate_and_no_further() {
    // Candidate 39 scales by 41/80; a weight set on that grid, clipped at 6, is its optimum:
    // many exact small weights outvote one clipped large weight.
    let scale = half::f16::from_f32(1.0 - 39.0 / 80.0).to_f32();
    let mut group = vec![6.0f32];
    group.extend(std::iter::repeat_n([0.5, 1.5, 3.0].map(|v| v * scale), 4000).flatten());
    assert_eq!(fp4::fit_search(&group).unwrap().scale, scale);
    let below = half::f16::from_f32(1.0 - 41.0 / 80.0).to_f32();
    let mut group = vec![6.0f32];
    group.extend(std::iter::repeat_n([0.5, 1.5, 3.0].map(|v| v * below), 4000).flatten());
    assert!(fp4::fit_search(&group).unwrap().scale >= scale);
}

#[test]
fn fp4_scale_search_ties_go_to_the_largest_scale() {
    // With one weight every candidate that represents it exactly ties; j = 0 is among them.
    assert_eq!(fp4::fit_search(&[6.0]).unwrap().scale_bits, 0x3C00);
    assert_eq!(fp4::fit_search(&[0.0, -0.0]).unwrap(), Group::ZERO);
    assert_eq!(fp4::fit_search(&[1e-9]).unwrap().scale_bits, 1);
    assert!(matches!(fp4::fit_search(&[f32::NAN]), Err(FormatError::NonFinite { index: 0, .. })));
}

const BLOCK_1D: [f32; 16] =
    [0.9, -0.31, 0.07, -1.8, 0.5, 0.0, -0.05, 1.2, 2.4, -0.6, 0.33, -0.12, 0.011, -2.1, 0.75, 0.2];
const CODES_1D: [u8; 16] = [4, 10, 0, 14, 3, 0, 8, 5, 7, 11, 2, 9, 0, 15, 4, 1];
const BYTES_1D: [u8; 8] = [0xA4, 0xE0, 0x03, 0x58, 0xB7, 0x92, 0xF0, 0x14];

#[test]
fn vector_1d_nvfp4_compressed_tensors_scale() {
    // The tensor maximum 4.0 lies in a second block.
    let mut weights = BLOCK_1D.to_vec();
    weights.extend([4.0; 16]);
    let matrix = encode_column(Format::Nvfp4, 16, &weights);
    assert_eq!(matrix.tensor_scale, Some(672.0));
    assert_eq!(matrix.scales, [0x78, 0x7E]);
    assert_eq!(matrix.group(0, 0).unwrap().scale, 0.380952388048172);
    assert_eq!(codes(&matrix)[..16], CODES_1D);
    assert_eq!(bytes(&matrix)[..8], BYTES_1D);
    let expected: [f32; 4] = [0.761_904_8, -0.380_952_39, 0.0, -1.523_809_6];
    assert_eq!(matrix.decode().unwrap()[..4], expected);
    assert_eq!((4.0f32 / 2688.0).to_bits(), 0x3AC3_0C31);
}

#[test]
fn vector_1h_nvfp4_modelopt_scale_multiplies() {
    let half_block = [0.001, -0.0005, 0.0002, 0.0, -0.0011, 0.0007, 0.0003, -0.0001];
    let block = [half_block, half_block].concat();
    let tensor_scale = Format::Nvfp4.tensor_scale(0.75).unwrap();
    assert_eq!(tensor_scale, 3584.0);
    let group = Format::Nvfp4.fit(&block, Some(tensor_scale)).unwrap();
    assert_eq!(group.scale_bits, 0x33);
    assert_eq!(group.scale.to_bits(), 0x3949_2492, "compressed-tensors divides");

    let scale_2 = 0.75f32 / 2688.0;
    assert_eq!(scale_2.to_bits(), 0x3992_4925);
    let modelopt = group_with_scale(0.6875 * scale_2);
    assert_eq!(modelopt.scale.to_bits(), 0x3949_2493);
    let expected = [7, 13, 2, 0, 15, 6, 3, 9];
    let codes: Vec<u8> = block.iter().map(|&w| Format::Nvfp4.code(w, &modelopt)).collect();
    assert_eq!(codes, [expected, expected].concat());
    let mut words = [0; 2];
    Format::Nvfp4.layout().store_column(&codes, &mut words, 1, 0);
    assert_eq!(words.map(u32::to_le_bytes), [[0xD7, 0x02, 0x6F, 0x93]; 2]);
    assert_eq!(Format::Nvfp4.dequantize(7, &modelopt), 0.001_150_948_7);
}

#[test]
fn nvfp4_tensor_scale_edges() {
    assert_eq!(Format::Nvfp4.tensor_scale(0.0), Some(1.0));
    assert_eq!(Format::Nvfp4.tensor_scale(2688.0), Some(1.0));
    assert_eq!(Format::Nvfp4.tensor_scale(1e-40), Some(f32::MAX));
    for format in Format::ENCODABLE.into_iter().filter(|&f| f != Format::Nvfp4) {
        assert_eq!(format.tensor_scale(4.0), None);
    }
}

#[test]
fn nvfp4_block_scale_edges() {
    // 672 * 1e-9 / 6 rounds to 0 in E4M3, whose smallest positive value is byte 1.
    let tiny = Format::Nvfp4.fit(&[1e-9; 16], Some(672.0)).unwrap();
    assert_eq!((tiny.scale_bits, tiny.scale), (1, 2f32.powi(-9) / 672.0));
    // A tensor scale computed for a smaller tensor saturates.
    assert_eq!(Format::Nvfp4.fit(&[400.0; 16], Some(672.0)).unwrap().scale_bits, 0x7E);
    assert_eq!(Format::Nvfp4.fit(&[0.0; 16], Some(672.0)).unwrap(), Group::ZERO);
    for byte in [0x7F, 0x80, 0x81, 0xFE, 0xFF, 0x100] {
        let read = Format::Nvfp4.group_from_bits(byte, 0, Some(1.0));
        assert_eq!(read, Err(FormatError::InvalidScale { bits: byte, kind: "E4M3" }));
    }
    assert_eq!(Format::Nvfp4.group_from_bits(0x7E, 0, Some(2.0)).unwrap().scale, 224.0);
}

#[test]
fn nvfp4_refuses_bad_tensor_scales() {
    for value in [0.0, -1.0, f32::INFINITY] {
        let read = Format::Nvfp4.group_from_bits(0x38, 0, Some(value));
        assert_eq!(read, Err(FormatError::InvalidTensorScale { value }));
    }
    let nan = Format::Nvfp4.fit(&[1.0], Some(f32::NAN));
    assert!(matches!(nan, Err(FormatError::InvalidTensorScale { .. })));
    let missing = Format::Nvfp4.fit(&[1.0], None);
    assert_eq!(missing, Err(FormatError::MissingTensorScale { format: Format::Nvfp4 }));
    let extra = Format::Fp4E2m1.fit(&[1.0], Some(1.0));
    assert!(matches!(extra, Err(FormatError::UnexpectedTensorScale { .. })));
    // A subnormal divisor makes the block scale infinite.
    let overflow = Format::Nvfp4.group_from_bits(0x7E, 0, Some(1e-40));
    assert!(matches!(overflow, Err(FormatError::InvalidScale { .. })));
}

fn block_1e() -> Vec<f32> {
    (0..32).map(|i| ((7 * i % 31) as f32 - 15.0) / 8.0).collect()
}

#[test]
fn vector_1e_mxfp4_ocp_floor() {
    let block = block_1e();
    let byte = e8m0::scale_byte(1.875, ScaleRule::OcpFloor);
    assert_eq!(byte, 0x7D);
    let group = Format::Mxfp4.group_from_bits(u16::from(byte), 0, None).unwrap();
    assert_eq!(group.scale, 0.25);
    let codes: Vec<u8> = block.iter().map(|&w| Format::Mxfp4.code(w, &group)).collect();
    let expected =
        [15, 14, 9, 5, 7, 15, 12, 3, 6, 15, 14, 0, 6, 7, 14, 11, 4, 7, 15, 13, 1, 6, 7, 14, 10, 4, 7, 15, 12, 2, 6, 15];
    assert_eq!(codes, expected);
    let mut words = [0u32; 4];
    Format::Mxfp4.layout().store_column(&codes, &mut words, 1, 0);
    let expected_bytes =
        [0xEF, 0x59, 0xF7, 0x3C, 0xF6, 0x0E, 0x76, 0xBE, 0x74, 0xDF, 0x61, 0xE7, 0x4A, 0xF7, 0x2C, 0xF6];
    assert_eq!(words.map(u32::to_le_bytes).concat(), expected_bytes);
    let decoded: Vec<f32> = codes[..8].iter().map(|&c| Format::Mxfp4.dequantize(c, &group)).collect();
    assert_eq!(decoded, [-1.5, -1.0, -0.125, 0.75, 1.5, -1.5, -0.5, 0.375]);
}

#[test]
fn vector_1e_mxfp4_default_rule_bumps() {
    assert_eq!(encode_column(Format::Mxfp4, 32, &block_1e()).scales, [126]);
}

#[test]
fn vector_1f_mxfp4_scale_bytes() {
    let cases = [
        (7.5, 128, 127),
        (6.0, 127, 127),
        (5.0, 127, 127),
        (4.0, 127, 127),
        (3.9, 127, 126),
        (1.0, 125, 125),
        (0.0999, 121, 121),
        (7.0, 128, 127),
        (7f32.next_down(), 127, 127),
        (0.0, 0, 0),
        (f32::MIN_POSITIVE.next_down(), 0, 0),
        (f32::MIN_POSITIVE, 0, 0),
        (2f32.powi(-125), 0, 0),
        (2f32.powi(-124), 1, 1),
        (f32::MAX, 253, 252),
    ];
    for (amax, bump, floor) in cases {
        assert_eq!(e8m0::scale_byte(amax, ScaleRule::default()), bump, "{amax}");
        assert_eq!(e8m0::scale_byte(amax, ScaleRule::OcpFloor), floor, "{amax}");
        if amax > 0.0 {
            let group = Format::Mxfp4.fit(&[0.0, -amax], None).unwrap();
            assert_eq!(group.scale_bits, u16::from(bump));
        }
    }
}

#[test]
fn every_e8m0_byte() {
    for byte in 0..255u8 {
        let expected = 2f64.powi(i32::from(byte) - 127);
        assert_eq!(f64::from(e8m0::decode(byte).unwrap()), expected);
    }
    assert_eq!(e8m0::decode(255), Err(FormatError::InvalidScale { bits: 255, kind: "E8M0" }));
    for bits in [0xFF, 0x100, 0x7FFF] {
        assert!(Format::Mxfp4.group_from_bits(bits, 0, None).is_err());
    }
}

#[test]
fn a_zero_mxfp4_group_stores_byte_0_and_drops_the_sign_of_zero() {
    let mut weights = [0.0f32; 32];
    weights[3] = -0.0;
    let matrix = encode_column(Format::Mxfp4, 32, &weights);
    assert_eq!((matrix.scales[0], &matrix.codes[..]), (0, &[0u32; 4][..]));
    // The stored byte reads back as 2^-127, not as zero.
    assert_eq!(matrix.group(0, 0).unwrap().scale, 2f32.powi(-127));
    // A nonzero group with the same byte keeps the sign.
    weights[4] = 2f32.powi(-126);
    let matrix = encode_column(Format::Mxfp4, 32, &weights);
    assert_eq!((matrix.scales[0], matrix.code(0, 3), matrix.code(0, 4)), (0, 8, 4));
}
