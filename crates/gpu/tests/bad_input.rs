//! What a GPU refuses, with an error that says why, and odd shapes that it must take. On the Vulkan device of this machine,
//! software or not; without one each test prints a line `SKIPPED`.
#![cfg(feature = "vulkan")]

use std::io::Write;

use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_gpu::{AttentionKernel, Vulkan};
use marlin_ops::attention::{AttentionArgs, EmptyRow, KvFormat, KvPages, KvWriteArgs, PagedAttentionArgs, Window};
use marlin_ops::linear::{Activation, GatedUpArgs, LinearArgs, Residual};
use marlin_ops::moe::{GroupScore, RouteArgs, Routing, Scoring};
use marlin_ops::oracle::Oracle;
use marlin_ops::rope::{Pairing, RopeArgs, RopeConfig, RopeScaling, RopeTable};
use marlin_ops::{
    AttentionOps, Backend, Device, HostTensor, Linear, LinearOps, MoeOps, OpError, Result, RopeOps, Tensor, Weight,
};

fn device(test: &str) -> Option<Vulkan> {
    match marlin_gpu::vulkan(None) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            // Past the capture of the test harness, which hides what passing tests print.
            std::io::stderr().write_all(format!("SKIPPED: {test}, because {error}\n").as_bytes()).unwrap();
            None
        }
    }
}

/// Values in [-1/2, 1/2).
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn floats<D: Device>(d: &D, dims: &[usize], seed: u32) -> Tensor<D> {
    d.upload(&HostTensor::from_f32(dims, &values(dims.iter().product(), seed)).unwrap()).unwrap()
}

fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-6, |m: f64, v| m.max(v.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= 1e-5 * scale, "{what}: element {i} is {found}, expected {expected}");
    }
}

/// The same on the device and by the oracle.
macro_rules! assert_agree {
    ($what:expr, $gpu:expr, |$d:ident| $body:expr) => {{
        let found = {
            let $d = $gpu;
            $body
        };
        let expected = {
            let $d = &Oracle::new();
            $body
        };
        assert_close($what, &found.unwrap(), &expected.unwrap());
    }};
}

#[test]
fn tensors_beyond_the_device_are_refused() {
    let Some(gpu) = device("large tensors on Vulkan") else { return };
    // 4 TiB; and bytes that overflow.
    for elements in [1usize << 40, 1 << 62, usize::MAX] {
        let error = gpu.zeros(DType::F32, &[elements]).unwrap_err().to_string();
        assert!(error.contains("vulkan allows"), "{error}");
    }
    assert_eq!(gpu.read_f32(&gpu.zeros(DType::F32, &[3]).unwrap()).unwrap(), [0.0; 3], "the device works on");
}

fn dense(n: usize, k: usize) -> Weight {
    Weight::dense(HostTensor::from_f32_as(DType::BF16, &[n, k], &values(n * k, 1)).unwrap()).unwrap()
}

fn quantized(format: Format, group_size: usize, n: usize, k: usize) -> Weight {
    let scheme = Scheme::new(format, group_size).unwrap();
    Weight::quantized(QuantizedMatrix::encode(scheme, &values(n * k, 1), n, k).unwrap()).unwrap()
}

fn linear<D: LinearOps>(d: &D, m: usize, weight: Weight) -> Result<Vec<f64>> {
    let bias = values(weight.out_features(), 3);
    let weight = Linear::new(d, weight.with_bias(bias)?)?;
    let (n, k) = (weight.out_features(), weight.in_features());
    let (x, mut out) = (floats(d, &[m, k], 2), floats(d, &[m, n], 4));
    let (activation, residual) = (Activation::None, Residual::None);
    d.linear(LinearArgs { x: &x, weight: &weight, activation, out_scale: 1.0, residual, out: &mut out })?;
    d.read_f64(&out)
}

#[test]
fn empty_products_are_products() {
    let Some(gpu) = device("empty products on Vulkan") else { return };
    let gpu = &gpu;
    for (m, n, k) in [(0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0)] {
        assert_agree!(&format!("M={m} N={n} K={k}"), gpu, |d| linear(d, m, dense(n, k)));
    }
    fn gated<D: LinearOps>(d: &D, [m, n, k]: [usize; 3]) -> Result<Vec<f64>> {
        let [gate, up] = [Linear::new(d, dense(n, k))?, Linear::new(d, dense(n, k))?];
        let (x, mut out) = (floats(d, &[m, k], 2), floats(d, &[m, n], 4));
        d.gated_up(GatedUpArgs {
            x: &x,
            norm: None,
            gate: &gate,
            up: &up,
            activation: Activation::Silu,
            out: &mut out,
        })?;
        d.read_f64(&out)
    }
    for shape in [[0, 5, 8], [3, 0, 8], [3, 5, 0]] {
        assert_agree!(&format!("gated {shape:?}"), gpu, |d| gated(d, shape));
    }
}

#[test]
fn misaligned_shapes_and_groups_work() {
    let Some(gpu) = device("misaligned products on Vulkan") else { return };
    let gpu = &gpu;
    for (m, n, k) in [(1, 1, 1), (3, 5, 7), (1, 33, 31), (19, 31, 65)] {
        assert_agree!(&format!("bf16 M={m} N={n} K={k}"), gpu, |d| linear(d, m, dense(n, k)));
        assert_agree!(&format!("int4 M={m} N={n} K={k}"), gpu, |d| {
            linear(d, m, quantized(Format::Int4S4, 32, n, k))
        });
    }
    // Groups that no tile divides, and one beyond K.
    for group_size in [8, 24, 40, 1024] {
        assert_agree!(&format!("groups of {group_size}"), gpu, |d| {
            linear(d, 2, quantized(Format::Int4S4, group_size, 9, 100))
        });
    }
    let error = Scheme::new(Format::Int4S4, 12).unwrap_err().to_string();
    assert!(error.contains("multiple of 8"), "{error}");
}

fn attention<D: AttentionOps>(d: &D, head_dim: usize) -> Result<Vec<f64>> {
    let (q, k) = (floats(d, &[1, 3, 2, head_dim], 1), floats(d, &[1, 1, 9, head_dim], 2));
    let (v, mut out) = (floats(d, &[1, 1, 9, head_dim], 3), floats(d, &[1, 3, 2, head_dim], 4));
    d.attention(attend(&q, &k, &v, &mut out))?;
    d.read_f64(&out)
}

fn attend<'a, D: Device>(
    q: &'a Tensor<D>,
    k: &'a Tensor<D>,
    v: &'a Tensor<D>,
    out: &'a mut Tensor<D>,
) -> AttentionArgs<'a, D> {
    AttentionArgs {
        q,
        k,
        v,
        kv_len: &[7],
        scale: 0.3,
        causal: true,
        window: Window::None,
        softcap: None,
        mask: None,
        sinks: None,
        empty_row: EmptyRow::Error,
        out,
    }
}

#[test]
fn head_dimensions_have_no_limit_but_kernels_do() {
    let Some(gpu) = device("head dimensions on Vulkan") else { return };
    let gpu = &gpu;
    for head_dim in [0, 1, 33, 576] {
        assert_agree!(&format!("head dimension {head_dim}"), gpu, |d| attention(d, head_dim));
    }
    let [q, k, v] = [[1, 3, 2, 32], [1, 1, 9, 32], [1, 1, 9, 32]].map(|dims| floats(gpu, &dims, 1));
    let mut out = floats(gpu, &[1, 3, 2, 32], 1);
    let kernel = AttentionKernel { q_tile: 64, kv_tile: 1024, chunk: 32, splits: 1 };
    let error = gpu.attention_with(attend(&q, &k, &v, &mut out), kernel).unwrap_err().to_string();
    assert!(error.contains("bytes of shared memory, the device has"), "{error}");

    let config = RopeConfig { theta: 1e4, rotary_dim: 4098, scaling: RopeScaling::Default };
    let table = RopeTable::new(gpu, &config, 1).unwrap();
    let (mut x, positions) = (floats(gpu, &[1, 1, 4098], 1), gpu.zeros(DType::U32, &[1]).unwrap());
    let (positions, pairing) = (&positions, Pairing::InterleavedToHalf);
    let args = RopeArgs { x: &mut x, positions, table: &table, pairing, offset: 0, inverse: false };
    let error = gpu.rope(args).unwrap_err();
    assert!(matches!(error, OpError::Unsupported { .. }) && error.to_string().contains("at most 4096"), "{error}");
}

#[test]
fn too_many_experts_are_refused_by_their_number() {
    let Some(gpu) = device("experts on Vulkan") else { return };
    let logits = floats(&gpu, &[1, 2000], 1);
    let (mut ids, mut weights) = (gpu.zeros(DType::U32, &[1, 2]).unwrap(), floats(&gpu, &[1, 2], 1));
    let routing = Routing {
        top_k: 2,
        scoring: Scoring::Softmax,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::TopTwoSum,
        norm_topk_prob: true,
        norm_eps: 0.0,
        routed_scaling_factor: 1.0,
    };
    let args = RouteArgs { logits: &logits, bias: None, routing, ids: &mut ids, weights: &mut weights };
    let error = gpu.moe_route(args).unwrap_err().to_string();
    assert!(error.contains("2000 experts, at most 1920"), "{error}");
}

/// Decode of two sequences, the first with 5 keys in blocks of 4, over a table of two blocks each.
fn paged<B: Backend>(b: &B, second: usize, table: [u32; 4], empty_row: EmptyRow) -> Result<Vec<f64>> {
    let pages = |seed| KvPages::from_tensors(KvFormat::F32, 16, floats(b, &[3, 1, 4, 16], seed), None);
    let (keys, values) = (pages(1)?, pages(2)?);
    let (q, mut out) = (floats(b, &[2, 1, 2, 16], 3), floats(b, &[2, 1, 2, 16], 4));
    b.paged_attention(PagedAttentionArgs {
        q: &q,
        keys: &keys,
        values: &values,
        block_table: &b.upload(&HostTensor::from_u32(&[2, 2], &table)?)?,
        kv_len: &[5, second],
        scale: 0.25,
        causal: true,
        window: Window::None,
        softcap: None,
        sinks: None,
        empty_row,
        out: &mut out,
    })?;
    b.read_f64(&out)
}

#[test]
fn paged_decode_checks_lengths_and_blocks() {
    let Some(gpu) = device("paged decode on Vulkan") else { return };
    let gpu = &gpu;
    let error = paged(gpu, 0, [0, 1, 2, 2], EmptyRow::Error).unwrap_err().to_string();
    assert!(error.contains("kv_len"), "{error}");
    assert_agree!("a sequence of no keys", gpu, |d| paged(d, 0, [0, 1, 9, 9], EmptyRow::Zero));
    assert!(paged(gpu, 0, [0, 1, 9, 9], EmptyRow::Zero).unwrap()[32..].iter().all(|&v| v == 0.0));

    // The second entry of the first row is read for key 4, the second of the other row is not.
    for bad in [3, u32::MAX] {
        let error = paged(gpu, 4, [0, bad, 2, 9], EmptyRow::Error).unwrap_err().to_string();
        assert!(error.contains("`block_table` [1] is no block"), "{error}");
    }
    assert_agree!("good blocks after bad ones", gpu, |d| paged(d, 4, [2, 1, 0, 9], EmptyRow::Error));
}

#[test]
fn a_step_is_of_one_position() {
    let Some(gpu) = device("steps on Vulkan") else { return };
    let gpu = &gpu;
    let row = floats(gpu, &[1, 1, 32], 1);
    let [mut k, mut v] = [2, 3].map(|seed| floats(gpu, &[1, 1, 9, 32], seed));
    let mut write =
        |start| gpu.kv_write(KvWriteArgs { k: &row, v: &row, k_cache: &mut k, v_cache: &mut v, sequence: 0, start });
    let step: Result<()> = gpu.run_step(6, &mut None, || write(6));
    step.unwrap();
    let step: Result<()> = gpu.run_step(6, &mut None, || write(5));
    let error = step.unwrap_err().to_string();
    assert!(error.contains("start") && error.contains("the step of position 6"), "{error}");
    write(5).expect("the step is over");

    let (q, mut out) = (floats(gpu, &[1, 3, 2, 32], 1), floats(gpu, &[1, 3, 2, 32], 1));
    let step: Result<()> = gpu.run_step(5, &mut None, || gpu.attention(attend(&q, &k, &v, &mut out)));
    let error = step.unwrap_err().to_string();
    assert!(error.contains("kv_len") && error.contains("the step of position 5"), "{error}");
    let cached = gpu.read_f32(&k).unwrap();
    assert_eq!(cached[5 * 32..6 * 32], cached[6 * 32..7 * 32], "rows 5 and 6 are the same");
}
