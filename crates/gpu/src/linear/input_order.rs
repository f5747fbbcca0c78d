//! Activations in the order of a weight's rows: each channel is moved to the row that multiplies it, before the product.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::{InputOrder, Result, Tensor};

use super::operands::{Prepared, Product};
use crate::element::Storage;
use crate::launch::{cubes_for, units};
use crate::{Buffer, Gpu};

/// The order of a weight's rows on the host and on the device.
#[derive(Clone)]
pub(crate) struct DeviceOrder {
    order: InputOrder,
    /// `[K]` U32.
    channels: Buffer,
}

impl DeviceOrder {
    pub(crate) fn new<R: Runtime>(gpu: &Gpu<R>, order: &InputOrder) -> Result<Self> {
        Ok(Self { order: order.clone(), channels: gpu.create_u32("prepare_weight", order.channels())? })
    }
}

impl PartialEq for DeviceOrder {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

/// What products in one order share.
pub(super) struct Ordered<R: Runtime> {
    order: InputOrder,
    x: Tensor<Gpu<R>>,
    /// The weight of the norm.
    gamma: Option<Tensor<Gpu<R>>>,
    prepared: Prepared<R>,
}

impl<R: Runtime> Ordered<R> {
    fn new(gpu: &Gpu<R>, product: &Product<'_, R>, order: &DeviceOrder) -> Result<Self> {
        let gather = |x: &Tensor<Gpu<R>>| -> Result<_> {
            let out = gpu.scratch(product.operation, x.dtype(), &[x.rows(), x.columns()])?;
            gather(gpu, x, &order.channels, None, &out);
            Ok(out)
        };
        let gamma = product.norm.as_ref().map(|norm| gather(norm.gamma)).transpose()?;
        Ok(Self { order: order.order.clone(), x: gather(product.x)?, gamma, prepared: Prepared::default() })
    }
}

impl<R: Runtime> Prepared<R> {
    /// The product of x, and of the norm's weight, in this order, and what is prepared of them.
    pub(super) fn in_order<'a>(
        &'a mut self,
        gpu: &Gpu<R>,
        product: &Product<'a, R>,
        order: &DeviceOrder,
    ) -> Result<(Product<'a, R>, &'a mut Self)> {
        if self.ordered.as_ref().is_none_or(|ordered| ordered.order != order.order) {
            self.ordered = None;
        }
        let ordered = match &mut self.ordered {
            Some(ordered) => ordered,
            none => none.insert(Box::new(Ordered::new(gpu, product, order)?)),
        };
        let Ordered { x, gamma, prepared, .. } = &mut **ordered;
        let mut product = Product { x, ..*product };
        if let (Some(norm), Some(gamma)) = (&mut product.norm, gamma) {
            norm.gamma = gamma;
        }
        Ok((product, prepared))
    }
}

/// The experts of rows that have orders of their own.
pub(crate) struct ExpertOrders<'a, R: Runtime> {
    /// `[T, k]`, x with a row for each token.
    pub(crate) ids: &'a Tensor<Gpu<R>>,
    pub(crate) experts: usize,
}

/// `out[r, k] = x[r, order[k]]`, or with experts `x[r / slots, orders[ids[r], k]]`: rows of experts that do not exist keep what
/// they hold.
#[cube(launch_unchecked)]
fn gather_channels<X: Numeric>(
    x: &[X],
    orders: &[u32],
    ids: &[u32],
    out: &mut [X],
    rows: u32,
    k: u32,
    slots: u32,
    experts: u32,
    #[comptime] by_expert: bool,
    #[define(X)] _element: ElemType,
) {
    let k = k as usize;
    if ABSOLUTE_POS < rows as usize * k {
        let row = ABSOLUTE_POS / k;
        let feature = ABSOLUTE_POS % k;
        if comptime!(by_expert) {
            let expert = ids[row];
            if expert < experts {
                let channel = orders[expert as usize * k + feature] as usize;
                out[ABSOLUTE_POS] = x[row / slots as usize * k + channel];
            }
        } else {
            out[ABSOLUTE_POS] = x[row * k + orders[feature] as usize];
        }
    }
}

/// Enqueues [`gather_channels`]; `out` has the dtype of x, and a row for each of its rows or of the ids.
pub(crate) fn gather<R: Runtime>(
    gpu: &Gpu<R>,
    x: &Tensor<Gpu<R>>,
    orders: &Buffer,
    experts: Option<&ExpertOrders<'_, R>>,
    out: &Tensor<Gpu<R>>,
) {
    let (ids, slots, count) = match experts {
        Some(experts) => (experts.ids.buffer().arg(experts.ids.elements()), experts.ids.columns(), experts.experts),
        None => (gpu.unread(), 1, 1),
    };
    let (rows, k) = (out.rows(), out.columns());
    // SAFETY: x has a row of k for each of `slots` rows of `out`, orders k channels below k for each expert.
    unsafe {
        gather_channels::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(rows * k),
            units(),
            x.buffer().arg(x.elements()),
            orders.arg(count * k),
            ids,
            out.buffer().arg(out.elements()),
            rows as u32,
            k as u32,
            slots as u32,
            count as u32,
            experts.is_some(),
            Storage::of(x.dtype()).elem(),
        );
    }
}
