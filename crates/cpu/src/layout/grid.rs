//! Grid codes in column tiles: `[tiles][code rows][16]` u32 as of quantized weights, `[tiles][groups][16]` f32 scales. The
//! signs of inputs and outputs are in them.

use marlin_formats::grid::GridMatrix;
use marlin_formats::pack::Layout;
use marlin_ops::Result;
use marlin_ops::activation::ACTIVATION_BLOCK;

use super::{tile_codes, tile_rows, unit_code};
use crate::Cpu;
use crate::arena::Array;
use crate::simd::Line;

/// Codes whose values are a table of the weight's own.
pub(crate) struct Grid {
    pub(crate) layout: Layout,
    pub(crate) group_size: usize,
    /// Lines of codes per tile.
    code_rows: usize,
    /// Lines of scales per tile.
    pub(crate) groups: usize,
    codes: Array<Line<u32>>,
    pub(crate) scales: Array<Line<f32>>,
    /// By code; bits above those of a code do not matter.
    pub(crate) levels: Box<[f32; 256]>,
}

impl Grid {
    /// Repacks a matrix, which is validated.
    pub(super) fn new(cpu: &Cpu, matrix: &GridMatrix) -> Result<Self> {
        let (n, k) = (matrix.out_features, matrix.in_features);
        let folded = matrix.folded()?;
        let code_rows = folded.layout.rows(k.next_multiple_of(ACTIVATION_BLOCK));
        let groups = k.div_ceil(folded.group_size);
        Ok(Self {
            layout: folded.layout,
            group_size: folded.group_size,
            code_rows,
            groups,
            codes: tile_codes(cpu, &folded.words, n, folded.layout, code_rows)?,
            scales: tile_rows(cpu, &folded.scales, n, groups, |line: &mut Line<f32>, lane, scale| {
                line.0[lane] = scale
            })?,
            levels: folded.levels,
        })
    }

    /// Lines of codes of a tile.
    pub(crate) fn tile_codes(&self, tile: usize) -> &[Line<u32>] {
        &self.codes_from(tile)[..self.code_rows]
    }

    /// Lines of codes from a tile to the last.
    pub(crate) fn codes_from(&self, tile: usize) -> &[Line<u32>] {
        &self.codes[tile * self.code_rows..]
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        size_of_val(&self.codes[..]) + size_of_val(&self.scales[..])
    }

    /// Weights of a column.
    pub(super) fn column(&self, tile: usize, lane: usize, out: &mut [f32]) {
        let (unit, words) = (self.layout.codes_per_unit(), self.layout.words_per_unit());
        let codes = self.tile_codes(tile);
        for (g, out) in out.chunks_mut(self.group_size).enumerate() {
            let scale = self.scales[tile * self.groups + g].0[lane];
            for (i, out) in out.iter_mut().enumerate() {
                let k = g * self.group_size + i;
                let code = unit_code(self.layout, |w| codes[k / unit * words + w].0[lane], k % unit);
                *out = self.levels[code as usize % 256] * scale;
            }
        }
    }
}
