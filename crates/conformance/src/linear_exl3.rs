//! EXL3 weights: every rate and codebook, sizes that are not whole Hadamard blocks, epilogues, gated products of
//! different rates, weights decoded to floats.

use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::linear::{Activation, EmbeddingArgs, GatedUpArgs, LinearArgs, Projection, ProjectionsArgs};
use marlin_ops::{Backend, Linear, Result, Weight, WeightData};

use crate::case::{Case, Mode, Runner};
use crate::input::{Add, Output, floats, ids, poison, poison_as};
use crate::linear::slope;
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32, relative_ulp};
use crate::weight::{DENSE, Scales, Storage, random_weight};

/// Products without bias, and what each may be off: the specification's share of `|svh|` times the RMS of the outputs
/// of its Hadamard block before `svh`, `[m, n]` each. For other weights the error of f32 linear layers.
fn products(weight: &Weight, x: &[f32]) -> Result<Vec<(f64, f64)>> {
    let (k, n) = (weight.in_features(), weight.out_features());
    let WeightData::Exl3(q) = &weight.data else {
        let w = weight.to_f32()?;
        let share = (k + 4) as f64 * U32;
        let dot = |x: &[f32], w: &[f32]| -> (f64, f64) {
            let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            (terms.clone().sum(), share * terms.map(f64::abs).sum::<f64>())
        };
        return Ok(x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect());
    };
    // The block's outputs in the padding count too.
    let whole = Exl3Matrix { out_features: q.padded_out(), ..q.clone() };
    let w = whole.decode_f64()?;
    let svh: Vec<f64> = q.svh.iter().map(|&bits| f16::from_bits(bits).to_f64()).collect();
    let mut out = Vec::new();
    for x in x.chunks_exact(k) {
        let y: Vec<f64> = w.chunks_exact(k).map(|w| w.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum()).collect();
        let row = out.len();
        for (y, svh) in y.chunks(HADAMARD).zip(svh.chunks(HADAMARD)) {
            // Outputs without a scale say nothing about the block.
            let z: Vec<f64> = y.iter().zip(svh).filter(|(_, svh)| **svh != 0.0).map(|(y, svh)| y / svh).collect();
            let rms = (z.iter().map(|z| z * z).sum::<f64>() / z.len() as f64).sqrt();
            out.extend(y.iter().zip(svh).map(|(&y, svh)| (y, tolerance::EXL3 * svh.abs() * rms)));
        }
        out.truncate(row + n);
    }
    Ok(out)
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
        let Self { m, k, n, storage, bias, activation, out_scale, residual, x_scale } = self;
        format!(
            "{storage} M={m} K={k} N={n} bias={bias} {activation:?} out_scale={out_scale} residual={residual:?} \
             x*{x_scale:e}"
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (weight, x) = self.inputs(random)?;
        let weight = Linear::new(b, weight)?;
        let x = floats(b, &[self.m, self.k], &x)?;
        let dims = [self.m, self.n];
        let residual = floats(b, &dims, &random.normals(self.m * self.n))?;
        let mut out = self.residual.output(b, DType::F32, &dims, || random.normals(self.m * self.n))?;
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

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let (weight, x) =
            self.inputs(&mut Random::of(&self.configuration())).expect("the inputs are valid: the case ran");
        let bias = |i: usize| weight.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i % self.n]));
        let products = products(&weight, &x).expect("the weight is valid").into_iter().enumerate();
        let absolute = products.map(|(i, (y, error))| {
            let y = (y + bias(i)).abs();
            let own = tolerance::ACTIVATION * y;
            f64::from(self.out_scale).abs() * (slope(self.activation, y + error) * error + own)
        });
        vec![Tolerance::Elements { ulps: 2.0, relative: 2.0 * U32, absolute: absolute.collect() }]
    }
}

struct GatedCase {
    m: usize,
    k: usize,
    n: usize,
    gate: Storage,
    up: Storage,
}

impl GatedCase {
    fn inputs(&self) -> Result<(Weight, Weight, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let gate = random_weight(self.gate, self.n, self.k, Scales::Usual, random)?;
        let up = random_weight(self.up, self.n, self.k, Scales::Usual, random)?;
        Ok((gate, up, random.normals(self.m * self.k)))
    }
}

impl Case for GatedCase {
    const OPERATION: &'static str = "gated_up";

    fn configuration(&self) -> String {
        format!("{} x {} M={} K={} I={}", self.gate, self.up, self.m, self.k, self.n)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (gate, up, x) = self.inputs()?;
        let (gate, up) = (Linear::new(b, gate)?, Linear::new(b, up)?);
        let x = floats(b, &[self.m, self.k], &x)?;
        let mut out = poison(b, &[self.m, self.n])?;
        let activation = Activation::Silu;
        b.gated_up(GatedUpArgs { x: &x, norm: None, gate: &gate, up: &up, activation, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let (gate, up, x) = self.inputs().expect("the inputs are valid: the case ran");
        let products = |weight: &Weight| products(weight, &x).expect("the weight is valid");
        let absolute = products(&gate).into_iter().zip(products(&up)).map(|((g, dg), (u, du))| {
            let g = g.abs() + tolerance::ACTIVATION;
            slope(Activation::Silu, g) * dg * (u.abs() + du) + g * (du + tolerance::ACTIVATION * u.abs())
        });
        vec![Tolerance::Elements { ulps: 2.0, relative: 4.0 * U32, absolute: absolute.collect() }]
    }
}

struct ProjectionsCase {
    m: usize,
    k: usize,
    weights: Vec<(Storage, usize)>,
}

impl ProjectionsCase {
    fn inputs(&self) -> Result<(Vec<Weight>, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let mut weights = Vec::new();
        for &(storage, n) in &self.weights {
            weights.push(random_weight(storage, n, self.k, Scales::Usual, random)?);
        }
        Ok((weights, random.normals(self.m * self.k)))
    }
}

impl Case for ProjectionsCase {
    const OPERATION: &'static str = "projections";

    fn configuration(&self) -> String {
        let weights: Vec<String> = self.weights.iter().map(|(storage, n)| format!("{storage} N={n}")).collect();
        format!("{} M={} K={}", weights.join(", "), self.m, self.k)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let (weights, x) = self.inputs()?;
        let x = floats(b, &[self.m, self.k], &x)?;
        let mut outs = Vec::new();
        for weight in &weights {
            outs.push(poison(b, &[self.m, weight.out_features()])?);
        }
        let weights = weights.into_iter().map(|weight| Linear::new(b, weight)).collect::<Result<Vec<_>>>()?;
        let mut projections: Vec<_> =
            weights.iter().zip(&mut outs).map(|(weight, out)| Projection { weight, out }).collect();
        b.projections(ProjectionsArgs { x: &x, norm: None, projections: &mut projections })?;
        outs.iter().map(|out| Output::floats(b, "out", out)).collect()
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let (weights, x) = self.inputs().expect("the inputs are valid: the case ran");
        let absolute = |weight: &Weight| {
            let products = products(weight, &x).expect("the weight is valid");
            products.into_iter().map(|(_, error)| error).collect()
        };
        let elements = |weight| Tolerance::Elements { ulps: 2.0, relative: 0.0, absolute: absolute(weight) };
        weights.iter().map(elements).collect()
    }
}

/// Weights decoded to floats: one row of a table, or all of them in an order.
#[derive(Clone, Copy)]
struct DecodedCase {
    storage: Storage,
    n: usize,
    k: usize,
    /// Of the features `first ..`, all of them; embedding rows when absent.
    order: Option<(WeightOrder, usize)>,
    dtype: DType,
}

impl Case for DecodedCase {
    const OPERATION: &'static str = "dequantize";

    fn configuration(&self) -> String {
        let Self { storage, n, k, order, dtype } = self;
        format!("{storage} N={n} K={k} {order:?} {}", dtype.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let weight = Linear::new(b, random_weight(self.storage, self.n, self.k, Scales::Usual, random)?)?;
        let Some((order, first)) = self.order else {
            let rows = [0, self.n as u32 - 1, 1, 0];
            let mut out = poison(b, &[rows.len(), self.k])?;
            b.embedding(EmbeddingArgs { ids: &ids(b, &[rows.len()], &rows)?, table: &weight, out: &mut out })?;
            return Ok(vec![Output::floats(b, "out", &out)?]);
        };
        let dims = match order {
            WeightOrder::OutputMajor => [self.n - first, self.k],
            WeightOrder::InputMajor => [self.k, self.n - first],
        };
        let mut out = poison_as(b, self.dtype, &dims)?;
        b.dequantize(DequantizeArgs { weight: &weight, first, order, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        // The rotations cancel: values are sums of 128 x 128 terms, so that f32 has an absolute error too.
        let absolute = vec![256.0 * U32; self.n.max(4) * self.k];
        vec![Tolerance::Elements { ulps: 1.0, relative: relative_ulp(self.dtype), absolute }]
    }
}

/// Every rate and codebook.
pub(crate) fn storages() -> Vec<Storage> {
    (1..=8).flat_map(|bits| Codebook::ALL.map(|codebook| Storage::Exl3(codebook, bits))).collect()
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
    let int4 = Storage::Quantized(marlin_formats::Format::Int4S4, 32);
    for (gate, up) in [(few[0], few[0]), (few[0], few[1]), (few[2], int4), (int4, few[0]), (DENSE[1], few[1])] {
        for m in [1, 2, 5, 33] {
            for (k, n) in [(256, 128), (200, 300)] {
                runner.check(&GatedCase { m, k, n, gate, up });
            }
        }
    }
    let more: Vec<_> = storages.iter().map(|&storage| (storage, 40)).collect();
    for m in [1, 2, 9, 130] {
        for weights in [
            vec![(few[0], 256), (few[1], 128), (few[2], 65)],
            vec![(int4, 40), (few[0], 200), (DENSE[0], 17)],
            more[..6].to_vec(),
        ] {
            runner.check(&ProjectionsCase { m, k: 200, weights });
        }
    }
    for &storage in &storages {
        let case = DecodedCase { storage, n: 140, k: 200, order: None, dtype: DType::F32 };
        runner.check(&case);
        for (order, dtype) in [
            (WeightOrder::OutputMajor, DType::F32),
            (WeightOrder::InputMajor, DType::F32),
            (WeightOrder::OutputMajor, DType::F16),
            (WeightOrder::InputMajor, DType::BF16),
        ] {
            runner.check(&DecodedCase { order: Some((order, 0)), dtype, ..case });
        }
        runner.check(&DecodedCase { order: Some((WeightOrder::InputMajor, 120)), ..case });
    }
}
