//! Mixture of experts: routing, stable grouping, the experts' gated MLPs and their weighted sum.

mod aux_loss;
mod combine;
mod dot;
mod exl3;
mod experts;
mod fused;
mod gemm;
mod gemv;
mod group;
mod grouped;
mod mlp;
mod route;
mod tensor;

use cubecl::prelude::*;
use marlin_ops::moe::{AuxLossArgs, CombineArgs, ExpertMlpArgs, GroupArgs, GroupedGemmArgs, RouteArgs};
use marlin_ops::{MoeOps, Result};

pub use experts::GpuExperts;
pub use mlp::{ExpertKernel, ExpertStrategy};

use crate::Gpu;
use group::Sorted;

impl<R: Runtime> MoeOps for Gpu<R> {
    fn run_moe_route(&self, args: RouteArgs<'_, Self>) -> Result<()> {
        self.route(args)
    }

    fn run_moe_group(&self, args: GroupArgs<'_, Self>) -> Result<()> {
        let sorted = Sorted { offsets: args.offsets, permutation: args.permutation, inverse: args.inverse };
        self.group("moe_group", args.ids, args.experts, &sorted)
    }

    fn run_moe_expert_mlp(&self, args: ExpertMlpArgs<'_, Self>) -> Result<()> {
        self.choose_and_run(&args)
    }

    fn run_moe_combine(&self, args: CombineArgs<'_, Self>) -> Result<()> {
        self.combine(args.rows, Some(args.inverse), args.weights, &args.residual, args.out);
        Ok(())
    }

    fn run_moe_aux_loss(&self, args: AuxLossArgs<'_, Self>) -> Result<()> {
        aux_loss::launch(self, &args)
    }

    fn run_moe_grouped_gemm(&self, args: GroupedGemmArgs<'_, Self>) -> Result<()> {
        self.choose_grouped(&args)
    }
}
