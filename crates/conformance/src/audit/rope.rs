//! Rotary embedding and latent cache rows with 16-bit values.

use marlin_formats::DType;
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::{MlaLatentWriteArgs, Pairing, RopeArgs, RopeConfig, RopeScaling, RopeTable};
use marlin_ops::{Backend, Result, Tensor};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::Variants;
use crate::input::{Output, floats, floats_as, ids, poison_as};
use crate::random::Random;
use crate::rope::{DEFAULT, YARN, positions, scaling_name, table};
use crate::tolerance::{self, Tolerance, U32};

#[derive(Debug)]
struct RopeCase {
    tokens: usize,
    /// Of each tensor that is rotated.
    heads: Vec<usize>,
    head_dim: usize,
    rotary_dim: usize,
    io: DType,
    scaling: RopeScaling,
    /// Rotated in a copy.
    copied: bool,
    /// Rotated back afterwards.
    back: bool,
}

impl RopeCase {
    fn values(&self, heads: usize) -> Vec<f32> {
        Random::of(&format!("{} {heads}", self.configuration())).normals(self.tokens * heads * self.head_dim)
    }
}

impl AuditCase for RopeCase {
    fn configuration(&self) -> String {
        let Self { tokens, heads, head_dim, rotary_dim, .. } = self;
        let copied = if self.copied { " into a copy" } else { "" };
        let back = if self.back { " and back" } else { "" };
        let (io, scaling) = (short(self.io), scaling_name(self.scaling));
        format!("[{tokens}, {heads:?}, {head_dim}] d={rotary_dim} io={io} {scaling}{copied}{back}")
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let table = table(b, self.rotary_dim, self.scaling)?;
        let at = ids(b, &[self.tokens], &positions(self.tokens))?;
        let mut outputs = Vec::new();
        for &heads in &self.heads {
            let dims = [self.tokens, heads, self.head_dim];
            let source = floats_as(b, self.io, &dims, &self.values(heads))?;
            let mut copy = poison_as(b, self.io, &dims)?;
            b.copy_rows(&source, 0, self.tokens * heads, &mut copy)?;
            let mut x = if self.copied { copy } else { floats_as(b, self.io, &dims, &self.values(heads))? };
            for inverse in [false, true] {
                if !inverse || self.back {
                    let (pairing, offset) = (Pairing::Interleaved, 0);
                    b.rope(RopeArgs { x: &mut x, positions: &at, table: &table, pairing, offset, inverse })?;
                }
            }
            outputs.push(Output::floats(b, "x", &x)?);
            outputs.push(Output::floats(b, "source", &source)?);
        }
        Ok(outputs)
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let turns = 1.0 + f64::from(u8::from(self.back));
        let one = |heads: usize| {
            let u = bounds::round_off(self.io);
            // Pairs are judged by the largest element of their row, at least the pair's own.
            let rows = self.values(heads);
            let absolute = rows
                .chunks(self.head_dim)
                .flat_map(|row| {
                    let max = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                    vec![turns * tolerance::ROPE_OF_PAIR * f64::from(max); row.len()]
                })
                .collect();
            // One rounding on each side.
            [Tolerance::Elements { ulps: 1.0, relative: turns * 2.0 * u, absolute }, Tolerance::Exact]
        };
        self.heads.iter().flat_map(|&heads| one(heads)).collect()
    }
}

/// Which parts of a latent row are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    /// Into one cache.
    Whole,
    /// Into a tensor each.
    Split,
}

#[derive(Debug)]
struct LatentCase {
    tokens: usize,
    rank: usize,
    rotary_dim: usize,
    io: DType,
    norm: bool,
    scaling: RopeScaling,
    rows: Rows,
}

const EPS: f32 = 1e-6;

impl LatentCase {
    fn split<B: Backend>(&self, b: &B, table: &RopeTable<B>, at: &Tensor<B>) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (tokens, rank, rope) = (self.tokens, self.rank, self.rotary_dim);
        let c = floats_as(b, self.io, &[tokens, rank], &random.normals(tokens * rank))?;
        let mut k_pe = floats_as(b, self.io, &[tokens, 1, rope], &random.normals(tokens * rope))?;
        let gamma = floats(b, &[rank], &random.normals(rank))?;
        let mut out = poison_as(b, self.io, &[tokens, rank])?;
        match self.norm {
            true => b.rms_norm(RmsNormArgs {
                x: &c,
                residual: None,
                gamma: Some(&gamma),
                gamma_offset: 0.0,
                eps: EPS,
                out: &mut out,
            })?,
            false => b.convert(&c, &mut out)?,
        }
        let (pairing, offset, inverse) = (Pairing::Interleaved, 0, false);
        b.rope(RopeArgs { x: &mut k_pe, positions: at, table, pairing, offset, inverse })?;
        Ok(vec![Output::floats(b, "c_kv", &out)?, Output::floats(b, "k_pe", &k_pe)?])
    }

    fn whole<B: Backend>(&self, b: &B, table: &RopeTable<B>, at: &Tensor<B>) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let width = self.rank + self.rotary_dim;
        let x = floats_as(b, self.io, &[self.tokens, width], &random.normals(self.tokens * width))?;
        let gamma = floats(b, &[self.rank], &random.normals(self.rank))?;
        let dims = [2, self.tokens + 3, width];
        let mut cache = floats_as(b, self.io, &dims, &random.normals(dims.iter().product()))?;
        b.mla_latent_write(MlaLatentWriteArgs {
            x: &x,
            gamma: self.norm.then_some(&gamma),
            eps: EPS,
            positions: at,
            table,
            pairing: Pairing::Interleaved,
            cache: &mut cache,
            sequence: 1,
            start: 2,
        })?;
        Ok(vec![Output::floats(b, "cache", &cache)?])
    }
}

impl AuditCase for LatentCase {
    fn configuration(&self) -> String {
        let Self { tokens, rank, rotary_dim, norm, rows, .. } = self;
        let (io, scaling) = (short(self.io), scaling_name(self.scaling));
        format!("T={tokens} r={rank} R={rotary_dim} io={io} norm={norm} {scaling} {rows:?}")
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let table = table(b, self.rotary_dim, self.scaling)?;
        let at = ids(b, &[self.tokens], &positions(self.tokens))?;
        match self.rows {
            Rows::Whole => self.whole(b, &table, &at),
            Rows::Split => self.split(b, &table, &at),
        }
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let u = bounds::round_off(self.io);
        let elements = |count: usize, relative: f64| {
            let absolute = vec![4.0 * tolerance::ROPE_OF_PAIR; count];
            Tolerance::Elements { ulps: 0.0, relative, absolute }
        };
        let width = self.rank + self.rotary_dim;
        let relative = tolerance::NORM.max(2.0 * u);
        match self.rows {
            Rows::Whole => vec![elements(2 * (self.tokens + 3) * width, relative)],
            Rows::Split => vec![
                if self.norm { elements(self.tokens * self.rank, relative) } else { Tolerance::Exact },
                elements(self.tokens * self.rotary_dim, 2.0 * u + U32),
            ],
        }
    }
}

#[derive(Debug)]
struct TableCase {
    theta: f64,
    rotary_dim: usize,
    positions: usize,
    scaling: RopeScaling,
}

impl AuditCase for TableCase {
    fn configuration(&self) -> String {
        let Self { theta, rotary_dim, positions, .. } = self;
        format!("theta={theta} d={rotary_dim} P={positions} {}", scaling_name(self.scaling))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let config = RopeConfig { theta: self.theta, rotary_dim: self.rotary_dim, scaling: self.scaling };
        let table = RopeTable::new(b, &config, self.positions)?;
        Ok(vec![Output::floats(b, "cos", &table.cos)?, Output::floats(b, "sin", &table.sin)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 2]
    }
}

/// (tokens, heads, head_dim, rotary_dim).
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 1, 64, 64), (5, 3, 64, 16), (17, 2, 64, 64), (3, 4, 128, 128), (2, 1, 80, 80)];

fn apply<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    if settings.word("check").is_some() {
        for (tokens, heads, head_dim, rotary_dim) in SHAPES {
            let (io, scaling) = (DType::F32, DEFAULT);
            let heads = vec![heads];
            sink.check(&RopeCase { tokens, heads, head_dim, rotary_dim, io, scaling, copied: false, back: true });
        }
        return;
    }
    // The one pairing of the table, and its one type.
    settings.implied(&["pairing", "table"]);
    let scaling = if settings.word("scale") == Some("attention_factor") { YARN } else { DEFAULT };
    let pair = settings.words("target").len() == 2;
    let most = settings.count("d_max").unwrap_or(usize::MAX);
    let copied = !settings.flag("inplace");
    for io in settings.types("io") {
        for (tokens, heads, head_dim, rotary_dim) in SHAPES.into_iter().filter(|shape| shape.2 <= most) {
            let heads = if pair { vec![4 * heads, heads] } else { vec![heads] };
            sink.check(&RopeCase { tokens, heads, head_dim, rotary_dim, io, scaling, copied, back: false });
        }
    }
}

fn latent<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    settings.implied(&["pairing", "table"]);
    let scaling = if settings.word("scale") == Some("attention_factor") { YARN } else { DEFAULT };
    let rows = if settings.word("split") == Some("none") { Rows::Whole } else { Rows::Split };
    let most = settings.count("rope_max").unwrap_or(usize::MAX);
    for io in settings.types("io") {
        for (tokens, rank, rotary_dim) in [(1, 512, 64), (5, 32, 8), (3, 1, 2), (2, 17, 128)] {
            for norm in [false, true] {
                if rotary_dim <= most {
                    sink.check(&LatentCase { tokens, rank, rotary_dim, io, norm, scaling, rows });
                }
            }
        }
    }
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "rope_apply" => apply(settings, sink),
        "rope_mla_latent" => latent(settings, sink),
        _ => {
            settings.implied(&["out"]);
            let scaling = if settings.word("kind") == Some("yarn") { YARN } else { DEFAULT };
            for (theta, rotary_dim) in [(1e4, 64), (5e5, 128), (1e6, 32)] {
                sink.check(&TableCase { theta, rotary_dim, positions: 4100, scaling });
            }
        }
    }
    Ok(())
}
