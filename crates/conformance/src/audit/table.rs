//! The kernels of the original collection, `data/kernels.tsv`.

use std::sync::LazyLock;

use super::configuration::Configuration;

/// One kernel of the collection.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name there.
    pub name: &'static str,
    /// Its family: `gemm`, `attention`, `selftest`, ...
    pub family: &'static str,
    /// The operation of the specification that it computes.
    pub operation: &'static str,
    /// In which configuration, as far as the specification keeps it.
    pub configuration: Configuration,
    /// How early it is wanted: `P0` to `P3` or nothing.
    pub priority: &'static str,
    /// What is special about it.
    pub note: &'static str,
}

const TABLE: &str = include_str!("../../data/kernels.tsv");
const COLUMNS: &str = "name\tfamily\toperation\tconfiguration\tpriority\tnote";

/// Every kernel, in the order of the table.
pub fn kernels() -> &'static [Kernel] {
    static KERNELS: LazyLock<Vec<Kernel>> = LazyLock::new(|| {
        let mut lines = TABLE.lines();
        assert_eq!(lines.next(), Some(COLUMNS), "the header of data/kernels.tsv");
        lines.map(parse).collect()
    });
    &KERNELS
}

fn parse(line: &'static str) -> Kernel {
    let columns: Vec<&'static str> = line.split('\t').collect();
    let [name, family, operation, configuration, priority, note] = *columns else {
        panic!("data/kernels.tsv: six columns in `{line}`");
    };
    let configuration = configuration.parse().unwrap_or_else(|e| panic!("data/kernels.tsv: {name}: {e}"));
    let optional = |text: &'static str| if text == "-" { "" } else { text };
    Kernel { name, family, operation, configuration, priority: optional(priority), note: optional(note) }
}

/// Every family, in the order of the table.
pub fn kernel_families() -> Vec<&'static str> {
    let mut families = Vec::new();
    for kernel in kernels() {
        if !families.contains(&kernel.family) {
            families.push(kernel.family);
        }
    }
    families
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::audit::schema::KEYS;

    #[test]
    fn the_table_is_complete_and_in_canonical_form() {
        assert_eq!(kernels().len(), 284);
        let names: BTreeSet<&str> = kernels().iter().map(|kernel| kernel.name).collect();
        assert_eq!(names.len(), 284);
        for (kernel, line) in kernels().iter().zip(TABLE.lines().skip(1)) {
            let text = kernel.configuration.to_string();
            assert_eq!(line.split('\t').nth(3), Some(text.as_str()), "{}", kernel.name);
            assert!(["", "P0", "P1", "P2", "P3"].contains(&kernel.priority), "{}", kernel.name);
        }
    }

    #[test]
    fn every_key_of_the_schema_is_used() {
        let used: BTreeSet<&str> =
            kernels().iter().flat_map(|kernel| kernel.configuration.keys()).map(|k| k.name).collect();
        let known: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
        assert!(known.is_sorted());
        assert_eq!(used.into_iter().collect::<Vec<_>>(), known);
    }
}
