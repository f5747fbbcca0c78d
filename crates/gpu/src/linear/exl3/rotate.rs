//! The rotations around the tiles: `had(x * suh)` before the product, `had(z) * svh` after it, where `had` is the
//! orthonormal Hadamard transform of every 128 channels.
//!
//! A transform belongs to 32 neighbouring units with four channels each. They exchange values through the plane if it has
//! 32 units, otherwise through shared memory.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::Tensor;

use crate::halves::{pair, rest};
use crate::launch::{UNITS, cubes, units};
use crate::linear::epilogue::{Epilogue, finish};
use crate::linear::operands::{Input, Product, load_input};
use crate::{Buffer, Gpu};

/// Units of a transform.
pub(crate) const LANES: usize = 32;

/// Transforms of a cube.
pub(crate) const BLOCKS: usize = UNITS as usize / LANES;

/// Slices whose sums [`rotate_output`] loads at once.
const SLICES_AT_ONCE: usize = 8;

/// Most transforms whose slices are shared by all planes of a cube: more keep the device busy without.
const SHARED_TRANSFORMS: usize = 512;

/// 1 / sqrt(128).
pub(crate) const NORM: f32 = 0.088_388_347_648;

/// Where the four channels of a unit lie in a block.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Channels {
    /// `4 lane` to `4 lane + 3`.
    Neighbours,
    /// `2 t`, `2 t + 1`, `2 t + 8` and `2 t + 9` of 16-channel tile `lane / 4`, `t = lane % 4`: those that a tensor-core
    /// operand has in one lane.
    Fragment,
    /// The same, but what a lane has of two neighbouring tiles lies together.
    FragmentPairs,
}

impl Channels {
    /// Channel `i` of lane 0.
    pub(crate) const fn offset(self, i: usize) -> usize {
        match self {
            Self::Neighbours => i,
            Self::Fragment | Self::FragmentPairs => i % 2 + i / 2 * 8,
        }
    }
}

/// The first channel of a lane.
#[cube]
pub(crate) fn first_channel(lane: usize, #[comptime] channels: Channels) -> usize {
    match comptime!(channels) {
        Channels::Neighbours => lane * 4usize,
        Channels::Fragment | Channels::FragmentPairs => lane / 4usize * 16usize + lane % 4usize * 2usize,
    }
}

/// Where the channels of a lane go, of 32 places.
#[cube]
pub(super) fn place(lane: usize, #[comptime] channels: Channels) -> usize {
    match comptime!(channels) {
        Channels::Neighbours | Channels::Fragment => lane,
        Channels::FragmentPairs => lane / 8usize * 8usize + lane % 4usize * 2usize + lane / 4usize % 2usize,
    }
}

/// Transforms the four values of each of 32 lanes, without the norm. All units of the cube take part.
#[cube]
pub(crate) fn transform(values: &mut Array<f32>, #[comptime] planes: bool) {
    // Of either order, the channels of a lane are two bits of the channel's number and the lane the other five: the
    // transform is the product over all bits, in any order.
    #[unroll]
    for stage in 0..2usize {
        #[unroll]
        for i in 0..4usize {
            let other = comptime!(i | 1 << stage);
            if comptime!(other != i) {
                let a = values[i];
                let b = values[other];
                values[i] = a + b;
                values[other] = a - b;
            }
        }
    }
    if comptime!(planes) {
        #[unroll]
        for stage in 0..5u32 {
            let sign = sign(stage);
            #[unroll]
            for i in 0..4usize {
                let partner = plane_shuffle_xor(values[i], comptime!(1u32 << stage));
                values[i] = values[i] * sign + partner;
            }
        }
    } else {
        let mut exchange = Shared::<[Vector<f32, Const<4>>]>::new_slice(UNITS as usize);
        #[unroll]
        for stage in 0..5u32 {
            let sign = sign(stage);
            let mut own = Vector::<f32, Const<4>>::empty();
            #[unroll]
            for i in 0..4usize {
                own.insert(i, values[i]);
            }
            exchange[UNIT_POS as usize] = own;
            sync_cube();
            let partner = exchange[(UNIT_POS ^ comptime!(1u32 << stage)) as usize];
            #[unroll]
            for i in 0..4usize {
                values[i] = values[i] * sign + partner.extract(i);
            }
            sync_cube();
        }
    }
}

/// -1 for the lanes that subtract in a stage.
#[cube]
fn sign(#[comptime] stage: u32) -> f32 {
    select((UNIT_POS >> stage) & 1u32 == 0u32, f32::new(1.0), f32::new(-1.0))
}

/// Two values as f16 in a word.
#[cube]
fn f16_pair(low: f32, high: f32) -> u32 {
    u32::reinterpret(pair::<f16>(low, high))
}

/// A lane's four values as f16.
#[cube]
pub(super) fn high_words(values: &Array<f32>) -> Vector<u32, Const<2>> {
    let mut words = Vector::<u32, Const<2>>::empty();
    words.insert(0usize, f16_pair(values[0], values[1]));
    words.insert(1usize, f16_pair(values[2], values[3]));
    words
}

/// What is left of them, as f16.
#[cube]
pub(super) fn low_words(values: &Array<f32>) -> Vector<u32, Const<2>> {
    let mut words = Vector::<u32, Const<2>>::empty();
    words.insert(0usize, f16_pair(rest::<f16>(values[0]), rest::<f16>(values[1])));
    words.insert(1usize, f16_pair(rest::<f16>(values[2]), rest::<f16>(values[3])));
    words
}

/// What [`rotate_input`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct InputConfig {
    input: Input,
    planes: bool,
    channels: Channels,
}

/// `[rows, 128 blocks]` of `had(x * suh)`; x `[rows, k]` is 0 beyond k. [`Channels::Neighbours`]: f32, a vector of four a
/// lane. The others: f16, the two words of a lane after each other.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_input<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    suh: &[f16],
    out: &mut [Vector<f32, Const<4>>],
    fragments: &mut [Vector<u32, Const<2>>],
    rows: u32,
    k: u32,
    blocks: u32,
    gamma_offset: f32,
    #[comptime] c: InputConfig,
    #[define(X, G)] _elements: [ElemType; 2],
) {
    let (k, blocks) = (k as usize, blocks as usize);
    let at = CUBE_POS * BLOCKS + UNIT_POS as usize / LANES;
    let lane = UNIT_POS as usize % LANES;
    let row = at / blocks;
    let known = row < rows as usize;
    let first = at % blocks * HADAMARD + first_channel(lane, c.channels);
    let mut values = Array::<f32>::new(4usize);
    let mut factor = f32::new(NORM);
    if comptime!(c.input.gamma.is_some()) {
        factor *= row_factors[select(known, row, 0usize)];
    }
    #[unroll]
    for i in 0..4usize {
        let feature = first + comptime!(c.channels.offset(i));
        let inside = known && feature < k;
        let feature = select(inside, feature, 0usize);
        let value =
            load_input::<X, G>(x, gamma, select(inside, row * k + feature, 0usize), feature, gamma_offset, c.input);
        values[i] = select(inside, value * f32::cast_from(suh[feature]) * factor, f32::new(0.0));
    }
    transform(&mut values, c.planes);
    if known {
        let to = at * LANES + place(lane, c.channels);
        if comptime!(c.channels != Channels::Neighbours) {
            fragments[to] = high_words(&values);
        } else {
            let mut quad = Vector::<f32, Const<4>>::empty();
            #[unroll]
            for i in 0..4usize {
                quad.insert(i, values[i]);
            }
            out[to] = quad;
        }
    }
}

/// What [`rotate_output`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct OutputConfig {
    epilogue: Epilogue,
    planes: bool,
    /// Rows have factors.
    factors: bool,
    /// Planes that share the slices of a transform: 1 or [`BLOCKS`].
    shares: usize,
    /// Slices of a plane beside the extra one and whole groups of [`SLICES_AT_ONCE`].
    rest: usize,
}

/// `sum` and `count` slices in order, all loaded at once.
#[cube]
fn add_slices(
    partials: &[Vector<f32, Const<4>>],
    sum: Vector<f32, Const<4>>,
    first: usize,
    slice_len: usize,
    #[comptime] count: usize,
) -> Vector<f32, Const<4>> {
    let mut sum = sum;
    let mut parts = Sequence::<Vector<f32, Const<4>>>::new();
    #[unroll]
    for i in 0..count {
        parts.push(partials[first + i * slice_len]);
    }
    #[unroll]
    for i in 0..count {
        sum += *parts.index(i);
    }
    sum
}

/// `out [rows, n]` of the sum over slices of `partials [slices, rows, 128 blocks]`, times the factor of its row if it has one,
/// as [`finish`] defines it after the rotation. Of the slices that planes share, each has `groups` and the rest, and the
/// first `extra` planes one more.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_output<H: Numeric, O: Numeric>(
    partials: &[Vector<f32, Const<4>>],
    row_factors: &[f32],
    svh: &[f16],
    bias: &[f32],
    residual: &[H],
    out: &mut [O],
    rows: u32,
    n: u32,
    blocks: u32,
    groups: u32,
    extra: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] c: OutputConfig,
    #[define(H, O)] _elements: [ElemType; 2],
) {
    let (rows, n, blocks) = (rows as usize, n as usize, blocks as usize);
    let plane = UNIT_POS as usize / LANES;
    let share = plane % comptime!(c.shares);
    let at = CUBE_POS * comptime!(BLOCKS / c.shares) + plane / comptime!(c.shares);
    let lane = UNIT_POS as usize % LANES;
    let row = at / blocks;
    let known = row < rows;
    let from = select(known, at, 0usize) * LANES + lane;
    let first_column = at % blocks * HADAMARD + lane * 4usize;
    let mut factor = f32::new(NORM);
    if comptime!(c.factors) {
        factor *= row_factors[select(known, row, 0usize)];
    }
    let mut scales = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        // svh has all of N padded.
        scales[i] = f32::cast_from(svh[first_column + i]);
    }
    let slice_len = rows * blocks * LANES;
    let hop = slice_len * comptime!(c.shares);
    let mut next = from + share * slice_len;
    let mut quad = Vector::<f32, Const<4>>::new(0.0);
    if share < extra as usize {
        quad = partials[next];
        next += hop;
    }
    for _group in 0..groups as usize {
        quad = add_slices(partials, quad, next, hop, SLICES_AT_ONCE);
        next += hop * SLICES_AT_ONCE;
    }
    quad = add_slices(partials, quad, next, hop, c.rest);
    if comptime!(c.shares > 1) {
        let mut sums = Shared::<[Vector<f32, Const<4>>]>::new_slice(UNITS as usize);
        sums[UNIT_POS as usize] = quad;
        sync_cube();
        #[unroll]
        for i in 1..comptime!(c.shares) {
            quad += sums[(UNIT_POS as usize + comptime!(i * LANES)) % UNITS as usize];
        }
    }
    let mut values = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        values[i] = quad.extract(i);
    }
    transform(&mut values, c.planes);
    #[unroll]
    for i in 0..4usize {
        let column = first_column + i;
        if known && share == 0usize && column < n {
            let value = values[i] * factor * scales[i];
            let at = row * n + column;
            finish::<H, O>(value, value, bias, bias, residual, out, at, column, flags, out_scale, c.epilogue);
        }
    }
}

/// Enqueues [`rotate_input`]; `row_factors` are those of the product's norm.
pub(super) fn input<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    row_factors: Option<&Buffer>,
    channels: Channels,
    out: &Tensor<Gpu<R>>,
) {
    let (m, k) = (product.x.rows(), product.weight.in_features);
    let blocks = product.weight.padded_in() / HADAMARD;
    let config = InputConfig { input: product.input(), planes: has_planes(gpu), channels };
    let [x, g, ..] = product.elements();
    let vectors = m * blocks * LANES;
    let (quads, fragments) = match channels {
        Channels::Neighbours => (out.buffer().arg(vectors), gpu.unread()),
        Channels::Fragment | Channels::FragmentPairs => (gpu.unread(), out.buffer().arg(vectors)),
    };
    // SAFETY: x holds m rows of k, suh K padded, out a vector for each lane of m rows of blocks; the kernel compares rows
    // and features with m and k.
    unsafe {
        rotate_input::launch_unchecked::<R>(
            gpu.client(),
            cubes((m * blocks).div_ceil(BLOCKS)),
            units(),
            product.x_arg(),
            product.gamma_arg(gpu),
            row_factors.map_or_else(|| gpu.unread(), |buffer| buffer.arg(m)),
            product.weight.scales_arg(1),
            quads,
            fragments,
            m as u32,
            k as u32,
            blocks as u32,
            product.norm_scalars().0,
            config,
            [x, g],
        );
    }
}

/// Enqueues [`rotate_output`] of `partials [slices, M, N padded]`; `row_factors` are `[M]`.
pub(super) fn output<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    partials: &Tensor<Gpu<R>>,
    slices: usize,
    row_factors: Option<&Buffer>,
) {
    let (m, n) = (product.x.rows(), product.weight.out_features);
    let blocks = product.weight.padded_out() / HADAMARD;
    let (planes, factors) = (has_planes(gpu), row_factors.is_some());
    let shares = if planes && slices > 1 && m * blocks <= SHARED_TRANSFORMS { BLOCKS } else { 1 };
    // Without shares the first slice starts the sum, as an extra one.
    let extra = if shares == 1 { 1 } else { slices % shares };
    let each = (slices - extra) / shares;
    let (groups, rest) = (each / SLICES_AT_ONCE, each % SLICES_AT_ONCE);
    let config = OutputConfig { epilogue: product.epilogue(), planes, factors, shares, rest };
    let [_, _, _, h, o] = product.elements();
    // SAFETY: `partials` hold a vector for each lane of m rows of blocks and slice, the factors m, svh N
    // padded, out m rows of n; the kernel compares rows and columns with m and n.
    unsafe {
        rotate_output::launch_unchecked::<R>(
            gpu.client(),
            cubes((m * blocks).div_ceil(BLOCKS / shares)),
            units(),
            partials.buffer().arg(partials.elements() / 4),
            row_factors.map_or_else(|| gpu.unread(), |factors| factors.arg(m)),
            product.weight.zeros_arg(1),
            product.weight.bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            m as u32,
            n as u32,
            blocks as u32,
            groups as u32,
            extra as u32,
            product.flags(),
            product.out_scale,
            config,
            [h, o],
        );
    }
}

/// Whether the lanes of a transform are a plane.
pub(crate) fn has_planes<R: Runtime>(gpu: &Gpu<R>) -> bool {
    let hardware = &gpu.properties().hardware;
    (hardware.plane_size_min, hardware.plane_size_max) == (LANES as u32, LANES as u32)
}
