//! Linear layers, gated products, embeddings.

mod grid;
mod input_norm;
mod input_order;

use marlin_formats::{DType, Format};
use marlin_ops::linear::{Activation, EmbeddingArgs, GatedUpArgs, LinearArgs, Projection, ProjectionsArgs};
use marlin_ops::{Backend, Linear, Result, Weight};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Add, Output, floats, floats_as, ids, poison};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};
use crate::weight::{DENSE, Scales, Storage, all_codes, group_sizes, random_weight, sizes_of_parts};
use input_norm::{Bound, Norm, rounds};
pub(crate) use input_norm::{GATED_NORM, after_norm, rows};

pub(crate) const ACTIVATIONS: [Activation; 8] = [
    Activation::None,
    Activation::Relu,
    Activation::Relu2,
    Activation::Silu,
    Activation::GeluErf,
    Activation::GeluTanh,
    Activation::GeluQuick,
    Activation::Sigmoid,
];

/// Rows of activations.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Input {
    /// Normal values.
    Normal,
    /// Normal values times a factor.
    Scaled(f32),
    /// Row m is one-hot at k = m.
    OneHot,
    /// The special values of an epilogue, one a row.
    Special,
    /// Row 1 holds this value at k = 0; the others are normal.
    One(f32),
}

/// The values at which epilogues are tested. The limit of the GELU forms at -inf is left open: their formulas give
/// NaN there.
pub(crate) fn special_values(activation: Activation) -> Vec<f32> {
    let mut values = vec![0.0, f32::INFINITY, f32::NAN];
    values.extend([1e-8, 0.5, 1.0, 10.0, 88.8, 1e4].into_iter().flat_map(|v: f32| [v, -v]));
    values.push(-0.0);
    match activation {
        Activation::GeluErf | Activation::GeluTanh | Activation::GeluQuick => {}
        _ => values.push(f32::NEG_INFINITY),
    }
    values
}

#[derive(Clone, Copy)]
struct LinearCase {
    m: usize,
    k: usize,
    n: usize,
    storage: Storage,
    scales: Scales,
    /// Every code at every k instead of random ones; n is the number of codes.
    all_codes: bool,
    bias: bool,
    activation: Activation,
    out_scale: f32,
    residual: Add,
    input: Input,
    /// Of x, and of the output and the residual.
    dtypes: (DType, DType),
    /// Columns of x and out that a bad case claims.
    x_columns: Option<usize>,
    out_columns: Option<usize>,
}

const LINEAR: LinearCase = LinearCase {
    m: 3,
    k: 200,
    n: 65,
    storage: Storage::Dense(DType::F32),
    scales: Scales::Usual,
    all_codes: false,
    bias: false,
    activation: Activation::None,
    out_scale: 1.0,
    residual: Add::Nothing,
    input: Input::Normal,
    dtypes: (DType::F32, DType::F32),
    x_columns: None,
    out_columns: None,
};

impl LinearCase {
    fn weight(&self, random: &mut Random) -> Result<Weight> {
        let weight = match self.storage {
            Storage::Quantized(format, _) if self.all_codes => all_codes(format, self.k, random)?,
            storage => {
                if self.input == Input::Special {
                    let host = marlin_ops::HostTensor::from_f32(&[1, 1], &[1.0])?;
                    return Weight::dense(host);
                }
                random_weight(storage, self.n, self.k, self.scales, random)?
            }
        };
        match self.bias {
            true => weight.with_bias(random.normals(self.n)),
            false => Ok(weight),
        }
    }

    fn x(&self, random: &mut Random) -> Vec<f32> {
        let mut x = random.normals(self.m * self.k);
        match self.input {
            Input::Normal => {}
            Input::Scaled(factor) => x.iter_mut().for_each(|v| *v *= factor),
            Input::OneHot => {
                x.fill(0.0);
                (0..self.m).for_each(|m| x[m * self.k + m] = 1.0);
            }
            Input::Special => x.copy_from_slice(&special_values(self.activation)),
            Input::One(value) => x[self.k] = value,
        }
        x
    }

    /// `sum_k |x w| + |bias|`, `[m, n]`. The fast mode multiplies codes and offsets apart: there both parts count.
    fn magnitudes(&self, mode: Mode) -> Result<Vec<f64>> {
        let random = &mut Random::of(&self.configuration());
        let weight = self.weight(random)?;
        let w = if rounds(&weight, mode) { sizes_of_parts(&weight)? } else { weight.to_f32()? };
        Ok(sums(&w, &weight, &self.x(random)))
    }
}

/// `sum_k |x w| + |bias|` for every row and output.
pub(crate) fn magnitudes(weight: &Weight, x: &[f32]) -> Result<Vec<f64>> {
    Ok(sums(&weight.to_f32()?, weight, x))
}

/// [`magnitudes`] with `w [n, k]` in place of the weight's values.
fn sums(w: &[f32], weight: &Weight, x: &[f32]) -> Vec<f64> {
    let (k, n) = (weight.in_features(), weight.out_features());
    let bias = weight.bias.clone().unwrap_or(vec![0.0; n]);
    let product = |x: &[f32], n: usize| -> f64 {
        let terms = x.iter().zip(&w[n * k..][..k]);
        terms.map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum()
    };
    x.chunks(k.max(1))
        .flat_map(|x| (0..n).map(move |n| (x, n)))
        .map(|(x, n)| product(x, n) + f64::from(bias[n]).abs())
        .collect()
}

/// Largest slope of an activation where its argument is at most `size`.
pub(crate) fn slope(activation: Activation, size: f64) -> f64 {
    match activation {
        Activation::Relu2 => 2.0 * size,
        _ => 1.2,
    }
}

/// Whether an activation goes through exp, tanh or erf.
pub(crate) fn transcendental(activation: Activation) -> bool {
    !matches!(activation, Activation::None | Activation::Relu | Activation::Relu2)
}

/// relF by rows of N outputs, or over all rows where N is too small to average cancellation out.
pub(crate) fn by_rows(m: usize, n: usize, bound: f64) -> Tolerance {
    let block = if n >= 16 { n } else { m * n };
    Tolerance::Blocks { block, bound }
}

impl Case for LinearCase {
    const OPERATION: &'static str = "linear";

    fn configuration(&self) -> String {
        let mut text = format!("{} M={} K={} N={}", self.storage, self.m, self.k, self.n);
        if self.all_codes {
            text += " all codes";
        }
        if self.scales != Scales::Usual {
            text += &format!(" scales={:?}", self.scales);
        }
        if self.input != Input::Normal {
            text += &format!(" x={:?}", self.input);
        }
        if self.bias {
            text += " bias";
        }
        if self.activation != Activation::None {
            text += &format!(" {:?}", self.activation);
        }
        if self.out_scale != 1.0 {
            text += &format!(" out_scale={}", self.out_scale);
        }
        if self.residual != Add::Nothing {
            text += &format!(" residual={:?}", self.residual);
        }
        let (input, output) = self.dtypes;
        if self.dtypes != LINEAR.dtypes {
            text += &format!(" {}->{}", input.name().to_lowercase(), output.name().to_lowercase());
        }
        text
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (input, output) = self.dtypes;
        let weight = Linear::new(b, self.weight(random)?)?;
        let mut x = self.x(random);
        let x_dims = [self.m, self.x_columns.unwrap_or(self.k)];
        x.resize(x_dims[0] * x_dims[1], 0.0);
        let x = floats_as(b, input, &x_dims, &x)?;
        let dims = [self.m, self.out_columns.unwrap_or(self.n)];
        let residual = floats_as(b, output, &dims, &random.normals(dims[0] * dims[1]))?;
        let mut out = self.residual.output(b, output, &dims, || random.normals(dims[0] * dims[1]))?;
        b.linear(LinearArgs {
            x: &x,
            weight: &weight,
            activation: self.activation,
            out_scale: self.out_scale,
            residual: self.residual.of(&residual),
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        if self.input == Input::Special {
            return vec![special_tolerance(self.activation)];
        }
        if self.all_codes && mode != Mode::Int8Activations {
            return vec![Tolerance::Exact];
        }
        // Each of the K + 4 roundings (weight, products, bias, scale, residual) is relative to at most the sum of
        // magnitudes; an activation adds its own error.
        let steps = (self.k + 4) as f64 * U32;
        let own = if transcendental(self.activation) { tolerance::ACTIVATION } else { 0.0 };
        let absolute = self
            .magnitudes(mode)
            .expect("the inputs are valid: the case ran")
            .into_iter()
            .map(|sum| {
                let output = slope(self.activation, sum) * sum * (steps + own);
                f64::from(self.out_scale).abs() * output
            })
            .collect();
        // Rounding twice, to f32 and to the stored type, may end one ulp away.
        let (ulps, relative, bound) = match self.dtypes.1 {
            DType::F16 => (0.0, tolerance::relative_ulp(DType::F16), tolerance::LINEAR_F16),
            DType::BF16 => (0.0, tolerance::relative_ulp(DType::BF16), tolerance::LINEAR_BF16),
            _ => (1.0, 2.0 * U32, tolerance::LINEAR),
        };
        let elements = Tolerance::Elements { ulps, relative, absolute };
        vec![Tolerance::All(vec![by_rows(self.m, self.n, bound), elements])]
    }
}

/// A single product with weight 1, so that the epilogue's argument is x itself.
pub(crate) fn special_tolerance(activation: Activation) -> Tolerance {
    if activation == Activation::Relu2 {
        // One correct rounding of the square.
        return Tolerance::Elements { ulps: 0.0, relative: U32, absolute: vec![] };
    }
    if !transcendental(activation) {
        return Tolerance::Exact;
    }
    let absolute = special_values(activation).into_iter().map(|x| match activation {
        // Well-conditioned everywhere; below -88 e^-x overflows and the result may be -0.
        Activation::Silu | Activation::Sigmoid | Activation::GeluQuick => 1e-36,
        // 1 + erf and 1 + tanh cancel for negative x: the error is relative to x.
        _ if x.is_finite() => tolerance::ACTIVATION * f64::from(x).abs(),
        _ => 0.0,
    });
    Tolerance::Elements { ulps: 1.0, relative: tolerance::ACTIVATION, absolute: absolute.collect() }
}

struct GatedUpCase {
    m: usize,
    k: usize,
    n: usize,
    gate: Storage,
    up: Storage,
    bias: bool,
    activation: Activation,
    /// Factor on normal activations.
    x_scale: f32,
    norm: bool,
    /// Rows of `up` in a bad case.
    up_rows: Option<usize>,
}

const GATED_UP: GatedUpCase = GatedUpCase {
    m: 3,
    k: 96,
    n: 65,
    gate: Storage::Dense(DType::F32),
    up: Storage::Dense(DType::F32),
    bias: false,
    activation: Activation::Silu,
    x_scale: 1.0,
    norm: false,
    up_rows: None,
};

impl GatedUpCase {
    fn inputs(&self) -> Result<(Weight, Weight, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let (n, k) = (self.n, self.k);
        let mut gate = random_weight(self.gate, n, k, Scales::Usual, random)?;
        let up_rows = self.up_rows.unwrap_or(n);
        let mut up = random_weight(self.up, up_rows, k, Scales::Usual, random)?;
        if self.bias {
            gate = gate.with_bias(random.normals(n))?;
            up = up.with_bias(random.normals(up_rows))?;
        }
        let norm = self.norm.then_some(GATED_NORM);
        let orders: Vec<_> = [self.gate, self.up].iter().filter_map(|storage| storage.input_order(k)).collect();
        Ok((gate, up, rows(self.m, k, self.x_scale, norm, &orders, random)))
    }
}

impl Case for GatedUpCase {
    const OPERATION: &'static str = "gated_up";

    fn configuration(&self) -> String {
        let (m, k, n) = (self.m, self.k, self.n);
        let (gate, up) = (self.gate, self.up);
        let (act, bias, scale) = (self.activation, self.bias, self.x_scale);
        let norm = if self.norm { " norm" } else { "" };
        format!("{gate} x {up} M={m} K={k} I={n} {act:?} bias={bias} x*{scale}{norm}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (gate, up, x) = self.inputs()?;
        let (gate, up) = (Linear::new(b, gate)?, Linear::new(b, up)?);
        let x = floats(b, &[self.m, self.k], &x)?;
        let gamma = floats(b, &[self.k], &GATED_NORM.gamma(self.k))?;
        let norm = self.norm.then(|| GATED_NORM.input(&gamma));
        let mut out = poison(b, &[self.m, self.n])?;
        b.gated_up(GatedUpArgs { x: &x, norm, gate: &gate, up: &up, activation: self.activation, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        if self.norm {
            let (gate, up, x) = self.inputs().expect("the inputs are valid: the case ran");
            let x = GATED_NORM.apply(&x, self.k);
            let bounds = |w: &Weight| after_norm(w, &x, mode).expect("the weight is valid");
            let slope = |sum| slope(self.activation, sum);
            let product = |(g, u): (Bound, Bound)| {
                let second = u.error + u.size * tolerance::ACTIVATION;
                slope(g.size) * (g.error * (u.size + u.error) + g.size.max(1.0) * second)
            };
            let absolute = bounds(&gate).into_iter().zip(bounds(&up)).map(product).collect();
            return vec![Tolerance::Elements { ulps: 1.0, relative: 2.0 * U32, absolute }];
        }
        let (gate, up, x) = self.inputs().expect("the inputs are valid: the case ran");
        let sums = |w: &Weight| magnitudes(w, &x).expect("the weight is valid");
        let steps = 2.0 * (self.k + 4) as f64 * U32 + tolerance::ACTIVATION;
        let absolute = sums(&gate)
            .into_iter()
            .zip(sums(&up))
            .map(|(g, u)| slope(self.activation, g) * g.max(1.0) * u * steps)
            .collect();
        let elements = Tolerance::Elements { ulps: 1.0, relative: 2.0 * U32, absolute };
        vec![Tolerance::All(vec![by_rows(self.m, self.n, tolerance::LINEAR), elements])]
    }
}

struct ProjectionsCase {
    m: usize,
    k: usize,
    /// Format and outputs of each weight.
    weights: Vec<(Storage, usize)>,
    bias: bool,
    norm: Option<Norm>,
    /// Factor on normal activations; row 1 is zero.
    x_scale: f32,
    /// Columns of gamma and of the last out, and inputs of the last weight, that a bad case claims.
    gamma_columns: Option<usize>,
    out_columns: Option<usize>,
    last_k: Option<usize>,
}

impl ProjectionsCase {
    fn new(m: usize, storage: Storage) -> Self {
        let weights = vec![(storage, 65), (storage, 16), (storage, 33)];
        let norm = Some(Norm { offset: 0.0, eps: 1e-6 });
        let (gamma_columns, out_columns, last_k) = (None, None, None);
        Self { m, k: 200, weights, bias: false, norm, x_scale: 1.0, gamma_columns, out_columns, last_k }
    }

    fn inputs(&self) -> Result<(Vec<f32>, Vec<Weight>)> {
        let random = &mut Random::of(&self.configuration());
        let orders: Vec<_> = self.weights.iter().filter_map(|(storage, _)| storage.input_order(self.k)).collect();
        let mut x = rows(self.m, self.k, self.x_scale, self.norm, &orders, random);
        if self.m > 1 {
            x[self.k..2 * self.k].fill(0.0);
        }
        let last = self.weights.len() - 1;
        let mut weights = Vec::new();
        for (i, &(storage, n)) in self.weights.iter().enumerate() {
            let k = self.last_k.filter(|_| i == last).unwrap_or(self.k);
            let weight = random_weight(storage, n, k, Scales::Usual, random)?;
            weights.push(if self.bias { weight.with_bias(random.normals(n))? } else { weight });
        }
        Ok((x, weights))
    }
}

impl Case for ProjectionsCase {
    const OPERATION: &'static str = "projections";

    fn configuration(&self) -> String {
        let weights: Vec<String> = self.weights.iter().map(|(storage, n)| format!("{storage} N={n}")).collect();
        let (m, k, bias, scale) = (self.m, self.k, self.bias, self.x_scale);
        let norm = self.norm.map_or("none".to_owned(), |norm| format!("{norm:?}"));
        format!("{} M={m} K={k} bias={bias} x*{scale} norm={norm}", weights.join(", "))
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (x, weights) = self.inputs()?;
        let x = floats(b, &[self.m, self.k], &x)?;
        let gamma_columns = self.gamma_columns.unwrap_or(self.k);
        let gamma = floats(b, &[gamma_columns], &GATED_NORM.gamma(gamma_columns))?;
        let last = self.weights.len() - 1;
        let mut outs = Vec::new();
        for (i, weight) in weights.iter().enumerate() {
            let columns = self.out_columns.filter(|_| i == last).unwrap_or(weight.out_features());
            outs.push(poison(b, &[self.m, columns])?);
        }
        let weights = weights.into_iter().map(|weight| Linear::new(b, weight)).collect::<Result<Vec<_>>>()?;
        let mut projections: Vec<_> =
            weights.iter().zip(&mut outs).map(|(weight, out)| Projection { weight, out }).collect();
        let norm = self.norm.map(|norm| norm.input(&gamma));
        b.projections(ProjectionsArgs { x: &x, norm, projections: &mut projections })?;
        outs.iter().map(|out| Output::floats(b, "out", out)).collect()
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        let Some(norm) = self.norm else {
            return self.weights.iter().map(|&(_, n)| by_rows(self.m, n, tolerance::LINEAR)).collect();
        };
        let (x, weights) = self.inputs().expect("the inputs are valid: the case ran");
        let x = norm.apply(&x, self.k);
        let elements = |weight: &Weight| {
            let bounds = after_norm(weight, &x, mode).expect("the weight is valid");
            let absolute = bounds.into_iter().map(|bound| bound.error).collect();
            Tolerance::Elements { ulps: 1.0, relative: 2.0 * U32, absolute }
        };
        weights.iter().map(elements).collect()
    }
}

struct EmbeddingCase {
    storage: Storage,
    vocab: usize,
    hidden: usize,
    ids: Vec<u32>,
    out_columns: Option<usize>,
}

impl EmbeddingCase {
    fn new(storage: Storage, hidden: usize) -> Self {
        Self { storage, vocab: 33, hidden, ids: vec![0, 32, 7, 7, 16, 31, 1], out_columns: None }
    }
}

impl Case for EmbeddingCase {
    const OPERATION: &'static str = "embedding";

    fn configuration(&self) -> String {
        let (vocab, hidden, tokens) = (self.vocab, self.hidden, self.ids.len());
        format!("{} vocab={vocab} hidden={hidden} T={tokens}", self.storage)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let table = random_weight(self.storage, self.vocab, self.hidden, Scales::Usual, random)?;
        let table = Linear::new(b, table)?;
        let chosen = ids(b, &[self.ids.len()], &self.ids)?;
        let mut out = poison(b, &[self.ids.len(), self.out_columns.unwrap_or(self.hidden)])?;
        b.embedding(EmbeddingArgs { ids: &chosen, table: &table, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

/// (M, K, N) around the edges of tiles, vectors, words and groups.
fn shapes() -> Vec<(usize, usize, usize)> {
    let (m, k, n) = (LINEAR.m, LINEAR.k, LINEAR.n);
    let ms = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 130].map(|m| (m, k, n));
    let ks = [1, 7, 8, 9, 31, 32, 33, 127, 128, 129, 384, 1000].map(|k| (m, k, n));
    let ns = [1, 15, 16, 17, 33, 129, 513].map(|n| (2, k, n));
    ms.into_iter().chain(ks).chain(ns).chain([(130, 384, 129)]).collect()
}

/// Every format that weights are quantized to and a quarter of the imported ones, their group sizes in turn over the
/// shapes. Four shapes in a row meet all imported formats, and the next four in another order.
fn storages(index: usize) -> Vec<Storage> {
    let (four, place) = (index / 4, index % 4);
    let chosen = |(i, format): &(usize, Format)| format.can_encode() || (i + four) % 4 == place;
    let quantized = Format::ALL.into_iter().enumerate().filter(chosen).map(|(_, format)| {
        let sizes = group_sizes(format);
        let turn = if format.can_encode() { index } else { four };
        Storage::Quantized(format, sizes[turn % sizes.len()])
    });
    DENSE.into_iter().chain(quantized).collect()
}

/// Every storage once, each format with one of its group sizes: those of the next `turn` are others where it has
/// several.
fn all_storages(turn: usize) -> Vec<Storage> {
    let quantized = Format::ALL.into_iter().enumerate().map(|(i, format)| {
        let sizes = group_sizes(format);
        Storage::Quantized(format, sizes[(i + turn) % sizes.len()])
    });
    DENSE.into_iter().chain(quantized).collect()
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    linear_shapes(runner);
    linear_weights(runner);
    linear_epilogues(runner);
    for dtype in runner.half_dtypes() {
        linear_halves(runner, dtype);
    }
    gated_up(runner);
    projections(runner);
    grid::run(runner);
    input_order::run(runner);
    for (turn, hidden) in [96, 129].into_iter().enumerate() {
        for storage in all_storages(turn) {
            runner.check(&EmbeddingCase::new(storage, hidden));
        }
    }
    runner.check(&EmbeddingCase { ids: vec![], ..EmbeddingCase::new(DENSE[0], 8) });
    bad_arguments(runner);
}

fn linear_shapes<B: Backend>(runner: &mut Runner<'_, B>) {
    for (index, (m, k, n)) in shapes().into_iter().enumerate() {
        for storage in storages(index) {
            runner.check(&LinearCase { m, k, n, storage, ..LINEAR });
        }
    }
    runner.check(&LinearCase { m: 0, ..LINEAR });
    let bias = LinearCase { k: 0, bias: true, activation: Activation::Silu, ..LINEAR };
    runner.check(&bias);
}

fn linear_weights<B: Backend>(runner: &mut Runner<'_, B>) {
    for format in Format::ALL {
        let n = 1 << format.code_bits();
        // Every slot of two packing units and of a third one that is cut off.
        let k = 2 * format.layout().codes_per_unit() + 1;
        let storage = Storage::Quantized(format, group_sizes(format)[0]);
        let input = Input::OneHot;
        runner.check(&LinearCase { m: k, k, n, storage, all_codes: true, input, ..LINEAR });
        for scales in [Scales::SomeZero, Scales::Large, Scales::Tiny] {
            for (m, group_size) in [(1, 32), (5, 32), (33, 128)] {
                let group_size = format.fixed_group_size().unwrap_or(group_size);
                if format.check_group_size(group_size).is_ok() {
                    let storage = Storage::Quantized(format, group_size);
                    runner.check(&LinearCase { m, storage, scales, ..LINEAR });
                }
            }
        }
        // Three super-blocks of those that have them, the last cut off; others meet more than 256 features elsewhere.
        if !format.can_encode() {
            for m in [1, 9] {
                runner.check(&LinearCase { m, k: 600, storage, ..LINEAR });
            }
        }
        // NaN in, NaN out, and no other row is touched.
        for m in [2, 9] {
            runner.check(&LinearCase { m, storage, input: Input::One(f32::NAN), ..LINEAR });
        }
    }
    for storage in DENSE {
        let input = Input::OneHot;
        runner.check(&LinearCase { m: 33, k: 33, storage, input, ..LINEAR });
        for value in [f32::NAN, f32::INFINITY] {
            runner.check(&LinearCase { storage, input: Input::One(value), ..LINEAR });
        }
        runner.check(&LinearCase { storage, input: Input::Scaled(6e4), ..LINEAR });
        runner.check(&LinearCase { storage, input: Input::Scaled(1e-30), ..LINEAR });
    }
    let storage = Storage::Dense(DType::BF16);
    runner.check(&LinearCase { storage, input: Input::Scaled(1e36), ..LINEAR });
}

fn linear_epilogues<B: Backend>(runner: &mut Runner<'_, B>) {
    let int4 = Storage::Quantized(Format::Int4S4, 32);
    for activation in ACTIVATIONS {
        let m = special_values(activation).len();
        let input = Input::Special;
        runner.check(&LinearCase { m, k: 1, n: 1, activation, input, ..LINEAR });
        for (m, storage) in [(1, int4), (9, int4), (3, DENSE[0]), (33, DENSE[2])] {
            for (bias, out_scale, residual) in
                [(false, 1.0, Add::Nothing), (true, 1.0, Add::Tensor), (true, 0.7, Add::InPlace)]
            {
                let case = LinearCase { m, storage, bias, activation, out_scale, residual, ..LINEAR };
                runner.check(&case);
            }
        }
    }
    for (out_scale, residual) in [(1.0, Add::InPlace), (-2.5, Add::Nothing), (0.0, Add::Tensor), (1.8, Add::Tensor)] {
        for storage in storages(2) {
            runner.check(&LinearCase { storage, out_scale, residual, ..LINEAR });
        }
    }
}

/// Activations of a 16-bit type, in the shapes that tensor cores take and just beside them.
fn linear_halves<B: Backend>(runner: &mut Runner<'_, B>, dtype: DType) {
    const FORMATS: [Format; 3] = [Format::Int4S4, Format::Int4U4, Format::Fp4E2m1];
    let case = LinearCase { k: 256, n: 64, dtypes: (dtype, dtype), ..LINEAR };
    for m in (1..=17).chain([63, 64, 65, 512, 515]) {
        runner.check(&LinearCase { m, storage: Storage::Quantized(Format::Int4S4, 32), ..case });
    }
    for format in FORMATS {
        let storage = |group_size| Storage::Quantized(format, group_size);
        // One-hot rows: every code of every column by itself.
        runner.check(&LinearCase { m: 128, k: 128, storage: storage(64), input: Input::OneHot, ..case });
        for m in [1, 12, 20, 130] {
            for group_size in [32, 64, 128, 384] {
                runner.check(&LinearCase { m, k: 384, n: 96, storage: storage(group_size), ..case });
            }
            for scales in [Scales::SomeZero, Scales::Large, Scales::Tiny] {
                let dtypes = (dtype, DType::F32);
                runner.check(&LinearCase { m, storage: storage(32), scales, dtypes, ..case });
            }
            runner.check(&LinearCase { m, k: 2048, n: 32, storage: storage(128), dtypes: (dtype, DType::F32), ..case });
            runner.check(&LinearCase { m, k: 224, n: 33, storage: storage(32), ..case });
        }
    }
    let storage = Storage::Quantized(Format::Int4S4, 64);
    for m in [1, 9, 40, 70] {
        for (out_scale, residual) in [(1.0, Add::Nothing), (0.7, Add::Tensor), (-2.5, Add::InPlace)] {
            let (bias, activation) = (true, Activation::Silu);
            runner.check(&LinearCase { m, storage, bias, activation, out_scale, residual, ..case });
        }
        // NaN in, NaN out, and no other row is touched.
        runner.check(&LinearCase { m: m + 1, storage, input: Input::One(f32::NAN), ..case });
    }
    runner.check(&LinearCase { m: 20, k: 2048, storage, residual: Add::Tensor, ..case });
    for storage in all_storages(0) {
        runner.check(&LinearCase { m: 5, k: 256, n: 64, storage, dtypes: (dtype, dtype), ..LINEAR });
    }
}

fn gated_up<B: Backend>(runner: &mut Runner<'_, B>) {
    let quantized = |format, group_size| Storage::Quantized(format, group_size);
    for activation in ACTIVATIONS {
        for (m, gate, up) in [
            (1, quantized(Format::Fp4E2m1, 32), quantized(Format::Fp4E2m1, 32)),
            (5, quantized(Format::Int4U4, 32), quantized(Format::Int3, 32)),
            (33, DENSE[0], DENSE[0]),
        ] {
            for bias in [false, true] {
                runner.check(&GatedUpCase { m, gate, up, bias, activation, ..GATED_UP });
            }
        }
        runner.check(&GatedUpCase { activation, x_scale: 40.0, ..GATED_UP });
    }
    let ups = all_storages(0);
    for (index, gate) in all_storages(1).into_iter().enumerate() {
        let up = ups[(index + 3) % ups.len()];
        for m in [1, 2, 9] {
            runner.check(&GatedUpCase { m, gate, up, ..GATED_UP });
            runner.check(&GatedUpCase { m, gate, up: gate, n: 33, k: 200, ..GATED_UP });
        }
    }
    runner.check(&GatedUpCase { x_scale: 0.0, ..GATED_UP });
    runner.check(&GatedUpCase { m: 0, ..GATED_UP });
    runner.check(&GatedUpCase { n: 1, ..GATED_UP });
}

fn projections<B: Backend>(runner: &mut Runner<'_, B>) {
    for storage in all_storages(0) {
        for m in [1, 2, 9] {
            runner.check(&ProjectionsCase::new(m, storage));
        }
        runner.check(&ProjectionsCase { norm: None, bias: true, ..ProjectionsCase::new(1, storage) });
        runner.check(&ProjectionsCase { norm: None, ..ProjectionsCase::new(3, storage) });
        runner.check(&GatedUpCase { m: 1, gate: storage, up: storage, norm: true, ..GATED_UP });
        runner.check(&GatedUpCase { gate: storage, up: storage, norm: true, ..GATED_UP });
    }
    let int4 = Storage::Quantized(Format::Int4S4, 32);
    for k in [1, 63, 2048] {
        runner.check(&ProjectionsCase { k, ..ProjectionsCase::new(2, DENSE[0]) });
        runner.check(&ProjectionsCase { k, ..ProjectionsCase::new(1, int4) });
    }
    for norm in [Norm { offset: 1.0, eps: 1e-5 }, Norm { offset: 0.0, eps: 1e-2 }] {
        for x_scale in [1.0, 6e4, 1e-3] {
            runner.check(&ProjectionsCase { norm: Some(norm), x_scale, ..ProjectionsCase::new(5, int4) });
        }
    }
    // Several formats, each with its own order of int8 activations, and one product alone.
    let mixed = [(int4, 40), (Storage::Quantized(Format::Int3, 64), 17), (Storage::Quantized(Format::Int8, 32), 16)];
    for m in [1, 7] {
        for weights in [vec![mixed[0], mixed[1], mixed[2], (DENSE[1], 5)], vec![mixed[1]]] {
            runner.check(&ProjectionsCase { weights, ..ProjectionsCase::new(m, int4) });
        }
    }
    // Enough for several threads.
    for m in [1, 130] {
        let weights = vec![(int4, 513), (int4, 256), (DENSE[2], 129)];
        runner.check(&ProjectionsCase { k: 640, weights, ..ProjectionsCase::new(m, int4) });
    }
    runner.check(&ProjectionsCase::new(0, int4));
    let new = || ProjectionsCase::new(2, int4);
    let eps = |eps| Some(Norm { offset: 0.0, eps });
    runner.refuse("gamma of K + 1", &ProjectionsCase { gamma_columns: Some(201), ..new() }, Refusal::Shape("gamma"));
    runner.refuse("out of N + 1", &ProjectionsCase { out_columns: Some(34), ..new() }, Refusal::Shape("out"));
    runner.refuse("weight of another K", &ProjectionsCase { last_k: Some(64), ..new() }, Refusal::Shape("weight"));
    runner.refuse("eps 0", &ProjectionsCase { norm: eps(0.0), ..new() }, Refusal::Value("eps"));
    runner.refuse("eps NaN", &ProjectionsCase { norm: eps(f32::NAN), ..new() }, Refusal::Value("eps"));
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let case = LinearCase { x_columns: Some(199), ..LINEAR };
    runner.refuse("x of K - 1 columns", &case, Refusal::Shape("x"));
    let case = LinearCase { out_columns: Some(66), ..LINEAR };
    runner.refuse("out of N + 1 columns", &case, Refusal::Shape("out"));
    let case = LinearCase { out_scale: f32::NAN, ..LINEAR };
    runner.refuse("out_scale NaN", &case, Refusal::Value("out_scale"));
    let case = GatedUpCase { up_rows: Some(64), ..GATED_UP };
    runner.refuse("up of fewer rows than gate", &case, Refusal::Shape("up"));
    for storage in [DENSE[0], Storage::Quantized(Format::Int4S4, 32)] {
        let case = EmbeddingCase { ids: vec![0, 33], ..EmbeddingCase::new(storage, 96) };
        runner.refuse("id = vocabulary", &case, Refusal::Value("ids"));
    }
    let case = EmbeddingCase { ids: vec![u32::MAX], ..EmbeddingCase::new(DENSE[0], 8) };
    runner.refuse("id 2^32 - 1", &case, Refusal::Value("ids"));
    let case = EmbeddingCase { out_columns: Some(7), ..EmbeddingCase::new(DENSE[0], 8) };
    runner.refuse("out of another width", &case, Refusal::Shape("out"));
}
