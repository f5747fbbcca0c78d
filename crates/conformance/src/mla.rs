//! Multi-head latent attention: both forms, on the same inputs.

use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_ops::attention::MlaAttentionArgs;
use marlin_ops::{Backend, Linear, Result, Tensor};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, poison};
use crate::random::Random;
use crate::tolerance::{self, Tolerance};
use crate::weight::{DENSE, Scales, Storage, group_sizes, random_weight};

#[derive(Clone)]
struct MlaCase {
    queries: usize,
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    rank: usize,
    kv_len: Vec<usize>,
    spare: usize,
    dtype: DType,
    kv_b: Storage,
    /// Columns that a bad case adds to the cache.
    surplus_width: usize,
}

fn base(queries: usize, kv_len: usize) -> MlaCase {
    MlaCase {
        queries,
        heads: 3,
        nope: 16,
        rope: 8,
        value: 24,
        rank: 32,
        kv_len: vec![kv_len],
        spare: 2,
        dtype: DType::F32,
        kv_b: DENSE[0],
        surplus_width: 0,
    }
}

/// One of the two operations, compared on equal inputs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Prefill,
    Decode,
}

impl MlaCase {
    fn configuration(&self) -> String {
        let MlaCase { queries, heads, nope, rope, value, rank, kv_len, kv_b, .. } = self;
        let shape = format!("Sq={queries} Sk={kv_len:?} H={heads} n={nope} R={rope} v={value}");
        format!("{shape} r={rank} kv_b={kv_b} cache={}", self.dtype.name())
    }

    fn run<B: Backend>(&self, b: &B, form: Form) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let batch = self.kv_len.len();
        let q_dims = [batch, self.queries, self.heads, self.nope + self.rope];
        let q = floats(b, &q_dims, &random.normals(q_dims.iter().product()))?;
        let cache = self.cache(b, random)?;
        let rows = self.heads * (self.nope + self.value);
        let kv_b = random_weight(self.kv_b, rows, self.rank, Scales::Usual, random)?;
        let kv_b = Linear::new(b, kv_b)?;
        let mut out = poison(b, &[batch, self.queries, self.heads, self.value])?;
        let args = MlaAttentionArgs {
            q: &q,
            cache: &cache,
            kv_len: &self.kv_len,
            kv_b: &kv_b,
            nope_head_dim: self.nope,
            rope_head_dim: self.rope,
            scale: 1.0 / ((self.nope + self.rope) as f32).sqrt(),
            out: &mut out,
        };
        match form {
            Form::Prefill => b.mla_prefill(args)?,
            Form::Decode => b.mla_decode(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    /// `[B, capacity, r + R]`, NaN from each sequence's length on.
    fn cache<B: Backend>(&self, b: &B, random: &mut Random) -> Result<Tensor<B>> {
        let capacity = self.kv_len.iter().max().map_or(0, |len| len + self.spare);
        let width = self.rank + self.rope + self.surplus_width;
        let mut values = random.normals(self.kv_len.len() * capacity * width);
        for (row, values) in values.chunks_mut(width).enumerate() {
            if row % capacity >= self.kv_len[row / capacity] {
                values.fill(f32::NAN);
            }
        }
        floats_as(b, self.dtype, &[self.kv_len.len(), capacity, width], &values)
    }

    fn tolerances(&self, form: Form, mode: Mode) -> Vec<Tolerance> {
        // Keys and values of a prefill are f32.
        let cache = if form == Form::Prefill { DType::F32 } else { self.dtype };
        let bound = if self.kv_b.rotates() { tolerance::EXL3_ROWS } else { tolerance::attention(mode, cache) };
        vec![Tolerance::Blocks { block: self.value, bound }]
    }
}

/// Names a form of a [`MlaCase`].
macro_rules! operation {
    ($case:ident, $name:literal, $form:expr) => {
        struct $case<'a>(&'a MlaCase);

        impl Case for $case<'_> {
            const OPERATION: &'static str = $name;

            fn configuration(&self) -> String {
                self.0.configuration()
            }

            fn run<B: Backend>(&self, backend: &B) -> Result<Vec<Output>> {
                self.0.run(backend, $form)
            }

            fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
                self.0.tolerances($form, mode)
            }
        }
    };
}

operation!(MlaPrefill, "mla_prefill", Form::Prefill);
operation!(MlaDecode, "mla_decode", Form::Decode);

fn table() -> Vec<MlaCase> {
    let mut table = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (queries, kv_len) in [(1, 1), (1, 63), (1, 65), (1, 300), (2, 2), (5, 5), (5, 40), (33, 33), (130, 150)] {
            table.push(MlaCase { dtype, ..base(queries, kv_len) });
        }
        // Over the borders of parts in which keys may be taken.
        table.push(MlaCase { dtype, ..base(1, 513) });
        table.push(MlaCase { dtype, kv_len: vec![258, 7, 256], ..base(3, 1) });
        table.push(MlaCase { dtype, kv_len: vec![40, 7], ..base(3, 1) });
        table.push(MlaCase { dtype, kv_len: vec![1, 65, 17], ..base(1, 1) });
    }
    for (queries, kv_len) in [(1, 33), (5, 20)] {
        let base = base(queries, kv_len);
        for storage in
            DENSE.into_iter().chain(Format::ALL.map(|format| Storage::Quantized(format, group_sizes(format)[0])))
        {
            table.push(MlaCase { kv_b: storage, rank: 64, ..base.clone() });
        }
        for (storage, rank) in
            [(Storage::Exl3(Codebook::Mul1, 3), 64), (Storage::Exl3(Codebook::Mcg, 4), 300), (DENSE[0], 300)]
        {
            table.push(MlaCase { kv_b: storage, heads: 2, nope: 100, value: 60, rank, ..base.clone() });
        }
        // GLM-4.7-Flash's head and latent, DeepSeek-V2's head, odd dimensions.
        for (heads, nope, rope, value, rank) in
            [(2, 192, 64, 256, 512), (16, 128, 64, 128, 64), (3, 5, 2, 7, 9), (1, 1, 2, 1, 1)]
        {
            table.push(MlaCase { heads, nope, rope, value, rank, ..base.clone() });
        }
    }
    table.push(base(0, 3));
    table
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for case in table() {
        runner.check(&MlaPrefill(&case));
        runner.check(&MlaDecode(&case));
    }
    let ordered = Storage::Ordered(Format::Int4S4, 32, 0);
    for (what, case, expected) in [
        ("kv_b in an order of its own", MlaCase { kv_b: ordered, rank: 64, ..base(1, 3) }, Refusal::Value("kv_b")),
        ("kv_len 0", MlaCase { kv_len: vec![3, 0], ..base(1, 1) }, Refusal::Value("kv_len")),
        ("Sq > kv_len", base(4, 3), Refusal::Value("kv_len")),
        ("cache width", MlaCase { surplus_width: 1, ..base(1, 3) }, Refusal::Shape("cache")),
    ] {
        runner.refuse(what, &MlaPrefill(&case), expected);
        runner.refuse(what, &MlaDecode(&case), expected);
    }
}
