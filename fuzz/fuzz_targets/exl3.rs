//! A model folder with EXL3 weights: the first two bytes are the length of `config.json`, which is followed by
//! `model.safetensors`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use marlin_models::{Checkpoint, ModelConfig};

/// Larger layers would only cost time.
const LARGEST: usize = 1 << 18;

fuzz_target!(|folder: &[u8]| {
    let Some((length, rest)) = folder.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (config, tensors) = rest.split_at(length);
    let Ok(config) = serde_json::from_slice(config) else { return };
    let Ok(config) = ModelConfig::from_value(Path::new("config.json"), &config) else { return };
    let mut stored = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut stored, tensors).expect("room for it");
    let Ok(checkpoint) = Checkpoint::open_file(stored.path()) else { return };
    // A configuration may describe more modules than the file can hold.
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    for name in names {
        let Some((module, _)) = name.rsplit_once('.') else { continue };
        let (n, k) = (config.vocab_size, config.hidden_size);
        for (n, k) in [(n, k), (k, k), (k / 2, k)] {
            if n.saturating_mul(k) > LARGEST {
                continue;
            }
            if let Ok(weight) = checkpoint.weight(&config.quantization, module, n, k, true) {
                let _ = weight.to_f32();
            }
        }
    }
});
