//! One or two configurations of every other family, on every instruction set.

mod common;

use common::{Computation, check, cpus, normals, poisoned, upload, upload_as, upload_ids};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::attention::{AttentionArgs, EmptyRow, KvWriteArgs, MlaAttentionArgs, Window};
use marlin_ops::hadamard::{HadamardArgs, HadamardKind};
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::{CombineArgs, ExpertMlpArgs, GroupArgs, GroupScore, RouteArgs, Routing, Scoring};
use marlin_ops::norm::{LayerNormArgs, RmsNormArgs, RmsNormInPlaceArgs};
use marlin_ops::oracle::Oracle;
use marlin_ops::rope::{MlaLatentWriteArgs, Pairing, RopeArgs, RopeConfig, RopeScaling, RopeTable};
use marlin_ops::sampling::{LogitsProcess, LogitsProcessArgs, SampleArgs, SampleFilter};
use marlin_ops::{
    Backend, Device, ExpertStack, ExpertWeights, HostTensor, Linear, OpError, Result, SamplingOps, Weight,
};

fn quantized(format: Format, n: usize, k: usize, seed: u64) -> Weight {
    let scheme = Scheme::new(format, 32).unwrap();
    let values = normals(n * k, seed);
    Weight::quantized(QuantizedMatrix::encode(scheme, &values, n, k).unwrap()).unwrap()
}

struct Norms;

impl Computation for Norms {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let dims = [5, 83];
        let x = upload(device, &dims, &normals(415, 1))?;
        let (gamma, beta) = (upload(device, &[83], &normals(83, 2))?, upload(device, &[83], &normals(83, 3))?);
        let mut h = upload(device, &dims, &normals(415, 4))?;
        let mut out = poisoned(device, &dims)?;
        device.rms_norm(RmsNormArgs {
            x: &x,
            residual: Some(&mut h),
            gamma: Some(&gamma),
            gamma_offset: 1.0,
            eps: 1e-6,
            out: &mut out,
        })?;
        let mut all = device.read_f64(&out)?;
        device.rms_norm_in_place(RmsNormInPlaceArgs { x: &mut h, gamma: &gamma, gamma_offset: 0.0, eps: 1e-5 })?;
        device.layer_norm(LayerNormArgs {
            x: &x,
            residual: Some(&mut h),
            gamma: &gamma,
            beta: Some(&beta),
            eps: 1e-5,
            out: &mut out,
        })?;
        all.extend(device.read_f64(&out)?);
        all.extend(device.read_f64(&h)?);
        Ok(all)
    }
}

#[test]
fn norms() {
    check(&Norms, true, 1e-6, "norms");
}

struct Rotary(Pairing);

impl Computation for Rotary {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let config = RopeConfig { theta: 1e4, rotary_dim: 8, scaling: RopeScaling::Default };
        let table = RopeTable::new(device, &config, 64)?;
        let positions = upload_ids(device, &[3], &[0, 5, 63])?;
        let mut x = upload(device, &[3, 2, 12], &normals(72, 1))?;
        device.rope(RopeArgs {
            x: &mut x,
            positions: &positions,
            table: &table,
            pairing: self.0,
            offset: 3,
            inverse: true,
        })?;
        let mut all = device.read_f64(&x)?;
        let latent = upload(device, &[3, 28], &normals(84, 2))?;
        let gamma = upload(device, &[20], &normals(20, 3))?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut cache = device.zeros(dtype, &[2, 5, 28])?;
            device.mla_latent_write(MlaLatentWriteArgs {
                x: &latent,
                gamma: Some(&gamma),
                eps: 1e-6,
                positions: &positions,
                table: &table,
                pairing: self.0,
                cache: &mut cache,
                sequence: 1,
                start: 2,
            })?;
            all.extend(device.read_f64(&cache)?);
        }
        Ok(all)
    }
}

#[test]
fn rotary() {
    for pairing in [Pairing::Interleaved, Pairing::Half, Pairing::InterleavedToHalf] {
        // A value next to a rounding border of bf16 may fall to either side.
        check(&Rotary(pairing), true, 1e-4, &format!("{pairing:?}"));
    }
}

struct Attend {
    queries: usize,
    /// Only the last query of each sequence is asked for.
    last: bool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    kv_len: [usize; 2],
    dtype: DType,
    causal: bool,
    window: Window,
    softcap: Option<f32>,
    mask: bool,
    sinks: bool,
}

const ATTEND: Attend = Attend {
    queries: 3,
    last: false,
    heads: 4,
    kv_heads: 2,
    head_dim: 24,
    value_dim: 70,
    kv_len: [150, 7],
    dtype: DType::F32,
    causal: true,
    window: Window::None,
    softcap: None,
    mask: false,
    sinks: false,
};

impl Computation for Attend {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let (sq, hq, hkv, d, dv) = (self.queries, self.heads, self.kv_heads, self.head_dim, self.value_dim);
        let capacity = 160;
        let asked = if self.last { 1 } else { sq };
        // Of `[groups, Sq, width]`.
        let asked_rows = |values: Vec<f32>, width: usize| -> Vec<f32> {
            let groups = values.chunks(sq * width);
            groups.flat_map(|group| group[(sq - asked) * width..].to_vec()).collect()
        };
        let q = upload(device, &[2, asked, hq, d], &asked_rows(normals(2 * sq * hq * d, 1), hq * d))?;
        let mut k = device.zeros(self.dtype, &[2, hkv, capacity, d])?;
        let mut v = device.zeros(self.dtype, &[2, hkv, capacity, dv])?;
        for (sequence, &len) in self.kv_len.iter().enumerate() {
            let seed = 10 + sequence as u64;
            let rows_k = upload(device, &[len, hkv, d], &normals(len * hkv * d, seed))?;
            let rows_v = upload(device, &[len, hkv, dv], &normals(len * hkv * dv, seed + 5))?;
            device.kv_write(KvWriteArgs {
                k: &rows_k,
                v: &rows_v,
                k_cache: &mut k,
                v_cache: &mut v,
                sequence,
                start: 0,
            })?;
        }
        let keys = self.kv_len[0].max(self.kv_len[1]);
        let mut mask = normals(hq * sq * keys, 20);
        mask.iter_mut().skip(1).step_by(3).for_each(|m| *m = f32::NEG_INFINITY);
        let mask = upload(device, &[1, hq, asked, keys], &asked_rows(mask, keys))?;
        let sinks = upload(device, &[hq], &normals(hq, 21))?;
        let mut out = poisoned(device, &[2, asked, hq, dv])?;
        device.attention(AttentionArgs {
            q: &q,
            k: &k,
            v: &v,
            kv_len: &self.kv_len,
            scale: 0.3,
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            mask: self.mask.then_some(&mask),
            sinks: self.sinks.then_some(&sinks),
            empty_row: EmptyRow::Zero,
            out: &mut out,
        })?;
        device.read_f64(&out)
    }
}

#[test]
fn attention() {
    let cases = [
        ATTEND,
        Attend { queries: 1, dtype: DType::BF16, ..ATTEND },
        Attend { queries: 130, kv_len: [150, 140], dtype: DType::F16, ..ATTEND },
        Attend { window: Window::Left(5), sinks: true, ..ATTEND },
        Attend { causal: false, queries: 9, ..ATTEND },
        Attend {
            causal: false,
            queries: 9,
            kv_len: [150, 9],
            window: Window::Symmetric { left: 2, right: 1 },
            ..ATTEND
        },
        Attend { mask: true, softcap: Some(2.0), ..ATTEND },
        Attend { heads: 70, kv_heads: 1, queries: 2, head_dim: 16, ..ATTEND },
        Attend { head_dim: 128, queries: 20, kv_len: [21, 20], mask: true, sinks: true, ..ATTEND },
    ];
    for (i, case) in cases.iter().enumerate() {
        check(case, true, 2e-6, &format!("case {i}"));
    }
}

/// One query of whole vectors takes a way of its own, for groups of up to eight heads.
const DECODE: Attend = Attend { queries: 1, head_dim: 64, value_dim: 48, ..ATTEND };

#[test]
fn attention_of_one_query() {
    let groups = [1, 2, 3, 5, 8, 9].map(|heads| Attend { heads, kv_heads: 1, mask: true, sinks: true, ..DECODE });
    let dtypes = [DType::F16, DType::BF16].map(|dtype| Attend { dtype, value_dim: 144, ..DECODE });
    let others = [
        Attend { kv_len: [1, 64], ..DECODE },
        Attend { kv_len: [65, 17], softcap: Some(2.0), ..DECODE },
        Attend { window: Window::Left(70), sinks: true, ..DECODE },
        Attend { window: Window::Left(1), ..DECODE },
        Attend { causal: false, window: Window::Symmetric { left: 100, right: 1 }, mask: true, ..DECODE },
        Attend { head_dim: 256, value_dim: 16, heads: 12, kv_heads: 12, ..DECODE },
        // Ten tasks for three threads.
        Attend { head_dim: 128, value_dim: 128, heads: 5, kv_heads: 5, ..DECODE },
    ];
    for (i, case) in groups.iter().chain(&dtypes).chain(&others).enumerate() {
        check(case, true, 2e-6, &format!("case {i}"));
    }
}

/// Decoding a token gives what the same token gives within a longer piece, to the last bit.
#[test]
fn attention_does_not_depend_on_the_other_queries() {
    let plain = Attend { queries: 5, ..DECODE };
    for case in [
        Attend { dtype: DType::F16, ..plain },
        Attend { dtype: DType::BF16, sinks: true, heads: 14, ..plain },
        Attend { mask: true, softcap: Some(3.0), heads: 6, value_dim: 128, ..plain },
    ] {
        for cpu in cpus(true) {
            let all = case.run(&cpu).unwrap();
            let alone = Attend { last: true, ..case }.run(&cpu).unwrap();
            let per_sequence = all.chunks(all.len() / 2);
            let last: Vec<f64> = per_sequence.flat_map(|rows| rows[rows.len() / 5 * 4..].to_vec()).collect();
            let bits = |v: &[f64]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone), bits(&last), "{:?}, {} threads", cpu.isa(), cpu.threads());
        }
    }
}

struct Latent {
    prefill: bool,
    queries: usize,
    /// The first is the longest.
    kv_len: [usize; 2],
    kv_b: Weight,
    dtype: DType,
}

impl Computation for Latent {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let (h, n, v, r, rope) = (3, 20, 9, self.kv_b.in_features(), 12);
        let (kv_len, sq) = (self.kv_len, self.queries);
        let capacity = kv_len[0] + 6;
        let q = upload(device, &[2, sq, h, n + rope], &normals(2 * sq * h * (n + rope), 1))?;
        let rows = normals(2 * capacity * (r + rope), 2);
        let cache = upload_as(device, self.dtype, &[2, capacity, r + rope], &rows)?;
        let kv_b = Linear::new(device, self.kv_b.clone())?;
        let mut out = poisoned(device, &[2, sq, h, v])?;
        let args = MlaAttentionArgs {
            q: &q,
            cache: &cache,
            kv_len: &kv_len,
            kv_b: &kv_b,
            nope_head_dim: n,
            rope_head_dim: rope,
            scale: 0.05,
            out: &mut out,
        };
        if self.prefill {
            device.mla_prefill(args)?;
        } else {
            device.mla_decode(args)?;
        }
        device.read_f64(&out)
    }
}

#[test]
fn latent_attention() {
    let dense = HostTensor::from_f32(&[87, 64], &normals(87 * 64, 3)).unwrap();
    for kv_b in [Weight::dense(dense).unwrap(), quantized(Format::Int4S4, 87, 64, 3)] {
        for (prefill, queries, kv_len, dtype) in [
            (true, 70, [90, 80], DType::F32),
            (true, 1, [90, 80], DType::BF16),
            (false, 1, [90, 80], DType::F16),
            (false, 5, [90, 80], DType::F32),
            (false, 3, [600, 257], DType::F16),
            // Threads have blocks of other rows than one thread; more rows than have their keys split.
            (false, 33, [90, 80], DType::F32),
            (false, 50, [300, 80], DType::F32),
        ] {
            let kv_b = kv_b.clone();
            let case = Latent { prefill, queries, kv_len, kv_b, dtype };
            // Also in fast mode kv_b takes f32 activations.
            for exact in [true, false] {
                check(&case, exact, 3e-6, &format!("prefill {prefill} queries {queries}"));
            }
        }
    }
}

#[test]
fn latent_rows_without_columns_give_zeros() {
    for prefill in [true, false] {
        let kv_b = Weight::dense(HostTensor::from_f32(&[87, 0], &[]).unwrap()).unwrap();
        let case = Latent { prefill, queries: 2, kv_len: [300, 80], kv_b, dtype: DType::F32 };
        for cpu in cpus(true) {
            assert!(case.run(&cpu).unwrap().iter().all(|&value| value == 0.0), "prefill {prefill}, {:?}", cpu.isa());
        }
    }
}

/// A row whose scores are all `-inf` sees nothing, whether there are values to give or not.
#[test]
fn latent_rows_that_see_nothing_are_errors() {
    fn run<B: Backend>(device: &B, v: usize) -> Result<()> {
        let (n, r, keys) = (2, 16, 300);
        let kv_b = Linear::new(device, Weight::dense(HostTensor::from_f32(&[n + v, r], &vec![0.0; (n + v) * r])?)?)?;
        let q = upload(device, &[1, 1, 1, n + 1], &[1.0, 1.0, f32::NEG_INFINITY])?;
        let cache = upload(device, &[1, keys, r + 1], &vec![1.0; keys * (r + 1)])?;
        device.mla_decode(MlaAttentionArgs {
            q: &q,
            cache: &cache,
            kv_len: &[keys],
            kv_b: &kv_b,
            nope_head_dim: n,
            rope_head_dim: 1,
            scale: 1.0,
            out: &mut poisoned(device, &[1, 1, 1, v])?,
        })
    }
    for v in [0, 3] {
        let expected = run(&Oracle::new(), v).unwrap_err().to_string();
        for cpu in cpus(true) {
            assert_eq!(run(&cpu, v).unwrap_err().to_string(), expected, "{v} values, {:?}", cpu.isa());
        }
    }
}

struct Experts {
    tokens: usize,
    /// Formats of the experts in turn.
    formats: Vec<Format>,
}

impl Computation for Experts {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let (hidden, intermediate, experts, top_k, t) = (64, 40, 7, 3, self.tokens);
        let stack: Vec<ExpertWeights> = (0..experts)
            .map(|e| {
                let format = self.formats[e % self.formats.len()];
                let seed = 100 + 3 * e as u64;
                Ok(ExpertWeights {
                    gate: quantized(format, intermediate, hidden, seed),
                    up: quantized(Format::Int8, intermediate, hidden, seed + 1),
                    down: quantized(format, hidden, intermediate, seed + 2).with_bias(normals(hidden, seed))?,
                })
            })
            .collect::<Result<_>>()?;
        let stack = ExpertStack::new(device, stack)?;
        let logits = upload(device, &[t, experts], &normals(t * experts, 4))?;
        let mut ids = device.zeros(DType::U32, &[t, top_k])?;
        let mut weights = poisoned(device, &[t, top_k])?;
        device.moe_route(RouteArgs {
            logits: &logits,
            bias: None,
            routing: Routing {
                top_k,
                scoring: Scoring::Sigmoid,
                n_group: 1,
                topk_group: 1,
                group_score: GroupScore::Max,
                norm_topk_prob: true,
                norm_eps: 1e-20,
                routed_scaling_factor: 1.8,
            },
            ids: &mut ids,
            weights: &mut weights,
        })?;
        let x = upload(device, &[t, hidden], &normals(t * hidden, 5))?;
        let residual = upload(device, &[t, hidden], &normals(t * hidden, 6))?;
        let mut out = poisoned(device, &[t, hidden])?;
        device.moe_expert_mlp(ExpertMlpArgs {
            x: &x,
            ids: &ids,
            weights: &weights,
            experts: &stack,
            activation: Activation::Silu,
            residual: Residual::Add(&residual),
            out: &mut out,
        })?;
        device.read_f64(&out)
    }
}

#[test]
fn expert_mlps() {
    let formats = vec![Format::Int4S4, Format::Fp4E2m1, Format::Int3, Format::Nf4];
    for tokens in [1, 4, 5, 130] {
        let formats = formats.clone();
        // The hidden vector is rounded to int8 too: a value next to a border may fall to either side.
        check(&Experts { tokens, formats: formats.clone() }, true, 4e-6, "exact");
        check(&Experts { tokens, formats }, false, 2e-3, "fast");
    }
}

struct Route(Routing);

impl Computation for Route {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let (t, e, k) = (9, 24, self.0.top_k);
        let mut logits = normals(t * e, 1);
        logits[..e].fill(0.5);
        let logits = upload(device, &[t, e], &logits)?;
        let bias = upload(device, &[e], &normals(e, 2))?;
        let mut ids = device.zeros(DType::U32, &[t, k])?;
        let mut weights = poisoned(device, &[t, k])?;
        device.moe_route(RouteArgs {
            logits: &logits,
            bias: Some(&bias),
            routing: self.0,
            ids: &mut ids,
            weights: &mut weights,
        })?;
        let mut all = device.read_f64(&weights)?;
        all.extend(device.read_u32(&ids)?.into_iter().map(f64::from));
        let words = |n: usize| device.zeros(DType::U32, &[n]);
        let (mut offsets, mut permutation, mut inverse) = (words(e + 1)?, words(t * k)?, words(t * k)?);
        device.moe_group(GroupArgs {
            ids: &ids,
            experts: e,
            offsets: &mut offsets,
            permutation: &mut permutation,
            inverse: &mut inverse,
        })?;
        for tensor in [&offsets, &permutation, &inverse] {
            all.extend(device.read_u32(tensor)?.into_iter().map(f64::from));
        }
        let rows = upload(device, &[t * k, 19], &normals(t * k * 19, 3))?;
        let mut out = upload(device, &[t, 19], &normals(t * 19, 4))?;
        device.moe_combine(CombineArgs {
            rows: &rows,
            inverse: &inverse,
            weights: &weights,
            residual: Residual::InPlace,
            out: &mut out,
        })?;
        all.extend(device.read_f64(&out)?);
        Ok(all)
    }
}

#[test]
fn routing() {
    for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SoftmaxSelected] {
        for (n_group, topk_group) in [(1, 1), (8, 3)] {
            for group_score in [GroupScore::Max, GroupScore::TopTwoSum] {
                let routing = Routing {
                    top_k: 4,
                    scoring,
                    n_group,
                    topk_group,
                    group_score,
                    norm_topk_prob: n_group == 1,
                    norm_eps: 1e-20,
                    routed_scaling_factor: 2.5,
                };
                check(&Route(routing), true, 1e-6, &format!("{routing:?}"));
            }
        }
    }
}

struct Rotate(usize, HadamardKind, bool);

impl Computation for Rotate {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let columns = 2 * self.0;
        let mut x = upload(device, &[3, columns], &normals(3 * columns, 1))?;
        let (before, after) =
            (upload(device, &[columns], &normals(columns, 2))?, upload(device, &[columns], &normals(columns, 3))?);
        device.hadamard(HadamardArgs {
            x: &mut x,
            block: self.0,
            kind: self.1,
            normalize: true,
            transpose: self.2,
            scale_before: Some(&before),
            scale_after: Some(&after),
        })?;
        device.read_f64(&x)
    }
}

#[test]
fn hadamard() {
    for transpose in [false, true] {
        for (block, kind) in [
            (2, HadamardKind::BlockDiagonal),
            (128, HadamardKind::BlockDiagonal),
            (160, HadamardKind::BlockDiagonal),
            (12, HadamardKind::True),
            (160, HadamardKind::True),
        ] {
            check(&Rotate(block, kind, transpose), true, 1e-6, &format!("{block} {kind:?}"));
        }
    }
}

struct Sample(SampleFilter, usize);

impl Computation for Sample {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let vocabulary = self.1;
        let mut all = Vec::new();
        let mut row = upload(device, &[vocabulary], &normals(vocabulary, 1))?;
        device.process_logits(LogitsProcessArgs {
            logits: &mut row,
            prompt: &[3, 3, 0],
            generated: &[1, 3, 1],
            process: &LogitsProcess {
                repetition_penalty: 1.2,
                frequency_penalty: 0.3,
                presence_penalty: 0.1,
                temperature: 0.7,
            },
        })?;
        all.extend(device.read_f64(&row)?);
        let rows = 40;
        let logits = upload(device, &[rows, vocabulary], &normals(rows * vocabulary, 2))?;
        let mut ids = device.zeros(DType::U32, &[rows])?;
        let requests: Vec<u32> = (0..rows as u32).collect();
        device.sample(SampleArgs {
            logits: &logits,
            filter: &self.0,
            seed: 9,
            rows: &requests,
            steps: &vec![4; rows],
            ids: &mut ids,
        })?;
        all.extend(device.read_u32(&ids)?.into_iter().map(f64::from));
        device.argmax(&logits, &mut ids)?;
        all.extend(device.read_u32(&ids)?.into_iter().map(f64::from));
        Ok(all)
    }
}

#[test]
fn sampling() {
    let filters = [
        SampleFilter::NONE,
        SampleFilter { top_k: Some(3), ..SampleFilter::NONE },
        SampleFilter { top_p: Some(0.6), ..SampleFilter::NONE },
        SampleFilter { min_p: Some(0.2), ..SampleFilter::NONE },
        SampleFilter { typical: Some(0.5), ..SampleFilter::NONE },
        SampleFilter { top_k: Some(40), top_p: Some(0.9), min_p: Some(0.05), typical: Some(0.8) },
    ];
    for filter in filters {
        for vocabulary in [11, 3000] {
            check(&Sample(filter.clone(), vocabulary), true, 1e-7, &format!("{filter:?}"));
        }
    }
}

struct Convert(DType, DType);

impl Computation for Convert {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let values = normals(5000, 1);
        let x = upload_as(device, self.0, &[5000], &values)?;
        let mut out = device.zeros(self.1, &[5000])?;
        device.convert(&x, &mut out)?;
        device.read_f64(&out)
    }
}

#[test]
fn conversion_is_exact() {
    let types = [DType::F32, DType::F16, DType::BF16];
    for from in types {
        for to in types {
            check(&Convert(from, to), true, 0.0, &format!("{from:?} to {to:?}"));
        }
    }
}

#[test]
fn errors_raised_by_the_backend() {
    for cpu in cpus(true) {
        let fails = |result: Result<()>, operand: &str| match result {
            Err(OpError::Value { operand: found, .. }) => assert_eq!(found, operand),
            other => panic!("expected an error on {operand}, got {other:?}"),
        };
        let mut ids = cpu.zeros(DType::U32, &[1]).unwrap();
        for value in [f32::NAN, f32::INFINITY] {
            let logits = upload(&cpu, &[1, 2], &[0.0, value]).unwrap();
            fails(cpu.argmax(&logits, &mut ids), "logits");
        }
        let masked = upload(&cpu, &[1, 2], &[f32::NEG_INFINITY; 2]).unwrap();
        fails(cpu.argmax(&masked, &mut ids), "logits");
        let half = cpu.zeros(DType::F16, &[1, 2]).unwrap();
        let refused = cpu.argmax(&half, &mut ids);
        assert!(matches!(refused, Err(OpError::Unsupported { .. })));
    }
}

#[test]
fn options_are_checked() {
    let threads = |n| CpuOptions { threads: Some(n), ..CpuOptions::default() };
    assert!(Cpu::new(threads(0)).is_err());
    let cpu = Cpu::new(threads(2)).unwrap();
    assert_eq!((cpu.threads(), cpu.exact()), (2, false));
}
