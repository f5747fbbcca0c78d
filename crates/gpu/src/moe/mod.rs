//! Mixture of experts.

use cubecl::prelude::*;
use marlin_ops::moe::{CombineArgs, ExpertMlpArgs, GroupArgs, RouteArgs};
use marlin_ops::{MoeOps, Result};

use crate::Gpu;

impl<R: Runtime> MoeOps for Gpu<R> {
    fn run_moe_route(&self, _args: RouteArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("moe_route"))
    }

    fn run_moe_group(&self, _args: GroupArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("moe_group"))
    }

    fn run_moe_expert_mlp(&self, _args: ExpertMlpArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("moe_expert_mlp"))
    }

    fn run_moe_combine(&self, _args: CombineArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("moe_combine"))
    }
}
