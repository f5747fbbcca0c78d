//! Products of rows with the weights of their experts, and the router's load-balancing loss.

use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_ops::linear::Activation;
use marlin_ops::moe::{AuxLossArgs, GroupedGemmArgs, RowOrder};
use marlin_ops::{Backend, ExpertProjection, ExpertStack, ExpertWeights, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, ids, poison, poison_as, poison_ids};
use crate::linear::ACTIVATIONS;
use crate::moe::Spread;
use crate::random::Random;
use crate::tolerance::{self, Tolerance, exl3, relative_ulp};
use crate::weight::{DENSE, Scales, Storage, random_weight};

/// How rows and their experts are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Token,
    Sorted,
    /// x is sorted too.
    SortedRows,
}

/// What is wrong with a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Nothing,
    /// The second offset is above the third.
    Descending,
    /// The last offset is one less than the rows.
    End,
    /// The first offset is 1.
    Start,
    /// Every offset is the largest word.
    Huge,
    /// The last row is assignment T k.
    Permutation,
    /// An output row too many.
    Rows,
}

#[derive(Clone)]
struct GroupedCase {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    storages: Vec<Storage>,
    projection: ExpertProjection,
    activation: Activation,
    bias: bool,
    order: Order,
    spread: Spread,
    x: DType,
    out: DType,
    bad: Bad,
}

const FP4: Storage = Storage::Quantized(Format::Fp4E2m1, 32);

fn grouped(tokens: usize, order: Order, storages: &[Storage]) -> GroupedCase {
    GroupedCase {
        tokens,
        hidden: 64,
        intermediate: 96,
        experts: 6,
        top_k: 2,
        storages: storages.to_vec(),
        projection: ExpertProjection::Up,
        activation: Activation::None,
        bias: false,
        order,
        spread: Spread::All,
        x: DType::F32,
        out: DType::F32,
        bad: Bad::Nothing,
    }
}

impl GroupedCase {
    fn expert(&self, e: usize, random: &mut Random) -> Result<ExpertWeights> {
        let mut weight = |index: usize, n: usize, k: usize| {
            let weight = random_weight(self.storage(e, index), n, k, Scales::Usual, random)?;
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

    /// How expert `e` stores projection `index`.
    fn storage(&self, e: usize, index: usize) -> Storage {
        self.storages[(e + index) % self.storages.len()]
    }

    /// Experts of the tokens, `[T, k]`.
    fn chosen(&self) -> Vec<u32> {
        let random = &mut Random::of(&format!("{} ids", self.configuration()));
        self.spread.ids(self.tokens, self.top_k, self.experts, random)
    }

    /// The bound on relF of every row of the output, from its own expert's storage.
    fn row_bounds(&self, mode: Mode) -> Vec<f64> {
        let mut experts = self.chosen();
        if self.order != Order::Token {
            experts.sort_unstable();
        }
        let bound = |&e: &u32| match self.storage(e as usize, self.projection as usize) {
            Storage::Exl3(..) => exl3(mode),
            _ => tolerance::LINEAR,
        };
        experts.iter().map(bound).collect()
    }

    /// `[K, N]`.
    fn weight_shape(&self) -> [usize; 2] {
        match self.projection {
            ExpertProjection::Down => [self.intermediate, self.hidden],
            ExpertProjection::Gate | ExpertProjection::Up => [self.hidden, self.intermediate],
        }
    }

    /// Offsets and permutation of the assignments.
    fn sort(&self, chosen: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let mut permutation: Vec<u32> = (0..chosen.len() as u32).collect();
        permutation.sort_by_key(|&a| chosen[a as usize]);
        let below = |e: usize| chosen.iter().filter(|&&id| (id as usize) < e).count() as u32;
        let mut offsets: Vec<u32> = (0..=self.experts).map(below).collect();
        match self.bad {
            Bad::Nothing | Bad::Rows => {}
            Bad::Descending => offsets[1] = offsets[2] + 1,
            Bad::End => offsets[self.experts] -= 1,
            Bad::Start => offsets[0] = 1,
            Bad::Huge => offsets.fill(u32::MAX),
            Bad::Permutation => permutation[chosen.len() - 1] = chosen.len() as u32,
        }
        (offsets, permutation)
    }
}

impl Case for GroupedCase {
    const OPERATION: &'static str = "moe_grouped_gemm";

    fn configuration(&self) -> String {
        let Self { tokens, hidden, intermediate, experts, top_k, projection, activation, bias, order, .. } = self;
        let storages: Vec<String> = self.storages.iter().map(Storage::to_string).collect();
        let (storages, spread, x, out) = (storages.join("+"), self.spread, self.x.name(), self.out.name());
        format!(
            "T={tokens} H={hidden} I={intermediate} E={experts} k={top_k} {storages} {projection:?} {activation:?} \
             bias={bias} {order:?} {spread:?} x={x} out={out}"
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let experts: Vec<ExpertWeights> = (0..self.experts).map(|e| self.expert(e, random)).collect::<Result<_>>()?;
        let stack = ExpertStack::new(b, experts)?;
        let chosen = self.chosen();
        let (offsets, permutation) = self.sort(&chosen);
        let [k, n] = self.weight_shape();
        let rows = self.tokens * self.top_k;
        let x_rows = if self.order == Order::SortedRows { rows } else { self.tokens };
        let x = floats_as(b, self.x, &[x_rows, k], &random.normals(x_rows * k))?;
        let chosen = ids(b, &[self.tokens, self.top_k], &chosen)?;
        let offsets = ids(b, &[self.experts + 1], &offsets)?;
        let permutation = ids(b, &[rows], &permutation)?;
        let mut out = poison_as(b, self.out, &[rows + usize::from(self.bad == Bad::Rows), n])?;
        b.moe_grouped_gemm(GroupedGemmArgs {
            x: &x,
            order: match self.order {
                Order::Token => RowOrder::Token { ids: &chosen },
                Order::Sorted => RowOrder::Sorted { offsets: &offsets, permutation: Some(&permutation) },
                Order::SortedRows => RowOrder::Sorted { offsets: &offsets, permutation: None },
            },
            experts: &stack,
            projection: self.projection,
            activation: self.activation,
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        let [_, n] = self.weight_shape();
        let block = if n >= 16 { n } else { n * self.tokens * self.top_k };
        let bound = match self.out {
            DType::F16 => tolerance::LINEAR_F16,
            DType::BF16 => tolerance::LINEAR_BF16,
            _ if self.storages.iter().any(Storage::rotates) => {
                return vec![Tolerance::Rows { bounds: self.row_bounds(mode) }];
            }
            _ => return vec![Tolerance::Blocks { block, bound: tolerance::LINEAR }],
        };
        let absolute = vec![1e-4; self.tokens * self.top_k * n];
        let elements = Tolerance::Elements { ulps: 0.0, relative: relative_ulp(self.out), absolute };
        vec![Tolerance::All(vec![Tolerance::Blocks { block, bound }, elements])]
    }
}

/// Which tokens are padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mask {
    None,
    /// Every third, with NaN logits and ids that are no experts.
    Thirds,
    /// Bad.
    All,
}

#[derive(Clone, Copy)]
struct AuxLossCase {
    tokens: usize,
    experts: usize,
    top_k: usize,
    /// All tokens have the same clear favourite.
    one_expert: bool,
    mask: Mask,
    /// Bad: of the middle token.
    logit: Option<f32>,
    /// Bad: of the last token.
    id: Option<u32>,
    load_len: usize,
}

fn aux_loss(tokens: usize, experts: usize, top_k: usize) -> AuxLossCase {
    AuxLossCase {
        tokens,
        experts,
        top_k,
        one_expert: false,
        mask: Mask::None,
        logit: None,
        id: None,
        load_len: experts,
    }
}

impl Case for AuxLossCase {
    const OPERATION: &'static str = "moe_aux_loss";

    fn configuration(&self) -> String {
        let Self { tokens, experts, top_k, one_expert, mask, .. } = self;
        format!("T={tokens} E={experts} k={top_k} one_expert={one_expert} mask={mask:?}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (tokens, experts) = (self.tokens, self.experts);
        let mut logits = random.normals(tokens * experts);
        let mut chosen = Spread::All.ids(tokens, self.top_k, experts, random);
        if self.one_expert {
            logits.iter_mut().enumerate().for_each(|(i, z)| *z = if i % experts == 1 { 80.0 } else { -20.0 });
            chosen.fill(1);
        }
        let mask: Vec<u32> = (0..tokens as u32)
            .map(|t| match self.mask {
                Mask::None => 1,
                Mask::Thirds => t % 3,
                Mask::All => 0,
            })
            .collect();
        for t in (0..tokens).filter(|&t| mask[t] == 0) {
            logits[t * experts] = f32::NAN;
            chosen[t * self.top_k..(t + 1) * self.top_k].fill(u32::MAX);
        }
        if let Some(logit) = self.logit {
            logits[tokens / 2 * experts..][..experts].fill(logit);
        }
        if let Some(id) = self.id {
            chosen[tokens * self.top_k - 1] = id;
        }
        let mask_tensor = ids(b, &[tokens], &mask)?;
        let (mut load, mut counts) = (poison(b, &[self.load_len])?, poison_ids(b, &[experts])?);
        let mut loss = poison(b, &[1])?;
        b.moe_aux_loss(AuxLossArgs {
            logits: &floats(b, &[tokens, experts], &logits)?,
            ids: &ids(b, &[tokens, self.top_k], &chosen)?,
            mask: (self.mask != Mask::None).then_some(&mask_tensor),
            load: &mut load,
            counts: &mut counts,
            loss: &mut loss,
        })?;
        Ok(vec![
            Output::floats(b, "load", &load)?,
            Output::words(b, "counts", &counts)?,
            Output::floats(b, "loss", &loss)?,
        ])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let relative = || Tolerance::Elements { ulps: 0.0, relative: tolerance::AUX_LOSS, absolute: vec![] };
        // Of an expert that all tokens avoid nothing is left in f32.
        let load = match self.one_expert {
            true => {
                Tolerance::Elements { ulps: 0.0, relative: tolerance::AUX_LOSS, absolute: vec![1e-36; self.experts] }
            }
            false => relative(),
        };
        vec![load, Tolerance::Exact, relative()]
    }
}

/// FP4 products of 16-bit rows in the order of tokens, or of experts.
pub(crate) fn grouped_products(io: DType, sorted: bool, k_max: usize) -> Vec<impl Case + use<>> {
    let order = if sorted { Order::Sorted } else { Order::Token };
    let mut cases = Vec::new();
    for tokens in [1, 33, 130] {
        cases.push(GroupedCase { x: io, out: io, ..grouped(tokens, order, &[FP4]) });
        let many = GroupedCase { experts: 8, top_k: k_max.min(8), ..grouped(tokens, order, &[FP4]) };
        cases.push(GroupedCase { x: io, out: io, ..many });
    }
    let odd = GroupedCase { hidden: 33, intermediate: 65, ..grouped(17, order, &[FP4]) };
    cases.push(GroupedCase { x: io, out: io, ..odd });
    cases.push(GroupedCase { x: io, out: io, spread: Spread::Middle, experts: 64, ..grouped(9, order, &[FP4]) });
    cases
}

/// The loss of routers of these many experts.
pub(crate) fn aux_loss_cases() -> Vec<impl Case + use<>> {
    let sizes = [(1, 8, 1), (130, 64, 6), (33, 160, 8), (300, 256, 8)];
    let mut cases = sizes.map(|(tokens, experts, top_k)| aux_loss(tokens, experts, top_k)).to_vec();
    cases.push(AuxLossCase { mask: Mask::Thirds, ..aux_loss(130, 64, 6) });
    cases.push(AuxLossCase { one_expert: true, ..aux_loss(40, 16, 1) });
    cases
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let exl3 = [Storage::Exl3(Codebook::Mul1, 3), Storage::Exl3(Codebook::Mcg, 4), FP4];
    for order in [Order::Token, Order::Sorted, Order::SortedRows] {
        for tokens in [1, 17, 130] {
            runner.check(&GroupedCase { bias: true, ..grouped(tokens, order, &exl3) });
        }
    }
    let mixed = [FP4, Storage::Quantized(Format::Int4U4, 64), DENSE[1], Storage::Quantized(Format::Nvfp4, 16)];
    const ORDERS: [Order; 3] = [Order::Token, Order::Sorted, Order::SortedRows];
    for order in ORDERS {
        for tokens in [0, 1, 4, 5, 33, 130] {
            for storages in [&[FP4][..], &mixed] {
                runner.check(&grouped(tokens, order, storages));
            }
        }
        for projection in [ExpertProjection::Gate, ExpertProjection::Down] {
            for tokens in [2, 40] {
                runner.check(&GroupedCase { projection, bias: true, ..grouped(tokens, order, &[FP4]) });
            }
        }
        for (experts, top_k, spread) in [(8, 8, Spread::All), (64, 2, Spread::Middle), (1, 1, Spread::All)] {
            for tokens in [1, 65] {
                let small = GroupedCase { hidden: 32, intermediate: 48, ..grouped(tokens, order, &[FP4]) };
                runner.check(&GroupedCase { experts, top_k, spread, ..small });
            }
        }
        for (hidden, intermediate) in [(33, 65), (1, 1), (200, 31)] {
            runner.check(&GroupedCase { hidden, intermediate, ..grouped(17, order, &[FP4, DENSE[0]]) });
        }
        for dtype in runner.half_dtypes() {
            for tokens in [3, 33] {
                runner.check(&GroupedCase { x: dtype, out: dtype, ..grouped(tokens, order, &[FP4]) });
            }
        }
    }
    for activation in ACTIVATIONS {
        runner.check(&GroupedCase { activation, bias: true, ..grouped(9, Order::Sorted, &[FP4]) });
    }
    for (bad, order, refusal) in [
        (Bad::Descending, Order::Sorted, Refusal::Value("offsets")),
        (Bad::End, Order::Sorted, Refusal::Value("offsets")),
        (Bad::Start, Order::SortedRows, Refusal::Value("offsets")),
        (Bad::Huge, Order::SortedRows, Refusal::Value("offsets")),
        (Bad::Permutation, Order::Sorted, Refusal::Value("permutation")),
        (Bad::Rows, Order::Token, Refusal::Shape("out")),
        (Bad::Rows, Order::Sorted, Refusal::Shape("permutation")),
        (Bad::Rows, Order::SortedRows, Refusal::Shape("out")),
    ] {
        runner.refuse(&format!("{bad:?} {order:?}"), &GroupedCase { bad, ..grouped(9, order, &[FP4]) }, refusal);
    }
    for spread in [Spread::Duplicate, Spread::Beyond] {
        for tokens in [2, 33] {
            let case = GroupedCase { spread, ..grouped(tokens, Order::Token, &[FP4]) };
            runner.refuse(&format!("{spread:?}, T={tokens}"), &case, Refusal::Value("ids"));
        }
    }
    let ordered = Storage::Ordered(Format::Int4S4, 32, 0);
    let case = grouped(9, Order::Sorted, &[ordered]);
    runner.refuse("experts in an order of their own", &case, Refusal::Value("experts"));
    aux_losses(runner);
}

fn aux_losses<B: Backend>(runner: &mut Runner<'_, B>) {
    for (tokens, experts, top_k) in
        [(1, 8, 1), (4, 4, 2), (130, 64, 6), (33, 160, 8), (4096, 8, 2), (7, 1, 1), (300, 256, 8)]
    {
        runner.check(&aux_loss(tokens, experts, top_k));
        if tokens > 1 {
            runner.check(&AuxLossCase { mask: Mask::Thirds, ..aux_loss(tokens, experts, top_k) });
        }
    }
    runner.check(&AuxLossCase { one_expert: true, ..aux_loss(40, 16, 1) });
    let case = aux_loss(9, 8, 2);
    for logit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let case = AuxLossCase { logit: Some(logit), ..case };
        runner.refuse(&format!("logits {logit}"), &case, Refusal::Value("logits"));
    }
    runner.refuse("expert E", &AuxLossCase { id: Some(8), ..case }, Refusal::Value("ids"));
    runner.refuse("all tokens masked", &AuxLossCase { mask: Mask::All, ..case }, Refusal::Value("mask"));
    runner.refuse("a short load", &AuxLossCase { load_len: 7, ..case }, Refusal::Shape("load"));
    runner.refuse("no token", &aux_loss(0, 8, 2), Refusal::Shape("logits"));
}
