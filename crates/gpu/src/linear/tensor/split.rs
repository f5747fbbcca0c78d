//! Rows of f32 as sums of two bf16, for products on tensor cores: of a value x that is normal in both, `high + low` differs
//! from x by at most 2^-17 |x|, 2.7e-6 |x| on average (RMS), and codes of 4 bits without zero points are exact in bf16: such
//! products keep the bound of f32 linear layers, 1e-5, unless their terms cancel each other.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;

use crate::element::{Storage, bf16_bits, load};
use crate::launch::{UNITS, cubes, units};
use crate::linear::operands::Product;
use crate::reduce::cube_sum;
use crate::{Buffer, Gpu};

/// Parts of a row.
pub(super) const PARTS: usize = 2;

/// `out[part, row, i]` in pairs, of `x` or, with gamma, of `x / sqrt(mean x^2 + eps) (gamma + offset)`; one cube a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn split_rows<G: Numeric>(
    x: &[Vector<f32, Const<2>>],
    gamma: &[G],
    out: &mut [u32],
    rows: u32,
    columns: u32,
    gamma_offset: f32,
    eps: f32,
    #[comptime] gamma_storage: Option<Storage>,
    #[define(G)] _element: ElemType,
) {
    let (row, pairs) = (CUBE_POS, columns as usize / 2);
    if row < rows as usize {
        let mut factor = f32::new(1.0);
        if comptime!(gamma_storage.is_some()) {
            let mut squares = f32::new(0.0);
            let mut i = UNIT_POS as usize;
            while i < pairs {
                let pair = x[row * pairs + i];
                squares += pair.extract(0usize) * pair.extract(0usize) + pair.extract(1usize) * pair.extract(1usize);
                i += UNITS as usize;
            }
            let mean = cube_sum(squares, UNITS as usize) / f32::cast_from(columns);
            factor = 1.0f32 / f32::sqrt(mean + eps);
        }
        let mut i = UNIT_POS as usize;
        while i < pairs {
            let pair = x[row * pairs + i];
            let mut high = 0u32;
            let mut low = 0u32;
            #[unroll]
            for j in 0..2usize {
                let mut value = pair.extract(j);
                if comptime!(gamma_storage.is_some()) {
                    let storage = comptime!(gamma_storage.unwrap_or(Storage::F32));
                    value = value * factor * (load::<G>(gamma, 2 * i + j, storage) + gamma_offset);
                }
                let bits = bf16_bits(value);
                high |= bits << comptime!(16 * j as u32);
                low |= low_bits(value, bits) << comptime!(16 * j as u32);
            }
            out[row * pairs + i] = high;
            out[(rows as usize + row) * pairs + i] = low;
            i += UNITS as usize;
        }
    }
}

/// The bf16 nearest to the rest, which f32 holds exactly; 0 of what is not finite.
#[cube]
fn low_bits(value: f32, high: u32) -> u32 {
    let rest = bf16_bits(value - f32::reinterpret(high << 16u32));
    select((high & 0x7f80u32) == 0x7f80u32, 0u32, rest)
}

/// Enqueues the kernel for a product with f32 rows of an even length; `[PARTS, M, K]` bf16, after the product's input norm
/// if it has one.
pub(in crate::linear) fn launch<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>) -> Result<Buffer> {
    let [m, _, k] = product.shape();
    let parts = gpu.scratch(product.operation, DType::BF16, &[PARTS, m, k])?;
    let gamma = product.input().gamma;
    let (gamma_offset, eps) = product.norm_scalars();
    // SAFETY: x and each part hold M * K elements, K of them even, gamma K where it is read.
    unsafe {
        split_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(m),
            units(),
            product.x.buffer().arg(product.x.elements() / 2),
            product.gamma_arg(gpu),
            parts.buffer().arg(parts.elements() / 2),
            m as u32,
            k as u32,
            gamma_offset,
            eps,
            gamma,
            gamma.unwrap_or(Storage::F32).elem(),
        );
    }
    Ok(parts.buffer().clone())
}
