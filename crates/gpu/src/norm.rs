//! Row norms: one cube a row.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::norm::{LayerNormArgs, RmsNormArgs, RmsNormInPlaceArgs};
use marlin_ops::{NormOps, Result, Tensor};

use crate::Gpu;
use crate::element::{Storage, load, narrow, store, widen};
use crate::launch::{UNITS, cubes, units};
use crate::reduce::cube_sum;

/// What a norm kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct NormConfig {
    x: Storage,
    residual: Option<Storage>,
    gamma: Option<Storage>,
    beta: Option<Storage>,
    out: Storage,
    /// Subtract the mean: a layer norm.
    centered: bool,
}

/// `h = x (+ residual, written back)`, then `out = (h - mean) / sqrt(var + eps) * (gamma + offset) + beta`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn norm_rows<X: Numeric, H: Numeric, G: Numeric, B: Numeric, O: Numeric>(
    x: &[X],
    residual: &mut [H],
    gamma: &[G],
    beta: &[B],
    out: &mut [O],
    rows: u32,
    columns: u32,
    gamma_offset: f32,
    eps: f32,
    #[comptime] c: NormConfig,
    #[define(X, H, G, B, O)] _elements: [ElemType; 5],
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let columns = columns as usize;
        let start = row * columns;
        let count = f32::cast_from(columns as u32);
        let mut mean = f32::new(0.0);
        let mut rest = f32::new(0.0);
        if comptime!(c.centered) {
            let mut sum = f32::new(0.0);
            let mut i = UNIT_POS as usize;
            while i < columns {
                sum += summed::<X, H>(x[start + i], residual[kept(start + i, c)], c);
                i += UNITS as usize;
            }
            mean = cube_sum(sum, UNITS as usize) / count;
            // Of a row whose mean exceeds its deviation by far, the rounding of the mean is no longer small.
            let mut left = f32::new(0.0);
            let mut i = UNIT_POS as usize;
            while i < columns {
                left += summed::<X, H>(x[start + i], residual[kept(start + i, c)], c) - mean;
                i += UNITS as usize;
            }
            rest = cube_sum(left, UNITS as usize) / count;
        }
        let mut squares = f32::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let d = summed::<X, H>(x[start + i], residual[kept(start + i, c)], c) - mean - rest;
            squares += d * d;
            i += UNITS as usize;
        }
        let r = 1.0f32 / f32::sqrt(cube_sum(squares, UNITS as usize) / count + eps);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let mut gain = 1.0f32 + gamma_offset;
            if comptime!(c.gamma.is_some()) {
                gain = load::<G>(gamma, i, comptime!(c.gamma.unwrap_or(Storage::F32))) + gamma_offset;
            }
            let h = summed::<X, H>(x[start + i], residual[kept(start + i, c)], c);
            if comptime!(c.residual.is_some()) {
                residual[start + i] = narrow::<H>(h, comptime!(c.residual.unwrap_or(Storage::F32)));
            }
            let mut y = (h - mean - rest) * r * gain;
            if comptime!(c.beta.is_some()) {
                y += load::<B>(beta, i, comptime!(c.beta.unwrap_or(Storage::F32)));
            }
            store::<O>(out, start + i, y, c.out);
            i += UNITS as usize;
        }
    }
}

/// The element that is normalised: x, or the sum, which is rounded only where it is written back.
#[cube]
fn summed<X: Numeric, H: Numeric>(x: X, residual: H, #[comptime] c: NormConfig) -> f32 {
    if comptime!(c.residual.is_some()) {
        widen::<X>(x, c.x) + widen::<H>(residual, comptime!(c.residual.unwrap_or(Storage::F32)))
    } else {
        widen::<X>(x, c.x)
    }
}

/// Where the residual lies; 0 without one.
#[cube]
fn kept(i: usize, #[comptime] c: NormConfig) -> usize {
    if comptime!(c.residual.is_some()) { i } else { 0usize.runtime() }
}

/// A checked norm; absent operands are not read.
struct Norm<'a, R: Runtime> {
    x: &'a Tensor<Gpu<R>>,
    residual: Option<&'a Tensor<Gpu<R>>>,
    gamma: Option<&'a Tensor<Gpu<R>>>,
    beta: Option<&'a Tensor<Gpu<R>>>,
    out: &'a Tensor<Gpu<R>>,
    gamma_offset: f32,
    eps: f32,
    centered: bool,
}

impl<R: Runtime> Norm<'_, R> {
    fn launch(&self, gpu: &Gpu<R>) {
        let storage = |tensor: Option<&Tensor<Gpu<R>>>| tensor.map(|t| Storage::of(t.dtype()));
        let config = NormConfig {
            x: Storage::of(self.x.dtype()),
            residual: storage(self.residual),
            gamma: storage(self.gamma),
            beta: storage(self.beta),
            out: Storage::of(self.out.dtype()),
            centered: self.centered,
        };
        let elem = |storage: Option<Storage>| storage.unwrap_or(Storage::F32).elem();
        let (rows, columns) = (self.x.rows(), self.x.columns());
        let arg = |tensor: Option<&Tensor<Gpu<R>>>| match tensor {
            Some(tensor) => tensor.buffer().arg(tensor.elements()),
            None => gpu.unread(),
        };
        // SAFETY: x, residual and out hold rows * columns elements, gamma and beta columns; the kernel stays within.
        unsafe {
            norm_rows::launch_unchecked::<R>(
                gpu.client(),
                cubes(rows),
                units(),
                arg(Some(self.x)),
                arg(self.residual),
                arg(self.gamma),
                arg(self.beta),
                arg(Some(self.out)),
                rows as u32,
                columns as u32,
                self.gamma_offset,
                self.eps,
                config,
                [config.x.elem(), elem(config.residual), elem(config.gamma), elem(config.beta), config.out.elem()],
            );
        }
    }
}

impl<R: Runtime> NormOps for Gpu<R> {
    fn run_rms_norm(&self, args: RmsNormArgs<'_, Self>) -> Result<()> {
        let norm = Norm {
            x: args.x,
            residual: args.residual.as_deref(),
            gamma: args.gamma,
            beta: None,
            out: args.out,
            gamma_offset: args.gamma_offset,
            eps: args.eps,
            centered: false,
        };
        norm.launch(self);
        Ok(())
    }

    fn run_rms_norm_in_place(&self, args: RmsNormInPlaceArgs<'_, Self>) -> Result<()> {
        let norm = Norm {
            x: args.x,
            residual: None,
            gamma: Some(args.gamma),
            beta: None,
            out: args.x,
            gamma_offset: args.gamma_offset,
            eps: args.eps,
            centered: false,
        };
        norm.launch(self);
        Ok(())
    }

    fn run_layer_norm(&self, args: LayerNormArgs<'_, Self>) -> Result<()> {
        let norm = Norm {
            x: args.x,
            residual: args.residual.as_deref(),
            gamma: Some(args.gamma),
            beta: args.beta,
            out: args.out,
            gamma_offset: 0.0,
            eps: args.eps,
            centered: true,
        };
        norm.launch(self);
        Ok(())
    }
}
