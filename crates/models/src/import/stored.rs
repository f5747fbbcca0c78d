//! Checked access to the stored tensors of one quantized module.

use half::{bf16, f16};
use marlin_formats::DType;
use marlin_ops::OpError;

use crate::Checkpoint;
use crate::error::{ModelError, Result};

/// The tensors `{module}{suffix}` of one module, or of one expert where they are stacked along a leading axis.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a str,
    /// Index and number of the experts.
    slice: Option<(usize, usize)>,
}

/// Floats as f32, all finite, and the type they were stored in.
pub(super) struct Floats {
    pub values: Vec<f32>,
    pub dtype: DType,
}

impl<'a> Stored<'a> {
    /// The tensors of `module`.
    pub(super) fn whole(checkpoint: &'a Checkpoint, module: &'a str) -> Self {
        Self { checkpoint, module, slice: None }
    }

    /// Part `index` of the tensors of `module`, whose leading axis has `count` entries.
    pub(super) fn slice(checkpoint: &'a Checkpoint, module: &'a str, index: usize, count: usize) -> Self {
        Self { checkpoint, module, slice: Some((index, count)) }
    }

    /// The module's path.
    pub(super) fn module(&self) -> &'a str {
        self.module
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.module)
    }

    /// Whether a tensor is stored.
    pub(super) fn has(&self, suffix: &str) -> bool {
        self.checkpoint.contains(&self.name(suffix))
    }

    /// The type of a stored tensor, `None` when there is no such tensor.
    pub(super) fn dtype(&self, suffix: &str) -> Option<DType> {
        self.checkpoint.get(&self.name(suffix)).map(|info| info.dtype)
    }

    /// The shape of a tensor, without the axis of the experts.
    pub(super) fn shape(&self, suffix: &str) -> Result<&'a [usize]> {
        let info = self.checkpoint.get(&self.name(suffix));
        let shape = info.ok_or_else(|| self.missing(suffix))?.shape;
        match (self.slice, shape) {
            (None, shape) => Ok(shape),
            (Some((_, count)), [experts, rest @ ..]) if *experts == count => Ok(rest),
            (Some((_, count)), _) => Err(self.error(suffix, format!("has shape {shape:?}, expected {count} experts"))),
        }
    }

    /// The bytes of a tensor of one of these types and of this shape.
    pub(super) fn bytes(
        &self,
        suffix: &str,
        dtypes: &[DType],
        expected: &'static str,
        shape: &[usize],
    ) -> Result<Vec<u8>> {
        let name = self.name(suffix);
        let info = self.checkpoint.get(&name).ok_or_else(|| self.missing(suffix))?;
        if !dtypes.contains(&info.dtype) {
            return Err(ModelError::TensorDType {
                path: info.file.to_owned(),
                tensor: name,
                found: info.dtype.name().to_owned(),
                expected,
            });
        }
        let stacked: Vec<usize> = self.slice.iter().map(|(_, count)| *count).chain(shape.iter().copied()).collect();
        if info.shape != stacked {
            return Err(ModelError::TensorShape {
                path: info.file.to_owned(),
                tensor: name,
                found: info.shape.to_vec(),
                expected: stacked,
            });
        }
        let tensor = self.checkpoint.tensor(&name)?;
        let bytes = tensor.bytes();
        Ok(match self.slice {
            None => bytes.to_vec(),
            Some((index, count)) => {
                let len = bytes.len() / count;
                bytes[index * len..][..len].to_vec()
            }
        })
    }

    /// A tensor of packed 32-bit words.
    pub(super) fn words(&self, suffix: &str, shape: &[usize]) -> Result<Vec<u32>> {
        let bytes = self.bytes(suffix, &[DType::U32, DType::I32], "U32 or I32", shape)?;
        Ok(to_words(&bytes))
    }

    /// A tensor of F32, F16 or BF16 values, all finite.
    pub(super) fn floats(&self, suffix: &str, shape: &[usize]) -> Result<Floats> {
        const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
        let bytes = self.bytes(suffix, &FLOATS, "F32, F16 or BF16", shape)?;
        let dtype = self.dtype(suffix).unwrap_or(DType::F32);
        let values: Vec<f32> = match dtype {
            DType::F16 => chunks(&bytes, |b| f16::from_le_bytes(b).to_f32()),
            DType::BF16 => chunks(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => chunks(&bytes, f32::from_le_bytes),
        };
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(Floats { values, dtype }),
            Some(index) => {
                Err(self.error(suffix, format!("holds {} at element {index}; scales must be finite", values[index])))
            }
        }
    }

    /// The one value of a tensor of shape `[]` or `[1]`.
    pub(super) fn scalar(&self, suffix: &str) -> Result<f32> {
        let shape = self.shape(suffix)?;
        if shape.iter().product::<usize>() != 1 {
            return Err(self.error(suffix, format!("has shape {shape:?}, expected one value")));
        }
        Ok(self.floats(suffix, shape)?.values[0])
    }

    /// Marks companions used that say nothing about weights (scales of activations).
    pub(super) fn ignore(&self, suffixes: &[&str]) -> Result<()> {
        for suffix in suffixes.iter().filter(|suffix| self.has(suffix)) {
            self.checkpoint.tensor(&self.name(suffix))?;
        }
        Ok(())
    }

    /// An error about a tensor: `reason` follows its name.
    pub(super) fn error(&self, suffix: &str, reason: impl Into<String>) -> ModelError {
        let tensor = self.name(suffix);
        let path = self.checkpoint.get(&tensor).map_or(self.checkpoint.path(), |info| info.file).to_owned();
        ModelError::TensorContent { path, tensor, reason: reason.into() }
    }

    /// An error of the operations layer about what the tensors say together; `suffix` is the one with the codes.
    pub(super) fn refused(&self, suffix: &str) -> impl Fn(OpError) -> ModelError + use<'_, 'a> {
        let name = self.name(suffix);
        let path = self.checkpoint.get(&name).map_or(self.checkpoint.path(), |info| info.file);
        ModelError::tensor(path, self.module)
    }

    /// Records what the user should know about this module.
    pub(super) fn warn(&self, text: impl Into<String>) {
        self.checkpoint.warn(format!("{}: {}", self.module, text.into()));
    }

    fn missing(&self, suffix: &str) -> ModelError {
        ModelError::MissingTensor { path: self.checkpoint.path().to_owned(), tensor: self.name(suffix) }
    }
}

/// Little-endian words; the bytes are whole words.
fn to_words(bytes: &[u8]) -> Vec<u32> {
    chunks(bytes, u32::from_le_bytes)
}

pub(super) fn chunks<T, const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&b| value(b)).collect()
}
