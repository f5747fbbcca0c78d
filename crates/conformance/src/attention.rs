//! Attention over contiguous caches.

use marlin_formats::DType;
use marlin_ops::attention::{AttentionArgs, EmptyRow, KvWriteArgs, Window};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, poison_as};
use crate::linear::by_rows;
use crate::random::Random;
use crate::tolerance::{self, Tolerance};

/// An additive mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mask {
    None,
    /// `[1, 1, Sq, Sk]`: irregular values, three of ten keys hidden, never the query's own.
    Shared,
    /// `[B, Hq, Sq, Sk]`, as above.
    Full,
    /// `[1, 1, Sq, Sk]`: the first query sees nothing.
    FirstRowHidden,
}

#[derive(Clone)]
struct AttentionCase {
    queries: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    /// One entry per sequence.
    kv_len: Vec<usize>,
    /// Unused rows behind the longest sequence; they hold NaN.
    spare: usize,
    /// Keys and values.
    dtype: DType,
    /// Queries and results.
    io: DType,
    causal: bool,
    window: Window,
    softcap: Option<f32>,
    mask: Mask,
    sinks: bool,
    empty_row: EmptyRow,
    /// Factor on the usual `D^-1/2`.
    scale: f32,
    /// All values of V equal.
    constant_v: bool,
    /// Entries that a bad case adds to `kv_len`.
    surplus_len: usize,
}

/// GQA 2 over one sequence.
fn base(queries: usize, kv_len: usize) -> AttentionCase {
    AttentionCase {
        queries,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        value_dim: 64,
        kv_len: vec![kv_len],
        spare: 3,
        dtype: DType::F32,
        io: DType::F32,
        causal: true,
        window: Window::None,
        softcap: None,
        mask: Mask::None,
        sinks: false,
        empty_row: EmptyRow::Error,
        scale: 1.0,
        constant_v: false,
        surplus_len: 0,
    }
}

impl AttentionCase {
    fn keys(&self) -> usize {
        self.kv_len.iter().copied().max().unwrap_or(0)
    }

    /// `[B, Hkv, capacity, width]`, NaN from each sequence's length on.
    fn cache(&self, width: usize, random: &mut Random) -> (Vec<usize>, Vec<f32>) {
        let capacity = self.keys() + self.spare;
        let dims = vec![self.kv_len.len(), self.kv_heads, capacity, width];
        let mut values = random.normals(dims.iter().product());
        for (row, values) in values.chunks_mut(width.max(1)).enumerate() {
            if row % capacity >= self.kv_len[row / (capacity * self.kv_heads)] {
                values.fill(f32::NAN);
            }
        }
        (dims, values)
    }

    fn mask(&self, random: &mut Random) -> (Vec<usize>, Vec<f32>) {
        let (batch, heads) = match self.mask {
            Mask::Full => (self.kv_len.len(), self.q_heads),
            _ => (1, 1),
        };
        let dims = vec![batch, heads, self.queries, self.keys()];
        let values = (0..dims.iter().product()).map(|at: usize| {
            let (i, j) = (at / self.keys() % self.queries, at % self.keys());
            let own = self.kv_len.iter().any(|len| j + self.queries == i + len);
            let hidden = match self.mask {
                Mask::FirstRowHidden => i == 0,
                _ => random.below(10) < 3 && !own,
            };
            if hidden { f32::NEG_INFINITY } else { random.normal() }
        });
        (dims, values.collect())
    }
}

impl Case for AttentionCase {
    const OPERATION: &'static str = "attention";

    fn configuration(&self) -> String {
        let AttentionCase { queries, q_heads, kv_heads, head_dim, value_dim, .. } = self;
        let (len, dtype) = (&self.kv_len, self.dtype.name());
        let mut text =
            format!("Sq={queries} Sk={len:?} Hq/Hkv={q_heads}/{kv_heads} D={head_dim} Dv={value_dim} kv={dtype}");
        if !self.causal {
            text += " not causal";
        }
        if self.window != Window::None {
            text += &format!(" {:?}", self.window);
        }
        if let Some(softcap) = self.softcap {
            text += &format!(" softcap={softcap}");
        }
        if self.mask != Mask::None {
            text += &format!(" mask={:?}", self.mask);
        }
        if self.sinks {
            text += " sinks";
        }
        if self.empty_row != EmptyRow::Error {
            text += " empty_row=zero";
        }
        if self.scale != 1.0 {
            text += &format!(" scale*{}", self.scale);
        }
        if self.constant_v {
            text += " constant V";
        }
        if self.io != DType::F32 {
            text += &format!(" io={}", self.io.name());
        }
        text
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let batch = self.kv_len.len();
        let q_dims = [batch, self.queries, self.q_heads, self.head_dim];
        let q = floats_as(b, self.io, &q_dims, &random.normals(q_dims.iter().product()))?;
        let (dims, k) = self.cache(self.head_dim, random);
        let k = floats_as(b, self.dtype, &dims, &k)?;
        let (dims, mut v) = self.cache(self.value_dim, random);
        if self.constant_v {
            v.iter_mut().filter(|v| !v.is_nan()).for_each(|v| *v = 0.75);
        }
        let v = floats_as(b, self.dtype, &dims, &v)?;
        let (dims, mask) = self.mask(random);
        let mask = floats(b, &dims, &mask)?;
        let sinks = floats(b, &[self.q_heads], &random.normals(self.q_heads))?;
        let mut out = poison_as(b, self.io, &[batch, self.queries, self.q_heads, self.value_dim])?;
        let mut kv_len = self.kv_len.clone();
        kv_len.resize(batch + self.surplus_len, 1);
        b.attention(AttentionArgs {
            q: &q,
            k: &k,
            v: &v,
            kv_len: &kv_len,
            scale: self.scale / (self.head_dim as f32).sqrt(),
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            mask: (self.mask != Mask::None).then_some(&mask),
            sinks: self.sinks.then_some(&sinks),
            empty_row: self.empty_row,
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        if self.scale > 1.0 {
            let bound = tolerance::ATTENTION_F16;
            return vec![Tolerance::Blocks { block: self.value_dim, bound }];
        }
        // V is at most sqrt 12 in size.
        let bound = match self.io {
            DType::F16 => tolerance::ATTENTION_F16,
            DType::BF16 => tolerance::ATTENTION_BF16,
            _ => tolerance::attention(mode, self.dtype),
        };
        let of_max_v = tolerance::attention_of_max_v(bound) * 12f64.sqrt();
        let count = self.kv_len.len() * self.queries * self.q_heads * self.value_dim;
        let absolute = vec![of_max_v; count];
        vec![Tolerance::All(vec![
            by_rows(count / self.value_dim, self.value_dim, bound),
            Tolerance::Elements { ulps: 0.0, relative: 0.0, absolute },
        ])]
    }

    fn noticed(&self) -> f64 {
        // ATTB16 lets a row lose 0.6 %, and its largest element is a third of it.
        if self.io == DType::BF16 { 0.03 } else { 0.01 }
    }
}

struct KvWriteCase {
    tokens: usize,
    heads: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: DType,
    sequence: usize,
    start: usize,
    v_tokens: Option<usize>,
}

const KV_WRITE: KvWriteCase = KvWriteCase {
    tokens: 3,
    heads: 2,
    head_dim: 16,
    value_dim: 8,
    dtype: DType::F32,
    sequence: 1,
    start: 2,
    v_tokens: None,
};

impl Case for KvWriteCase {
    const OPERATION: &'static str = "kv_write";

    fn configuration(&self) -> String {
        let KvWriteCase { tokens, heads, head_dim, value_dim, sequence, start, .. } = self;
        let shape = format!("T={tokens} Hkv={heads} D={head_dim} Dv={value_dim}");
        format!("{shape} to [{sequence}, {start}] cache={}", self.dtype.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let mut tensor = |tokens: usize, width: usize| {
            let dims = [tokens, self.heads, width];
            floats(b, &dims, &random.normals(dims.iter().product()))
        };
        let k = tensor(self.tokens, self.head_dim)?;
        let v = tensor(self.v_tokens.unwrap_or(self.tokens), self.value_dim)?;
        let mut cache = |width: usize| {
            let dims = [3, self.heads, 9, width];
            floats_as(b, self.dtype, &dims, &random.normals(dims.iter().product()))
        };
        let (mut k_cache, mut v_cache) = (cache(self.head_dim)?, cache(self.value_dim)?);
        b.kv_write(KvWriteArgs {
            k: &k,
            v: &v,
            k_cache: &mut k_cache,
            v_cache: &mut v_cache,
            sequence: self.sequence,
            start: self.start,
        })?;
        Ok(vec![Output::floats(b, "k_cache", &k_cache)?, Output::floats(b, "v_cache", &v_cache)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 2]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    shapes(runner);
    options(runner);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (tokens, start) in [(1, 0), (3, 2), (9, 0), (0, 9)] {
            runner.check(&KvWriteCase { tokens, start, dtype, ..KV_WRITE });
        }
        let (head_dim, value_dim) = (65, 33);
        runner.check(&KvWriteCase { head_dim, value_dim, heads: 3, dtype, ..KV_WRITE });
    }
    bad_arguments(runner);
}

fn shapes<B: Backend>(runner: &mut Runner<'_, B>) {
    let lengths = [
        (1, 1),
        (1, 2),
        (1, 15),
        (1, 16),
        (1, 17),
        (1, 129),
        (1, 255),
        (1, 257),
        (1, 1025),
        (2, 2),
        (3, 130),
        (7, 7),
        (8, 64),
        (16, 40),
        (17, 33),
        (64, 64),
        (65, 257),
        (33, 500),
    ];
    for (queries, kv_len) in lengths {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            runner.check(&AttentionCase { dtype, ..base(queries, kv_len) });
        }
        if queries > 1 {
            runner.check(&AttentionCase { causal: false, ..base(queries, kv_len) });
        }
    }
    // More queries than keys: the earliest ones lie before the first key.
    runner.check(&AttentionCase { causal: false, ..base(9, 4) });
    for (queries, kv_len) in [(1, 130), (9, 33)] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for head_dim in [1, 8, 24, 32, 40, 80, 96, 100, 112, 128, 192, 256] {
                let value_dim = head_dim;
                runner.check(&AttentionCase { head_dim, value_dim, dtype, ..base(queries, kv_len) });
            }
            for (head_dim, value_dim) in [(192, 128), (24, 16), (64, 7), (33, 65), (128, 260)] {
                runner.check(&AttentionCase { head_dim, value_dim, dtype, ..base(queries, kv_len) });
            }
        }
        let halves = runner.half_dtypes();
        let pairs = [(DType::F16, DType::F16), (DType::BF16, DType::BF16), (DType::F16, DType::BF16)];
        for (dtype, io) in pairs.into_iter().filter(|(_, io)| halves.contains(io)) {
            runner.check(&AttentionCase { dtype, io, ..base(queries, kv_len) });
        }
        for (q_heads, kv_heads) in [(1, 1), (3, 3), (8, 1), (7, 1), (16, 1), (12, 4), (32, 2)] {
            for dtype in [DType::F32, DType::BF16] {
                let head_dim = 32;
                let case = AttentionCase { q_heads, kv_heads, head_dim, dtype, ..base(queries, kv_len) };
                runner.check(&case);
            }
        }
    }
    for (queries, kv_len) in [(1, vec![1, 130]), (5, vec![40, 5]), (1, vec![17, 1, 255, 16])] {
        for dtype in [DType::F32, DType::F16] {
            runner.check(&AttentionCase { kv_len: kv_len.clone(), dtype, ..base(queries, 1) });
        }
    }
    runner.check(&base(0, 5));
}

fn options<B: Backend>(runner: &mut Runner<'_, B>) {
    for (queries, kv_len) in [(1, vec![130]), (17, vec![33]), (5, vec![70, 9])] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            options_of(runner, &AttentionCase { kv_len: kv_len.clone(), dtype, ..base(queries, 1) });
        }
    }
}

fn options_of<B: Backend>(runner: &mut Runner<'_, B>, base: &AttentionCase) {
    let windows = [
        Window::Left(1),
        Window::Left(4),
        Window::Left(16),
        Window::Left(1000),
        Window::Symmetric { left: 3, right: 2 },
        Window::Symmetric { left: 0, right: 0 },
    ];
    for window in windows {
        for causal in [true, false] {
            runner.check(&AttentionCase { window, causal, ..base.clone() });
        }
    }
    for mask in [Mask::Shared, Mask::Full] {
        for causal in [true, false] {
            runner.check(&AttentionCase { mask, causal, ..base.clone() });
        }
    }
    let zero = AttentionCase { mask: Mask::FirstRowHidden, empty_row: EmptyRow::Zero, ..base.clone() };
    runner.check(&zero);
    runner.check(&AttentionCase { sinks: true, empty_row: EmptyRow::Error, ..zero });
    for softcap in [0.5, 30.0] {
        runner.check(&AttentionCase { softcap: Some(softcap), ..base.clone() });
    }
    runner.check(&AttentionCase { sinks: true, ..base.clone() });
    let all =
        AttentionCase { softcap: Some(5.0), sinks: true, mask: Mask::Full, window: Window::Left(7), ..base.clone() };
    runner.check(&all);
    runner.check(&AttentionCase { scale: 30.0, ..base.clone() });
    runner.check(&AttentionCase { constant_v: true, ..base.clone() });
    runner.check(&AttentionCase { scale: 0.0, ..base.clone() });
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let base = base(2, 5);
    let value = Refusal::Value;
    let mut refuse = |what: &str, case: AttentionCase, expected| {
        runner.refuse(what, &case, expected);
    };
    refuse("window 0", AttentionCase { window: Window::Left(0), ..base.clone() }, value("window"));
    for softcap in [0.0, -1.0, f32::NAN] {
        let case = AttentionCase { softcap: Some(softcap), ..base.clone() };
        refuse(&format!("softcap {softcap}"), case, value("softcap"));
    }
    refuse("Hq % Hkv", AttentionCase { kv_heads: 3, ..base.clone() }, Refusal::Shape("k"));
    refuse("kv_len 0", AttentionCase { kv_len: vec![5, 0], ..base.clone() }, value("kv_len"));
    let case = AttentionCase { queries: 1, kv_len: vec![0], spare: 4, ..base.clone() };
    refuse("decode of kv_len 0", case, value("kv_len"));
    refuse("causal Sq > kv_len", AttentionCase { queries: 6, ..base.clone() }, value("kv_len"));
    let case = AttentionCase { surplus_len: 1, ..base.clone() };
    refuse("kv_len of another batch", case, Refusal::Shape("kv_len"));
    refuse("scale NaN", AttentionCase { scale: f32::NAN, ..base.clone() }, value("scale"));
    for queries in [1, 5] {
        let case = AttentionCase { mask: Mask::FirstRowHidden, queries, ..base.clone() };
        refuse(&format!("row without keys, Sq={queries}"), case, value("q"));
    }
    let case = KvWriteCase { start: 7, ..KV_WRITE };
    runner.refuse("rows beyond the capacity", &case, Refusal::Shape("k_cache"));
    let case = KvWriteCase { sequence: 3, ..KV_WRITE };
    runner.refuse("no such sequence", &case, Refusal::Shape("k_cache"));
    let case = KvWriteCase { v_tokens: Some(2), ..KV_WRITE };
    runner.refuse("fewer rows of v", &case, Refusal::Shape("v"));
}
