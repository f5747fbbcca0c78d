//! The loop over a model's parts.

use std::collections::BTreeSet;

use marlin_formats::Scheme;
use marlin_ops::PathSearch;
use rayon::prelude::*;

use super::awq::Scaled;
use super::collector::Collector;
use super::{Calibration, Event, Method, ModelSource, PartStore, Replacement, Settings, Summary};
use crate::exl3::{Exl3Inputs, Exl3Options, exl3};
use crate::fold::Fold;
use crate::part::{Notes, Part, QuantizedWeight};
use crate::plan::{Module, Role, Target};
use crate::{GptqOptions, InverseFactor, QuantizeError, Result, rtn};

/// A module with what it becomes.
pub(super) type Task<'a> = (&'a Module, Target);

/// Quantizes every module that has a target.
///
/// [`Method::Rtn`] takes the modules in order and needs no calibration; one that is given is not
/// run. Modules of a part are quantized in parallel; no result depends on the number of threads.
///
/// # Errors
/// [`QuantizeError::NoCalibrationRows`] for other methods without calibration; for AWQ, a target of
/// a module in a fold that is no linear layer of the decoder, such as a router;
/// [`QuantizeError::Module`] around whatever a quantizer refuses; [`QuantizeError::StoredPart`] for
/// a stored part that is not one of this job; [`QuantizeError::Source`] for source, store and
/// calibration.
pub fn quantize_model(
    settings: Settings<'_>,
    source: &dyn ModelSource,
    calibration: Option<&mut dyn Calibration>,
    store: &mut dyn PartStore,
    progress: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Summary> {
    let tasks: Vec<Task<'_>> =
        settings.assignments.iter().filter_map(|assignment| Some((&assignment.module, assignment.target?))).collect();
    let quantizer = Quantizer { method: settings.method, search: settings.search, source, progress };
    let mut job = Job { quantizer, folds: settings.folds, store, next: 0, summary: Summary::default() };
    match settings.method {
        Method::Rtn(_) => {
            for run in tasks.chunk_by(|(a, _), (b, _)| a.layer == b.layer) {
                job.uncalibrated(run)?;
            }
        }
        Method::Gptq(options) => {
            options.validate()?;
            job.calibrated(&tasks, calibration.ok_or(QuantizeError::NoCalibrationRows)?)?;
        }
        Method::Awq(options) => {
            options.validate()?;
            check_folds(settings.folds, &tasks)?;
            job.calibrated(&tasks, calibration.ok_or(QuantizeError::NoCalibrationRows)?)?;
        }
        Method::Exl3(options) => {
            options.validate()?;
            job.calibrated(&tasks, calibration.ok_or(QuantizeError::NoCalibrationRows)?)?;
        }
    }
    job.summary.parts = job.next;
    Ok(job.summary)
}

/// Refuses targets of modules that folds scale but that are not quantized with their layer.
fn check_folds(folds: &[Fold], tasks: &[Task<'_>]) -> Result<()> {
    for &(module, target) in tasks.iter().filter(|(module, _)| module.role != Role::Linear) {
        if folds.iter().flat_map(|fold| &fold.readers).any(|reader| reader.name == module.name) {
            let rule = "left out with AWQ, which scales the inputs of this module and quantizes linear layers only";
            return Err(of(module, mixed(target, rule)));
        }
    }
    Ok(())
}

/// A job under way.
struct Job<'a> {
    quantizer: Quantizer<'a>,
    folds: &'a [Fold],
    store: &'a mut dyn PartStore,
    /// Index of the next part.
    next: usize,
    summary: Summary,
}

impl Job<'_> {
    /// Layer by layer, then `lm_head`, then what is not calibrated: embeddings, routers, others.
    fn calibrated(&mut self, tasks: &[Task<'_>], calibration: &mut dyn Calibration) -> Result<()> {
        let layers = calibration.num_layers();
        let of_layer = |layer: usize| -> Vec<Task<'_>> {
            let linear = tasks.iter().filter(|(m, _)| m.role == Role::Linear && m.layer == Some(layer));
            linear.copied().collect()
        };
        let (head, rest): (Vec<_>, Vec<_>) =
            tasks.iter().filter(|(m, _)| m.role != Role::Linear).partition(|(m, _)| m.role == Role::LmHead);
        let calibrated =
            (0..layers).filter(|&layer| !of_layer(layer).is_empty()).count() + usize::from(!head.is_empty());
        // The streams are needed up to the last part that has to be made.
        let observed = (0..calibrated).any(|index| !self.store.contains(index));
        for layer in 0..layers {
            self.layer(layer, &of_layer(layer), calibration, observed)?;
        }
        if !head.is_empty() && self.restore(&head, &[])?.is_none() {
            let mut collector = Collector::new(&head);
            calibration.observe_head(&mut collector).map_err(QuantizeError::Source)?;
            let part = self.quantizer.calibrated(&head, collector, &[])?;
            self.finish(&part)?;
        }
        self.uncalibrated(&rest)
    }

    /// Makes or restores the part of one decoder layer and moves the calibration past it.
    fn layer(
        &mut self,
        layer: usize,
        tasks: &[Task<'_>],
        calibration: &mut dyn Calibration,
        observed: bool,
    ) -> Result<()> {
        let awq = matches!(self.quantizer.method, Method::Awq(_));
        let folds: Vec<&Fold> = self.folds.iter().filter(|fold| awq && fold.layer == layer).collect();
        if !observed {
            return if tasks.is_empty() { Ok(()) } else { self.restore(tasks, &folds).map(|_| ()) };
        }
        (self.quantizer.progress)(Event::Calibrating { layer, layers: calibration.num_layers() });
        calibration.load_layer(layer).map_err(QuantizeError::Source)?;
        if !tasks.is_empty() {
            let part = match self.restore(tasks, &folds)? {
                Some(part) => part,
                None => {
                    let mut collector = Collector::new(tasks);
                    calibration.observe(&mut collector).map_err(QuantizeError::Source)?;
                    let part = self.quantizer.calibrated(tasks, collector, &folds)?;
                    self.finish(&part)?;
                    part
                }
            };
            let scaled = Scaled::new(&folds, &part.scales)
                .map_err(|reason| QuantizeError::StoredPart { index: self.next - 1, reason })?;
            for (name, weight) in part.weights {
                let (module, _) = find(tasks, &name)?;
                let replacement = if folds.is_empty() {
                    Replacement::Quantized(weight)
                } else {
                    let mut values = weight.decode()?;
                    scaled.undo(module, &mut values);
                    Replacement::Dense(values)
                };
                calibration.replace(module, replacement).map_err(QuantizeError::Source)?;
            }
        }
        calibration.advance().map_err(QuantizeError::Source)
    }

    /// A part that is quantized without calibration.
    fn uncalibrated(&mut self, tasks: &[Task<'_>]) -> Result<()> {
        if tasks.is_empty() || self.restore(tasks, &[])?.is_some() {
            return Ok(());
        }
        let part = self.quantizer.uncalibrated(tasks)?;
        self.finish(&part)
    }

    /// The next part, if it was stored before.
    fn restore(&mut self, tasks: &[Task<'_>], folds: &[&Fold]) -> Result<Option<Part>> {
        if !self.store.contains(self.next) {
            return Ok(None);
        }
        let part = self.store.load(self.next).map_err(QuantizeError::Source)?;
        check_part(tasks, folds, &part).map_err(|reason| QuantizeError::StoredPart { index: self.next, reason })?;
        self.count(&part);
        self.summary.restored += 1;
        let weights = tasks.iter().map(|(module, _)| module.weights() as u64).sum();
        (self.quantizer.progress)(Event::Restored { weights });
        Ok(Some(part))
    }

    /// Stores the next part.
    fn finish(&mut self, part: &Part) -> Result<()> {
        self.store.store(self.next, part).map_err(QuantizeError::Source)?;
        self.count(part);
        Ok(())
    }

    fn count(&mut self, part: &Part) {
        self.next += 1;
        let summary = &mut self.summary;
        for (_, weight) in &part.weights {
            let weights = (weight.out_features() * weight.in_features()) as u64;
            summary.modules += 1;
            summary.weights += weights;
            summary.bits += weight.bits_per_weight() * weights as f64;
        }
        let Notes { without_rows, few_rows, damped } = part.notes.clone();
        summary.notes.without_rows.extend(without_rows);
        summary.notes.few_rows.extend(few_rows);
        summary.notes.damped.extend(damped);
    }
}

/// Checks that a stored part holds the weights and the changed tensors of these tasks and no others.
fn check_part(tasks: &[Task<'_>], folds: &[&Fold], part: &Part) -> std::result::Result<(), String> {
    if part.weights.len() != tasks.len() {
        return Err(format!("it holds {} modules, expected {}", part.weights.len(), tasks.len()));
    }
    for &(module, target) in tasks {
        let Some((_, weight)) = part.weights.iter().find(|(name, _)| *name == module.name) else {
            return Err(format!("`{}` is missing", module.name));
        };
        let found = (weight.out_features(), weight.in_features(), weight.target());
        if found != (module.out_features, module.in_features, target) {
            return Err(format!("`{}` has another shape or format", module.name));
        }
    }
    Scaled::new(folds, &part.scales)?;
    let is_quantized = |name: &str| tasks.iter().any(|(module, _)| module.name == name);
    let expected: BTreeSet<String> = folds.iter().flat_map(|fold| fold.changed_tensors(is_quantized)).collect();
    let found: BTreeSet<String> = part.changed.iter().map(|changed| changed.tensor.clone()).collect();
    if found != expected || found.len() != part.changed.len() {
        return Err("it changes other tensors".to_owned());
    }
    Ok(())
}

/// The task of a module.
fn find<'a>(tasks: &[Task<'a>], name: &str) -> Result<Task<'a>> {
    let found = tasks.iter().find(|(module, _)| module.name == name).copied();
    found.ok_or_else(|| QuantizeError::Calibration {
        module: name.to_owned(),
        reason: "it is not part of the current layer".to_owned(),
    })
}

/// A quantized module with what a user should know about it.
pub(super) struct Done {
    name: String,
    weight: QuantizedWeight,
    notes: Notes,
}

/// What the modules of a part are quantized with.
pub(super) struct Quantizer<'a> {
    pub(super) method: Method,
    search: Option<&'a dyn PathSearch>,
    pub(super) source: &'a dyn ModelSource,
    progress: &'a (dyn Fn(Event<'_>) + Sync),
}

impl Quantizer<'_> {
    /// The part of modules that are not calibrated.
    fn uncalibrated(&self, tasks: &[Task<'_>]) -> Result<Part> {
        Ok(part(in_batches(tasks.to_vec(), |task| self.plain(task, Notes::default()))?))
    }

    /// The part of modules whose inputs were collected, one group a shared input.
    fn calibrated(&self, tasks: &[Task<'_>], collector: Collector, folds: &[&Fold]) -> Result<Part> {
        if let Method::Awq(options) = self.method {
            return self.awq(tasks, collector, folds, &options);
        }
        let done = in_batches(collector.into_groups(), |group| {
            let members: Vec<Task<'_>> =
                tasks.iter().filter(|(module, _)| group.modules.contains(&module.name)).copied().collect();
            match (self.method, &group.hessian, members.first()) {
                (Method::Gptq(options), Some(hessian), Some(first)) => {
                    let factor = InverseFactor::new(hessian, &options).map_err(|error| of(first.0, error))?;
                    let rows = hessian.rows();
                    drop(group);
                    self.eliminate(members, &factor, rows, &options)
                }
                (Method::Exl3(options), Some(hessian), Some(first)) => {
                    let inputs =
                        Exl3Inputs::new(hessian, &first.0.name, &options).map_err(|error| of(first.0, error))?;
                    let rows = hessian.rows();
                    drop(group);
                    in_order(members, |task| self.trellis(task, &inputs, few_rows(task, rows), &options))
                }
                _ => in_order(members, |task| {
                    self.plain(task, Notes { without_rows: vec![task.0.name.clone()], ..Notes::default() })
                }),
            }
        })?;
        Ok(part(done.into_iter().flatten().collect()))
    }

    /// GPTQ for modules that share a factor, made from `rows` calibration rows.
    fn eliminate(
        &self,
        members: Vec<Task<'_>>,
        factor: &InverseFactor,
        rows: u64,
        options: &GptqOptions,
    ) -> Result<Vec<Done>> {
        in_order(members, |task| {
            let (module, _) = task;
            let mut notes = few_rows(task, rows);
            if factor.damping() > options.damping {
                notes.damped.push((module.name.clone(), factor.damping()));
            }
            let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
            let found = factor
                .quantize(grouped(task)?, &weight, module.out_features, module.in_features)
                .map_err(|error| of(module, error))?;
            Ok(self.done(module, QuantizedWeight::Grouped(found.matrix), notes))
        })
    }

    /// EXL3 for a module that reads `inputs`.
    fn trellis(
        &self,
        (module, target): Task<'_>,
        inputs: &Exl3Inputs,
        notes: Notes,
        options: &Exl3Options,
    ) -> Result<Done> {
        let Target::Exl3 { codebook, bits } = target else {
            return Err(of(module, mixed(target, "exl3 for every module, or for none")));
        };
        let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        let options = Exl3Options { codebook, bits, ..*options };
        let found = exl3(self.search, inputs, &module.name, &weight, module.out_features, module.in_features, &options);
        Ok(self.done(module, QuantizedWeight::Exl3(found.map_err(|error| of(module, error))?.matrix), notes))
    }

    /// A module without calibration.
    fn plain(&self, task: Task<'_>, notes: Notes) -> Result<Done> {
        let (module, _) = task;
        let search = match self.method {
            Method::Rtn(search) => search,
            Method::Gptq(options) => options.scale_search,
            Method::Awq(options) => options.scale_search,
            Method::Exl3(options) => {
                let inputs = Exl3Inputs::uncalibrated(module.in_features, &module.name, &options);
                return self.trellis(task, &inputs.map_err(|error| of(module, error))?, notes, &options);
            }
        };
        let weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        let (n, k) = (module.out_features, module.in_features);
        let matrix = rtn(grouped(task)?, &weight, n, k, search).map_err(|error| of(module, error))?;
        Ok(self.done(module, QuantizedWeight::Grouped(matrix), notes))
    }

    pub(super) fn done(&self, module: &Module, weight: QuantizedWeight, notes: Notes) -> Done {
        (self.progress)(Event::Quantized { module });
        Done { name: module.name.clone(), weight, notes }
    }
}

/// What to say about a module calibrated on `rows` rows.
pub(super) fn few_rows((module, _): Task<'_>, rows: u64) -> Notes {
    let few = rows < (module.in_features / 8) as u64;
    Notes { few_rows: few.then(|| (module.name.clone(), rows)).into_iter().collect(), ..Notes::default() }
}

/// The scheme of a task of a method that makes grouped weights.
pub(super) fn grouped((module, target): Task<'_>) -> Result<Scheme> {
    target.scheme().ok_or_else(|| of(module, mixed(target, "a grouped format, as the method makes no EXL3")))
}

fn mixed(target: Target, rule: &'static str) -> QuantizeError {
    QuantizeError::Option { option: "format", value: target.to_string(), rule }
}

pub(super) fn part(done: Vec<Done>) -> Part {
    let mut part = Part::default();
    for Done { name, weight, notes: Notes { without_rows, few_rows, damped } } in done {
        part.weights.push((name, weight));
        part.notes.without_rows.extend(without_rows);
        part.notes.few_rows.extend(few_rows);
        part.notes.damped.extend(damped);
    }
    part
}

/// Runs `step` on all items in parallel; results, and the error if any, are those of a plain loop.
pub(super) fn in_order<T: Send, R: Send>(items: Vec<T>, step: impl Fn(T) -> Result<R> + Send + Sync) -> Result<Vec<R>> {
    let results: Vec<Result<R>> = items.into_par_iter().map(step).collect();
    results.into_iter().collect()
}

/// [`in_order`] for items that hold much memory while they run: as many at once as there are threads.
pub(super) fn in_batches<T: Send, R: Send>(
    items: Vec<T>,
    step: impl Fn(T) -> Result<R> + Send + Sync,
) -> Result<Vec<R>> {
    let mut results = Vec::with_capacity(items.len());
    let mut items = items.into_iter();
    loop {
        let batch: Vec<T> = items.by_ref().take(rayon::current_num_threads()).collect();
        if batch.is_empty() {
            return Ok(results);
        }
        results.extend(in_order(batch, &step)?);
    }
}

/// Adds the module to an error.
pub(super) fn of(module: &Module, source: QuantizeError) -> QuantizeError {
    QuantizeError::Module {
        module: module.name.clone(),
        out_features: module.out_features,
        in_features: module.in_features,
        source: Box::new(source),
    }
}
