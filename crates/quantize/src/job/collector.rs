//! One layer's Hessians, filled while calibration text runs through it.

use std::collections::BTreeMap;

use marlin_formats::Scheme;

use super::ActivationSink;
use crate::plan::Module;
use crate::{Hessian, QuantizeError, Result};

/// Collects the Hessians of the modules it was made for and ignores all others.
///
/// Modules of one parent that report equal inputs in a row (q, k and v; gate and up) share a
/// Hessian, which is summed and later factored once.
pub(super) struct Collector {
    entries: BTreeMap<String, Entry>,
    hessians: Vec<Hessian>,
    last: Option<Last>,
}

struct Entry {
    in_features: usize,
    /// Index of the Hessian, once a row has come.
    slot: Option<usize>,
    /// Whether the slot belongs to a module that reports before this one.
    follows: bool,
}

/// The last input that was added to a Hessian.
struct Last {
    module: String,
    slot: usize,
    values: Vec<f32>,
}

impl Collector {
    pub(super) fn new(modules: &[(&Module, Scheme)]) -> Self {
        let entry = |module: &Module| Entry { in_features: module.in_features, slot: None, follows: false };
        Self {
            entries: modules.iter().map(|(module, _)| (module.name.clone(), entry(module))).collect(),
            hessians: Vec::new(),
            last: None,
        }
    }

    /// Each Hessian with the modules that share it, and the modules that no row reached.
    pub(super) fn into_groups(self) -> Vec<(Option<Hessian>, Vec<String>)> {
        let mut groups: Vec<(Option<Hessian>, Vec<String>)> =
            self.hessians.into_iter().map(|hessian| (Some(hessian), Vec::new())).collect();
        let mut without_rows = Vec::new();
        for (name, entry) in self.entries {
            match entry.slot {
                Some(slot) => groups[slot].1.push(name),
                None => without_rows.push(name),
            }
        }
        groups.push((None, without_rows));
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
                self.hessians.push(Hessian::new(columns)?);
                *entry.slot.insert(self.hessians.len() - 1)
            }
        };
        self.hessians[slot].accumulate(values).or_else(|error| refuse(error.to_string()))?;
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
