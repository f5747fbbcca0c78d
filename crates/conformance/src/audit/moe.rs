//! Mixture of experts with 16-bit values.

use marlin_formats::DType;
use marlin_ops::linear::{Activation, GatedUpArgs, LinearArgs, Residual};
use marlin_ops::moe::{CombineArgs, ExpertMlpArgs, GroupArgs, GroupScore, RouteArgs, Routing, Scoring};
use marlin_ops::oracle::choose_experts;
use marlin_ops::{Backend, ExpertStack, ExpertWeights, HostTensor, Linear, Result, Tensor, Weight};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::{Settings, TileShape};
use super::linear::storage_named;
use super::variants::{ExpertKernel, Variants};
use crate::input::{Output, floats, floats_as, ids, poison, poison_as, poison_ids};
use crate::random::Random;
use crate::tolerance::{self, Tolerance};
use crate::weight::{Scales, Storage, random_weight};

/// A router: rows times `[E, H]`, then the choice.
#[derive(Clone, Copy, Debug)]
struct Router {
    tokens: usize,
    hidden: usize,
    experts: usize,
    routing: Routing,
    io: DType,
}

/// A rule without groups.
fn rule(scoring: Scoring, top_k: usize, norm_topk_prob: bool) -> Routing {
    Routing {
        top_k,
        scoring,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::Max,
        norm_topk_prob,
        norm_eps: 0.0,
        routed_scaling_factor: 1.0,
    }
}

/// What a router wrote.
struct Routed<B: Backend> {
    logits: Tensor<B>,
    chosen: Tensor<B>,
    weights: Tensor<B>,
}

impl Router {
    fn name(&self) -> String {
        let Self { tokens, hidden, experts, routing, io } = self;
        let Routing { top_k, scoring, norm_topk_prob, .. } = routing;
        let io = short(*io);
        format!("T={tokens} H={hidden} E={experts} k={top_k} {scoring:?} norm={norm_topk_prob} io={io}")
    }

    /// Rows in steps of 1/16, exact in every type, whose choice is not within the rounding of f32; and the matrix.
    fn inputs(&self, random: &mut Random) -> (Vec<f32>, Vec<f32>) {
        let matrix: Vec<f32> = random.normals(self.experts * self.hidden).into_iter().map(|v| v / 8.0).collect();
        let mut x = Vec::new();
        for _ in 0..self.tokens {
            let clear = (0..1000).map(|_| self.row(random)).find(|row| self.is_clear(row, &matrix));
            x.extend(clear.unwrap_or_else(|| panic!("no clear decisions in {}", self.name())));
        }
        (x, matrix)
    }

    fn row(&self, random: &mut Random) -> Vec<f32> {
        random.normals(self.hidden).into_iter().map(|v| (v * 16.0).round() / 16.0).collect()
    }

    fn is_clear(&self, row: &[f32], matrix: &[f32]) -> bool {
        let product = |w: &[f32]| w.iter().zip(row).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        let logits: Vec<f64> = matrix.chunks(self.hidden).map(product).collect();
        choose_experts(&logits, None, &self.routing).margin > tolerance::ROUTE_MARGIN
    }

    fn run<B: Backend>(&self, b: &B, x: &Tensor<B>, matrix: &[f32]) -> Result<Routed<B>> {
        let matrix = Weight::dense(HostTensor::from_f32(&[self.experts, self.hidden], matrix)?)?;
        let matrix = Linear::new(b, matrix)?;
        let mut logits = poison(b, &[self.tokens, self.experts])?;
        b.linear(plain(x, &matrix, Residual::None, &mut logits))?;
        let dims = [self.tokens, self.routing.top_k];
        let (mut chosen, mut weights) = (poison_ids(b, &dims)?, poison(b, &dims)?);
        let routing = self.routing;
        b.moe_route(RouteArgs { logits: &logits, bias: None, routing, ids: &mut chosen, weights: &mut weights })?;
        Ok(Routed { logits, chosen, weights })
    }
}

/// A linear layer without an activation.
fn plain<'a, B: Backend>(
    x: &'a Tensor<B>,
    weight: &'a Linear<B>,
    residual: Residual<'a, B>,
    out: &'a mut Tensor<B>,
) -> LinearArgs<'a, B> {
    LinearArgs { x, weight, activation: Activation::None, out_scale: 1.0, residual, out }
}

#[derive(Debug)]
struct RouteCase {
    router: Router,
    dump: bool,
}

impl AuditCase for RouteCase {
    fn configuration(&self) -> String {
        format!("{} dump={}", self.router.name(), self.dump)
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let (x, matrix) = self.router.inputs(&mut Random::of(&self.configuration()));
        let x = floats_as(b, self.router.io, &[self.router.tokens, self.router.hidden], &x)?;
        let routed = self.router.run(b, &x, &matrix)?;
        let mut outputs =
            vec![Output::words(b, "ids", &routed.chosen)?, Output::floats(b, "weights", &routed.weights)?];
        if self.dump {
            outputs.push(Output::floats(b, "logits", &routed.logits)?);
        }
        Ok(outputs)
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        // The logits of f32 sums are off by about 1e-6, which a softmax passes on.
        let relative = tolerance::ROUTE_WEIGHT + 4.0 * tolerance::LINEAR;
        let mut tolerances = vec![Tolerance::Exact, Tolerance::Elements { ulps: 0.0, relative, absolute: vec![] }];
        if self.dump {
            let block = self.router.tokens * self.router.experts;
            tolerances.push(Tolerance::Blocks { block, bound: tolerance::LINEAR });
        }
        tolerances
    }
}

#[derive(Debug)]
struct GroupCase {
    tokens: usize,
    top_k: usize,
    experts: usize,
}

impl AuditCase for GroupCase {
    fn configuration(&self) -> String {
        format!("T={} k={} E={}", self.tokens, self.top_k, self.experts)
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let chosen: Vec<u32> = (0..self.tokens).flat_map(|_| random.distinct(self.top_k, self.experts)).collect();
        let chosen = ids(b, &[self.tokens, self.top_k], &chosen)?;
        let assignments = self.tokens * self.top_k;
        let mut offsets = poison_ids(b, &[self.experts + 1])?;
        let (mut permutation, mut inverse) = (poison_ids(b, &[assignments])?, poison_ids(b, &[assignments])?);
        b.moe_group(GroupArgs {
            ids: &chosen,
            experts: self.experts,
            offsets: &mut offsets,
            permutation: &mut permutation,
            inverse: &mut inverse,
        })?;
        Ok(vec![
            Output::words(b, "offsets", &offsets)?,
            Output::words(b, "permutation", &permutation)?,
            Output::words(b, "inverse", &inverse)?,
        ])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 3]
    }
}

#[derive(Debug)]
struct CombineCase {
    tokens: usize,
    top_k: usize,
    columns: usize,
    io: DType,
}

impl AuditCase for CombineCase {
    fn configuration(&self) -> String {
        format!("T={} k={} N={} io={} shared", self.tokens, self.top_k, self.columns, short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let assignments = self.tokens * self.top_k;
        let inverse = ids(b, &[assignments], &random.distinct(assignments, assignments))?;
        let rows = floats_as(b, self.io, &[assignments, self.columns], &random.normals(assignments * self.columns))?;
        // Small weights count like others.
        let weights: Vec<f32> = (0..assignments).map(|i| random.unit() * if i % 5 == 1 { 1e-7 } else { 1.0 }).collect();
        let weights = floats(b, &[self.tokens, self.top_k], &weights)?;
        let dims = [self.tokens, self.columns];
        let shared = floats_as(b, self.io, &dims, &random.normals(dims[0] * dims[1]))?;
        let mut out = poison_as(b, self.io, &dims)?;
        let residual = Residual::Add(&shared);
        b.moe_combine(CombineArgs { rows: &rows, inverse: &inverse, weights: &weights, residual, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let bound = tolerance::COMBINE + 1.5 * bounds::round_off(self.io);
        vec![Tolerance::Blocks { block: self.columns, bound }]
    }
}

/// Routed experts plus a shared one, from a router or from given ids: `shared MLP + sum w MLP_e`.
#[derive(Debug)]
struct LayerCase {
    kernel: Option<ExpertKernel>,
    router: Router,
    /// Ids and weights are computed.
    routes: bool,
    intermediate: usize,
    shared: bool,
    storage: Storage,
}

impl LayerCase {
    fn shared<B: Backend>(&self, b: &B, x: &Tensor<B>, random: &mut Random) -> Result<Tensor<B>> {
        let Router { tokens, hidden, .. } = self.router;
        let mut weight = |n: usize, k: usize| Linear::new(b, random_weight(self.storage, n, k, Scales::Usual, random)?);
        let (gate, up) = (weight(self.intermediate, hidden)?, weight(self.intermediate, hidden)?);
        let down = weight(hidden, self.intermediate)?;
        let mut between = poison(b, &[tokens, self.intermediate])?;
        let activation = Activation::Silu;
        b.gated_up(GatedUpArgs { x, norm: None, gate: &gate, up: &up, activation, out: &mut between })?;
        let mut out = poison(b, &[tokens, hidden])?;
        b.linear(plain(&between, &down, Residual::None, &mut out))?;
        Ok(out)
    }

    fn stack<B: Backend>(&self, b: &B, random: &mut Random) -> Result<ExpertStack<B>> {
        let (hidden, intermediate) = (self.router.hidden, self.intermediate);
        let mut weight = |n: usize, k: usize| random_weight(self.storage, n, k, Scales::Usual, random);
        let mut experts = Vec::new();
        for _ in 0..self.router.experts {
            let (gate, up) = (weight(intermediate, hidden)?, weight(intermediate, hidden)?);
            experts.push(ExpertWeights { gate, up, down: weight(hidden, intermediate)? });
        }
        ExpertStack::new(b, experts)
    }
}

impl AuditCase for LayerCase {
    fn configuration(&self) -> String {
        let Self { router, routes, intermediate, shared, storage, .. } = self;
        let kernel = self.kernel.map_or("any kernel".to_owned(), |kernel| format!("{kernel:?}"));
        format!("{} {storage} I={intermediate} routes={routes} shared={shared} {kernel}", router.name())
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let Router { tokens, hidden, experts, io, routing } = self.router;
        let (rows, matrix) = self.router.inputs(random);
        let x = floats_as(b, io, &[tokens, hidden], &rows)?;
        let (chosen, weights) = if self.routes {
            let routed = self.router.run(b, &x, &matrix)?;
            (routed.chosen, routed.weights)
        } else {
            let dims = [tokens, routing.top_k];
            let chosen: Vec<u32> = (0..tokens).flat_map(|_| random.distinct(routing.top_k, experts)).collect();
            let weights: Vec<f32> = (0..dims[0] * dims[1]).map(|_| random.unit()).collect();
            (ids(b, &dims, &chosen)?, floats(b, &dims, &weights)?)
        };
        let stack = self.stack(b, random)?;
        let shared = if self.shared { Some(self.shared(b, &x, random)?) } else { None };
        let mut out = poison_as(b, io, &[tokens, hidden])?;
        let args = ExpertMlpArgs {
            x: &x,
            ids: &chosen,
            weights: &weights,
            experts: &stack,
            activation: Activation::Silu,
            residual: shared.as_ref().map_or(Residual::None, Residual::Add),
            out: &mut out,
        };
        match self.kernel {
            Some(kernel) => variants.expert_mlp(b, kernel, args)?,
            None => b.moe_expert_mlp(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Blocks { block: self.router.hidden, bound: bounds::gated_mlp(self.router.io) }]
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

fn route<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    // Weights are f32 always, batches of different lengths are one batch of tokens, ties go to the lower expert.
    settings.implied(&["out", "ragged", "tie", "check", "io"]);
    let scores = settings.words("score");
    let scores = if scores.is_empty() { vec!["softmax"] } else { scores };
    let renormalised = settings.flags("renorm");
    let renormalised = if renormalised.is_empty() { vec![true] } else { renormalised };
    let most = settings.count("k_max").unwrap_or(16);
    let widest = settings.count("e_max").unwrap_or(256);
    let tokens = settings.count("tokens");
    let dump = settings.has("dump");
    for score in scores {
        let scoring = if score == "sigmoid" { Scoring::Sigmoid } else { Scoring::Softmax };
        for &norm in &renormalised {
            for (experts, top_k, hidden) in [(8, 2, 64), (64, 4, 200), (128, 8, 96), (256, 16, 64)] {
                if experts <= widest && top_k <= most {
                    let routing = rule(scoring, top_k, norm);
                    for tokens in tokens.map_or(vec![1, 33], |tokens| vec![tokens]) {
                        let router = Router { tokens, hidden, experts, routing, io: DType::F16 };
                        sink.check(&RouteCase { router, dump });
                    }
                }
            }
        }
    }
}

fn group<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    // One launch has all the phases; the order within an expert is that of the assignments.
    settings.implied(&["phase", "counts", "slot", "result"]);
    for (tokens, top_k, experts) in [(1, 1, 8), (31, 4, 64), (130, 8, 256), (4096, 2, 64), (9000, 8, 64)] {
        sink.check(&GroupCase { tokens, top_k, experts });
    }
}

fn layer<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) {
    // Every sum is f32; experts are combined in the order of slots.
    settings.implied(&["acc", "scale", "combine"]);
    let format = settings.word("format").expect("a format");
    let experts = settings.count("e").unwrap_or(16);
    let top_k = settings.count("k").unwrap_or(settings.count("k_max").unwrap_or(4));
    let shared = operation == "moe_shared_expert" || settings.has("shared_experts");
    let routes = settings.word("route") == Some("computed");
    let scoring = match settings.word("score") {
        Some("softmax_selected") => Scoring::SoftmaxSelected,
        _ => Scoring::Softmax,
    };
    let routing = rule(scoring, top_k, true);
    let kernel = match settings.tile("tile") {
        Some(TileShape { m, n, k: Some(k) }) => Some(ExpertKernel::Grouped { m, n, k }),
        _ if settings.has("tokens") => Some(ExpertKernel::Parallel),
        _ => None,
    };
    let tokens = settings.count("tokens").map_or(vec![1, 5, 33], |tokens| vec![tokens]);
    for io in settings.types("io") {
        for &tokens in &tokens {
            for (hidden, intermediate, group_size) in [(64, 96, 32), (200, 33, 64)] {
                let router = Router { tokens, hidden, experts, routing, io };
                let storage = storage_named(format, group_size);
                sink.check(&LayerCase { kernel, router, routes, intermediate, shared, storage });
            }
        }
    }
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "moe_route" => route(settings, sink),
        "moe_group" => group(settings, sink),
        "moe_combine" => {
            settings.implied(&["order", "shared", "acc"]);
            for io in settings.types("io") {
                for (tokens, top_k, columns) in [(1, 1, 64), (3, 2, 2047), (33, 8, 96), (2, 10, 2048)] {
                    sink.check(&CombineCase { tokens, top_k, columns, io });
                }
            }
        }
        _ => layer(operation, settings, sink),
    }
    Ok(())
}
