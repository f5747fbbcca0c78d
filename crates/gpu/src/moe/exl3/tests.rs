//! Experts of different bit rates, codebooks and formats against the oracle.

use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::{ExpertMlpArgs, GroupedGemmArgs, RowOrder};
use marlin_ops::oracle::Oracle;
use marlin_ops::{ExpertProjection, ExpertStack, ExpertWeights, HostTensor, MoeOps, OpError, Result, Weight};

use crate::moe::{ExpertKernel, ExpertStrategy};
use crate::test_values::{assert_rows, exact_device, random, relative_norm, values};

const HIDDEN: usize = 136;
const INTERMEDIATE: usize = 200;
const EXPERTS: usize = 3;

fn trellis(codebook: Codebook, bits: u32, n: usize, k: usize, seed: u32) -> Weight {
    let padded = |size: usize| size.next_multiple_of(128);
    let scales = |count: usize, seed| {
        let signed =
            |word: u32| half::f16::from_f32(0.1 + (word % 64) as f32 / 256.0).to_bits() | (word as u16 & 0x8000);
        random(count, seed).into_iter().map(signed).collect()
    };
    let matrix = Exl3Matrix {
        codebook,
        bits,
        in_features: k,
        out_features: n,
        trellis: random(padded(k) * padded(n) * bits as usize / 16, seed).into_iter().map(|word| word as u16).collect(),
        suh: scales(padded(k), seed + 1),
        svh: scales(padded(n), seed + 2),
    };
    Weight::exl3(matrix).unwrap()
}

fn grouped(n: usize, k: usize, seed: u32) -> Weight {
    let scheme = Scheme::new(Format::Int4S4, if k.is_multiple_of(32) { 32 } else { 8 }).unwrap();
    Weight::quantized(QuantizedMatrix::encode(scheme, &values(n * k, seed), n, k).unwrap()).unwrap()
}

/// Those of gate, up and down.
const CODEBOOKS: [Codebook; 3] = [Codebook::Mcg, Codebook::Mul1, Codebook::ThreeInst];

/// Gate, up and down differ, and an expert may have one projection of another format.
fn experts<D: MoeOps>(
    d: &D,
    [hidden, intermediate]: [usize; 2],
    codebooks: [Codebook; 3],
    other: Option<(usize, ExpertProjection)>,
) -> ExpertStack<D> {
    let expert = |e: usize| {
        let seed = 100 * e as u32;
        let weight = |projection, codebook, bits, [n, k]: [usize; 2], seed| match other {
            Some(other) if other == (e, projection) => grouped(n, k, seed),
            _ => trellis(codebook, bits, n, k, seed).with_bias(values(n, seed + 3)).unwrap(),
        };
        let (up_sizes, down_sizes) = ([intermediate, hidden], [hidden, intermediate]);
        ExpertWeights {
            gate: weight(ExpertProjection::Gate, codebooks[0], 3, up_sizes, seed),
            up: weight(ExpertProjection::Up, codebooks[1], 4, up_sizes, seed + 10),
            down: weight(ExpertProjection::Down, codebooks[2], 2 + e as u32, down_sizes, seed + 20),
        }
    };
    ExpertStack::new(d, (0..EXPERTS).map(expert).collect()).unwrap()
}

fn ids(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).flat_map(|t| [t % 3, (t + 1 + t / 3 % 2) % 3]).collect()
}

/// Two of three experts for each token.
struct Case {
    tokens: usize,
    /// Hidden and intermediate features.
    sizes: [usize; 2],
    /// The expert and its projection of another format.
    other: Option<(usize, ExpertProjection)>,
    x: DType,
    codebooks: [Codebook; 3],
    ids: Vec<u32>,
}

impl Case {
    fn of_tokens(tokens: usize) -> Self {
        let (sizes, other) = ([HIDDEN, INTERMEDIATE], Some((2, ExpertProjection::Up)));
        Self { tokens, sizes, other, x: DType::F16, codebooks: CODEBOOKS, ids: ids(tokens) }
    }

    fn run<D: MoeOps>(&self, d: &D, run: impl Fn(&D, ExpertMlpArgs<'_, D>) -> Result<()>) -> Result<Vec<f64>> {
        let (tokens, hidden) = (self.tokens, self.sizes[0]);
        let x = d.upload(&HostTensor::from_f32_as(self.x, &[tokens, hidden], &values(tokens * hidden, 1))?)?;
        let ids = d.upload(&HostTensor::from_u32(&[tokens, 2], &self.ids)?)?;
        let weights = d.upload(&HostTensor::from_f32(&[tokens, 2], &values(tokens * 2, 2))?)?;
        let mut out = d.upload(&HostTensor::from_f32(&[tokens, hidden], &vec![f32::NAN; tokens * hidden])?)?;
        let experts = &experts(d, self.sizes, self.codebooks, self.other);
        let (activation, residual) = (Activation::Silu, Residual::None);
        run(d, ExpertMlpArgs { x: &x, ids: &ids, weights: &weights, experts, activation, residual, out: &mut out })?;
        d.read_f64(&out)
    }
}

#[test]
fn mlps_agree() {
    let gpu = exact_device();
    for (tokens, kernel) in [
        (2, ExpertKernel::PARALLEL),
        (1, ExpertKernel::PARALLEL),
        (7, ExpertKernel::grouped(8)),
        (40, ExpertKernel::grouped(32)),
    ] {
        for other in [ExpertProjection::Gate, ExpertProjection::Up, ExpertProjection::Down] {
            let case = Case { other: Some((2, other)), ..Case::of_tokens(tokens) };
            let found = case.run(&gpu, |d, args| d.moe_expert_mlp_with(args, &kernel)).unwrap();
            let expected = case.run(&Oracle::new(), |d, args| d.moe_expert_mlp(args)).unwrap();
            let error = relative_norm(&found, &expected);
            assert!(error < 1e-5, "{tokens} tokens, another {other:?}, {kernel:?}: {error:e}");
        }
    }
}

/// Rows that are not sorted, in the mode that rounds: of one slice and of several, with padding and without, and next to
/// another format.
#[test]
fn few_rows_are_rounded_as_the_format_grants() {
    let gpu = exact_device().with_exact(false);
    let bound = if gpu.has_modes() { 8e-4 } else { 1e-5 };
    let mul1 = [Codebook::Mul1; 3];
    for (tokens, sizes, codebooks, other, x) in [
        (1, [HIDDEN, INTERMEDIATE], mul1, None, DType::F32),
        (2, [HIDDEN, INTERMEDIATE], mul1, Some((2, ExpertProjection::Down)), DType::F16),
        (4, [512, 1024], mul1, None, DType::F32),
        (3, [640, 1300], mul1, Some((0, ExpertProjection::Gate)), DType::BF16),
        (4, [640, 300], CODEBOOKS, None, DType::F32),
    ] {
        let case = Case { sizes, codebooks, other, x, ..Case::of_tokens(tokens) };
        let found = case.run(&gpu, |d, args| d.moe_expert_mlp(args)).unwrap();
        let expected = case.run(&Oracle::new(), |d, args| d.moe_expert_mlp(args)).unwrap();
        let what = format!("{tokens} tokens of {x:?}, {sizes:?} {codebooks:?}, another {other:?}");
        assert_rows(&what, &found, &expected, sizes[0], bound);
        let exact = case.run(&exact_device(), |d, args| d.moe_expert_mlp(args)).unwrap();
        assert_eq!(exact != found, gpu.has_modes(), "{what}");
    }
}

/// Whatever kernels compute the projections of the first group, which is expert 0 alone: each checks or leaves it to another.
#[test]
fn wrong_ids_are_reported() {
    let modes = [(true, Codebook::Mul1), (false, Codebook::Mul1), (false, Codebook::Mcg)];
    let others = [None, Some(ExpertProjection::Gate), Some(ExpertProjection::Up), Some(ExpertProjection::Down)];
    for ((exact, codebook), other) in modes.into_iter().flat_map(|mode| others.map(|other| (mode, other))) {
        let gpu = exact_device().with_exact(exact);
        let other = other.map(|other| (0, other));
        for (ids, reason) in
            [([0, 1, 2, EXPERTS as u32], "[3] is no expert"), ([0, 1, 2, 2], "[3] names an expert of its token again")]
        {
            let case = Case { codebooks: [codebook; 3], other, ids: ids.into(), ..Case::of_tokens(2) };
            match case.run(&gpu, |d, args| d.moe_expert_mlp(args)) {
                Err(OpError::Value { operand: "ids", reason: found, .. }) => assert!(found.contains(reason), "{found}"),
                outcome => panic!("{ids:?}, another {other:?}: {outcome:?}"),
            }
            // The next call starts afresh.
            Case::of_tokens(2).run(&gpu, |d, args| d.moe_expert_mlp(args)).unwrap();
        }
    }
}

#[test]
fn one_launch_cannot_rotate() {
    let outcome = Case::of_tokens(2).run(&exact_device(), |d, args| d.moe_expert_mlp_with(args, &ExpertKernel::FUSED));
    assert!(matches!(outcome, Err(OpError::Unsupported { .. })), "{outcome:?}");
    assert_eq!(ExpertKernel::FUSED.strategy, ExpertStrategy::Fused);
}

/// Where there are no fragments, the strategy is refused and not chosen.
#[cfg(not(feature = "cuda"))]
#[test]
fn tensor_cores_are_needed() {
    let gpu = exact_device();
    assert!(!crate::linear::exl3::tensor_cores(&gpu));
    let case = Case { other: None, ..Case::of_tokens(40) };
    match case.run(&gpu, |d, args| d.moe_expert_mlp_with(args, &ExpertKernel::tensor(32))) {
        Err(OpError::Unsupported { what, .. }) => assert!(what.contains("m16n8k16"), "{what}"),
        other => panic!("{other:?}"),
    }
    case.run(&gpu, |d, args| d.moe_expert_mlp(args)).unwrap();
}

/// Rows of one expert beyond a tile, experts without rows, padded sizes, and INT4 beside EXL3; the last two as they are
/// chosen. Tiles of 128 rows are refused.
#[cfg(feature = "cuda")]
#[test]
fn tensor_cores_agree() {
    let gpu = exact_device();
    let (padded, whole) = ([HIDDEN, INTERMEDIATE], [256, 384]);
    let [gate, up, down] =
        [ExpertProjection::Gate, ExpertProjection::Up, ExpertProjection::Down].map(|other| Some((2, other)));
    for (tokens, sizes, other, x, kernel) in [
        (1, padded, None, DType::F32, Some(ExpertKernel::tensor(32))),
        (40, padded, None, DType::F16, Some(ExpertKernel::tensor(32))),
        (40, whole, gate, DType::F32, Some(ExpertKernel::tensor(32))),
        (70, whole, up, DType::F32, Some(ExpertKernel::tensor(64))),
        (70, whole, down, DType::F32, Some(ExpertKernel::tensor(64))),
        (200, padded, None, DType::BF16, Some(ExpertKernel::tensor(64))),
        (9, padded, None, DType::F32, None),
        (300, whole, up, DType::F32, None),
    ] {
        let case = Case { sizes, other, x, ..Case::of_tokens(tokens) };
        let found = case.run(&gpu, |d, args| match kernel {
            Some(kernel) => d.moe_expert_mlp_with(args, &kernel),
            None => d.moe_expert_mlp(args),
        });
        let expected = case.run(&Oracle::new(), |d, args| d.moe_expert_mlp(args)).unwrap();
        let error = relative_norm(&found.unwrap(), &expected);
        assert!(error < 1e-5, "{tokens} tokens of {x:?}, another {other:?}, {kernel:?}: {error:e}");
    }
    let case = Case { sizes: whole, other: None, x: DType::F32, ..Case::of_tokens(8) };
    match case.run(&gpu, |d, args| d.moe_expert_mlp_with(args, &ExpertKernel::tensor(128))) {
        Err(OpError::Unsupported { what, .. }) => assert!(what.contains("tiles of 128 rows"), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn sorted_rows_of_one_projection() {
    fn product<D: MoeOps>(d: &D, projection: ExpertProjection) -> Vec<f64> {
        let tokens = 9;
        let [k, n] = match projection {
            ExpertProjection::Down => [INTERMEDIATE, HIDDEN],
            _ => [HIDDEN, INTERMEDIATE],
        };
        let x = d.upload(&HostTensor::from_f32(&[tokens, k], &values(tokens * k, 3)).unwrap()).unwrap();
        let ids = d.upload(&HostTensor::from_u32(&[tokens, 2], &ids(tokens)).unwrap()).unwrap();
        let unwritten = vec![f32::NAN; 2 * tokens * n];
        let mut out = d.upload(&HostTensor::from_f32(&[2 * tokens, n], &unwritten).unwrap()).unwrap();
        let (order, activation) = (RowOrder::Token { ids: &ids }, Activation::Silu);
        let experts = &experts(d, [HIDDEN, INTERMEDIATE], CODEBOOKS, Some((2, ExpertProjection::Up)));
        d.moe_grouped_gemm(GroupedGemmArgs { x: &x, order, experts, projection, activation, out: &mut out }).unwrap();
        d.read_f64(&out).unwrap()
    }
    let gpu = exact_device();
    for projection in [ExpertProjection::Gate, ExpertProjection::Up, ExpertProjection::Down] {
        let error = relative_norm(&product(&gpu, projection), &product(&Oracle::new(), projection));
        assert!(error < 1e-5, "{projection:?}: {error:e}");
    }
}

/// The factors of rotated rows are each row's own: sizes from 1e-20 to 1e20 among the rows of every expert.
#[test]
fn rows_of_one_expert_differ_in_size() {
    const TOKENS: usize = 30;
    fn product<D: MoeOps>(d: &D) -> Vec<f64> {
        let expert = |e: u32| ExpertWeights {
            gate: trellis(Codebook::Mcg, 3, INTERMEDIATE, HIDDEN, 100 * e),
            up: trellis(Codebook::Mcg, 3, INTERMEDIATE, HIDDEN, 100 * e + 10),
            down: trellis(Codebook::Mcg, 3, HIDDEN, INTERMEDIATE, 100 * e + 20),
        };
        let experts = &ExpertStack::new(d, (0..EXPERTS as u32).map(expert).collect()).unwrap();
        let mut x = values(TOKENS * HIDDEN, 3);
        for (token, row) in x.chunks_exact_mut(HIDDEN).enumerate() {
            let size = 10f32.powi(token as i32 * 7 % 41 - 20);
            row.iter_mut().for_each(|v| *v *= size);
        }
        let x = d.upload(&HostTensor::from_f32(&[TOKENS, HIDDEN], &x).unwrap()).unwrap();
        let ids = d.upload(&HostTensor::from_u32(&[TOKENS, 2], &ids(TOKENS)).unwrap()).unwrap();
        let unwritten = vec![f32::NAN; 2 * TOKENS * INTERMEDIATE];
        let mut out = d.upload(&HostTensor::from_f32(&[2 * TOKENS, INTERMEDIATE], &unwritten).unwrap()).unwrap();
        let (order, activation, projection) = (RowOrder::Token { ids: &ids }, Activation::None, ExpertProjection::Gate);
        d.moe_grouped_gemm(GroupedGemmArgs { x: &x, order, experts, projection, activation, out: &mut out }).unwrap();
        d.read_f64(&out).unwrap()
    }
    let (gpu, expected) = (exact_device(), product(&Oracle::new()));
    assert_rows("gate", &product(&gpu), &expected, INTERMEDIATE, 1e-5);
    if gpu.has_modes() {
        assert_rows("rounded", &product(&gpu.with_exact(false)), &expected, INTERMEDIATE, 6e-4);
    }
}
