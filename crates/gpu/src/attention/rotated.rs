//! The rotations of an EXL3 `kv_b = diag(suh) H W H diag(svh)` around the products of a head with its part of W.
//!
//! A head's columns need not begin or end at a block of 128, so a row is rotated as the spans of 128 columns that its head
//! touches, with 0 at the columns of other heads.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::attention::{MlaAttentionArgs, MlaDims};
use marlin_ops::{Result, Tensor};

use super::latent::{Heads, launch_absorb, launch_value};
use crate::decode::Decoder;
use crate::element::{Storage, load, store};
use crate::launch::{cubes, units};
use crate::linear::exl3::rotate::{BLOCKS, LANES, NORM, has_planes, transform};
use crate::linear::exl3::{Rows, Unfolded, unfold};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// Channels of a lane.
const CHANNELS: usize = HADAMARD / LANES;

/// Where the channels of rows lie.
struct Spans {
    /// Rows of all heads, and heads.
    rows: usize,
    heads: usize,
    /// Head h has the channels `h of_head + offset ..` and `count` of them.
    of_head: usize,
    offset: usize,
    count: usize,
    /// Channels of the weight, padded.
    channels: usize,
}

impl Spans {
    /// Columns of the weight.
    fn columns(heads: &Heads, weight: &GpuWeight) -> Self {
        let Heads { rows, heads, of_head, offset, count, .. } = *heads;
        Self { rows, heads, of_head, offset, count, channels: weight.padded_out() }
    }

    /// Latent features, which all heads share.
    fn latent(d: MlaDims, weight: &GpuWeight) -> Self {
        let (rows, channels) = (d.batch * d.queries, weight.padded_in());
        Self { rows, heads: d.heads, of_head: 0, offset: 0, count: d.rank, channels }
    }

    /// Most spans that a head touches.
    fn len(&self) -> usize {
        let aligned = self.of_head.is_multiple_of(HADAMARD) && self.offset.is_multiple_of(HADAMARD);
        // At worst the first channel is the last of its span.
        let before = if aligned { 0 } else { HADAMARD - 1 };
        (before + self.count).div_ceil(HADAMARD)
    }

    /// Transforms of all rows.
    fn blocks(&self) -> usize {
        self.rows * self.heads * self.len()
    }
}

/// What [`rotate`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct RotateConfig {
    x: Storage,
    out: Storage,
    back: bool,
    planes: bool,
}

/// Between rows `[rows H, stride]`, with the channels of the head from 0 on, and spans `[rows H, spans, 128]`: there
/// `out = had(x * scale)`, or back `out = had(x) * scale`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate<X: Numeric, O: Numeric>(
    x: &[X],
    scale: &[f16],
    out: &mut [O],
    rows: u32,
    heads: u32,
    of_head: u32,
    offset: u32,
    count: u32,
    all: u32,
    stride: u32,
    spans: u32,
    #[comptime] c: RotateConfig,
    #[define(X, O)] _elements: [ElemType; 2],
) {
    let at = CUBE_POS * BLOCKS + UNIT_POS as usize / LANES;
    let lane = UNIT_POS as usize % LANES;
    let row = at / spans as usize;
    let known = row < (rows * heads) as usize;
    let first = row % heads as usize * of_head as usize + offset as usize;
    let first_channel = (first / HADAMARD + at % spans as usize) * HADAMARD + lane * CHANNELS;
    let in_spans = at * HADAMARD + lane * CHANNELS;
    let mut values = Array::<f32>::new(CHANNELS);
    #[unroll]
    for i in 0..CHANNELS {
        let channel = first_channel + i;
        let inside = known && channel >= first && channel < first + count as usize && channel < all as usize;
        if comptime!(c.back) {
            values[i] = load::<X>(x, select(known, in_spans + i, 0usize), c.x);
        } else {
            let from = select(inside, row * stride as usize + channel - first, 0usize);
            let value = load::<X>(x, from, c.x) * f32::cast_from(scale[select(inside, channel, 0usize)]);
            values[i] = select(inside, value, f32::new(0.0));
        }
    }
    transform(&mut values, c.planes);
    #[unroll]
    for i in 0..CHANNELS {
        let channel = first_channel + i;
        let inside = known && channel >= first && channel < first + count as usize && channel < all as usize;
        let value = values[i] * NORM;
        if comptime!(!c.back) {
            if known {
                store::<O>(out, in_spans + i, value, c.out);
            }
        } else if inside {
            let to = row * stride as usize + channel - first;
            store::<O>(out, to, value * f32::cast_from(scale[channel]), c.out);
        }
    }
}

/// Copies the last `width` of `x [rows, from_stride]` to the last of `out [rows, to_stride]`.
#[cube(launch_unchecked)]
fn copy_tails<X: Numeric>(
    x: &[X],
    out: &mut [f32],
    rows: u32,
    width: u32,
    from_stride: u32,
    to_stride: u32,
    #[comptime] storage: Storage,
    #[define(X)] _element: ElemType,
) {
    let (row, column) = (ABSOLUTE_POS / width as usize, ABSOLUTE_POS % width as usize);
    if row < rows as usize {
        let from = (row + 1) * from_stride as usize - width as usize + column;
        out[(row + 1) * to_stride as usize - width as usize + column] = load::<X>(x, from, storage);
    }
}

/// `[rows H, n + R]` to `[rows H, r + R]`: `suh had(W had(svh q))`, and the tail as it is.
pub(super) fn absorb<R: Runtime>(
    gpu: &Gpu<R>,
    args: &MlaAttentionArgs<'_, Gpu<R>>,
    absorbed: &Tensor<Gpu<R>>,
) -> Result<()> {
    const OP: &str = "mla_decode";
    let (d, weight) = (args.dims(), args.kv_b.data());
    let columns = Spans::columns(&Heads::of_queries(d), weight);
    let latent = Spans::latent(d, weight);
    let rows = d.batch * d.queries * d.heads;
    let rotated = gpu.scratch(OP, DType::F32, &[rows, columns.len() * HADAMARD])?;
    launch_rotate(gpu, &columns, [args.q, &rotated], d.nope + d.rope, (&weight.zeros, weight.zero_count), false);
    let inner = gpu.scratch(OP, DType::F32, &[rows, weight.padded_in()])?;
    let heads = Heads { count: columns.len() * HADAMARD, rope: 0, ..Heads::of_queries(d) };
    launch_absorb(gpu, weight, &heads, &rotated, &inner);
    launch_rotate(gpu, &latent, [&inner, absorbed], d.rank + d.rope, (&weight.scales, weight.scale_count), true);
    if d.rope > 0 {
        let storage = Storage::of(args.q.dtype());
        // SAFETY: q and `absorbed` hold `rows` rows of n + R and r + R.
        unsafe {
            copy_tails::launch_unchecked::<R>(
                gpu.client(),
                crate::launch::cubes_for(rows * d.rope),
                units(),
                args.q.buffer().arg(args.q.elements()),
                absorbed.buffer().arg(absorbed.elements()),
                rows as u32,
                d.rope as u32,
                (d.nope + d.rope) as u32,
                (d.rank + d.rope) as u32,
                storage,
                storage.elem(),
            );
        }
    }
    Ok(())
}

/// `[rows H, r]` to `[rows H, v]`: `svh had(had(suh sums) W)`.
pub(super) fn value<R: Runtime>(
    gpu: &Gpu<R>,
    args: &MlaAttentionArgs<'_, Gpu<R>>,
    sums: &Tensor<Gpu<R>>,
) -> Result<()> {
    const OP: &str = "mla_decode";
    let (d, weight) = (args.dims(), args.kv_b.data());
    let (latent, columns) = (Spans::latent(d, weight), Spans::columns(&Heads::of_values(d), weight));
    let rows = d.batch * d.queries * d.heads;
    let rotated = gpu.scratch(OP, DType::F32, &[rows, weight.padded_in()])?;
    launch_rotate(gpu, &latent, [sums, &rotated], d.rank, (&weight.scales, weight.scale_count), false);
    let inner = gpu.scratch(OP, DType::F32, &[rows, columns.len() * HADAMARD])?;
    let heads = Heads { count: columns.len() * HADAMARD, ..Heads::of_values(d) };
    launch_value(gpu, weight, &heads, &rotated, &inner);
    launch_rotate(gpu, &columns, [&inner, args.out], d.value, (&weight.zeros, weight.zero_count), true);
    Ok(())
}

/// An EXL3 `kv_b` as a dense weight of f32, for [`super::project::expand`]; nothing for other formats.
pub(super) fn unfolded<R: Runtime>(gpu: &Gpu<R>, args: &MlaAttentionArgs<'_, Gpu<R>>) -> Result<Option<GpuWeight>> {
    let weight = args.kv_b.data();
    let Some(trellis) = weight.trellis() else { return Ok(None) };
    let (k, n) = (weight.in_features, weight.out_features);
    let dense = gpu.scratch("mla_prefill", DType::F32, &[k, n])?;
    unfold(gpu, weight, trellis, &Rows::From(0), &Unfolded { out: &dense, rows: n, transposed: true })?;
    Ok(Some(GpuWeight {
        in_features: k,
        out_features: n,
        decoder: Decoder::dense(DType::F32),
        words: dense.buffer().clone(),
        word_count: k * n,
        scales: weight.scales.clone(),
        scale_count: weight.scale_count,
        zeros: weight.zeros.clone(),
        zero_count: weight.zero_count,
        table: weight.table.clone(),
        table_len: weight.table_len,
        bias: None,
        input_order: None,
    }))
}

/// Enqueues [`rotate`].
fn launch_rotate<R: Runtime>(
    gpu: &Gpu<R>,
    spans: &Spans,
    [x, out]: [&Tensor<Gpu<R>>; 2],
    stride: usize,
    (scale, scales): (&Buffer, usize),
    back: bool,
) {
    let (x_storage, out_storage) = (Storage::of(x.dtype()), Storage::of(out.dtype()));
    let config = RotateConfig { x: x_storage, out: out_storage, back, planes: has_planes(gpu) };
    // SAFETY: one of x and out holds rows * H rows of `stride`, the other the spans of as many, `scale` all channels; the
    // kernel compares rows and channels with their numbers.
    unsafe {
        rotate::launch_unchecked::<R>(
            gpu.client(),
            cubes(spans.blocks().div_ceil(BLOCKS)),
            units(),
            x.buffer().arg(x.elements()),
            scale.arg(scales),
            out.buffer().arg(out.elements()),
            spans.rows as u32,
            spans.heads as u32,
            spans.of_head as u32,
            spans.offset as u32,
            spans.count as u32,
            spans.channels as u32,
            stride as u32,
            spans.len() as u32,
            config,
            [x_storage.elem(), out_storage.elem()],
        );
    }
}
