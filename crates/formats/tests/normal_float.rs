//! NF4, NF3 and NF2: level tables, midpoint rule and the document's vectors.
// Expected values are written with every digit of their exact decimal expansion.
#![allow(clippy::excessive_precision)]

mod common;

use common::{bits, codes, encode_column};
use marlin_formats::{Format, Group, normal_float};

const WEIGHTS_4A: [f32; 16] =
    [0.3, -0.9, 1.2, -0.1, 0.5, -0.6, 0.0, -1.2, 0.79, 0.81, -0.4, 0.4, 1.0, -1.0, 0.2, -0.25];

#[test]
fn level_tables_bit_for_bit() {
    let nf4 = [
        0xBF80_0000,
        0xBF32_39B1,
        0xBF06_6B30,
        0xBECA_32A0,
        0xBE91_A24D,
        0xBE3D_353F,
        0xBDBA_7871,
        0x0000_0000,
        0x3DA2_FAFF,
        0x3E24_CAE3,
        0x3E7C_04DD,
        0x3EAD_033A,
        0x3EE1_A4B8,
        0x3F10_07AB,
        0x3F39_13B3,
        0x3F80_0000,
    ];
    let nf3 = [0xBF80_0000, 0xBF14_09F5, 0xBEA3_2005, 0xBDD2_012A, 0x3DD2_012A, 0x3EA3_2005, 0x3F14_09F5, 0x3F80_0000];
    let nf2 = [0xBF80_0000, 0xBE8D_D219, 0x3E8D_D219, 0x3F80_0000];
    assert_eq!(bits(&normal_float::NF4), nf4);
    assert_eq!(bits(&normal_float::NF3), nf3);
    assert_eq!(bits(&normal_float::NF2), nf2);
    check_values(Format::Nf4, &nf4);
    check_values(Format::Nf3, &nf3);
    check_values(Format::Nf2, &nf2);
}

fn check_values(format: Format, levels: &[u32]) {
    for (code, &level) in (0u8..).zip(levels) {
        assert_eq!(format.value(code, 0.0).to_bits(), level, "{format} {code}");
    }
}

/// The document prints levels and midpoints in decimal, exact to one f32 ulp below 1.
fn assert_printed(value: f32, printed: f64) {
    assert!((f64::from(value) - printed).abs() <= 2f64.powi(-24), "{value} {printed}");
}

#[test]
fn tables_agree_with_the_printed_levels() {
    let nf4 = [
        -1.0,
        -0.69619280,
        -0.52507305,
        -0.39491749,
        -0.28444138,
        -0.18477343,
        -0.09105004,
        0.0,
        0.07958030,
        0.16093020,
        0.24611230,
        0.33791524,
        0.44070983,
        0.56261700,
        0.72295684,
        1.0,
    ];
    for (level, printed) in normal_float::NF4.into_iter().zip(nf4) {
        assert_printed(level, printed);
    }
    for (i, printed) in [0.10254128, 0.31860365, 0.57827696, 1.0].into_iter().enumerate() {
        assert_printed(normal_float::NF3[4 + i], printed);
        assert_eq!(normal_float::NF3[3 - i], -normal_float::NF3[4 + i]);
    }
    for (i, printed) in [0.27699355, 1.0].into_iter().enumerate() {
        assert_printed(normal_float::NF2[2 + i], printed);
        assert_eq!(normal_float::NF2[1 - i], -normal_float::NF2[2 + i]);
    }
}

#[test]
fn midpoints_go_to_the_lower_code() {
    let nf2 = check_midpoints(&normal_float::NF2);
    for (mid, printed) in nf2.into_iter().zip([-0.6384968, 0.0, 0.6384968]) {
        assert_printed(mid, printed);
    }
    let printed = [-0.78913846, -0.44844031, -0.21057247, 0.0, 0.21057247, 0.44844031, 0.78913846];
    for (mid, printed) in check_midpoints(&normal_float::NF3).into_iter().zip(printed) {
        assert_printed(mid, printed);
    }
    check_midpoints(&normal_float::NF4);
}

/// Checks the codes at and on both sides of every f32 midpoint, and returns the midpoints.
fn check_midpoints(levels: &[f32]) -> Vec<f32> {
    let midpoints: Vec<f32> = levels.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    for (code, &mid) in (0u8..).zip(&midpoints) {
        assert_eq!(normal_float::encode(levels, mid), code, "{mid}");
        assert_eq!(normal_float::encode(levels, mid.next_down()), code, "below {mid}");
        assert_eq!(normal_float::encode(levels, mid.next_up()), code + 1, "above {mid}");
    }
    let top = levels.len() as u8 - 1;
    assert_eq!(normal_float::encode(levels, 1e9), top);
    assert_eq!(normal_float::encode(levels, -1e9), 0);
    midpoints
}

#[test]
fn codes_of_zero() {
    let one = |format: Format| format.group_from_bits(0x3C00, 0, None).unwrap();
    for (format, code) in [(Format::Nf4, 7), (Format::Nf3, 3), (Format::Nf2, 1)] {
        assert_eq!(format.code(0.0, &one(format)), code);
        assert_eq!(format.code(-0.0, &one(format)), code);
    }
}

#[test]
fn vector_4c_nf3() {
    let matrix = encode_column(Format::Nf3, 32, &WEIGHTS_4A);
    assert_eq!(matrix.scales, [0x3CCD]);
    assert_eq!(codes(&matrix), [5, 1, 7, 3, 5, 1, 3, 0, 6, 6, 2, 5, 7, 0, 4, 3]);
    let expected: [f32; 4] = [0.382_386_62, -0.694_045_25, 1.200_195_3, -0.123_069_57];
    assert_eq!(matrix.decode().unwrap()[..4], expected);
}

#[test]
fn vector_4c_nf2() {
    let matrix = encode_column(Format::Nf2, 16, &WEIGHTS_4A);
    assert_eq!(matrix.scales, [0x3CCD]);
    assert_eq!(codes(&matrix), [2, 0, 3, 1, 2, 1, 1, 0, 3, 3, 1, 2, 3, 0, 2, 1]);
    assert_eq!(matrix.codes, [0x639F_1672]);
    assert_eq!(matrix.decode().unwrap()[0], 0.332_446_37);
}

#[test]
fn vector_4d_nf4_with_an_f32_scale() {
    let group = Group { scale_bits: 0, zero_bits: 0, scale: 1.2, zero: 0.0, offset: 0.0 };
    let codes: Vec<u8> = WEIGHTS_4A[..8].iter().map(|&w| Format::Nf4.code(w, &group)).collect();
    assert_eq!(codes, [10, 1, 15, 6, 12, 2, 7, 0]);
    let mut words = [0];
    Format::Nf4.layout().store_column(&codes, &mut words, 1, 0);
    assert_eq!(words, [0x072C_6F1A]);
    assert_eq!(Format::Nf4.dequantize(10, &group), 0.2953347861766815);
}

#[test]
fn vector_4e_nf4() {
    let matrix = encode_column(Format::Nf4, 8, &WEIGHTS_4A[8..]);
    assert_eq!(matrix.scales, [0x3C00]);
    assert_eq!(codes(&matrix), [14, 14, 3, 12, 15, 0, 9, 4]);
    assert_eq!(matrix.codes, [0x490F_C3EE]);
    let expected: [f32; 8] =
        [0.722_956_84, 0.722_956_84, -0.394_917_5, 0.440_709_83, 1.0, -1.0, 0.160_930_2, -0.284_441_38];
    assert_eq!(matrix.decode().unwrap(), expected);
}
