//! A model made of plain matrix products, and a store in memory.

use std::collections::BTreeMap;
use std::path::Path;

use marlin_formats::exl3::Codebook;
use marlin_formats::{Format, QuantizedMatrix, Scheme};
use marlin_quantize::exl3::{Exl3Options, OutputScales};
use marlin_quantize::{
    ActivationSink, Assignment, AwqOptions, Calibration, Fingerprint, GptqOptions, Method, ModelSource, Module, Part,
    PartStore, Plan, QuantizedWeight, Replacement, ScaleSearch, SourceError, Target,
};

use super::{Random, correlated};

pub const K: usize = 64;
pub const ROWS: usize = 300;

pub const METHODS: [Method; 4] = [
    Method::Rtn(ScaleSearch::Range),
    Method::Gptq(GptqOptions { damping: 0.01, block: 32, act_order: true, scale_search: ScaleSearch::Mse }),
    Method::Awq(AwqOptions { exponents: 20, scale_search: ScaleSearch::Mse }),
    Method::Exl3(Exl3Options {
        codebook: Codebook::Mcg,
        bits: 2,
        sigma: 0.025,
        seed: 9,
        output_scales: OutputScales::Always,
    }),
];

/// The targets of a method: EXL3 has its own, here of a few modules, as its search takes long.
pub fn targets(method: Method, assignments: &[Assignment]) -> Vec<Assignment> {
    let mut assignments = assignments.to_vec();
    if let Method::Exl3(Exl3Options { codebook, bits, .. }) = method {
        for assignment in &mut assignments {
            let chosen = ["q_proj", "lm_head"].iter().any(|name| assignment.module.name.ends_with(name));
            assignment.target = chosen.then_some(Target::Exl3 { codebook, bits });
        }
    }
    assignments
}

pub fn fingerprint(method: Method) -> Fingerprint {
    let mut job = Fingerprint::default();
    job.add("method", format!("{method:?}"));
    job
}

/// Names and contents of the staging folder's parts.
pub fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let named = entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.path()));
    let mut files: Vec<_> = named
        .filter(|(name, _)| name.starts_with("part-"))
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

pub type Weights = BTreeMap<String, Vec<f32>>;
pub type SourceResult<T> = std::result::Result<T, SourceError>;

pub struct Source(pub Weights);

impl ModelSource for Source {
    fn weight(&self, module: &Module) -> SourceResult<Vec<f32>> {
        let found = self.0.get(&module.name).cloned();
        found.ok_or_else(|| format!("no {}", module.name).into())
    }

    fn vector(&self, tensor: &str, len: usize) -> SourceResult<Vec<f32>> {
        let found = self.0.get(tensor).filter(|values| values.len() == len).cloned();
        found.ok_or_else(|| format!("no {tensor}").into())
    }
}

/// Parts in memory.
#[derive(Clone, Default)]
pub struct Memory {
    pub parts: Vec<Part>,
    pub full_after: Option<usize>,
}

impl Memory {
    /// Every grouped weight by module.
    pub fn written(&self) -> BTreeMap<String, QuantizedMatrix> {
        let mut written = BTreeMap::new();
        for (name, weight) in self.parts.iter().flat_map(|part| &part.weights) {
            let QuantizedWeight::Grouped(matrix) = weight else { panic!("{name} is not grouped") };
            assert!(written.insert(name.clone(), matrix.clone()).is_none(), "{name} written twice");
        }
        written
    }
}

impl PartStore for Memory {
    fn contains(&self, index: usize) -> bool {
        index < self.parts.len()
    }

    fn load(&mut self, index: usize) -> SourceResult<Part> {
        Ok(self.parts[index].clone())
    }

    fn store(&mut self, index: usize, part: &Part) -> SourceResult<()> {
        if self.full_after == Some(index) {
            return Err("no space left".into());
        }
        assert_eq!(index, self.parts.len());
        self.parts.push(part.clone());
        Ok(())
    }
}

/// Layer i: `x = q_proj(x)`; `k_proj` reads the same input, `experts.1` only two rows of it and
/// `experts.0` none.
pub struct Chain {
    pub weights: Weights,
    pub streams: Vec<Vec<f32>>,
    pub layer: Option<usize>,
    pub loaded: Vec<usize>,
    /// Reports k_proj's input negated in the second sequence.
    pub unstable: bool,
}

pub fn product(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let row = |x: &[f32]| -> Vec<f32> {
        let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
        weight.chunks_exact(K).map(dot).collect()
    };
    x.chunks_exact(K).flat_map(row).collect()
}

impl Calibration for Chain {
    fn num_layers(&self) -> usize {
        2
    }

    fn load_layer(&mut self, index: usize) -> SourceResult<()> {
        self.layer = Some(index);
        self.loaded.push(index);
        Ok(())
    }

    fn observe(&mut self, sink: &mut dyn ActivationSink) -> SourceResult<()> {
        let prefix = format!("model.layers.{}", self.layer.unwrap());
        for (s, x) in self.streams.iter().enumerate() {
            let rows = x.len() / K;
            sink.activations(&format!("{prefix}.q_proj"), rows, K, x)?;
            let sign = if self.unstable && s == 1 { -1.0 } else { 1.0 };
            let other: Vec<f32> = x.iter().map(|x| sign * x).collect();
            sink.activations(&format!("{prefix}.k_proj"), rows, K, &other)?;
            if s == 0 {
                sink.activations(&format!("{prefix}.experts.1"), 2, K, &x[..2 * K])?;
                sink.activations(&format!("{prefix}.gate"), rows, K, x)?;
            }
        }
        Ok(())
    }

    fn replace(&mut self, module: &Module, weight: Replacement) -> SourceResult<()> {
        assert_eq!(module.layer, self.layer);
        let values = match weight {
            Replacement::Quantized(weight) => weight.decode()?,
            Replacement::Dense(values) => values,
        };
        self.weights.insert(module.name.clone(), values);
        Ok(())
    }

    fn advance(&mut self) -> SourceResult<()> {
        let layer = self.layer.take().unwrap();
        let weight = &self.weights[&format!("model.layers.{layer}.q_proj")];
        for x in &mut self.streams {
            *x = product(x, weight);
        }
        Ok(())
    }

    fn observe_head(&mut self, sink: &mut dyn ActivationSink) -> SourceResult<()> {
        for x in &self.streams {
            sink.activations("lm_head", x.len() / K, K, x)?;
        }
        Ok(())
    }
}

pub struct Fixture {
    pub weights: Weights,
    pub assignments: Vec<Assignment>,
    pub chain: Chain,
}

pub fn fixture() -> Fixture {
    let mut random = Random::new(20);
    let mut weights = Weights::new();
    let mut modules = Vec::new();
    let mut names = vec!["model.embed_tokens".to_owned(), "lm_head".to_owned()];
    for layer in 0..2 {
        for name in ["q_proj", "k_proj", "experts.0", "experts.1", "gate"] {
            names.push(format!("model.layers.{layer}.{name}"));
        }
    }
    for name in names {
        let scaled = random.normals(K * K).iter().map(|w| w / 8.0).collect();
        weights.insert(name.clone(), scaled);
        modules.push(Module::new(name, K, K, 2));
    }
    let mut plan = Plan::new(Scheme::with_default_group(Format::Int3));
    plan.embeddings = Some(Scheme::with_default_group(Format::Int8));
    plan.lm_head = Some(Scheme::with_default_group(Format::Int4S4));
    let streams = (0..2).map(|_| correlated(&mut random, ROWS / 2, K)).collect();
    Fixture {
        assignments: plan.resolve(&modules).unwrap(),
        chain: Chain { weights: weights.clone(), streams, layer: None, loaded: Vec::new(), unstable: false },
        weights,
    }
}
