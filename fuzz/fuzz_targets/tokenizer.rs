//! `tokenizer.json`, then a text through it and back.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use marlin_models::Tokenizer;

// Panics of the tokenizers library that our reader turns into errors are no findings; what gets past it ends the run.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |json: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_bytes(Path::new("tokenizer.json"), json) else { return };
    let Ok(ids) = tokenizer.encode("Once upon a time, 1234 \u{e9}\u{4e2d}\u{1f600}\n<s>", true) else { return };
    let _ = tokenizer.decode(&ids, false);
    let mut stream = tokenizer.stream(true);
    for id in ids {
        let _ = stream.push(id);
    }
});
