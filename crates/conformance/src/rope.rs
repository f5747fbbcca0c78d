//! Rotary embedding and the rows of a latent cache.

use marlin_formats::DType;
use marlin_ops::rope::{MlaLatentWriteArgs, Pairing, RopeArgs, RopeConfig, RopeScaling, RopeTable};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, ids};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};

/// Positions in every table.
const POSITIONS: usize = 4100;

pub(crate) const DEFAULT: RopeScaling = RopeScaling::Default;
pub(crate) const YARN: RopeScaling = RopeScaling::Yarn {
    factor: 40.0,
    original_max_position: 4096.0,
    beta_fast: 32.0,
    beta_slow: 1.0,
    attention_factor: None,
    mscale: Some(1.0),
    mscale_all_dim: Some(0.707),
    truncate: true,
};
const LLAMA3: RopeScaling =
    RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192.0 };

pub(crate) fn scaling_name(scaling: RopeScaling) -> &'static str {
    match scaling {
        RopeScaling::Default => "default",
        RopeScaling::Linear { .. } => "linear",
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::Llama3 { .. } => "llama3",
    }
}

pub(crate) fn table<B: Backend>(b: &B, d: usize, scaling: RopeScaling) -> Result<RopeTable<B>> {
    let config = RopeConfig { theta: 1e4, rotary_dim: d, scaling };
    RopeTable::new(b, &config, POSITIONS)
}

/// Ragged positions; the last token is at the end of the table.
pub(crate) fn positions(tokens: usize) -> Vec<u32> {
    (0..tokens).map(|t| if t + 1 == tokens { POSITIONS as u32 - 1 } else { (37 * t % 4000) as u32 }).collect()
}

/// The bound of a rotated element: a share of the larger element of its pair, at most the largest of the row.
fn of_row_maximum(x: &[f32], row: usize) -> Vec<f64> {
    x.chunks(row)
        .flat_map(|row| {
            let max = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            vec![tolerance::ROPE_OF_PAIR * f64::from(max); row.len()]
        })
        .collect()
}

struct RopeCase {
    tokens: usize,
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    offset: usize,
    pairing: Pairing,
    scaling: RopeScaling,
    inverse: bool,
    /// Head c is one-hot at channel c.
    one_hot: bool,
    positions: Option<Vec<u32>>,
}

const ROPE: RopeCase = RopeCase {
    tokens: 3,
    heads: 2,
    head_dim: 64,
    rotary_dim: 64,
    offset: 0,
    pairing: Pairing::Half,
    scaling: DEFAULT,
    inverse: false,
    one_hot: false,
    positions: None,
};

impl RopeCase {
    fn x(&self) -> Vec<f32> {
        let count = self.tokens * self.heads * self.head_dim;
        let mut x = Random::of(&self.configuration()).normals(count);
        if self.one_hot {
            for (i, v) in x.iter_mut().enumerate() {
                let (head, channel) = (i / self.head_dim % self.heads, i % self.head_dim);
                *v = f32::from(u8::from(head == channel));
            }
        }
        x
    }
}

impl Case for RopeCase {
    const OPERATION: &'static str = "rope";

    fn configuration(&self) -> String {
        let RopeCase { tokens, heads, head_dim, rotary_dim, offset, pairing, inverse, .. } = self;
        let scaling = scaling_name(self.scaling);
        let shape = format!("[{tokens}, {heads}, {head_dim}] d={rotary_dim} offset={offset}");
        let one_hot = if self.one_hot { " one-hot" } else { "" };
        format!("{shape} {pairing:?} {scaling} inverse={inverse}{one_hot}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let mut x = floats(b, &[self.tokens, self.heads, self.head_dim], &self.x())?;
        let at = self.positions.clone().unwrap_or(positions(self.tokens));
        let at = ids(b, &[at.len()], &at)?;
        b.rope(RopeArgs {
            x: &mut x,
            positions: &at,
            table: &table(b, self.rotary_dim, self.scaling)?,
            pairing: self.pairing,
            offset: self.offset,
            inverse: self.inverse,
        })?;
        Ok(vec![Output::floats(b, "x", &x)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        // Pairs are judged by their own larger element: heads of 2 channels are one pair each.
        let absolute = of_row_maximum(&self.x(), self.head_dim);
        vec![Tolerance::Elements { ulps: 1.0, relative: 0.0, absolute }]
    }
}

struct LatentWriteCase {
    tokens: usize,
    rank: usize,
    rotary_dim: usize,
    norm: bool,
    pairing: Pairing,
    scaling: RopeScaling,
    dtype: DType,
    sequence: usize,
    start: usize,
    eps: f32,
    positions: Option<Vec<u32>>,
}

const LATENT: LatentWriteCase = LatentWriteCase {
    tokens: 3,
    rank: 32,
    rotary_dim: 8,
    norm: true,
    pairing: Pairing::Interleaved,
    scaling: DEFAULT,
    dtype: DType::F32,
    sequence: 1,
    start: 2,
    eps: 1e-6,
    positions: None,
};

/// Sequences and rows of the cache of a [`LatentWriteCase`].
const CACHE: [usize; 2] = [3, 9];

impl Case for LatentWriteCase {
    const OPERATION: &'static str = "mla_latent_write";

    fn configuration(&self) -> String {
        let LatentWriteCase { tokens, rank, rotary_dim, norm, pairing, start, .. } = self;
        let (scaling, dtype) = (scaling_name(self.scaling), self.dtype.name());
        let shape = format!("T={tokens} r={rank} R={rotary_dim} at {start}");
        format!("{shape} norm={norm} {pairing:?} {scaling} cache={dtype}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let width = self.rank + self.rotary_dim;
        let x = floats(b, &[self.tokens, width], &random.normals(self.tokens * width))?;
        let gamma = floats(b, &[self.rank], &random.normals(self.rank))?;
        let cache_dims = [CACHE[0], CACHE[1], width];
        let old = random.normals(cache_dims.iter().product());
        let mut cache = floats_as(b, self.dtype, &cache_dims, &old)?;
        let at = self.positions.clone().unwrap_or(positions(self.tokens));
        let at = ids(b, &[at.len()], &at)?;
        b.mla_latent_write(MlaLatentWriteArgs {
            x: &x,
            gamma: self.norm.then_some(&gamma),
            eps: self.eps,
            positions: &at,
            table: &table(b, self.rotary_dim, self.scaling)?,
            pairing: self.pairing,
            cache: &mut cache,
            sequence: self.sequence,
            start: self.start,
        })?;
        Ok(vec![Output::floats(b, "cache", &cache)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        // The rounding of the cache may differ by one step where the f32 value is next to a tie.
        let step = match self.dtype {
            DType::F16 => 2f64.powi(-10),
            DType::BF16 => 2f64.powi(-7),
            _ => 2.0 * U32,
        };
        let width = self.rank + self.rotary_dim;
        let absolute = vec![4.0 * tolerance::ROPE_OF_PAIR; CACHE[0] * CACHE[1] * width];
        vec![Tolerance::Elements { ulps: 0.0, relative: tolerance::NORM.max(step), absolute }]
    }
}

/// The table as a backend stores it.
struct TableCase {
    rotary_dim: usize,
    scaling: RopeScaling,
}

impl Case for TableCase {
    const OPERATION: &'static str = "rope_table";

    fn configuration(&self) -> String {
        format!("d={} {}", self.rotary_dim, scaling_name(self.scaling))
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let table = table(b, self.rotary_dim, self.scaling)?;
        Ok(vec![Output::floats(b, "cos", &table.cos)?, Output::floats(b, "sin", &table.sin)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 2]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let pairings = [Pairing::Interleaved, Pairing::Half, Pairing::InterleavedToHalf];
    let scalings = [DEFAULT, RopeScaling::Linear { factor: 4.0 }, YARN, LLAMA3];
    for scaling in scalings {
        for rotary_dim in [16, 64] {
            runner.check(&TableCase { rotary_dim, scaling });
        }
        for pairing in pairings {
            runner.check(&RopeCase { pairing, scaling, ..ROPE });
        }
    }
    for pairing in pairings {
        // (head_dim, rotary_dim, offset): whole, partial at the start, the tail of an MLA query, odd sizes.
        for (head_dim, rotary_dim, offset) in
            [(2, 2, 0), (64, 16, 0), (24, 8, 16), (256, 64, 192), (18, 18, 0), (80, 80, 0), (13, 6, 5)]
        {
            for (tokens, heads) in [(1, 1), (5, 3)] {
                for inverse in [false, true] {
                    let case = RopeCase { tokens, heads, head_dim, rotary_dim, offset, pairing, inverse, ..ROPE };
                    runner.check(&case);
                }
            }
        }
        let one_hot = RopeCase { heads: 8, head_dim: 8, rotary_dim: 8, pairing, one_hot: true, ..ROPE };
        runner.check(&one_hot);
        runner.check(&RopeCase { tokens: 130, pairing, ..ROPE });
    }
    runner.check(&RopeCase { tokens: 0, ..ROPE });

    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (tokens, rank, rotary_dim) in [(1, 512, 64), (3, 32, 8), (7, 1, 2), (2, 17, 6)] {
            for (norm, pairing) in [(true, Pairing::Interleaved), (false, Pairing::Half)] {
                let case = LatentWriteCase { tokens, rank, rotary_dim, norm, pairing, dtype, ..LATENT };
                runner.check(&case);
            }
        }
    }
    runner.check(&LatentWriteCase { scaling: YARN, sequence: 2, start: 6, ..LATENT });
    runner.check(&LatentWriteCase { pairing: Pairing::InterleavedToHalf, ..LATENT });
    runner.check(&LatentWriteCase { tokens: 0, ..LATENT });
    bad_arguments(runner);
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let beyond = || Some(vec![0, POSITIONS as u32, 0]);
    let case = RopeCase { positions: beyond(), ..ROPE };
    runner.refuse("position outside the table", &case, Refusal::Value("positions"));
    let case = RopeCase { positions: Some(vec![u32::MAX; 3]), ..ROPE };
    runner.refuse("position 2^32 - 1", &case, Refusal::Value("positions"));
    let case = RopeCase { positions: Some(vec![0; 2]), ..ROPE };
    runner.refuse("too few positions", &case, Refusal::Shape("positions"));
    let case = RopeCase { offset: 1, ..ROPE };
    runner.refuse("d + offset > head_dim", &case, Refusal::Shape("x"));
    let case = RopeCase { rotary_dim: 63, ..ROPE };
    runner.refuse("odd d", &case, Refusal::Value("rotary_dim"));
    let case = LatentWriteCase { positions: beyond(), ..LATENT };
    runner.refuse("position outside the table", &case, Refusal::Value("positions"));
    let case = LatentWriteCase { start: 7, ..LATENT };
    runner.refuse("rows beyond the capacity", &case, Refusal::Shape("cache"));
    let case = LatentWriteCase { sequence: 3, ..LATENT };
    runner.refuse("no such sequence", &case, Refusal::Shape("cache"));
    let case = LatentWriteCase { eps: 0.0, ..LATENT };
    runner.refuse("eps 0", &case, Refusal::Value("eps"));
}
