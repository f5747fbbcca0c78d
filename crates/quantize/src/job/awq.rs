//! AWQ of one decoder layer: scales for each fold, then weights rounded with the scales applied.

use super::collector::{Collector, Group};
use super::run::{Done, Quantizer, Task, few_rows, grouped, in_batches, of, part};
use crate::awq::{AwqOptions, Inputs, Reader, search};
use crate::fold::{Fold, Previous};
use crate::part::{Changed, Notes, Part, QuantizedWeight};
use crate::plan::Module;
use crate::rtn::rtn_weighted;
use crate::{QuantizeError, Result};

/// The folds of a layer with the scales that were found, `None` where there are none.
pub(super) struct Scaled<'a> {
    folds: Vec<(&'a Fold, Option<&'a [f32]>)>,
}

impl<'a> Scaled<'a> {
    /// The folds of a part with its scales, or why they cannot be its.
    pub(super) fn new(folds: &[&'a Fold], scales: &'a [Vec<f32>]) -> std::result::Result<Self, String> {
        if folds.len() != scales.len() {
            return Err(format!("it holds {} vectors of scales, expected {}", scales.len(), folds.len()));
        }
        let mut found = Vec::new();
        for (&fold, scales) in folds.iter().zip(scales) {
            let valid = scales.len() == fold.channels() && scales.iter().all(|t| t.is_finite() && *t > 0.0);
            if !scales.is_empty() && !valid {
                return Err("its scales are not those of this model".to_owned());
            }
            found.push((fold, (!scales.is_empty()).then_some(scales.as_slice())));
        }
        Ok(Self { folds: found })
    }

    /// What the columns of a module are multiplied by.
    fn columns(&self, module: &Module) -> Option<&[f32]> {
        let mut folds = self.folds.iter();
        folds.find(|(fold, _)| fold.readers.iter().any(|reader| reader.name == module.name)).and_then(|(_, t)| *t)
    }

    /// What the rows of a module are divided by.
    fn rows(&self, module: &Module) -> Option<&[f32]> {
        let is_previous = |fold: &Fold| matches!(&fold.previous, Previous::Linear { module: previous, .. } if previous.name == module.name);
        self.folds.iter().find(|(fold, _)| is_previous(fold)).and_then(|(_, t)| *t)
    }

    /// `W[n, k] t_in[k] / t_out[n]`.
    fn apply(&self, module: &Module, weight: &mut [f32]) {
        self.scale(module, weight, |w, column, row| w * column / row);
    }

    /// Undoes [`Scaled::apply`].
    pub(super) fn undo(&self, module: &Module, weight: &mut [f32]) {
        self.scale(module, weight, |w, column, row| w / column * row);
    }

    fn scale(&self, module: &Module, weight: &mut [f32], scaled: impl Fn(f32, f32, f32) -> f32) {
        let (columns, rows) = (self.columns(module), self.rows(module));
        for (n, values) in weight.chunks_exact_mut(module.in_features).enumerate() {
            let row = rows.map_or(1.0, |rows| rows[n]);
            for (k, w) in values.iter_mut().enumerate() {
                *w = scaled(*w, columns.map_or(1.0, |columns| columns[k]), row);
            }
        }
    }
}

impl Quantizer<'_> {
    /// The part of a layer, or of `lm_head` with no folds.
    pub(super) fn awq(
        &self,
        tasks: &[Task<'_>],
        collector: Collector,
        folds: &[&Fold],
        options: &AwqOptions,
    ) -> Result<Part> {
        let groups = collector.into_groups();
        let mut scales = Vec::new();
        for fold in folds {
            scales.push(self.search(tasks, &groups, fold, options)?.unwrap_or_default());
        }
        let scaled = Scaled::new(folds, &scales)
            .map_err(|reason| QuantizeError::Calibration { module: "layer".to_owned(), reason })?;
        let done = in_batches(tasks.to_vec(), |task| self.round_scaled(task, &groups, &scaled, options))?;
        let changed = self.changed(tasks, folds, &scaled)?;
        Ok(Part { changed, scales, ..part(done) })
    }

    /// The best scales of one fold; `None` when no quantized module that rows reached reads it.
    fn search(
        &self,
        tasks: &[Task<'_>],
        groups: &[Group],
        fold: &Fold,
        options: &AwqOptions,
    ) -> Result<Option<Vec<f32>>> {
        let mut readers = Vec::new();
        for module in &fold.readers {
            let Some(&task) = tasks.iter().find(|(task, _)| task.name == module.name) else { continue };
            let Some((hessian, mean_abs)) = inputs(groups, module) else { continue };
            readers.push(Reader { module: task.0, scheme: grouped(task)?, inputs: Inputs { hessian, mean_abs } });
        }
        let weight = |module: &Module| self.source.weight(module).map_err(QuantizeError::Source);
        let first = readers.first().map(|reader| reader.module);
        search(&readers, options, &weight).map_err(|error| match (error, first) {
            (error @ QuantizeError::Source(_), _) | (error, None) => error,
            (error, Some(module)) => of(module, error),
        })
    }

    fn round_scaled(
        &self,
        task: Task<'_>,
        groups: &[Group],
        scaled: &Scaled<'_>,
        options: &AwqOptions,
    ) -> Result<Done> {
        let (module, _) = task;
        let mut weight = self.source.weight(module).map_err(QuantizeError::Source)?;
        scaled.apply(module, &mut weight);
        let mut importance = None;
        let mut notes = Notes { without_rows: vec![module.name.clone()], ..Notes::default() };
        if let Some((hessian, _)) = inputs(groups, module) {
            let columns = scaled.columns(module);
            let squares = hessian.diagonal().into_iter().enumerate();
            let scaled = squares.map(|(k, x)| (x / columns.map_or(1.0, |t| f64::from(t[k]).powi(2))) as f32);
            importance = Some(scaled.collect::<Vec<f32>>());
            notes = few_rows(task, hessian.rows());
        }
        let (n, k) = (module.out_features, module.in_features);
        let matrix = rtn_weighted(grouped(task)?, &weight, n, k, importance.as_deref(), options.scale_search)
            .map_err(|error| of(module, error))?;
        Ok(self.done(module, QuantizedWeight::Grouped(matrix), notes))
    }

    /// New values of everything that the scales change and that is not quantized.
    fn changed(&self, tasks: &[Task<'_>], folds: &[&Fold], scaled: &Scaled<'_>) -> Result<Vec<Changed>> {
        let is_quantized = |name: &str| tasks.iter().any(|(module, _)| module.name == name);
        let mut changed: Vec<Changed> = Vec::new();
        let vector = |tensor: &str, len: usize, scales: Option<&[f32]>| -> Result<Changed> {
            let mut values = self.source.vector(tensor, len).map_err(QuantizeError::Source)?;
            if let Some(scales) = scales {
                values.iter_mut().zip(scales).for_each(|(value, t)| *value /= t);
            }
            Ok(Changed { tensor: tensor.to_owned(), dims: vec![len], values })
        };
        for &(fold, scales) in &scaled.folds {
            let mut modules: Vec<&Module> = fold.readers.iter().collect();
            match &fold.previous {
                Previous::Norm { tensor } => changed.push(vector(tensor, fold.channels(), scales)?),
                Previous::Linear { module, bias } => {
                    modules.push(module);
                    if *bias {
                        changed.push(vector(&format!("{}.bias", module.name), module.out_features, scales)?);
                    }
                }
            }
            for module in modules {
                let tensor = format!("{}.weight", module.name);
                if is_quantized(&module.name) || changed.iter().any(|changed| changed.tensor == tensor) {
                    continue;
                }
                let mut values = self.source.weight(module).map_err(QuantizeError::Source)?;
                scaled.apply(module, &mut values);
                changed.push(Changed { tensor, dims: vec![module.out_features, module.in_features], values });
            }
        }
        debug_assert_eq!(
            changed.iter().map(|changed| changed.tensor.clone()).collect::<std::collections::BTreeSet<_>>(),
            folds.iter().flat_map(|fold| fold.changed_tensors(is_quantized)).collect()
        );
        Ok(changed)
    }
}

/// The Hessian and the mean magnitudes of a module's input, if rows reached it.
fn inputs<'a>(groups: &'a [Group], module: &Module) -> Option<(&'a crate::Hessian, &'a [f64])> {
    let group = groups.iter().find(|group| group.modules.contains(&module.name))?;
    Some((group.hessian.as_ref()?, &group.mean_abs))
}
