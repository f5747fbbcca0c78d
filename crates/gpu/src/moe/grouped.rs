//! Products of rows with one weight of their experts, by the kernels of the experts' MLPs.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::Residual;
use marlin_ops::moe::{GroupedGemmArgs, RowOrder};
use marlin_ops::{Device, OpError, Result, Tensor};

use super::exl3::Order;
use super::experts::Group;
use super::gemm::SortedRows;
use super::group::Sorted;
use super::mlp::{Call, ExpertKernel, ExpertStrategy};
use crate::Gpu;
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, cubes_for, units};
use crate::reduce::cube_max;

const OP: &str = "moe_grouped_gemm";

/// Copies offsets that go up from 0 to `rows`; others are a fault, and all become 0. One cube.
#[cube(launch_unchecked)]
fn check_offsets(offsets: &[u32], out: &mut [u32], faults: &mut [Atomic<u32>], experts: u32, rows: u32) {
    if CUBE_POS == 0usize {
        let mut bad = u32::MAX.runtime();
        let mut i = UNIT_POS;
        while i <= experts {
            let value = offsets[i as usize];
            let before = offsets[select(i == 0u32, 0u32, i - 1u32) as usize];
            let wrong = value < before || (i == 0u32 && value != 0u32) || (i == experts && value != rows);
            bad = select(wrong && i < bad, i, bad);
            i += UNITS;
        }
        let found = cube_max(select(bad == u32::MAX, 0.0f32.runtime(), f32::new(1.0)), UNITS as usize);
        if bad != u32::MAX {
            record(faults, comptime!(Fault::Offsets), bad as usize);
        }
        let mut i = UNIT_POS;
        while i <= experts {
            out[i as usize] = select(found > 0.0f32, 0u32.runtime(), offsets[i as usize]);
            i += UNITS;
        }
    }
}

/// Copies a permutation; an entry that is no assignment is a fault, and becomes 0.
#[cube(launch_unchecked)]
fn check_permutation(permutation: &[u32], out: &mut [u32], faults: &mut [Atomic<u32>], rows: u32) {
    if ABSOLUTE_POS < rows as usize {
        let assignment = permutation[ABSOLUTE_POS];
        if assignment >= rows {
            record(faults, comptime!(Fault::Permutation), ABSOLUTE_POS);
        }
        out[ABSOLUTE_POS] = select(assignment >= rows, 0u32.runtime(), assignment);
    }
}

impl<R: Runtime> Gpu<R> {
    /// [`marlin_ops::MoeOps::moe_grouped_gemm`] by a given kernel of the grouped or the tensor strategy.
    ///
    /// # Errors
    /// As the operation, and [`OpError::Unsupported`] where the kernel's tiles cannot be.
    pub fn moe_grouped_gemm_with(&self, args: GroupedGemmArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        args.check()?;
        if args.out.elements() == 0 {
            return Ok(());
        }
        self.grouped_gemm(&args, kernel)
    }

    pub(super) fn choose_grouped(&self, args: &GroupedGemmArgs<'_, Self>) -> Result<()> {
        let (rows, experts) = (args.out.rows(), args.experts.count());
        let tile_rows = |group| Call::projection(args, group).most_tile_rows(self, args.x.dtype());
        let most_rows = args.experts.data().groups.iter().map(tile_rows).min().unwrap_or(0);
        let kernel = match (ExpertKernel::tensor_for(rows, experts, most_rows), rows / experts.max(1)) {
            (Some(kernel), _) => kernel,
            (_, 0..=8) => ExpertKernel::grouped(8),
            (_, 9..=32) => ExpertKernel::grouped(32),
            _ => ExpertKernel::grouped(64),
        };
        self.grouped_gemm(args, &kernel)
    }

    fn grouped_gemm(&self, args: &GroupedGemmArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        let sorts = matches!(kernel.strategy, ExpertStrategy::Grouped | ExpertStrategy::Tensor);
        let limit = kernel.limit().or_else(|| (!sorts).then(|| format!("rows sorted by expert by {kernel:?}")));
        if let Some(what) = limit {
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        let (rows, experts) = (args.out.rows(), args.experts.count());
        let offsets = self.scratch(OP, DType::U32, &[experts + 1])?;
        let permutation = self.scratch(OP, DType::U32, &[rows])?;
        let inverse = self.scratch(OP, DType::U32, &[rows])?;
        let (slots, to_assignments) = match &args.order {
            RowOrder::Token { ids } => {
                let sorted = Sorted { offsets: &offsets, permutation: &permutation, inverse: &inverse };
                self.group(OP, ids, experts, &sorted)?;
                (Some(args.slots()), Some(&inverse))
            }
            RowOrder::Sorted { offsets: given, permutation: given_permutation } => {
                self.checked_copies(given, *given_permutation, &offsets, &permutation, rows);
                (given_permutation.map(|_| args.slots()), None)
            }
        };
        let (tiles, tile_count) = self.tiles(OP, &offsets, rows, kernel.tile_m)?;
        let sorted = SortedRows { tiles: &tiles, tile_count, offsets: &offsets, permutation: &permutation };
        let [_, columns] = args.weight_shape();
        let direct = to_assignments.is_none() && args.out.dtype() == DType::F32;
        let scratch = if direct { None } else { Some(self.scratch(OP, DType::F32, &[rows, columns])?) };
        let products = scratch.as_ref().unwrap_or(args.out);
        for group in &args.experts.data().groups {
            Call::projection(args, group).run(self, &Order::Sorted { rows: &sorted, slots }, products, kernel)?;
        }
        if let Some(products) = &scratch {
            // A sum of one row with the weight 1 puts it in its place and rounds it.
            let ones = self.create_f32(OP, &vec![1.0; rows])?;
            let ones = Tensor::from_buffer(ones, marlin_ops::Shape::new(&[rows, 1])?, DType::F32);
            self.combine(products, to_assignments, &ones, &Residual::None, args.out);
        }
        Ok(())
    }

    /// Offsets and permutation that kernels may index by.
    fn checked_copies(
        &self,
        offsets: &Tensor<Self>,
        permutation: Option<&Tensor<Self>>,
        own_offsets: &Tensor<Self>,
        own_permutation: &Tensor<Self>,
        rows: usize,
    ) {
        let experts = offsets.elements() - 1;
        // SAFETY: offsets hold experts + 1 elements, permutations `rows`.
        unsafe {
            check_offsets::launch_unchecked::<R>(
                self.client(),
                cubes(1),
                units(),
                offsets.buffer().arg(experts + 1),
                own_offsets.buffer().arg(experts + 1),
                self.faults(),
                experts as u32,
                rows as u32,
            );
            if let Some(permutation) = permutation {
                check_permutation::launch_unchecked::<R>(
                    self.client(),
                    cubes_for(rows),
                    units(),
                    permutation.buffer().arg(rows),
                    own_permutation.buffer().arg(rows),
                    self.faults(),
                    rows as u32,
                );
            }
        }
    }
}

impl<'a, R: Runtime> Call<'a, R> {
    /// `act(x W + b)` of one projection.
    fn projection(args: &'a GroupedGemmArgs<'_, Gpu<R>>, group: &'a Group) -> Self {
        let place = args.projection as usize;
        let [features, columns] = args.weight_shape();
        Self {
            x: args.x,
            group,
            first_place: place,
            first: &args.experts.data().banks[group.banks[place]],
            second: None,
            activation: args.activation,
            experts: args.experts.count(),
            features,
            columns,
        }
    }
}
