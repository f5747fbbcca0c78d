use cubecl::prelude::*;
use cubecl::server::Handle;

/// Device memory of a tensor; clones share it.
#[derive(Clone)]
pub struct Buffer {
    pub(crate) handle: Handle,
    pub(crate) bytes: usize,
}

impl Buffer {
    /// The buffer as a kernel argument of `len` elements.
    pub(crate) fn arg<R: Runtime>(&self, len: usize) -> BufferArg<R> {
        // SAFETY: callers pass at most the elements that the buffer was allocated for; a kernel bounds its own accesses
        // by the shapes it is given.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), len) }
    }
}
