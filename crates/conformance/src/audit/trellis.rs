//! Experts with grid codes, the rates of gate, up and down each their own: f16 rows, f32 results.

use marlin_formats::DType;
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::{Backend, ExpertStack, ExpertWeights, Result};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::{ExpertKernel, Variants};
use crate::input::{Output, floats, floats_as, ids, poison_as};
use crate::random::Random;
use crate::tolerance::Tolerance;
use crate::weight::{Scales, Storage, random_weight};

const EXPERTS: usize = 8;

/// Bits of gate, up and down, hidden and intermediate size, group size.
const SHAPES: [([u32; 3], usize, usize, usize); 5] = [
    ([2, 2, 2], 64, 96, 32),
    ([3, 3, 3], 200, 33, 128),
    ([4, 3, 2], 96, 130, 32),
    ([6, 2, 3], 64, 64, 128),
    ([8, 8, 8], 72, 40, 32),
];

#[derive(Debug)]
struct TrellisCase {
    kernel: Option<ExpertKernel>,
    tokens: usize,
    bits: [u32; 3],
    hidden: usize,
    intermediate: usize,
    group_size: usize,
    top_k: usize,
    activation: Activation,
    io: DType,
    out: DType,
}

impl TrellisCase {
    fn stack<B: Backend>(&self, b: &B, random: &mut Random) -> Result<ExpertStack<B>> {
        let mut weight = |bits: u32, n: usize, k: usize| {
            random_weight(Storage::Grid(bits, self.group_size), n, k, Scales::Usual, random)
        };
        let mut experts = Vec::new();
        for _ in 0..EXPERTS {
            experts.push(ExpertWeights {
                gate: weight(self.bits[0], self.intermediate, self.hidden)?,
                up: weight(self.bits[1], self.intermediate, self.hidden)?,
                down: weight(self.bits[2], self.hidden, self.intermediate)?,
            });
        }
        ExpertStack::new(b, experts)
    }
}

impl AuditCase for TrellisCase {
    fn configuration(&self) -> String {
        let Self { tokens, bits: [gate, up, down], hidden, intermediate, group_size, top_k, .. } = self;
        let kernel = self.kernel.map_or("any kernel".to_owned(), |kernel| format!("{kernel:?}"));
        format!(
            "T={tokens} H={hidden} I={intermediate} E={EXPERTS} k={top_k} grid:{gate}+{up}+{down}:g{group_size} {:?} \
             io={} out={} {kernel}",
            self.activation,
            short(self.io),
            short(self.out)
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let stack = self.stack(b, random)?;
        let dims = [self.tokens, self.hidden];
        let x = floats_as(b, self.io, &dims, &random.normals(dims[0] * dims[1]))?;
        let chosen: Vec<u32> = (0..self.tokens).flat_map(|_| random.distinct(self.top_k, EXPERTS)).collect();
        let weights: Vec<f32> = chosen.iter().map(|_| 0.1 + random.unit()).collect();
        let mut out = poison_as(b, self.out, &dims)?;
        let args = ExpertMlpArgs {
            x: &x,
            ids: &ids(b, &[self.tokens, self.top_k], &chosen)?,
            weights: &floats(b, &[self.tokens, self.top_k], &weights)?,
            experts: &stack,
            activation: self.activation,
            residual: Residual::None,
            out: &mut out,
        };
        match self.kernel {
            Some(kernel) => variants.expert_mlp(b, kernel, args)?,
            None => b.moe_expert_mlp(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Blocks { block: self.hidden, bound: bounds::gated_mlp(self.io) }]
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

pub(crate) fn bind<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    // Experts are combined in the order of slots; the format is that of every case; sums are f32 always, as the operation
    // defines them.
    settings.implied(&["accumulate", "format", "act", "acc"]);
    let out = settings.element("out").unwrap_or(DType::F32);
    let tile = |m| {
        let (n, k) = (settings.count("tile_n").unwrap_or(64), settings.count("tile_k").unwrap_or(32));
        Some(ExpertKernel::Grouped { m, n, k })
    };
    let least = settings.count("t_min").unwrap_or(1);
    // Rows of a tile, and tokens: around its edges.
    let (rows, tokens) = match (settings.count("tokens"), settings.count("tokens_per_group")) {
        (Some(tokens), _) => (8, vec![tokens]),
        (_, Some(group)) => (group, vec![3, 4, 5, 33]),
        _ if least > 1 => (32, vec![least, 130]),
        _ => (16, vec![1, 5, 33]),
    };
    let sorted = settings.word("order") == Some("sorted");
    for io in settings.types("io") {
        for &tokens in &tokens {
            for (bits, hidden, intermediate, group_size) in SHAPES {
                let case = |kernel| TrellisCase {
                    kernel,
                    tokens,
                    bits,
                    hidden,
                    intermediate,
                    group_size,
                    top_k: if sorted { 4 } else { 2 },
                    activation: Activation::Silu,
                    io,
                    out,
                };
                sink.check(&case(tile(rows)));
                // What the device chooses without being asked.
                sink.check(&case(None));
            }
        }
    }
    Ok(())
}
