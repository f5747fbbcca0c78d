//! Rotary position embeddings.

use cubecl::prelude::*;
use marlin_ops::rope::{MlaLatentWriteArgs, RopeArgs};
use marlin_ops::{Result, RopeOps};

use crate::Gpu;

impl<R: Runtime> RopeOps for Gpu<R> {
    fn run_rope(&self, _args: RopeArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("rope"))
    }

    fn run_mla_latent_write(&self, _args: MlaLatentWriteArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("mla_latent_write"))
    }
}
