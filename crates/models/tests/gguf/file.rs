//! A writer of small GGUF files, valid or not.

use std::path::{Path, PathBuf};

/// Value types.
pub const U32: u32 = 4;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// Tensor types.
pub const F32: u32 = 0;
pub const Q4_0: u32 = 2;

/// One row of the tensor table with its data.
#[derive(Clone)]
pub struct TensorSpec {
    pub name: String,
    /// Fastest first, as in the file.
    pub extents: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Data offset other than the right one.
    pub offset: Option<u64>,
}

/// A file to be written.
#[derive(Clone, Default)]
pub struct GgufSpec {
    pub keys: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<TensorSpec>,
    pub alignment: Option<u32>,
}

pub fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

impl GgufSpec {
    pub fn key(mut self, name: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.retain(|(key, ..)| key != name);
        self.keys.push((name.to_owned(), kind, value.to_vec()));
        self
    }

    pub fn u32(self, name: &str, value: u32) -> Self {
        self.key(name, U32, &value.to_le_bytes())
    }

    pub fn f32(self, name: &str, value: f32) -> Self {
        self.key(name, 6, &value.to_le_bytes())
    }

    pub fn text(self, name: &str, value: &str) -> Self {
        self.key(name, STRING, &text(value))
    }

    pub fn without(mut self, name: &str) -> Self {
        self.keys.retain(|(key, ..)| key != name);
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    pub fn tensor(mut self, name: &str, extents: &[u64], kind: u32, data: &[u8]) -> Self {
        self.tensors.retain(|tensor| tensor.name != name);
        let (name, extents, data) = (name.to_owned(), extents.to_vec(), data.to_vec());
        self.tensors.push(TensorSpec { name, extents, kind, data, offset: None });
        self
    }

    /// A tensor of f32 values that depend on its length alone.
    pub fn floats(self, name: &str, extents: &[u64]) -> Self {
        let count = extents.iter().product::<u64>();
        let data: Vec<u8> = (0..count).flat_map(|i| ((i % 7) as f32 * 0.25 - 0.5).to_le_bytes()).collect();
        self.tensor(name, extents, F32, &data)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let alignment = self.alignment.unwrap_or(32) as usize;
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend((tensor.extents.len() as u32).to_le_bytes());
            tensor.extents.iter().for_each(|extent| out.extend(extent.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }

    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    /// A llama of one layer with two heads of two channels.
    pub fn llama() -> Self {
        Self::default()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.context_length", 16)
            .u32("llama.embedding_length", 4)
            .u32("llama.feed_forward_length", 8)
            .u32("llama.attention.head_count", 2)
            .u32("llama.attention.head_count_kv", 1)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .floats("token_embd.weight", &[4, 6])
            .floats("output_norm.weight", &[4])
            .floats("blk.0.attn_norm.weight", &[4])
            .floats("blk.0.attn_q.weight", &[4, 4])
            .floats("blk.0.attn_k.weight", &[4, 2])
            .floats("blk.0.attn_v.weight", &[4, 2])
            .floats("blk.0.attn_output.weight", &[4, 4])
            .floats("blk.0.ffn_norm.weight", &[4])
            .floats("blk.0.ffn_gate.weight", &[4, 8])
            .floats("blk.0.ffn_up.weight", &[4, 8])
            .floats("blk.0.ffn_down.weight", &[8, 4])
    }
}
