//! Experts on tensor cores against the oracle: two formats among them, an expert without rows, all tile heights.

use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::{ExpertMlpArgs, GroupedGemmArgs, RowOrder};
use marlin_ops::oracle::Oracle;
use marlin_ops::{ExpertProjection, ExpertStack, ExpertWeights, HostTensor, MoeOps, OpError, Result, Weight};

use crate::moe::ExpertKernel;
use crate::test_values::{assert_rows, values};

/// LIN32 of the specification, relative to the norm of a row.
const BOUND: f64 = 1e-5;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 384;
const EXPERTS: usize = 6;
/// No token chooses it.
const IDLE: u32 = 3;

fn weight(format: Format, group_size: usize, n: usize, k: usize, seed: u32) -> Weight {
    let scheme = Scheme::new(format, group_size).unwrap();
    let matrix = QuantizedMatrix::encode(scheme, &values(n * k, seed), n, k).unwrap();
    Weight::quantized(matrix).unwrap().with_bias(values(n, seed + 1)).unwrap()
}

/// Every other expert in FP4, each with its own bias.
fn experts<D: MoeOps>(d: &D, others: Format) -> ExpertStack<D> {
    let expert = |e: usize| {
        let (format, seed) = (if e.is_multiple_of(2) { Format::Int4S4 } else { others }, 100 * e as u32);
        ExpertWeights {
            gate: weight(format, 32, INTERMEDIATE, HIDDEN, seed),
            up: weight(format, 64, INTERMEDIATE, HIDDEN, seed + 10),
            down: weight(format, 128, HIDDEN, INTERMEDIATE, seed + 20),
        }
    };
    ExpertStack::new(d, (0..EXPERTS).map(expert).collect()).unwrap()
}

/// Two of each token's: most tokens choose expert 0.
fn ids(tokens: usize) -> Vec<u32> {
    let others = [1, 2, 4, 5];
    (0..tokens).flat_map(|t| [if t % 4 == 3 { others[(t / 4 + 1) % 4] } else { 0 }, others[t / 4 % 4]]).collect()
}

fn mlp<D: MoeOps>(
    d: &D,
    tokens: usize,
    dtype: DType,
    others: Format,
    run: impl Fn(&D, ExpertMlpArgs<'_, D>) -> Result<()>,
) -> Result<Vec<f64>> {
    let x = d.upload(&HostTensor::from_f32_as(dtype, &[tokens, HIDDEN], &values(tokens * HIDDEN, 1))?)?;
    let ids = d.upload(&HostTensor::from_u32(&[tokens, 2], &ids(tokens))?)?;
    let weights = d.upload(&HostTensor::from_f32(&[tokens, 2], &values(tokens * 2, 2))?)?;
    let mut out = d.upload(&HostTensor::from_f32(&[tokens, HIDDEN], &vec![f32::NAN; tokens * HIDDEN])?)?;
    let experts = &experts(d, others);
    let (activation, residual) = (Activation::Silu, Residual::None);
    run(d, ExpertMlpArgs { x: &x, ids: &ids, weights: &weights, experts, activation, residual, out: &mut out })?;
    d.read_f64(&out)
}

#[test]
fn mlps_keep_the_precision_of_f32() {
    assert!(!ids(300).contains(&IDLE));
    let gpu = crate::cuda(None).unwrap();
    for (tokens, dtype) in [(1, DType::F32), (5, DType::F32), (40, DType::F16), (300, DType::F32)] {
        let expected = mlp(&Oracle::new(), tokens, dtype, Format::Fp4E2m1, |d, args| d.moe_expert_mlp(args)).unwrap();
        for tile_m in [32, 64, 128] {
            let kernel = ExpertKernel::tensor(tile_m);
            let run = |d: &crate::Cuda, args: ExpertMlpArgs<'_, _>| d.moe_expert_mlp_with(args, &kernel);
            let found = mlp(&gpu, tokens, dtype, Format::Fp4E2m1, run).unwrap();
            assert_rows(&format!("{tokens} tokens of {dtype:?}, tiles of {tile_m}"), &found, &expected, HIDDEN, BOUND);
        }
        let found = mlp(&gpu, tokens, dtype, Format::Fp4E2m1, |d, args| d.moe_expert_mlp(args)).unwrap();
        assert_rows(&format!("{tokens} tokens of {dtype:?}"), &found, &expected, HIDDEN, BOUND);
    }
}

#[test]
fn other_formats_go_elsewhere() {
    let gpu = crate::cuda(None).unwrap();
    let run = |d: &crate::Cuda, args: ExpertMlpArgs<'_, _>| d.moe_expert_mlp_with(args, &ExpertKernel::tensor(32));
    match mlp(&gpu, 9, DType::F32, Format::Int8, run) {
        Err(OpError::Unsupported { what, .. }) => assert!(what.contains("on tensor cores"), "{what}"),
        other => panic!("{other:?}"),
    }
    let found = mlp(&gpu, 9, DType::F32, Format::Int8, |d, args| d.moe_expert_mlp(args)).unwrap();
    let expected = mlp(&Oracle::new(), 9, DType::F32, Format::Int8, |d, args| d.moe_expert_mlp(args)).unwrap();
    assert_rows("int8", &found, &expected, HIDDEN, BOUND);
}

#[test]
fn sorted_rows_of_one_projection() {
    fn product<D: MoeOps>(
        d: &D,
        projection: ExpertProjection,
        sorted: bool,
        run: impl Fn(&D, GroupedGemmArgs<'_, D>) -> Result<()>,
    ) -> Vec<f64> {
        let tokens = 70;
        let [k, n] = match projection {
            ExpertProjection::Down => [INTERMEDIATE, HIDDEN],
            _ => [HIDDEN, INTERMEDIATE],
        };
        let rows = if sorted { 2 * tokens } else { tokens };
        let x = d.upload(&HostTensor::from_f32(&[rows, k], &values(rows * k, 3)).unwrap()).unwrap();
        let ids = d.upload(&HostTensor::from_u32(&[tokens, 2], &ids(tokens)).unwrap()).unwrap();
        let offsets =
            d.upload(&HostTensor::from_u32(&[EXPERTS + 1], &[0, 60, 61, 61, 100, 139, 140]).unwrap()).unwrap();
        let unwritten = vec![f32::NAN; 2 * tokens * n];
        let mut out = d.upload(&HostTensor::from_f32(&[2 * tokens, n], &unwritten).unwrap()).unwrap();
        let order = match sorted {
            true => RowOrder::Sorted { offsets: &offsets, permutation: None },
            false => RowOrder::Token { ids: &ids },
        };
        let (experts, activation) = (&experts(d, Format::Fp4E2m1), Activation::Silu);
        run(d, GroupedGemmArgs { x: &x, order, experts, projection, activation, out: &mut out }).unwrap();
        d.read_f64(&out).unwrap()
    }
    let gpu = crate::cuda(None).unwrap();
    for projection in [ExpertProjection::Gate, ExpertProjection::Up, ExpertProjection::Down] {
        for sorted in [false, true] {
            let expected = product(&Oracle::new(), projection, sorted, |d, args| d.moe_grouped_gemm(args));
            let columns = expected.len() / 140;
            let what = format!("{projection:?}, sorted: {sorted}");
            let kernel = ExpertKernel::tensor(32);
            let found = product(&gpu, projection, sorted, |d, args| d.moe_grouped_gemm_with(args, &kernel));
            assert_rows(&what, &found, &expected, columns, BOUND);
        }
    }
}
