//! Block Hadamard rotation.

use cubecl::prelude::*;
use marlin_ops::hadamard::HadamardArgs;
use marlin_ops::{HadamardOps, Result};

use crate::Gpu;

impl<R: Runtime> HadamardOps for Gpu<R> {
    fn run_hadamard(&self, _args: HadamardArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("hadamard"))
    }
}
