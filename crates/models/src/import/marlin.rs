//! GPTQ weights in the layout of the Marlin CUDA kernel (IST-DASLab): symmetric 4-bit codes `B` I32 `[K/16, 2N]`,
//! permuted for its tensor-core tiles, and scales `s` F16 `[G, N]`, permuted in runs of columns.

use marlin_ops::Weight;

use super::grid::{Codes, IntGrid};
use super::stored::Stored;
use crate::error::Result;

/// Order of the columns of a run of 32 scales when there is one group a column.
const CHANNEL_ORDER: [usize; 8] = [0, 1, 8, 9, 16, 17, 24, 25];

pub(super) fn weight(stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
    if !k.is_multiple_of(128) || !n.is_multiple_of(256) {
        let reason = format!("is for [{n}, {k}], but this layout needs N a multiple of 256 and K of 128");
        return Err(stored.error(".B", reason));
    }
    let words = stored.words(".B", &[k / 16, 2 * n])?;
    let mut codes = vec![0u8; n * k];
    for a in 0..k / 16 {
        let row = &words[a * 2 * n..][..2 * n];
        for (at, &word) in row.iter().enumerate() {
            let (c, lane, j) = (at / 128, at % 128 / 4, at % 4);
            let column = lane / 4;
            for e in 0..8 {
                let (h, r) = (e / 4, e % 4);
                let nibble = if e % 2 == 0 { e / 2 } else { 4 + (e - 1) / 2 };
                let channel = 16 * a + 2 * (lane % 4) + (r & 1) + 8 * (r >> 1);
                let feature = 64 * c + 16 * j + column + 8 * h;
                codes[feature * k + channel] = (word >> (4 * nibble) & 15) as u8;
            }
        }
    }
    let (stored_scales, dtype) = super::column_scales(stored, ".s", n)?;
    let groups = stored_scales.len() / n;
    if groups == 0 || !k.is_multiple_of(groups) || (groups > 1 && k / groups != 128) {
        return Err(stored.error(".s", format!("has {groups} groups of {k} channels, expected groups of 128 or one")));
    }
    let mut scales = vec![0.0; stored_scales.len()];
    for (at, &scale) in stored_scales.iter().enumerate() {
        let place = if groups == 1 {
            at / 32 * 32 + 2 * (at % 32 / 8) + CHANNEL_ORDER[at % 8]
        } else {
            at / 64 * 64 + at % 64 / 8 + 8 * (at % 8)
        };
        scales[place] = scale;
    }
    stored.ignore(&[".workspace"])?;
    let zeros = vec![8.0; scales.len()];
    let codes = Codes::Unpacked(codes);
    let group_size = k / groups;
    IntGrid { bits: 4, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype }
        .into_weight(stored, ".B")
}
