//! Working memory of a forward pass, planned once.

use marlin_formats::DType;
use marlin_ops::{Backend, Tensor};

use crate::config::{AttentionConfig, MlpConfig, ModelConfig};
use crate::error::{ModelError, Result};

/// Tensors that a forward pass writes: planned for `chunk` rows, shrunk to the rows at hand, never reallocated. Those
/// that the architecture does not use hold one element. All are f32 but the ids and positions, which are u32.
pub struct Scratch<B: Backend> {
    /// Token ids, `[rows]`.
    pub(crate) ids: Tensor<B>,
    /// Positions of the rows in their sequence, `[rows]`.
    pub(crate) positions: Tensor<B>,
    /// The residual stream, `[rows, hidden]`.
    pub(crate) hidden: Tensor<B>,
    /// Its norm: the input of the block at hand.
    pub(crate) normed: Tensor<B>,
    /// Queries, `[rows, heads, head_dim]`.
    pub(crate) q: Tensor<B>,
    /// Keys, `[rows, kv_heads, head_dim]` (GQA).
    pub(crate) k: Tensor<B>,
    /// Values, like the keys (GQA).
    pub(crate) v: Tensor<B>,
    /// `[rows, q_lora_rank]` (MLA).
    pub(crate) q_latent: Tensor<B>,
    /// Its norm (MLA).
    pub(crate) q_latent_normed: Tensor<B>,
    /// `[rows, kv_lora_rank + qk_rope_head_dim]` (MLA).
    pub(crate) kv_latent: Tensor<B>,
    /// Attention output, `[rows, heads, value head_dim]`.
    pub(crate) attended: Tensor<B>,
    /// Gated product of an MLP, `[rows, intermediate]`.
    pub(crate) inner: Tensor<B>,
    /// `[rows, experts]`.
    pub(crate) router_logits: Tensor<B>,
    /// `[rows, top_k]` u32.
    pub(crate) expert_ids: Tensor<B>,
    /// `[rows, top_k]`.
    pub(crate) expert_weights: Tensor<B>,
    /// Rows of the residual stream whose logits are wanted, `[logit_rows, hidden]`.
    pub(crate) head_hidden: Tensor<B>,
    /// Their final norm.
    pub(crate) head_normed: Tensor<B>,
    /// `[logit_rows, vocab]`.
    pub(crate) logits: Tensor<B>,
    /// The recorded step of one token, and the ids of the model and the cache that it is of.
    pub(crate) recording: Option<([u64; 2], B::Recording)>,
    /// What was last written to `positions`.
    position_values: Vec<u32>,
    chunk: usize,
    logit_rows: usize,
}

/// Columns of the tensors that depend on the architecture, 1 where there is none.
struct Widths {
    q: usize,
    k: usize,
    q_latent: usize,
    kv_latent: usize,
    attended: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
}

impl Widths {
    fn of(config: &ModelConfig) -> Self {
        let mut widths = match config.attention {
            AttentionConfig::Gqa { heads, kv_heads, head_dim, .. } => {
                Widths { q: heads * head_dim, k: kv_heads * head_dim, attended: heads * head_dim, ..Widths::none() }
            }
            AttentionConfig::Mla {
                heads,
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
                ..
            } => Widths {
                q: heads * (qk_nope_head_dim + qk_rope_head_dim),
                q_latent: q_lora_rank.unwrap_or(1),
                kv_latent: kv_lora_rank + qk_rope_head_dim,
                attended: heads * v_head_dim,
                ..Widths::none()
            },
        };
        for layer in &config.layers {
            match layer.mlp {
                MlpConfig::Dense { intermediate, .. } => {
                    widths.inner = widths.inner.max(intermediate);
                }
                MlpConfig::Moe { experts, intermediate, shared_intermediate, routing, .. } => {
                    let shared = shared_intermediate.unwrap_or(0);
                    widths.inner = widths.inner.max(intermediate).max(shared);
                    widths.experts = widths.experts.max(experts);
                    widths.top_k = widths.top_k.max(routing.top_k);
                }
            }
        }
        widths
    }

    const fn none() -> Self {
        Widths { q: 1, k: 1, q_latent: 1, kv_latent: 1, attended: 1, inner: 1, experts: 1, top_k: 1 }
    }
}

impl<B: Backend> Scratch<B> {
    /// Plans for at most `chunk` rows a pass, of which at most `logit_rows` give logits at a time.
    pub(crate) fn plan(backend: &B, config: &ModelConfig, chunk: usize, logit_rows: usize) -> Result<Self> {
        if logit_rows == 0 || logit_rows > chunk {
            let reason = format!("is {logit_rows}, must be in 1..={chunk} (the chunk)");
            return Err(ModelError::request("logit_rows", reason));
        }
        let widths = Widths::of(config);
        let hidden = config.hidden_size;
        let rows = |columns| backend.zeros(DType::F32, &[chunk, columns]);
        let few = |columns| backend.zeros(DType::F32, &[logit_rows, columns]);
        Ok(Self {
            ids: backend.zeros(DType::U32, &[chunk])?,
            positions: backend.zeros(DType::U32, &[chunk])?,
            hidden: rows(hidden)?,
            normed: rows(hidden)?,
            q: rows(widths.q)?,
            k: rows(widths.k)?,
            v: rows(widths.k)?,
            q_latent: rows(widths.q_latent)?,
            q_latent_normed: rows(widths.q_latent)?,
            kv_latent: rows(widths.kv_latent)?,
            attended: rows(widths.attended)?,
            inner: rows(widths.inner)?,
            router_logits: rows(widths.experts)?,
            expert_ids: backend.zeros(DType::U32, &[chunk, widths.top_k])?,
            expert_weights: rows(widths.top_k)?,
            head_hidden: few(hidden)?,
            head_normed: few(hidden)?,
            logits: few(config.vocab_size)?,
            recording: None,
            position_values: Vec::with_capacity(chunk),
            chunk,
            logit_rows,
        })
    }

    /// Most rows of one pass.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Most rows of logits at a time.
    pub fn logit_rows(&self) -> usize {
        self.logit_rows
    }

    /// Writes the positions of `rows` rows that follow `start` earlier ones.
    pub(crate) fn set_positions(&mut self, backend: &B, start: usize, rows: usize) -> Result<()> {
        let end = u32::try_from(start + rows)
            .map_err(|_| ModelError::request("position", format!("{start} + {rows} exceeds u32")))?;
        self.position_values.clear();
        self.position_values.extend(start as u32..end);
        self.positions.reshape(&[rows])?;
        backend.write_u32(&self.position_values, &mut self.positions)?;
        Ok(())
    }
}
