//! Attention: fused, decode, scores and values on their own, with 16-bit values.

use marlin_formats::DType;
use marlin_ops::attention::{AttentionArgs, EmptyRow, Window, visible_keys};
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::{Backend, HostTensor, Linear, Result, Weight};

use super::bind::Bound;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::{AttentionKernel, Variants};
use super::{bounds, paged};
use crate::input::{Output, floats, floats_as, poison_as};
use crate::random::Random;
use crate::tolerance::Tolerance;

/// Attention over a contiguous cache.
#[derive(Clone, Debug)]
struct FusedCase {
    kernel: Option<AttentionKernel>,
    queries: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    kv_len: Vec<usize>,
    io: DType,
    kv: DType,
    causal: bool,
    window: Option<usize>,
    mask: bool,
    /// Values are the identity, so that the output is the probabilities; D is the number of keys then.
    probabilities: bool,
}

impl FusedCase {
    fn keys(&self) -> usize {
        self.kv_len.iter().copied().max().unwrap_or(0)
    }

    fn value_dim(&self) -> usize {
        if self.probabilities { self.keys() } else { self.head_dim }
    }

    /// `[B, Hkv, capacity, D]`, NaN from each sequence's length on.
    fn cache(&self, width: usize, identity: bool, random: &mut Random) -> (Vec<usize>, Vec<f32>) {
        let capacity = self.keys() + 2;
        let dims = vec![self.kv_len.len(), self.kv_heads, capacity, width];
        let mut values = random.normals(dims.iter().product());
        for (row, values) in values.chunks_mut(width).enumerate() {
            let key = row % capacity;
            if key >= self.kv_len[row / (capacity * self.kv_heads)] {
                values.fill(f32::NAN);
            } else if identity {
                values.iter_mut().enumerate().for_each(|(j, v)| *v = f32::from(u8::from(j == key)));
            }
        }
        (dims, values)
    }

    /// `[B, 1, Sq, Sk]`: three of ten keys hidden, never the query's own.
    fn mask(&self, random: &mut Random) -> (Vec<usize>, Vec<f32>) {
        let dims = vec![self.kv_len.len(), 1, self.queries, self.keys()];
        let values = (0..dims.iter().product()).map(|at: usize| {
            let (i, j) = (at / self.keys() % self.queries, at % self.keys());
            let own = self.kv_len.iter().any(|len| j + self.queries == i + len);
            if random.below(10) < 3 && !own { f32::NEG_INFINITY } else { random.normal() }
        });
        (dims, values.collect())
    }
}

impl AuditCase for FusedCase {
    fn configuration(&self) -> String {
        let Self { queries, q_heads, kv_heads, head_dim, kv_len, causal, window, mask, .. } = self;
        let (io, kv) = (short(self.io), short(self.kv));
        let kernel = self.kernel.map_or("any kernel".to_owned(), |kernel| format!("{kernel:?}"));
        let what = if self.probabilities { " probabilities" } else { "" };
        format!(
            "Sq={queries} Sk={kv_len:?} Hq/Hkv={q_heads}/{kv_heads} D={head_dim} io={io} kv={kv} causal={causal} \
             window={window:?} mask={mask} {kernel}{what}"
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let batch = self.kv_len.len();
        let dims = [batch, self.queries, self.q_heads, self.head_dim];
        let q = floats_as(b, self.io, &dims, &random.normals(dims.iter().product()))?;
        let (dims, k) = self.cache(self.head_dim, false, random);
        let k = floats_as(b, self.kv, &dims, &k)?;
        let (dims, v) = self.cache(self.value_dim(), self.probabilities, random);
        let v = floats_as(b, self.kv, &dims, &v)?;
        let (dims, mask) = self.mask(random);
        let mask = floats(b, &dims, &mask)?;
        let mut out = poison_as(b, self.io, &[batch, self.queries, self.q_heads, self.value_dim()])?;
        let args = AttentionArgs {
            q: &q,
            k: &k,
            v: &v,
            kv_len: &self.kv_len,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            causal: self.causal,
            window: self.window.map_or(Window::None, Window::Left),
            softcap: None,
            mask: self.mask.then_some(&mask),
            sinks: None,
            empty_row: EmptyRow::Error,
            out: &mut out,
        };
        match self.kernel {
            Some(kernel) => variants.attention(b, kernel, args)?,
            None => b.attention(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let block = self.value_dim();
        if self.probabilities {
            return vec![Tolerance::Blocks { block, bound: bounds::probabilities(self.io) }];
        }
        let count = self.kv_len.len() * self.queries * self.q_heads * block;
        // V is at most sqrt 12 in size.
        let absolute = vec![bounds::attention_of_max_v(self.io) * 12f64.sqrt(); count];
        vec![Tolerance::All(vec![
            Tolerance::Blocks { block, bound: bounds::attention(self.io) },
            Tolerance::Elements { ulps: 0.0, relative: 0.0, absolute },
        ])]
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

/// Products of one head, as a linear layer whose weight is the other operand: scores with the keys, `scale q k^T` plus
/// 0 or -inf, or outputs with the transposed values, `p v`.
#[derive(Debug)]
struct HeadCase {
    rows: usize,
    keys: usize,
    head_dim: usize,
    io: DType,
    causal: bool,
    values: bool,
    /// One-hot rows of p.
    one_hot: bool,
}

impl HeadCase {
    /// `[rows, inner]`, `[columns, inner]`.
    fn dims(&self) -> (usize, usize) {
        if self.values { (self.keys, self.head_dim) } else { (self.head_dim, self.keys) }
    }
}

impl AuditCase for HeadCase {
    fn configuration(&self) -> String {
        let Self { rows, keys, head_dim, causal, one_hot, .. } = self;
        let what = if self.values { "p v" } else { "q k" };
        format!("{what} Sq={rows} Sk={keys} D={head_dim} io={} causal={causal} one_hot={one_hot}", short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let (inner, columns) = self.dims();
        let mut x = random.normals(self.rows * inner);
        if self.values {
            // Probabilities.
            for row in x.chunks_mut(inner) {
                row.iter_mut().for_each(|v| *v = v.exp());
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|v| *v /= sum);
            }
        }
        if self.one_hot {
            x.iter_mut().enumerate().for_each(|(i, v)| *v = f32::from(u8::from(i % inner == 3 * (i / inner) % inner)));
        }
        let x = floats_as(b, self.io, &[self.rows, inner], &x)?;
        let other = HostTensor::from_f32_as(self.io, &[columns, inner], &random.normals(columns * inner))?;
        let other = Linear::new(b, Weight::dense(other)?)?;
        let hidden = (0..self.rows * columns).map(|i| {
            let (query, key) = (i / columns, i % columns);
            let (_, end) = visible_keys(query + self.keys - self.rows, self.keys, self.causal, Window::None);
            if key < end { 0.0 } else { f32::NEG_INFINITY }
        });
        let hidden = floats(b, &[self.rows, columns], &hidden.collect::<Vec<f32>>())?;
        // Scores stay f32; outputs have the type of p.
        let out_type = if self.values { self.io } else { DType::F32 };
        let mut out = poison_as(b, out_type, &[self.rows, columns])?;
        b.linear(LinearArgs {
            x: &x,
            weight: &other,
            activation: Activation::None,
            out_scale: if self.values { 1.0 } else { 1.0 / (self.head_dim as f32).sqrt() },
            residual: if self.causal { Residual::Add(&hidden) } else { Residual::None },
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        if self.one_hot {
            return vec![Tolerance::Exact];
        }
        let (_, block) = self.dims();
        let bound = if self.values { bounds::linear(self.io) } else { bounds::probabilities(self.io) };
        vec![Tolerance::Blocks { block, bound }]
    }
}

/// (Sq, lengths of the sequences).
pub(crate) fn lengths(decode: bool) -> Vec<(usize, Vec<usize>)> {
    if decode {
        return vec![(1, vec![1]), (1, vec![15, 16, 17]), (1, vec![255, 257]), (1, vec![600])];
    }
    vec![(1, vec![129]), (7, vec![7]), (16, vec![40]), (17, vec![33, 60]), (65, vec![257])]
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "attention_paged" => return paged::bind(settings, sink),
        "attention_pv" => return values(settings, sink),
        _ => {}
    }
    if operation == "attention_probs" && !settings.flag("softmax") {
        return scores(settings, sink);
    }
    let kv = match settings.word("kv") {
        None | Some("io") => None,
        Some("f16") => Some(DType::F16),
        Some(_) => return paged::bind_contiguous(operation, settings, sink),
    };
    let kernel = settings.count("kv_tile").map(|kv_tile| AttentionKernel {
        q_tile: settings.count("q_tile").unwrap_or(1),
        kv_tile,
        splits: settings.count("splits").unwrap_or(1),
    });
    // Sums are f32 everywhere.
    settings.implied(&["acc"]);
    let probabilities = operation == "attention_probs";
    settings.implied(if probabilities { &["softmax", "mask"] } else { &[] });
    let masked = settings.words("mask").contains(&"additive");
    let causal = match settings.flags("causal") {
        // A mask of its own may hide later keys, or causality does.
        none if none.is_empty() && masked => vec![false, true],
        none if none.is_empty() => vec![false],
        flags => flags,
    };
    let windows = match settings.word("window") {
        Some(_) => vec![Some(1), Some(16), Some(1000)],
        None => vec![None],
    };
    let groups = match settings.word("gqa") {
        Some("none") => vec![(3, 3)],
        Some("mqa") => vec![(8, 1)],
        _ => vec![(4, 2), (7, 1)],
    };
    let mut widths = settings.counts("d");
    if widths.is_empty() {
        let most = settings.count("d_max").unwrap_or(256);
        widths = [64, 80, 128].into_iter().filter(|&d| d <= most).collect();
    }
    for io in settings.types("io") {
        for (index, (queries, kv_len)) in lengths(operation == "attention_decode").into_iter().enumerate() {
            for &causal in &causal {
                for &window in &windows {
                    let (q_heads, kv_heads) = groups[index % groups.len()];
                    let head_dim = widths[index % widths.len()];
                    let mask = masked && index % 2 == 0;
                    let kv = kv.unwrap_or(io);
                    let kv_len = kv_len.clone();
                    sink.check(&FusedCase {
                        kernel,
                        queries,
                        q_heads,
                        kv_heads,
                        head_dim,
                        kv_len,
                        io,
                        kv,
                        causal,
                        window,
                        mask,
                        probabilities,
                    });
                }
            }
        }
    }
    Ok(())
}

/// Shapes of products of heads: (Sq, Sk).
const PRODUCTS: [(usize, usize); 5] = [(1, 1), (1, 129), (16, 40), (33, 127), (64, 128)];

fn scores<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["gqa", "out"]);
    for io in settings.types("io") {
        for causal in settings.flags("causal") {
            for (head_dim, (rows, keys)) in [64, 80, 96, 128, 64].into_iter().zip(PRODUCTS) {
                sink.check(&HeadCase { rows, keys, head_dim, io, causal, values: false, one_hot: false });
            }
        }
    }
    Ok(())
}

fn values<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["gqa", "d_max"]);
    for io in settings.types("io") {
        for (head_dim, (rows, keys)) in [64, 80, 96, 128, 64].into_iter().zip(PRODUCTS) {
            for one_hot in [false, true] {
                sink.check(&HeadCase { rows, keys, head_dim, io, causal: false, values: true, one_hot });
            }
        }
    }
    Ok(())
}
