//! EXL3: states, codebooks and tiles against ExLlamaV3's own tensors and independent vectors; effective weights against
//! explicit Hadamard matrices.
// Expected values are written as the reference printed them.
#![allow(clippy::excessive_precision)]

use half::f16;
use marlin_formats::FormatError;
use marlin_formats::exl3::{Codebook, Exl3Matrix, hadamard, tile};
use safetensors::SafeTensors;

const GOLDEN: &[u8] = include_bytes!("golden/exl3_decode.safetensors");

/// The usual reflected CRC-32 over little-endian u16.
fn crc32(values: impl IntoIterator<Item = u16>) -> u32 {
    let mut crc = u32::MAX;
    for byte in values.into_iter().flat_map(u16::to_le_bytes) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

fn words(file: &SafeTensors<'_>, name: &str) -> Vec<u16> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

#[test]
fn codebooks_have_the_published_values() {
    let states = [0x0000, 0x0001, 0x0002, 0x0003, 0x00FF, 0x1234, 0x7FFF, 0x8000, 0xABCD, 0xFFFF];
    let expected: [[u16; 10]; 3] = [
        [0x3A25, 0xBB5B, 0x3B74, 0x34B6, 0x3CD1, 0xC066, 0xBA96, 0xB7F8, 0xB98E, 0xB110],
        [0x3F60, 0x304E, 0xBA13, 0x3AB8, 0xBD26, 0x3E0F, 0x4172, 0xB915, 0x35E7, 0x3ACD],
        [0xC2E8, 0x3921, 0xB72D, 0x3239, 0x3AB3, 0xB89E, 0x3FCA, 0xBAF2, 0xBD42, 0xB936],
    ];
    for ((codebook, expected), crc) in
        Codebook::ALL.into_iter().zip(expected).zip([0x4C83_D524, 0xD2D1_3C52, 0x2BDF_05C5])
    {
        assert_eq!(states.map(|state| codebook.value(state).to_bits()), expected, "{codebook:?}");
        assert_eq!(crc32(codebook.table().into_iter().map(f16::to_bits)), crc, "{codebook:?}");
        assert_eq!(Codebook::from_name(codebook.name()), Some(codebook));
    }
    assert_eq!(crc32((0..=1020).map(|sum| Codebook::mul1_value(sum).to_bits())), 0x8200_0E02);
}

#[test]
fn tables_are_those_of_the_reference_runtime() {
    let golden = SafeTensors::deserialize(GOLDEN).unwrap();
    for codebook in Codebook::ALL {
        let table: Vec<u16> = codebook.table().into_iter().map(f16::to_bits).collect();
        assert!(table == words(&golden, &format!("{}.table", codebook.name())), "{codebook:?}");
    }
}

#[test]
fn positions_and_elements_are_inverse() {
    let first =
        [(0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8), (2, 0), (3, 0), (10, 0), (11, 0), (2, 8)];
    for (p, element) in first.into_iter().enumerate() {
        assert_eq!(tile::element(p), element);
    }
    for p in 0..tile::WEIGHTS {
        let (row, column) = tile::element(p);
        assert_eq!(tile::position(row, column), p);
    }
    assert_eq!(tile::element(255), (15, 15));
}

#[test]
fn tiles_decode_to_the_vectors() {
    // First four states, the last, CRC of the states, CRC of the tile in each codebook.
    let vectors: [([u16; 4], u16, u32, [u32; 3]); 8] = [
        ([0xAE77, 0x5CEF, 0xB9DE, 0x73BC], 0xD73B, 0x7662_FA40, [0xF6D7_657A, 0xC224_991F, 0xDB66_D975]),
        ([0xEAAF, 0xAABC, 0xAAF3, 0xABCE], 0xBAAB, 0x0CC1_4928, [0x38D4_0EEA, 0x96FC_911A, 0xFA10_2047]),
        ([0xF0DE, 0x86F3, 0x379C, 0xBCE7], 0x9E1B, 0xC40D_3FE6, [0x27A4_178E, 0x2AFA_BE76, 0x4449_A39E]),
        ([0x18BC, 0x8BCE, 0xBCE7, 0xCE70], 0x818B, 0xB194_8730, [0x5986_DBC4, 0x91A3_8E6A, 0x271B_44BC]),
        ([0x9F79, 0xEF39, 0xE738, 0xE703], 0x64FB, 0xA766_DCEC, [0x49B5_92C6, 0x512C_6C01, 0x891E_49DE]),
        ([0x1AF3, 0xBCE7, 0x39C0, 0x7030], 0x486B, 0x86FA_3ADB, [0x414D_117B, 0x8CFA_064B, 0x6305_703B]),
        ([0xEDE7, 0xF39C, 0xCE06, 0x0303], 0x2BDB, 0x84D1_84D4, [0x9DEE_1AF1, 0x959B_88F4, 0x229C_CBA7]),
        ([0x4BCE, 0xCE70, 0x7030, 0x3039], 0x0F4B, 0x43EB_63ED, [0xB0DF_5439, 0xA5BC_8185, 0xE10F_D750]),
    ];
    for (bits, (first, last, crc_states, crc_tiles)) in (1..).zip(vectors) {
        let stored: Vec<u16> = (0..tile::words(bits)).map(|i| (40503 * i + 12345) as u16).collect();
        let states = tile::states(&stored).unwrap();
        assert_eq!((&states[..4], states[255]), (&first[..], last), "{bits} bits");
        assert_eq!(crc32(states), crc_states, "{bits} bits");
        for (codebook, crc) in Codebook::ALL.into_iter().zip(crc_tiles) {
            let value = |i: usize| codebook.value(states[tile::position(i / 16, i % 16)]).to_bits();
            assert_eq!(crc32((0..256).map(value)), crc, "{bits} bits, {codebook:?}");
        }
        let mut packed = vec![0; stored.len()];
        tile::pack(&states, bits, &mut packed).unwrap();
        assert_eq!(packed, stored, "{bits} bits");
    }
}

/// A matrix of the golden file, its scales 1.
fn golden_matrix(golden: &SafeTensors<'_>, codebook: Codebook, bits: u32) -> Exl3Matrix {
    let trellis = words(golden, &format!("{}.k{bits}.trellis", codebook.name()));
    // The golden grid is 2 x 3 tiles; padding it to Hadamard blocks leaves the tiles as they are.
    let mut padded = Vec::new();
    for row in trellis.chunks(3 * tile::words(bits)) {
        padded.extend_from_slice(row);
        padded.resize(padded.len() + 5 * tile::words(bits), 0);
    }
    padded.resize(64 * tile::words(bits), 0);
    let ones = vec![f16::ONE.to_bits(); 128];
    Exl3Matrix { codebook, bits, in_features: 128, out_features: 128, trellis: padded, suh: ones.clone(), svh: ones }
}

#[test]
fn tiles_decode_as_the_reference_runtime_decodes_them() {
    let golden = SafeTensors::deserialize(GOLDEN).unwrap();
    for codebook in Codebook::ALL {
        for bits in 1..=8 {
            let inner = golden_matrix(&golden, codebook, bits).inner().unwrap();
            let expected = words(&golden, &format!("{}.k{bits}.inner", codebook.name()));
            for (i, expected) in expected.into_iter().enumerate() {
                let found = inner[i / 48 * 128 + i % 48].to_bits();
                assert_eq!(found, expected, "{codebook:?} {bits} bits, element {i}");
            }
        }
    }
}

/// The matrix of the specification's linear vector.
fn linear_vector() -> Exl3Matrix {
    let mut s = 1u32;
    let mut draw = || {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 16) as u16
    };
    let sign = |plus: bool| if plus { 1.0 } else { -1.0 };
    let suh = |i: usize| f16::from_f64(sign(!(5 * i).is_multiple_of(3)) * (0.5 + (i % 7) as f64 / 16.0)).to_bits();
    let svh = |i: usize| f16::from_f64(sign(i % 5 != 2) * (0.75 + (i % 4) as f64 / 32.0)).to_bits();
    Exl3Matrix {
        codebook: Codebook::Mul1,
        bits: 4,
        in_features: 128,
        out_features: 128,
        trellis: (0..64 * 64).map(|_| draw()).collect(),
        suh: (0..128).map(suh).collect(),
        svh: (0..128).map(svh).collect(),
    }
}

#[test]
fn the_effective_weight_gives_the_exact_outputs() {
    let matrix = linear_vector();
    let inner = matrix.inner().unwrap();
    assert_eq!([0, 1, 2, 3].map(|i| inner[i].to_bits()), [0x3771, 0x3CAD, 0xBFC0, 0x393D]);
    assert_eq!(crc32(inner.iter().map(|v| v.to_bits())), 0x0077_5A89);
    let weight = matrix.decode_f64().unwrap();
    for (n, k, expected) in [(0, 0, 0.30145396), (1, 0, 0.10212036), (2, 0, -0.05857305), (100, 5, -0.33825191)] {
        assert!((weight[n * 128 + k] - expected).abs() < 1e-8, "W[{k}, {n}] is {}", weight[n * 128 + k]);
    }
    let x: Vec<f64> = (0..128).map(|i| ((29 * i % 64) as f64 - 31.0) / 32.0).collect();
    let y: Vec<f64> = weight.chunks(128).map(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
    for (n, expected) in [(0, 3.12813376), (1, -3.82439518), (2, -2.79439531), (3, -1.0251845), (127, -4.173016)] {
        assert!((y[n] - expected).abs() < 1e-6, "y[{n}] is {}", y[n]);
    }
    let rounded: Vec<f32> = weight.iter().map(|&w| w as f32).collect();
    assert!(matrix.decode().unwrap() == rounded);
    // Stored bits: 4 a weight and two vectors of f16.
    assert_eq!(matrix.bits_per_weight(), 4.0 + 32.0 / 128.0);
}

#[test]
fn smaller_matrices_are_the_corner_of_padded_ones() {
    let whole = linear_vector();
    let part = Exl3Matrix { in_features: 100, out_features: 37, ..whole.clone() };
    let (whole, part) = (whole.decode().unwrap(), part.decode().unwrap());
    for n in 0..37 {
        assert_eq!(part[n * 100..][..100], whole[n * 128..][..100], "output {n}");
    }
}

#[test]
fn the_transform_is_its_own_inverse() {
    let original: [f64; 128] = std::array::from_fn(|i| (i as f64 * 0.37).sin());
    let mut x = original;
    hadamard(&mut x);
    // Entry 3 by the definition.
    let sign = |i: usize| if (i & 3usize).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let third: f64 = original.iter().enumerate().map(|(i, v)| sign(i) * v).sum();
    assert!((x[3] - third / 128f64.sqrt()).abs() < 1e-12);
    hadamard(&mut x);
    assert!(x.iter().zip(original).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn invalid_matrices_are_refused() {
    let good = linear_vector();
    good.validate().unwrap();
    let refuse = |matrix: Exl3Matrix| matrix.decode().unwrap_err();
    assert_eq!(refuse(Exl3Matrix { bits: 9, ..good.clone() }), FormatError::TrellisBits { bits: 9 });
    assert_eq!(refuse(Exl3Matrix { bits: 0, ..good.clone() }), FormatError::TrellisBits { bits: 0 });
    let shape = |matrix: Exl3Matrix| assert!(matches!(refuse(matrix), FormatError::Shape { .. }));
    shape(Exl3Matrix { in_features: 0, ..good.clone() });
    shape(Exl3Matrix { in_features: usize::MAX, ..good.clone() });
    shape(Exl3Matrix { in_features: 1 << 62, out_features: 1 << 62, ..good.clone() });
    let length = |matrix: Exl3Matrix| assert!(matches!(refuse(matrix), FormatError::Length { .. }));
    length(Exl3Matrix { out_features: 129, ..good.clone() });
    length(Exl3Matrix { suh: good.suh[1..].to_vec(), ..good.clone() });
    length(Exl3Matrix { trellis: good.trellis[1..].to_vec(), ..good.clone() });
    let mut svh = good.svh.clone();
    svh[7] = 0x7C00;
    assert_eq!(refuse(Exl3Matrix { svh, ..good }), FormatError::InvalidScale { bits: 0x7C00, kind: "F16" });
    assert!(tile::states(&[0; 17]).is_err() && tile::states(&[]).is_err() && tile::states(&[0; 144]).is_err());
    assert!(tile::pack(&[0; 256], 3, &mut [0; 47]).is_err());
}
