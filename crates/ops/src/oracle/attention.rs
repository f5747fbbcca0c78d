//! Attention: scores of all keys, one softmax, one weighted sum.

mod paged;
mod reduce;

use super::{Oracle, floats, linear::dot, store};
use crate::attention::{
    AttentionArgs, AttentionOps, EmptyRow, KvWriteArgs, MlaAttentionArgs, SplitReduceArgs, Window, empty_row_error,
};
use crate::{Result, Tensor};

/// Whether the query at absolute position `p` sees key `j`. A query before the first key (more queries than keys,
/// not causal) has a negative position.
fn visible(p: i64, j: i64, causal: bool, window: Window) -> bool {
    let in_window = match window {
        Window::None => true,
        Window::Left(w) => p - (w as i64) < j && j <= p,
        Window::Symmetric { left, right } => p - left as i64 <= j && j <= p + right as i64,
    };
    in_window && (!causal || j <= p)
}

/// Softmax over all scores, the sink joining the denominator; a score of -inf is a hidden key. None when nothing is
/// visible and there is no sink.
fn softmax(scores: &[f64], sink: Option<f64>) -> Option<Vec<f64>> {
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY && scores.iter().all(|s| !s.is_nan()) {
        return None;
    }
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| (s - max).exp());
    Some(weights.into_iter().map(|w| w / sum).collect())
}

/// `sum_j p_j rows_j`, rows of `width` elements.
fn weighted_sum<'a>(p: &[f64], rows: impl Iterator<Item = &'a [f64]>, width: usize) -> Vec<f64> {
    let mut sum = vec![0.0; width];
    for (p, row) in p.iter().zip(rows) {
        for (s, v) in sum.iter_mut().zip(row) {
            *s += p * v;
        }
    }
    sum
}

/// The additive mask at `[b, h, i, j]`, broadcast over batch and heads.
fn mask_value(mask: &Tensor<Oracle>, b: usize, h: usize, i: usize, j: usize) -> f64 {
    let &[batch, heads, queries, keys] = mask.dims() else { unreachable!("the mask was checked to have 4 dimensions") };
    let b = if batch == 1 { 0 } else { b };
    let h = if heads == 1 { 0 } else { h };
    floats(mask)[((b * heads + h) * queries + i) * keys + j]
}

impl AttentionOps for Oracle {
    fn run_attention_split_reduce(&self, args: SplitReduceArgs<'_, Self>) -> Result<()> {
        reduce::attention_split_reduce(args)
    }

    fn run_attention(&self, args: AttentionArgs<'_, Self>) -> Result<()> {
        let &[batch, queries, q_heads, head_dim] = args.q.dims() else {
            unreachable!("q was checked to have 4 dimensions")
        };
        let (kv_heads, capacity) = (args.k.dims()[1], args.k.dims()[2]);
        let value_dim = args.v.columns();
        for (b, &kv_len) in args.kv_len.iter().enumerate().take(batch) {
            for i in 0..queries {
                let p = (i + kv_len) as i64 - queries as i64;
                for h in 0..q_heads {
                    let row = (b * queries + i) * q_heads + h;
                    let q = &floats(args.q)[row * head_dim..][..head_dim];
                    let first_key = (b * kv_heads + h / (q_heads / kv_heads)) * capacity;
                    let key = |j: usize| &floats(args.k)[(first_key + j) * head_dim..][..head_dim];
                    let score = |j: usize| {
                        if !visible(p, j as i64, args.causal, args.window) {
                            return f64::NEG_INFINITY;
                        }
                        let mut s = f64::from(args.scale) * dot(q, key(j));
                        if let Some(softcap) = args.softcap.map(f64::from) {
                            s = softcap * (s / softcap).tanh();
                        }
                        s + args.mask.map_or(0.0, |mask| mask_value(mask, b, h, i, j))
                    };
                    let scores: Vec<f64> = (0..kv_len).map(score).collect();
                    let sink = args.sinks.map(|sinks| floats(sinks)[h]);
                    let out = match softmax(&scores, sink) {
                        Some(p) => {
                            let values = floats(args.v)[first_key * value_dim..].chunks(value_dim);
                            sum_visible(&p, &scores, values, value_dim)
                        }
                        None if args.empty_row == EmptyRow::Zero => vec![0.0; value_dim],
                        None => return Err(empty_row_error(b, h, i)),
                    };
                    store(args.out, row * value_dim, &out);
                }
            }
        }
        Ok(())
    }

    fn run_kv_write(&self, args: KvWriteArgs<'_, Self>) -> Result<()> {
        for (rows, cache) in [(args.k, args.k_cache), (args.v, args.v_cache)] {
            let &[tokens, heads, width] = rows.dims() else {
                unreachable!("k and v were checked to have 3 dimensions")
            };
            let capacity = cache.dims()[2];
            for t in 0..tokens {
                for h in 0..heads {
                    let row = &floats(rows)[(t * heads + h) * width..][..width];
                    let slot = (args.sequence * heads + h) * capacity + args.start + t;
                    store(cache, slot * width, row);
                }
            }
        }
        Ok(())
    }

    /// Expanded form: `k_h = [U_h c | k_pe]`, `v_h = V_h c`.
    fn run_mla_prefill(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        for_each_mla_query(args, |q, cache, kv_b, scale| {
            let expanded: Vec<(Vec<f64>, Vec<f64>)> = cache
                .iter()
                .map(|(c, k_pe)| {
                    let mut k: Vec<f64> = kv_b.key.iter().map(|u| dot(u, c)).collect();
                    k.extend_from_slice(k_pe);
                    (k, kv_b.value.iter().map(|v| dot(v, c)).collect())
                })
                .collect();
            let scores: Vec<f64> = expanded.iter().map(|(k, _)| scale * dot(q, k)).collect();
            let p = softmax(&scores, None)?;
            Some(weighted_sum(&p, expanded.iter().map(|(_, v)| &v[..]), kv_b.value.len()))
        })
    }

    /// Absorbed form: `s_j = scale (U_h^T q_nope . c_j + q_pe . k_pe_j)`, `o = V_h sum_j p_j c_j`.
    fn run_mla_decode(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        for_each_mla_query(args, |q, cache, kv_b, scale| {
            let (q_nope, q_pe) = q.split_at(kv_b.key.len());
            let rank = cache[0].0.len();
            let absorbed = weighted_sum(q_nope, kv_b.key.iter().copied(), rank);
            let scores: Vec<f64> =
                cache.iter().map(|(c, k_pe)| scale * (dot(&absorbed, c) + dot(q_pe, k_pe))).collect();
            let p = softmax(&scores, None)?;
            let latent = weighted_sum(&p, cache.iter().map(|(c, _)| *c), rank);
            Some(kv_b.value.iter().map(|v| dot(v, &latent)).collect())
        })
    }
}

/// [`weighted_sum`] over the keys that are not hidden: what a hidden slot holds, even NaN, is never read.
fn sum_visible<'a>(p: &[f64], scores: &[f64], rows: impl Iterator<Item = &'a [f64]>, width: usize) -> Vec<f64> {
    let seen: Vec<(f64, &[f64])> = p
        .iter()
        .zip(scores)
        .zip(rows)
        .filter(|((_, score), _)| **score != f64::NEG_INFINITY)
        .map(|((p, _), row)| (*p, row))
        .collect();
    let (p, rows): (Vec<f64>, Vec<&[f64]>) = seen.into_iter().unzip();
    weighted_sum(&p, rows.into_iter(), width)
}

/// The rows of `kv_b` that belong to one head: n key rows U_h, then v value rows V_h, each `[r]`.
struct HeadProjection<'a> {
    key: Vec<&'a [f64]>,
    value: Vec<&'a [f64]>,
}

/// Calls `attend(q, cache rows (c, k_pe) up to the query's position, kv_b rows of the head, scale)` for every query
/// and head and stores what it returns.
fn for_each_mla_query(
    args: MlaAttentionArgs<'_, Oracle>,
    attend: impl Fn(&[f64], &[(&[f64], &[f64])], &HeadProjection<'_>, f64) -> Option<Vec<f64>>,
) -> Result<()> {
    let dims = args.dims();
    let kv_b = args.kv_b.data();
    let (q_width, row_width) = (dims.nope + dims.rope, dims.rank + dims.rope);
    for b in 0..dims.batch {
        for i in 0..dims.queries {
            let visible = args.kv_len[b] - dims.queries + i + 1;
            let cache: Vec<(&[f64], &[f64])> = (0..visible)
                .map(|j| &floats(args.cache)[(b * dims.capacity + j) * row_width..][..row_width])
                .map(|row| row.split_at(dims.rank))
                .collect();
            for h in 0..dims.heads {
                let first = h * (dims.nope + dims.value);
                let head = HeadProjection {
                    key: (0..dims.nope).map(|n| kv_b.row(first + n)).collect(),
                    value: (0..dims.value).map(|v| kv_b.row(first + dims.nope + v)).collect(),
                };
                let row = (b * dims.queries + i) * dims.heads + h;
                let q = &floats(args.q)[row * q_width..][..q_width];
                let out = attend(q, &cache, &head, f64::from(args.scale)).ok_or_else(|| empty_row_error(b, h, i))?;
                store(args.out, row * dims.value, &out);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, dense, empty, tensor, waves};
    use super::*;
    use crate::Device;

    /// Two keys with scores ln 1 and ln 3 for the query 1, values 10 and 20.
    struct TwoKeys {
        queries: usize,
        causal: bool,
        softcap: Option<f32>,
        sink: Option<f32>,
        mask: Option<Vec<f32>>,
        empty_row: EmptyRow,
    }

    const PLAIN: TwoKeys =
        TwoKeys { queries: 1, causal: true, softcap: None, sink: None, mask: None, empty_row: EmptyRow::Error };

    fn attend(case: TwoKeys) -> Result<Vec<f64>> {
        let oracle = Oracle::new();
        let q = tensor(&[1, case.queries, 1, 1], &vec![1.0; case.queries]);
        // The third slot lies beyond kv_len.
        let k = tensor(&[1, 1, 3, 1], &[0.0, 3f32.ln(), f32::NAN]);
        let v = tensor(&[1, 1, 3, 1], &[10.0, 20.0, f32::NAN]);
        let mask = case.mask.map(|m| tensor(&[1, 1, case.queries, 2], &m));
        let sinks = case.sink.map(|s| tensor(&[1], &[s]));
        let mut out = empty(&[1, case.queries, 1, 1]);
        let args = AttentionArgs {
            q: &q,
            k: &k,
            v: &v,
            kv_len: &[2],
            scale: 1.0,
            causal: case.causal,
            window: Window::None,
            softcap: case.softcap,
            mask: mask.as_ref(),
            sinks: sinks.as_ref(),
            empty_row: case.empty_row,
            out: &mut out,
        };
        oracle.attention(args)?;
        oracle.read_f64(&out)
    }

    #[test]
    fn softmax_of_two_keys() {
        assert_close(&attend(PLAIN).unwrap(), &[17.5], 1e-6);
        // Causal prefill: the first query sees the first key alone.
        let two = TwoKeys { queries: 2, ..PLAIN };
        assert_close(&attend(two).unwrap(), &[10.0, 17.5], 1e-6);
        let two = TwoKeys { queries: 2, causal: false, ..PLAIN };
        assert_close(&attend(two).unwrap(), &[17.5, 17.5], 1e-6);
    }

    #[test]
    fn sink_takes_mass_and_adds_nothing() {
        // Denominator 1 + 3 + 4.
        let case = TwoKeys { sink: Some(4f32.ln()), ..PLAIN };
        assert_close(&attend(case).unwrap(), &[70.0 / 8.0], 1e-6);
    }

    #[test]
    fn cap_comes_before_mask() {
        let case = TwoKeys { softcap: Some(0.5), mask: Some(vec![1.0, 0.0]), ..PLAIN };
        let (a, b) = (1f64.exp(), (0.5 * (2.0 * 3f64.ln()).tanh()).exp());
        assert_close(&attend(case).unwrap(), &[(10.0 * a + 20.0 * b) / (a + b)], 1e-6);
    }

    #[test]
    fn rows_without_keys() {
        let hidden = || Some(vec![f32::NEG_INFINITY; 2]);
        let error = attend(TwoKeys { mask: hidden(), ..PLAIN }).unwrap_err();
        assert!(error.to_string().contains("sees no key"));
        let zero = TwoKeys { mask: hidden(), empty_row: EmptyRow::Zero, ..PLAIN };
        assert_eq!(attend(zero).unwrap(), [0.0]);
        let sink = TwoKeys { mask: hidden(), sink: Some(0.0), ..PLAIN };
        assert_eq!(attend(sink).unwrap(), [0.0]);
    }

    #[test]
    fn windows_follow_the_definition_and_the_shared_range() {
        for window in [Window::None, Window::Left(1), Window::Left(3), Window::Symmetric { left: 2, right: 1 }] {
            for (p, causal) in (0..8).flat_map(|p| [(p, true), (p, false)]) {
                let (first, end) = crate::attention::visible_keys(p, 8, causal, window);
                for j in 0..8 {
                    let expected = (first..end).contains(&j);
                    assert_eq!(visible(p as i64, j as i64, causal, window), expected);
                }
            }
        }
    }

    #[test]
    fn mla_forms_agree() {
        let oracle = Oracle::new();
        let (batch, queries, heads, nope, rope, value, rank, capacity) = (2, 3, 2, 4, 2, 3, 5, 7);
        let q = tensor(&[batch, queries, heads, nope + rope], &waves(72, 0.1));
        let cache = tensor(&[batch, capacity, rank + rope], &waves(98, 0.7));
        let kv_b = dense(heads * (nope + value), rank, &waves(70, 1.3));
        let run = |decode: bool| {
            let mut out = empty(&[batch, queries, heads, value]);
            let args = MlaAttentionArgs {
                q: &q,
                cache: &cache,
                kv_len: &[7, 4],
                kv_b: &kv_b,
                nope_head_dim: nope,
                rope_head_dim: rope,
                scale: 0.6,
                out: &mut out,
            };
            let done = if decode { oracle.mla_decode(args) } else { oracle.mla_prefill(args) };
            done.map(|()| oracle.read_f64(&out).unwrap()).unwrap()
        };
        let (prefill, decode) = (run(false), run(true));
        assert!(prefill.iter().any(|v| v.abs() > 0.1));
        assert_close(&decode, &prefill, 1e-12);
    }

    #[test]
    fn cache_rows_land_in_their_slots() {
        let oracle = Oracle::new();
        let k = tensor(&[1, 2, 1], &[1.0, 2.0]);
        let v = tensor(&[1, 2, 2], &[3.0, 4.0, 5.0, 6.00001]);
        let mut k_cache = empty(&[2, 2, 2, 1]);
        let mut v_cache = oracle.zeros(marlin_formats::DType::BF16, &[2, 2, 2, 2]).unwrap();
        let args = KvWriteArgs { k: &k, v: &v, k_cache: &mut k_cache, v_cache: &mut v_cache, sequence: 1, start: 1 };
        oracle.kv_write(args).unwrap();
        assert_eq!(oracle.read_f64(&k_cache).unwrap(), [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0]);
        let v = oracle.read_f64(&v_cache).unwrap();
        assert_eq!(v[10..], [3.0, 4.0, 0.0, 0.0, 5.0, 6.0]);
    }
}
