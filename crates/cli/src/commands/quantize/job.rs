//! The work itself: measuring, quantizing, putting the folder together.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use indicatif::ProgressBar;
use marlin_formats::Scheme;
use marlin_models::WriteSummary;
use marlin_ops::PathSearch;
use marlin_quantize::{
    After, Assignment, Calibration, Event, Fold, GptqOptions, Measured, Method, Mixture, PartStore, Sensitivity,
    Settings, Staging, Summary, Target, allocate_formats, measure_model, quantize_model,
};

use super::input::{Input, Source};
use super::output::Output;
use super::recipe::Recipe;

/// Removes a staging folder that holds no finished work. True if it stays.
pub(super) fn leave(staging: Staging) -> Result<bool> {
    if staging.has_parts() {
        return Ok(true);
    }
    staging.remove()?;
    Ok(false)
}

/// Makes the model that calibration text runs through, if the method needs one.
pub(super) type Calibrate<'a> = &'a dyn Fn() -> Result<Option<Box<dyn Calibration + 'a>>>;

/// What is done to a model.
pub(super) struct Job<'a> {
    pub(super) input: &'a Input,
    pub(super) recipe: &'a Recipe,
    pub(super) assignments: Vec<Assignment>,
    pub(super) folds: Vec<Fold>,
    pub(super) method: Method,
    /// What searches for EXL3 codes in place of the CPU.
    pub(super) search: Option<&'a dyn PathSearch>,
    pub(super) output: &'a Path,
    pub(super) calibrate: Calibrate<'a>,
}

/// The blocks of a mixture, each with the scheme it got.
pub(super) type Mixed = Vec<(Sensitivity, Scheme)>;

impl Job<'_> {
    /// Quantizes what is not finished, writes the folder and removes the staging folder; after an error the staging folder
    /// stays if it holds finished work.
    pub(super) fn run(&mut self, mut staging: Staging) -> Result<(Summary, WriteSummary, Option<Mixed>)> {
        let done = self.make(&mut staging);
        match done {
            Ok(done) => {
                staging.remove()?;
                Ok(done)
            }
            Err(error) => {
                let dir = staging.dir().to_owned();
                match leave(staging) {
                    Ok(false) => Err(error),
                    _ => Err(error.context(format!(
                        "stopped; what was finished is kept in {}: the same command goes on from there",
                        dir.display()
                    ))),
                }
            }
        }
    }

    fn make(&mut self, staging: &mut Staging) -> Result<(Summary, WriteSummary, Option<Mixed>)> {
        let (measured, mixture) = match self.recipe {
            Recipe::Mixed { candidates, bits, .. } => {
                let (parts, mixture) = self.mix(candidates, *bits, staging)?;
                (parts, Some(mixture))
            }
            _ => (0, None),
        };
        let summary = self.quantize(measured, staging)?;
        let written = self.write(measured..measured + summary.parts, staging)?;
        Ok((summary, written, mixture))
    }

    /// Measures what each block loses in each candidate, and gives it one. Returns the number of parts this took.
    fn mix(&mut self, candidates: &[Scheme], bits: f64, staging: &mut Staging) -> Result<(usize, Mixed)> {
        let Some(mut calibration) = (self.calibrate)()? else { bail!("a mixture needs calibration text") };
        let options = match self.method {
            Method::Gptq(options) => options,
            _ => GptqOptions::default(),
        };
        let mixture = Mixture { assignments: &self.assignments, candidates, options };
        let progress = Progress::new(&self.assignments, "measuring, ");
        let measured =
            measure_model(mixture, &Source(self.input), &mut *calibration, staging, &|event| progress.show(event));
        drop(progress);
        let Measured { blocks, parts } = measured?;
        let chosen = allocate_formats(&blocks, candidates, bits)?;
        let schemes: HashMap<&str, Scheme> =
            blocks.iter().zip(&chosen).map(|(block, &c)| (block.block.as_str(), candidates[c])).collect();
        for assignment in self.assignments.iter_mut().filter(|a| a.by_default) {
            if let Some(&scheme) = schemes.get(Sensitivity::block_of(&assignment.module.name)) {
                assignment.target = Some(Target::Grouped(scheme));
            }
        }
        Ok((parts, blocks.into_iter().zip(chosen).map(|(block, c)| (block, candidates[c])).collect()))
    }

    /// Quantizes part by part, after the parts that measuring took.
    fn quantize(&self, measured: usize, staging: &mut Staging) -> Result<Summary> {
        let mut calibration = (self.calibrate)()?;
        let calibration = calibration.as_mut().map(|model| &mut **model as &mut dyn Calibration);
        let Self { assignments, method, folds, search, .. } = self;
        let settings = Settings { assignments, method: *method, folds, search: *search };
        let progress = Progress::new(&self.assignments, "");
        let mut store = After { store: staging, parts: measured };
        let summary =
            quantize_model(settings, &Source(self.input), calibration, &mut store, &|event| progress.show(event));
        Ok(summary?)
    }

    /// Puts the folder together.
    fn write(&self, parts: Range<usize>, staging: &mut Staging) -> Result<WriteSummary> {
        let quantized: HashSet<&str> =
            self.assignments.iter().filter(|a| a.target.is_some()).map(|a| a.module.name.as_str()).collect();
        let changed = self.folds.iter().flat_map(|fold| fold.changed_tensors(|name| quantized.contains(name)));
        let mut output = Output::create(self.output, staging)?;
        output.copy_plain(self.input, &self.assignments, &changed.collect())?;
        for index in parts {
            let part = staging.load(index).map_err(|error| anyhow!(error))?;
            output.part(&part)?;
        }
        output.finish(self.input, self.recipe, &self.assignments, staging)
    }
}

/// A progress bar over the weights, on a terminal; gone when dropped.
struct Progress {
    bar: ProgressBar,
    phase: &'static str,
}

impl Progress {
    fn new(assignments: &[Assignment], phase: &'static str) -> Self {
        let weights = assignments.iter().filter(|a| a.target.is_some()).map(|a| a.module.weights() as u64).sum();
        Self { bar: crate::commands::weights_bar(weights), phase }
    }

    fn show(&self, event: Event<'_>) {
        match event {
            Event::Calibrating { layer, layers } => {
                self.bar.set_message(format!("{}layer {} of {layers}", self.phase, layer + 1));
            }
            Event::Quantized { module } => self.bar.inc(module.weights() as u64),
            Event::Restored { weights } => {
                self.bar.inc(weights);
                self.bar.reset_eta();
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
