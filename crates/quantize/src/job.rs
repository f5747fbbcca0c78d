//! Quantizing a whole model, module by module, or layer by layer with calibration.
//!
//! With calibration, the inputs of each layer are those that the already quantized layers before
//! it produce. Only one layer's Hessians are held at a time; modules that read the same input share
//! one.

mod collector;

use marlin_formats::{QuantizedMatrix, Scheme};

use crate::plan::{Assignment, Module, Role};
use crate::{GptqOptions, InverseFactor, QuantizeError, Result, ScaleSearch, rtn};
use collector::Collector;

/// What a source or sink may fail with.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Where dense weights come from.
pub trait ModelSource {
    /// The dense weight of a module, `[out_features, in_features]` row-major.
    ///
    /// # Errors
    /// Whatever reading raises ends the job.
    fn weight(&mut self, module: &Module) -> std::result::Result<Vec<f32>, SourceError>;
}

/// Where quantized weights go.
pub trait ModelSink {
    /// Stores a quantized module. Each is written once, in the order of quantization.
    ///
    /// # Errors
    /// Whatever writing raises ends the job.
    fn write(&mut self, module: &Module, matrix: &QuantizedMatrix) -> std::result::Result<(), SourceError>;
}

/// Receives the inputs of linear layers.
pub trait ActivationSink {
    /// `values`, `[rows, columns]` row-major, is an input of the module called `module`.
    ///
    /// # Errors
    /// Non-finite values, or columns that differ from the module's in_features.
    fn activations(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> Result<()>;
}

/// A model that runs calibration text one decoder layer at a time.
pub trait Calibration {
    /// Decoder layers.
    fn num_layers(&self) -> usize;

    /// Makes decoder layer `index` the current one.
    ///
    /// # Errors
    /// Whatever loading raises ends the job.
    fn load_layer(&mut self, index: usize) -> std::result::Result<(), SourceError>;

    /// Runs the current layer on all calibration text and reports the inputs of its linear
    /// layers; modules with a common parent that read the same input report it one after the
    /// other.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn observe(&mut self, sink: &mut dyn ActivationSink) -> std::result::Result<(), SourceError>;

    /// Gives a module of the current layer its quantized weight.
    ///
    /// # Errors
    /// Whatever replacing raises ends the job.
    fn replace(&mut self, module: &Module, matrix: QuantizedMatrix) -> std::result::Result<(), SourceError>;

    /// Moves past the current layer with the weights it has now.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn advance(&mut self) -> std::result::Result<(), SourceError>;

    /// After the last layer: reports the input of `lm_head`.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn observe_head(&mut self, sink: &mut dyn ActivationSink) -> std::result::Result<(), SourceError>;
}

/// How weights become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Round to nearest.
    Rtn(ScaleSearch),
    /// GPTQ for the decoder's linear layers and `lm_head`. Embeddings and routers, and experts that
    /// no calibration row reached, are rounded to nearest with the same scale search.
    Gptq(GptqOptions),
}

/// What happens, as it happens; for progress displays.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Calibration text runs through decoder layer `layer` of `layers`.
    Calibrating {
        /// Index of the layer.
        layer: usize,
        /// Decoder layers.
        layers: usize,
    },
    /// A module was written.
    Quantized {
        /// The module.
        module: &'a Module,
    },
}

/// What a job did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Quantized modules.
    pub modules: usize,
    /// Their weights.
    pub weights: u64,
    /// Their stored bits, scales and padding included.
    pub bits: f64,
    /// Modules meant for GPTQ but rounded to nearest, because no calibration row reached them.
    pub without_rows: Vec<String>,
    /// Modules calibrated on fewer than K/8 rows, with their rows.
    pub few_rows: Vec<(String, u64)>,
    /// Modules whose Hessian needed more damping than asked for, with the damping used.
    pub damped: Vec<(String, f64)>,
}

impl Summary {
    /// Stored bits a quantized weight; 0 when nothing was quantized.
    pub fn bits_per_weight(&self) -> f64 {
        match self.weights {
            0 => 0.0,
            weights => self.bits / weights as f64,
        }
    }
}

/// Everything a job is told but for the model.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// What happens to each module; those without a scheme are left alone.
    pub assignments: &'a [Assignment],
    /// How weights become codes.
    pub method: Method,
}

/// Quantizes every module that has a scheme.
///
/// [`Method::Rtn`] streams the modules in order and needs no calibration; one that is given is not
/// run.
///
/// # Errors
/// [`QuantizeError::NoCalibrationRows`] for GPTQ without calibration; [`QuantizeError::Module`]
/// around whatever a quantizer refuses; [`QuantizeError::Source`] for source, sink and calibration.
pub fn quantize_model(
    settings: Settings<'_>,
    source: &mut dyn ModelSource,
    calibration: Option<&mut dyn Calibration>,
    sink: &mut dyn ModelSink,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<Summary> {
    let mut job = Job { source, sink, progress, summary: Summary::default() };
    let modules: Vec<(&Module, Scheme)> =
        settings.assignments.iter().filter_map(|assignment| Some((&assignment.module, assignment.scheme?))).collect();
    match settings.method {
        Method::Rtn(search) => {
            for (module, scheme) in modules {
                job.round(module, scheme, search)?;
            }
        }
        Method::Gptq(options) => {
            options.validate()?;
            let calibration = calibration.ok_or(QuantizeError::NoCalibrationRows)?;
            job.calibrated(&modules, &options, calibration)?;
        }
    }
    Ok(job.summary)
}

/// A job under way.
struct Job<'a> {
    source: &'a mut dyn ModelSource,
    sink: &'a mut dyn ModelSink,
    progress: &'a mut dyn FnMut(Event<'_>),
    summary: Summary,
}

impl Job<'_> {
    /// Layer by layer, then `lm_head`, then what is not calibrated: embeddings, routers, others.
    fn calibrated(
        &mut self,
        modules: &[(&Module, Scheme)],
        options: &GptqOptions,
        calibration: &mut dyn Calibration,
    ) -> Result<()> {
        let layers = calibration.num_layers();
        for layer in 0..layers {
            (self.progress)(Event::Calibrating { layer, layers });
            let of_layer: Vec<_> = modules
                .iter()
                .filter(|(module, _)| module.role == Role::Linear && module.layer == Some(layer))
                .copied()
                .collect();
            calibration.load_layer(layer).map_err(QuantizeError::Source)?;
            let mut collector = Collector::new(&of_layer);
            if !of_layer.is_empty() {
                calibration.observe(&mut collector).map_err(QuantizeError::Source)?;
            }
            self.eliminate(&of_layer, collector, options, &mut |module, matrix| calibration.replace(module, matrix))?;
            calibration.advance().map_err(QuantizeError::Source)?;
        }
        let (head, rest): (Vec<_>, Vec<_>) = modules
            .iter()
            .filter(|(module, _)| module.role != Role::Linear)
            .partition(|(module, _)| module.role == Role::LmHead);
        if !head.is_empty() {
            let mut collector = Collector::new(&head);
            calibration.observe_head(&mut collector).map_err(QuantizeError::Source)?;
            self.eliminate(&head, collector, options, &mut |_, _| Ok(()))?;
        }
        for (module, scheme) in rest {
            self.round(module, scheme, options.scale_search)?;
        }
        Ok(())
    }

    /// GPTQ for modules whose Hessians were collected, one factor for those that share a Hessian.
    fn eliminate(
        &mut self,
        modules: &[(&Module, Scheme)],
        collector: Collector,
        options: &GptqOptions,
        replace: &mut dyn FnMut(&Module, QuantizedMatrix) -> std::result::Result<(), SourceError>,
    ) -> Result<()> {
        for (hessian, names) in collector.into_groups() {
            let members = modules.iter().filter(|(module, _)| names.contains(&module.name));
            let mut factor = None;
            for &(module, scheme) in members {
                let matrix = match &hessian {
                    None => {
                        self.summary.without_rows.push(module.name.clone());
                        self.round(module, scheme, options.scale_search)?
                    }
                    Some(hessian) => {
                        let factor = match &factor {
                            Some(factor) => factor,
                            None => {
                                let made = InverseFactor::new(hessian, options);
                                &*factor.insert(made.map_err(|error| of(module, error))?)
                            }
                        };
                        if hessian.rows() < (module.in_features / 8) as u64 {
                            let few = (module.name.clone(), hessian.rows());
                            self.summary.few_rows.push(few);
                        }
                        self.eliminate_one(module, scheme, factor, options)?
                    }
                };
                replace(module, matrix).map_err(QuantizeError::Source)?;
            }
        }
        Ok(())
    }

    fn eliminate_one(
        &mut self,
        module: &Module,
        scheme: Scheme,
        factor: &InverseFactor,
        options: &GptqOptions,
    ) -> Result<QuantizedMatrix> {
        if factor.damping() > options.damping {
            self.summary.damped.push((module.name.clone(), factor.damping()));
        }
        let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        let found = factor
            .quantize(scheme, &weight, module.out_features, module.in_features)
            .map_err(|error| of(module, error))?;
        self.finish(module, &found.matrix)?;
        Ok(found.matrix)
    }

    fn round(&mut self, module: &Module, scheme: Scheme, search: ScaleSearch) -> Result<QuantizedMatrix> {
        let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        let (n, k) = (module.out_features, module.in_features);
        let matrix = rtn(scheme, &weight, n, k, search).map_err(|error| of(module, error))?;
        self.finish(module, &matrix)?;
        Ok(matrix)
    }

    fn finish(&mut self, module: &Module, matrix: &QuantizedMatrix) -> Result<()> {
        self.sink.write(module, matrix).map_err(QuantizeError::Source)?;
        let (n, k) = (module.out_features, module.in_features);
        let weights = module.weights() as u64;
        self.summary.modules += 1;
        self.summary.weights += weights;
        self.summary.bits += matrix.scheme.bits_per_weight(k, n) * weights as f64;
        (self.progress)(Event::Quantized { module });
        Ok(())
    }
}

/// Adds the module to an error.
fn of(module: &Module, source: QuantizeError) -> QuantizeError {
    QuantizeError::Module {
        module: module.name.clone(),
        out_features: module.out_features,
        in_features: module.in_features,
        source: Box::new(source),
    }
}
