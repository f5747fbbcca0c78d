//! Multi-head latent attention (DeepSeek-V2/V3, GLM-4.7-Flash): keys and values live in the cache as one normalised
//! latent row and one rotated key row per token, shared by all heads.

use marlin_ops::attention::MlaAttentionArgs;
use marlin_ops::linear::{InputNorm, Projection, ProjectionsArgs};
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::{MlaLatentWriteArgs, RopeArgs};
use marlin_ops::{Backend, Linear, Tensor};

use super::{Pass, Probe, block_input, project_onto};
use crate::cache::{LayerCache, cache_mismatch};
use crate::config::{AttentionConfig, ModelConfig};
use crate::error::Result;
use crate::loader::Loader;
use crate::scratch::Scratch;

/// How queries are projected.
enum Query<B: Backend> {
    /// `q_proj x`.
    Direct(Linear<B>),
    /// `q_b_proj rms_norm(q_a_proj x)`.
    Latent { q_a_proj: Linear<B>, norm: Tensor<B>, q_b_proj: Linear<B> },
}

/// Attention on a compressed cache.
pub(crate) struct Mla<B: Backend> {
    heads: usize,
    nope_head_dim: usize,
    rope_head_dim: usize,
    value_head_dim: usize,
    rank: usize,
    /// Factor on the scores.
    scale: f32,
    /// Of the two latent norms.
    eps: f32,
    query: Query<B>,
    kv_a_proj: Linear<B>,
    kv_a_norm: Tensor<B>,
    kv_b_proj: Linear<B>,
    o_proj: Linear<B>,
}

impl<B: Backend> Mla<B> {
    /// Loads `self_attn.*` below the loader's prefix.
    pub(crate) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig) -> Result<Self> {
        let AttentionConfig::Mla {
            heads,
            q_lora_rank,
            kv_lora_rank: rank,
            qk_nope_head_dim: nope_head_dim,
            qk_rope_head_dim: rope_head_dim,
            v_head_dim: value_head_dim,
            latent_norm_eps: eps,
            scale,
            ..
        } = config.attention
        else {
            unreachable!("the caller matched the kind");
        };
        let query = match q_lora_rank {
            None => Query::Direct(loader.linear("self_attn.q_proj")?),
            Some(_) => Query::Latent {
                q_a_proj: loader.linear("self_attn.q_a_proj")?,
                norm: loader.vector("self_attn.q_a_layernorm.weight")?,
                q_b_proj: loader.linear("self_attn.q_b_proj")?,
            },
        };
        Ok(Self {
            heads,
            nope_head_dim,
            rope_head_dim,
            value_head_dim,
            rank,
            scale,
            eps,
            query,
            kv_a_proj: loader.linear("self_attn.kv_a_proj_with_mqa")?,
            kv_a_norm: loader.vector("self_attn.kv_a_layernorm.weight")?,
            kv_b_proj: loader.linear_in_channel_order("self_attn.kv_b_proj")?,
            o_proj: loader.linear("self_attn.o_proj")?,
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
        self.project_input(pass, norm, scratch, probe)?;
        self.write_queries(pass, scratch, probe)?;
        let LayerCache::Latent(cache) = cache else {
            return Err(cache_mismatch());
        };
        self.write_latent(pass, scratch, cache, probe)?;
        self.attend(pass, scratch, cache)?;
        probe.see(pass.backend, "self_attn.o_proj", &scratch.attended)?;
        project_onto(pass.backend, &scratch.attended, &self.o_proj, &mut scratch.hidden)
    }

    /// The two products of the block's input: queries or their latent rows, and the latent rows of keys and values.
    fn project_input(
        &self,
        pass: &Pass<'_, B>,
        norm: Option<InputNorm<'_, B>>,
        scratch: &mut Scratch<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        let Scratch { q, q_latent, kv_latent, hidden, normed, .. } = scratch;
        let x = block_input(norm, hidden, normed);
        let (name, weight, out) = match &self.query {
            Query::Direct(q_proj) => ("self_attn.q_proj", q_proj, q),
            Query::Latent { q_a_proj, .. } => ("self_attn.q_a_proj", q_a_proj, q_latent),
        };
        probe.see_each(pass.backend, [name, "self_attn.kv_a_proj_with_mqa"], x)?;
        out.reshape(&[pass.rows, weight.out_features()])?;
        kv_latent.reshape(&[pass.rows, self.kv_a_proj.out_features()])?;
        let projections = &mut [Projection { weight, out }, Projection { weight: &self.kv_a_proj, out: kv_latent }];
        pass.backend.projections(ProjectionsArgs { x, norm, projections })?;
        Ok(())
    }

    /// Rotated queries of all heads, each `[nope | rope]`.
    fn write_queries(&self, pass: &Pass<'_, B>, scratch: &mut Scratch<B>, probe: &mut Probe<'_>) -> Result<()> {
        let Scratch { q, q_latent, q_latent_normed, .. } = scratch;
        let backend = pass.backend;
        if let Query::Latent { norm: gamma, q_b_proj, .. } = &self.query {
            let mut norm = Some(InputNorm { gamma, gamma_offset: 0.0, eps: self.eps });
            let mut x = &*q_latent;
            if probe.is_active() {
                q_latent_normed.reshape(q_latent.dims())?;
                backend.rms_norm(RmsNormArgs {
                    x: q_latent,
                    residual: None,
                    gamma: Some(gamma),
                    gamma_offset: 0.0,
                    eps: self.eps,
                    out: q_latent_normed,
                })?;
                probe.see(backend, "self_attn.q_b_proj", q_latent_normed)?;
                (x, norm) = (&*q_latent_normed, None);
            }
            q.reshape(&[pass.rows, q_b_proj.out_features()])?;
            let projections = &mut [Projection { weight: q_b_proj, out: &mut *q }];
            backend.projections(ProjectionsArgs { x, norm, projections })?;
        }
        let (nope, rope) = (self.nope_head_dim, self.rope_head_dim);
        q.reshape(&[pass.rows, self.heads, nope + rope])?;
        backend.rope(RopeArgs {
            x: q,
            positions: &scratch.positions,
            table: pass.rope,
            pairing: pass.pairing,
            offset: nope,
            inverse: false,
        })?;
        Ok(())
    }

    /// Appends `[rms_norm(c) | rope(k_pe)]` of the latent rows to the cache.
    fn write_latent(
        &self,
        pass: &Pass<'_, B>,
        scratch: &mut Scratch<B>,
        cache: &mut Tensor<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        let Scratch { kv_latent, .. } = scratch;
        let backend = pass.backend;
        backend.mla_latent_write(MlaLatentWriteArgs {
            x: kv_latent,
            gamma: Some(&self.kv_a_norm),
            eps: self.eps,
            positions: &scratch.positions,
            table: pass.rope,
            pairing: pass.pairing,
            cache,
            sequence: 0,
            start: pass.start,
        })?;
        if probe.is_active() {
            // The cache row is the only place where the normalised c exists; its rope columns are not kv_b's input.
            backend.copy_rows(cache, pass.start, pass.rows, kv_latent)?;
            let rank = self.rank;
            probe.see_columns(backend, "self_attn.kv_b_proj", kv_latent, rank)?;
        }
        Ok(())
    }

    /// `scratch.attended = [rows, heads * v_head_dim]`.
    fn attend(&self, pass: &Pass<'_, B>, scratch: &mut Scratch<B>, cache: &Tensor<B>) -> Result<()> {
        let Scratch { q, .. } = scratch;
        let (rows, heads) = (pass.rows, self.heads);
        let (nope, rope) = (self.nope_head_dim, self.rope_head_dim);
        q.reshape(&[1, rows, heads, nope + rope])?;
        scratch.attended.reshape(&[1, rows, heads, self.value_head_dim])?;
        let args = MlaAttentionArgs {
            q,
            cache,
            kv_len: &[pass.start + rows],
            kv_b: &self.kv_b_proj,
            nope_head_dim: nope,
            rope_head_dim: rope,
            scale: self.scale,
            out: &mut scratch.attended,
        };
        let width = nope + self.value_head_dim;
        if expansion_pays(rows, pass.start + rows, width, self.rank) {
            pass.backend.mla_prefill(args)?;
        } else {
            pass.backend.mla_decode(args)?;
        }
        scratch.attended.reshape(&[rows, heads * self.value_head_dim])?;
        Ok(())
    }

    /// The linear layer called `name` below the decoder layer.
    pub(crate) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear<B>> {
        match (name, &mut self.query) {
            ("self_attn.q_proj", Query::Direct(q_proj)) => Some(q_proj),
            ("self_attn.q_a_proj", Query::Latent { q_a_proj, .. }) => Some(q_a_proj),
            ("self_attn.q_b_proj", Query::Latent { q_b_proj, .. }) => Some(q_b_proj),
            ("self_attn.kv_a_proj_with_mqa", _) => Some(&mut self.kv_a_proj),
            ("self_attn.kv_b_proj", _) => Some(&mut self.kv_b_proj),
            ("self_attn.o_proj", _) => Some(&mut self.o_proj),
            _ => None,
        }
    }
}

/// Whether expanding the keys and values of all `kv_len` latent rows, `width` = n + v values a head and row, takes no
/// more multiplications a head than the absorbed form, which works on latent rows of `rank` values directly.
fn expansion_pays(rows: usize, kv_len: usize, width: usize, rank: usize) -> bool {
    // Causal (query, key) pairs. The rope part of the scores costs the same in both forms.
    let pairs = rows * kv_len - rows * (rows - 1) / 2;
    let expanded = kv_len * width * rank + pairs * width;
    let absorbed = rows * width * rank + pairs * 2 * rank;
    // One row is decode, whose operations must not depend on its position.
    rows > 1 && expanded <= absorbed
}

#[cfg(test)]
mod tests {
    use super::expansion_pays;

    #[test]
    fn prompts_expand_and_decode_absorbs() {
        // GLM-4.7-Flash: n + v = 448, r = 512.
        let pays = |rows, kv_len| expansion_pays(rows, kv_len, 448, 512);
        assert!(pays(512, 512) && pays(512, 4096) && pays(32, 32));
        assert!(!pays(1, 1) && !pays(1, 2) && !pays(1, 4096) && !pays(8, 4096) && !pays(64, 4096));
    }
}
