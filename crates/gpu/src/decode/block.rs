//! Codes of loaded words: no code is moved further than its conversion needs.

use cubecl::prelude::*;
use half::f16;
use marlin_formats::pack::Layout;

use super::{Codes, Decoder, Levels};

/// The level of code `i` of a block of whole units, before zero point and scale. `words` are those of the block's units
/// in order, [`Decoder::words`] each; `lane` is the column within a vector.
#[cube]
pub(crate) fn block_level<V: Size>(
    words: &Array<Vector<u32, V>>,
    table: &[f32],
    #[comptime] i: usize,
    #[comptime] lane: usize,
    #[comptime] d: Decoder,
) -> f32 {
    match comptime!(d.codes) {
        Codes::F32 => f32::reinterpret(words[i].extract(lane)),
        Codes::F16 => {
            let pair = Vector::<f16, Const<2>>::reinterpret(words[comptime!(i / 2)].extract(lane));
            f32::cast_from(pair.extract(comptime!(i % 2)))
        }
        Codes::BF16 => {
            let word = words[comptime!(i / 2)].extract(lane);
            if comptime!(i % 2 == 0) {
                f32::reinterpret(word << 16u32)
            } else {
                f32::reinterpret(word & 0xffff_0000u32)
            }
        }
        Codes::Trellis(_) => {
            comptime!(no_vectors());
            f32::new(0.0)
        }
        Codes::Packed(layout) => {
            if comptime!(layout.high_bits() > 0) {
                let unit = comptime!(i / layout.codes_per_unit() * layout.words_per_unit());
                let at = comptime!(i % layout.codes_per_unit());
                let low = words[comptime!(unit + at * layout.low_bits() as usize / 32)].extract(lane);
                let high = words[comptime!(unit + layout.words_per_unit() - 1)].extract(lane);
                field_level(planar_code(low, high, at, layout), table, 0u32, comptime!(layout.bits()), d.levels)
            } else {
                let codes = comptime!(layout.codes_per_unit());
                let word = words[comptime!(i / codes)].extract(lane);
                field_level(
                    word,
                    table,
                    comptime!((i % codes) as u32 * layout.bits()),
                    comptime!(layout.bits()),
                    d.levels,
                )
            }
        }
    }
}

/// Code `i` of a planar unit, from the word of its low bits and that of the high ones.
#[cube]
pub(crate) fn planar_code(low: u32, high: u32, #[comptime] i: usize, #[comptime] layout: Layout) -> u32 {
    let (low_bits, high_bits) = comptime!((layout.low_bits(), layout.high_bits()));
    let code = (low >> comptime!(i as u32 * layout.low_bits() % 32)) & comptime!((1u32 << low_bits) - 1);
    let rest = (high >> comptime!(i as u32 * layout.high_bits())) & comptime!((1u32 << high_bits) - 1);
    code | (rest << low_bits)
}

/// Kernels that load vectors of columns are not launched for tiles.
fn no_vectors() {
    unreachable!("tiles are no vectors of columns");
}

/// The level of the code in the `bits` bits from bit `at` of a word.
#[cube]
pub(crate) fn field_level(
    word: u32,
    table: &[f32],
    #[comptime] at: u32,
    #[comptime] bits: u32,
    #[comptime] levels: Levels,
) -> f32 {
    let half_word = shifted(word, comptime!(-16 * (at as i32 / 16)));
    let at_half = comptime!(at % 16);
    match comptime!(levels) {
        // Dense values are no codes.
        Levels::Dense => f32::reinterpret(word),
        Levels::Minus { half } => integer(half_word, at_half, bits, half),
        // Two's complement with the sign bit flipped counts up from -128.
        Levels::Signed8 => integer(half_word ^ 0x8080u32, at_half, bits, 256i32),
        Levels::Fp4 => {
            // Sign and magnitude as f16 are 2^14 too small; codes 16 bits apart share the product.
            let magnitude = shifted(word, comptime!(9 - at_half as i32)) & 0x0e00_0e00u32;
            let sign = shifted(word, comptime!(12 - at_half as i32)) & 0x8000_8000u32;
            let pair = Vector::<f16, Const<2>>::reinterpret(magnitude | sign);
            let pair = pair * Vector::<f16, Const<2>>::new(f16::new(16384.0));
            f32::cast_from(pair.extract(comptime!(at as usize / 16)))
        }
        Levels::E4m3 => {
            let magnitude = shifted(word, comptime!(7 - at_half as i32)) & 0x3f80_3f80u32;
            let sign = shifted(word, comptime!(8 - at_half as i32)) & 0x8000_8000u32;
            let pair = Vector::<f16, Const<2>>::reinterpret(magnitude | sign);
            let pair = pair * Vector::<f16, Const<2>>::new(f16::new(256.0));
            let value = f32::cast_from(pair.extract(comptime!(at as usize / 16)));
            // The code after the largest value is NaN: as bits, since CubeCL's analysis of SPIR-V never ends with a constant that
            // is not equal to itself.
            f32::reinterpret(select(f32::abs(value) > 448.0f32, 0x7fc0_0000u32, u32::reinterpret(value)))
        }
        Levels::E5m2 => {
            // The upper byte of an f16.
            let pair =
                Vector::<f16, Const<2>>::reinterpret(shifted(word, comptime!(8 - at_half as i32)) & 0xff00_ff00u32);
            f32::cast_from(pair.extract(comptime!(at as usize / 16)))
        }
        Levels::Table => {
            let code = (half_word >> at_half) & comptime!((1u32 << bits) - 1);
            table[code as usize]
        }
    }
}

/// `code - half / 2` of the field at bit `at` < 16: in the significand of 2^(23 - at) its lowest bit counts 1.
#[cube]
fn integer(word: u32, #[comptime] at: u32, #[comptime] bits: u32, #[comptime] half: i32) -> f32 {
    // Halves need a bit below the field.
    let up = comptime!(if at == 0 && half % 2 != 0 { 1u32 } else { 0 });
    let at = comptime!(at + up);
    let field = shifted(word, comptime!(up as i32)) & comptime!(((1u32 << bits) - 1) << at);
    let number = f32::reinterpret(field | comptime!((150 - at) << 23));
    number - comptime!((1u32 << (23 - at)) as f32 + half as f32 * 0.5)
}

/// The word moved up by `by` bits, or down where it is negative.
#[cube]
fn shifted(word: u32, #[comptime] by: i32) -> u32 {
    if comptime!(by > 0) {
        word << comptime!(by as u32)
    } else if comptime!(by < 0) {
        word >> comptime!(-by as u32)
    } else {
        word
    }
}
