//! EXL3 weights: every rate and codebook, sizes that are not whole Hadamard blocks, epilogues, gated products of
//! different rates, weights decoded to floats.

use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::linear::{Activation, EmbeddingArgs, GatedUpArgs, LinearArgs, Projection, ProjectionsArgs};
use marlin_ops::{Backend, Linear, Result, Weight, WeightData};

use crate::case::{Case, Mode, Runner};
use crate::input::{Add, Output, floats, floats_as, ids, poison, poison_as};
use crate::linear::{GATED_NORM, after_norm, by_rows, rows, slope};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32, exl3, relative_ulp};
use crate::weight::{DENSE, Scales, Storage, random_weight};

/// Products with bias, and what each may be off: the specification's share of `|svh|` times the RMS of the outputs of
/// its Hadamard block before `svh` and bias, `[m, n]` each. For other weights the error of f32 linear layers; behind
/// an input norm, of whose mode `norm` is, that of [`after_norm`].
fn products(weight: &Weight, x: &[f64], norm: Option<Mode>) -> Result<Vec<(f64, f64)>> {
    let (k, n) = (weight.in_features(), weight.out_features());
    let bias = |n: usize| weight.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
    let WeightData::Exl3(q) = &weight.data else {
        let w = weight.to_f32()?;
        let share = (k + 4) as f64 * U32;
        let product = |x: &[f64], n: usize| -> (f64, f64) {
            let terms = x.iter().zip(&w[n * k..]).map(|(x, &w)| x * f64::from(w));
            let size = terms.clone().map(f64::abs).sum::<f64>() + bias(n).abs();
            (terms.sum::<f64>() + bias(n), share * size)
        };
        let rows = x.chunks_exact(k);
        let mut out: Vec<_> = rows.flat_map(|x| (0..n).map(|n| product(x, n)).collect::<Vec<_>>()).collect();
        if let Some(mode) = norm {
            out.iter_mut().zip(after_norm(weight, x, mode)?).for_each(|((_, error), bound)| *error = bound.error);
        }
        return Ok(out);
    };
    // The block's outputs in the padding count too.
    let whole = Exl3Matrix { out_features: q.padded_out(), ..q.clone() };
    let w = whole.decode_f64()?;
    let svh: Vec<f64> = q.svh.iter().map(|&bits| f16::from_bits(bits).to_f64()).collect();
    let mut out = Vec::new();
    for x in x.chunks_exact(k) {
        let y: Vec<f64> = w.chunks_exact(k).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        let row = out.len();
        for (y, svh) in y.chunks(HADAMARD).zip(svh.chunks(HADAMARD)) {
            // Outputs without a scale say nothing about the block.
            let z: Vec<f64> = y.iter().zip(svh).filter(|(_, svh)| **svh != 0.0).map(|(y, svh)| y / svh).collect();
            let rms = (z.iter().map(|z| z * z).sum::<f64>() / z.len() as f64).sqrt();
            out.extend(y.iter().zip(svh).map(|(&y, svh)| (y, tolerance::EXL3 * svh.abs() * rms)));
        }
        out.truncate(row + n);
        out[row..].iter_mut().enumerate().for_each(|(n, (y, _))| *y += bias(n));
    }
    Ok(out)
}

/// The rows that products take, in f64.
fn inputs_of(x: &[f32], k: usize, norm: bool) -> Vec<f64> {
    if norm { GATED_NORM.apply(x, k) } else { x.iter().copied().map(f64::from).collect() }
}

/// The bound on relF of a product.
fn relative(storage: Storage, mode: Mode) -> f64 {
    if storage.rotates() { exl3(mode) } else { tolerance::LINEAR }
}

/// `elements`, and the bound on relF where there are enough outputs to average cancellation out.
fn with_relative(m: usize, n: usize, bound: f64, elements: Tolerance) -> Tolerance {
    if m * n >= 16 { Tolerance::All(vec![by_rows(m, n, bound), elements]) } else { elements }
}

#[derive(Clone, Copy)]
struct Exl3Case {
    m: usize,
    k: usize,
    n: usize,
    storage: Storage,
    bias: bool,
    activation: Activation,
    out_scale: f32,
    residual: Add,
    /// Factor on normal activations.
    x_scale: f32,
    /// Of x, the output and the residual.
    dtype: DType,
}

const CASE: Exl3Case = Exl3Case {
    m: 3,
    k: 256,
    n: 128,
    storage: Storage::Exl3(Codebook::Mul1, 3),
    bias: false,
    activation: Activation::None,
    out_scale: 1.0,
    residual: Add::Nothing,
    x_scale: 1.0,
    dtype: DType::F32,
};

impl Exl3Case {
    fn inputs(&self, random: &mut Random) -> Result<(Weight, Vec<f32>)> {
        let weight = random_weight(self.storage, self.n, self.k, Scales::Usual, random)?;
        let weight = match self.bias {
            true => weight.with_bias(random.normals(self.n))?,
            false => weight,
        };
        Ok((weight, random.normals(self.m * self.k).iter().map(|v| v * self.x_scale).collect()))
    }
}

impl Case for Exl3Case {
    const OPERATION: &'static str = "linear";

    fn configuration(&self) -> String {
        let Self { m, k, n, storage, bias, activation, out_scale, residual, x_scale, dtype } = self;
        let dtype = if *dtype == DType::F32 { String::new() } else { format!(" {}", dtype.name().to_lowercase()) };
        format!(
            "{storage} M={m} K={k} N={n} bias={bias} {activation:?} out_scale={out_scale} residual={residual:?} \
             x*{x_scale:e}{dtype}"
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (weight, x) = self.inputs(random)?;
        let weight = Linear::new(b, weight)?;
        let x = floats_as(b, self.dtype, &[self.m, self.k], &x)?;
        let dims = [self.m, self.n];
        let residual = floats_as(b, self.dtype, &dims, &random.normals(self.m * self.n))?;
        let mut out = self.residual.output(b, self.dtype, &dims, || random.normals(self.m * self.n))?;
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
        let (weight, x) =
            self.inputs(&mut Random::of(&self.configuration())).expect("the inputs are valid: the case ran");
        let products = products(&weight, &inputs_of(&x, self.k, false), None).expect("the weight is valid");
        let absolute = products.into_iter().map(|(y, error)| {
            let own = tolerance::ACTIVATION * y.abs();
            f64::from(self.out_scale).abs() * (slope(self.activation, y.abs() + error) * error + own)
        });
        let absolute = absolute.collect();
        let bound = match self.dtype {
            DType::F16 => tolerance::LINEAR_F16,
            DType::BF16 => tolerance::LINEAR_BF16,
            _ => {
                let elements = Tolerance::Elements { ulps: 2.0, relative: 2.0 * U32, absolute };
                return vec![with_relative(self.m, self.n, relative(self.storage, mode), elements)];
            }
        };
        // The expected value is rounded too: beside the product's error they may end one ulp apart.
        let elements = Tolerance::Elements { ulps: 2.0, relative: relative_ulp(self.dtype), absolute };
        vec![Tolerance::All(vec![by_rows(self.m, self.n, bound), elements])]
    }
}

struct GatedCase {
    m: usize,
    k: usize,
    n: usize,
    gate: Storage,
    up: Storage,
    bias: bool,
    norm: bool,
}

impl GatedCase {
    fn inputs(&self) -> Result<(Weight, Weight, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let mut gate = random_weight(self.gate, self.n, self.k, Scales::Usual, random)?;
        let mut up = random_weight(self.up, self.n, self.k, Scales::Usual, random)?;
        if self.bias {
            (gate, up) = (gate.with_bias(random.normals(self.n))?, up.with_bias(random.normals(self.n))?);
        }
        Ok((gate, up, rows(self.m, self.k, 1.0, self.norm.then_some(GATED_NORM), &[], random)))
    }
}

impl Case for GatedCase {
    const OPERATION: &'static str = "gated_up";

    fn configuration(&self) -> String {
        let Self { m, k, n, gate, up, bias, norm } = self;
        format!("{gate} x {up} M={m} K={k} I={n} bias={bias} norm={norm}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (gate, up, x) = self.inputs()?;
        let (gate, up) = (Linear::new(b, gate)?, Linear::new(b, up)?);
        let x = floats(b, &[self.m, self.k], &x)?;
        let gamma = floats(b, &[self.k], &GATED_NORM.gamma(self.k))?;
        let norm = self.norm.then(|| GATED_NORM.input(&gamma));
        let mut out = poison(b, &[self.m, self.n])?;
        let activation = Activation::Silu;
        b.gated_up(GatedUpArgs { x: &x, norm, gate: &gate, up: &up, activation, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        let (gate, up, x) = self.inputs().expect("the inputs are valid: the case ran");
        let x = inputs_of(&x, self.k, self.norm);
        let products = |weight: &Weight| products(weight, &x, self.norm.then_some(mode)).expect("the weight is valid");
        let absolute = products(&gate).into_iter().zip(products(&up)).map(|((g, dg), (u, du))| {
            let g = g.abs() + tolerance::ACTIVATION;
            slope(Activation::Silu, g) * dg * (u.abs() + du) + g * (du + tolerance::ACTIVATION * u.abs())
        });
        let elements = Tolerance::Elements { ulps: 2.0, relative: 4.0 * U32, absolute: absolute.collect() };
        let bound = match mode {
            Mode::Exact => tolerance::LINEAR,
            Mode::Int8Activations | Mode::F16Activations => tolerance::EXL3_ROWS,
        };
        vec![with_relative(self.m, self.n, bound, elements)]
    }
}

struct ProjectionsCase {
    m: usize,
    k: usize,
    weights: Vec<(Storage, usize)>,
    bias: bool,
    norm: bool,
}

impl ProjectionsCase {
    fn inputs(&self) -> Result<(Vec<Weight>, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let mut weights = Vec::new();
        for &(storage, n) in &self.weights {
            let weight = random_weight(storage, n, self.k, Scales::Usual, random)?;
            weights.push(if self.bias { weight.with_bias(random.normals(n))? } else { weight });
        }
        Ok((weights, rows(self.m, self.k, 1.0, self.norm.then_some(GATED_NORM), &[], random)))
    }
}

impl Case for ProjectionsCase {
    const OPERATION: &'static str = "projections";

    fn configuration(&self) -> String {
        let weights: Vec<String> = self.weights.iter().map(|(storage, n)| format!("{storage} N={n}")).collect();
        let Self { m, k, bias, norm, .. } = self;
        format!("{} M={m} K={k} bias={bias} norm={norm}", weights.join(", "))
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (weights, x) = self.inputs()?;
        let x = floats(b, &[self.m, self.k], &x)?;
        let gamma = floats(b, &[self.k], &GATED_NORM.gamma(self.k))?;
        let norm = self.norm.then(|| GATED_NORM.input(&gamma));
        let mut outs = Vec::new();
        for weight in &weights {
            outs.push(poison(b, &[self.m, weight.out_features()])?);
        }
        let weights = weights.into_iter().map(|weight| Linear::new(b, weight)).collect::<Result<Vec<_>>>()?;
        let mut projections: Vec<_> =
            weights.iter().zip(&mut outs).map(|(weight, out)| Projection { weight, out }).collect();
        b.projections(ProjectionsArgs { x: &x, norm, projections: &mut projections })?;
        outs.iter().map(|out| Output::floats(b, "out", out)).collect()
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        let (weights, x) = self.inputs().expect("the inputs are valid: the case ran");
        let x = inputs_of(&x, self.k, self.norm);
        let tolerance = |(weight, &(storage, n)): (&Weight, &(Storage, usize))| {
            let products = products(weight, &x, self.norm.then_some(mode)).expect("the weight is valid");
            let absolute = products.into_iter().map(|(_, error)| error).collect();
            let elements = Tolerance::Elements { ulps: 2.0, relative: 0.0, absolute };
            with_relative(self.m, n, relative(storage, mode), elements)
        };
        weights.iter().zip(&self.weights).map(tolerance).collect()
    }
}

/// Weights decoded to floats. The rotations cancel: values are sums of 128 x 128 terms, so that f32 has an absolute
/// error too.
fn decoded(dtype: DType, elements: usize) -> Vec<Tolerance> {
    vec![Tolerance::Elements { ulps: 1.0, relative: relative_ulp(dtype), absolute: vec![256.0 * U32; elements] }]
}

/// Rows of a table.
struct EmbeddingCase {
    storage: Storage,
    n: usize,
    k: usize,
}

impl EmbeddingCase {
    fn ids(&self) -> [u32; 4] {
        [0, self.n as u32 - 1, 1, 0]
    }
}

impl Case for EmbeddingCase {
    const OPERATION: &'static str = "embedding";

    fn configuration(&self) -> String {
        let Self { storage, n, k } = self;
        format!("{storage} vocab={n} hidden={k}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let table = Linear::new(b, random_weight(self.storage, self.n, self.k, Scales::Usual, random)?)?;
        let rows = ids(b, &[self.ids().len()], &self.ids())?;
        let mut out = poison(b, &[self.ids().len(), self.k])?;
        b.embedding(EmbeddingArgs { ids: &rows, table: &table, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        decoded(DType::F32, self.ids().len() * self.k)
    }
}

/// The output features `first ..` in an order.
#[derive(Clone, Copy)]
struct DequantizeCase {
    storage: Storage,
    n: usize,
    k: usize,
    order: WeightOrder,
    first: usize,
    dtype: DType,
}

impl Case for DequantizeCase {
    const OPERATION: &'static str = "dequantize";

    fn configuration(&self) -> String {
        let Self { storage, n, k, order, first, dtype } = self;
        format!("{storage} N={n} K={k} {order:?} from {first} {}", dtype.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let weight = Linear::new(b, random_weight(self.storage, self.n, self.k, Scales::Usual, random)?)?;
        let count = self.n - self.first;
        let dims = match self.order {
            WeightOrder::OutputMajor => [count, self.k],
            WeightOrder::InputMajor => [self.k, count],
        };
        let mut out = poison_as(b, self.dtype, &dims)?;
        b.dequantize(DequantizeArgs { weight: &weight, first: self.first, order: self.order, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        decoded(self.dtype, (self.n - self.first) * self.k)
    }
}

/// Every rate and codebook.
pub(crate) fn storages() -> Vec<Storage> {
    (1..=8).flat_map(|bits| Codebook::ALL.map(|codebook| Storage::Exl3(codebook, bits))).collect()
}

/// Activations of a 16-bit type, which tensor cores may take.
fn halves<B: Backend>(runner: &mut Runner<'_, B>, dtype: DType, few: &[Storage]) {
    for storage in storages() {
        for (m, k, n) in [(1, 256, 128), (2, 200, 65), (5, 384, 272), (33, 129, 300)] {
            runner.check(&Exl3Case { m, k, n, storage, dtype, ..CASE });
        }
    }
    for &storage in few {
        // Every shape of a kernel for many rows, with an even and an odd number of Hadamard blocks.
        for (m, n) in [9, 20, 70, 260].into_iter().flat_map(|m| [(m, 100), (m, 200)]) {
            runner.check(&Exl3Case { m, k: 300, n, storage, dtype, ..CASE });
        }
        for m in [1, 2, 5, 33] {
            runner.check(&Exl3Case { m, k: 1100, n: 272, storage, dtype, ..CASE });
            for (activation, bias, out_scale, residual) in
                [(Activation::None, true, -2.5, Add::Tensor), (Activation::Silu, true, 0.7, Add::InPlace)]
            {
                let case =
                    Exl3Case { m, k: 200, n: 200, storage, bias, activation, out_scale, residual, dtype, ..CASE };
                runner.check(&case);
            }
            // Beyond the range of f16, and below it.
            for x_scale in [1e-20, 1e8] {
                if dtype == DType::BF16 {
                    runner.check(&Exl3Case { m, storage, x_scale, dtype, ..CASE });
                }
            }
        }
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let storages = storages();
    for &storage in &storages {
        for (m, k, n) in [(1, 256, 128), (2, 128, 256), (5, 200, 65), (16, 512, 128), (33, 129, 300)] {
            runner.check(&Exl3Case { m, k, n, storage, ..CASE });
        }
    }
    let few =
        [Storage::Exl3(Codebook::Mul1, 3), Storage::Exl3(Codebook::Mcg, 4), Storage::Exl3(Codebook::ThreeInst, 5)];
    for storage in few {
        for m in [1, 2, 3, 4, 6, 7, 9, 13, 130] {
            runner.check(&Exl3Case { m, k: 384, n: 272, storage, ..CASE });
        }
        for (k, n) in [(1, 1), (7, 16), (127, 129), (384, 1), (640, 17), (1100, 257)] {
            for m in [1, 4] {
                runner.check(&Exl3Case { m, k, n, storage, ..CASE });
            }
        }
        for m in [1, 9] {
            for (activation, bias, out_scale, residual) in [
                (Activation::None, true, 1.0, Add::Nothing),
                (Activation::None, false, -2.5, Add::Tensor),
                (Activation::Silu, true, 0.7, Add::InPlace),
                (Activation::Relu2, true, 1.0, Add::Tensor),
                (Activation::GeluTanh, false, 1.0, Add::Nothing),
            ] {
                let case = Exl3Case { m, k: 200, n: 200, storage, bias, activation, out_scale, residual, ..CASE };
                runner.check(&case);
            }
            for x_scale in [0.0, 1e-20, 1e-34, 6e4] {
                runner.check(&Exl3Case { m, storage, x_scale, ..CASE });
            }
        }
        runner.check(&Exl3Case { m: 0, storage, ..CASE });
    }
    for dtype in runner.half_dtypes() {
        halves(runner, dtype, &few);
    }
    for_several(runner, few, &storages);
    decoded_weights(runner, &storages);
}

/// Operations on several weights, with other storages among them.
fn for_several<B: Backend>(runner: &mut Runner<'_, B>, few: [Storage; 3], storages: &[Storage]) {
    let int4 = Storage::Quantized(marlin_formats::Format::Int4S4, 32);
    for (gate, up) in [(few[0], few[0]), (few[0], few[1]), (few[2], int4), (int4, few[0]), (DENSE[1], few[1])] {
        for m in [1, 2, 5, 33] {
            for (k, n) in [(256, 128), (200, 300)] {
                runner.check(&GatedCase { m, k, n, gate, up, bias: false, norm: false });
            }
        }
        for (m, bias, norm) in OPTIONS {
            runner.check(&GatedCase { m, k: 200, n: 140, gate, up, bias, norm });
        }
    }
    let more: Vec<_> = storages.iter().map(|&storage| (storage, 40)).collect();
    for weights in [
        vec![(few[0], 256), (few[1], 128), (few[2], 65)],
        vec![(int4, 40), (few[0], 200), (DENSE[0], 17)],
        more[..6].to_vec(),
    ] {
        for m in [1, 2, 9, 130] {
            runner.check(&ProjectionsCase { m, k: 200, weights: weights.clone(), bias: false, norm: false });
        }
        for (m, bias, norm) in OPTIONS {
            runner.check(&ProjectionsCase { m, k: 200, weights: weights.clone(), bias, norm });
        }
    }
}

/// Rows, whether weights have a bias and whether the operation normalises its rows.
const OPTIONS: [(usize, bool, bool); 4] = [(1, true, false), (9, true, false), (1, false, true), (9, true, true)];

fn decoded_weights<B: Backend>(runner: &mut Runner<'_, B>, storages: &[Storage]) {
    let (n, k) = (140, 200);
    for &storage in storages {
        runner.check(&EmbeddingCase { storage, n, k });
        let order = WeightOrder::InputMajor;
        let case = DequantizeCase { storage, n, k, order, first: 0, dtype: DType::F32 };
        for (order, dtype) in [
            (WeightOrder::OutputMajor, DType::F32),
            (WeightOrder::InputMajor, DType::F32),
            (WeightOrder::OutputMajor, DType::F16),
            (WeightOrder::InputMajor, DType::BF16),
        ] {
            runner.check(&DequantizeCase { order, dtype, ..case });
        }
        runner.check(&DequantizeCase { first: 120, ..case });
    }
}
