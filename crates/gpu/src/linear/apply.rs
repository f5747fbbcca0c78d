//! Epilogues on their own: one unit an element.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::linear::{Activation, EpilogueArgs, Residual};

use crate::Gpu;
use crate::element::{Storage, load, store, widen};
use crate::launch::{cubes_for, units};
use crate::math::activate;

/// What the kernel is compiled for; absent operands are zeros.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    x: Storage,
    bias: Option<Storage>,
    residual: Option<Storage>,
    /// The previous contents are added last.
    in_place: bool,
    activation: Activation,
}

/// `x[m,n] = act(x[m,n] + bias[n]) * out_scale + residual[m,n]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn apply<X: Numeric, B: Numeric, H: Numeric>(
    x: &mut [X],
    bias: &[B],
    residual: &[H],
    elements: u32,
    columns: u32,
    out_scale: f32,
    #[comptime] c: Config,
    #[define(X, B, H)] _elements: [ElemType; 3],
) {
    if ABSOLUTE_POS < elements as usize {
        let stored = widen::<X>(x[ABSOLUTE_POS], c.x);
        let mut value = stored;
        if comptime!(c.bias.is_some()) {
            let storage = comptime!(c.bias.unwrap_or(Storage::F32));
            value += load::<B>(bias, ABSOLUTE_POS % columns as usize, storage);
        }
        value = activate(value, c.activation) * out_scale;
        if comptime!(c.residual.is_some()) {
            value += load::<H>(residual, ABSOLUTE_POS, comptime!(c.residual.unwrap_or(Storage::F32)));
        }
        if comptime!(c.in_place) {
            value += stored;
        }
        store::<X>(x, ABSOLUTE_POS, value, c.x);
    }
}

/// Enqueues [`marlin_ops::LinearOps::apply_epilogue`].
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: &EpilogueArgs<'_, Gpu<R>>) {
    let residual = if let Residual::Add(residual) = args.residual { Some(residual) } else { None };
    let config = Config {
        x: Storage::of(args.x.dtype()),
        bias: args.bias.map(|bias| Storage::of(bias.dtype())),
        residual: residual.map(|residual| Storage::of(residual.dtype())),
        in_place: matches!(args.residual, Residual::InPlace),
        activation: args.activation,
    };
    let elem = |storage: Option<Storage>| storage.unwrap_or(Storage::F32).elem();
    let elements = args.x.elements();
    // SAFETY: x and the residual hold `elements`, the bias `columns`; the kernel stays within.
    unsafe {
        apply::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(elements),
            units(),
            args.x.buffer().arg(elements),
            args.bias.map_or_else(|| gpu.unread(), |bias| bias.buffer().arg(bias.elements())),
            residual.map_or_else(|| gpu.unread(), |residual| residual.buffer().arg(elements)),
            elements as u32,
            args.x.columns() as u32,
            args.out_scale,
            config,
            [config.x.elem(), elem(config.bias), elem(config.residual)],
        );
    }
}
