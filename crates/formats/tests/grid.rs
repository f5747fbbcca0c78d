//! Grid codes: the published vector, orders of tiles and codes, the folded form, and what is refused.

use marlin_formats::FormatError;
use marlin_formats::grid::{
    CODEBOOK_FACTOR, GridMatrix, InnerOrder, SIDE, TileOrder, pack, tile_bytes, uniform, unpack,
};

const ORDERS: [(TileOrder, InnerOrder); 4] = [
    (TileOrder::Kn, InnerOrder::Column),
    (TileOrder::Kn, InnerOrder::Row),
    (TileOrder::Nk, InnerOrder::Column),
    (TileOrder::Nk, InnerOrder::Row),
];

/// Irregular numbers below `below`.
fn numbers(count: usize, below: u32) -> Vec<u8> {
    let mut state = 0x2545_F491u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    };
    (0..count).map(|_| (next() % below) as u8).collect()
}

fn matrix(bits: u32, n: usize, k: usize, group_size: usize) -> GridMatrix {
    let codes = numbers(n * k, 1 << bits);
    let signs = |count: usize| numbers(count, 2).into_iter().map(|v| 1.0 - 2.0 * f32::from(v)).collect();
    let groups = k.div_ceil(group_size);
    GridMatrix {
        bits,
        in_features: k,
        out_features: n,
        group_size,
        tiles: pack(&codes, bits, [n, k], TileOrder::Kn, InnerOrder::Column).unwrap(),
        scales: numbers(groups * n, 200).into_iter().map(|v| f32::from(v) / 777.0).collect(),
        su: signs(k),
        sv: signs(n),
        grid: uniform(bits, CODEBOOK_FACTOR).unwrap(),
    }
}

#[test]
fn published_vector() {
    let indices = [2, 5, 0, 3, 6, 1, 4, 7];
    let tiles = pack(&indices, 3, [1, 8], TileOrder::Kn, InnerOrder::Column).unwrap();
    assert_eq!(tiles.len(), 96);
    assert_eq!(tiles[..3], [0x2A, 0xE6, 0xF0]);
    let grid = uniform(3, 1.0).unwrap();
    assert_eq!(grid, [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]);
    let mut su = vec![1.0; 8];
    su[1] = -1.0;
    let (scales, sv) = (vec![0.02], vec![1.0]);
    let matrix = GridMatrix { bits: 3, in_features: 8, out_features: 1, group_size: 32, tiles, scales, su, sv, grid };
    // Index 5 with su -1.
    assert_eq!(matrix.decode().unwrap()[1], -0.03);
    assert_eq!(matrix.decode().unwrap()[0], -1.5 * 0.02);
}

#[test]
fn grids_are_uniform_and_odd() {
    for bits in 2..=8 {
        for factor in [1.0, CODEBOOK_FACTOR] {
            let grid = uniform(bits, factor).unwrap();
            assert_eq!(grid.len(), 1 << bits);
            assert_eq!(grid[grid.len() / 2], 0.5 * factor);
            assert!(grid.iter().zip(grid.iter().rev()).all(|(a, b)| *a == -b));
        }
    }
    assert_eq!(uniform(4, CODEBOOK_FACTOR).unwrap()[15], 7.5 * CODEBOOK_FACTOR);
    for bits in [0, 1, 9, 32] {
        assert_eq!(uniform(bits, 1.0), Err(FormatError::GridBits { bits }));
    }
}

#[test]
fn codes_survive_every_order() {
    for bits in 2..=8 {
        for [n, k] in [[1, 1], [16, 16], [17, 33], [40, 16], [5, 70]] {
            let codes = numbers(n * k, 1 << bits);
            for (tiles, inner) in ORDERS {
                let stream = pack(&codes, bits, [n, k], tiles, inner).unwrap();
                assert_eq!(stream.len(), n.div_ceil(SIDE) * k.div_ceil(SIDE) * tile_bytes(bits));
                assert_eq!(unpack(&stream, bits, [n, k], tiles, inner).unwrap(), codes, "{bits} {n} {k} {tiles:?}");
            }
        }
    }
}

#[test]
fn orders_place_codes_as_they_say() {
    // A matrix of 2 x 3 tiles whose only code is at (k, n) = (18, 37).
    let [n, k] = [48, 32];
    let mut codes = vec![0; n * k];
    codes[37 * k + 18] = 0xFF;
    for ((tiles, inner), position) in ORDERS.into_iter().zip([82, 37, 82, 37]) {
        let stream = pack(&codes, 8, [n, k], tiles, inner).unwrap();
        assert_eq!(stream.iter().position(|&byte| byte != 0), Some(5 * 256 + position), "{tiles:?} {inner:?}");
    }
    codes[37 * k + 18] = 0;
    codes[2 * k + 18] = 0xFF;
    for (tiles, at) in [(TileOrder::Kn, 3), (TileOrder::Nk, 1)] {
        let stream = pack(&codes, 8, [n, k], tiles, InnerOrder::Column).unwrap();
        assert_eq!(stream.iter().position(|&byte| byte != 0), Some(at * 256 + 34), "{tiles:?}");
    }
}

#[test]
fn a_header_byte_is_the_bit_rate() {
    let codes = numbers(20 * 40, 8);
    let stream = pack(&codes, 3, [20, 40], TileOrder::Kn, InnerOrder::Column).unwrap();
    let read = |stream: &[u8]| unpack(stream, 3, [20, 40], TileOrder::Kn, InnerOrder::Column);
    let with = |header: u8| [&[header], &stream[..]].concat();
    assert_eq!(read(&with(3)).unwrap(), codes);
    assert_eq!(read(&with(4)), Err(FormatError::GridHeader { header: 4, bits: 3 }));
    let length = |found| Err(FormatError::Length { what: "tiles", expected: stream.len(), found });
    assert_eq!(read(&stream[1..]), length(stream.len() - 1));
    assert_eq!(read(&[&with(3)[..], &[0]].concat()), length(stream.len() + 2));
    assert_eq!(read(&[]), length(0));
}

#[test]
fn the_folded_form_has_the_same_values() {
    for bits in 2..=8 {
        for ([n, k], group_size) in [([17, 33], 32), ([40, 300], 64), ([3, 128], 128), ([16, 50], 96)] {
            let matrix = matrix(bits, n, k, group_size);
            let folded = matrix.folded().unwrap();
            let expected = matrix.decode().unwrap();
            let mut codes = vec![0; k];
            for (column, row) in expected.chunks_exact(k).enumerate() {
                folded.layout.load_column(&folded.words, n, column, &mut codes);
                for (i, (&code, &value)) in codes.iter().zip(row).enumerate() {
                    let found = folded.levels[usize::from(code)] * folded.scales[i / folded.group_size * n + column];
                    assert_eq!(found.to_bits(), value.to_bits(), "{bits} bits, n {column}, k {i}");
                }
            }
        }
    }
}

#[test]
fn what_is_wrong_is_said() {
    let good = matrix(3, 20, 40, 32);
    let refused = |change: fn(&mut GridMatrix)| {
        let mut bad = good.clone();
        change(&mut bad);
        assert_eq!(bad.decode().unwrap_err().to_string(), bad.validate().unwrap_err().to_string());
        bad.folded().unwrap_err()
    };
    good.validate().unwrap();
    let length = |what, expected, found| FormatError::Length { what, expected, found };
    assert_eq!(refused(|m| m.bits = 1), FormatError::GridBits { bits: 1 });
    assert_eq!(refused(|m| m.bits = 9), FormatError::GridBits { bits: 9 });
    assert_eq!(refused(|m| m.bits = 4), length("tiles", 2 * 3 * 128, 2 * 3 * 96));
    assert_eq!(refused(|m| m.group_size = 0), FormatError::GridGroupSize { group_size: 0 });
    assert_eq!(refused(|m| m.group_size = 48), FormatError::GridGroupSize { group_size: 48 });
    assert_eq!(refused(|m| m.in_features = 0), FormatError::Shape { out_features: 20, in_features: 0 });
    let most = usize::MAX;
    assert_eq!(refused(|m| m.in_features = usize::MAX), FormatError::Shape { out_features: 20, in_features: most });
    assert_eq!(refused(|m| m.group_size = 64), length("scales", 20, 40));
    assert_eq!(refused(|m| m.su.truncate(39)), length("su", 40, 39));
    assert_eq!(refused(|m| m.sv.push(1.0)), length("sv", 20, 21));
    assert_eq!(refused(|m| m.grid.clear()), length("grid", 8, 0));
    assert_eq!(refused(|m| m.grid.push(0.0)), length("grid", 8, 9));
    assert_eq!(refused(|m| m.grid[1] = 0.0), FormatError::GridNotOdd { index: 1, value: 0.0 });
    let infinite = FormatError::InvalidValue { what: "grid value", value: f32::INFINITY };
    assert_eq!(refused(|m| m.grid[2] = f32::INFINITY), infinite);
    let scale = FormatError::InvalidValue { what: "scale", value: f32::NEG_INFINITY };
    assert_eq!(refused(|m| m.scales[7] = f32::NEG_INFINITY), scale);
    assert_eq!(refused(|m| m.su[3] = 0.5), FormatError::GridSign { what: "su", index: 3, value: 0.5 });
    assert_eq!(refused(|m| m.sv[19] = 0.0), FormatError::GridSign { what: "sv", index: 19, value: 0.0 });
    assert!(matches!(refused(|m| m.su[0] = f32::NAN), FormatError::GridSign { what: "su", index: 0, .. }));
    let first = good.codes().unwrap().iter().position(|&code| code == 7).unwrap();
    let index = FormatError::GridIndex { n: first / 40, k: first % 40, code: 7, levels: 7 };
    let seven = |m: &mut GridMatrix| m.grid = (-3..=3).map(|i| i as f32).collect();
    assert_eq!(refused(seven), index);
    let codes = [0, 8];
    let large = pack(&codes, 3, [1, 2], TileOrder::Kn, InnerOrder::Column);
    assert_eq!(large, Err(FormatError::CodeOutOfRange { n: 0, k: 1, code: 8, bits: 3 }));
}
