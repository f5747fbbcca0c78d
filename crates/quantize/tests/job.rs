//! The loop over a model's layers, with a model made of plain matrix products.

mod common;

use std::sync::Mutex;

use common::chain::{Fixture, K, Memory, Source, fixture, product};
use marlin_formats::{Format, QuantizedMatrix, Scheme};
use marlin_quantize::{
    Calibration, Event, GptqOptions, Hessian, Method, Module, QuantizeError, ScaleSearch, Settings, Summary, gptq,
    proxy_loss, quantize_model, rtn,
};

fn run(fixture: &mut Fixture, method: Method, sink: &mut Memory) -> Result<Summary, QuantizeError> {
    let settings = Settings { assignments: &fixture.assignments, method, folds: &[], search: None };
    let source = Source(fixture.weights.clone());
    let chain = Some(&mut fixture.chain as &mut dyn Calibration);
    quantize_model(settings, &source, chain, sink, &|_| {})
}

#[test]
fn rtn_streams_every_module_and_counts_bits() {
    let mut fixture = fixture();
    let mut sink = Memory::default();
    let method = Method::Rtn(ScaleSearch::Range);
    let summary = run(&mut fixture, method, &mut sink).unwrap();
    assert!(fixture.chain.loaded.is_empty());
    assert_eq!(sink.written().len(), 10);
    for assignment in &fixture.assignments {
        let Module { name, .. } = &assignment.module;
        let expected =
            assignment.scheme().map(|scheme| rtn(scheme, &fixture.weights[name], K, K, ScaleSearch::Range).unwrap());
        assert_eq!(sink.written().get(name), expected.as_ref(), "{name}");
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
    let mut sink = Memory::default();
    let options = GptqOptions::default();
    let summary = run(&mut fixture, Method::Gptq(options), &mut sink).unwrap();
    assert_eq!(fixture.chain.loaded, [0, 1]);
    assert_eq!(sink.written().len(), 10);

    // What the two layers must have seen.
    let first = sink.written()["model.layers.0.q_proj"].decode().unwrap();
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
            assert_eq!(sink.written()[&name], expected.matrix, "{name}");
            let plain = rtn(int3, weight, K, K, ScaleSearch::Mse).unwrap();
            let loss = |matrix: &QuantizedMatrix| proxy_loss(&hessian, weight, &matrix.decode().unwrap()).unwrap();
            assert!(loss(&expected.matrix) < 0.7 * loss(&plain), "{name}");
        }
        let name = format!("model.layers.{layer}.experts.0");
        let plain = rtn(int3, &fixture.weights[&name], K, K, ScaleSearch::Mse).unwrap();
        assert_eq!(sink.written()[&name], plain);
        let name = format!("model.layers.{layer}.experts.1");
        let plain = rtn(int3, &fixture.weights[&name], K, K, ScaleSearch::Mse).unwrap();
        assert_ne!(sink.written()[&name], plain);
    }
    let unreached = ["model.layers.0.experts.0", "model.layers.1.experts.0"];
    assert_eq!(summary.notes.without_rows, unreached);
    let few = [0, 1].map(|layer| (format!("model.layers.{layer}.experts.1"), 2));
    assert_eq!(summary.notes.few_rows, few);
    assert!(summary.notes.damped.is_empty());
}

#[test]
fn events_follow_the_work() {
    let mut fixture = fixture();
    let settings = Settings {
        assignments: &fixture.assignments,
        method: Method::Gptq(GptqOptions::default()),
        folds: &[],
        search: None,
    };
    let seen = Mutex::new(Vec::new());
    quantize_model(
        settings,
        &Source(fixture.weights.clone()),
        Some(&mut fixture.chain),
        &mut Memory::default(),
        &|event| {
            seen.lock().unwrap().push(match event {
                Event::Calibrating { layer, layers } => format!("layer {layer}/{layers}"),
                Event::Quantized { module } => module.name.clone(),
                Event::Restored { weights } => panic!("{weights} were restored"),
            });
        },
    )
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 12);
    assert_eq!(seen[0], "layer 0/2");
    assert!(seen[1..5].iter().all(|name| name.starts_with("model.layers.0.")));
    assert_eq!(seen[5], "layer 1/2");
    assert_eq!(seen[10..], ["lm_head", "model.embed_tokens"]);
}

#[test]
fn failures_name_the_module_and_end_the_job() {
    let gptq = Method::Gptq(GptqOptions::default());

    let mut broken = fixture();
    broken.weights.get_mut("model.layers.1.k_proj").unwrap()[65] = f32::NAN;
    for method in [Method::Rtn(ScaleSearch::Range), gptq] {
        let error = run(&mut broken, method, &mut Memory::default()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("model.layers.1.k_proj"), "{message}");
        assert!(message.contains("[1, 1]") && message.contains("NaN"), "{message}");
        broken.chain = fixture().chain;
    }

    let mut broken = fixture();
    broken.chain.streams[1][3 * K + 7] = f32::INFINITY;
    let error = run(&mut broken, gptq, &mut Memory::default()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("q_proj") && message.contains("feature 7"), "{message}");

    let mut broken = fixture();
    broken.chain.unstable = true;
    let error = run(&mut broken, gptq, &mut Memory::default()).unwrap_err();
    assert!(error.to_string().contains("k_proj"), "{error}");

    let mut sink = Memory { full_after: Some(1), ..Memory::default() };
    let error = run(&mut fixture(), gptq, &mut sink).unwrap_err();
    assert!(matches!(error, QuantizeError::Source(_)));
    assert_eq!(error.to_string(), "no space left");
    assert_eq!(sink.written().len(), 4);
}

#[test]
fn gptq_without_calibration_is_an_error() {
    let fixture = fixture();
    let settings = Settings {
        assignments: &fixture.assignments,
        method: Method::Gptq(GptqOptions::default()),
        folds: &[],
        search: None,
    };
    let source = Source(fixture.weights.clone());
    let error = quantize_model(settings, &source, None, &mut Memory::default(), &|_| {});
    assert!(matches!(error, Err(QuantizeError::NoCalibrationRows)));
}
