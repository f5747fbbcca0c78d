//! The loop over a model's layers, with a model made of plain matrix products.

mod common;

use std::collections::BTreeMap;

use common::{Random, correlated};
use marlin_formats::{Format, QuantizedMatrix, Scheme};
use marlin_quantize::{
    ActivationSink, Assignment, Calibration, Event, GptqOptions, Hessian, Method, ModelSink, ModelSource, Module, Plan,
    QuantizeError, ScaleSearch, Settings, SourceError, Summary, gptq, proxy_loss, quantize_model, rtn,
};

const K: usize = 64;
const ROWS: usize = 300;

type Weights = BTreeMap<String, Vec<f32>>;
type SourceResult<T> = std::result::Result<T, SourceError>;

struct Source(Weights);

impl ModelSource for Source {
    fn weight(&mut self, module: &Module) -> SourceResult<Vec<f32>> {
        let found = self.0.get(&module.name).cloned();
        found.ok_or_else(|| format!("no {}", module.name).into())
    }
}

#[derive(Default)]
struct Sink {
    written: BTreeMap<String, QuantizedMatrix>,
    full_after: Option<usize>,
}

impl ModelSink for Sink {
    fn write(&mut self, module: &Module, matrix: &QuantizedMatrix) -> SourceResult<()> {
        if self.full_after == Some(self.written.len()) {
            return Err("no space left".into());
        }
        let before = self.written.insert(module.name.clone(), matrix.clone());
        assert!(before.is_none(), "{} written twice", module.name);
        Ok(())
    }
}

/// Layer i: `x = q_proj(x)`; `k_proj` reads the same input, `experts.1` only two rows of it and
/// `experts.0` none.
struct Chain {
    weights: Weights,
    streams: Vec<Vec<f32>>,
    layer: Option<usize>,
    loaded: Vec<usize>,
    /// Reports k_proj's input negated in the second sequence.
    unstable: bool,
}

fn product(x: &[f32], weight: &[f32]) -> Vec<f32> {
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

    fn replace(&mut self, module: &Module, matrix: QuantizedMatrix) -> SourceResult<()> {
        assert_eq!(module.layer, self.layer);
        self.weights.insert(module.name.clone(), matrix.decode()?);
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

struct Fixture {
    weights: Weights,
    assignments: Vec<Assignment>,
    chain: Chain,
}

fn fixture() -> Fixture {
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

fn run(fixture: &mut Fixture, method: Method, sink: &mut Sink) -> Result<Summary, QuantizeError> {
    let settings = Settings { assignments: &fixture.assignments, method };
    let mut source = Source(fixture.weights.clone());
    let chain = Some(&mut fixture.chain as &mut dyn Calibration);
    quantize_model(settings, &mut source, chain, sink, &mut |_| {})
}

#[test]
fn rtn_streams_every_module_and_counts_bits() {
    let mut fixture = fixture();
    let mut sink = Sink::default();
    let method = Method::Rtn(ScaleSearch::Range);
    let summary = run(&mut fixture, method, &mut sink).unwrap();
    assert!(fixture.chain.loaded.is_empty());
    assert_eq!(sink.written.len(), 10);
    for assignment in &fixture.assignments {
        let Module { name, .. } = &assignment.module;
        let expected =
            assignment.scheme.map(|scheme| rtn(scheme, &fixture.weights[name], K, K, ScaleSearch::Range).unwrap());
        assert_eq!(sink.written.get(name), expected.as_ref(), "{name}");
    }
    assert_eq!((summary.modules, summary.weights), (10, 10 * 64 * 64));
    // One group of 64: eight modules at 3 + 16/64 bits, one at 4 + 16/64, one at 8 + 16/64.
    let expected = (8.0 * 3.25 + 4.25 + 8.25) / 10.0;
    assert!((summary.bits_per_weight() - expected).abs() < 1e-12);
}

#[test]
fn gptq_calibrates_each_layer_on_the_quantized_layers_before_it() {
    let mut fixture = fixture();
    let streams = fixture.chain.streams.clone();
    let mut sink = Sink::default();
    let options = GptqOptions::default();
    let summary = run(&mut fixture, Method::Gptq(options), &mut sink).unwrap();
    assert_eq!(fixture.chain.loaded, [0, 1]);
    assert_eq!(sink.written.len(), 10);

    // What the two layers must have seen.
    let first = sink.written["model.layers.0.q_proj"].decode().unwrap();
    let mut second = streams.clone();
    for x in &mut second {
        *x = product(x, &first);
    }
    let int3 = Scheme::with_default_group(Format::Int3);
    for (layer, streams) in [&streams, &second].into_iter().enumerate() {
        let mut hessian = Hessian::new(K).unwrap();
        for x in streams {
            hessian.accumulate(x).unwrap();
        }
        for name in ["q_proj", "k_proj"] {
            let name = format!("model.layers.{layer}.{name}");
            let weight = &fixture.weights[&name];
            let expected = gptq(int3, weight, K, K, &hessian, &options).unwrap();
            assert_eq!(sink.written[&name], expected.matrix, "{name}");
            let plain = rtn(int3, weight, K, K, ScaleSearch::Mse).unwrap();
            let loss = |matrix: &QuantizedMatrix| proxy_loss(&hessian, weight, &matrix.decode().unwrap()).unwrap();
            assert!(loss(&expected.matrix) < 0.7 * loss(&plain), "{name}");
        }
        let name = format!("model.layers.{layer}.experts.0");
        let plain = rtn(int3, &fixture.weights[&name], K, K, ScaleSearch::Mse).unwrap();
        assert_eq!(sink.written[&name], plain);
        let name = format!("model.layers.{layer}.experts.1");
        let plain = rtn(int3, &fixture.weights[&name], K, K, ScaleSearch::Mse).unwrap();
        assert_ne!(sink.written[&name], plain);
    }
    let unreached = ["model.layers.0.experts.0", "model.layers.1.experts.0"];
    assert_eq!(summary.without_rows, unreached);
    let few = [0, 1].map(|layer| (format!("model.layers.{layer}.experts.1"), 2));
    assert_eq!(summary.few_rows, few);
    assert!(summary.damped.is_empty());
}

#[test]
fn events_follow_the_work() {
    let mut fixture = fixture();
    let settings = Settings { assignments: &fixture.assignments, method: Method::Gptq(GptqOptions::default()) };
    let mut seen = Vec::new();
    quantize_model(
        settings,
        &mut Source(fixture.weights.clone()),
        Some(&mut fixture.chain),
        &mut Sink::default(),
        &mut |event| match event {
            Event::Calibrating { layer, layers } => seen.push(format!("layer {layer}/{layers}")),
            Event::Quantized { module } => seen.push(module.name.clone()),
        },
    )
    .unwrap();
    assert_eq!(seen.len(), 12);
    assert_eq!(seen[0], "layer 0/2");
    assert_eq!(seen[5], "layer 1/2");
    assert_eq!(seen[10..], ["lm_head", "model.embed_tokens"]);
}

#[test]
fn failures_name_the_module_and_end_the_job() {
    let gptq = Method::Gptq(GptqOptions::default());

    let mut broken = fixture();
    broken.weights.get_mut("model.layers.1.k_proj").unwrap()[65] = f32::NAN;
    for method in [Method::Rtn(ScaleSearch::Range), gptq] {
        let error = run(&mut broken, method, &mut Sink::default()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("model.layers.1.k_proj"), "{message}");
        assert!(message.contains("[1, 1]") && message.contains("NaN"), "{message}");
        broken.chain = fixture().chain;
    }

    let mut broken = fixture();
    broken.chain.streams[1][3 * K + 7] = f32::INFINITY;
    let error = run(&mut broken, gptq, &mut Sink::default()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("q_proj") && message.contains("feature 7"), "{message}");

    let mut broken = fixture();
    broken.chain.unstable = true;
    let error = run(&mut broken, gptq, &mut Sink::default()).unwrap_err();
    assert!(error.to_string().contains("k_proj"), "{error}");

    let mut sink = Sink { full_after: Some(3), ..Sink::default() };
    let error = run(&mut fixture(), gptq, &mut sink).unwrap_err();
    assert!(matches!(error, QuantizeError::Source(_)));
    assert_eq!(error.to_string(), "no space left");
    assert_eq!(sink.written.len(), 3);
}

#[test]
fn gptq_without_calibration_is_an_error() {
    let fixture = fixture();
    let settings = Settings { assignments: &fixture.assignments, method: Method::Gptq(GptqOptions::default()) };
    let mut source = Source(fixture.weights.clone());
    let error = quantize_model(settings, &mut source, None, &mut Sink::default(), &mut |_| {});
    assert!(matches!(error, Err(QuantizeError::NoCalibrationRows)));
}
