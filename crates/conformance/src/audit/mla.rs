//! Projections of multi-head latent attention.

use marlin_formats::DType;
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::{Pairing, RopeArgs};
use marlin_ops::{Backend, Linear, Result, Tensor};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::linear::storage_named;
use super::variants::{LinearKernel, MatrixTile, Variants};
use crate::input::{Output, floats, floats_as, ids, poison, poison_as};
use crate::linear::by_rows;
use crate::random::Random;
use crate::rope::{DEFAULT, positions, table};
use crate::tolerance::Tolerance;
use crate::weight::{Scales, Storage, random_weight};

/// `x Wa`, then perhaps `rms_norm(.) Wb`, then perhaps a rotation of the tail of every head.
#[derive(Debug)]
struct ProjectCase {
    tile: MatrixTile,
    m: usize,
    k: usize,
    /// Outputs of the first matrix.
    n: usize,
    first: Storage,
    /// The second matrix.
    second: Option<(Storage, usize)>,
    /// (head_dim, rotated channels).
    rope: Option<(usize, usize)>,
    io: DType,
}

impl ProjectCase {
    fn product<B: Backend, V: Variants<B>>(
        &self,
        b: &B,
        variants: &V,
        x: &Tensor<B>,
        weight: &Linear<B>,
        out: &mut Tensor<B>,
    ) -> Result<()> {
        let (activation, residual) = (Activation::None, Residual::None);
        let args = LinearArgs { x, weight, activation, out_scale: 1.0, residual, out };
        variants.linear(b, LinearKernel::Matrix(self.tile), args)
    }
}

impl AuditCase for ProjectCase {
    fn configuration(&self) -> String {
        let Self { m, k, n, first, rope, .. } = self;
        let second = self.second.map_or(String::new(), |(storage, n)| format!(" then {storage} N={n}"));
        let (io, tile) = (short(self.io), self.tile.name());
        format!("{first} M={m} K={k} N={n}{second} io={io} rope={rope:?} {tile}")
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let x = floats_as(b, self.io, &[self.m, self.k], &random.normals(self.m * self.k))?;
        let weight = Linear::new(b, random_weight(self.first, self.n, self.k, Scales::Usual, random)?)?;
        let mut out = poison_as(b, self.io, &[self.m, self.n])?;
        if let Some((storage, n)) = self.second {
            let mut latent = poison(b, &[self.m, self.n])?;
            self.product(b, variants, &x, &weight, &mut latent)?;
            let gamma = floats(b, &[self.n], &random.normals(self.n))?;
            let mut normed = poison(b, &[self.m, self.n])?;
            b.rms_norm(RmsNormArgs {
                x: &latent,
                residual: None,
                gamma: Some(&gamma),
                gamma_offset: 0.0,
                eps: 1e-6,
                out: &mut normed,
            })?;
            let weight = Linear::new(b, random_weight(storage, n, self.n, Scales::Usual, random)?)?;
            out = poison_as(b, self.io, &[self.m, n])?;
            self.product(b, variants, &normed, &weight, &mut out)?;
        } else {
            self.product(b, variants, &x, &weight, &mut out)?;
        }
        if let Some((head_dim, rotary_dim)) = self.rope {
            out.reshape(&[self.m, self.n / head_dim, head_dim])?;
            let at = ids(b, &[self.m], &positions(self.m))?;
            b.rope(RopeArgs {
                x: &mut out,
                positions: &at,
                table: &table(b, rotary_dim, DEFAULT)?,
                pairing: Pairing::Interleaved,
                offset: head_dim - rotary_dim,
                inverse: false,
            })?;
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let one = match self.tile.accumulate {
            DType::F16 => bounds::f16_accumulator(self.k),
            _ => bounds::linear(self.io),
        };
        let (n, bound) = match self.second {
            Some((_, n)) if self.tile.accumulate == DType::F16 => (n, one + bounds::f16_accumulator(self.n)),
            Some((_, n)) => (n, bounds::gated_mlp(self.io)),
            // The rotation rounds once more.
            None if self.rope.is_some() => (self.n, one + bounds::linear(self.io)),
            None => (self.n, one),
        };
        vec![by_rows(self.m, n, bound)]
    }

    fn needs_variants(&self) -> bool {
        true
    }
}

pub(crate) fn bind<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    let format = settings.word("format").expect("a format");
    let shape = settings.tile("tile").expect("a tile");
    let tile = MatrixTile {
        m: shape.m,
        n: shape.n,
        k: shape.k.expect("three sizes"),
        units: settings.count("threads").unwrap_or(128),
        stages: 2,
        accumulate: settings.element("acc").unwrap_or(DType::F32),
    };
    settings.implied(&["norm", "group_sizes"]);
    let two = settings.word("stage") == Some("a_then_b");
    let rope = settings.word("rope") == Some("tail");
    for io in settings.types("io") {
        for (m, k, heads) in [(1, 256, 2), (9, 200, 3), (64, 512, 1), (65, 96, 5)] {
            let first = storage_named(format, 32);
            let n = if two { 64 } else { 24 * heads };
            let second = two.then_some((storage_named(format, 64), 24 * heads));
            let rope = rope.then_some((24, 8));
            sink.check(&ProjectCase { tile, m, k, n, first, second, rope, io });
        }
    }
    Ok(())
}
