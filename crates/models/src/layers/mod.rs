//! The decoder layer and its blocks: `h += attention(norm(h)); h += mlp(norm(h))`.

mod gqa;
mod mla;
mod mlp;
mod moe;

use marlin_ops::linear::{Activation, InputNorm, LinearArgs, Residual};
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::{Pairing, RopeTable};
use marlin_ops::{Backend, Linear, Tensor};

pub(crate) use gqa::Gqa;
pub(crate) use mla::Mla;
pub(crate) use mlp::Mlp;
pub(crate) use moe::{ExpertForm, Moe};

use crate::cache::LayerCache;
use crate::config::{AttentionConfig, LayerConfig, MlpConfig, ModelConfig};
use crate::error::Result;
use crate::loader::Loader;
use crate::observe::Probe;
use crate::scratch::Scratch;

/// What all layers share while some rows of one sequence go through the model.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) rope: &'a RopeTable<B>,
    pub(crate) pairing: Pairing,
    /// Position of the first row: the tokens already in the cache.
    pub(crate) start: usize,
    /// Rows of `scratch.hidden`.
    pub(crate) rows: usize,
}

enum Attention<B: Backend> {
    Gqa(Gqa<B>),
    Mla(Mla<B>),
}

enum FeedForward<B: Backend> {
    Dense(Mlp<B>),
    Moe(Moe<B>),
}

/// One decoder layer.
pub(crate) struct DecoderLayer<B: Backend> {
    eps: f32,
    input_layernorm: Tensor<B>,
    attention: Attention<B>,
    post_attention_layernorm: Tensor<B>,
    feed_forward: FeedForward<B>,
}

impl<B: Backend> DecoderLayer<B> {
    /// Loads `model.layers.{index}.*`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        index: usize,
        form: ExpertForm,
    ) -> Result<Self> {
        loader.enter(layer_prefix(index));
        let LayerConfig { window, mlp } = &config.layers[index];
        let feed_forward = match *mlp {
            MlpConfig::Moe { .. } => FeedForward::Moe(Moe::load(loader, config, mlp, form)?),
            MlpConfig::Dense { .. } => FeedForward::Dense(Mlp::load(loader, "mlp", config.activation)?),
        };
        let attention = match config.attention {
            AttentionConfig::Gqa { .. } => Attention::Gqa(Gqa::load(loader, config, *window)?),
            AttentionConfig::Mla { .. } => Attention::Mla(Mla::load(loader, config)?),
        };
        Ok(Self {
            eps: config.rms_norm_eps,
            input_layernorm: loader.vector("input_layernorm.weight")?,
            attention,
            post_attention_layernorm: loader.vector("post_attention_layernorm.weight")?,
            feed_forward,
        })
    }

    /// Advances `scratch.hidden` by this layer and appends the rows to its cache.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        scratch: &mut Scratch<B>,
        cache: &mut LayerCache<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        let norm = self.input_norm(pass, scratch, &self.input_layernorm, probe)?;
        match &self.attention {
            Attention::Gqa(gqa) => gqa.forward(pass, norm, scratch, cache, probe)?,
            Attention::Mla(mla) => mla.forward(pass, norm, scratch, cache, probe)?,
        }
        match &self.feed_forward {
            FeedForward::Dense(mlp) => {
                let norm = self.input_norm(pass, scratch, &self.post_attention_layernorm, probe)?;
                let Scratch { hidden, normed, inner, .. } = scratch;
                mlp.gate(pass.backend, block_input(norm, hidden, normed), norm, inner, probe)?;
                mlp.project_down(pass.backend, inner, hidden, probe)
            }
            FeedForward::Moe(moe) => {
                // The router and the experts read the same rows.
                self.norm(pass, scratch, &self.post_attention_layernorm)?;
                moe.forward(pass, scratch, probe)
            }
        }
    }

    /// The norm that the block's first products apply to `scratch.hidden` themselves; none when it had to be written to
    /// `scratch.normed` for the probe to see.
    fn input_norm<'a>(
        &self,
        pass: &Pass<'_, B>,
        scratch: &mut Scratch<B>,
        gamma: &'a Tensor<B>,
        probe: &Probe<'_>,
    ) -> Result<Option<InputNorm<'a, B>>> {
        if probe.is_active() {
            self.norm(pass, scratch, gamma)?;
            return Ok(None);
        }
        Ok(Some(InputNorm { gamma, gamma_offset: 0.0, eps: self.eps }))
    }

    /// `scratch.normed = rms_norm(scratch.hidden)`.
    fn norm(&self, pass: &Pass<'_, B>, scratch: &mut Scratch<B>, gamma: &Tensor<B>) -> Result<()> {
        scratch.normed.reshape(scratch.hidden.dims())?;
        pass.backend.rms_norm(RmsNormArgs {
            x: &scratch.hidden,
            residual: None,
            gamma: Some(gamma),
            gamma_offset: 0.0,
            eps: self.eps,
            out: &mut scratch.normed,
        })?;
        Ok(())
    }

    /// The linear layer called `name` below this layer, such as `self_attn.q_proj` or `mlp.experts.5.down_proj`.
    pub(crate) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear<B>> {
        let attention = match &mut self.attention {
            Attention::Gqa(gqa) => gqa.linear_mut(name),
            Attention::Mla(mla) => mla.linear_mut(name),
        };
        attention.or_else(|| match &mut self.feed_forward {
            FeedForward::Dense(mlp) => mlp.linear_mut(name),
            FeedForward::Moe(moe) => moe.linear_mut(name),
        })
    }
}

/// The rows that a block's first products read.
fn block_input<'a, B: Backend>(
    norm: Option<InputNorm<'_, B>>,
    hidden: &'a Tensor<B>,
    normed: &'a Tensor<B>,
) -> &'a Tensor<B> {
    if norm.is_some() { hidden } else { normed }
}

/// Where the modules of a layer are named.
pub(crate) fn layer_prefix(index: usize) -> String {
    format!("model.layers.{index}.")
}

/// `out = x W + b`; `out` takes the shape `[rows of x, out_features]`.
pub(crate) fn project<B: Backend>(backend: &B, x: &Tensor<B>, weight: &Linear<B>, out: &mut Tensor<B>) -> Result<()> {
    out.reshape(&[x.rows(), weight.out_features()])?;
    run_linear(backend, x, weight, Residual::None, out)
}

/// `out += x W + b`.
pub(crate) fn project_onto<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    weight: &Linear<B>,
    out: &mut Tensor<B>,
) -> Result<()> {
    run_linear(backend, x, weight, Residual::InPlace, out)
}

fn run_linear<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    weight: &Linear<B>,
    residual: Residual<'_, B>,
    out: &mut Tensor<B>,
) -> Result<()> {
    backend.linear(LinearArgs { x, weight, activation: Activation::None, out_scale: 1.0, residual, out })?;
    Ok(())
}
