//! Block Hadamard rotation.

use marlin_ops::hadamard::{HadamardArgs, HadamardKind};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats};
use crate::random::Random;
use crate::tolerance::{self, Tolerance};

/// What the factors after the transform belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Factors {
    Channels,
    Rows,
    Elements,
    /// Bad.
    RowsAndOne,
}

struct HadamardCase {
    rows: usize,
    blocks: usize,
    block: usize,
    kind: HadamardKind,
    normalize: bool,
    transpose: bool,
    scales: bool,
    /// Factors after the transform for each row, or each element, instead of each channel.
    after: Factors,
    /// Row r of each block is one-hot at channel r: exact unless normalised.
    impulses: bool,
    surplus_columns: usize,
}

const HADAMARD: HadamardCase = HadamardCase {
    rows: 3,
    blocks: 2,
    block: 64,
    kind: HadamardKind::True,
    normalize: true,
    transpose: false,
    scales: false,
    after: Factors::Channels,
    impulses: false,
    surplus_columns: 0,
};

impl Case for HadamardCase {
    const OPERATION: &'static str = "hadamard";

    fn configuration(&self) -> String {
        let HadamardCase { rows, blocks, block, kind, normalize, transpose, scales, .. } = self;
        let shape = format!("[{rows}, {blocks} x {block}] {kind:?}");
        let impulses = if self.impulses { " impulses" } else { "" };
        let after = if self.after == Factors::Channels { String::new() } else { format!(" {:?}", self.after) };
        format!("{shape} normalize={normalize} transpose={transpose} scales={scales}{after}{impulses}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let columns = self.blocks * self.block + self.surplus_columns;
        let mut x = random.normals(self.rows * columns);
        if self.impulses {
            for (i, v) in x.iter_mut().enumerate() {
                *v = f32::from(u8::from(i % columns % self.block == i / columns));
            }
        }
        let mut x = floats(b, &[self.rows, columns], &x)?;
        let before = floats(b, &[columns], &random.normals(columns))?;
        let after_dims = match self.after {
            Factors::Channels => vec![columns],
            Factors::Rows => vec![self.rows, 1],
            Factors::Elements => vec![self.rows, columns],
            Factors::RowsAndOne => vec![self.rows + 1, 1],
        };
        let after = floats(b, &after_dims, &random.normals(after_dims.iter().product()))?;
        b.hadamard(HadamardArgs {
            x: &mut x,
            block: self.block,
            kind: self.kind,
            normalize: self.normalize,
            transpose: self.transpose,
            scale_before: self.scales.then_some(&before),
            scale_after: self.scales.then_some(&after),
        })?;
        Ok(vec![Output::floats(b, "x", &x)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        if self.impulses && !self.normalize {
            return vec![Tolerance::Exact];
        }
        vec![Tolerance::Blocks { block: self.block, bound: tolerance::HADAMARD }]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    use HadamardKind::{BlockDiagonal, True};
    for block in [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] {
        runner.check(&HadamardCase { block, kind: BlockDiagonal, ..HADAMARD });
        let rows = block.min(8);
        runner.check(&HadamardCase { rows, block, normalize: false, impulses: true, ..HADAMARD });
    }
    runner.check(&HadamardCase { rows: 1, blocks: 1, block: 32_768, ..HADAMARD });
    for block in [96, 160, 192] {
        for normalize in [true, false] {
            runner.check(&HadamardCase { block, kind: BlockDiagonal, normalize, ..HADAMARD });
        }
    }
    for block in [12, 20, 24, 40, 48, 80, 96, 160, 192, 320, 384, 768, 1536] {
        for transpose in [false, true] {
            runner.check(&HadamardCase { block, transpose, ..HADAMARD });
            let rows = block.min(24);
            let case = HadamardCase { rows, block, transpose, normalize: false, impulses: true, ..HADAMARD };
            runner.check(&case);
        }
    }
    for (block, kind) in [(64, True), (128, True), (96, BlockDiagonal), (160, True)] {
        runner.check(&HadamardCase { block, kind, scales: true, ..HADAMARD });
    }
    for after in [Factors::Rows, Factors::Elements] {
        for (rows, block, kind) in [(5, 64, True), (64, 64, True), (3, 96, BlockDiagonal), (3, 16_384, True)] {
            runner.check(&HadamardCase { rows, block, kind, scales: true, after, ..HADAMARD });
        }
    }
    let case = HadamardCase { scales: true, after: Factors::RowsAndOne, ..HADAMARD };
    runner.refuse("factors for a row too many", &case, Refusal::Shape("scale_after"));
    for (rows, blocks) in [(1, 1), (17, 5), (0, 1), (130, 1)] {
        runner.check(&HadamardCase { rows, blocks, ..HADAMARD });
    }
    for (block, kind) in [(0, True), (1, True), (3, True), (36, True), (28, True), (65_536, True), (48, BlockDiagonal)]
    {
        let case = HadamardCase { rows: 1, blocks: 1, block, kind, ..HADAMARD };
        runner.refuse(&format!("{kind:?} of order {block}"), &case, Refusal::Value("block"));
    }
    let case = HadamardCase { surplus_columns: 1, ..HADAMARD };
    runner.refuse("columns not a multiple of the block", &case, Refusal::Shape("x"));
}
