//! Attention over blocks and over quantized caches; a contiguous cache is one block for each sequence.

use half::f16;
use marlin_formats::DType;
use marlin_ops::attention::{EmptyRow, KvFormat, KvPages, PagedAttentionArgs, Window};
use marlin_ops::{Backend, HostTensor, Result};

use super::attention::lengths;
use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::{AttentionKernel, Variants};
use crate::input::{Output, floats_as, ids, poison_as};
use crate::random::Random;
use crate::tolerance::Tolerance;

#[derive(Debug)]
struct PagedCase {
    kernel: Option<AttentionKernel>,
    queries: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// A block for each sequence without.
    block: Option<usize>,
    kv_len: Vec<usize>,
    io: DType,
    kv: KvFormat,
    causal: bool,
}

impl PagedCase {
    /// Rows of a block, blocks of a sequence.
    fn blocks(&self) -> (usize, usize) {
        let keys = self.kv_len.iter().copied().max().unwrap_or(0);
        let block = self.block.unwrap_or(keys);
        (block, keys.div_ceil(block))
    }

    fn pages<B: Backend>(&self, b: &B, count: usize, random: &mut Random) -> Result<KvPages<B>> {
        let (block, _) = self.blocks();
        let width = self.head_dim;
        let shape = [count, self.kv_heads, block];
        let rows: usize = shape.iter().product();
        let values = random.normals(rows * width);
        let dims = [shape[0], shape[1], shape[2], self.kv.row_elements(width)];
        if !self.kv.is_quantized() {
            let data = floats_as(b, self.kv.dtype(), &dims, &values)?;
            return KvPages::from_tensors(self.kv, width, data, None);
        }
        let (mut scales, mut words) = (Vec::<f16>::new(), Vec::new());
        for row in values.chunks(width) {
            let (scale, codes) = self.kv.quantize(row).expect("normal values have codes");
            scales.push(scale);
            words.extend(codes);
        }
        let data = ids(b, &dims, &words)?;
        let scales: Vec<f32> = scales.into_iter().map(f16::to_f32).collect();
        let scales = b.upload(&HostTensor::from_f32_as(DType::F16, &shape, &scales)?)?;
        KvPages::from_tensors(self.kv, width, data, Some(scales))
    }
}

impl AuditCase for PagedCase {
    fn configuration(&self) -> String {
        let Self { kernel, queries, q_heads, kv_heads, head_dim, block, kv_len, causal, .. } = self;
        let (io, kv) = (short(self.io), self.kv.name());
        format!(
            "Sq={queries} Sk={kv_len:?} Hq/Hkv={q_heads}/{kv_heads} D={head_dim} block={block:?} io={io} kv={kv} \
             causal={causal} {kernel:?}"
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let batch = self.kv_len.len();
        let (_, width) = self.blocks();
        let count = batch * width;
        // Blocks in no order; what follows the last key of a sequence names none and is never read.
        let mut table = random.distinct(count, count);
        let (block, _) = self.blocks();
        for (row, len) in table.chunks_mut(width).zip(&self.kv_len) {
            row[len.div_ceil(block)..].fill(u32::MAX);
        }
        let table = ids(b, &[batch, width], &table)?;
        let dims = [batch, self.queries, self.q_heads, self.head_dim];
        let q = floats_as(b, self.io, &dims, &random.normals(dims.iter().product()))?;
        let (keys, values) = (self.pages(b, count, random)?, self.pages(b, count, random)?);
        let mut out = poison_as(b, self.io, &dims)?;
        let args = PagedAttentionArgs {
            q: &q,
            keys: &keys,
            values: &values,
            block_table: &table,
            kv_len: &self.kv_len,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            causal: self.causal,
            window: Window::None,
            softcap: None,
            sinks: None,
            empty_row: EmptyRow::Error,
            out: &mut out,
        };
        match self.kernel {
            Some(kernel) => variants.paged_attention(b, kernel, args)?,
            None => b.paged_attention(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let count = self.kv_len.len() * self.queries * self.q_heads * self.head_dim;
        // V is at most sqrt 12 in size.
        let absolute = vec![bounds::attention_of_max_v(self.io) * 12f64.sqrt(); count];
        vec![Tolerance::All(vec![
            Tolerance::Blocks { block: self.head_dim, bound: bounds::attention(self.io) },
            Tolerance::Elements { ulps: 0.0, relative: 0.0, absolute },
        ])]
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

/// The cache format of a row.
fn format(settings: &Settings<'_>) -> KvFormat {
    match settings.word("kv") {
        Some("fp4") => KvFormat::Fp4,
        Some("int4") => KvFormat::Int4,
        Some("fp8_e4m3") => KvFormat::Fp8,
        Some("f16") => KvFormat::F16,
        other => unreachable!("no cache format is called {other:?}"),
    }
}

/// Head counts and sizes in turn.
fn heads(index: usize) -> (usize, usize, usize) {
    [(4, 2, 64), (8, 1, 80), (3, 3, 128)][index % 3]
}

/// Rows of blocks: one part of the keys, or parts of fixed length.
pub(crate) fn bind<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["gqa", "d_max", "split", "partials"]);
    let kv = format(settings);
    let block = settings.count("block");
    let partition = settings.count("partition");
    for io in settings.types("io") {
        let lengths: [Vec<usize>; 4] = [vec![1], vec![15, 16, 17], vec![255, 256, 257], vec![600]];
        for (index, kv_len) in lengths.into_iter().enumerate() {
            let (q_heads, kv_heads, head_dim) = heads(index);
            let keys = kv_len.iter().copied().max().unwrap_or(0);
            let splits = partition.map_or(1, |partition| keys.div_ceil(partition));
            let kernel = Some(AttentionKernel { q_tile: 1, kv_tile: 128, splits });
            sink.check(&PagedCase {
                kernel,
                queries: 1,
                q_heads,
                kv_heads,
                head_dim,
                block,
                kv_len,
                io,
                kv,
                causal: true,
            });
        }
    }
    Ok(())
}

/// Rows of contiguous quantized caches.
pub(crate) fn bind_contiguous<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["gqa"]);
    let kv = format(settings);
    let kernel = settings.count("kv_tile").map(|kv_tile| AttentionKernel {
        q_tile: settings.count("q_tile").unwrap_or(1),
        kv_tile,
        splits: settings.count("splits").unwrap_or(1),
    });
    let causal = settings.flags("causal");
    let causal = if causal.is_empty() { vec![true] } else { causal };
    for io in settings.types("io") {
        for (index, (queries, kv_len)) in lengths(operation == "attention_decode").into_iter().enumerate() {
            for &causal in &causal {
                let (q_heads, kv_heads, head_dim) = heads(index);
                let kv_len = kv_len.clone();
                sink.check(&PagedCase {
                    kernel,
                    queries,
                    q_heads,
                    kv_heads,
                    head_dim,
                    block: None,
                    kv_len,
                    io,
                    kv,
                    causal,
                });
            }
        }
    }
    Ok(())
}
