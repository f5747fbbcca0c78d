//! Calibration: the inputs of every linear layer, one decoder layer at a time.

use std::fmt::Display;
use std::sync::Arc;

use marlin_formats::DType;
use marlin_ops::linear::EmbeddingArgs;
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::RopeTable;
use marlin_ops::{Backend, HostTensor, Linear, Tensor, Weight};

use crate::cache::LayerCache;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::layers::{DecoderLayer, ExpertForm, Pass, layer_prefix};
use crate::loader::Loader;
use crate::scratch::Scratch;

/// Receives what linear layers are given.
pub trait ActivationObserver {
    /// `values`, `[rows, columns]` row-major, is an input of the linear layer `module` (its full name, such as
    /// `model.layers.3.mlp.experts.5.down_proj`). Called once a module and sequence; routed experts see the rows
    /// routed to them, and no call when there are none. Modules that share an input are called one by one.
    ///
    /// # Errors
    /// Whatever the observer raises ends the run.
    fn observe(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> Result<()>;
}

/// The hook that layers call at the input of each linear layer; does nothing unless someone observes.
pub(crate) struct Probe<'a> {
    observer: Option<(String, &'a mut dyn ActivationObserver)>,
}

impl<'a> Probe<'a> {
    /// Nobody observes.
    pub(crate) fn none() -> Self {
        Self { observer: None }
    }

    /// `observer` hears of modules below `prefix`.
    pub(crate) fn new(prefix: String, observer: &'a mut dyn ActivationObserver) -> Self {
        Self { observer: Some((prefix, observer)) }
    }

    /// True when someone observes.
    pub(crate) fn is_active(&self) -> bool {
        self.observer.is_some()
    }

    /// `x` is the input of `module`.
    pub(crate) fn see<B: Backend>(&mut self, backend: &B, module: impl Display, x: &Tensor<B>) -> Result<()> {
        self.see_each(backend, [module], x)
    }

    /// `x` is the input of each of `modules`.
    pub(crate) fn see_each<B: Backend, const N: usize>(
        &mut self,
        backend: &B,
        modules: [impl Display; N],
        x: &Tensor<B>,
    ) -> Result<()> {
        match &mut self.observer {
            Some((prefix, observer)) => {
                let values = backend.read_f32(x)?;
                let mut all = modules.iter();
                all.try_for_each(|module| {
                    observer.observe(&format!("{prefix}{module}"), x.rows(), x.columns(), &values)
                })
            }
            None => Ok(()),
        }
    }

    /// The first `columns` of `x` are the input of `module`.
    pub(crate) fn see_columns<B: Backend>(
        &mut self,
        backend: &B,
        module: impl Display,
        x: &Tensor<B>,
        columns: usize,
    ) -> Result<()> {
        let Some((prefix, observer)) = &mut self.observer else {
            return Ok(());
        };
        let values = backend.read_f32(x)?;
        let rows = values.chunks_exact(x.columns());
        let values: Vec<f32> = rows.flat_map(|row| &row[..columns]).copied().collect();
        observer.observe(&format!("{prefix}{module}"), x.rows(), columns, &values)
    }
}

/// A model that holds one decoder layer at a time and the residual streams of all calibration sequences before it, so
/// that each layer can be quantized with the inputs that the quantized layers before it produce:
///
/// ```text
/// for i in 0..model.num_layers() {
///     model.load_layer(i)?;
///     model.observe(&mut statistics)?;      // as often as wanted: the streams stay
///     model.replace(module, quantized)?;    // each module of the layer
///     model.advance()?;                     // the streams move past the layer as it is now
/// }
/// model.observe_head(&mut statistics)?;
/// ```
pub struct CalibrationModel<'a, B: Backend> {
    backend: Arc<B>,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    rope: RopeTable<B>,
    scratch: Scratch<B>,
    cache: LayerCache<B>,
    /// The residual stream of each sequence, `[tokens, hidden]`.
    streams: Vec<Vec<f32>>,
    layer: Option<(usize, DecoderLayer<B>)>,
    /// Layers that the streams have passed.
    passed: usize,
}

impl<'a, B: Backend> CalibrationModel<'a, B> {
    /// Embeds `sequences` of token ids.
    ///
    /// # Errors
    /// No sequence, an empty one or one beyond `max_position_embeddings`; a token id outside the vocabulary; a missing
    /// or misshapen embedding.
    pub fn new(
        backend: Arc<B>,
        checkpoint: &'a Checkpoint,
        config: &'a ModelConfig,
        sequences: &[Vec<u32>],
    ) -> Result<Self> {
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 || sequences.iter().any(Vec::is_empty) {
            let reason = "needs at least one sequence and no empty one";
            return Err(ModelError::request("calibration", reason));
        }
        if longest > config.max_position_embeddings {
            let limit = config.max_position_embeddings;
            let reason = format!("sequence of {longest} tokens exceeds the context of {limit}");
            return Err(ModelError::request("calibration", reason));
        }
        let mut model = Self {
            rope: RopeTable::new(&*backend, &config.rope, longest)?,
            scratch: Scratch::plan(&*backend, config, longest, 1)?,
            cache: LayerCache::plan(&*backend, config, longest, DType::F32)?,
            backend,
            checkpoint,
            config,
            streams: Vec::with_capacity(sequences.len()),
            layer: None,
            passed: 0,
        };
        model.embed(sequences)?;
        Ok(model)
    }

    fn embed(&mut self, sequences: &[Vec<u32>]) -> Result<()> {
        let (backend, scratch) = (&*self.backend, &mut self.scratch);
        let table = Loader::new(backend, self.checkpoint, self.config).embedding()?;
        for ids in sequences {
            scratch.ids.reshape(&[ids.len()])?;
            scratch.hidden.reshape(&[ids.len(), self.config.hidden_size])?;
            backend.write_u32(ids, &mut scratch.ids)?;
            backend.embedding(EmbeddingArgs { ids: &scratch.ids, table: &table, out: &mut scratch.hidden })?;
            self.streams.push(backend.read_f32(&scratch.hidden)?);
        }
        Ok(())
    }

    /// Decoder layers.
    pub fn num_layers(&self) -> usize {
        self.config.num_layers
    }

    /// Loads decoder layer `index` in place of the one held, routed experts as separate linear layers.
    ///
    /// # Errors
    /// An index that is not the next layer after those passed; a missing or misshapen tensor.
    pub fn load_layer(&mut self, index: usize) -> Result<()> {
        if index != self.passed || index >= self.config.num_layers {
            let reason = format!(
                "{index} cannot be calibrated now: {} of {} layers are passed",
                self.passed, self.config.num_layers
            );
            return Err(ModelError::request("layer", reason));
        }
        self.layer = None;
        let mut loader = Loader::new(&*self.backend, self.checkpoint, self.config);
        let layer = DecoderLayer::load(&mut loader, self.config, index, ExpertForm::Separate)?;
        self.layer = Some((index, layer));
        Ok(())
    }

    /// Runs the loaded layer over all sequences for `observer` alone: the streams stay where they are.
    ///
    /// # Errors
    /// No layer is loaded; an operation or the observer fails.
    pub fn observe(&mut self, observer: &mut dyn ActivationObserver) -> Result<()> {
        self.run_layer(Some(observer), false)
    }

    /// Moves the streams past the loaded layer, with the weights it has now, and drops the layer.
    ///
    /// # Errors
    /// No layer is loaded; an operation fails (some streams may have moved by then: start over).
    pub fn advance(&mut self) -> Result<()> {
        self.run_layer(None, true)?;
        self.layer = None;
        self.passed += 1;
        Ok(())
    }

    /// Gives the linear layer `module` (full name) of the loaded layer another weight, its bias included.
    ///
    /// # Errors
    /// No layer is loaded, it has no such module, or the shape differs.
    pub fn replace(&mut self, module: &str, weight: Weight) -> Result<()> {
        let (index, layer) = self.layer.as_mut().ok_or_else(no_layer)?;
        let linear =
            module.strip_prefix(&layer_prefix(*index)).and_then(|name| layer.linear_mut(name)).ok_or_else(|| {
                let reason = format!("`{module}` is not a linear layer of layer {index}");
                ModelError::request("module", reason)
            })?;
        let expected = [linear.out_features(), linear.in_features()];
        let found = [weight.out_features(), weight.in_features()];
        if found != expected {
            let reason = format!("`{module}` has shape {expected:?}, its replacement {found:?}");
            return Err(ModelError::request("module", reason));
        }
        *linear = Linear::new(&*self.backend, weight)?;
        Ok(())
    }

    /// After the last layer: `observer` receives the input of `lm_head`, the final norm of every stream.
    ///
    /// # Errors
    /// Layers remain to be passed; a missing or misshapen final norm; the observer fails.
    pub fn observe_head(&mut self, observer: &mut dyn ActivationObserver) -> Result<()> {
        if self.passed < self.config.num_layers {
            let reason = format!("comes after all {} layers, {} are passed", self.config.num_layers, self.passed);
            return Err(ModelError::request("lm_head", reason));
        }
        let gamma = Loader::new(&*self.backend, self.checkpoint, self.config).final_norm()?;
        let mut probe = Probe::new(String::new(), observer);
        for s in 0..self.streams.len() {
            self.load_stream(s)?;
            let (backend, scratch) = (&*self.backend, &mut self.scratch);
            scratch.normed.reshape(scratch.hidden.dims())?;
            backend.rms_norm(RmsNormArgs {
                x: &scratch.hidden,
                residual: None,
                gamma: Some(&gamma),
                gamma_offset: 0.0,
                eps: self.config.rms_norm_eps,
                out: &mut scratch.normed,
            })?;
            probe.see(backend, "lm_head", &scratch.normed)?;
        }
        Ok(())
    }

    fn run_layer(&mut self, observer: Option<&mut dyn ActivationObserver>, keep: bool) -> Result<()> {
        let (index, layer) = self.layer.take().ok_or_else(no_layer)?;
        let mut probe = observer.map_or_else(Probe::none, |observer| Probe::new(layer_prefix(index), observer));
        let outcome = (0..self.streams.len()).try_for_each(|s| self.run_sequence(s, &layer, &mut probe, keep));
        self.layer = Some((index, layer));
        outcome
    }

    fn run_sequence(
        &mut self,
        sequence: usize,
        layer: &DecoderLayer<B>,
        probe: &mut Probe<'_>,
        keep: bool,
    ) -> Result<()> {
        let rows = self.load_stream(sequence)?;
        let backend = &*self.backend;
        self.scratch.set_positions(backend, 0, rows)?;
        let pass = Pass { backend, rope: &self.rope, pairing: self.config.pairing, start: 0, rows };
        layer.forward(&pass, &mut self.scratch, &mut self.cache, probe)?;
        if keep {
            self.streams[sequence] = backend.read_f32(&self.scratch.hidden)?;
        }
        Ok(())
    }

    /// `scratch.hidden` becomes the stream of a sequence; returns its rows.
    fn load_stream(&mut self, sequence: usize) -> Result<usize> {
        let stream = &self.streams[sequence];
        let dims = [stream.len() / self.config.hidden_size, self.config.hidden_size];
        let uploaded = self.backend.upload(&HostTensor::from_f32(&dims, stream)?)?;
        self.scratch.hidden.reshape(&dims)?;
        self.backend.copy_rows(&uploaded, 0, dims[0], &mut self.scratch.hidden)?;
        Ok(dims[0])
    }
}

fn no_layer() -> ModelError {
    ModelError::request("layer", "is not loaded")
}
