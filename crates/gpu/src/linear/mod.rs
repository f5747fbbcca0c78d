//! Linear layers.

use cubecl::prelude::*;
use marlin_ops::linear::{EmbeddingArgs, GatedUpArgs, LinearArgs, ProjectionsArgs};
use marlin_ops::{LinearOps, Result};

use crate::Gpu;

impl<R: Runtime> LinearOps for Gpu<R> {
    fn run_linear(&self, _args: LinearArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("linear"))
    }

    fn run_projections(&self, _args: ProjectionsArgs<'_, '_, Self>) -> Result<()> {
        Err(self.unsupported("projections"))
    }

    fn run_gated_up(&self, _args: GatedUpArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("gated_up"))
    }

    fn run_embedding(&self, _args: EmbeddingArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("embedding"))
    }
}
