//! AWQ on a gated block with outlier channels: the folded model computes the same, with smaller errors.

mod common;

use common::chain::{Memory, Source, SourceResult, Weights};
use common::{Random, hessian_of};
use marlin_formats::{Format, Scheme};
use marlin_quantize::{
    ActivationSink, Assignment, AwqOptions, Calibration, Fold, Method, Module, Plan, Previous, QuantizeError,
    QuantizedWeight, Replacement, ScaleSearch, Settings, Summary, proxy_loss, quantize_model, rtn,
};

/// Width of the stream, and of the inside of the block.
const K: usize = 128;
const INNER: usize = 96;
const ROWS: usize = 256;

const PREFIX: &str = "model.layers.0.mlp";

/// `a = gamma x; x + down((gate a) (up a + bias)) + router a`, `router` unquantized.
struct Block {
    weights: Weights,
    x: Vec<f32>,
}

fn product(x: &[f32], weight: &[f32], k: usize) -> Vec<f32> {
    let row = |x: &[f32]| -> Vec<f32> {
        weight.chunks_exact(k).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()).collect()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

/// Inputs of gate and up, input of down, output.
fn forward(weights: &Weights, x: &[f32]) -> [Vec<f32>; 3] {
    let get = |name: &str| &weights[&format!("{PREFIX}.{name}")];
    let a: Vec<f32> = x.chunks_exact(K).flat_map(|x| x.iter().zip(get("norm.weight")).map(|(x, g)| x * g)).collect();
    let gate = product(&a, get("gate_proj"), K);
    let up = product(&a, get("up_proj"), K);
    let bias = get("up_proj.bias").iter().cycle();
    let inner: Vec<f32> = gate.iter().zip(&up).zip(bias).map(|((g, u), b)| g * (u + b)).collect();
    let (down, router) = (product(&inner, get("down_proj"), INNER), product(&a, get("router"), K));
    let out = x.iter().zip(down).zip(router).map(|((x, d), r)| x + d + r).collect();
    [a, inner, out]
}

impl Calibration for Block {
    fn num_layers(&self) -> usize {
        1
    }

    fn load_layer(&mut self, _: usize) -> SourceResult<()> {
        Ok(())
    }

    fn observe(&mut self, sink: &mut dyn ActivationSink) -> SourceResult<()> {
        let [a, inner, _] = forward(&self.weights, &self.x);
        for name in ["gate_proj", "up_proj"] {
            sink.activations(&format!("{PREFIX}.{name}"), ROWS, K, &a)?;
        }
        Ok(sink.activations(&format!("{PREFIX}.down_proj"), ROWS, INNER, &inner)?)
    }

    fn replace(&mut self, module: &Module, weight: Replacement) -> SourceResult<()> {
        let Replacement::Dense(values) = weight else { panic!("scales must be folded in") };
        self.weights.insert(module.name.clone(), values);
        Ok(())
    }

    fn advance(&mut self) -> SourceResult<()> {
        self.x = forward(&self.weights, &self.x)[2].clone();
        Ok(())
    }

    fn observe_head(&mut self, _: &mut dyn ActivationSink) -> SourceResult<()> {
        Ok(())
    }
}

struct Fixture {
    weights: Weights,
    x: Vec<f32>,
    assignments: Vec<Assignment>,
    folds: Vec<Fold>,
}

fn fixture(format: Format) -> Fixture {
    let mut random = Random::new(7);
    let mut weights = Weights::new();
    let mut modules = Vec::new();
    let name = |name: &str| format!("{PREFIX}.{name}");
    for (part, n, k) in [("gate_proj", INNER, K), ("up_proj", INNER, K), ("down_proj", K, INNER), ("router", K, K)] {
        weights.insert(name(part), random.normals(n * k).iter().map(|w| w / (k as f32).sqrt()).collect());
        modules.push(Module::new(name(part), n, k, 1));
    }
    // A few channels are much larger than the rest.
    let gamma = (0..K).map(|k| if k % 31 == 3 { 20.0 } else { 0.2 + 0.01 * k as f32 }).collect();
    weights.insert(name("norm.weight"), gamma);
    weights.insert(name("up_proj.bias"), random.normals(INNER));
    let x = random.normals(ROWS * K);
    let mut plan = Plan::new(Scheme::with_default_group(format));
    plan.ignore.push("*.router".parse().unwrap());
    let [gate, up, down, router] = [0, 1, 2, 3].map(|i| modules[i].clone());
    let folds = vec![
        Fold {
            layer: 0,
            previous: Previous::Norm { tensor: name("norm.weight") },
            readers: vec![gate, up.clone(), router],
        },
        Fold { layer: 0, previous: Previous::Linear { module: up, bias: true }, readers: vec![down] },
    ];
    Fixture { assignments: plan.resolve(&modules).unwrap(), weights, x, folds }
}

fn run(fixture: &Fixture, store: &mut Memory) -> Result<(Summary, Block), QuantizeError> {
    let mut block = Block { weights: fixture.weights.clone(), x: fixture.x.clone() };
    let method = Method::Awq(AwqOptions::default());
    let settings = Settings { assignments: &fixture.assignments, method, folds: &fixture.folds, search: None };
    let summary = quantize_model(settings, &Source(fixture.weights.clone()), Some(&mut block), store, &|_| {})?;
    Ok((summary, block))
}

fn squares(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum()
}

#[test]
fn the_written_model_computes_what_calibration_saw() {
    for format in [Format::Int4U4, Format::Int4S4, Format::Int3, Format::Nvfp4] {
        let fixture = fixture(format);
        let mut store = Memory::default();
        let (summary, block) = run(&fixture, &mut store).unwrap();
        assert_eq!((summary.parts, summary.modules), (1, 3));
        let part = &store.parts[0];
        assert_eq!(part.scales.iter().map(Vec::len).collect::<Vec<_>>(), [K, INNER]);
        let changed: Vec<&str> = part.changed.iter().map(|changed| changed.tensor.as_str()).collect();
        let expected = ["norm.weight", "router.weight", "up_proj.bias"].map(|name| format!("{PREFIX}.{name}"));
        assert_eq!(changed, expected, "{format}");

        let mut written = Weights::new();
        for changed in &part.changed {
            let name = changed.tensor.replace("router.weight", "router");
            assert_ne!(changed.values, fixture.weights[&name], "{format} {name}");
            written.insert(name, changed.values.clone());
        }
        for (name, weight) in &part.weights {
            written.insert(name.clone(), weight.decode().unwrap());
        }
        let [_, _, out] = forward(&written, &fixture.x);
        let difference = squares(out.iter().zip(&block.x).map(|(a, b)| a - b)) / squares(out.iter().copied());
        assert!(difference < 1e-9, "{format}: {difference}");

        // The exact model, and the same rounded without scales.
        let [_, _, exact] = forward(&fixture.weights, &fixture.x);
        let mut plain = fixture.weights.clone();
        for (name, weight) in &part.weights {
            let QuantizedWeight::Grouped(matrix) = weight else { panic!("{name}") };
            let (n, k) = (matrix.out_features, matrix.in_features);
            let rounded = rtn(matrix.scheme, &fixture.weights[name], n, k, ScaleSearch::Mse).unwrap();
            plain.insert(name.clone(), rounded.decode().unwrap());
        }
        let [_, _, plain] = forward(&plain, &fixture.x);
        let error = |found: &[f32]| squares(found.iter().zip(&exact).map(|(a, b)| a - b));
        assert!(error(&out) < 0.7 * error(&plain), "{format}: {} against {}", error(&out), error(&plain));
    }
}

#[test]
fn each_layer_s_output_error_falls() {
    let fixture = fixture(Format::Int4S4);
    let mut store = Memory::default();
    let (_, block) = run(&fixture, &mut store).unwrap();
    let [a, inner, _] = forward(&fixture.weights, &fixture.x);
    for (name, k, input) in [("gate_proj", K, &a), ("up_proj", K, &a), ("down_proj", INNER, &inner)] {
        let name = format!("{PREFIX}.{name}");
        let weight = &fixture.weights[&name];
        let hessian = hessian_of(input, k);
        let scheme = Scheme::with_default_group(Format::Int4S4);
        // Without outliers there is little to gain: down_proj must not lose.
        let (search, limit) = if k == K { (ScaleSearch::Mse, 0.9) } else { (ScaleSearch::Range, 1.0) };
        let plain = rtn(scheme, weight, weight.len() / k, k, search).unwrap().decode().unwrap();
        let loss = |quantized: &[f32]| proxy_loss(&hessian, weight, quantized).unwrap();
        assert!(loss(&block.weights[&name]) < limit * loss(&plain), "{name}");
    }
}

#[test]
fn a_stored_part_gives_the_same_and_wrong_scales_are_refused() {
    let fixture = fixture(Format::Int3);
    let mut store = Memory::default();
    let (summary, _) = run(&fixture, &mut store).unwrap();
    let parts = store.parts.clone();
    let (again, _) = run(&fixture, &mut store).unwrap();
    assert_eq!((again, &store.parts), (Summary { restored: 1, ..summary }, &parts));
    let refused = |change: &dyn Fn(&mut Memory), reason: &str| {
        let mut store = Memory { parts: parts.clone(), full_after: None };
        change(&mut store);
        let error = run(&fixture, &mut store).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused(&|store| store.parts[0].scales.truncate(1), "1 vectors of scales, expected 2");
    refused(&|store| store.parts[0].scales[0][5] = 0.0, "its scales are not those");
    refused(&|store| store.parts[0].changed.truncate(2), "it changes other tensors");
}
