//! Calibration text and the model it runs through, as the quantizer wants to see them.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use marlin_models::{ActivationObserver, CalibrationModel, Checkpoint, ModelConfig, ModelError, Tokenizer};
use marlin_ops::{Backend, HostTensor, Weight};
use marlin_quantize::{ActivationSink, Calibration, Module, QuantizeError, QuantizedWeight, Replacement, SourceError};

type SourceResult<T> = std::result::Result<T, SourceError>;

/// The first `tokens` tokens of a UTF-8 text file, cut into sequences of at most `context`.
pub fn read_sequences(text: &Path, tokenizer: &Tokenizer, tokens: usize, context: usize) -> Result<Vec<Vec<u32>>> {
    let contents = std::fs::read_to_string(text).with_context(|| format!("{}", text.display()))?;
    let ids = tokenizer.encode(&contents, false)?;
    if ids.is_empty() {
        bail!("{}: the calibration text is empty", text.display());
    }
    let used = ids.len().min(tokens);
    Ok(ids[..used].chunks(context).map(<[u32]>::to_vec).collect())
}

/// A model under calibration on one device.
pub struct ModelCalibration<'a, B: Backend> {
    model: CalibrationModel<'a, B>,
    checkpoint: &'a Checkpoint,
    on_cpu: bool,
}

impl<'a, B: Backend> ModelCalibration<'a, B> {
    /// Embeds the sequences of token ids.
    pub fn new(
        backend: Arc<B>,
        checkpoint: &'a Checkpoint,
        config: &'a ModelConfig,
        sequences: &[Vec<u32>],
    ) -> Result<Self> {
        let on_cpu = backend.name() == "cpu";
        Ok(Self { model: CalibrationModel::new(backend, checkpoint, config, sequences)?, checkpoint, on_cpu })
    }
}

impl<B: Backend> Calibration for ModelCalibration<'_, B> {
    fn num_layers(&self) -> usize {
        self.model.num_layers()
    }

    fn load_layer(&mut self, index: usize) -> SourceResult<()> {
        Ok(self.model.load_layer(index)?)
    }

    fn observe(&mut self, sink: &mut dyn ActivationSink) -> SourceResult<()> {
        Observer::run(sink, |observer| self.model.observe(observer))
    }

    fn replace(&mut self, module: &Module, weight: Replacement) -> SourceResult<()> {
        let dims = [module.out_features, module.in_features];
        let mut weight = match weight {
            Replacement::Quantized(QuantizedWeight::Grouped(matrix)) => Weight::quantized(matrix)?,
            // All calibration tokens pass at once: on the CPU decoding once is faster than at each product.
            Replacement::Quantized(weight @ QuantizedWeight::Exl3(_)) if self.on_cpu => {
                Weight::dense(HostTensor::from_f32(&dims, &weight.decode()?)?)?
            }
            Replacement::Quantized(QuantizedWeight::Exl3(matrix)) => Weight::exl3(matrix)?,
            Replacement::Dense(values) => Weight::dense(HostTensor::from_f32(&dims, &values)?)?,
        };
        let bias = format!("{}.bias", module.name);
        if self.checkpoint.contains(&bias) {
            weight = weight.with_bias(self.checkpoint.vector(&bias, module.out_features)?)?;
        }
        Ok(self.model.replace(&module.name, weight)?)
    }

    fn advance(&mut self) -> SourceResult<()> {
        Ok(self.model.advance()?)
    }

    fn observe_head(&mut self, sink: &mut dyn ActivationSink) -> SourceResult<()> {
        Observer::run(sink, |observer| self.model.observe_head(observer))
    }
}

/// Hands activations on and keeps the quantizer's own error for the way back.
struct Observer<'a> {
    sink: &'a mut dyn ActivationSink,
    failure: Option<QuantizeError>,
}

impl<'a> Observer<'a> {
    fn run(
        sink: &'a mut dyn ActivationSink,
        run: impl FnOnce(&mut Self) -> marlin_models::Result<()>,
    ) -> SourceResult<()> {
        let mut observer = Self { sink, failure: None };
        let outcome = run(&mut observer);
        match observer.failure {
            Some(failure) => Err(failure.into()),
            None => Ok(outcome?),
        }
    }
}

impl ActivationObserver for Observer<'_> {
    fn observe(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> marlin_models::Result<()> {
        self.sink.activations(module, rows, columns, values).map_err(|failure| {
            let reported = ModelError::request("calibration", failure.to_string());
            self.failure = Some(failure);
            reported
        })
    }
}
