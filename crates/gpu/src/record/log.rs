//! What a recording device remembers.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::prelude::KernelId;

use super::{CompileError, MslKernel};

/// What the server writes down.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<State>>);

impl Log {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // No state is half-written when a thread panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernels and errors so far.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) launches: usize,
    /// Configurations that were compiled already.
    seen: HashSet<KernelId>,
    /// Number of the kernel with this text.
    texts: HashMap<String, usize>,
    pub(super) kernels: Vec<MslKernel>,
    pub(super) errors: Vec<CompileError>,
}

impl State {
    /// Counts a launch; whether it is the first of its configuration.
    pub(super) fn launch(&mut self, id: &KernelId) -> bool {
        self.launches += 1;
        self.seen.insert(id.clone())
    }

    /// Keeps a kernel unless its text is known.
    pub(super) fn keep(&mut self, kernel: MslKernel) {
        let next = self.kernels.len();
        if *self.texts.entry(kernel.text.clone()).or_insert(next) == next {
            self.kernels.push(kernel);
        }
    }
}
