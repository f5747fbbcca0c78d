//! Grouped-query attention (Llama, Qwen3): `o(attention(rope(norm(q x)), rope(norm(k x)), v x))`.

use marlin_ops::attention::{AttentionArgs, EmptyRow, KvWriteArgs, Window};
use marlin_ops::linear::{InputNorm, Projection, ProjectionsArgs};
use marlin_ops::norm::RmsNormInPlaceArgs;
use marlin_ops::rope::RopeArgs;
use marlin_ops::{Backend, Linear, Tensor};

use super::{Pass, Probe, block_input, project_onto};
use crate::cache::{LayerCache, cache_mismatch};
use crate::config::{AttentionConfig, ModelConfig};
use crate::error::Result;
use crate::loader::Loader;
use crate::scratch::Scratch;

/// Attention with one key and value head per group of query heads.
pub(crate) struct Gqa<B: Backend> {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Window,
    /// Factor on the scores.
    scale: f32,
    /// Of the per-head norms.
    eps: f32,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    o_proj: Linear<B>,
    /// Per-head norms of q and k, `[head_dim]` each (Qwen3).
    qk_norm: Option<(Tensor<B>, Tensor<B>)>,
}

impl<B: Backend> Gqa<B> {
    /// Loads `self_attn.*` below the loader's prefix.
    pub(crate) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, window: Option<usize>) -> Result<Self> {
        let AttentionConfig::Gqa { heads, kv_heads, head_dim, qk_norm, scale, .. } = config.attention else {
            unreachable!("the caller matched the kind");
        };
        let qk_norm = if qk_norm {
            Some((loader.vector("self_attn.q_norm.weight")?, loader.vector("self_attn.k_norm.weight")?))
        } else {
            None
        };
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
            window: window.map_or(Window::None, Window::Left),
            scale,
            eps: config.rms_norm_eps,
            q_proj: loader.linear("self_attn.q_proj")?,
            k_proj: loader.linear("self_attn.k_proj")?,
            v_proj: loader.linear("self_attn.v_proj")?,
            o_proj: loader.linear("self_attn.o_proj")?,
            qk_norm,
        })
    }

    /// Adds the block's output to `scratch.hidden`; it reads the norm of that, which `scratch.normed` holds unless a
    /// norm to apply is given.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        norm: Option<InputNorm<'_, B>>,
        scratch: &mut Scratch<B>,
        cache: &mut LayerCache<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        let LayerCache::Dense { k: keys, v: values } = cache else {
            return Err(cache_mismatch());
        };
        let Scratch { q, k, v, hidden, normed, .. } = scratch;
        let x = block_input(norm, hidden, normed);
        let (backend, rows) = (pass.backend, pass.rows);
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);

        probe.see_each(backend, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], x)?;
        q.reshape(&[rows, heads * head_dim])?;
        for out in [&mut *k, &mut *v] {
            out.reshape(&[rows, kv_heads * head_dim])?;
        }
        let projections = &mut [
            Projection { weight: &self.q_proj, out: &mut *q },
            Projection { weight: &self.k_proj, out: &mut *k },
            Projection { weight: &self.v_proj, out: &mut *v },
        ];
        backend.projections(ProjectionsArgs { x, norm, projections })?;
        q.reshape(&[rows, heads, head_dim])?;
        for out in [&mut *k, &mut *v] {
            out.reshape(&[rows, kv_heads, head_dim])?;
        }
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            for (x, gamma) in [(&mut *q, q_norm), (&mut *k, k_norm)] {
                backend.rms_norm_in_place(RmsNormInPlaceArgs { x, gamma, gamma_offset: 0.0, eps: self.eps })?;
            }
        }
        for x in [&mut *q, &mut *k] {
            backend.rope(RopeArgs {
                x,
                positions: &scratch.positions,
                table: pass.rope,
                pairing: pass.pairing,
                offset: 0,
                inverse: false,
            })?;
        }

        backend.kv_write(KvWriteArgs { k, v, k_cache: keys, v_cache: values, sequence: 0, start: pass.start })?;
        q.reshape(&[1, rows, heads, head_dim])?;
        scratch.attended.reshape(&[1, rows, heads, head_dim])?;
        backend.attention(AttentionArgs {
            q,
            k: keys,
            v: values,
            kv_len: &[pass.start + rows],
            scale: self.scale,
            causal: true,
            window: self.window,
            softcap: None,
            mask: None,
            sinks: None,
            empty_row: EmptyRow::Error,
            out: &mut scratch.attended,
        })?;

        scratch.attended.reshape(&[rows, heads * head_dim])?;
        probe.see(backend, "self_attn.o_proj", &scratch.attended)?;
        project_onto(backend, &scratch.attended, &self.o_proj, &mut scratch.hidden)
    }

    /// The linear layer called `name` below the decoder layer.
    pub(crate) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear<B>> {
        match name {
            "self_attn.q_proj" => Some(&mut self.q_proj),
            "self_attn.k_proj" => Some(&mut self.k_proj),
            "self_attn.v_proj" => Some(&mut self.v_proj),
            "self_attn.o_proj" => Some(&mut self.o_proj),
            _ => None,
        }
    }
}
