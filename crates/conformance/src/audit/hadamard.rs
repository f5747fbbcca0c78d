//! Block Hadamard rotation with 16-bit values.

use marlin_formats::DType;
use marlin_ops::hadamard::{HadamardArgs, HadamardKind};
use marlin_ops::{Backend, Result};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::Variants;
use crate::input::{Output, floats, floats_as};
use crate::random::Random;
use crate::tolerance::Tolerance;

/// Factors after the transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    None,
    /// Of each row.
    Row,
    /// Of each value.
    Element,
}

#[derive(Debug)]
struct HadamardCase {
    rows: usize,
    blocks: usize,
    block: usize,
    io: DType,
    normalize: bool,
    after: After,
    /// Transformed a second time: n times the input, or the input if normalised.
    twice: bool,
    /// Small whole numbers: exact unless normalised.
    whole: bool,
}

impl AuditCase for HadamardCase {
    fn configuration(&self) -> String {
        let Self { rows, blocks, block, normalize, after, .. } = self;
        let twice = if self.twice { " twice" } else { "" };
        let whole = if self.whole { " whole numbers" } else { "" };
        format!(
            "[{rows}, {blocks} x {block}] io={} normalize={normalize} scale={after:?}{twice}{whole}",
            short(self.io)
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let columns = self.blocks * self.block;
        let mut values = random.normals(self.rows * columns);
        if self.whole {
            values.iter_mut().for_each(|v| *v = v.round());
        }
        let mut x = floats_as(b, self.io, &[self.rows, columns], &values)?;
        let factors = if self.after == After::Row { 1 } else { columns };
        let after = floats(b, &[self.rows, factors], &random.normals(self.rows * factors))?;
        for _ in 0..1 + usize::from(self.twice) {
            b.hadamard(HadamardArgs {
                x: &mut x,
                block: self.block,
                kind: HadamardKind::True,
                normalize: self.normalize,
                transpose: false,
                scale_before: None,
                scale_after: (self.after != After::None).then_some(&after),
            })?;
        }
        Ok(vec![Output::floats(b, "x", &x)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        if self.whole && !self.normalize {
            return vec![Tolerance::Exact];
        }
        vec![Tolerance::Blocks { block: self.block, bound: bounds::hadamard(self.io) }]
    }
}

pub(crate) fn bind<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    let block = settings.count("n").expect("the channels of a block");
    let case = |io, normalize| HadamardCase {
        rows: 3,
        blocks: 2,
        block,
        io,
        normalize,
        after: After::None,
        twice: false,
        whole: false,
    };
    if settings.word("check") == Some("involution") {
        sink.check(&HadamardCase { twice: true, whole: true, ..case(DType::F32, false) });
        sink.check(&HadamardCase { twice: true, ..case(DType::F32, true) });
        return Ok(());
    }
    let scales = settings.words("post_scale");
    for io in settings.types("io") {
        for normalize in settings.flags("normalize") {
            for (rows, blocks) in [(1, 1), (17, 3), (130, 1)] {
                sink.check(&HadamardCase { rows, blocks, ..case(io, normalize) });
            }
            sink.check(&HadamardCase { whole: true, ..case(io, normalize) });
            for scale in &scales {
                let after = if *scale == "row" { After::Row } else { After::Element };
                for (rows, blocks) in [(1, 1), (17, 3), (130, 1)] {
                    sink.check(&HadamardCase { rows, blocks, after, ..case(io, normalize) });
                }
            }
        }
    }
    Ok(())
}
