//! One layer's Hessians, filled while calibration text runs through it.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::ActivationSink;
use super::run::Task;
use crate::plan::Module;
use crate::{Hessian, QuantizeError, Result};

/// Features whose magnitudes one task sums.
const MAGNITUDES: usize = 256;

/// Collects the Hessians of the modules it was made for and ignores all others.
///
/// Modules of one parent that report equal inputs in a row (q, k and v; gate and up) share a
/// Hessian, which is summed and later factored once.
pub(super) struct Collector {
    entries: BTreeMap<String, Entry>,
    inputs: Vec<Input>,
    last: Option<Last>,
}

struct Entry {
    in_features: usize,
    /// Index of the Hessian, once a row has come.
    slot: Option<usize>,
    /// Whether the slot belongs to a module that reports before this one.
    follows: bool,
}

/// Statistics of one input.
struct Input {
    hessian: Hessian,
    /// Sum of the magnitudes of each feature.
    magnitudes: Vec<f64>,
}

/// Modules that read the same input.
pub(super) struct Group {
    /// `None` when no row reached them.
    pub(super) hessian: Option<Hessian>,
    /// Mean magnitude of each feature; empty when no row reached them.
    pub(super) mean_abs: Vec<f64>,
    pub(super) modules: Vec<String>,
}

/// The last input that was added to a Hessian.
struct Last {
    module: String,
    slot: usize,
    values: Vec<f32>,
}

impl Collector {
    pub(super) fn new(modules: &[Task<'_>]) -> Self {
        let entry = |module: &Module| Entry { in_features: module.in_features, slot: None, follows: false };
        Self {
            entries: modules.iter().map(|(module, _)| (module.name.clone(), entry(module))).collect(),
            inputs: Vec::new(),
            last: None,
        }
    }

    /// Each Hessian with the modules that share it, then the modules that no row reached.
    pub(super) fn into_groups(self) -> Vec<Group> {
        let group = |Input { hessian, magnitudes }| {
            let rows = hessian.rows() as f64;
            let mean_abs = magnitudes.into_iter().map(|sum| sum / rows).collect();
            Group { hessian: Some(hessian), mean_abs, modules: Vec::new() }
        };
        let mut groups: Vec<Group> = self.inputs.into_iter().map(group).collect();
        let mut without_rows = Vec::new();
        for (name, entry) in self.entries {
            match entry.slot {
                Some(slot) => groups[slot].modules.push(name),
                None => without_rows.push(name),
            }
        }
        groups.push(Group { hessian: None, mean_abs: Vec::new(), modules: without_rows });
        groups
    }
}

impl ActivationSink for Collector {
    fn activations(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> Result<()> {
        let Some(entry) = self.entries.get_mut(module) else {
            return Ok(());
        };
        let refuse = |reason: String| Err(QuantizeError::Calibration { module: module.to_owned(), reason });
        if columns != entry.in_features || rows.checked_mul(columns) != Some(values.len()) {
            return refuse(format!(
                "its input is [{rows}, {columns}] with {} values, its in_features is {}",
                values.len(),
                entry.in_features
            ));
        }
        if rows == 0 {
            return Ok(());
        }
        let shared =
            self.last.as_ref().filter(|last| parent(&last.module) == parent(module) && same_bits(&last.values, values));
        let slot = match (entry.slot, shared) {
            (None, Some(last)) => {
                entry.slot = Some(last.slot);
                entry.follows = true;
                return Ok(());
            }
            (Some(slot), Some(last)) if entry.follows && last.slot == slot => return Ok(()),
            (Some(_), _) if entry.follows => {
                return refuse("it no longer reads the input it shared before".to_owned());
            }
            (Some(slot), _) => slot,
            (None, None) => {
                self.inputs.push(Input { hessian: Hessian::new(columns)?, magnitudes: vec![0.0; columns] });
                *entry.slot.insert(self.inputs.len() - 1)
            }
        };
        let input = &mut self.inputs[slot];
        input.hessian.accumulate(values).or_else(|error| refuse(error.to_string()))?;
        let sums = input.magnitudes.par_chunks_mut(MAGNITUDES).enumerate();
        sums.for_each(|(c, sums)| {
            for row in values.chunks_exact(columns) {
                sums.iter_mut().zip(&row[c * MAGNITUDES..]).for_each(|(sum, x)| *sum += f64::from(x.abs()));
            }
        });
        self.last = Some(Last { module: module.to_owned(), slot, values: values.to_vec() });
        Ok(())
    }
}

/// The path without its last component.
fn parent(module: &str) -> &str {
    module.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// Equality under which -0 differs from 0 and NaN equals itself.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Role;

    #[test]
    fn every_feature_has_its_mean_magnitude() {
        let (rows, columns) = (5, 2 * MAGNITUDES + 3);
        let role = Role::Linear;
        let module = Module { name: "m".to_owned(), layer: Some(0), role, out_features: 1, in_features: columns };
        let target = crate::plan::Target::Exl3 { codebook: marlin_formats::exl3::Codebook::Mcg, bits: 3 };
        let values: Vec<f32> = (0..2 * rows * columns).map(|i| (i * 7919 % 1009) as f32 - 500.0).collect();
        let tasks = [(&module, target)];
        let mut collector = Collector::new(&tasks);
        for values in values.chunks_exact(rows * columns) {
            collector.activations("m", rows, columns, values).unwrap();
        }
        let groups = collector.into_groups();
        for (k, &mean) in groups[0].mean_abs.iter().enumerate() {
            let sum: f64 = values.iter().skip(k).step_by(columns).map(|x| f64::from(x.abs())).sum();
            assert_eq!(mean, sum / (2 * rows) as f64, "feature {k}");
        }
        assert_eq!(groups[0].mean_abs.len(), columns);
    }
}
