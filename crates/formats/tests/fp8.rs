//! FP8 elements: both codecs against independent formulas, and the document's vectors.
// Expected values are written with every digit of their exact decimal expansion.
#![allow(clippy::excessive_precision)]

mod common;

use common::encode_column;
use marlin_formats::fp8::{e4m3, e5m2};
use marlin_formats::{Format, Group};

/// E4M3FN by the text of its definition, in f64; `None` for NaN.
fn e4m3_value(code: u8) -> Option<f64> {
    let sign = if code >= 128 { -1.0 } else { 1.0 };
    let (e, m) = (i32::from(code / 8 % 16), f64::from(code % 8));
    match (e, code % 8) {
        (15, 7) => None,
        (0, _) => Some(sign * m * 2f64.powi(-9)),
        _ => Some(sign * (8.0 + m) * 2f64.powi(e - 10)),
    }
}

#[test]
fn every_e4m3_code_decodes_by_the_definition() {
    for code in 0..=255u8 {
        match e4m3_value(code) {
            None => assert!(e4m3::decode(code).is_nan(), "{code:#x}"),
            Some(value) => {
                assert_eq!(e4m3::decode(code).to_bits(), (value as f32).to_bits(), "{code:#x}");
            }
        }
        let value = Format::Fp8E4m3.value(code, 0.0);
        assert_eq!(value.to_bits(), e4m3::decode(code).to_bits());
    }
    assert_eq!(e4m3::MAX, 448.0);
    assert_eq!(e4m3::decode(0x80).to_bits(), (-0.0f32).to_bits());
}

#[test]
fn every_e5m2_code_is_the_upper_byte_of_an_f16() {
    for code in 0..=255u8 {
        let expected = half::f16::from_bits(u16::from(code) << 8).to_f32();
        let decoded = e5m2::decode(code);
        assert!(
            decoded.to_bits() == expected.to_bits() || (decoded.is_nan() && expected.is_nan()),
            "{code:#x}: {decoded} {expected}"
        );
        let value = Format::Fp8E5m2.value(code, 0.0);
        assert_eq!(value.to_bits(), decoded.to_bits());
    }
    assert_eq!(e5m2::MAX, 57344.0);
    assert_eq!(e5m2::decode(0x7C), f32::INFINITY);
    assert_eq!(e5m2::decode(0xFC), f32::NEG_INFINITY);
    assert!((0x7D..=0x7F).chain(0xFD..=0xFF).all(|code| e5m2::decode(code).is_nan()));
}

/// Rounds by comparing with the neighbouring values: the nearest, on a tie the even code.
fn check_rounding(max_code: u8, decode: fn(u8) -> f32, encode: fn(f32) -> u8) {
    for low in 0..max_code {
        let (a, b) = (decode(low), decode(low + 1));
        let middle = ((f64::from(a) + f64::from(b)) / 2.0) as f32;
        let even = if low % 2 == 0 { low } else { low + 1 };
        for (t, code) in
            [(a, low), (b, low + 1), (middle, even), (middle.next_down(), low), (middle.next_up(), low + 1)]
        {
            assert_eq!(encode(t), code, "{t}");
            assert_eq!(encode(-t), code | 0x80, "-{t}");
        }
    }
    let max = decode(max_code);
    for t in [max.next_up(), max * 1.01, max * 1.07, max * 2.0, f32::MAX, f32::INFINITY] {
        assert_eq!((encode(t), encode(-t)), (max_code, max_code | 0x80), "{t}");
    }
    assert_eq!((encode(f32::NAN), encode(-f32::NAN)), (0x7F, 0x7F));
    assert_eq!((encode(f32::from_bits(1)), encode(-f32::from_bits(1))), (0, 0x80));
}

#[test]
fn encoders_round_to_nearest_even_and_saturate() {
    check_rounding(0x7E, e4m3::decode, e4m3::encode);
    check_rounding(0x7B, e5m2::decode, e5m2::encode);
}

#[test]
fn vector_3b() {
    let cases = [
        (2f32.powi(-10), 0x00),
        (2f32.powi(-10) * 1.0001, 0x01),
        (3.0 * 2f32.powi(-10), 0x02),
        (0.0146484375, 0x08),
        (1.0625, 0x38),
        (1.1875, 0x3A),
        (17.0, 0x58),
        (19.0, 0x5A),
        (248.0, 0x78),
        (440.0, 0x7E),
        (464.0, 0x7E),
        (1e9, 0x7E),
        (-0.0, 0x80),
        (f32::NAN, 0x7F),
    ];
    for (t, code) in cases {
        assert_eq!(e4m3::encode(t), code, "{t}");
    }
    assert_eq!([0x07, 0x3C, 0x77, 0x78].map(e4m3::decode), [0.013671875, 1.5, 240.0, 256.0]);
}

#[test]
fn vector_3c() {
    let cases = [(1.125, 0x3C), (1.375, 0x3E), (3.3, 0x43), (60000.0, 0x7B), (65536.0, 0x7B), (2f32.powi(-17), 0x00)];
    for (t, code) in cases {
        assert_eq!(e5m2::encode(t), code, "{t}");
    }
    assert_eq!([0x03, 0x7A].map(e5m2::decode), [4.57763671875e-05, 49152.0]);
}

/// Codes and dequantized values of a block under an f32 multiplier.
fn block(scale: f32, weights: [f32; 4]) -> ([u8; 4], [f32; 4]) {
    let group = Group { scale_bits: 0, zero_bits: 0, scale, zero: 0.0, offset: 0.0 };
    let codes = weights.map(|w| Format::Fp8E4m3.code(w, &group));
    (codes, codes.map(|code| Format::Fp8E4m3.dequantize(code, &group)))
}

#[test]
fn vector_3d_block_elements() {
    let scale = 3.5f32 / 448.0;
    assert_eq!(scale.to_bits(), 0x3C00_0000);
    let (codes, out) = block(scale, [3.5, -1.0, 0.2, 0.013]);
    assert_eq!(codes, [0x7E, 0xF0, 0x5D, 0x3D]);
    assert_eq!(out, [3.5, -1.0, 0.203125, 0.0126953125]);
}

#[test]
fn vector_3f_block_elements() {
    let scale = 3.6f32 / 448.0;
    assert_eq!(scale.to_bits(), 0x3C03_A83A);
    let (codes, out) = block(scale, [3.6, -1.0, 0.2, 0.013]);
    assert_eq!(codes, [0x7E, 0xF0, 0x5C, 0x3D]);
    assert_eq!(out, [448.0 * scale, -128.0 * scale, 24.0 * scale, 1.625 * scale]);
    // The document prints seven or eight decimals.
    for (found, printed) in out.iter().zip([3.6, -1.0285714, 0.1928571, 0.01305803]) {
        assert!((found - printed).abs() <= 6e-8, "{found} {printed}");
    }
    let (codes, out) = block(2f32.powi(-6), [3.6, -1.0, 0.2, 0.013]);
    assert_eq!(codes, [0x76, 0xE8, 0x55, 0x35]);
    assert_eq!(out, [3.5, -1.0, 0.203125, 0.0126953125]);
}

#[test]
fn native_groups_keep_the_sign_of_zero() {
    for format in [Format::Fp8E4m3, Format::Fp8E5m2] {
        let matrix = encode_column(format, 4, &[1.0, -0.0, 0.0, -1.0]);
        assert_eq!([matrix.code(0, 1), matrix.code(0, 2)], [0x80, 0x00]);
        assert!(matrix.decode().unwrap()[1].is_sign_negative());
    }
}

#[test]
fn e5m2_scale_maps_the_largest_weight_to_448() {
    let matrix = encode_column(Format::Fp8E5m2, 4, &[448.0, -384.0, 1.0, 0.0]);
    assert_eq!(matrix.scales, [0x3C00]);
    assert_eq!(matrix.codes, [0x003C_DE5F]);
}
