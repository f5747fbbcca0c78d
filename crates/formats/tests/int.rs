//! INT4 (U4, S4), INT8, INT3 and INT2: codes and the vectors of the format document.
// Expected values are written with every digit of their exact decimal expansion.
#![allow(clippy::excessive_precision)]

mod common;

use common::{codes, encode_column, f16_bits};
use marlin_formats::{Format, FormatError, Group};

const WEIGHTS_2A: [f32; 8] = [-0.75, -0.2, 0.1, 0.33, 0.6, 0.9, 1.2, 0.0];
const WEIGHTS_2I: [f32; 8] = [0.5, 0.75, 1.0, 0.6, 0.9, 0.55, 0.8, 0.7];
const WEIGHTS_3A: [f32; 8] = [0.5, -1.27, 0.031, 0.999, -0.0049, 1.1, 0.0, -0.62];
const WEIGHTS_4A: [f32; 16] =
    [0.3, -0.9, 1.2, -0.1, 0.5, -0.6, 0.0, -1.2, 0.79, 0.81, -0.4, 0.4, 1.0, -1.0, 0.2, -0.25];

#[test]
fn every_code_has_its_value() {
    let s4: [f32; 16] = [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    let int3: [f32; 8] = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5];
    let int2: [f32; 4] = [-1.5, -0.5, 0.5, 1.5];
    for (code, value) in (0u8..).zip(s4) {
        assert_eq!(Format::Int4S4.value(code, 0.0), value);
        assert_eq!(Format::Int4U4.value(code, 8.0), value);
        assert_eq!(Format::Int4U4.value(code, 8.5), value - 0.5);
    }
    for (code, value) in (0u8..).zip(int3) {
        assert_eq!(Format::Int3.value(code, 0.0), value);
    }
    for (code, value) in (0u8..).zip(int2) {
        assert_eq!(Format::Int2.value(code, 0.0), value);
    }
    for code in 0..=255u8 {
        let unsigned = f32::from(code);
        let signed = if code < 128 { unsigned } else { unsigned - 256.0 };
        assert_eq!(Format::Int8.value(code, 0.0), signed);
        assert_eq!(Format::Int8Asym.value(code, 0.0), unsigned);
        assert_eq!(Format::Int8Asym.value(code, 137.0), unsigned - 137.0);
    }
}

#[test]
fn vector_2a_u4() {
    let matrix = encode_column(Format::Int4U4, 8, &WEIGHTS_2A);
    assert_eq!(matrix.scales, [0x3029]);
    assert_eq!(matrix.zeros, [0x4600]);
    assert_eq!(codes(&matrix), [0, 4, 7, 9, 11, 13, 15, 6]);
    assert_eq!(matrix.codes, [0x6FDB_9740]);
    assert_eq!(f16_bits(&matrix.decode().unwrap()), [0xBA3E, 0xB429, 0x3029, 0x363E, 0x3933, 0x3B48, 0x3CAE, 0x0000]);
}

#[test]
fn vector_2a_s4() {
    let matrix = encode_column(Format::Int4S4, 8, &WEIGHTS_2A);
    assert_eq!(matrix.scales, [0x317C]);
    assert_eq!(codes(&matrix), [4, 7, 9, 10, 12, 13, 15, 8]);
    assert_eq!(matrix.codes, [0x8FDC_A974]);
    assert_eq!(
        matrix.decode().unwrap(),
        [-0.685546875, -0.17138671875, 0.17138671875, 0.3427734375, 0.685546875, 0.85693359375, 1.19970703125, 0.0]
    );
}

#[test]
fn vector_2i_all_positive() {
    let u4 = encode_column(Format::Int4U4, 8, &WEIGHTS_2I);
    assert_eq!((u4.scales[0], u4.zeros[0]), (0x2C44, 0x0000));
    assert_eq!(codes(&u4), [8, 11, 15, 9, 14, 8, 12, 11]);
    assert_eq!(u4.codes, [0xBC8E_9FB8]);
    assert_eq!(f16_bits(&u4.decode().unwrap()), [0x3844, 0x39DE, 0x3C00, 0x38CC, 0x3B77, 0x3844, 0x3A66, 0x39DE]);
    let s4 = encode_column(Format::Int4S4, 8, &WEIGHTS_2I);
    assert_eq!(s4.scales, [0x3092]);
    assert_eq!(codes(&s4), [12, 13, 15, 12, 14, 12, 14, 13]);
    assert_eq!(s4.codes, [0xDECE_CFDC]);
    assert_eq!(f16_bits(&s4.decode().unwrap()), [0x3892, 0x39B6, 0x3C00, 0x3892, 0x3ADB, 0x3892, 0x3ADB, 0x39B6]);
}

#[test]
fn all_negative_groups_put_the_zero_at_the_top() {
    let negated = WEIGHTS_2I.map(|w| -w);
    let u4 = encode_column(Format::Int4U4, 8, &negated);
    assert_eq!((u4.scales[0], u4.zeros[0]), (0x2C44, 0x4B80));
    assert_eq!(u4.code(0, 2), 0);
    let u8 = encode_column(Format::Int8Asym, 8, &negated);
    assert_eq!(u8.zeros[0], 0x5BF8, "255");
    assert_eq!(u8.code(0, 2), 0);
}

#[test]
fn vector_3a_int8() {
    let matrix = encode_column(Format::Int8, 8, &WEIGHTS_3A);
    assert_eq!(matrix.scales, [0x211F]);
    let signed: Vec<i8> = codes(&matrix).iter().map(|&c| c as i8).collect();
    assert_eq!(signed, [50, -127, 3, 100, 0, 110, 0, -62]);
    assert_eq!(matrix.codes, [0x6403_8132, 0xC200_6E00]);
    assert_eq!(matrix.decode().unwrap()[1], -1.2702713012695312);
}

#[test]
fn vector_3a_int8_asymmetric() {
    let matrix = encode_column(Format::Int8Asym, 8, &WEIGHTS_3A);
    assert_eq!(matrix.scales, [0x20C2]);
    assert_eq!(matrix.group(0, 0).unwrap().zero, 137.0);
    assert_eq!(codes(&matrix), [191, 0, 140, 245, 136, 255, 137, 70]);
    assert_eq!(matrix.decode().unwrap()[0], 0.501800537109375);
}

#[test]
fn vector_3e_int8_never_writes_minus_128() {
    let matrix = encode_column(Format::Int8, 4, &[-3.0, 2.999, 0.0118, -0.0119]);
    assert_eq!(matrix.scales, [0x260C]);
    assert_eq!(matrix.codes, [0xFF00_7F81]);
    assert_eq!(matrix.decode().unwrap(), [-2.99981689453125, 2.99981689453125, 0.0, -0.02362060546875]);
}

#[test]
fn symmetric_codes_saturate_and_break_ties_to_even() {
    let one = Format::Int4S4.group_from_bits(0x3C00, 0, None).unwrap();
    let s4 = |w| Format::Int4S4.code(w, &one);
    assert_eq!([s4(0.5), s4(1.5), s4(-0.5), s4(-1.5)], [8, 10, 8, 6]);
    assert_eq!([s4(7.5), s4(100.0), s4(-8.4), s4(-100.0)], [15, 15, 0, 0]);
    assert_eq!([s4(0.0), s4(-0.0)], [8, 8]);
    let int8 = |w| Format::Int8.code(w, &one) as i8;
    assert_eq!([int8(0.5), int8(2.5), int8(-3.5)], [0, 2, -4]);
    assert_eq!([int8(127.5), int8(-127.6), int8(-1e9)], [127, -127, -127]);
}

#[test]
fn asymmetric_ties_round_before_the_zero_is_added() {
    let group = Format::Int4U4.group_from_bits(0x3C00, 0x4200, None).unwrap();
    assert_eq!(group.zero, 3.0);
    let code = |w| Format::Int4U4.code(w, &group);
    // rint(0.5) + 3 and rint(1.5) + 3; rounding the sum instead would give 4 and 4.
    assert_eq!([code(0.5), code(1.5), code(-0.5), code(-1.5)], [3, 5, 3, 1]);
    assert_eq!([code(-3.4), code(-9.0), code(12.4), code(99.0)], [0, 0, 15, 15]);
    assert_eq!([code(0.0), code(-0.0)], [3, 3]);
}

#[test]
fn fractional_and_far_zeros_are_read_unclamped() {
    let fractional = Format::Int4U4.group_from_bits(0x3800, 0x4480, None).unwrap();
    assert_eq!((fractional.scale, fractional.zero), (0.5, 4.5));
    for code in 0..16u8 {
        let w = (f32::from(code) - 4.5) * 0.5;
        assert_eq!(Format::Int4U4.dequantize(code, &fractional), w);
        assert_eq!(Format::Int4U4.code(w, &fractional), code);
    }
    let far = Format::Int8Asym.group_from_bits(0x3C00, 0xDC00, None).unwrap();
    assert_eq!(Format::Int8Asym.dequantize(3, &far), 259.0);
    let far = Format::Int4U4.group_from_bits(0x3C00, 0x5C00, None).unwrap();
    assert_eq!(Format::Int4U4.dequantize(3, &far), -253.0);
}

#[test]
fn non_finite_zeros_are_refused() {
    for zero_bits in [0x7C00, 0xFC00, 0x7E00, 0x7C01] {
        for format in [Format::Int4U4, Format::Int8Asym] {
            let read = format.group_from_bits(0x3C00, zero_bits, None);
            assert_eq!(read, Err(FormatError::InvalidZero { bits: zero_bits }));
        }
    }
    // Formats without zeros do not look at the bits.
    let read = Format::Int4S4.group_from_bits(0x3C00, 0x7C00, None).unwrap();
    assert_eq!(read, Group { scale_bits: 0x3C00, zero_bits: 0, scale: 1.0, zero: 0.0, offset: 0.0 });
}

#[test]
fn vector_4a_int2() {
    let matrix = encode_column(Format::Int2, 16, &WEIGHTS_4A);
    assert_eq!(matrix.scales, [0x3A66]);
    assert_eq!(codes(&matrix), [2, 0, 3, 1, 2, 1, 2, 0, 2, 3, 1, 2, 3, 0, 2, 1]);
    assert_eq!(matrix.codes, [0x639E_2672]);
    assert_eq!(matrix.decode().unwrap()[0], 0.5 * 0.7998046875);
}

#[test]
fn vector_4a_int3() {
    let matrix = encode_column(Format::Int3, 32, &WEIGHTS_4A);
    assert_eq!(matrix.scales, [0x357C]);
    assert_eq!(codes(&matrix), [4, 1, 7, 3, 5, 2, 4, 0, 6, 6, 2, 5, 6, 1, 4, 3]);
    let decoded = matrix.decode().unwrap();
    assert_eq!(decoded[..3], [0.17138671875, -0.85693359375, 1.19970703125]);
    // The first ten codes, 3 bits each, as the legacy layout packs them.
    let word = (0..10).fold(0u32, |word, k| word | u32::from(matrix.code(0, k)) << (3 * k));
    assert_eq!(word, 0x3611_57CC);
}

#[test]
fn vector_4b_planar_int3() {
    let codes: Vec<u8> = (0..32).map(|i| (3 * i + 1) % 8).collect();
    let mut words = [0; 3];
    Format::Int3.layout().store_column(&codes, &mut words, 1, 0);
    assert_eq!(words, [0xB1B1_B1B1, 0xB1B1_B1B1, 0x9696_9696]);
}

#[test]
fn mid_rise_ties_go_up_and_zero_is_above_the_middle() {
    let one = Format::Int3.group_from_bits(0x3C00, 0, None).unwrap();
    let int3 = |w| Format::Int3.code(w, &one);
    assert_eq!([int3(0.0), int3(-0.0), int3(1.0), int3(-1.0)], [4, 4, 5, 3]);
    assert_eq!([int3(3.4), int3(99.0), int3(-3.6), int3(-99.0)], [7, 7, 0, 0]);
    let int2 = |w| Format::Int2.code(w, &one);
    assert_eq!([int2(0.0), int2(-0.0), int2(1.0), int2(-1.0)], [2, 2, 3, 1]);
    assert_eq!([int2(1.9), int2(99.0), int2(-1.1), int2(-99.0)], [3, 3, 0, 0]);
}
