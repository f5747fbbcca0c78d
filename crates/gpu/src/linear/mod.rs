//! Linear layers, gated products and embeddings.
//!
//! A product is launched by one of the kernels of [`LinearKernel`]; [`select`] chooses by shape.

mod apply;
mod batched;
mod embedding;
mod epilogue;
pub(crate) mod exl3;
mod gemv;
pub(crate) mod input_order;
mod matrix;
mod operands;
mod row_factors;
mod select;
mod split_k;
mod stream_k;
pub(crate) mod tensor;
#[cfg(all(test, feature = "vulkan"))]
mod tests;
mod tile;

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::{
    Activation, EmbeddingArgs, EpilogueArgs, GatedUpArgs, GemmBatchedArgs, LinearArgs, ProjectionsArgs, Residual,
};
use marlin_ops::{LinearOps, OpError, Result};

use crate::Gpu;
use crate::element::Storage;
use crate::launch::{MOST_CUBES, cubes_for, units};
use embedding::EmbeddingConfig;
pub use gemv::Gemv;
pub(crate) use operands::Prepared;
use operands::{Combine, Product, grouping};
pub use tensor::{TensorRows, TensorTile};
pub use tile::{Accumulate, Tile};

/// A kernel for products with weights, and its shape. EXL3 weights take tiles in shared memory, whole or in shares, and
/// [`LinearKernel::Trellis`].
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum LinearKernel {
    /// Weights straight from memory to registers, for few rows.
    Gemv(Gemv),
    /// Tiles in shared memory, one cube each.
    Matrix(Tile),
    /// As [`LinearKernel::Matrix`] with K in 1 to 64 slices, added by a second kernel.
    SplitK {
        /// Shape.
        tile: Tile,
        /// Slices of K.
        splits: usize,
    },
    /// Equal shares of all tiles and steps of K; tiles that workers share are added by a second kernel.
    StreamK {
        /// Shape.
        tile: Tile,
        /// Cubes of the first kernel.
        workers: usize,
    },
    /// Tensor cores, weights straight from memory to their operands, for at most 16 rows. 16-bit activations and 4-bit
    /// weights with f16 scales, N a multiple of 32, K of 128.
    TensorRows(TensorRows),
    /// As [`LinearKernel::TensorRows`] for any number of rows, which pass through shared memory, and for f32 activations too,
    /// as sums of two bf16.
    TensorTile(TensorTile),
    /// The kernels of EXL3 weights in the shape that they choose, for any number of rows: tensor cores where their fragments
    /// are known, otherwise weights straight from memory to registers.
    Trellis,
}

impl<R: Runtime> Gpu<R> {
    /// [`LinearOps::linear`] by this kernel.
    ///
    /// # Errors
    /// As the operation; an unsupported error that names the limit where the kernel cannot have this shape.
    pub fn linear_with(&self, kernel: LinearKernel, args: LinearArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.out.elements() == 0 {
            return Ok(());
        }
        self.multiply(Some(kernel), &linear_product(&args), &mut Prepared::default())
    }

    /// [`LinearOps::gated_up`] by this kernel.
    ///
    /// # Errors
    /// As the operation; an unsupported error that names the limit where the kernel cannot have this shape.
    pub fn gated_up_with(&self, kernel: LinearKernel, args: GatedUpArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.out.elements() == 0 {
            return Ok(());
        }
        self.gated(Some(kernel), args)
    }

    /// Launches a product; `prepared` may be shared with others of the same x and norm.
    fn multiply(
        &self,
        kernel: Option<LinearKernel>,
        product: &Product<'_, R>,
        prepared: &mut Prepared<R>,
    ) -> Result<()> {
        if let Some(order) = &product.weight.input_order {
            let (product, prepared) = prepared.in_order(self, product, order)?;
            return self.multiply_in_order(kernel, &product, prepared);
        }
        self.multiply_in_order(kernel, product, prepared)
    }

    /// Launches a product of x as the rows of the weight read it.
    fn multiply_in_order(
        &self,
        kernel: Option<LinearKernel>,
        product: &Product<'_, R>,
        prepared: &mut Prepared<R>,
    ) -> Result<()> {
        if let Some(trellis) = product.weight.trellis() {
            return exl3::multiply(self, kernel, product, trellis, prepared);
        }
        self.launch_kernel(kernel.unwrap_or_else(|| select::select(self, product)), product, prepared)
    }

    /// Launches a product by this kernel; the weight is not rotated.
    fn launch_kernel(&self, kernel: LinearKernel, product: &Product<'_, R>, prepared: &mut Prepared<R>) -> Result<()> {
        match kernel {
            LinearKernel::Gemv(shape) => gemv::launch(self, shape, product),
            LinearKernel::Matrix(tile) => matrix::launch(self, tile, product, prepared.row_factors(self, product)?),
            LinearKernel::SplitK { tile, splits } => {
                split_k::launch(self, tile, splits, product, prepared.row_factors(self, product)?)
            }
            LinearKernel::StreamK { tile, workers } => {
                stream_k::launch(self, tile, workers, product, prepared.row_factors(self, product)?)
            }
            LinearKernel::TensorRows(rows) => tensor::launch(self, tensor::Shape::Rows(rows), product, prepared),
            LinearKernel::TensorTile(tile) => tensor::launch(self, tensor::Shape::Tile(tile), product, prepared),
            LinearKernel::Trellis => {
                Err(limit(self, product.operation, "a weight that is not exl3 by the kernels of exl3".into()))
            }
        }
    }

    /// Both weights in one kernel if they are stored alike and no faster one takes each alone, else one after the other.
    fn gated(&self, kernel: Option<LinearKernel>, args: GatedUpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "gated_up";
        let (gate, up) = (args.gate.data(), args.up.data());
        let product = |weight, activation, combine, out| Product {
            operation: OP,
            x: args.x,
            norm: args.norm,
            weight,
            up: None,
            activation,
            out_scale: 1.0,
            combine,
            out,
        };
        let mut prepared = Prepared::default();
        let first = product(gate, args.activation, Combine::Nothing, args.out);
        let apart = kernel.is_none() && tensor::takes_many_rows(self, &first, DType::F32);
        let alike = gate.decoder == up.decoder && gate.input_order == up.input_order;
        if alike && !gate.decoder.is_trellis() && !apart {
            let both = Product { up: Some(up), ..first };
            return self.multiply(kernel, &both, &mut prepared);
        }
        let activated = self.scratch(OP, DType::F32, &[args.x.rows(), gate.out_features])?;
        self.multiply(kernel, &Product { out: &activated, ..first }, &mut prepared)?;
        let second = product(up, Activation::None, Combine::Multiply(&activated), args.out);
        self.multiply(kernel, &second, &mut prepared)
    }
}

fn linear_product<'a, R: Runtime>(args: &'a LinearArgs<'_, Gpu<R>>) -> Product<'a, R> {
    let combine = match args.residual {
        Residual::None => Combine::Nothing,
        Residual::Add(tensor) => Combine::Add(tensor),
        Residual::InPlace => Combine::AddToOut,
    };
    Product {
        operation: "linear",
        x: args.x,
        norm: None,
        weight: args.weight.data(),
        up: None,
        activation: args.activation,
        out_scale: args.out_scale,
        combine,
        out: args.out,
    }
}

impl<R: Runtime> LinearOps for Gpu<R> {
    fn run_linear(&self, args: LinearArgs<'_, Self>) -> Result<()> {
        self.multiply(None, &linear_product(&args), &mut Prepared::default())
    }

    fn run_projections(&self, args: ProjectionsArgs<'_, '_, Self>) -> Result<()> {
        let mut prepared = Prepared::default();
        for projection in args.projections {
            let product = Product {
                operation: "projections",
                x: args.x,
                norm: args.norm,
                weight: projection.weight.data(),
                up: None,
                activation: Activation::None,
                out_scale: 1.0,
                combine: Combine::Nothing,
                out: projection.out,
            };
            if product.weight.out_features == 0 {
                continue;
            }
            self.multiply(None, &product, &mut prepared)?;
        }
        Ok(())
    }

    fn run_gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()> {
        self.gated(None, args)
    }

    fn run_embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()> {
        let table = args.table.data();
        let (tokens, hidden) = (args.ids.elements(), table.in_features);
        if let Some(trellis) = table.trellis() {
            let to = exl3::Unfolded { out: args.out, rows: tokens, transposed: false };
            return exl3::unfold(self, table, trellis, &exl3::Rows::Listed(args.ids), &to);
        }
        let (grouping, group) = grouping(table);
        let out = Storage::of(args.out.dtype());
        let config = EmbeddingConfig { decoder: table.kernel_decoder(), grouping, out };
        // SAFETY: the buffers hold what their shapes say; ids are compared with the vocabulary, features with `hidden`.
        unsafe {
            embedding::embedding::launch_unchecked::<R>(
                self.client(),
                cubes_for(tokens * table.units()),
                units(),
                args.ids.buffer().arg(tokens),
                table.words_arg(1),
                table.scales_arg(1),
                table.zeros_arg(1),
                table.table_arg(),
                args.out.buffer().arg(args.out.elements()),
                self.faults(),
                tokens as u32,
                table.out_features as u32,
                hidden as u32,
                group,
                config,
                [table.decoder.scale_elem(), out.elem()],
            );
        }
        Ok(())
    }

    fn run_gemm_batched(&self, args: GemmBatchedArgs<'_, Self>) -> Result<()> {
        batched::launch(self, None, &args)
    }

    fn run_apply_epilogue(&self, args: EpilogueArgs<'_, Self>) -> Result<()> {
        apply::launch(self, &args);
        Ok(())
    }
}

/// The error of a kernel that cannot have this shape.
fn limit<R: Runtime>(gpu: &Gpu<R>, operation: &'static str, what: String) -> OpError {
    use marlin_ops::Device;
    OpError::Unsupported { operation, backend: gpu.name(), what }
}

/// A grid of cubes within the device's limits.
fn grid<R: Runtime>(gpu: &Gpu<R>, operation: &'static str, cubes: [usize; 3]) -> Result<CubeCount> {
    if cubes.iter().any(|&count| count > MOST_CUBES as usize) {
        return Err(limit(
            gpu,
            operation,
            format!("a grid of {cubes:?} cubes, at most {MOST_CUBES} along a dimension,"),
        ));
    }
    Ok(CubeCount::Static(cubes[0] as u32, cubes[1] as u32, cubes[2] as u32))
}
