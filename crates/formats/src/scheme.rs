//! A format together with its group size.

use crate::{Format, FormatError, Group, SUPER_BLOCK, Shift};

/// A format with its group size along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// The weight format.
    pub format: Format,
    /// Weights along K that share one scale.
    pub group_size: usize,
}

impl Scheme {
    /// A format with a group size it accepts.
    ///
    /// # Errors
    /// [`FormatError::GroupSize`], see [`Format::check_group_size`].
    pub fn new(format: Format, group_size: usize) -> Result<Self, FormatError> {
        format.check_group_size(group_size)?;
        Ok(Self { format, group_size })
    }

    /// A format with its default group size.
    pub const fn with_default_group(format: Format) -> Self {
        Self { format, group_size: format.default_group_size() }
    }

    /// Groups of one column, the last one possibly short: `ceil(K / group_size)`.
    pub const fn groups(&self, in_features: usize) -> usize {
        in_features.div_ceil(self.group_size)
    }

    /// u32 rows of the packed codes, `[code_rows, N]`.
    pub const fn code_rows(&self, in_features: usize) -> usize {
        self.format.layout().rows(in_features)
    }

    /// Super-blocks of one column, the last one possibly short; 0 where scales have one level.
    pub const fn super_blocks(&self, in_features: usize) -> usize {
        if self.format.scale_kind().is_two_level() { in_features.div_ceil(SUPER_BLOCK) } else { 0 }
    }

    /// Stored bits (codes with padding, scales, zeros or offsets, tensor scale) divided by `K * N`.
    pub fn bits_per_weight(&self, in_features: usize, out_features: usize) -> f64 {
        let values = if self.format.shift() == Shift::None { 1 } else { 2 };
        let group_bits = self.groups(in_features) as f64 * f64::from(self.format.scale_kind().bits() * values);
        let super_bits = self.super_blocks(in_features) as f64 * f64::from(16 * values);
        let column_bits = self.code_rows(in_features) as f64 * 32.0 + group_bits + super_bits;
        let tensor_bits = if self.format == Format::Nvfp4 { 32.0 } else { 0.0 };
        (column_bits + tensor_bits / out_features as f64) / in_features as f64
    }

    /// See [`Format::tensor_scale`].
    pub fn tensor_scale(self, amax_tensor: f32) -> Option<f32> {
        self.format.tensor_scale(amax_tensor)
    }

    /// See [`Format::fit`].
    ///
    /// # Errors
    /// As [`Format::fit`].
    pub fn fit(self, group: &[f32], tensor_scale: Option<f32>) -> Result<Group, FormatError> {
        self.format.fit(group, tensor_scale)
    }

    /// See [`Format::group_from_bits`].
    ///
    /// # Errors
    /// As [`Format::group_from_bits`].
    pub fn group_from_bits(
        self,
        scale_bits: u16,
        zero_bits: u16,
        tensor_scale: Option<f32>,
    ) -> Result<Group, FormatError> {
        self.format.group_from_bits(scale_bits, zero_bits, tensor_scale)
    }

    /// See [`Format::code`].
    #[inline]
    pub fn code(self, w: f32, group: &Group) -> u8 {
        self.format.code(w, group)
    }

    /// See [`Format::dequantize`].
    #[inline]
    pub fn dequantize(self, code: u8, group: &Group) -> f32 {
        self.format.dequantize(code, group)
    }
}
