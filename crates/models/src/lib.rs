//! Files to models: checkpoints, configurations, architectures, caches, tokenizer and chat template.

mod cache;
mod chat;
mod checkpoint;
mod config;
mod error;
mod generation_config;
mod gguf;
mod import;
mod layers;
mod loader;
mod mmap;
mod model;
mod modules;
mod observe;
mod quantization;
mod rotation;
mod scratch;
mod synth;
mod tokenizer;
mod writer;

pub use cache::KvCache;
pub use chat::{ChatTemplate, Message};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{Architecture, AttentionConfig, LayerConfig, MlpConfig, ModelConfig};
pub use error::{ModelError, Result};
pub use generation_config::GenerationConfig;
pub use model::{LoadOptions, Logits, Model};
pub use modules::{LinearModule, ModuleKind, VectorTensor};
pub use observe::{ActivationObserver, CalibrationModel};
pub use quantization::QuantizationConfig;
pub use scratch::Scratch;
pub use synth::{HeadFormat, SynthOptions, SynthTrellis, synth, synth_config, synth_presets};
pub use tokenizer::{StreamDecoder, Tokenizer};
pub use writer::{WriteSummary, Writer};
