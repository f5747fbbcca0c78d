//! Block Hadamard rotation: butterflies for the power-of-two factor, a small dense product for the Paley factor.

use marlin_ops::hadamard::{HadamardArgs, HadamardKind, block_parts, paley_entry, paley_order};
use marlin_ops::{HadamardOps, OpError, Result};

use crate::Cpu;
use crate::buffer::{f32s_mut, optional_f32s};

/// Unnormalised Sylvester transform of `2^p` vectors of `inner` elements each.
fn butterflies(x: &mut [f32], inner: usize) {
    let mut width = inner;
    while width < x.len() {
        for block in x.chunks_exact_mut(2 * width) {
            let (first, second) = block.split_at_mut(width);
            for (a, b) in first.iter_mut().zip(second) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        width *= 2;
    }
}

/// Largest Paley order.
const PALEY_MAX: usize = 20;

/// The small factor of a true Hadamard matrix.
struct Paley {
    order: usize,
    /// Rows of the matrix, or of its transpose.
    rows: [[f32; PALEY_MAX]; PALEY_MAX],
}

impl Paley {
    fn new(order: usize, transpose: bool) -> Self {
        let mut rows = [[0.0; PALEY_MAX]; PALEY_MAX];
        for (i, row) in rows[..order].iter_mut().enumerate() {
            for (j, entry) in row[..order].iter_mut().enumerate() {
                let (i, j) = if transpose { (j, i) } else { (i, j) };
                *entry = paley_entry(order, i, j) as f32;
            }
        }
        Self { order, rows }
    }

    /// `x = P x`.
    fn multiply(&self, x: &mut [f32]) {
        let mut y = [0.0f32; PALEY_MAX];
        for (y, row) in y.iter_mut().zip(&self.rows[..self.order]) {
            *y = row.iter().zip(&*x).map(|(h, v)| h * v).sum();
        }
        x.copy_from_slice(&y[..self.order]);
    }
}

/// One part of a block: `H x` with `H = H_2^p (x) P`. Sylvester matrices are symmetric, so only P knows a transpose.
fn transform_part(x: &mut [f32], paley: Option<&Paley>, normalize: bool) {
    let order = paley.map_or(1, |p| p.order);
    if let Some(paley) = paley {
        for part in x.chunks_exact_mut(order) {
            paley.multiply(part);
        }
    }
    butterflies(x, order);
    if normalize {
        let scale = (1.0 / (x.len() as f64).sqrt()) as f32;
        for v in x {
            *v *= scale;
        }
    }
}

fn multiply(x: &mut [f32], factors: Option<&[f32]>) {
    for (x, f) in x.iter_mut().zip(factors.into_iter().flatten()) {
        *x *= f;
    }
}

impl HadamardOps for Cpu {
    fn run_hadamard(&self, args: HadamardArgs<'_, Self>) -> Result<()> {
        const OP: &str = "hadamard";
        let columns = args.x.columns();
        let parts = block_parts(args.block, args.kind).ok_or_else(|| {
            let reason = format!("is {}: no {:?} matrix of this order", args.block, args.kind);
            OpError::value(OP, "block", reason)
        })?;
        let paley = match args.kind {
            HadamardKind::True => paley_order(args.block).map(|order| Paley::new(order, args.transpose)),
            HadamardKind::BlockDiagonal => None,
        };
        let before = optional_f32s(OP, "scale_before", args.scale_before)?;
        let after = optional_f32s(OP, "scale_after", args.scale_after)?;
        let [row_stride, column_stride] = args.after_strides().unwrap_or_default();
        let x = f32s_mut(OP, "x", args.x)?;
        self.for_rows(x, columns, |i, row| {
            multiply(row, before);
            for block in row.chunks_exact_mut(args.block) {
                for &(start, len) in &parts {
                    let part = &mut block[start..start + len];
                    transform_part(part, paley.as_ref(), args.normalize);
                }
            }
            match after {
                Some(after) if column_stride == 0 => row.iter_mut().for_each(|v| *v *= after[i]),
                _ => multiply(row, after.map(|after| &after[i * row_stride..])),
            }
        });
        Ok(())
    }
}
