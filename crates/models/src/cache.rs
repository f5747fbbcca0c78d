//! Key/value caches of one sequence.

use std::sync::atomic::{AtomicU64, Ordering};

use marlin_formats::DType;
use marlin_ops::{Backend, Tensor};

use crate::config::{AttentionConfig, ModelConfig};
use crate::error::{ModelError, Result};
use crate::model::Model;

/// What one layer remembers of the tokens before.
pub(crate) enum LayerCache<B: Backend> {
    /// Rotated keys and values, each `[1, kv_heads, capacity, head_dim]`.
    Dense { k: Tensor<B>, v: Tensor<B> },
    /// Rows `[normalised latent | rotated key]`, `[1, capacity, kv_lora_rank + qk_rope_head_dim]`.
    Latent(Tensor<B>),
}

impl<B: Backend> LayerCache<B> {
    /// An empty cache for any layer of `config`.
    pub(crate) fn plan(backend: &B, config: &ModelConfig, capacity: usize, dtype: DType) -> Result<Self> {
        Ok(match config.attention {
            AttentionConfig::Gqa { kv_heads, head_dim, .. } => {
                let dims = [1, kv_heads, capacity, head_dim];
                LayerCache::Dense { k: backend.zeros(dtype, &dims)?, v: backend.zeros(dtype, &dims)? }
            }
            AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                let dims = [1, capacity, kv_lora_rank + qk_rope_head_dim];
                LayerCache::Latent(backend.zeros(dtype, &dims)?)
            }
        })
    }

    fn size_in_bytes(&self) -> usize {
        let size = |t: &Tensor<B>| t.elements() * t.dtype().size_in_bytes();
        match self {
            LayerCache::Dense { k, v } => size(k) + size(v),
            LayerCache::Latent(rows) => size(rows),
        }
    }
}

/// A number that nothing else in this process has.
pub(crate) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The error of a cache that another model planned.
pub(crate) fn cache_mismatch() -> ModelError {
    ModelError::request("cache", "was planned for another model")
}

/// Keys and values (or MLA latents) of one sequence, for all layers. Memory for `capacity` tokens is taken at once.
pub struct KvCache<B: Backend> {
    pub(crate) layers: Vec<LayerCache<B>>,
    /// Tells it from every other.
    pub(crate) id: u64,
    capacity: usize,
    len: usize,
    size_in_bytes: usize,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache for `capacity` tokens, in the dtype that the model was loaded with.
    ///
    /// # Errors
    /// A capacity of 0 or beyond [`Model::context`]; the device's own (out of memory).
    pub fn new(model: &Model<B>, capacity: usize) -> Result<Self> {
        if capacity == 0 || capacity > model.context() {
            let reason = format!("is {capacity}, must be in 1..={}", model.context());
            return Err(ModelError::request("cache capacity", reason));
        }
        let config = model.config();
        let layers = (0..config.num_layers)
            .map(|_| LayerCache::plan(model.backend(), config, capacity, model.cache_dtype()))
            .collect::<Result<Vec<_>>>()?;
        let size_in_bytes = layers.iter().map(LayerCache::size_in_bytes).sum();
        Ok(Self { layers, id: next_id(), capacity, len: 0, size_in_bytes })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens from position `len` on; nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Device memory of all layers.
    pub fn size_in_bytes(&self) -> usize {
        self.size_in_bytes
    }

    /// An error unless `tokens` more fit.
    pub(crate) fn check_room(&self, tokens: usize) -> Result<()> {
        if tokens <= self.capacity - self.len {
            return Ok(());
        }
        let reason = format!("of {} + {tokens} tokens exceeds the cache's {}", self.len, self.capacity);
        Err(ModelError::request("context", reason))
    }

    /// Counts rows that all layers have written.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
