//! AWQ checkpoints of AutoAWQ: 4-bit `W = (q - z) * s`.
//!
//! `gemm`: `qweight` I32 `[K, N/8]` and `qzeros` I32 `[G, N/8]`, eight columns a word in the order 0 2 4 6 1 3 5 7, and
//! `scales` `[G, N]`. `gemv`: `qweight` I32 `[N, K/8]`, `qzeros` I32 `[N, Z]`, `scales` `[N, 8 Z]`, eight channels or
//! groups a word in order. Both map onto the native format with f16 scales and zero points unchanged.

use marlin_ops::Weight;

use super::codes::{transpose, unpack_rows};
use super::grid::{Codes, IntGrid};
use super::stored::Stored;
use crate::config::Fields;
use crate::error::Result;

/// The column of each nibble of a word.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// What the tensors cannot tell.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    group_size: Option<usize>,
}

impl Config {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let version = fields.optional_string("version")?.or(fields.optional_string("checkpoint_format")?);
        let version = version.or(fields.optional_string("format")?).unwrap_or("gemm").to_lowercase();
        if !["gemm", "gemv"].contains(&version.as_str()) {
            return Err(fields.error("version", format!("`{version}` is not supported; supported: gemm, gemv")));
        }
        for name in ["bits", "w_bit"] {
            if let Some(bits) = fields.optional_integer(name, 0, 64)?.filter(|&bits| bits != 4) {
                return Err(fields.error(name, format!("is {bits}, AWQ has 4")));
            }
        }
        let name = if fields.get("q_group_size").is_some() { "q_group_size" } else { "group_size" };
        Ok(Self { group_size: super::group_size(fields, name)? })
    }

    /// `None` when the module is not quantized.
    pub(super) fn weight(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
        if !stored.has(".qweight") {
            return Ok(None);
        }
        let (qweight, scales) = (stored.shape(".qweight")?, stored.shape(".scales")?);
        // The config's version can be wrong; the scales tell the orientation.
        if qweight == [k, n / 8] && n.is_multiple_of(8) && scales.last() == Some(&n) && scales.first() != Some(&n) {
            return self.gemm(stored, n, k).map(Some);
        }
        if qweight == [n, k / 8] && k.is_multiple_of(8) && scales.first() == Some(&n) {
            return self.gemv(stored, n, k).map(Some);
        }
        if qweight == [k, n / 8] && n.is_multiple_of(8) {
            return self.gemm(stored, n, k).map(Some);
        }
        let reason = format!(
            "has shape {qweight:?} (scales {scales:?}), expected [{k}, {}] (gemm) or [{n}, {}] (gemv)",
            n / 8,
            k / 8
        );
        Err(stored.error(".qweight", reason))
    }

    fn gemm(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
        let (scales, dtype) = super::column_scales(stored, ".scales", n)?;
        let groups = scales.len() / n;
        let group_size = self.whole_groups(stored, groups, k)?;
        let words = stored.words(".qweight", &[k, n / 8])?;
        let mut codes = vec![0u32; k.div_ceil(8) * n];
        for (channel, row) in words.chunks_exact(n / 8).enumerate() {
            let out = &mut codes[channel / 8 * n..][..n];
            for (columns, &word) in out.chunks_exact_mut(8).zip(row) {
                for (i, column) in ORDER.into_iter().enumerate() {
                    columns[column] |= (word >> (4 * i) & 15) << (4 * (channel % 8));
                }
            }
        }
        let mut zeros = vec![8.0; scales.len()];
        if stored.has(".qzeros") {
            let words = stored.words(".qzeros", &[groups, n / 8])?;
            for (zeros, word) in zeros.chunks_exact_mut(8).zip(words) {
                for (i, column) in ORDER.into_iter().enumerate() {
                    zeros[column] = (word >> (4 * i) & 15) as f32;
                }
            }
        }
        let codes = Codes::Words(codes);
        let grid = IntGrid { bits: 4, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype };
        grid.into_weight(stored, ".qweight")
    }

    fn gemv(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
        let group_size = self.group_size.unwrap_or(k);
        let groups = k.div_ceil(group_size);
        let columns = match stored.shape(".scales")? {
            [rows, columns] if *rows == n && *columns >= groups && columns % 8 == 0 => *columns,
            other => {
                let reason = format!("has shape {other:?}, expected [{n}, a multiple of 8 from {groups}]");
                return Err(stored.error(".scales", reason));
            }
        };
        let group_size = self.whole_groups(stored, groups, k)?;
        let words = stored.words(".qweight", &[n, k / 8])?;
        let padded = stored.floats(".scales", &[n, columns])?;
        let kept: Vec<f32> = padded.values.chunks_exact(columns).flat_map(|row| &row[..groups]).copied().collect();
        let scales = transpose(&kept, groups);
        let zeros = match stored.has(".qzeros") {
            true => {
                let words = stored.words(".qzeros", &[n, columns / 8])?;
                let fields = transpose(&unpack_rows(&words, columns / 8, 4, groups), groups);
                fields.into_iter().map(f32::from).collect()
            }
            false => vec![8.0; scales.len()],
        };
        let codes = Codes::Words(transpose(&words, words.len() / n));
        let dtype = padded.dtype;
        let grid = IntGrid { bits: 4, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype };
        grid.into_weight(stored, ".qweight")
    }

    /// The group size; groups must be whole.
    fn whole_groups(&self, stored: &Stored<'_>, groups: usize, k: usize) -> Result<usize> {
        super::resolve_group_size(self.group_size, groups, k)
            .filter(|group_size| group_size * groups == k)
            .ok_or_else(|| stored.error(".scales", format!("has {groups} groups, which do not divide {k} channels")))
    }
}
