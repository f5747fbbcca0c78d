//! Measuring what each module loses in each candidate format.

use marlin_formats::Scheme;

use super::collector::{Collector, Group};
use super::run::{Task, in_batches, in_order, of};
use super::{Calibration, Event, ModelSource, PartStore, SourceError};
use crate::awq::quadratic_error;
use crate::mixed::Sensitivity;
use crate::part::Part;
use crate::plan::{Assignment, Module, Role};
use crate::rtn::rtn;
use crate::{GptqOptions, InverseFactor, QuantizeError, Result};

/// Parts of a job that come after others in the same store.
pub struct After<'a> {
    /// The store of all parts.
    pub store: &'a mut dyn PartStore,
    /// Parts before.
    pub parts: usize,
}

impl PartStore for After<'_> {
    fn contains(&self, index: usize) -> bool {
        self.store.contains(self.parts + index)
    }

    fn load(&mut self, index: usize) -> std::result::Result<Part, SourceError> {
        self.store.load(self.parts + index)
    }

    fn store(&mut self, index: usize, part: &Part) -> std::result::Result<(), SourceError> {
        self.store.store(self.parts + index, part)
    }
}

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Mixture<'a> {
    /// All modules. Those that have their target by default are measured.
    pub assignments: &'a [Assignment],
    /// Formats to measure them in.
    pub candidates: &'a [Scheme],
    /// How they are quantized.
    pub options: GptqOptions,
}

/// What [`measure_model`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The blocks in the order of the modules.
    pub blocks: Vec<Sensitivity>,
    /// Parts in the store.
    pub parts: usize,
}

/// Measures the decoder's linear layers of a mixture in each candidate format by GPTQ, on the
/// unquantized model. A layer's losses are stored as a part.
///
/// # Errors
/// As [`super::quantize_model`].
pub fn measure_model(
    mixture: Mixture<'_>,
    source: &dyn ModelSource,
    calibration: &mut dyn Calibration,
    store: &mut dyn PartStore,
    progress: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Measured> {
    let Mixture { assignments, candidates, options } = mixture;
    options.validate()?;
    let layers = calibration.num_layers();
    let of_layer = |layer: usize| -> Vec<Task<'_>> {
        let linear = assignments.iter().filter(|a| a.module.role == Role::Linear && a.module.layer == Some(layer));
        linear.filter(|a| a.by_default).filter_map(|a| Some((&a.module, a.target?))).collect()
    };
    let parts = (0..layers).filter(|&layer| !of_layer(layer).is_empty()).count();
    let last = (0..parts).rev().find(|&index| !store.contains(index));
    let measurer = Measurer { candidates, options: &options, source, progress };
    let mut modules = Vec::new();
    let mut index = 0;
    for layer in 0..layers {
        let tasks = of_layer(layer);
        // The streams are needed up to the last part that is missing.
        let needed = last.is_some_and(|last| index <= last);
        if needed {
            progress(Event::Calibrating { layer, layers });
            calibration.load_layer(layer).map_err(QuantizeError::Source)?;
        }
        if !tasks.is_empty() {
            let losses = match store.contains(index) {
                true => restore(&tasks, candidates.len(), index, store)?,
                false => {
                    let mut collector = Collector::new(&tasks);
                    calibration.observe(&mut collector).map_err(QuantizeError::Source)?;
                    let losses = measurer.layer(&tasks, collector)?;
                    store
                        .store(index, &Part { scales: losses.clone(), ..Part::default() })
                        .map_err(QuantizeError::Source)?;
                    losses
                }
            };
            for ((module, _), losses) in tasks.into_iter().zip(losses) {
                let losses = losses.into_iter().map(f64::from).collect();
                modules.push((module.name.clone(), module.weights() as u64, losses));
            }
            index += 1;
        }
        if needed {
            calibration.advance().map_err(QuantizeError::Source)?;
        }
    }
    Ok(Measured { blocks: Sensitivity::sum(modules), parts })
}

/// The stored losses of a layer.
fn restore(tasks: &[Task<'_>], candidates: usize, index: usize, store: &mut dyn PartStore) -> Result<Vec<Vec<f32>>> {
    let part = store.load(index).map_err(QuantizeError::Source)?;
    let fits = part.weights.is_empty()
        && part.scales.len() == tasks.len()
        && part.scales.iter().all(|losses| losses.len() == candidates);
    match fits {
        true => Ok(part.scales),
        false => {
            Err(QuantizeError::StoredPart { index, reason: "it holds no losses of this model's modules".to_owned() })
        }
    }
}

struct Measurer<'a> {
    candidates: &'a [Scheme],
    options: &'a GptqOptions,
    source: &'a dyn ModelSource,
    progress: &'a (dyn Fn(Event<'_>) + Sync),
}

impl Measurer<'_> {
    /// Losses `[module][candidate]` in the order of the tasks.
    fn layer(&self, tasks: &[Task<'_>], collector: Collector) -> Result<Vec<Vec<f32>>> {
        let groups = collector.into_groups();
        let tokens = groups.iter().filter_map(|group| group.hessian.as_ref()).map(|h| h.rows()).max().unwrap_or(0);
        let found = in_batches(groups, |group| {
            let members: Vec<&Module> =
                tasks.iter().map(|(module, _)| *module).filter(|m| group.modules.contains(&m.name)).collect();
            self.group(members, group, tokens)
        })?;
        let found: std::collections::HashMap<String, Vec<f32>> = found.into_iter().flatten().collect();
        let of_task = |(module, _): &Task<'_>| {
            found.get(&module.name).cloned().ok_or_else(|| QuantizeError::Calibration {
                module: module.name.clone(),
                reason: "it was not measured".to_owned(),
            })
        };
        tasks.iter().map(of_task).collect()
    }

    /// Losses by candidate of modules that read one input.
    fn group(&self, members: Vec<&Module>, group: Group, tokens: u64) -> Result<Vec<(String, Vec<f32>)>> {
        let (Some(hessian), Some(first)) = (&group.hessian, members.first()) else {
            return in_order(members, |module| self.unreached(module, tokens));
        };
        let factor = InverseFactor::new(hessian, self.options).map_err(|error| of(first, error))?;
        let share = hessian.rows() as f64 / tokens as f64;
        let whole = hessian.symmetric();
        in_order(members, |module| {
            let (n, k) = (module.out_features, module.in_features);
            let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
            let output = quadratic_error(&weight, &whole, k);
            let loss = |&scheme: &Scheme| {
                let found = factor.quantize(scheme, &weight, n, k).map_err(|error| of(module, error))?;
                Ok(relative(found.loss, output, share))
            };
            let losses = self.candidates.iter().map(loss).collect::<Result<Vec<f32>>>()?;
            (self.progress)(Event::Quantized { module });
            Ok((module.name.clone(), losses))
        })
    }

    /// A module that no token reached: the error of its weights, as if one token had.
    fn unreached(&self, module: &Module, tokens: u64) -> Result<(String, Vec<f32>)> {
        let (n, k) = (module.out_features, module.in_features);
        let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let whole = squares(&mut weight.iter().copied());
        let loss = |&scheme: &Scheme| {
            let found = rtn(scheme, &weight, n, k, self.options.scale_search).map_err(|error| of(module, error))?;
            let error = squares(&mut found.decode()?.iter().zip(&weight).map(|(q, w)| q - w));
            Ok(relative(error, whole, 1.0 / tokens.max(1) as f64))
        };
        let losses = self.candidates.iter().map(loss).collect::<Result<Vec<f32>>>()?;
        (self.progress)(Event::Quantized { module });
        Ok((module.name.clone(), losses))
    }
}

/// `error / whole * share`; 0 for an output that is always 0.
fn relative(error: f64, whole: f64, share: f64) -> f32 {
    if whole > 0.0 { (error / whole * share) as f32 } else { 0.0 }
}
