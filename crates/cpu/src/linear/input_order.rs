//! Activations in the order of a weight's rows.

use marlin_ops::InputOrder;

use crate::Cpu;
use crate::workspace::Scratch;

impl Cpu {
    /// The rows of x with the channels of `order`; none where those follow one another.
    pub(super) fn ordered_rows(&self, x: &[f32], order: Option<&InputOrder>) -> Option<Scratch<'_, f32>> {
        let order = order?;
        let columns = order.channels().len();
        let mut out = self.workspace.floats.take(x.len());
        self.for_rows(&mut out, columns, |row, out| order.gather(&x[row * columns..][..columns], out));
        Some(out)
    }
}
