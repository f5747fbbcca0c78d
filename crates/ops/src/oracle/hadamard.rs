//! Block Hadamard rotation by explicit matrices.

use super::{Oracle, floats, store};
use crate::hadamard::{HadamardArgs, HadamardOps, block_parts, paley_entry, paley_order};
use crate::{OpError, Result};

/// A Hadamard matrix of order `n`: Sylvester for a power of two, else `H_2^p (x) Paley`.
struct Matrix {
    n: usize,
    /// Order of the Paley factor, 1 when there is none.
    order: usize,
    /// The Paley factor, `[order, order]`.
    paley: Vec<i32>,
}

impl Matrix {
    fn new(n: usize) -> Self {
        let order =
            if n.is_power_of_two() { 1 } else { paley_order(n).expect("block_parts offers supported orders only") };
        let entry = |at: usize| match order {
            1 => 1,
            _ => paley_entry(order, at / order, at % order),
        };
        let paley = (0..order * order).map(entry).collect();
        Self { n, order, paley }
    }

    fn entry(&self, i: usize, j: usize) -> i32 {
        if self.order == 1 {
            return sylvester(i, j);
        }
        let paley = self.paley[i % self.order * self.order + j % self.order];
        sylvester(i / self.order, j / self.order) * paley
    }

    /// `H x`, or `H^T x`. H is the Kronecker product of a Sylvester matrix and of its own first block, so that large
    /// orders take two small products.
    fn apply(&self, x: &[f64], transpose: bool) -> Vec<f64> {
        let inner = self.order << (self.n / self.order).trailing_zeros().min(6);
        let entry = |i, j| f64::from(if transpose { self.entry(j, i) } else { self.entry(i, j) });
        let within: Vec<f64> = (0..self.n)
            .map(|i| {
                let block = &x[i / inner * inner..][..inner];
                block.iter().enumerate().map(|(j, x)| entry(i % inner, j) * x).sum()
            })
            .collect();
        let across = |i: usize| {
            let places = within[i % inner..].iter().step_by(inner).enumerate();
            places.map(|(j, x)| f64::from(sylvester(i / inner, j)) * x).sum()
        };
        (0..self.n).map(across).collect()
    }
}

/// `(-1)^(bits that i and j share)`.
fn sylvester(i: usize, j: usize) -> i32 {
    1 - 2 * ((i & j).count_ones() & 1) as i32
}

impl HadamardOps for Oracle {
    fn run_hadamard(&self, args: HadamardArgs<'_, Self>) -> Result<()> {
        let columns = args.x.columns();
        let ones = vec![1.0; columns];
        let before = args.scale_before.map_or(&ones[..], floats);
        let after = args.scale_after.map_or(&[1.0][..], floats);
        let [row_stride, column_stride] = args.after_strides().unwrap_or_default();
        let parts: Vec<(usize, Matrix)> = block_parts(args.block, args.kind)
            .ok_or_else(|| OpError::value("hadamard", "block", format!("is {}", args.block)))?
            .into_iter()
            .map(|(offset, length)| (offset, Matrix::new(length)))
            .collect();
        let mut y = Vec::with_capacity(args.x.elements());
        for row in floats(args.x).chunks(columns) {
            let scaled: Vec<f64> = row.iter().zip(before).map(|(x, s)| x * s).collect();
            for block in scaled.chunks(args.block) {
                for (offset, matrix) in &parts {
                    let length = matrix.n;
                    let part = matrix.apply(&block[*offset..][..length], args.transpose);
                    let norm = if args.normalize { (length as f64).sqrt() } else { 1.0 };
                    y.extend(part.into_iter().map(|v| v / norm));
                }
            }
        }
        let factor = |i: usize| after[i / columns * row_stride + i % columns * column_stride];
        let y: Vec<f64> = y.iter().enumerate().map(|(i, y)| y * factor(i)).collect();
        store(args.x, 0, &y);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, tensor, waves};
    use super::*;
    use crate::Device;
    use crate::hadamard::HadamardKind;

    #[test]
    fn matrices_are_hadamard() {
        for n in [2, 4, 12, 20, 24, 40, 64, 80, 96, 160, 192] {
            let matrix = Matrix::new(n);
            let entry = |i, j| matrix.entry(i, j);
            for i in 0..n {
                for j in 0..n {
                    let product: i32 = (0..n).map(|k| entry(i, k) * entry(j, k)).sum();
                    assert_eq!(product, if i == j { n as i32 } else { 0 }, "order {n} [{i}, {j}]");
                    assert_eq!(entry(i, j).abs(), 1);
                }
            }
        }
        // Sylvester: H_2m = [[H, H], [H, -H]].
        let h4: Vec<i32> = (0..16).map(|at| Matrix::new(4).entry(at / 4, at % 4)).collect();
        assert_eq!(h4, [1, 1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, 1]);
        // Paley I of order 12: chi of 1..=10 mod 11 is + - + + + - - - + -.
        let column: Vec<i32> = (1..12).map(|i| Matrix::new(12).entry(i, 1)).collect();
        assert_eq!(column, [1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1]);
    }

    #[test]
    fn two_products_are_the_whole_matrix() {
        for n in [2, 64, 128, 96, 160, 1536, 2048] {
            let (matrix, x) = (Matrix::new(n), waves(n, 0.7));
            let x: Vec<f64> = x.into_iter().map(f64::from).collect();
            for transpose in [false, true] {
                let entry = |i, j| f64::from(if transpose { matrix.entry(j, i) } else { matrix.entry(i, j) });
                let whole: Vec<f64> = (0..n).map(|i| (0..n).map(|j| entry(i, j) * x[j]).sum()).collect();
                assert_close(&matrix.apply(&x, transpose), &whole, 1e-10);
            }
        }
    }

    fn rotated(x: &[f32], block: usize, kind: HadamardKind, round_trip: bool) -> Vec<f64> {
        let oracle = Oracle::new();
        let mut x = tensor(&[1, x.len()], x);
        for transpose in if round_trip { vec![false, true] } else { vec![false] } {
            let args = HadamardArgs {
                x: &mut x,
                block,
                kind,
                normalize: true,
                transpose,
                scale_before: None,
                scale_after: None,
            };
            oracle.hadamard(args).unwrap();
        }
        oracle.read_f64(&x).unwrap()
    }

    #[test]
    fn round_trips() {
        for (block, kind) in [
            (8, HadamardKind::BlockDiagonal),
            (96, HadamardKind::BlockDiagonal),
            (96, HadamardKind::True),
            (12, HadamardKind::True),
            (160, HadamardKind::True),
        ] {
            let x = waves(block * 2, 0.3);
            let expected: Vec<f64> = x.iter().copied().map(f64::from).collect();
            assert_close(&rotated(&x, block, kind, true), &expected, 1e-12);
        }
    }

    #[test]
    fn an_impulse_stays_in_its_part() {
        let mut x = vec![0.0; 96];
        x[64] = 1.0;
        let y = rotated(&x, 96, HadamardKind::BlockDiagonal, false);
        assert!(y[..64].iter().all(|&v| v == 0.0));
        assert_close(&y[64..], &[1.0 / 32f64.sqrt(); 32], 1e-15);
        let y = rotated(&x, 96, HadamardKind::True, false);
        assert!(y.iter().all(|v| (v.abs() - 1.0 / 96f64.sqrt()).abs() < 1e-15));
    }

    #[test]
    fn scales_apply_on_their_sides() {
        let oracle = Oracle::new();
        let mut x = tensor(&[1, 2], &[1.0, 2.0]);
        let (before, after) = (tensor(&[2], &[1.0, -1.0]), tensor(&[2], &[10.0, 100.0]));
        let args = HadamardArgs {
            x: &mut x,
            block: 2,
            kind: HadamardKind::True,
            normalize: false,
            transpose: false,
            scale_before: Some(&before),
            scale_after: Some(&after),
        };
        oracle.hadamard(args).unwrap();
        assert_eq!(oracle.read_f64(&x).unwrap(), [-10.0, 300.0]);
    }

    #[test]
    fn factors_of_channels_rows_and_elements() {
        let oracle = Oracle::new();
        let scaled = |dims: &[usize], factors: &[f32]| {
            let mut x = tensor(&[2, 2], &[1.0, 0.0, 0.0, 1.0]);
            let after = tensor(dims, factors);
            let args = HadamardArgs {
                x: &mut x,
                block: 2,
                kind: HadamardKind::True,
                normalize: false,
                transpose: false,
                scale_before: None,
                scale_after: Some(&after),
            };
            oracle.hadamard(args).map(|()| oracle.read_f64(&x).unwrap())
        };
        assert_eq!(scaled(&[2], &[2.0, 3.0]).unwrap(), [2.0, 3.0, 2.0, -3.0]);
        assert_eq!(scaled(&[2, 1], &[2.0, 3.0]).unwrap(), [2.0, 2.0, 3.0, -3.0]);
        assert_eq!(scaled(&[2, 2], &[2.0, 3.0, 4.0, 5.0]).unwrap(), [2.0, 3.0, 4.0, -5.0]);
        assert!(scaled(&[1, 2], &[2.0, 3.0]).is_err());
        assert!(scaled(&[3, 1], &[2.0; 3]).is_err());
    }
}
