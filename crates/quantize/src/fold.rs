//! Channel scales that move from the inputs of linear layers into the operation before them.

use crate::plan::Module;

/// Linear layers that read one input, and the operation whose outputs can be divided by the scales
/// that their columns are multiplied by. The model computes the same; what changes is how large
/// the weights of each channel are when they are rounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    /// The decoder layer.
    pub layer: usize,
    /// The operation before.
    pub previous: Previous,
    /// Every module of the model that reads its output, quantized or not, all of the same
    /// in_features K.
    pub readers: Vec<Module>,
}

/// An operation with K outputs that can be scaled one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Previous {
    /// A norm with the weight `tensor`, `[K]`.
    Norm {
        /// Full tensor name.
        tensor: String,
    },
    /// A linear layer with K outputs that reach the readers through linear steps only: `up_proj`
    /// of a gated MLP; `v_proj` where every query head has its own.
    Linear {
        /// The module.
        module: Module,
        /// Whether `{module}.bias` is stored.
        bias: bool,
    },
}

impl Fold {
    /// K.
    pub fn channels(&self) -> usize {
        self.readers.first().map_or(0, |module| module.in_features)
    }

    /// Names of the tensors whose stored values the scales change: norms and biases, and the
    /// weights among these modules that `is_quantized` does not claim.
    pub fn changed_tensors(&self, is_quantized: impl Fn(&str) -> bool) -> Vec<String> {
        let mut tensors = Vec::new();
        let mut modules: Vec<&Module> = self.readers.iter().collect();
        match &self.previous {
            Previous::Norm { tensor } => tensors.push(tensor.clone()),
            Previous::Linear { module, bias } => {
                modules.push(module);
                if *bias {
                    tensors.push(format!("{}.bias", module.name));
                }
            }
        }
        let plain = modules.into_iter().filter(|module| !is_quantized(&module.name));
        tensors.extend(plain.map(|module| format!("{}.weight", module.name)));
        tensors
    }
}
