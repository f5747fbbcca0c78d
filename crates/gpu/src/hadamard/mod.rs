//! Block Hadamard rotation: butterflies for the power-of-two factor, a small product for the Paley factor.
//!
//! Blocks that fit are transformed in shared memory, several by one cube. A longer one is cut into equal parts of
//! consecutive channels: they are transformed first, into f32 scratch, then the factor across them.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::hadamard::{HadamardArgs, HadamardKind, block_parts, paley_entry, paley_order};
use marlin_ops::{HadamardOps, OpError, Result, Tensor};

use crate::Gpu;
use crate::element::{Storage, load, store, widen};
use crate::launch::{cubes, cubes_for, units};

/// Elements in shared memory of a cube: of small blocks, and the most that 32 KiB hold.
const SPANS: [usize; 2] = [2048, 8192];

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    x: Storage,
    before: Option<Storage>,
    after: Option<Storage>,
    /// Elements in shared memory.
    span: usize,
    /// Order of the Paley factor, 1 without.
    paley: usize,
    transpose: bool,
    /// The result goes to the scratch; the factor across parts, the norm and `after` are left to [`hadamard_across`].
    partial: bool,
}

/// Transforms the blocks of `count` consecutive elements. A block is one matrix of order `first = block`, or two of
/// orders `first` and `block - first`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn hadamard_blocks<X: Numeric, B: Numeric, A: Numeric>(
    x: &mut [X],
    before: &[B],
    after: &[A],
    scratch: &mut [f32],
    elements: u32,
    columns: u32,
    row_stride: u32,
    column_stride: u32,
    block: u32,
    first: u32,
    first_norm: f32,
    last_norm: f32,
    #[comptime] c: Config,
    #[define(X, B, A)] _elements: [ElemType; 3],
) {
    let mut v = Shared::<[f32]>::new_slice(comptime!(c.span));
    let columns = columns as usize;
    let block = block as usize;
    let first = first as usize;
    let units = CUBE_DIM as usize;
    let whole = comptime!(c.span).runtime() / block * block;
    let start = CUBE_POS * whole;
    if start < elements as usize {
        let mut count = elements as usize - start;
        if count > whole {
            count = whole;
        }
        let mut i = UNIT_POS as usize;
        while i < count {
            let mut value = widen::<X>(x[start + i], c.x);
            if comptime!(c.before.is_some()) {
                value *= load::<B>(before, (start + i) % columns, comptime!(c.before.unwrap_or(Storage::F32)));
            }
            v[i] = value;
            i += units;
        }
        sync_cube();
        if comptime!(c.paley > 1) {
            let mut group = UNIT_POS as usize * c.paley;
            while group < count {
                paley_product(&mut v, group, c.paley, c.transpose);
                group += units * c.paley;
            }
            sync_cube();
        }
        let mut last = first;
        if first < block {
            last = block - first;
        }
        let mut width = comptime!(c.paley).runtime();
        while width < first {
            // Butterflies of this width are in all parts, or in the first of each block alone.
            let mut period = 2usize * width;
            let mut pairs = width;
            if width >= last {
                period = block;
                pairs = first / 2usize;
            }
            let mut p = UNIT_POS as usize;
            while p < count / period * pairs {
                let q = p % pairs;
                let at = p / pairs * period + q / width * 2usize * width + q % width;
                let a = v[at];
                let b = v[at + width];
                v[at] = a + b;
                v[at + width] = a - b;
                p += units;
            }
            sync_cube();
            width *= 2usize;
        }
        let mut i = UNIT_POS as usize;
        while i < count {
            if comptime!(c.partial) {
                scratch[start + i] = v[i];
            } else {
                let mut value = v[i] * select(i % block < first, first_norm, last_norm);
                if comptime!(c.after.is_some()) {
                    let at = after_at(start + i, columns, row_stride, column_stride);
                    value *= load::<A>(after, at, comptime!(c.after.unwrap_or(Storage::F32)));
                }
                store::<X>(x, start + i, value, c.x);
            }
            i += units;
        }
    }
}

/// Where the factor of an element lies.
#[cube]
fn after_at(element: usize, columns: usize, row_stride: u32, column_stride: u32) -> usize {
    element / columns * row_stride as usize + element % columns * column_stride as usize
}

/// Multiplies `order` values from `start` on by the Paley matrix or its transpose.
#[cube]
fn paley_product(v: &mut [f32], start: usize, #[comptime] order: usize, #[comptime] transpose: bool) {
    let mut old = Array::<f32>::new(order);
    #[unroll]
    for j in 0..order {
        old[j] = v[start + j];
    }
    #[unroll]
    for i in 0..order {
        let mut sum = f32::new(0.0);
        #[unroll]
        for j in 0..order {
            let (row, column) = comptime!(if transpose { (j, i) } else { (i, j) });
            if comptime!(paley_entry(order, row, column) > 0) {
                sum += old[j];
            } else {
                sum -= old[j];
            }
        }
        v[start + i] = sum;
    }
}

/// The Sylvester factor of order `parts` across parts of `length` channels, then norm and `after`: one unit for each
/// channel of a part.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn hadamard_across<X: Numeric, A: Numeric>(
    scratch: &[f32],
    after: &[A],
    x: &mut [X],
    count: u32,
    columns: u32,
    row_stride: u32,
    column_stride: u32,
    length: u32,
    norm: f32,
    #[comptime] parts: usize,
    #[comptime] c: Config,
    #[define(X, A)] _elements: [ElemType; 2],
) {
    if ABSOLUTE_POS < count as usize {
        let length = length as usize;
        let at = ABSOLUTE_POS / length * length * parts + ABSOLUTE_POS % length;
        let mut v = Array::<f32>::new(parts);
        #[unroll]
        for i in 0..parts {
            v[i] = scratch[at + i * length];
        }
        #[unroll]
        for stage in 0..comptime!(parts.ilog2() as usize) {
            #[unroll]
            for i in 0..parts {
                let other = comptime!(i | 1 << stage);
                if comptime!(other != i) {
                    let a = v[i];
                    let b = v[other];
                    v[i] = a + b;
                    v[other] = a - b;
                }
            }
        }
        #[unroll]
        for i in 0..parts {
            let mut value = v[i] * norm;
            if comptime!(c.after.is_some()) {
                let storage = comptime!(c.after.unwrap_or(Storage::F32));
                let element = at + i * length;
                value *= load::<A>(after, after_at(element, columns as usize, row_stride, column_stride), storage);
            }
            store::<X>(x, at + i * length, value, c.x);
        }
    }
}

impl<R: Runtime> HadamardOps for Gpu<R> {
    fn run_hadamard(&self, args: HadamardArgs<'_, Self>) -> Result<()> {
        const OP: &str = "hadamard";
        let paley = match args.kind {
            HadamardKind::True => paley_order(args.block).unwrap_or(1),
            HadamardKind::BlockDiagonal => 1,
        };
        let orders = block_parts(args.block, args.kind).ok_or_else(|| {
            let reason = format!("is {}: no {:?} matrix of this order", args.block, args.kind);
            OpError::value(OP, "block", reason)
        })?;
        let norm = |order: usize| if args.normalize { (1.0 / (order as f64).sqrt()) as f32 } else { 1.0 };
        let (first, last) = (orders[0].1, orders[orders.len() - 1].1);
        // Parts of a block that is longer than the shared memory.
        let parts = args.block.div_ceil(SPANS[1]).next_power_of_two();
        let (length, first) = (args.block / parts, first / parts);
        let config = Config {
            x: Storage::of(args.x.dtype()),
            before: args.scale_before.map(|scale| Storage::of(scale.dtype())),
            after: args.scale_after.map(|scale| Storage::of(scale.dtype())),
            span: if length <= SPANS[0] { SPANS[0] } else { SPANS[1] },
            paley,
            transpose: args.transpose && paley > 1,
            partial: parts > 1,
        };
        let (elements, columns) = (args.x.elements(), args.x.columns());
        let [row_stride, column_stride] = args.after_strides().unwrap_or_default().map(|stride| stride as u32);
        let scratch = match parts {
            1 => None,
            _ => Some(self.scratch(OP, DType::F32, &[elements])?),
        };
        let elem = |storage: Option<Storage>| storage.unwrap_or(Storage::F32).elem();
        let arg = |tensor: Option<&Tensor<Self>>| match tensor {
            Some(tensor) => tensor.buffer().arg(tensor.elements()),
            None => self.unread(),
        };
        // SAFETY: x and the scratch hold `elements`, the scales what their strides reach; the kernel stays within.
        unsafe {
            hadamard_blocks::launch_unchecked::<R>(
                self.client(),
                cubes(elements.div_ceil(config.span / length * length)),
                CubeDim::new_1d(if config.span == SPANS[0] { 128 } else { 256 }),
                args.x.buffer().arg(elements),
                arg(args.scale_before),
                arg(args.scale_after),
                arg(scratch.as_ref()),
                elements as u32,
                columns as u32,
                row_stride,
                column_stride,
                length as u32,
                first as u32,
                norm(orders[0].1),
                norm(last),
                config,
                [config.x.elem(), elem(config.before), elem(config.after)],
            );
        }
        if let Some(scratch) = &scratch {
            // SAFETY: as before; a unit has one channel of each part of a block.
            unsafe {
                hadamard_across::launch_unchecked::<R>(
                    self.client(),
                    cubes_for(elements / parts),
                    units(),
                    arg(Some(scratch)),
                    arg(args.scale_after),
                    args.x.buffer().arg(elements),
                    (elements / parts) as u32,
                    columns as u32,
                    row_stride,
                    column_stride,
                    length as u32,
                    norm(args.block),
                    parts,
                    config,
                    [config.x.elem(), elem(config.after)],
                );
            }
        }
        Ok(())
    }
}
