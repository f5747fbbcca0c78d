//! Mixture of experts.

use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_ops::linear::Activation;
use marlin_ops::moe::{CombineArgs, ExpertMlpArgs, GroupArgs, GroupScore, RouteArgs, Routing, Scoring};
use marlin_ops::oracle::choose_experts;
use marlin_ops::{Backend, ExpertStack, ExpertWeights, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Add, Output, floats, ids, poison, poison_ids};
use crate::linear::ACTIVATIONS;
use crate::random::Random;
use crate::tolerance::{self, Tolerance};
use crate::weight::{DENSE, Scales, Storage, random_weight};

/// Router logits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Logits {
    /// Normal times this, every decision clear.
    Normal(f32),
    /// 0, 1 or 2: many exact ties.
    Ties,
    AllEqual,
    /// +-1e4: sigmoids of exactly 0 and 1.
    Huge,
    /// All -1e4.
    AllLow,
    /// As normal, one NaN.
    OneNan,
    /// All -inf.
    AllHidden,
}

/// The selection bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bias {
    None,
    /// Within +-0.2.
    Small,
    /// 7 +- 0.25, as GLM checkpoints have.
    Large,
    /// 0 or 1/4.
    Ties,
}

#[derive(Clone, Copy)]
struct RouteCase {
    tokens: usize,
    experts: usize,
    routing: Routing,
    logits: Logits,
    bias: Bias,
}

const SOFTMAX: Routing = Routing {
    top_k: 4,
    scoring: Scoring::Softmax,
    n_group: 1,
    topk_group: 1,
    group_score: GroupScore::Max,
    norm_topk_prob: true,
    norm_eps: 0.0,
    routed_scaling_factor: 1.0,
};
const SIGMOID: Routing = Routing {
    scoring: Scoring::Sigmoid,
    group_score: GroupScore::TopTwoSum,
    norm_eps: 1e-20,
    routed_scaling_factor: 1.8,
    ..SOFTMAX
};
const SELECTED: Routing = Routing { scoring: Scoring::SoftmaxSelected, ..SOFTMAX };

const ROUTE: RouteCase =
    RouteCase { tokens: 7, experts: 64, routing: SOFTMAX, logits: Logits::Normal(1.0), bias: Bias::None };

impl RouteCase {
    fn bias(&self, random: &mut Random) -> Option<Vec<f32>> {
        let mut value = || match self.bias {
            Bias::None => 0.0,
            Bias::Small => 0.4 * random.unit() - 0.2,
            Bias::Large => 6.75 + 0.5 * random.unit(),
            Bias::Ties => random.below(2) as f32 / 4.0,
        };
        let bias = (0..self.experts).map(|_| value()).collect();
        (self.bias != Bias::None).then_some(bias)
    }

    /// One token's logits. Normal ones are drawn again while a decision is within the margin of f32 rounding.
    fn token(&self, bias: Option<&[f64]>, random: &mut Random) -> Vec<f32> {
        let Logits::Normal(factor) = self.logits else {
            return (0..self.experts).map(|_| self.special(random)).collect();
        };
        for _ in 0..1000 {
            let logits = random.normals(self.experts);
            let logits: Vec<f32> = logits.into_iter().map(|v| factor * v).collect();
            let exact: Vec<f64> = logits.iter().copied().map(f64::from).collect();
            if choose_experts(&exact, bias, &self.routing).margin > tolerance::ROUTE_MARGIN {
                return logits;
            }
        }
        panic!("no clear decisions in {}", self.configuration())
    }

    fn special(&self, random: &mut Random) -> f32 {
        match self.logits {
            Logits::Ties => random.below(3) as f32,
            Logits::AllEqual => 0.5,
            Logits::Huge => 1e4f32.copysign(random.normal()),
            Logits::AllLow => -1e4,
            Logits::AllHidden => f32::NEG_INFINITY,
            Logits::Normal(_) | Logits::OneNan => random.normal(),
        }
    }
}

impl Case for RouteCase {
    const OPERATION: &'static str = "moe_route";

    fn configuration(&self) -> String {
        let RouteCase { tokens, experts, routing, logits, bias } = self;
        let Routing { top_k, scoring, n_group, topk_group, group_score, .. } = routing;
        let rule = format!("{scoring:?} groups={topk_group}/{n_group} {group_score:?}");
        let (norm, eps) = (routing.norm_topk_prob, routing.norm_eps);
        let scale = routing.routed_scaling_factor;
        format!("T={tokens} E={experts} k={top_k} {rule} norm={norm} eps={eps} scale={scale} {logits:?} bias={bias:?}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let bias = self.bias(random);
        let exact: Option<Vec<f64>> = bias.as_ref().map(|bias| bias.iter().copied().map(f64::from).collect());
        let mut logits: Vec<f32> = (0..self.tokens).flat_map(|_| self.token(exact.as_deref(), random)).collect();
        if self.logits == Logits::OneNan {
            logits[self.experts + 3] = f32::NAN;
        }
        let logits = floats(b, &[self.tokens, self.experts], &logits)?;
        let bias = bias.map(|bias| floats(b, &[self.experts], &bias)).transpose()?;
        let dims = [self.tokens, self.routing.top_k];
        let (mut chosen, mut weights) = (poison_ids(b, &dims)?, poison(b, &dims)?);
        b.moe_route(RouteArgs {
            logits: &logits,
            bias: bias.as_ref(),
            routing: self.routing,
            ids: &mut chosen,
            weights: &mut weights,
        })?;
        Ok(vec![Output::words(b, "ids", &chosen)?, Output::floats(b, "weights", &weights)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let relative = tolerance::ROUTE_WEIGHT;
        vec![Tolerance::Exact, Tolerance::Elements { ulps: 0.0, relative, absolute: vec![] }]
    }
}

/// Which experts tokens go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Any.
    All,
    /// Only experts of the middle half.
    Middle,
    /// Bad: the second token names its first expert twice.
    Duplicate,
    /// Bad: the last token names expert E.
    Beyond,
}

impl Spread {
    pub(crate) fn ids(self, tokens: usize, top_k: usize, experts: usize, random: &mut Random) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..tokens)
            .flat_map(|_| match self {
                Spread::Middle => {
                    random.distinct(top_k, experts / 2).into_iter().map(|e| e + experts as u32 / 4).collect()
                }
                _ => random.distinct(top_k, experts),
            })
            .collect();
        match self {
            Spread::Duplicate => ids[top_k + 1] = ids[top_k],
            Spread::Beyond => ids[tokens * top_k - 1] = experts as u32,
            Spread::All | Spread::Middle => {}
        }
        ids
    }
}

struct GroupCase {
    tokens: usize,
    top_k: usize,
    experts: usize,
    spread: Spread,
}

impl Case for GroupCase {
    const OPERATION: &'static str = "moe_group";

    fn configuration(&self) -> String {
        let GroupCase { tokens, top_k, experts, spread } = self;
        format!("T={tokens} k={top_k} E={experts} {spread:?}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let chosen = self.spread.ids(self.tokens, self.top_k, self.experts, random);
        let chosen = ids(b, &[self.tokens, self.top_k], &chosen)?;
        let assignments = self.tokens * self.top_k;
        let mut offsets = poison_ids(b, &[self.experts + 1])?;
        let mut permutation = poison_ids(b, &[assignments])?;
        let mut inverse = poison_ids(b, &[assignments])?;
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

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 3]
    }
}

#[derive(Clone)]
struct ExpertMlpCase {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    /// Storage of gate, up and down; expert e starts at entry e of the list.
    storages: Vec<Storage>,
    bias: bool,
    activation: Activation,
    residual: Add,
    spread: Spread,
    weight_columns: Option<usize>,
}

fn experts(tokens: usize, storages: &[Storage]) -> ExpertMlpCase {
    ExpertMlpCase {
        tokens,
        hidden: 64,
        intermediate: 96,
        experts: 6,
        top_k: 2,
        storages: storages.to_vec(),
        bias: false,
        activation: Activation::Silu,
        residual: Add::Nothing,
        spread: Spread::All,
        weight_columns: None,
    }
}

impl ExpertMlpCase {
    fn expert(&self, e: usize, random: &mut Random) -> Result<ExpertWeights> {
        let mut weight = |index: usize, n: usize, k: usize| {
            let storage = self.storages[(e + index) % self.storages.len()];
            let weight = random_weight(storage, n, k, Scales::Usual, random)?;
            match self.bias {
                true => weight.with_bias(random.normals(n)),
                false => Ok(weight),
            }
        };
        Ok(ExpertWeights {
            gate: weight(0, self.intermediate, self.hidden)?,
            up: weight(1, self.intermediate, self.hidden)?,
            down: weight(2, self.hidden, self.intermediate)?,
        })
    }
}

impl Case for ExpertMlpCase {
    const OPERATION: &'static str = "moe_expert_mlp";

    fn configuration(&self) -> String {
        let ExpertMlpCase { tokens, hidden, intermediate, experts, top_k, .. } = self;
        let storages: Vec<String> = self.storages.iter().map(Storage::to_string).collect();
        let (storages, act) = (storages.join("+"), self.activation);
        let (bias, residual, spread) = (self.bias, self.residual, self.spread);
        format!(
            "T={tokens} H={hidden} I={intermediate} E={experts} k={top_k} {storages} {act:?} bias={bias} \
             residual={residual:?} {spread:?}"
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let experts: Vec<ExpertWeights> = (0..self.experts).map(|e| self.expert(e, random)).collect::<Result<_>>()?;
        let stack = ExpertStack::new(b, experts)?;
        let dims = [self.tokens, self.hidden];
        let count = self.tokens * self.hidden;
        let x = floats(b, &dims, &random.normals(count))?;
        let chosen = self.spread.ids(self.tokens, self.top_k, self.experts, random);
        let chosen = ids(b, &[self.tokens, self.top_k], &chosen)?;
        let columns = self.weight_columns.unwrap_or(self.top_k);
        let weights: Vec<f32> = (0..self.tokens * columns).map(|_| 0.1 + random.unit()).collect();
        let weights = floats(b, &[self.tokens, columns], &weights)?;
        let residual = floats(b, &dims, &random.normals(count))?;
        let mut out = self.residual.output(b, DType::F32, &dims, || random.normals(count))?;
        b.moe_expert_mlp(ExpertMlpArgs {
            x: &x,
            ids: &chosen,
            weights: &weights,
            experts: &stack,
            activation: self.activation,
            residual: self.residual.of(&residual),
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        let bound = match mode {
            Mode::Exact => tolerance::LINEAR,
            _ if self.storages.iter().any(Storage::rotates) => tolerance::EXL3_ROWS,
            Mode::F16Activations => tolerance::LINEAR,
            // The hidden vector is rounded to int8 in between.
            Mode::Int8Activations => tolerance::GATED_MLP_ROUNDED,
        };
        vec![Tolerance::Blocks { block: self.hidden, bound }]
    }
}

#[derive(Clone, Copy)]
struct CombineCase {
    tokens: usize,
    top_k: usize,
    columns: usize,
    residual: Add,
    /// A row of NaN whose weight is 0.
    nan_row: bool,
    /// The last inverse index is T k.
    beyond: bool,
}

const COMBINE: CombineCase =
    CombineCase { tokens: 3, top_k: 2, columns: 65, residual: Add::Nothing, nan_row: false, beyond: false };

impl Case for CombineCase {
    const OPERATION: &'static str = "moe_combine";

    fn configuration(&self) -> String {
        let CombineCase { tokens, top_k, columns, residual, nan_row, .. } = self;
        format!("T={tokens} k={top_k} N={columns} residual={residual:?} nan_row={nan_row}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let assignments = self.tokens * self.top_k;
        let mut inverse = random.distinct(assignments, assignments);
        let mut rows = random.normals(assignments * self.columns);
        let mut weights: Vec<f32> = (0..assignments).map(|_| random.unit()).collect();
        if self.nan_row {
            weights[1] = 0.0;
            rows[inverse[1] as usize * self.columns..][..self.columns].fill(f32::NAN);
        }
        if self.beyond {
            inverse[assignments - 1] = assignments as u32;
        }
        let dims = [self.tokens, self.columns];
        let count = self.tokens * self.columns;
        let rows = floats(b, &[assignments, self.columns], &rows)?;
        let inverse = ids(b, &[assignments], &inverse)?;
        let weights = floats(b, &[self.tokens, self.top_k], &weights)?;
        let residual = floats(b, &dims, &random.normals(count))?;
        let mut out = self.residual.output(b, DType::F32, &dims, || random.normals(count))?;
        b.moe_combine(CombineArgs {
            rows: &rows,
            inverse: &inverse,
            weights: &weights,
            residual: self.residual.of(&residual),
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let block = if self.columns >= 16 { self.columns } else { self.tokens * self.columns };
        vec![Tolerance::Blocks { block, bound: tolerance::COMBINE }]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    route(runner);
    for (tokens, top_k, experts) in
        [(0, 2, 8), (1, 1, 8), (1, 8, 8), (31, 4, 64), (130, 8, 256), (4096, 2, 64), (9000, 8, 64)]
    {
        for spread in [Spread::All, Spread::Middle] {
            if spread == Spread::All || top_k <= experts / 2 {
                runner.check(&GroupCase { tokens, top_k, experts, spread });
            }
        }
    }
    runner.check(&GroupCase { tokens: 33, top_k: 1, experts: 1, spread: Spread::All });
    expert_mlp(runner);
    for (tokens, top_k) in [(1, 1), (1, 10), (3, 2), (130, 8), (0, 2)] {
        for columns in [1, 64, 2047] {
            for residual in [Add::Nothing, Add::Tensor, Add::InPlace] {
                runner.check(&CombineCase { tokens, top_k, columns, residual, ..COMBINE });
            }
        }
    }
    runner.check(&CombineCase { nan_row: true, ..COMBINE });
    bad_arguments(runner);
}

fn route<B: Backend>(runner: &mut Runner<'_, B>) {
    for (experts, top_k) in [(2, 1), (8, 2), (8, 8), (64, 4), (64, 6), (128, 8), (256, 8), (160, 10)] {
        for routing in [SOFTMAX, SIGMOID, SELECTED] {
            for (norm_topk_prob, bias) in [(true, Bias::None), (false, Bias::Small)] {
                for tokens in [1, 17] {
                    let routing = Routing { top_k, norm_topk_prob, ..routing };
                    runner.check(&RouteCase { tokens, experts, routing, bias, ..ROUTE });
                }
            }
        }
    }
    for (experts, n_group, topk_group, top_k) in
        [(160, 8, 3, 6), (256, 8, 4, 8), (64, 8, 1, 4), (8, 4, 2, 2), (6, 6, 3, 3), (64, 2, 2, 5)]
    {
        for group_score in [GroupScore::Max, GroupScore::TopTwoSum] {
            for (routing, bias) in [(SOFTMAX, Bias::None), (SIGMOID, Bias::Small), (SIGMOID, Bias::Large)] {
                let routing = Routing { top_k, n_group, topk_group, group_score, ..routing };
                runner.check(&RouteCase { tokens: 33, experts, routing, bias, ..ROUTE });
            }
        }
    }
    for routing in [SOFTMAX, SIGMOID, SELECTED] {
        for logits in [Logits::AllEqual, Logits::Ties, Logits::Huge, Logits::AllLow] {
            runner.check(&RouteCase { routing, logits, ..ROUTE });
            let grouped = Routing { n_group: 8, topk_group: 3, ..routing };
            runner.check(&RouteCase { routing: grouped, logits, ..ROUTE });
        }
        runner.check(&RouteCase { routing, logits: Logits::Ties, bias: Bias::Ties, ..ROUTE });
        runner.check(&RouteCase { routing, logits: Logits::Normal(4.0), ..ROUTE });
        runner.check(&RouteCase { routing, bias: Bias::Large, tokens: 130, ..ROUTE });
    }
    runner.check(&RouteCase { tokens: 0, ..ROUTE });
}

fn expert_mlp<B: Backend>(runner: &mut Runner<'_, B>) {
    let quantized = |format, group_size| Storage::Quantized(format, group_size);
    let fp4 = quantized(Format::Fp4E2m1, 32);
    let mixed = [
        fp4,
        quantized(Format::Int4U4, 64),
        quantized(Format::Nf3, 32),
        quantized(Format::Int3, 32),
        quantized(Format::Int2, 128),
        DENSE[2],
        quantized(Format::Nvfp4, 16),
    ];
    for tokens in [0, 1, 3, 4, 5, 33, 130] {
        for storages in [&[DENSE[0]][..], &[fp4], &mixed] {
            runner.check(&experts(tokens, storages));
        }
    }
    // Rates and formats that differ from projection to projection.
    let exl3 = |codebook, bits| Storage::Exl3(codebook, bits);
    // Beside them a format that takes f32 activations in every mode: where rates round the hidden values a little, an
    // int8 activation could become its neighbour.
    let nf4 = quantized(Format::Nf4, 32);
    let rates = [exl3(Codebook::Mul1, 3), exl3(Codebook::Mcg, 4), exl3(Codebook::Mul1, 2), nf4];
    for tokens in [1, 3, 5, 33, 130] {
        for (hidden, intermediate) in [(64, 96), (256, 384)] {
            for storages in [&rates[..1], &rates] {
                runner.check(&ExpertMlpCase { hidden, intermediate, ..experts(tokens, storages) });
            }
        }
        runner.check(&ExpertMlpCase { bias: true, residual: Add::Tensor, ..experts(tokens, &rates[1..]) });
    }
    // Grids, of three rates for the projections of an expert, beside formats that take f32 activations in every mode.
    let grid = |bits| Storage::Grid(bits, 32);
    let (g3, g4) = (Storage::Grid(3, 128), Storage::Grid(4, 64));
    for tokens in [1, 3, 4, 5, 33, 130] {
        for storages in [
            &[grid(2)][..],
            &[grid(3)],
            &[g4, g3, grid(2)],
            &[grid(6), grid(2), g3],
            &[grid(8)],
            &[grid(5), grid(7), nf4],
        ] {
            runner.check(&experts(tokens, storages));
        }
        let case = ExpertMlpCase { bias: true, residual: Add::Tensor, ..experts(tokens, &[g4, nf4, g3, rates[0]]) };
        runner.check(&ExpertMlpCase { hidden: 200, intermediate: 33, ..case });
    }
    for format in Format::ALL {
        let storage = quantized(format, format.fixed_group_size().unwrap_or(32));
        for tokens in [1, 9] {
            runner.check(&experts(tokens, &[storage]));
        }
    }
    // Rows in orders of their own: of gate and up the same or different ones, of down, of some experts only; one whose
    // hidden vector cannot change places.
    let ordered = |format, order| Storage::Ordered(format, 32, order);
    let (first, second) = (ordered(Format::Int4S4, 3), ordered(Format::Affine5, 1));
    let third = ordered(Format::Nf4, 2);
    let beside_exl3 = [third, third, rates[0], rates[0]];
    for tokens in [1, 3, 5, 33, 130] {
        for storages in [&[first][..], &[first, second], &[first, first, first, nf4, nf4], &beside_exl3] {
            runner.check(&experts(tokens, storages));
        }
        // Rows and columns that tensor cores take.
        runner.check(&ExpertMlpCase { hidden: 256, intermediate: 384, ..experts(tokens, &[first]) });
        let case = ExpertMlpCase { bias: true, residual: Add::Tensor, ..experts(tokens, &[first, first, second, nf4]) };
        runner.check(&ExpertMlpCase { hidden: 200, intermediate: 65, ..case });
    }
    // Codes and scales alike, but other values.
    for tokens in [1, 9] {
        runner.check(&experts(tokens, &[nf4, quantized(Format::Iq4Nl, 32)]));
    }
    for activation in ACTIVATIONS {
        runner.check(&ExpertMlpCase { activation, ..experts(3, &[fp4]) });
    }
    for residual in [Add::Tensor, Add::InPlace] {
        for tokens in [1, 9] {
            runner.check(&ExpertMlpCase { residual, bias: true, ..experts(tokens, &mixed) });
        }
    }
    for (hidden, intermediate) in [(33, 65), (1, 1), (200, 31), (128, 257)] {
        for tokens in [1, 17] {
            let case = ExpertMlpCase { hidden, intermediate, ..experts(tokens, &[fp4, DENSE[1]]) };
            runner.check(&case);
        }
    }
    for (count, top_k, spread) in
        [(8, 8, Spread::All), (64, 2, Spread::Middle), (1, 1, Spread::All), (16, 6, Spread::All)]
    {
        for tokens in [1, 65] {
            let experts = ExpertMlpCase {
                experts: count,
                top_k,
                spread,
                hidden: 32,
                intermediate: 48,
                ..experts(tokens, &[fp4])
            };
            runner.check(&experts);
        }
    }
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let route = |routing| RouteCase { experts: 8, routing, ..ROUTE };
    let value = Refusal::Value;
    for (what, routing, operand) in [
        ("top_k 0", Routing { top_k: 0, ..SOFTMAX }, "top_k"),
        ("top_k > E", Routing { top_k: 9, ..SOFTMAX }, "top_k"),
        ("E % n_group", Routing { n_group: 3, ..SOFTMAX }, "n_group"),
        ("n_group 0", Routing { n_group: 0, ..SOFTMAX }, "n_group"),
        ("topk_group 0", Routing { topk_group: 0, ..SOFTMAX }, "topk_group"),
        ("topk_group > n_group", Routing { topk_group: 2, ..SOFTMAX }, "topk_group"),
        ("top_k > experts of the kept groups", Routing { n_group: 4, topk_group: 1, top_k: 3, ..SOFTMAX }, "top_k"),
        ("scaling NaN", Routing { routed_scaling_factor: f32::NAN, ..SOFTMAX }, "routed_scaling_factor"),
    ] {
        // The logits are ties, which need no search for clear decisions.
        let case = RouteCase { logits: Logits::Ties, ..route(routing) };
        runner.refuse(what, &case, value(operand));
    }
    let case = RouteCase { logits: Logits::OneNan, ..route(SIGMOID) };
    runner.refuse("NaN logit", &case, value("logits"));
    for routing in [SOFTMAX, SELECTED] {
        let case = RouteCase { logits: Logits::AllHidden, ..route(routing) };
        runner.refuse("all logits -inf", &case, value("logits"));
    }
    for (what, spread) in [("expert twice", Spread::Duplicate), ("expert E", Spread::Beyond)] {
        let case = GroupCase { tokens: 3, top_k: 2, experts: 8, spread };
        runner.refuse(what, &case, value("ids"));
        for storage in [DENSE[0], Storage::Exl3(Codebook::Mul1, 3)] {
            for tokens in [2, 33] {
                let case = ExpertMlpCase { spread, ..experts(tokens, &[storage]) };
                runner.refuse(&format!("{what}, {storage} T={tokens}"), &case, value("ids"));
            }
        }
    }
    let case = ExpertMlpCase { weight_columns: Some(3), ..experts(2, &[DENSE[0]]) };
    runner.refuse("a weight too many", &case, Refusal::Shape("weights"));
    let case = CombineCase { beyond: true, ..COMBINE };
    runner.refuse("inverse = T k", &case, value("inverse"));
}
