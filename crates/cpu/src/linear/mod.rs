//! Linear layers, gated products and embedding look-up.
//!
//! A task computes whole tiles of sixteen columns for some rows; a row's arithmetic is the same whichever rows and tiles
//! share its task, so results depend neither on the split nor on the batch.

mod batched;
pub(crate) mod decode;
pub(crate) mod epilogue;
mod exact;
pub(crate) mod exl3;
mod input_order;
mod int8;

use std::ops::Range;

use marlin_ops::activation::{ACTIVATION_BLOCK, takes_int8_activations};
use marlin_ops::linear::{
    Activation, EmbeddingArgs, EpilogueArgs, GatedUpArgs, GemmBatchedArgs, InputNorm, LinearArgs, Projection,
    ProjectionsArgs, Residual, embedding_id_error,
};
use marlin_ops::{LinearOps, Result};

pub(crate) use self::exl3::{DoubledCodes, RotatedBlock};
use self::exl3::{ForWeight, PREPARED};
pub(crate) use self::int8::ActivationBlock;
use self::int8::{PAIR, QuantizeRows, Tile};
use crate::Cpu;
use crate::ahead::Reads;
use crate::buffer::{f32s, f32s_mut, u32s};
use crate::layout::exl3::SPAN;
use crate::layout::{CodeOrder, PackedWeight, Values};
use crate::norm::{Input, RmsNorm};
use crate::simd::{Kernel, LANES, Line, Simd};
use crate::workspace::Scratch;

/// Least rows of one task when rows are split among tasks: enough to pay for decoding the weights again.
const LEAST_ROWS: usize = 64;
/// Most rows of one task.
const MOST_ROWS: usize = 288;
/// Bytes of activations that a task keeps in the second-level cache.
const CACHED_BYTES: usize = 640 << 10;
/// Tiles whose columns are written together, row by row.
const WRITTEN_TILES: usize = 8;
const _: () = assert!(WRITTEN_TILES.is_multiple_of(SPAN));
/// Rows of one pass over the widest kernel's registers.
const ROW_STEP: usize = 6;

/// Elements of a pass over rows that are worth sharing.
const SPREAD_ELEMENTS: usize = 1 << 15;

/// Some rows of a matrix, possibly picked by index.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
    first: usize,
    index: Option<&'a [u32]>,
}

impl<'a, T> Rows<'a, T> {
    /// Row `i`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        let row = match self.index {
            Some(index) => index[self.first + i] as usize,
            None => self.first + i,
        };
        &self.data[row * self.stride..][..self.stride]
    }
}

/// Activation rows in the forms that some weights take.
pub(crate) struct Activations<'a> {
    x: &'a [f32],
    columns: usize,
    int8: [Option<Scratch<'a, ActivationBlock>>; 3],
    rotated: [Option<ForWeight<'a>>; PREPARED],
    /// No weight takes quantized activations.
    f32_only: bool,
    /// Row numbers, when the rows of a product are not consecutive.
    index: Option<&'a [u32]>,
}

impl<'a> Activations<'a> {
    /// Row i of products is `index[i]`.
    pub(crate) fn with_index(mut self, index: &'a [u32]) -> Self {
        self.index = Some(index);
        self
    }

    /// Products of these rows are never quantized.
    pub(crate) fn f32_only(mut self) -> Self {
        self.f32_only = true;
        self
    }
}

/// Scratch of one task, taken by the first product that needs it: threads share its source, and int8 products of a
/// single row do without.
pub(crate) struct Panels<'a> {
    cpu: &'a Cpu,
    in_features: usize,
    floats: Option<Scratch<'a, Line<f32>>>,
    codes: Option<Scratch<'a, Line<u32>>>,
    /// The latest rotated rows of the task's own.
    rotated: [Option<ForWeight<'a>>; 2],
}

impl Panels<'_> {
    /// Floats and codes that are enough for whichever product comes first.
    fn lines(&mut self) -> (&mut [Line<f32>], &mut [Line<u32>]) {
        let (codes, floats) = int8::panel_lines(self.in_features);
        let workspace = &self.cpu.workspace;
        (
            self.floats.get_or_insert_with(|| workspace.lines.take(floats.max(decode::PANEL))),
            self.codes.get_or_insert_with(|| workspace.codes.take(codes.max(exl3::CODE_PANEL))),
        )
    }
}

impl Cpu {
    /// The order of the int8 activations that a weight takes, or none for f32.
    fn int8_order(&self, weight: &PackedWeight) -> Option<CodeOrder> {
        match &weight.values {
            Values::Quantized(q) if !self.exact() && takes_int8_activations(&q.scheme) => {
                Some(CodeOrder::of(q.scheme.format.layout()))
            }
            _ => None,
        }
    }

    /// Rows of `columns` activations, prepared for the given weights. `spread` lets other threads help.
    pub(crate) fn activations<'a>(
        &'a self,
        x: &'a [f32],
        columns: usize,
        weights: &[&PackedWeight],
        spread: bool,
    ) -> Activations<'a> {
        let mut out = Activations {
            x,
            columns,
            int8: [None, None, None],
            rotated: [const { None }; PREPARED],
            f32_only: false,
            index: None,
        };
        self.prepare_activations(&mut out, weights, spread);
        out
    }

    /// Adds the forms that more weights take.
    pub(crate) fn prepare_activations<'a>(
        &'a self,
        activations: &mut Activations<'a>,
        weights: &[&PackedWeight],
        spread: bool,
    ) {
        let (x, columns) = (activations.x, activations.columns);
        for order in weights.iter().filter_map(|w| self.int8_order(w)) {
            let slot = &mut activations.int8[order as usize];
            if slot.is_some() || columns == 0 {
                continue;
            }
            let (rows, per_row) = (x.len() / columns, columns.div_ceil(ACTIVATION_BLOCK));
            let mut blocks = self.workspace.blocks.take(rows * per_row);
            if spread && x.len() >= SPREAD_ELEMENTS {
                let grain = self.pool.grain(rows);
                self.pool.for_chunks(&mut blocks, grain * per_row, |i, blocks| {
                    self.level.run(QuantizeRows { x: &x[i * grain * columns..], columns, order, out: blocks });
                });
            } else {
                self.level.run(QuantizeRows { x, columns, order, out: &mut blocks });
            }
            *slot = Some(blocks);
        }
    }

    /// Rotates all rows, instead of each task its own, for the weights that take rotated ones.
    fn rotate_activations<'a>(&'a self, activations: &mut Activations<'a>, weights: &[&PackedWeight]) {
        for weight in weights {
            if let Values::Exl3(q) = &weight.values {
                self.prepare_rotated(activations, q);
            }
        }
    }

    /// Rows of `columns` after an operation's input norm; none without one.
    fn normalized(
        &self,
        operation: &'static str,
        x: &[f32],
        columns: usize,
        norm: Option<&InputNorm<'_, Self>>,
    ) -> Result<Option<Scratch<'_, f32>>> {
        let Some(norm) = norm else {
            return Ok(None);
        };
        let gamma = Some(f32s(operation, "gamma", norm.gamma)?);
        let norm = RmsNorm { gamma, gamma_offset: norm.gamma_offset, eps: norm.eps };
        let mut normed = self.workspace.floats.take(x.len());
        self.normalize_rows(norm, &Input::X(x), columns, &mut normed);
        Ok(Some(normed))
    }

    /// Products of the same rows of `columns`.
    fn project_rows(
        &self,
        x: &[f32],
        [rows, columns]: [usize; 2],
        projections: &mut [Projection<'_, Self>],
    ) -> Result<()> {
        let mut x = self.activations(x, columns, &[], true);
        for projection in &*projections {
            self.prepare_activations(&mut x, &[projection.weight.data()], true);
            self.rotate_activations(&mut x, &[projection.weight.data()]);
        }
        if rows == 1 {
            return self.project_row(&x, projections);
        }
        for Projection { weight, out } in projections {
            let weight = weight.data();
            let layer = Layer { weight, activation: Activation::None, scale: 1.0 };
            let out = f32s_mut("projections", "out", out)?;
            self.fill(Shape::of(&weight, rows), Addend::None, out, |tiles, rows, panels, acc| {
                self.linear_tiles(&layer, tiles, &x, rows, panels, acc);
            });
        }
        Ok(())
    }

    /// Several products of one row, shared out as one.
    fn project_row(&self, x: &Activations<'_>, projections: &mut [Projection<'_, Self>]) -> Result<()> {
        let weights = |i: usize| projections[i].weight.data();
        let step = (0..projections.len()).map(|i| weights(i).step()).max().unwrap_or(1);
        // The tiles of a weight and those that fill up its last step.
        let padded = |weight: &PackedWeight| weight.tiles().next_multiple_of(step);
        let tiles = (0..projections.len()).map(|i| padded(weights(i))).sum();
        let mut lines = self.workspace.lines.take(tiles);
        // The weight of a step, and its first tile there.
        let place = |step_index: usize| {
            let (mut weight, mut tile) = (0, step_index * step);
            while tile >= padded(weights(weight)) {
                tile -= padded(weights(weight));
                weight += 1;
            }
            (weight, tile)
        };
        let reads = |first| {
            let (weight, tile) = place(first);
            Reads::of(weights(weight).addresses(tile).into_iter())
        };
        self.pool.for_parts(tiles * LANES * x.columns, &mut lines, step, reads, |first, lines| {
            let mut panels = self.panels(x.columns);
            let (mut weight, mut tile) = place(first);
            for lines in lines.chunks_exact_mut(step) {
                while tile == padded(weights(weight)) {
                    (weight, tile) = (weight + 1, 0);
                }
                let end = weights(weight).tiles().min(tile + step);
                self.multiply_any(weights(weight), tile..end, x, 0..1, &mut panels, lines);
                if weights(weight).bias.is_some() {
                    let layer = Layer { weight: weights(weight), activation: Activation::None, scale: 1.0 };
                    self.finish(&layer, tile..end, 1, lines);
                }
                tile += step;
            }
        });
        let mut lines = &lines[..];
        for Projection { weight, out } in projections {
            let (own, others) = lines.split_at(padded(weight.data()));
            for (line, out) in own.iter().zip(f32s_mut("projections", "out", out)?.chunks_mut(LANES)) {
                out.copy_from_slice(&line.0[..out.len()]);
            }
            lines = others;
        }
        Ok(())
    }

    /// Scratch for products with weights of at most `in_features`.
    pub(crate) fn panels(&self, in_features: usize) -> Panels<'_> {
        Panels { cpu: self, in_features, floats: None, codes: None, rotated: [None, None] }
    }

    /// `acc[t][r] = x[rows[r]] W_t` for the columns of one or two tiles; two tiles share a format and size.
    fn multiply_tiles(
        &self,
        tiles: &[(&PackedWeight, usize)],
        x: &Activations<'_>,
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        debug_assert_eq!(acc.len(), tiles.len() * rows.len());
        let order = self.int8_order(tiles[0].0);
        let int8 = order.and_then(|order| x.int8[order as usize].as_deref());
        let (floats, codes): (&mut [_], &mut [_]) = match int8 {
            Some(_) if rows.len() == 1 => (&mut [], &mut []),
            _ => panels.lines(),
        };
        self.level.run(TileProduct {
            tiles,
            x: Rows { data: x.x, stride: x.columns, first: rows.start, index: x.index },
            int8: int8.map(|data| Rows {
                data,
                stride: x.columns.div_ceil(ACTIVATION_BLOCK),
                first: rows.start,
                index: x.index,
            }),
            floats,
            codes,
            acc,
        });
    }

    /// `acc[r] = x[rows[r]] W` for the columns of one tile.
    pub(crate) fn multiply_tile(
        &self,
        weight: &PackedWeight,
        tile: usize,
        x: &Activations<'_>,
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        self.multiply_tiles(&[(weight, tile)], x, rows, panels, acc);
    }

    /// [`Cpu::multiply_tile`] of consecutive tiles, at most [`PackedWeight::step`] of them with the first a multiple of
    /// it where that is not 1. `acc` is `[tiles][rows]` with room for a whole step.
    pub(crate) fn multiply_any(
        &self,
        weight: &PackedWeight,
        tiles: Range<usize>,
        x: &Activations<'_>,
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        let count = rows.len();
        if let Values::Exl3(q) = &weight.values {
            let acc = &mut acc[..SPAN * count];
            return self.multiply_span((weight, q), tiles.start / SPAN, x, rows, panels, acc);
        }
        for (tile, acc) in tiles.zip(acc.chunks_exact_mut(count)) {
            self.multiply_tile(weight, tile, x, rows.clone(), panels, acc);
        }
    }

    /// Products of one or two consecutive tiles, or of a step of a weight that has longer ones (see
    /// [`Cpu::multiply_any`]), then bias, activation and scale; `acc` is `[tiles][rows]`.
    pub(crate) fn linear_tiles(
        &self,
        layer: &Layer<'_>,
        tiles: Range<usize>,
        x: &Activations<'_>,
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        let weight = layer.weight;
        let acc = &mut acc[..tiles.len().max(weight.step()) * rows.len()];
        match weight.step() {
            1 => {
                let pair = [(weight, tiles.start), (weight, tiles.start + 1)];
                self.multiply_tiles(&pair[..tiles.len()], x, rows.clone(), panels, acc);
            }
            _ => self.multiply_any(weight, tiles.clone(), x, rows.clone(), panels, acc),
        }
        let sums_only = layer.activation == Activation::None && layer.scale == 1.0 && weight.bias.is_none();
        if !sums_only {
            self.finish(layer, tiles, rows.len(), acc);
        }
    }

    /// Bias, activation and scale of some tiles; `acc` is `[tiles][rows]`, possibly with room for more tiles.
    fn finish(&self, layer: &Layer<'_>, tiles: Range<usize>, count: usize, acc: &mut [Line<f32>]) {
        for (tile, lines) in tiles.zip(acc.chunks_exact_mut(count)) {
            self.level.run(epilogue::Finish {
                bias: layer.weight.bias_line(tile),
                activation: layer.activation,
                scale: layer.scale,
                lines,
            });
        }
    }

    /// A step of `act(x Wg) * (x Wu)`, see [`Gated::step`], of the rows as gate and as up read them; `acc` has two lines per
    /// row and tile of a whole step, the results in the first half.
    pub(crate) fn gated_tiles(
        &self,
        gated: &Gated<'_>,
        tiles: Range<usize>,
        [x, x_up]: [&Activations<'_>; 2],
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        let count = rows.len();
        if std::ptr::eq(x, x_up) && gated.gate.pairs_with(gated.up) {
            let tile = tiles.start;
            self.multiply_tiles(&[(gated.gate, tile), (gated.up, tile)], x, rows, panels, acc);
        } else {
            let (gate, up) = acc.split_at_mut(acc.len() / 2);
            self.multiply_any(gated.gate, tiles.clone(), x, rows.clone(), panels, gate);
            self.multiply_any(gated.up, tiles.clone(), x_up, rows, panels, up);
        }
        let (gate, up) = acc.split_at_mut(acc.len() / 2);
        for (tile, (gate, up)) in tiles.zip(gate.chunks_exact_mut(count).zip(up.chunks_exact(count))) {
            self.level.run(epilogue::Combine {
                gate_bias: gated.gate.bias_line(tile),
                up_bias: gated.up.bias_line(tile),
                activation: gated.activation,
                gate,
                up,
            });
        }
    }

    /// Fills `out`, rows of `columns`, from lines `[tiles][rows]` that `produce(tiles, rows, panels, acc)` computes at
    /// the start of `acc`, for up to `shape.step` tiles at a time; `acc` has `shape.lines` lines per row.
    fn fill(
        &self,
        shape: Shape<'_>,
        residual: Addend<'_>,
        out: &mut [f32],
        produce: impl Fn(Range<usize>, Range<usize>, &mut Panels<'_>, &mut [Line<f32>]) + Sync,
    ) {
        let Shape { rows: m, columns: n, in_features: k, step, lines: per_row, .. } = shape;
        let tiles = n.div_ceil(LANES);
        if m == 1 {
            self.pool.for_parts(
                n * k,
                out,
                step * LANES,
                |first| shape.reads(first),
                |first, out| {
                    let mut panels = self.panels(k);
                    let mut acc = [Line::default(); PAIR * SPAN];
                    for (tile, out) in (first * step..).step_by(step).zip(out.chunks_mut(step * LANES)) {
                        let count = out.len().div_ceil(LANES);
                        produce(tile..tile + count, 0..1, &mut panels, &mut acc[..per_row]);
                        for (t, out) in out.chunks_mut(LANES).enumerate() {
                            residual.write((tile + t) * LANES, &acc[t], out);
                        }
                    }
                },
            );
        } else if m >= 2 * LEAST_ROWS * self.pool.threads() {
            let block = self.row_block(m, k);
            self.pool.for_chunks(out, block * n, |i, out| {
                let (rows, first) = (out.len() / n, i * block);
                let mut panels = self.panels(k);
                let mut acc = self.workspace.lines.take((WRITTEN_TILES + per_row) * rows);
                for group in (0..tiles).step_by(WRITTEN_TILES) {
                    let end = tiles.min(group + WRITTEN_TILES);
                    for tile in (group..end).step_by(step) {
                        let acc = &mut acc[(tile - group) * rows..][..per_row * rows];
                        produce(tile..end.min(tile + step), first..first + rows, &mut panels, acc);
                    }
                    for (r, out) in out.chunks_exact_mut(n).enumerate() {
                        for (lines, tile) in acc.chunks_exact(rows).zip(group..end) {
                            let columns = tile * LANES..n.min((tile + 1) * LANES);
                            let start = (first + r) * n + columns.start;
                            residual.write(start, &lines[r], &mut out[columns]);
                        }
                    }
                }
            });
        } else {
            self.fill_by_tile(shape, residual, out, produce);
        }
    }

    /// Rows of a task when rows are split: few enough for their activations to stay in the second-level cache.
    fn row_block(&self, rows: usize, in_features: usize) -> usize {
        let row_bytes = in_features.div_ceil(ACTIVATION_BLOCK) * size_of::<ActivationBlock>();
        let most = (CACHED_BYTES / row_bytes.max(1)).clamp(LEAST_ROWS, MOST_ROWS);
        // Tasks of equal size, as many for one thread as for the other.
        let tasks = rows.div_ceil(most).next_multiple_of(self.pool.threads());
        rows.div_ceil(tasks).next_multiple_of(ROW_STEP)
    }

    /// Few rows: tasks take tiles, then a second pass puts the tiles side by side.
    fn fill_by_tile(
        &self,
        shape: Shape<'_>,
        residual: Addend<'_>,
        out: &mut [f32],
        produce: impl Fn(Range<usize>, Range<usize>, &mut Panels<'_>, &mut [Line<f32>]) + Sync,
    ) {
        let Shape { rows: m, columns: n, step, .. } = shape;
        let tiles = n.div_ceil(LANES);
        let per_step = shape.lines * m;
        let mut lines = self.workspace.lines.take(tiles.div_ceil(step) * per_step);
        let work = m * n * shape.in_features;
        self.pool.for_parts(
            work,
            &mut lines,
            per_step,
            |first| shape.reads(first),
            |first, lines| {
                let mut panels = self.panels(shape.in_features);
                for (tile, acc) in (first * step..).step_by(step).zip(lines.chunks_exact_mut(per_step)) {
                    produce(tile..tiles.min(tile + step), 0..m, &mut panels, acc);
                }
            },
        );
        let row_grain = match m * n < SPREAD_ELEMENTS {
            true => m,
            false => self.pool.grain(m),
        };
        self.pool.for_chunks(out, row_grain * n, |i, out| {
            for (r, out) in out.chunks_exact_mut(n).enumerate() {
                let row = i * row_grain + r;
                for (tile, out) in out.chunks_mut(LANES).enumerate() {
                    let line = &lines[tile / step * per_step + tile % step * m + row];
                    residual.write(row * n + tile * LANES, line, out);
                }
            }
        });
    }
}

/// A weight with its epilogue.
pub(crate) struct Layer<'a> {
    pub(crate) weight: &'a PackedWeight,
    pub(crate) activation: Activation,
    pub(crate) scale: f32,
}

/// A gated pair of weights.
pub(crate) struct Gated<'a> {
    pub(crate) gate: &'a PackedWeight,
    pub(crate) up: &'a PackedWeight,
    pub(crate) activation: Activation,
}

impl Gated<'_> {
    /// Tiles computed together.
    pub(crate) fn step(&self) -> usize {
        self.gate.step().max(self.up.step())
    }
}

#[derive(Clone, Copy)]
struct Shape<'a> {
    /// One weight, or two of the same tiles.
    weights: &'a [&'a PackedWeight],
    rows: usize,
    columns: usize,
    in_features: usize,
    /// Tiles computed together.
    step: usize,
    /// Lines per row that computing them takes.
    lines: usize,
}

impl<'a> Shape<'a> {
    /// The output of one weight.
    fn of(weight: &'a &'a PackedWeight, rows: usize) -> Self {
        let step = weight.step().max(PAIR);
        Self {
            weights: std::slice::from_ref(weight),
            rows,
            columns: weight.out_features,
            in_features: weight.in_features,
            step,
            lines: step,
        }
    }

    /// What a thread reads that goes on from step `first`.
    fn reads(&self, first: usize) -> Reads {
        Reads::of(self.weights.iter().flat_map(|weight| weight.addresses(first * self.step)))
    }
}

/// What is added to an output element.
#[derive(Clone, Copy)]
pub(crate) enum Addend<'a> {
    None,
    Add(&'a [f32]),
    InPlace,
}

impl<'a> Addend<'a> {
    pub(crate) fn of(operation: &'static str, residual: &Residual<'a, Cpu>) -> Result<Self> {
        Ok(match *residual {
            Residual::None => Self::None,
            Residual::Add(tensor) => Self::Add(f32s(operation, "residual", tensor)?),
            Residual::InPlace => Self::InPlace,
        })
    }

    /// Writes the first `out.len()` lanes plus the addend; `out` starts at element `start` of the output.
    #[inline]
    fn write(&self, start: usize, line: &Line<f32>, out: &mut [f32]) {
        match out.first_chunk_mut::<LANES>() {
            // Most tiles are whole: a constant length spares a call.
            Some(out) => self.write_lanes(start, &line.0[..], &mut out[..]),
            None => self.write_lanes(start, &line.0[..out.len()], out),
        }
    }

    #[inline(always)]
    fn write_lanes(&self, start: usize, values: &[f32], out: &mut [f32]) {
        match self {
            Self::None => out.copy_from_slice(values),
            Self::Add(residual) => {
                let residual = &residual[start..start + values.len()];
                for ((out, v), r) in out.iter_mut().zip(values).zip(residual) {
                    *out = v + r;
                }
            }
            Self::InPlace => {
                for (out, v) in out.iter_mut().zip(values) {
                    *out += v;
                }
            }
        }
    }
}

struct TileProduct<'a> {
    tiles: &'a [(&'a PackedWeight, usize)],
    x: Rows<'a, f32>,
    int8: Option<Rows<'a, ActivationBlock>>,
    floats: &'a mut [Line<f32>],
    codes: &'a mut [Line<u32>],
    acc: &'a mut [Line<f32>],
}

impl Kernel for TileProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { floats, codes, .. } = self;
        let quantized = |i: usize| match self.tiles.get(i) {
            Some(&(PackedWeight { values: Values::Quantized(weight), .. }, index)) => Some(Tile { weight, index }),
            _ => None,
        };
        match (self.int8, quantized(0), quantized(1)) {
            (Some(x), Some(first), second) => {
                let pair = [first, second.unwrap_or(first)];
                int8::multiply(s, &pair[..self.tiles.len()], x, codes, floats, self.acc);
            }
            _ => {
                let rows = self.acc.len() / self.tiles.len();
                for (&(weight, tile), acc) in self.tiles.iter().zip(self.acc.chunks_exact_mut(rows)) {
                    exact::multiply(s, weight, tile, self.x, floats, acc);
                }
            }
        }
    }
}

impl LinearOps for Cpu {
    fn run_linear(&self, args: LinearArgs<'_, Self>) -> Result<()> {
        const OP: &str = "linear";
        let weight = args.weight.data();
        let layer = Layer { weight, activation: args.activation, scale: args.out_scale };
        let residual = Addend::of(OP, &args.residual)?;
        let x = f32s(OP, "x", args.x)?;
        let ordered = self.ordered_rows(x, weight.input_order.as_ref());
        let mut x = self.activations(ordered.as_deref().unwrap_or(x), weight.in_features, &[weight], true);
        self.rotate_activations(&mut x, &[weight]);
        let out = f32s_mut(OP, "out", args.out)?;
        self.fill(Shape::of(&weight, args.x.rows()), residual, out, |tiles, rows, panels, acc| {
            self.linear_tiles(&layer, tiles, &x, rows, panels, acc);
        });
        Ok(())
    }

    fn run_projections(&self, args: ProjectionsArgs<'_, '_, Self>) -> Result<()> {
        const OP: &str = "projections";
        let x = f32s(OP, "x", args.x)?;
        let normed = self.normalized(OP, x, args.x.columns(), args.norm.as_ref())?;
        let x = normed.as_deref().unwrap_or(x);
        for projections in
            args.projections.chunk_by_mut(|a, b| a.weight.data().input_order == b.weight.data().input_order)
        {
            let ordered = self.ordered_rows(x, projections[0].weight.data().input_order.as_ref());
            self.project_rows(ordered.as_deref().unwrap_or(x), [args.x.rows(), args.x.columns()], projections)?;
        }
        Ok(())
    }

    fn run_gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "gated_up";
        let gated = Gated { gate: args.gate.data(), up: args.up.data(), activation: args.activation };
        let in_features = gated.gate.in_features;
        let (columns, step) = (gated.gate.out_features, gated.step());
        let x = f32s(OP, "x", args.x)?;
        let normed = self.normalized(OP, x, in_features, args.norm.as_ref())?;
        let weights = [gated.gate, gated.up];
        let rows = args.x.rows();
        let shape = Shape { weights: &weights, rows, columns, in_features, step, lines: PAIR * step };
        let x = normed.as_deref().unwrap_or(x);
        // Rows for both weights or, where they read channels in different orders, for each.
        let both = gated.gate.input_order == gated.up.input_order;
        let gate_rows = self.ordered_rows(x, gated.gate.input_order.as_ref());
        let up_rows = if both { None } else { self.ordered_rows(x, gated.up.input_order.as_ref()) };
        let weights_of_x = if both { &weights[..] } else { &weights[..1] };
        let mut x_gate = self.activations(gate_rows.as_deref().unwrap_or(x), in_features, weights_of_x, true);
        self.rotate_activations(&mut x_gate, weights_of_x);
        let mut x_up = None;
        if !both {
            let rows = up_rows.as_deref().unwrap_or(x);
            let x_up = x_up.insert(self.activations(rows, in_features, &weights[1..], true));
            self.rotate_activations(x_up, &weights[1..]);
        }
        let x = [&x_gate, x_up.as_ref().unwrap_or(&x_gate)];
        let out = f32s_mut(OP, "out", args.out)?;
        self.fill(shape, Addend::None, out, |tiles, rows, panels, acc| {
            self.gated_tiles(&gated, tiles, x, rows, panels, acc);
        });
        Ok(())
    }

    fn run_embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()> {
        const OP: &str = "embedding";
        let (ids, table) = (u32s(OP, "ids", args.ids)?, args.table.data());
        let vocab = table.out_features;
        if let Some(i) = ids.iter().position(|&id| id as usize >= vocab) {
            return Err(embedding_id_error(i, ids[i], vocab));
        }
        let out = f32s_mut(OP, "out", args.out)?;
        self.pool.for_chunks(out, table.in_features, |t, row| {
            table.column(ids[t] as usize, row);
        });
        Ok(())
    }

    fn run_gemm_batched(&self, args: GemmBatchedArgs<'_, Self>) -> Result<()> {
        batched::gemm_batched(self, args)
    }

    fn run_apply_epilogue(&self, args: EpilogueArgs<'_, Self>) -> Result<()> {
        batched::apply_epilogue(self, args)
    }
}
