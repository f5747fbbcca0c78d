//! EXL3 modules as ExLlamaV3 writes them.

use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD, tile};
use marlin_ops::{OpError, Weight};

use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

impl Checkpoint {
    /// Whether `module` is stored in EXL3, whole or in slices.
    pub(crate) fn is_exl3(&self, module: &str) -> bool {
        self.contains(&format!("{module}.trellis")) || self.contains(&format!("{module}.slice.0.trellis"))
    }

    /// The EXL3 weight `[out_features, in_features]` of a module: `{module}.trellis` I16 `[K/16, N/16, 16 bits]`,
    /// `.suh` F16 `[K]` or packed signs `.su` I16 `[K/16]`, `.svh` or `.sv` likewise, and a marker `.mcg` or `.mul1` of
    /// the codebook; K and N padded to multiples of 128. Copied out of the file and released.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape or dtype, markers of unknown codebooks, the slices of very wide
    /// layers and pre-release files, which are not supported: each names the file and the tensor.
    pub(crate) fn exl3_weight(&self, module: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        for (suffix, what) in [("slice.0.trellis", "a layer in slices"), ("scale", "pre-release EXL3")] {
            let name = format!("{module}.{suffix}");
            if let Some(info) = self.get(&name) {
                return Err(ModelError::unsupported_tensor(info.file, name, what));
            }
        }
        let padded = [in_features, out_features].map(|size| size.next_multiple_of(HADAMARD));
        let name = format!("{module}.trellis");
        let stored = self.get(&name).map(|info| info.shape.to_vec()).unwrap_or_default();
        let bits = stored.last().map_or(0, |words| words / tile::SIDE);
        let shape = [padded[0] / tile::SIDE, padded[1] / tile::SIDE, bits.clamp(1, 8) * tile::SIDE];
        let matrix = Exl3Matrix {
            codebook: self.exl3_codebook(module)?,
            bits: bits as u32,
            in_features,
            out_features,
            trellis: self.words16(&name, DType::I16, &shape)?,
            suh: self.exl3_scales(module, "su", padded[0])?,
            svh: self.exl3_scales(module, "sv", padded[1])?,
        };
        self.release(&name)?;
        Weight::exl3(matrix).map_err(|source| self.tensor_error(&name, source))
    }

    /// The bits of a tensor of 16-bit elements.
    fn words16(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<u16>> {
        self.typed(name, dtype, shape)?.to_u16_bits().map_err(|source| self.tensor_error(name, source))
    }

    fn tensor_error(&self, name: &str, source: OpError) -> ModelError {
        let path = self.get(name).map_or(self.path(), |info| info.file);
        ModelError::tensor(path, name)(source)
    }

    /// Which marker is stored: none stands for the first codebook.
    fn exl3_codebook(&self, module: &str) -> Result<Codebook> {
        let mut found = Codebook::ThreeInst;
        for codebook in [Codebook::Mcg, Codebook::Mul1] {
            let name = format!("{module}.{}", codebook.name());
            let Some(info) = self.get(&name) else { continue };
            let marker = self.typed(&name, DType::I32, info.shape)?;
            if marker.bytes() != codebook.multiplier().to_le_bytes() {
                return Err(ModelError::unsupported_tensor(info.file, name, "another multiplier of the codebook"));
            }
            if found != Codebook::ThreeInst {
                return Err(ModelError::unsupported_tensor(info.file, name, "two codebooks in one module"));
            }
            found = codebook;
        }
        Ok(found)
    }

    /// f16 bits of `{module}.{prefix}h`, or of the signs in `{module}.{prefix}`: bit i of word w belongs to channel
    /// `16 w + i` and stands for -1.
    fn exl3_scales(&self, module: &str, prefix: &str, len: usize) -> Result<Vec<u16>> {
        let (signs, scales) = (format!("{module}.{prefix}"), format!("{module}.{prefix}h"));
        if self.contains(&scales) || !self.contains(&signs) {
            return self.words16(&scales, DType::F16, &[len]);
        }
        let words = self.words16(&signs, DType::I16, &[len / 16])?;
        let sign = |word: u16, bit: u16| if word >> bit & 1 == 1 { f16::NEG_ONE } else { f16::ONE };
        Ok(words.into_iter().flat_map(|word| (0..16).map(move |bit| sign(word, bit).to_bits())).collect())
    }
}
