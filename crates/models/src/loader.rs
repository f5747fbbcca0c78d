//! From checkpoint tensors to prepared weights on a device, one at a time.

use std::collections::HashMap;

use marlin_ops::{
    Backend, ExpertStack, ExpertWeights, HostTensor, InputOrder, Linear, Result as OpResult, Tensor, Weight,
};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::modules::{LinearModule, ModuleKind};

const EMBEDDING: &str = "model.embed_tokens";
const LM_HEAD: &str = "lm_head";

/// Loads modules below a prefix; the pages of each stored tensor are released as soon as it is prepared.
pub(crate) struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    /// Shape and bias of every linear layer, by full name.
    modules: HashMap<String, LinearModule>,
    /// Full name and length of every vector.
    vectors: HashMap<String, usize>,
    prefix: String,
    size_in_bytes: usize,
    /// The latest order of a matrix's rows.
    input_order: Option<InputOrder>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A loader at the root of the checkpoint's names.
    pub(crate) fn new(backend: &'a B, checkpoint: &'a Checkpoint, config: &'a ModelConfig) -> Self {
        let mut modules: HashMap<String, LinearModule> =
            config.linear_modules().into_iter().map(|module| (module.name.clone(), module)).collect();
        // A tied model may store a head of its own, shaped like the embedding.
        let lm_head = LinearModule { name: LM_HEAD.to_owned(), kind: ModuleKind::LmHead, ..modules[EMBEDDING].clone() };
        modules.insert(LM_HEAD.to_owned(), lm_head);
        Self {
            backend,
            checkpoint,
            config,
            modules,
            vectors: config.vector_tensors().into_iter().map(|v| (v.name, v.len)).collect(),
            prefix: String::new(),
            size_in_bytes: 0,
            input_order: None,
        }
    }

    /// Names are below `prefix` from now on.
    pub(crate) fn enter(&mut self, prefix: String) {
        self.prefix = prefix;
    }

    /// Stored bytes of everything loaded so far.
    pub(crate) fn size_in_bytes(&self) -> usize {
        self.size_in_bytes
    }

    /// The linear layer `name`.
    pub(crate) fn linear(&mut self, name: &str) -> Result<Linear<B>> {
        self.linear_as(name, Ok)
    }

    /// The linear layer `name` for operations that take no order of rows: see [`Weight::in_channel_order`].
    pub(crate) fn linear_in_channel_order(&mut self, name: &str) -> Result<Linear<B>> {
        self.linear_as(name, Weight::in_channel_order)
    }

    fn linear_as(&mut self, name: &str, form: impl FnOnce(Weight) -> OpResult<Weight>) -> Result<Linear<B>> {
        let module = format!("{}{name}", self.prefix);
        let weight = form(self.weight(name)?).map_err(ModelError::tensor(self.checkpoint.path(), &module))?;
        let linear = self.prepare(weight)?;
        self.release(name)?;
        Ok(linear)
    }

    /// The linear layer `name`, decoded to f32 whatever its stored form (routers); without bias.
    pub(crate) fn linear_f32(&mut self, name: &str) -> Result<Linear<B>> {
        let stored = self.weight(name)?;
        let dims = [stored.out_features(), stored.in_features()];
        let values = HostTensor::from_f32(&dims, &stored.to_f32()?)?;
        let linear = self.prepare(Weight::dense(values)?)?;
        self.release(name)?;
        Ok(linear)
    }

    /// The vector `name` (a norm weight, a correction bias) as f32.
    pub(crate) fn vector(&mut self, name: &str) -> Result<Tensor<B>> {
        let name = format!("{}{name}", self.prefix);
        let len = self.vectors[&name];
        let values = HostTensor::from_f32(&[len], &self.checkpoint.vector(&name, len)?)?;
        self.size_in_bytes += values.bytes().len();
        Ok(self.backend.upload(&values)?)
    }

    /// Routed experts below `name`, prepared as one stack.
    pub(crate) fn expert_stack(
        &mut self,
        name: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<ExpertStack<B>> {
        let weights = self.experts(name, experts, hidden, intermediate)?;
        let stack = ExpertStack::new(self.backend, weights)?;
        self.size_in_bytes += stack.size_in_bytes();
        self.release(name)?;
        Ok(stack)
    }

    /// Routed experts below `name`, each prepared as its gate, up and down projection.
    pub(crate) fn expert_linears(
        &mut self,
        name: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Vec<[Linear<B>; 3]>> {
        let mut linears = Vec::with_capacity(experts);
        for expert in self.experts(name, experts, hidden, intermediate)? {
            linears.push([self.prepare(expert.gate)?, self.prepare(expert.up)?, self.prepare(expert.down)?]);
        }
        self.release(name)?;
        Ok(linears)
    }

    /// The token embedding, `[vocab, hidden]`.
    pub(crate) fn embedding(&mut self) -> Result<Linear<B>> {
        self.enter(String::new());
        self.linear_in_channel_order(EMBEDDING)
    }

    /// The output head, or none when the embedding serves as one: tied, and no head is stored.
    pub(crate) fn lm_head(&mut self) -> Result<Option<Linear<B>>> {
        if self.config.tie_word_embeddings && !self.checkpoint.has_module(LM_HEAD) {
            return Ok(None);
        }
        self.enter(String::new());
        self.linear(LM_HEAD).map(Some)
    }

    /// The norm before the output head, `[hidden]`.
    pub(crate) fn final_norm(&mut self) -> Result<Tensor<B>> {
        self.enter(String::new());
        self.vector("model.norm.weight")
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        let module = &self.modules[&format!("{}{name}", self.prefix)];
        let LinearModule { name, out_features: n, in_features: k, bias, .. } = module;
        self.checkpoint.weight(&self.config.quantization, name, *n, *k, *bias)
    }

    fn experts(&self, name: &str, experts: usize, hidden: usize, intermediate: usize) -> Result<Vec<ExpertWeights>> {
        let prefix = format!("{}{name}", self.prefix);
        let quantization = &self.config.quantization;
        self.checkpoint.experts(quantization, &prefix, experts, hidden, intermediate)
    }

    fn prepare(&mut self, mut weight: Weight) -> Result<Linear<B>> {
        // Projections of one input usually have the same order: found to be equal by its address.
        match (&mut weight.input_order, &self.input_order) {
            (Some(order), Some(latest)) if order == latest => *order = latest.clone(),
            (Some(order), _) => self.input_order = Some(order.clone()),
            (None, _) => {}
        }
        let linear = Linear::new(self.backend, weight)?;
        self.size_in_bytes += linear.size_in_bytes();
        Ok(linear)
    }

    fn release(&self, name: &str) -> Result<()> {
        self.checkpoint.release_prefix(&format!("{}{name}.", self.prefix))
    }
}
