//! Formats of imported checkpoints: the values of reference blocks, hand-computed groups, and refused input.

mod common;

use common::bits;
use half::f16;
use marlin_formats::pack::Layout;
use marlin_formats::{Format, FormatError, Group, IQ4, QuantizedMatrix, ScaleKind, Scheme, StoredGroups};

/// The bytes of a block of 256 (or 32) weights that the reference encoder wrote, and the CRC-32 of its f32 values.
const Q4_1: (&str, u32) = ("3630e3bb60e068eafea26778496ca02b1fd15b07", 0x09B6_C3F0);
const Q5_0: (&str, u32) = ("e6ab63a4c5db3f1f3f1c03bd200e7d27afb8d15e6af1", 0x4D9B_DAB4);
const Q5_1: (&str, u32) = ("132ce3bb9c5b3a24c0e0d1e4fc53dff193d851573eb2a60e", 0x3133_B6C4);
const IQ4_NL: (&str, u32) = ("052060f069fbffb168894a6db02d1fe14c07", 0xDFA1_4898);
const Q2_K: (&str, u32) = (
    "dedeffacaaccbbeebdbcfddabcbdddbc64d4da7e3348c556fefa28cadbb03ed9756ba5fbeb3a95317509a6ecc46f79c0d794eaa281adf74ec\
     215b931d5259f85c026aab5df1c10b24e52b961969d66586329372c",
    0x2F70_C800,
);
const Q3_K: (&str, u32) = (
    "c6d8ab87d5b289e1cf5fb61bdb1ce7db4b98370070e8c71bfbdd0a91576899e7a0bcb0fd7799dcfcbda244a6f739bef851a8c9883ccbd5dc52\
     f9337337714a7fed1be663b5bdc83ee71c5000d975186920ede65f27d8d4c53585cf24a9dba99095ca50569897765cf0cf00cfe9a0",
    0xA9D9_C602,
);
const Q4_K: (&str, u32) = (
    "3b180e24fdfbf2febcfcf2fcf5ef5ffd704098fa0ec15758f99cb0abaf21fbc776cf56bf9fca763874b68ae261fdc5204bc5b55d2d41d066cf\
     bc18b3d68f3ee56e3ba8cffa0fa50d5e108aeaf0495fe05e319b0915d44fec1a5686073424cf3500599a66adb020199829661648c44980d48\
     5daaac1b9fe70d205bc1de5289592e23a9acce425359e71579e8ab3945955",
    0x52EB_B16C,
);
const Q5_K: (&str, u32) = (
    "23140024fefcf5fffffdf4fe16f949fc9488fbd785e2d9319f0fe64b8b4cb78a8457fccfbf2708d53412cfce98a75628e09021f40d9390a1f3\
     1951584f52e69eec7ead7e2f85ed60e95d05c5c3eb8a40868a6aba5a83b1cc8d682176ab1d6bcacc66509ef40f4b0abb3004c3e192aed0ad6\
     246023be88ff834cc3d0e7959ae7a00b344dc7b9140325143dc2d91b99320b81bb6578173fff0b50a6b1dcb312b34d466369ad85b6a2ef2bf\
     3f16773895ba",
    0x7D25_25AD,
);
const Q6_K: (&str, u32) = (
    "f04043899b560083f63331b07ff4ad5d7723e633611695b08de57586daaa3ceffe52257e80f2d3845e131b2aa85aacf1632f5dc01afc64e693\
     83fe6428c0ae5bc5651109856a00ae1673814158aa6228302a1e9ccd52712966eb1c2dd6b44b71641c659107e7d0ea6607c3318e7a315f209\
     586c80ccf97b537d789f411a211c224d4da7e330cc656fefb28cbdbb03edd8ad05a0414c16ace8af655133b90823fe4a3d991f29ec47cf126\
     8a02e212acb230d65a052be8e042ba924551666dd6a878827a966094698089607f7985837b9b1c0c",
    0x2B05_17A5,
);
const IQ4_XS: (&str, u32) = (
    "3b0c0fccee05e1e260f069fbffb168894a6db02d1fe14c0777c449cfa0dd74247fb98beb6bf2df2d144b7b12520ebf2a21f3575dfa6112fbac\
     d3442a0dfc52fab3e48e1302c7bd11e15d44962aebe063655998986bbb51ea0442aa50c1ce131fa115691032d23d83dc4a3323cea5a00fed7\
     a0131cab64aadee28aedbfd2c2f977e40ac80cea1495a",
    0x702D_5CC5,
);

fn hex(text: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn crc32(values: &[f32]) -> u32 {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes());
    !bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    })
}

fn word16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Codes and groups of one block.
#[derive(Default)]
struct Block {
    codes: Vec<u8>,
    d: u16,
    minimum: Vec<u16>,
    scales: Vec<u8>,
    minima: Vec<u8>,
}

impl Block {
    /// One column, K = 32 or 256.
    fn matrix(&self, format: Format) -> QuantizedMatrix {
        let groups = match format.scale_kind() {
            ScaleKind::F16 => StoredGroups::F16 { scales: &[self.d], shifts: &self.minimum },
            _ => StoredGroups::TwoLevel {
                super_scales: &[self.d],
                super_minima: &self.minimum,
                scales: &self.scales,
                minima: &self.minima,
            },
        };
        let scheme = Scheme::with_default_group(format);
        QuantizedMatrix::from_stored(scheme, self.codes.len(), 1, &self.codes, &groups).unwrap()
    }
}

/// 32 nibbles, first those of the low halves.
fn halves(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4)).collect()
}

/// Q4_1, Q5_0, Q5_1, IQ4_NL: an f16 scale, maybe an f16 offset, maybe high bits, nibbles.
fn small(bytes: &[u8], offset: bool, high: bool) -> Block {
    let minimum = if offset { vec![word16(bytes, 2)] } else { Vec::new() };
    let nibbles = &bytes[bytes.len() - 16..];
    let mut codes = halves(nibbles);
    if high {
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= (bytes[bytes.len() - 20 + i / 8] >> (i % 8) & 1) << 4;
        }
    }
    Block { codes, d: word16(bytes, 0), minimum, ..Block::default() }
}

/// Two bits of weight i out of 64 bytes.
fn quarter(bytes: &[u8], i: usize) -> u8 {
    bytes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3
}

fn q2_k(b: &[u8]) -> Block {
    Block {
        codes: (0..256).map(|i| quarter(&b[16..80], i)).collect(),
        d: word16(b, 80),
        minimum: vec![word16(b, 82)],
        scales: b[..16].iter().map(|s| s & 15).collect(),
        minima: b[..16].iter().map(|s| s >> 4).collect(),
    }
}

fn q3_k(b: &[u8]) -> Block {
    let s = &b[96..108];
    let scale = |g: usize| {
        let low = if g < 8 { s[g] & 15 } else { s[g - 8] >> 4 };
        let high = s[8 + g % 4] >> (2 * (g / 4)) & 3;
        ((low | high << 4) as i8 - 32) as u8
    };
    Block {
        codes: (0..256).map(|i| quarter(&b[32..96], i) | (b[i % 32] >> (i / 32) & 1) << 2).collect(),
        d: word16(b, 108),
        scales: (0..16).map(scale).collect(),
        ..Block::default()
    }
}

fn q45_k(b: &[u8], high: bool) -> Block {
    let s = &b[4..16];
    let scale = |g: usize| if g < 4 { s[g] & 63 } else { s[g + 4] & 15 | s[g - 4] >> 6 << 4 };
    let minimum = |g: usize| if g < 4 { s[g + 4] & 63 } else { s[g + 4] >> 4 | s[g] >> 6 << 4 };
    let qs = &b[b.len() - 128..];
    let code = |i: usize| {
        let (g, l) = (i / 32, i % 32);
        let low = qs[32 * (g / 2) + l] >> (4 * (g & 1)) & 15;
        if high { low | (b[16 + l] >> g & 1) << 4 } else { low }
    };
    Block {
        codes: (0..256).map(code).collect(),
        d: word16(b, 0),
        minimum: vec![word16(b, 2)],
        scales: (0..8).map(scale).collect(),
        minima: (0..8).map(minimum).collect(),
    }
}

fn q6_k(b: &[u8]) -> Block {
    let code = |i: usize| {
        let (h, c, l) = (i / 128, i % 128 / 32, i % 32);
        let low = b[64 * h + 32 * (c & 1) + l] >> (4 * (c >> 1)) & 15;
        low | (b[128 + 32 * h + l] >> (2 * c) & 3) << 4
    };
    Block { codes: (0..256).map(code).collect(), d: word16(b, 208), scales: b[192..208].to_vec(), ..Block::default() }
}

fn iq4_xs(b: &[u8]) -> Block {
    let scale = |g: usize| {
        let low = b[4 + g / 2] >> (4 * (g % 2)) & 15;
        let high = (word16(b, 2) >> (2 * g) & 3) as u8;
        ((low | high << 4) as i8 - 32) as u8
    };
    Block {
        codes: b[8..].chunks_exact(16).flat_map(halves).collect(),
        d: word16(b, 0),
        scales: (0..8).map(scale).collect(),
        ..Block::default()
    }
}

#[test]
fn reference_blocks() {
    type Reference = (Format, (&'static str, u32), fn(&[u8]) -> Block);
    let blocks: [Reference; 10] = [
        (Format::Q4_1, Q4_1, |b| small(b, true, false)),
        (Format::Q5_0, Q5_0, |b| small(b, false, true)),
        (Format::Q5_1, Q5_1, |b| small(b, true, true)),
        (Format::Iq4Nl, IQ4_NL, |b| small(b, false, false)),
        (Format::Q2K, Q2_K, q2_k),
        (Format::Q3K, Q3_K, q3_k),
        (Format::Q4K, Q4_K, |b| q45_k(b, false)),
        (Format::Q5K, Q5_K, |b| q45_k(b, true)),
        (Format::Q6K, Q6_K, q6_k),
        (Format::Iq4Xs, IQ4_XS, iq4_xs),
    ];
    for (format, (text, expected), unpack) in blocks {
        let matrix = unpack(&hex(text)).matrix(format);
        let values = matrix.decode().unwrap();
        assert_eq!(crc32(&values), expected, "{format}");
        if format == Format::Q4_1 {
            assert_eq!(values[0], -0.985_839_84);
        }
    }
}

#[test]
fn mlx_vector_2h() {
    let words4 = [0x9E4A_F4AFu32, 0xD28E_38E4, 0x16C2_7C28, 0x5A06_B06C];
    let codes4: Vec<u8> = (0..32).map(|i| (words4[i / 8] >> (4 * (i % 8)) & 15) as u8).collect();
    let words3 = [0x3299_4EA7u32, 0x978B_C663, 0x542A_1D0E];
    let bit = |t: usize| (words3[t / 32] >> (t % 32) & 1) as u8;
    let codes3: Vec<u8> = (0..32).map(|i| bit(3 * i) | bit(3 * i + 1) << 1 | bit(3 * i + 2) << 2).collect();
    let decode = |format, codes: &[u8], scale: f32| {
        let groups = StoredGroups::F32 { scales: &[scale], offsets: &[1.125] };
        let scheme = Scheme::new(format, 32).unwrap();
        QuantizedMatrix::from_stored(scheme, 32, 1, codes, &groups).unwrap().decode().unwrap()
    };
    let values = decode(Format::Affine4, &codes4, -0.125);
    for (i, value) in values.into_iter().enumerate() {
        let exact = ((11 * i % 32) as f32 - 13.0) / 16.0;
        assert!((value - exact).abs() <= 0.0625, "{i}: {value} for {exact}");
    }
    let values = decode(Format::Affine3, &codes3, -0.28125);
    assert_eq!(values[..8], [-0.84375, 0.0, 0.5625, -0.84375, 0.0, 0.5625, -0.5625, 0.0]);
}

#[test]
fn every_affine_width_is_scale_times_code_plus_offset() {
    use Format::*;
    for (format, codes) in [(Affine2, 4), (Affine3, 8), (Affine4, 16), (Affine5, 32), (Affine6, 64), (Affine8, 256)] {
        // Two rounding steps: neither product nor sum is exact with these values.
        let (scales, offsets) = ([0.1f32, -3.3e-5, 7.7], [-0.3f32, 1.0e-3, 1.0e4]);
        let k = 96;
        let stored: Vec<u8> = (0..k).map(|i| (5 * i % codes) as u8).collect();
        let groups = StoredGroups::F32 { scales: &scales, offsets: &offsets };
        let scheme = Scheme::new(format, 32).unwrap();
        let matrix = QuantizedMatrix::from_stored(scheme, k, 1, &stored, &groups).unwrap();
        let expected: Vec<f32> =
            stored.iter().enumerate().map(|(i, &q)| scales[i / 32] * f32::from(q) + offsets[i / 32]).collect();
        assert_eq!(bits(&matrix.decode().unwrap()), bits(&expected), "{format}");
        let mut row = vec![0.0; k];
        matrix.decode_row(0, &mut row).unwrap();
        assert_eq!(bits(&row), bits(&expected), "{format}");
    }
}

#[test]
fn fp8_with_f32_scales_vector_3f() {
    let codes = [0x7E, 0xF0, 0x5C, 0x3D];
    let scales = [f32::from_bits(0x3C03_A83A)];
    let scheme = Scheme::with_default_group(Format::Fp8E4m3F32);
    let groups = StoredGroups::F32 { scales: &scales, offsets: &[] };
    let matrix = QuantizedMatrix::from_stored(scheme, 4, 1, &codes, &groups).unwrap();
    // The vector has seven digits.
    for (value, expected) in matrix.decode().unwrap().into_iter().zip([3.6f32, -1.028_571_4, 0.192_857_1, 0.013_058_03])
    {
        assert!((value / expected - 1.0).abs() < 5e-7, "{value} for {expected}");
    }
    assert_eq!(matrix.scales, [0xA83A, 0x3C03]);
}

#[test]
fn zero_points_of_narrow_integers() {
    for format in [Format::Int2U2, Format::Int3U3] {
        let last = (1u8 << format.code_bits()) - 1;
        let scheme = Scheme::new(format, 32).unwrap();
        let groups = StoredGroups::F16 { scales: &[0x3800], shifts: &[0x3E00] };
        let matrix = QuantizedMatrix::from_stored(scheme, 3, 1, &[0, 1, last], &groups).unwrap();
        // (q - 1.5) / 2
        assert_eq!(matrix.decode().unwrap(), [-0.75, -0.25, (f32::from(last) - 1.5) / 2.0]);
        // The same through the groups.
        let group = format.group_from_bits(0x3800, 0x3E00, None).unwrap();
        let same = QuantizedMatrix::from_codes(scheme, 3, 1, &[0, 1, last], &[group], None).unwrap();
        assert_eq!(same, matrix);
    }
}

#[test]
fn planar_units_are_low_words_then_high_bits() {
    let words = |layout: Layout, codes: &[u8]| {
        let mut words = vec![0; layout.rows(codes.len())];
        layout.store_column(codes, &mut words, 1, 0);
        let mut loaded = vec![0; codes.len()];
        layout.load_column(&words, 1, 0, &mut loaded);
        assert_eq!(loaded, codes);
        assert!((0..codes.len()).all(|k| layout.code(&words, 1, 0, k) == codes[k]));
        words
    };
    let codes: Vec<u8> = (0..32).collect();
    let nibbles = [0x7654_3210, 0xFEDC_BA98];
    assert_eq!(words(Layout::Planar5, &codes), [nibbles[0], nibbles[1], nibbles[0], nibbles[1], 0xFFFF_0000]);
    let six: Vec<u8> = codes.iter().map(|c| c % 16 + 16 * ((c + c / 16) % 4)).collect();
    let low = [0x7654_3210, 0xFEDC_BA98];
    assert_eq!(words(Layout::Planar6, &codes), [low[0], low[1], 0, low[0], low[1], 0x5555_5555]);
    let sums = words(Layout::Planar6, &six);
    // Codes 0..16 have high bits 0 1 2 3 in turn; codes 16..32 one more.
    assert_eq!([sums[2], sums[5]], [0xE4E4_E4E4, 0x3939_3939]);
    for layout in [Layout::Planar3, Layout::Planar5, Layout::Planar6] {
        let codes: Vec<u8> = (0..77u32).map(|i| (i * 29 % (1 << layout.bits())) as u8).collect();
        assert_eq!(words(layout, &codes).len(), 77usize.div_ceil(layout.codes_per_unit()) * layout.words_per_unit());
    }
}

#[test]
fn two_level_groups_are_transposed_and_read() {
    // Two columns of 288 weights: nine groups, two super-blocks each.
    let (n, k) = (2, 288);
    let codes: Vec<u8> = (0..n * k).map(|i| (i * 11 % 16) as u8).collect();
    let scales: Vec<u8> = (0..18).map(|i| 63 - 3 * i as u8).collect();
    let minima: Vec<u8> = (0..18).map(|i| 7 * i as u8).collect();
    let halves = |values: [f32; 4]| values.map(|v| f16::from_f32(v).to_bits());
    let (d, dmin) = (halves([0.01, 0.02, -0.03, 0.04]), halves([0.5, 0.25, 0.125, -1.0]));
    let groups = StoredGroups::TwoLevel { super_scales: &d, super_minima: &dmin, scales: &scales, minima: &minima };
    let scheme = Scheme::with_default_group(Format::Q4K);
    let matrix = QuantizedMatrix::from_stored(scheme, k, n, &codes, &groups).unwrap();
    let value = |bits: u16| f16::from_bits(bits).to_f32();
    let expected: Vec<f32> = (0..n * k)
        .map(|i| {
            let (row, at) = (i / k, i % k);
            let (g, b) = (9 * row + at / 32, 2 * row + at / 256);
            let scale = value(d[b]) * f32::from(scales[g]);
            scale * f32::from(codes[i]) - value(dmin[b]) * f32::from(minima[g])
        })
        .collect();
    assert_eq!(bits(&matrix.decode().unwrap()), bits(&expected));
    let group = matrix.group(1, 8).unwrap();
    let (scale, offset) = (value(d[3]) * 12.0, 119.0);
    assert_eq!(group, Group { scale_bits: 12, zero_bits: 119, scale, zero: 0.0, offset });
}

#[test]
fn nothing_is_quantized_to_an_imported_format() {
    for format in Format::ALL.into_iter().filter(|format| !format.can_encode()) {
        let refusal = FormatError::ImportOnly { format };
        assert_eq!(format.fit(&[1.0, 2.0], None), Err(refusal.clone()));
        let scheme = Scheme::with_default_group(format);
        assert_eq!(QuantizedMatrix::encode(scheme, &[1.0; 64], 1, 64), Err(refusal.clone()));
        let message = refusal.to_string();
        assert!(message.contains(format.name()) && message.contains("imported"), "{message}");
    }
}

#[test]
fn a_value_gets_its_own_code_back() {
    for format in Format::ALL.into_iter().filter(|format| !format.can_encode()) {
        let zero = if format.has_zeros() { 1.5 } else { 0.0 };
        let offset = if format.has_offsets() { -0.75 } else { 0.0 };
        let group = Group { scale: 0.5, zero, offset, ..Group::ZERO };
        for code in 0..=((1u32 << format.code_bits()) - 1) as u8 {
            let value = format.dequantize(code, &group);
            // Of E4M3, the codes of NaN have no value.
            if !value.is_nan() {
                assert_eq!(format.code(value, &group), code, "{format}");
            }
        }
    }
    assert!(IQ4.is_sorted());
}

#[test]
fn groups_of_another_kind_are_refused() {
    let f16 = StoredGroups::F16 { scales: &[0x3C00], shifts: &[] };
    let f32 = StoredGroups::F32 { scales: &[1.0], offsets: &[] };
    let two = StoredGroups::TwoLevel { super_scales: &[0x3C00], super_minima: &[], scales: &[1, 1], minima: &[] };
    let build = |format, groups| {
        QuantizedMatrix::from_stored(Scheme::with_default_group(format), 32, 1, &[0; 32], groups).map(drop)
    };
    let kind =
        |format: Format, found| Err(FormatError::GroupKind { format, expected: format.scale_kind().name(), found });
    build(Format::Iq4Nl, &f16).unwrap();
    build(Format::Fp8E4m3F32, &f32).unwrap();
    build(Format::Q6K, &two).unwrap();
    assert_eq!(build(Format::Iq4Nl, &f32), kind(Format::Iq4Nl, "F32"));
    assert_eq!(build(Format::Fp8E4m3F32, &two), kind(Format::Fp8E4m3F32, "two-level"));
    assert_eq!(build(Format::Q6K, &f16), kind(Format::Q6K, "F16"));
    assert_eq!(build(Format::Mxfp4, &f16), kind(Format::Mxfp4, "F16"));
    // Groups that 16 bits cannot hold.
    let wide = |format| Err(FormatError::WideGroup { format });
    assert_eq!(Format::Affine4.group_from_bits(0x3C00, 0, None), wide(Format::Affine4));
    assert_eq!(Format::Q4K.group_from_bits(1, 0, None), wide(Format::Q4K));
    let scheme = Scheme::with_default_group(Format::Q6K);
    let built = QuantizedMatrix::from_codes(scheme, 32, 1, &[0; 32], &[Group::ZERO; 2], None).map(drop);
    assert_eq!(built, Err(FormatError::WideGroup { format: Format::Q6K }));
}

#[test]
fn f32_groups_pass_through_from_codes() {
    let group = Group { scale: 0.1, offset: -7.25e-3, ..Group::ZERO };
    let scheme = Scheme::with_default_group(Format::Affine6);
    let matrix = QuantizedMatrix::from_codes(scheme, 1, 1, &[63], &[group], None).unwrap();
    assert_eq!(matrix.group(0, 0).unwrap(), group);
    assert_eq!(matrix.decode().unwrap(), [0.1 * 63.0 - 7.25e-3]);
}

#[test]
fn bad_groups_are_refused_with_their_place() {
    let codes = vec![1u8; 2 * 32];
    let affine = |scales: [f32; 2], offsets: [f32; 2]| {
        let groups = StoredGroups::F32 { scales: &scales, offsets: &offsets };
        QuantizedMatrix::from_stored(Scheme::new(Format::Affine4, 32).unwrap(), 32, 2, &codes, &groups).map(drop)
    };
    affine([1.0, 2.0], [0.0, 1.0]).unwrap();
    let infinite = |what| {
        let source = Box::new(FormatError::InvalidValue { what, value: f32::INFINITY });
        Err(FormatError::InGroup { n: 1, g: 0, source })
    };
    assert_eq!(affine([1.0, f32::INFINITY], [0.0; 2]), infinite("scale"));
    assert_eq!(affine([1.0; 2], [0.0, f32::INFINITY]), infinite("offset"));

    let scheme = Scheme::with_default_group(Format::Q4K);
    let two = |super_scales: &[u16], super_minima: &[u16], scales: &[u8], minima: &[u8]| {
        let groups = StoredGroups::TwoLevel { super_scales, super_minima, scales, minima };
        QuantizedMatrix::from_stored(scheme, 32, 2, &codes, &groups)
    };
    let good = two(&[0x3C00; 2], &[0x3C00; 2], &[1; 2], &[1; 2]).unwrap();
    assert_eq!(two(&[0x3C00, 0x7C00], &[0; 2], &[1; 2], &[1; 2]).map(drop), infinite("super-block scale"));
    assert_eq!(two(&[0; 2], &[0, 0x7C00], &[1; 2], &[1; 2]).map(drop), infinite("super-block minimum"));
    let length = |what, expected, found| Err(FormatError::Length { what, expected, found });
    assert_eq!(two(&[0], &[0; 2], &[1; 2], &[1; 2]).map(drop), length("super_scales", 2, 1));
    assert_eq!(two(&[0; 2], &[], &[1; 2], &[1; 2]).map(drop), length("super_minima", 2, 0));
    assert_eq!(two(&[0; 2], &[0; 2], &[1; 3], &[1; 2]).map(drop), length("scales", 2, 3));
    assert_eq!(two(&[0; 2], &[0; 2], &[1; 2], &[]).map(drop), length("minima", 2, 0));
    let mut wide = good.clone();
    wide.scales[1] = 0x100;
    assert!(matches!(wide.validate(), Err(FormatError::InGroup { n: 1, g: 0, .. })));
    let mut wide = good.clone();
    wide.zeros[0] = 0x100;
    assert!(matches!(wide.decode(), Err(FormatError::InGroup { n: 0, g: 0, .. })));
    let mut short = good;
    short.super_minima.pop();
    assert_eq!(short.validate(), length("super_minima", 2, 1));
}
