//! Which kernel a shape gets.

use cubecl::prelude::*;

use super::LinearKernel;
use super::gemv::Gemv;
use super::operands::Product;
use super::tile::{Accumulate, Tile};
use crate::Gpu;

/// Most rows that share the words of a unit.
const FEW_ROWS: usize = 8;

/// Multiprocessors of a device that does not say.
const CORES: usize = 32;

/// The kernel for a product.
pub(super) fn select<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>) -> LinearKernel {
    if let Some(kernel) = super::tensor::select(gpu, product) {
        return kernel;
    }
    let [m, n, _] = product.shape();
    if m <= FEW_ROWS {
        return LinearKernel::Gemv(few_rows(gpu, m, n, product.products()));
    }
    let (m, n, units) = match m {
        0..=16 => (16, 64, 128),
        17..=32 => (32, 64, 128),
        _ => (64, 64, 128),
    };
    LinearKernel::Matrix(Tile { m, n, k: 32, units, stages: 1, accumulate: Accumulate::F32 })
}

/// Wide loads, while there are enough cubes to fill the device; about 256 units a cube.
fn few_rows<R: Runtime>(gpu: &Gpu<R>, m: usize, n: usize, products: usize) -> Gemv {
    let rows = m.next_power_of_two();
    let columns = match (rows * products, n % 4) {
        (1..=2, 0) => 4,
        (1..=4, 0 | 2) => 2,
        _ => 1,
    };
    let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(CORES, |cores| cores as usize);
    let fills = |lanes: &usize| n.div_ceil(lanes * columns) >= 2 * cores;
    let lanes_n = [32, 16].into_iter().find(fills).unwrap_or(8);
    Gemv { rows, columns, lanes_n, lanes_k: 256 / lanes_n }
}
