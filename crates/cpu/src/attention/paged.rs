//! Attention over blocks, a plain version: one query head after the other.

use marlin_ops::Result;
use marlin_ops::attention::{
    EmptyRow, KvFormat, KvPages, PADDING, PagedAttentionArgs, PagedAttentionOps, PagedWriteArgs, block_error,
    empty_row_error, unstorable_error, visible_keys,
};

use crate::Cpu;
use crate::buffer::{Floats, FloatsMut, f32s, f32s_mut, optional_f32s, u32s, u32s_mut};

/// Rows of keys or values.
enum Rows<'a> {
    Floats(Floats<'a>),
    Codes { format: KvFormat, words: &'a [u32], scales: Floats<'a> },
}

impl<'a> Rows<'a> {
    fn of(operation: &'static str, pages: &'a KvPages<Cpu>) -> Result<Self> {
        let Some(scales) = pages.scales() else {
            return Ok(Self::Floats(Floats::of(operation, "data", pages.data())?));
        };
        let words = u32s(operation, "data", pages.data())?;
        Ok(Self::Codes { format: pages.format(), words, scales: Floats::of(operation, "scales", scales)? })
    }

    /// Decodes row `row`.
    fn read(&self, cpu: &Cpu, row: usize, out: &mut [f32]) {
        match self {
            Self::Floats(floats) => floats.widen(cpu.level, row * out.len(), out),
            Self::Codes { format, words, scales } => {
                let mut scale = [0.0];
                scales.widen(cpu.level, row, &mut scale);
                let elements = format.row_elements(out.len());
                let codes = &words[row * elements..][..elements];
                for (i, value) in out.iter_mut().enumerate() {
                    *value = format.decode(format.code(codes, i)) * scale[0];
                }
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Stores a row; false when the format cannot hold it.
fn write(operation: &'static str, pages: &mut KvPages<Cpu>, row: usize, values: &[f32]) -> Result<bool> {
    let format = pages.format();
    let (data, scales) = pages.tensors_mut();
    let Some(scales) = scales else {
        FloatsMut::of(operation, "data", data)?.store(row * values.len(), values);
        return Ok(true);
    };
    let Some((scale, words)) = format.quantize(values) else { return Ok(false) };
    FloatsMut::of(operation, "scales", scales)?.store(row, &[scale.to_f32()]);
    u32s_mut(operation, "data", data)?[row * words.len()..][..words.len()].copy_from_slice(&words);
    Ok(true)
}

impl PagedAttentionOps for Cpu {
    fn run_paged_write(&self, args: PagedWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "paged_write";
        for (name, rows, pages) in [("k", args.k, args.keys), ("v", args.v, args.values)] {
            let [_, heads, block_size] = pages.shape();
            let width = pages.width();
            let source = f32s(OP, name, rows)?;
            for (t, &slot) in args.slots.iter().enumerate().filter(|(_, slot)| **slot != PADDING) {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                for h in 0..heads {
                    let row = &source[(t * heads + h) * width..][..width];
                    if !write(OP, pages, (block * heads + h) * block_size + offset, row)? {
                        return Err(unstorable_error(name, t * heads + h));
                    }
                }
            }
        }
        Ok(())
    }

    fn run_paged_attention(&self, args: PagedAttentionArgs<'_, Self>) -> Result<()> {
        const OP: &str = "paged_attention";
        let &[batch, queries, heads, head_dim] = args.q.dims() else {
            unreachable!("q was checked to have 4 dimensions")
        };
        let ([blocks, kv_heads, block_size], value_dim) = (args.keys.shape(), args.values.width());
        let (q, sinks) = (f32s(OP, "q", args.q)?, optional_f32s(OP, "sinks", args.sinks)?);
        let (keys, values) = (Rows::of(OP, args.keys)?, Rows::of(OP, args.values)?);
        let (table, most) = (u32s(OP, "block_table", args.block_table)?, args.block_table.columns());
        let out = f32s_mut(OP, "out", args.out)?;
        let (mut key, mut value) = (vec![0.0; head_dim], vec![0.0; value_dim]);
        for (b, &kv_len) in args.kv_len.iter().enumerate().take(batch) {
            let table = &table[b * most..][..kv_len.div_ceil(block_size)];
            if let Some(entry) = table.iter().position(|block| *block as usize >= blocks) {
                return Err(block_error(b * most + entry));
            }
            for (i, h) in (0..queries).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                let place = |j: usize| {
                    let block = table[j / block_size] as usize;
                    (block * kv_heads + h / (heads / kv_heads)) * block_size + j % block_size
                };
                let p = (i + kv_len).saturating_sub(queries);
                let (first, end) = visible_keys(p, kv_len, args.causal, args.window);
                let row = (b * queries + i) * heads + h;
                let query = &q[row * head_dim..][..head_dim];
                let mut scores: Vec<f32> = Vec::with_capacity(end - first);
                for j in first..end {
                    keys.read(self, place(j), &mut key);
                    let s = args.scale * dot(query, &key);
                    scores.push(args.softcap.map_or(s, |softcap| softcap * (s / softcap).tanh()));
                }
                let out = &mut out[row * value_dim..][..value_dim];
                out.fill(0.0);
                let max = scores.iter().copied().chain(sinks.map(|sinks| sinks[h])).fold(f32::NEG_INFINITY, f32::max);
                if max == f32::NEG_INFINITY && scores.iter().all(|s| !s.is_nan()) {
                    if args.empty_row == EmptyRow::Error {
                        return Err(empty_row_error(b, h, i));
                    }
                    continue;
                }
                let mut sum = sinks.map_or(0.0, |sinks| (sinks[h] - max).exp());
                for (j, s) in (first..end).zip(&scores) {
                    let weight = (s - max).exp();
                    sum += weight;
                    values.read(self, place(j), &mut value);
                    out.iter_mut().zip(&value).for_each(|(out, v)| *out += weight * v);
                }
                out.iter_mut().for_each(|out| *out /= sum);
            }
        }
        Ok(())
    }
}
