//! Batches of products, and epilogues on their own.

use marlin_formats::{DType, Format, Scheme};
use marlin_ops::linear::{
    Activation, BatchStrides, BatchedMatrix, BatchedShape, BatchedWeight, EpilogueArgs, GemmBatchedArgs,
};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Add, Output, floats_as, ids, poison_as};
use crate::linear::{ACTIVATIONS, slope, special_tolerance, special_values, transcendental};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32, relative_ulp};

/// How the weights of a batch are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weights {
    Dense { dtype: DType, transposed: bool },
    Quantized(Format, usize),
}

/// Operands that all entries or all heads share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shared {
    a: bool,
    weight: bool,
    scales: bool,
}

/// What is wrong with a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Nothing,
    /// A stride with which the last matrix ends one element behind the tensor.
    Reach(&'static str),
    /// A stride of 2^62, whose multiples do not fit 64 bits.
    HugeStride,
    /// Rows of `a` overlap.
    RowStride,
    /// Heads of the output overlap.
    Overlap,
    /// Weight heads that do not divide the heads.
    Heads,
    /// As many row counts as entries and one more.
    RowCounts,
    /// A row count above M.
    TooManyRows,
    /// f32 scales.
    ScaleType,
    /// Zero points that the format does not have.
    Zeros,
    /// An infinite alpha.
    Alpha,
}

#[derive(Clone, Debug)]
struct BatchedCase {
    shape: BatchedShape,
    weights: Weights,
    io: DType,
    shared: Shared,
    /// Elements between rows.
    pad: usize,
    /// Heads lie within rows: `[B, M, H, K]`.
    interleaved: bool,
    /// Factor of `a`.
    a_scale: f32,
    alpha: f32,
    activation: Activation,
    rows: Option<Vec<usize>>,
    bad: Bad,
}

const SHAPE: BatchedShape = BatchedShape { batch: 3, heads: 2, weight_heads: 2, m: 5, n: 33, k: 40 };
const FP4: Weights = Weights::Quantized(Format::Fp4E2m1, 16);

fn batched(weights: Weights) -> BatchedCase {
    BatchedCase {
        shape: SHAPE,
        weights,
        io: DType::F32,
        shared: Shared::default(),
        pad: 0,
        interleaved: false,
        a_scale: 1.0,
        alpha: 1.0,
        activation: Activation::None,
        rows: None,
        bad: Bad::Nothing,
    }
}

/// Strides of matrices `[batch, heads, rows, columns]` and the elements that they take.
fn place(
    [batch, heads, rows, columns]: [usize; 4],
    pad: usize,
    interleaved: bool,
    shared: bool,
) -> (BatchStrides, usize) {
    let heads = if shared { 1 } else { heads };
    let pitch = columns + pad;
    let strides = match interleaved {
        true => BatchStrides { batch: rows * heads * pitch, head: pitch, row: heads * pitch },
        false => BatchStrides { batch: heads * rows * pitch, head: rows * pitch, row: pitch },
    };
    match shared {
        true => (BatchStrides { batch: 0, head: 0, ..strides }, rows * pitch),
        false => (strides, batch * heads * rows * pitch),
    }
}

impl BatchedCase {
    /// Strides of an operand, elements, and values that are NaN between rows.
    fn matrices(
        &self,
        dims: [usize; 4],
        shared: bool,
        scale: f32,
        random: &mut Random,
    ) -> (BatchStrides, usize, Vec<f32>) {
        let (strides, len) = place(dims, self.pad, self.interleaved, shared);
        let pitch = dims[3] + self.pad;
        let value = |i: usize| if i % pitch < dims[3] { random.normal() * scale } else { f32::NAN };
        (strides, len, (0..len).map(value).collect())
    }
}

impl Case for BatchedCase {
    const OPERATION: &'static str = "gemm_batched";

    fn configuration(&self) -> String {
        let BatchedShape { batch, heads, weight_heads, m, n, k } = self.shape;
        let Self { weights, io, shared, pad, interleaved, a_scale, alpha, activation, rows, .. } = self;
        format!(
            "B={batch} H={heads}/{weight_heads} M={m} N={n} K={k} {weights:?} io={} {shared:?} pad={pad} \
             interleaved={interleaved} a*{a_scale} alpha={alpha} {activation:?} rows={rows:?}",
            io.name()
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let BatchedShape { batch, heads, weight_heads, m, n, k } = self.shape;
        let (mut a_strides, len, a) = self.matrices([batch, heads, m, k], self.shared.a, self.a_scale, random);
        let a = floats_as(b, self.io, &[len], &a)?;
        let weight_dims = match self.weights {
            Weights::Dense { transposed: true, .. } => [batch, weight_heads, n, k],
            Weights::Dense { .. } => [batch, weight_heads, k, n],
            Weights::Quantized(..) => [batch, weight_heads, k.div_ceil(8), n],
        };
        let (mut strides, len, values) = self.matrices(weight_dims, self.shared.weight, 1.0, random);
        let group_size = if let Weights::Quantized(_, group_size) = self.weights { group_size } else { 8 };
        let group_dims = [batch, weight_heads, k.div_ceil(group_size), n];
        let (mut scale_strides, scale_len, scales) = self.matrices(group_dims, self.shared.scales, 1.0 / 32.0, random);
        let zeros: Vec<f32> = (0..scale_len).map(|_| random.below(120) as f32 / 8.0).collect();
        let (mut out_strides, out_len) = place([batch, heads, m, n], self.pad, self.interleaved, false);
        let mut out = poison_as(b, self.io, &[out_len])?;

        let mut shape = self.shape;
        let mut rows = self.rows.clone();
        match self.bad {
            Bad::Nothing | Bad::ScaleType | Bad::Zeros | Bad::Alpha => {}
            Bad::Reach("a") => a_strides.batch += 1,
            Bad::Reach("weight") => strides.batch += 1,
            Bad::Reach("out") => out_strides.batch += 1,
            Bad::Reach(_) => scale_strides.batch += 1,
            Bad::HugeStride => a_strides.batch = 1 << 62,
            Bad::RowStride => a_strides.row = k - 1,
            Bad::Overlap => out_strides.head = 0,
            Bad::Heads => shape.weight_heads = heads + 1,
            Bad::RowCounts => rows = Some(vec![m; batch + 1]),
            Bad::TooManyRows => rows = Some(vec![m + 1; batch]),
        }
        let dense_type = if let Weights::Dense { dtype, .. } = self.weights { dtype } else { DType::F32 };
        let dense = floats_as(b, dense_type, &[len], &values)?;
        let codes: Vec<u32> = (0..len).map(|_| random.word()).collect();
        let codes = ids(b, &[len], &codes)?;
        let scale_type = if self.bad == Bad::ScaleType { DType::F32 } else { DType::F16 };
        let scales = floats_as(b, scale_type, &[scale_len], &scales)?;
        let zeros = floats_as(b, DType::F16, &[scale_len], &zeros)?;
        b.gemm_batched(GemmBatchedArgs {
            shape,
            a: BatchedMatrix { tensor: &a, strides: a_strides },
            weight: match self.weights {
                Weights::Dense { transposed, .. } => {
                    BatchedWeight::Dense { values: BatchedMatrix { tensor: &dense, strides }, transposed }
                }
                Weights::Quantized(format, group_size) => BatchedWeight::Quantized {
                    scheme: Scheme { format, group_size },
                    codes: BatchedMatrix { tensor: &codes, strides },
                    scales: BatchedMatrix { tensor: &scales, strides: scale_strides },
                    zeros: (format.has_zeros() || self.bad == Bad::Zeros)
                        .then_some(BatchedMatrix { tensor: &zeros, strides: scale_strides }),
                },
            },
            alpha: if self.bad == Bad::Alpha { f32::INFINITY } else { self.alpha },
            activation: self.activation,
            rows: rows.as_deref(),
            out: &mut out,
            out_strides,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let BatchedShape { batch, heads, m, n, k, .. } = self.shape;
        let pitch = n + self.pad;
        let block = if n >= 16 { pitch } else { batch * heads * m * pitch };
        let (bound, ulp) = match self.io {
            DType::F16 => (tolerance::LINEAR_F16, relative_ulp(DType::F16)),
            DType::BF16 => (tolerance::LINEAR_BF16, relative_ulp(DType::BF16)),
            _ => (tolerance::LINEAR, 2.0 * U32),
        };
        // Sums of K products of at most about 3 times 3, or 3 times 15 steps (IQ4: levels of up to 127) of 3/32.
        let largest = if matches!(self.weights, Weights::Quantized(Format::Iq4Nl, _)) { 36.0 } else { 9.0 };
        let largest = largest * f64::from(self.a_scale) * f64::from(self.alpha.abs()) * k as f64;
        let own = if transcendental(self.activation) { tolerance::ACTIVATION } else { 0.0 };
        let absolute = slope(self.activation, largest) * largest * ((k + 2) as f64 * U32 + own);
        let elements =
            Tolerance::Elements { ulps: 0.0, relative: ulp, absolute: vec![absolute; batch * heads * m * pitch] };
        vec![Tolerance::All(vec![Tolerance::Blocks { block, bound }, elements])]
    }
}

#[derive(Clone, Copy)]
struct EpilogueCase {
    m: usize,
    n: usize,
    dtype: DType,
    bias: bool,
    activation: Activation,
    out_scale: f32,
    residual: Add,
    special: bool,
    bias_columns: usize,
    residual_columns: usize,
}

const EPILOGUE: EpilogueCase = EpilogueCase {
    m: 5,
    n: 65,
    dtype: DType::F32,
    bias: false,
    activation: Activation::None,
    out_scale: 1.0,
    residual: Add::Nothing,
    special: false,
    bias_columns: 65,
    residual_columns: 65,
};

impl EpilogueCase {
    fn sized(m: usize, n: usize) -> Self {
        Self { m, n, bias_columns: n, residual_columns: n, ..EPILOGUE }
    }

    /// x, bias and residual.
    fn inputs(&self) -> [Vec<f32>; 3] {
        let random = &mut Random::of(&self.configuration());
        let x = match self.special {
            true => special_values(self.activation),
            false => random.normals(self.m * self.n).iter().map(|v| 3.0 * v).collect(),
        };
        [x, random.normals(self.bias_columns), random.normals(self.m * self.residual_columns)]
    }

    /// Whether the result is one rounding of an exact value.
    fn is_exact(&self) -> bool {
        let plain = self.out_scale == 1.0 && self.residual == Add::Nothing;
        plain && matches!(self.activation, Activation::None | Activation::Relu)
    }
}

impl Case for EpilogueCase {
    const OPERATION: &'static str = "apply_epilogue";

    fn configuration(&self) -> String {
        let Self { m, n, dtype, bias, activation, out_scale, residual, special, .. } = self;
        let special = if *special { " special values" } else { "" };
        let dtype = dtype.name();
        format!("[{m}, {n}] {dtype} bias={bias} {activation:?} out_scale={out_scale} residual={residual:?}{special}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let [x, bias, residual] = self.inputs();
        let mut x = floats_as(b, self.dtype, &[self.m, self.n], &x)?;
        let bias = floats_as(b, self.dtype, &[self.bias_columns], &bias)?;
        let residual = floats_as(b, self.dtype, &[self.m, self.residual_columns], &residual)?;
        b.apply_epilogue(EpilogueArgs {
            x: &mut x,
            bias: self.bias.then_some(&bias),
            activation: self.activation,
            out_scale: self.out_scale,
            residual: self.residual.of(&residual),
        })?;
        Ok(vec![Output::floats(b, "x", &x)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        if self.special {
            return vec![special_tolerance(self.activation)];
        }
        if self.is_exact() {
            return vec![match self.dtype {
                DType::F32 => Tolerance::Elements { ulps: 0.5, relative: 0.0, absolute: vec![] },
                _ => Tolerance::Exact,
            }];
        }
        let own = if transcendental(self.activation) { tolerance::ACTIVATION } else { 0.0 };
        let [x, bias, residual] = self.inputs();
        let absolute = x.iter().enumerate().map(|(i, x)| {
            let bias = if self.bias { f64::from(bias[i % self.n]).abs() } else { 0.0 };
            let size = f64::from(*x).abs() + bias;
            let added = match self.residual {
                Add::Nothing => 0.0,
                Add::Tensor => f64::from(residual[i]).abs(),
                Add::InPlace => f64::from(*x).abs(),
            };
            let least = if self.activation == Activation::Sigmoid { 1.0 } else { 0.0 };
            let value = (slope(self.activation, size) * size + least) * f64::from(self.out_scale).abs();
            value * (4.0 * U32 + own) + added * U32
        });
        let relative = if self.dtype == DType::F32 { 0.0 } else { relative_ulp(self.dtype) };
        vec![Tolerance::Elements { ulps: 1.0, relative, absolute: absolute.collect() }]
    }
}

/// FP4 batches with own operands, and with each of these (`a`, `w`, `scales`) shared.
pub(crate) fn quantized_batches(io: DType, broadcast: &[&str]) -> Vec<impl Case + use<>> {
    let mut cases = Vec::new();
    for name in std::iter::once("none").chain(broadcast.iter().copied()) {
        let shared = Shared { a: name == "a", weight: name == "w", scales: name == "scales" };
        for (m, n, k) in [(5, 33, 40), (17, 64, 64), (70, 31, 9)] {
            let shape = BatchedShape { m, n, k, ..SHAPE };
            cases.push(BatchedCase { shape, io, shared, ..batched(FP4) });
        }
    }
    cases
}

/// Queries times the keys of the head that their group shares.
pub(crate) fn grouped_heads(io: DType) -> Vec<impl Case + use<>> {
    let weights = Weights::Dense { dtype: io, transposed: true };
    let mut cases = Vec::new();
    for (heads, weight_heads) in [(4, 1), (8, 2), (8, 8)] {
        for (m, n, k) in [(5, 33, 40), (64, 65, 128)] {
            let shape = BatchedShape { batch: 2, heads, weight_heads, m, n, k };
            cases.push(BatchedCase { shape, io, ..batched(weights) });
        }
    }
    // Sums beyond the range of f16, and scaled back.
    let shape = BatchedShape { k: 128, ..SHAPE };
    cases.push(BatchedCase { shape, io, a_scale: 2e4, alpha: 1e-4, ..batched(weights) });
    cases
}

/// Epilogues of 16-bit rows, in place.
pub(crate) fn standalone_epilogues(dtype: DType, bias: bool, activation: Activation) -> Vec<impl Case + use<>> {
    let sizes = [(5, 65), (130, 33), (1, 7)];
    sizes.map(|(m, n)| EpilogueCase { dtype, bias, activation, ..EpilogueCase::sized(m, n) }).to_vec()
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    products(runner);
    layouts(runner);
    bad_products(runner);
    epilogues(runner);
}

fn products<B: Backend>(runner: &mut Runner<'_, B>) {
    let dense = |transposed| Weights::Dense { dtype: DType::F16, transposed };
    for weights in [FP4, Weights::Quantized(Format::Int4U4, 32), Weights::Quantized(Format::Int4S4, 8), dense(true)] {
        for batch in [0, 1, 3, 17] {
            runner.check(&BatchedCase { shape: BatchedShape { batch, ..SHAPE }, ..batched(weights) });
        }
        for (m, n, k) in [(1, 1, 1), (0, 5, 7), (17, 64, 64), (64, 65, 130), (70, 31, 9), (3, 5, 0)] {
            runner.check(&BatchedCase { shape: BatchedShape { batch: 2, m, n, k, ..SHAPE }, ..batched(weights) });
        }
    }
    for weights in [Weights::Quantized(Format::Nf4, 24), Weights::Quantized(Format::Iq4Nl, 32)] {
        runner.check(&batched(weights));
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for transposed in [false, true] {
            runner.check(&batched(Weights::Dense { dtype, transposed }));
        }
    }
    for (heads, weight_heads) in [(4, 1), (8, 2), (8, 8)] {
        for weights in [dense(true), FP4] {
            let shape = BatchedShape { heads, weight_heads, ..SHAPE };
            runner.check(&BatchedCase { shape, ..batched(weights) });
        }
    }
    // Sums beyond the range of f16, and scaled back.
    let shape = BatchedShape { k: 128, ..SHAPE };
    runner.check(&BatchedCase { shape, a_scale: 2e4, ..batched(dense(true)) });
    runner.check(&BatchedCase { shape, a_scale: 2e4, alpha: 1e-4, io: DType::F16, ..batched(dense(true)) });
    for io in [DType::F16, DType::BF16] {
        for weights in [dense(true), FP4] {
            runner.check(&BatchedCase { io, ..batched(weights) });
        }
    }
    for activation in ACTIVATIONS {
        runner.check(&BatchedCase { activation, alpha: 0.25, ..batched(FP4) });
    }
    for activation in [Activation::Sigmoid, Activation::GeluErf] {
        let shape = BatchedShape { k: 0, ..SHAPE };
        runner.check(&BatchedCase { shape, activation, ..batched(dense(false)) });
    }
}

fn layouts<B: Backend>(runner: &mut Runner<'_, B>) {
    for bits in 0..8 {
        let shared = Shared { a: bits & 1 > 0, weight: bits & 2 > 0, scales: bits & 4 > 0 };
        for weights in [FP4, Weights::Quantized(Format::Int4U4, 24)] {
            runner.check(&BatchedCase { shared, ..batched(weights) });
        }
    }
    let dense = Weights::Dense { dtype: DType::F16, transposed: true };
    for weights in [FP4, dense, Weights::Dense { dtype: DType::BF16, transposed: false }] {
        for (pad, interleaved) in [(3, false), (0, true), (7, true)] {
            runner.check(&BatchedCase { pad, interleaved, ..batched(weights) });
        }
        runner.check(&BatchedCase { rows: Some(vec![2, 0, 5]), ..batched(weights) });
        runner.check(&BatchedCase { rows: Some(vec![0; 3]), ..batched(weights) });
    }
    // A stride beyond any memory between entries of which there is one.
    let shape = BatchedShape { batch: 1, ..SHAPE };
    runner.check(&BatchedCase { shape, bad: Bad::HugeStride, ..batched(FP4) });
}

fn bad_products<B: Backend>(runner: &mut Runner<'_, B>) {
    let dense = Weights::Dense { dtype: DType::F16, transposed: true };
    let mut refuse = |what: &str, weights, bad, refusal| {
        runner.refuse(what, &BatchedCase { bad, ..batched(weights) }, refusal);
    };
    for operand in ["a", "weight", "scales", "out"] {
        refuse(&format!("`{operand}` ends too early"), FP4, Bad::Reach(operand), Refusal::Shape(operand));
    }
    refuse("dense weights end too early", dense, Bad::Reach("weight"), Refusal::Shape("weight"));
    refuse("a stride of 2^62", FP4, Bad::HugeStride, Refusal::Shape("a"));
    refuse("rows that overlap", FP4, Bad::RowStride, Refusal::Value("a"));
    refuse("outputs that overlap", FP4, Bad::Overlap, Refusal::Value("out_strides"));
    refuse("Hq % Hkv", dense, Bad::Heads, Refusal::Value("weight_heads"));
    refuse("a row count too many", dense, Bad::RowCounts, Refusal::Shape("rows"));
    refuse("more rows than M", dense, Bad::TooManyRows, Refusal::Value("rows"));
    refuse("f32 scales", FP4, Bad::ScaleType, Refusal::DType("scales"));
    refuse("zeros of fp4", FP4, Bad::Zeros, Refusal::Value("zeros"));
    refuse("an infinite alpha", FP4, Bad::Alpha, Refusal::Value("alpha"));
    let eight_bits = Weights::Quantized(Format::Int8, 16);
    refuse("8-bit codes", eight_bits, Bad::Nothing, Refusal::Value("scheme"));
    refuse("offsets", Weights::Quantized(Format::Q4_1, 32), Bad::Nothing, Refusal::Value("scheme"));
}

fn epilogues<B: Backend>(runner: &mut Runner<'_, B>) {
    for activation in ACTIVATIONS {
        let m = special_values(activation).len();
        runner.check(&EpilogueCase { activation, special: true, ..EpilogueCase::sized(m, 1) });
        for bias in [false, true] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                runner.check(&EpilogueCase { activation, bias, dtype, ..EPILOGUE });
            }
            for residual in [Add::Tensor, Add::InPlace] {
                runner.check(&EpilogueCase { activation, bias, residual, out_scale: -1.75, ..EPILOGUE });
            }
        }
    }
    for (m, n) in [(0, 7), (1, 1), (130, 31), (2, 1000)] {
        for residual in [Add::Nothing, Add::Tensor] {
            let activation = Activation::Silu;
            runner.check(&EpilogueCase { activation, bias: true, residual, ..EpilogueCase::sized(m, n) });
        }
    }
    let case = EpilogueCase { bias: true, bias_columns: 64, ..EPILOGUE };
    runner.refuse("a short bias", &case, Refusal::Shape("bias"));
    let case = EpilogueCase { residual: Add::Tensor, residual_columns: 66, ..EPILOGUE };
    runner.refuse("a wide residual", &case, Refusal::Shape("residual"));
    let case = EpilogueCase { out_scale: f32::NAN, ..EPILOGUE };
    runner.refuse("out_scale NaN", &case, Refusal::Value("out_scale"));
}
