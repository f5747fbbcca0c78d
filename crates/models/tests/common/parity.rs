//! Logits of golden models on any backend against transformers: whole prompt, token by token, in pieces.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use marlin_models::{KvCache, Logits, Model};
use marlin_ops::Backend;

use super::{Golden, exl3, golden_folders, imported_folders, load, max_difference};

/// Of the largest |logit|, with f32 weights, activations and cache.
const TOLERANCE: f32 = 1e-4;

/// Of the largest |logit| of ExLlamaV3, which rounds activations to f16 at every step: an f64 evaluation of the same weights differs
/// by up to 9e-4.
const EXL3_TOLERANCE: f32 = 1e-3;

/// How the tokens reach the model.
#[derive(Clone, Copy, Debug)]
enum Feed {
    /// One call, one pass.
    Prefill,
    /// One call a token.
    Decode,
    /// Two calls; the second continues the cache.
    TwoCalls,
    /// One call that the model splits into passes, with logits read a few rows at a time.
    Chunks,
}

/// Rows of one pass in [`Feed::Chunks`].
const CHUNK: usize = 13;

fn run<B: Backend>(backend: &Arc<B>, dir: &Path, tokens: &[u32], feed: Feed) -> Vec<f32> {
    let chunk = if let Feed::Chunks = feed { CHUNK } else { 512 };
    let model = load(backend, dir, chunk);
    let mut cache = KvCache::new(&model, tokens.len()).unwrap();
    let all = match feed {
        Feed::Prefill => all_logits(&model, tokens, &mut cache),
        Feed::Decode => decode(&model, tokens, &mut cache),
        Feed::TwoCalls => {
            let (first, second) = tokens.split_at((tokens.len() / 3 * 2) | 1);
            let mut all = all_logits(&model, first, &mut cache);
            all.extend(all_logits(&model, second, &mut cache));
            all
        }
        Feed::Chunks => {
            let mut scratch = model.scratch(5).unwrap();
            model.logits(tokens, &mut cache, &mut scratch).unwrap()
        }
    };
    assert_eq!(cache.len(), tokens.len());
    all
}

fn all_logits<B: Backend>(model: &Model<B>, tokens: &[u32], cache: &mut KvCache<B>) -> Vec<f32> {
    let mut scratch = model.scratch(tokens.len()).unwrap();
    let logits = model.forward(tokens, cache, &mut scratch, Logits::All).unwrap();
    assert_eq!(logits.dims(), [tokens.len(), model.config().vocab_size]);
    model.backend().read_f32(logits).unwrap()
}

fn decode<B: Backend>(model: &Model<B>, tokens: &[u32], cache: &mut KvCache<B>) -> Vec<f32> {
    let mut scratch = model.scratch(1).unwrap();
    let mut all = Vec::new();
    for token in tokens {
        let logits = model.forward(&[*token], cache, &mut scratch, Logits::Last).unwrap();
        all.extend(model.backend().read_f32(logits).unwrap());
    }
    all
}

/// Every golden model on `backend`, fed in every way.
pub fn check_all_golden_models<B: Backend>(backend: B) {
    check_all_on(&Arc::new(backend));
}

/// The same on a backend that is used for other things too.
pub fn check_all_on<B: Backend>(backend: &Arc<B>) {
    check_folders(backend, golden_folders());
}

/// Every model in another project's format on `backend`, fed in every way: the logits of the weights that its tool decodes.
pub fn check_imported_on<B: Backend>(backend: &Arc<B>) {
    check_folders(backend, imported_folders());
}

fn check_folders<B: Backend>(backend: &Arc<B>, folders: Vec<PathBuf>) {
    let mut failures = Vec::new();
    for dir in folders {
        let golden = Golden::read(&dir.join("golden.safetensors"));
        failures.extend(check(backend, &dir, &golden));
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE}:\n{}", failures.join("\n"));
}

/// The checkpoint of ExLlamaV3 on `backend`, as one prompt and token by token: its runtime's logits, and its best tokens.
pub fn check_exl3_on<B: Backend>(backend: &Arc<B>) {
    let (dir, golden) = exl3();
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    for feed in [Feed::Prefill, Feed::Decode] {
        let logits = run(backend, &dir, &golden.tokens, feed);
        let error = max_difference(&logits, &golden.logits) / golden.scale();
        println!("{feed:?}: {error:.2e} off the runtime's logits");
        assert!(error <= EXL3_TOLERANCE, "{feed:?}: {error:e}");
        let columns = logits.len() / golden.tokens.len();
        for (t, (found, expected)) in logits.chunks(columns).zip(golden.logits.chunks(columns)).enumerate() {
            assert_eq!(best(found), best(expected), "{feed:?}, position {t}");
        }
    }
}

/// The feeds whose logits are beyond the tolerance.
pub fn check<B: Backend>(backend: &Arc<B>, dir: &Path, golden: &Golden) -> Vec<String> {
    let feeds = [Feed::Prefill, Feed::Decode, Feed::TwoCalls, Feed::Chunks];
    let lines = feeds.map(|feed| {
        let logits = run(backend, dir, &golden.tokens, feed);
        let error = max_difference(&logits, &golden.logits) / golden.scale();
        let line = format!("{} {feed:?}: {error:.2e}", dir.display());
        println!("{line}");
        (error > TOLERANCE).then_some(line)
    });
    lines.into_iter().flatten().collect()
}
