//! Block Hadamard rotation (operations.md: hadamard_block).

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, OpError, Result, Tensor, check};

/// Which matrix a block length stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HadamardKind {
    /// Sylvester order for a power of two; 96, 160 and 192 as two Sylvester blocks (64+32, 128+32, 128+64), each
    /// normalised by its own size.
    BlockDiagonal,
    /// A true Hadamard matrix: Sylvester for a power of two, `H_2^p (x) Paley` for 12 * 2^p and 20 * 2^p.
    True,
}

/// `x <- signs_after * (H (signs_before * x))` per block of `block` channels, in place.
pub struct HadamardArgs<'a, D: Device> {
    /// `[.., C]`, C a multiple of `block`; overwritten.
    pub x: &'a mut Tensor<D>,
    /// Channels per block.
    pub block: usize,
    /// Matrix.
    pub kind: HadamardKind,
    /// Divide by sqrt(n).
    pub normalize: bool,
    /// Use the transposed matrix (the inverse when normalised); differs from forward for Paley orders only.
    pub transpose: bool,
    /// `[C]` factors applied before.
    pub scale_before: Option<&'a Tensor<D>>,
    /// Factors applied after: `[C]` one for each channel, `[rows, 1]` for each row, `[rows, C]` for each element.
    pub scale_after: Option<&'a Tensor<D>>,
}

impl<D: Device> HadamardArgs<'_, D> {
    /// `[r, c]` where the factor of row i and channel j after the transform is number `i r + j c` of `scale_after`;
    /// `[0, 0]` without factors. None where their shape fits neither rows nor channels.
    pub fn after_strides(&self) -> Option<[usize; 2]> {
        let Some(scale) = self.scale_after else { return Some([0, 0]) };
        let (rows, columns) = (self.x.rows(), self.x.columns());
        match *scale.dims() {
            [c] if c == columns => Some([0, 1]),
            _ if scale.rows() != rows => None,
            [.., c] if c == columns => Some([columns, 1]),
            [_, .., 1] => Some([1, 0]),
            _ => None,
        }
    }
}

/// The parts `(offset, length)` that one block is transformed in, or none if the order is not supported.
pub fn block_parts(block: usize, kind: HadamardKind) -> Option<Vec<(usize, usize)>> {
    match (block, kind) {
        (2..=32768, _) if block.is_power_of_two() => Some(vec![(0, block)]),
        (96, HadamardKind::BlockDiagonal) => Some(vec![(0, 64), (64, 32)]),
        (160, HadamardKind::BlockDiagonal) => Some(vec![(0, 128), (128, 32)]),
        (192, HadamardKind::BlockDiagonal) => Some(vec![(0, 128), (128, 64)]),
        (12..=32768, HadamardKind::True) if paley_order(block).is_some() => Some(vec![(0, block)]),
        _ => None,
    }
}

/// 12 or 20 when `block` is that times a power of two.
pub fn paley_order(block: usize) -> Option<usize> {
    [12, 20].into_iter().find(|q| block.is_multiple_of(*q) && (block / q).is_power_of_two())
}

/// Entry (i, j) of the Paley I matrix of order 12 or 20: `I + [[0, 1^T], [-1, Q]]`, `Q_ij = chi(i - j)`.
pub fn paley_entry(order: usize, i: usize, j: usize) -> i32 {
    match (i, j) {
        (0, _) => 1,
        (_, 0) => -1,
        _ if i == j => 1,
        _ => legendre(i as i64 - j as i64, order as i64 - 1),
    }
}

/// Quadratic character of `a` modulo the odd prime `p`.
fn legendre(a: i64, p: i64) -> i32 {
    let a = a.rem_euclid(p);
    if a == 0 {
        return 0;
    }
    if (1..p).any(|x| x * x % p == a) { 1 } else { -1 }
}

impl<D: Device> HadamardArgs<'_, D> {
    fn cost(&self) -> Cost {
        let block_flops: usize = block_parts(self.block, self.kind)
            .into_iter()
            .flatten()
            .map(|(_, len)| {
                let factor = if len.is_power_of_two() { 1 } else { paley_order(len).unwrap_or(1) };
                len * (factor - 1 + (len / factor).ilog2() as usize)
            })
            .sum();
        let scales = [self.scale_before, self.scale_after];
        let per_element = usize::from(self.normalize) + scales.iter().flatten().count();
        let flops = self.x.elements() / self.block * block_flops + self.x.elements() * per_element;
        let weights: usize = scales.iter().flatten().map(|scale| scale.size_in_bytes()).sum();
        let cost = Cost::default().add_flops(Arithmetic::F32, flops).add_weights(weights);
        cost.add_activations(&[self.x, self.x])
    }
}

/// The Hadamard family.
pub trait HadamardOps: Device {
    /// Body of [`HadamardOps::hadamard`]; arguments are checked.
    fn run_hadamard(&self, args: HadamardArgs<'_, Self>) -> Result<()>;

    /// Block Hadamard transform in place.
    fn hadamard(&self, args: HadamardArgs<'_, Self>) -> Result<()> {
        const OP: &str = "hadamard";
        let columns = args.x.columns();
        check::float(OP, "x", args.x)?;
        if block_parts(args.block, args.kind).is_none() {
            let reason = format!("is {}: no {:?} matrix of this order", args.block, args.kind);
            return Err(OpError::value(OP, "block", reason));
        }
        if !columns.is_multiple_of(args.block) {
            let expected = format!("columns a multiple of {}", args.block);
            return Err(OpError::shape(OP, "x", args.x.dims(), expected));
        }
        if let Some(scale) = args.scale_before {
            check::dims(OP, "scale_before", scale, &[columns])?;
            check::float(OP, "scale_before", scale)?;
        }
        if let Some(scale) = args.scale_after {
            if args.after_strides().is_none() {
                let rows = args.x.rows();
                let expected = format!("[{columns}], [{rows}, 1] or [{rows}, {columns}]");
                return Err(OpError::shape(OP, "scale_after", scale.dims(), expected));
            }
            check::float(OP, "scale_after", scale)?;
        }
        if args.x.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new("hadamard", OP), args, HadamardArgs::cost, Self::run_hadamard)
    }
}
