//! Attention over blocks.

use half::f16;

use super::super::linear::dot;
use super::super::{Oracle, Values, floats, store, words};
use super::{softmax, sum_visible, visible};
use crate::attention::{
    EmptyRow, KvPages, PADDING, PagedAttentionArgs, PagedAttentionOps, PagedWriteArgs, block_error, empty_row_error,
    unstorable_error,
};
use crate::{Result, Tensor};

/// Row `row` of `[blocks, Hkv, bs]`, decoded.
fn decoded(pages: &KvPages<Oracle>, row: usize) -> Vec<f64> {
    let (format, width) = (pages.format(), pages.width());
    let Some(scales) = pages.scales() else {
        return floats(pages.data())[row * width..][..width].to_vec();
    };
    let elements = format.row_elements(width);
    let codes = &words(pages.data())[row * elements..][..elements];
    (0..width).map(|i| f64::from(format.decode(format.code(codes, i))) * floats(scales)[row]).collect()
}

/// Stores a row; false when the format cannot hold it.
fn write(pages: &mut KvPages<Oracle>, row: usize, values: &[f64]) -> bool {
    let (format, width) = (pages.format(), pages.width());
    let (data, scales) = pages.tensors_mut();
    let Some(scales) = scales else {
        store(data, row * width, values);
        return true;
    };
    let amax = values.iter().map(|x| x.abs()).fold(0.0, f64::max);
    if values.iter().any(|x| !x.is_finite()) {
        return false;
    }
    let floor = if amax > 0.0 { f16::from_bits(1) } else { f16::ZERO };
    let scale = f16::from_f64(amax / f64::from(format.largest())).max(floor);
    if scale.is_infinite() {
        return false;
    }
    let code = |x: &f64| format.encode(if amax > 0.0 { (x / scale.to_f64()) as f32 } else { 0.0 });
    let codes = format.pack(&values.iter().map(code).collect::<Vec<_>>());
    store(scales, row, &[scale.to_f64()]);
    write_words(data, row * codes.len(), &codes);
    true
}

fn write_words(out: &mut Tensor<Oracle>, start: usize, words: &[u32]) {
    match out.buffer_mut() {
        Values::Words(slots) => slots[start..][..words.len()].copy_from_slice(words),
        Values::Floats(_) => unreachable!("codes are U32"),
    }
}

impl PagedAttentionOps for Oracle {
    fn run_paged_write(&self, args: PagedWriteArgs<'_, Self>) -> Result<()> {
        for (name, rows, pages) in [("k", args.k, args.keys), ("v", args.v, args.values)] {
            let [_, heads, block_size] = pages.shape();
            let width = pages.width();
            for (t, &slot) in args.slots.iter().enumerate().filter(|(_, slot)| **slot != PADDING) {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                for h in 0..heads {
                    let row = &floats(rows)[(t * heads + h) * width..][..width];
                    if !write(pages, (block * heads + h) * block_size + offset, row) {
                        return Err(unstorable_error(name, t * heads + h));
                    }
                }
            }
        }
        Ok(())
    }

    fn run_paged_attention(&self, args: PagedAttentionArgs<'_, Self>) -> Result<()> {
        let &[batch, queries, q_heads, head_dim] = args.q.dims() else {
            unreachable!("q was checked to have 4 dimensions")
        };
        let ([blocks, kv_heads, block_size], value_dim) = (args.keys.shape(), args.values.width());
        let most = args.block_table.columns();
        for b in 0..batch {
            let kv_len = args.kv_len[b];
            let table = &words(args.block_table)[b * most..][..kv_len.div_ceil(block_size)];
            if let Some(entry) = table.iter().position(|block| *block as usize >= blocks) {
                return Err(block_error(b * most + entry));
            }
            for h in 0..q_heads {
                let place = |j: usize| {
                    let block = table[j / block_size] as usize;
                    (block * kv_heads + h / (q_heads / kv_heads)) * block_size + j % block_size
                };
                let keys: Vec<_> = (0..kv_len).map(|j| decoded(args.keys, place(j))).collect();
                let values: Vec<_> = (0..kv_len).map(|j| decoded(args.values, place(j))).collect();
                for i in 0..queries {
                    let p = (i + kv_len) as i64 - queries as i64;
                    let row = (b * queries + i) * q_heads + h;
                    let q = &floats(args.q)[row * head_dim..][..head_dim];
                    let score = |j: usize| {
                        if !visible(p, j as i64, args.causal, args.window) {
                            return f64::NEG_INFINITY;
                        }
                        let s = f64::from(args.scale) * dot(q, &keys[j]);
                        args.softcap.map(f64::from).map_or(s, |softcap| softcap * (s / softcap).tanh())
                    };
                    let scores: Vec<f64> = (0..kv_len).map(score).collect();
                    let out = match softmax(&scores, args.sinks.map(|sinks| floats(sinks)[h])) {
                        Some(p) => sum_visible(&p, &scores, values.iter().map(|row| &row[..]), value_dim),
                        None if args.empty_row == EmptyRow::Zero => vec![0.0; value_dim],
                        None => return Err(empty_row_error(b, h, i)),
                    };
                    store(args.out, row * value_dim, &out);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{assert_close, empty, ids, tensor, waves};
    use super::*;
    use crate::Device;
    use crate::attention::{AttentionArgs, AttentionOps, KvFormat, Window};

    /// Blocks in any order give what a contiguous cache gives.
    #[test]
    fn equals_contiguous_attention() {
        let oracle = Oracle::new();
        let (heads, width, len) = (2, 3, 5);
        let (k, v, q) = (waves(heads * 6 * width, 0.1), waves(heads * 6 * width, 0.7), waves(2 * 4 * width, 1.3));
        let q = tensor(&[1, 2, 4, width], &q);
        let mut expected = empty(&[1, 2, 4, width]);
        let args = AttentionArgs {
            q: &q,
            k: &tensor(&[1, heads, 6, width], &k),
            v: &tensor(&[1, heads, 6, width], &v),
            kv_len: &[len],
            scale: 0.5,
            causal: true,
            window: Window::Left(4),
            softcap: None,
            mask: None,
            sinks: None,
            empty_row: EmptyRow::Error,
            out: &mut expected,
        };
        oracle.attention(args).unwrap();
        // `[T, Hkv, D]` to blocks of two rows, at the slots of blocks 2, 0, 3.
        let by_token = |x: &[f32]| {
            let at = |t: usize, h: usize| x[(h * 6 + t) * width..][..width].to_vec();
            tensor(
                &[len, heads, width],
                &(0..len).flat_map(|t| (0..heads).flat_map(move |h| at(t, h))).collect::<Vec<_>>(),
            )
        };
        let pages = || KvPages::new(&oracle, KvFormat::F32, [4, heads, 2], width).unwrap();
        let (mut keys, mut values) = (pages(), pages());
        let slots = [4, 5, 0, 1, 6];
        let write =
            PagedWriteArgs { k: &by_token(&k), v: &by_token(&v), slots: &slots, keys: &mut keys, values: &mut values };
        oracle.paged_write(write).unwrap();
        let mut out = empty(&[1, 2, 4, width]);
        let mut attend = |table: &[u32]| {
            oracle.paged_attention(PagedAttentionArgs {
                q: &q,
                keys: &keys,
                values: &values,
                block_table: &ids(&[1, 4], table),
                kv_len: &[len],
                scale: 0.5,
                causal: true,
                window: Window::Left(4),
                softcap: None,
                sinks: None,
                empty_row: EmptyRow::Error,
                out: &mut out,
            })
        };
        assert!(attend(&[2, 0, 4, 9]).unwrap_err().to_string().contains("[2] is no block"));
        attend(&[2, 0, 3, 9]).unwrap();
        assert_close(&oracle.read_f64(&out).unwrap(), &oracle.read_f64(&expected).unwrap(), 0.0);
    }

    #[test]
    fn quantized_rows_come_back_rounded() {
        let oracle = Oracle::new();
        for (format, bound) in
            [(KvFormat::Fp8, 0.03), (KvFormat::Int8, 0.009), (KvFormat::Int4, 0.14), (KvFormat::Fp4, 0.15)]
        {
            let row = waves(128, 0.4);
            let mut pages = KvPages::new(&oracle, format, [1, 1, 2], 128).unwrap();
            assert!(write(&mut pages, 1, &row.iter().copied().map(f64::from).collect::<Vec<_>>()));
            let found = decoded(&pages, 1);
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let row: Vec<f64> = row.into_iter().map(f64::from).collect();
            let error: Vec<f64> = row.iter().zip(&found).map(|(a, b)| a - b).collect();
            assert!(norm(&error) <= bound * norm(&row), "{format:?}: {}", norm(&error) / norm(&row));
            assert!(!write(&mut pages, 0, &[f64::NAN; 128]));
        }
    }
}
