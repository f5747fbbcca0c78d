//! Reading a model in rotated bases.

use marlin_ops::{HostTensor, Weight};

use super::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::rotation::Rotation;

const LM_HEAD: &str = "lm_head";
const EMBEDDING: &str = "model.embed_tokens";

impl Checkpoint {
    /// From now on weights and vectors are those of the same model with orthonormal Hadamard matrices, in blocks of at
    /// most 128, folded into both sides of the residual stream, of the values of each attention head, and of the
    /// latents of multi-head latent attention. Norms move into the layers that read them. The logits stay the same but
    /// for rounding. Weights come as f32; [`Checkpoint::dense`] and [`Checkpoint::tensor`] still read what is stored.
    ///
    /// Nothing changes when it is called again. `lm_head` takes the final norm and stops being tied in `config`: read from the embeddings if it is not stored.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a quantized model, [`ModelError::Unrotatable`] for a tensor without a rule, and
    /// whatever reading the norms raises.
    pub fn rotate(&mut self, config: &mut ModelConfig) -> Result<()> {
        if !config.quantization.is_empty() {
            let reason = "is there: only models with plain weights can be rotated";
            return Err(ModelError::config(&config.path, "quantization_config", reason));
        }
        config.tie_word_embeddings = false;
        if self.is_rotated() {
            return Ok(());
        }
        self.rotation = Some(Rotation::new(self, config)?);
        Ok(())
    }

    /// Whether [`Checkpoint::rotate`] was called.
    pub fn is_rotated(&self) -> bool {
        self.rotation.is_some()
    }

    /// Whether [`Checkpoint::rotate`] changed the values of a tensor.
    pub fn rotation_changes(&self, tensor: &str) -> bool {
        self.rotation.as_ref().is_some_and(|rotation| rotation.changes(tensor))
    }

    /// A weight `[N, K]` of a linear layer as it was stored, now as [`Checkpoint::rotate`] wants it.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] where the product with a norm leaves f32.
    pub fn fold(&self, module: &str, in_features: usize, mut stored: Vec<f32>) -> Result<Vec<f32>> {
        let Some(rotation) = &self.rotation else { return Ok(stored) };
        rotation.fold_weight(module, &mut stored, in_features);
        match stored.iter().position(|value| !value.is_finite()) {
            None => Ok(stored),
            Some(index) => Err(ModelError::NonFinite {
                path: self.path.clone(),
                tensor: format!("{module}.weight"),
                index,
                value: stored[index],
            }),
        }
    }

    /// The module that a weight is stored as: the embeddings for an output head that was tied.
    pub(super) fn stored_module<'a>(&self, module: &'a str) -> &'a str {
        match module == LM_HEAD && self.is_rotated() && !self.has_module(LM_HEAD) {
            true => EMBEDDING,
            false => module,
        }
    }

    /// A stored weight, folded; its bias is already.
    pub(super) fn rotated_weight(&self, module: &str, weight: Weight) -> Result<Weight> {
        if !self.is_rotated() {
            return Ok(weight);
        }
        let dims = [weight.out_features(), weight.in_features()];
        let values = self.fold(module, dims[1], weight.to_f32()?)?;
        Ok(Weight { bias: weight.bias, ..Weight::dense(HostTensor::from_f32(&dims, &values)?)? })
    }
}
