//! A GGUF file: what its metadata stands for, its tokenizer, every tensor by each way of reading one, and the model.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use marlin_models::{
    ChatTemplate, Checkpoint, GenerationConfig, LoadOptions, Model, ModelConfig, QuantizationConfig, Tokenizer,
};
use marlin_ops::oracle::Oracle;

/// Longer sequences would only cost time.
const CONTEXT: usize = 8;

// Panics of the tokenizers library that our reader turns into errors are no findings; what gets past it ends the run.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |file: &[u8]| {
    let mut stored = tempfile::Builder::new().suffix(".gguf").tempfile().expect("a temporary file");
    std::io::Write::write_all(&mut stored, file).expect("room for it");
    let path = stored.path();
    let _ = GenerationConfig::from_dir(path);
    let _ = ChatTemplate::from_dir(path);
    if let Ok(tokenizer) = Tokenizer::from_dir(path)
        && let Ok(ids) = tokenizer.encode("Once upon a time, 1234 \u{e9}\u{4e2d}\u{1f600}\n<s>", true)
    {
        let _ = tokenizer.decode(&ids, false);
    }
    let config = ModelConfig::from_dir(path);
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    for name in names {
        let info = checkpoint.get(&name).expect("a listed tensor");
        assert!(info.bytes <= file.len());
        let shape = info.shape.to_vec();
        if let Ok(tensor) = checkpoint.tensor(&name) {
            assert_eq!(tensor.bytes().len(), info.bytes);
        }
        let _ = checkpoint.dense(&name, &shape);
        for (module, n, k) in modules(&name, &shape) {
            let _ = checkpoint.gguf_encoding(&module, n, k);
            if let Ok(weight) = checkpoint.weight(&QuantizationConfig::default(), &module, n, k, false) {
                assert_eq!(weight.to_f32().expect("checked values").len(), n * k);
            }
        }
    }
    if let Ok(config) = config {
        let context = Some(CONTEXT.min(config.max_position_embeddings));
        let options = LoadOptions { context, chunk: CONTEXT, ..LoadOptions::default() };
        let _ = Model::load(Arc::new(Oracle::new()), &checkpoint, config, options);
    }
});

/// The linear modules that a tensor may hold, with their rows and columns: itself, or the first and the last of a stack.
fn modules(name: &str, shape: &[usize]) -> Vec<(String, usize, usize)> {
    let Some(module) = name.strip_suffix(".weight") else { return Vec::new() };
    match *shape {
        [n, k] => vec![(module.to_owned(), n, k)],
        [count, n, k] => {
            let Some((prefix, projection)) = module.rsplit_once('.') else { return Vec::new() };
            let expert = |e: usize, projection: &str, n: usize| (format!("{prefix}.{e}.{projection}"), n, k);
            let mut found = vec![expert(0, projection, n), expert(count - 1, projection, n)];
            match projection {
                "gate_up_proj" => found.extend([expert(0, "gate_proj", n / 2), expert(count - 1, "up_proj", n / 2)]),
                // Keys are stored transposed, and as many channels as the values' is a fair guess.
                "v_b_proj" => found.push((format!("{prefix}.kv_b_proj"), count.saturating_mul(2 * n), k)),
                _ => {}
            }
            found
        }
        _ => Vec::new(),
    }
}
