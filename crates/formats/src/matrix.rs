//! One quantized weight matrix in the native K-major layout.

use crate::stored::store_f32;
use crate::{Format, FormatError, Group, ScaleKind, Scheme, Shift};

/// One weight matrix in the native K-major container layout.
///
/// Row `r` of `codes` holds the codes of consecutive input features, see [`crate::pack`]. Codes
/// past `in_features` are padding: written as 0, never read.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    /// Format and group size.
    pub scheme: Scheme,
    /// K.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// Packed codes, `[code_rows, N]` row-major.
    pub codes: Vec<u32>,
    /// Group scales, `[G, N]` row-major: f16 bits, a byte zero-extended, or the two halves of an f32, the low one first.
    pub scales: Vec<u16>,
    /// Zero points or offsets, `[G, N]` row-major, stored as the scales are; empty when the format has none.
    pub zeros: Vec<u16>,
    /// f16 bits that two-level scales are multiplied with, `[super-blocks, N]` row-major; empty in other formats.
    pub super_scales: Vec<u16>,
    /// f16 bits that two-level minima are multiplied with, as [`QuantizedMatrix::super_scales`].
    pub super_minima: Vec<u16>,
    /// The NVFP4 tensor scale, a divisor; `None` for every other format.
    pub tensor_scale: Option<f32>,
}

/// Buffer lengths that a shape requires.
pub(crate) struct Lengths {
    pub(crate) elements: usize,
    codes: usize,
    pub(crate) groups: usize,
    scales: usize,
    zeros: usize,
    pub(crate) super_scales: usize,
    pub(crate) super_minima: usize,
}

impl Lengths {
    /// Checks the group size and that `[N, K]` is neither empty nor beyond the address space.
    pub(crate) fn new(scheme: Scheme, out_features: usize, in_features: usize) -> Result<Self, FormatError> {
        let format = scheme.format;
        format.check_group_size(scheme.group_size)?;
        let columns_of = |rows: usize| rows.checked_mul(out_features).filter(|&count| count > 0);
        let words = format.scale_kind().words();
        let shifts = usize::from(format.shift() != Shift::None);
        let lengths = || {
            let groups = columns_of(scheme.groups(in_features))?;
            let scales = groups.checked_mul(words)?;
            let super_scales = scheme.super_blocks(in_features).checked_mul(out_features)?;
            Some(Lengths {
                elements: columns_of(in_features)?,
                codes: columns_of(scheme.code_rows(in_features))?,
                groups,
                scales,
                zeros: scales * shifts,
                super_scales,
                super_minima: super_scales * shifts,
            })
        };
        lengths().ok_or(FormatError::Shape { out_features, in_features })
    }
}

impl QuantizedMatrix {
    /// Quantizes `weight`, `[N, K]` row-major, each weight to the nearest code of its group.
    ///
    /// # Errors
    /// [`FormatError::NonFiniteWeight`] with the index of a NaN or infinite weight, a scale
    /// overflow with its group, [`FormatError::ImportOnly`], a wrong group size, length or shape.
    pub fn encode(
        scheme: Scheme,
        weight: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, FormatError> {
        scheme.format.check_encodable()?;
        let lengths = Lengths::new(scheme, out_features, in_features)?;
        check_length("weight", lengths.elements, weight.len())?;
        if let Some(index) = weight.iter().position(|w| !w.is_finite()) {
            let (n, k) = (index / in_features, index % in_features);
            return Err(FormatError::NonFiniteWeight { n, k, value: weight[index] });
        }
        let amax = weight.iter().fold(0.0f32, |amax, w| amax.max(w.abs()));
        let tensor_scale = scheme.format.tensor_scale(amax);
        let mut matrix = Self::zeroed(scheme, in_features, out_features, &lengths, tensor_scale);
        let mut codes = vec![0u8; in_features];
        for (n, row) in weight.chunks_exact(in_features).enumerate() {
            let groups = row.chunks(scheme.group_size).zip(codes.chunks_mut(scheme.group_size));
            for (g, (weights, codes)) in groups.enumerate() {
                let group = scheme.format.fit(weights, tensor_scale).map_err(in_group(n, g))?;
                for (code, &w) in codes.iter_mut().zip(weights) {
                    *code = scheme.format.code(w, &group);
                }
                matrix.store_group(n, g, &group);
            }
            scheme.format.layout().store_column(&codes, &mut matrix.codes, out_features, n);
        }
        Ok(matrix)
    }

    /// Assembles a matrix from unpacked codes `[N, K]` and groups `[N, G]`, both row-major.
    ///
    /// # Errors
    /// [`FormatError::CodeOutOfRange`] for a code wider than the format's, a group that
    /// [`Format::group_from_bits`] refuses, [`FormatError::WideGroup`] for two-level formats (see
    /// [`QuantizedMatrix::from_stored`]), a wrong group size, length or shape.
    pub fn from_codes(
        scheme: Scheme,
        in_features: usize,
        out_features: usize,
        codes: &[u8],
        groups: &[Group],
        tensor_scale: Option<f32>,
    ) -> Result<Self, FormatError> {
        let lengths = Lengths::new(scheme, out_features, in_features)?;
        check_length("groups", lengths.groups, groups.len())?;
        if scheme.format.scale_kind().is_two_level() {
            return Err(FormatError::WideGroup { format: scheme.format });
        }
        let mut matrix = Self::packed(scheme, in_features, out_features, codes, &lengths, tensor_scale)?;
        let groups_per_column = scheme.groups(in_features);
        for (index, group) in groups.iter().enumerate() {
            matrix.store_group(index / groups_per_column, index % groups_per_column, group);
        }
        matrix.validate()?;
        Ok(matrix)
    }

    /// Checks buffer lengths against the shape, the tensor scale, and every scale and zero.
    ///
    /// # Errors
    /// The first thing that is wrong, with its `[n, g]` where it belongs to a group.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.check_lengths()?;
        self.scheme.format.check_tensor_scale(self.tensor_scale)?;
        for g in 0..self.scheme.groups(self.in_features) {
            for n in 0..self.out_features {
                self.read_group(n, g)?;
            }
        }
        Ok(())
    }

    /// The code of `weight[n, k]` as stored.
    ///
    /// # Panics
    /// When `n` or `k` is out of range, as slice indexing does.
    pub fn code(&self, n: usize, k: usize) -> u8 {
        assert!(n < self.out_features, "n {n} is out of range, N is {}", self.out_features);
        assert!(k < self.in_features, "k {k} is out of range, K is {}", self.in_features);
        self.scheme.format.layout().code(&self.codes, self.out_features, n, k)
    }

    /// The scale and zero of group `g` of output feature `n`.
    ///
    /// # Errors
    /// [`FormatError::Index`] when there is no such group, and [`FormatError::InGroup`] when
    /// [`Format::group_from_bits`] refuses the stored bits.
    pub fn group(&self, n: usize, g: usize) -> Result<Group, FormatError> {
        self.check_lengths()?;
        check_index("out_features", n, self.out_features)?;
        check_index("groups", g, self.scheme.groups(self.in_features))?;
        self.read_group(n, g)
    }

    /// The dense weight, `[N, K]` row-major, each element `value(code, zero) * scale` in f32, plus the group's offset
    /// where the format has offsets: a second rounding.
    ///
    /// # Errors
    /// As [`QuantizedMatrix::validate`].
    pub fn decode(&self) -> Result<Vec<f32>, FormatError> {
        let lengths = self.check_lengths()?;
        let mut weight = vec![0.0; lengths.elements];
        let values = value_table(self.scheme.format);
        let mut codes = vec![0u8; self.in_features];
        for (n, row) in weight.chunks_exact_mut(self.in_features).enumerate() {
            self.decode_row_with(n, &values, &mut codes, row)?;
        }
        Ok(weight)
    }

    /// The dense weights of output feature `n`, written to `out`, which has K elements.
    ///
    /// # Errors
    /// [`FormatError::Index`] or [`FormatError::Length`] for a wrong `n` or `out`, otherwise as
    /// [`QuantizedMatrix::validate`] for that row.
    pub fn decode_row(&self, n: usize, out: &mut [f32]) -> Result<(), FormatError> {
        self.check_lengths()?;
        check_index("out_features", n, self.out_features)?;
        check_length("out", self.in_features, out.len())?;
        let mut codes = vec![0u8; self.in_features];
        self.decode_row_with(n, &value_table(self.scheme.format), &mut codes, out)
    }

    fn decode_row_with(
        &self,
        n: usize,
        values: &[f32; 256],
        codes: &mut [u8],
        out: &mut [f32],
    ) -> Result<(), FormatError> {
        let group_size = self.scheme.group_size;
        self.scheme.format.layout().load_column(&self.codes, self.out_features, n, codes);
        for (g, (codes, out)) in codes.chunks(group_size).zip(out.chunks_mut(group_size)).enumerate() {
            let group = self.read_group(n, g)?;
            for (out, &code) in out.iter_mut().zip(codes) {
                // The zero is +0 in formats without one, where subtracting it changes nothing.
                *out = (values[usize::from(code)] - group.zero) * group.scale;
            }
            if self.scheme.format.has_offsets() {
                out.iter_mut().for_each(|w| *w += group.offset);
            }
        }
        Ok(())
    }

    /// Unpacked codes `[N, K]`, packed; groups of zeros.
    pub(crate) fn packed(
        scheme: Scheme,
        in_features: usize,
        out_features: usize,
        codes: &[u8],
        lengths: &Lengths,
        tensor_scale: Option<f32>,
    ) -> Result<Self, FormatError> {
        check_length("codes", lengths.elements, codes.len())?;
        let bits = scheme.format.code_bits();
        if let Some(index) = codes.iter().position(|&code| u32::from(code) >= 1 << bits) {
            let (n, k) = (index / in_features, index % in_features);
            return Err(FormatError::CodeOutOfRange { n, k, code: codes[index], bits });
        }
        let mut matrix = Self::zeroed(scheme, in_features, out_features, lengths, tensor_scale);
        for (n, column) in codes.chunks_exact(in_features).enumerate() {
            scheme.format.layout().store_column(column, &mut matrix.codes, out_features, n);
        }
        Ok(matrix)
    }

    fn zeroed(
        scheme: Scheme,
        in_features: usize,
        out_features: usize,
        lengths: &Lengths,
        tensor_scale: Option<f32>,
    ) -> Self {
        Self {
            scheme,
            in_features,
            out_features,
            codes: vec![0; lengths.codes],
            scales: vec![0; lengths.scales],
            zeros: vec![0; lengths.zeros],
            super_scales: vec![0; lengths.super_scales],
            super_minima: vec![0; lengths.super_minima],
            tensor_scale,
        }
    }

    fn check_lengths(&self) -> Result<Lengths, FormatError> {
        let lengths = Lengths::new(self.scheme, self.out_features, self.in_features)?;
        check_length("codes", lengths.codes, self.codes.len())?;
        check_length("scales", lengths.scales, self.scales.len())?;
        check_length("zeros", lengths.zeros, self.zeros.len())?;
        check_length("super_scales", lengths.super_scales, self.super_scales.len())?;
        check_length("super_minima", lengths.super_minima, self.super_minima.len())?;
        Ok(lengths)
    }

    /// Reads a group whose indices and buffers have been checked.
    fn read_group(&self, n: usize, g: usize) -> Result<Group, FormatError> {
        self.stored_group(n, g).map_err(in_group(n, g))
    }

    fn store_group(&mut self, n: usize, g: usize, group: &Group) {
        let at = g * self.out_features + n;
        let format = self.scheme.format;
        if format.scale_kind() == ScaleKind::F32 {
            store_f32(&mut self.scales, at, group.scale);
            if format.has_offsets() {
                store_f32(&mut self.zeros, at, group.offset);
            }
            return;
        }
        self.scales[at] = group.scale_bits;
        if format.shift() != Shift::None {
            self.zeros[at] = group.zero_bits;
        }
    }
}

/// The value of every stored code at zero point 0.
fn value_table(format: Format) -> [f32; 256] {
    std::array::from_fn(|code| format.value(code as u8, 0.0))
}

fn in_group(n: usize, g: usize) -> impl Fn(FormatError) -> FormatError {
    move |source| FormatError::InGroup { n, g, source: Box::new(source) }
}

pub(crate) fn check_length(what: &'static str, expected: usize, found: usize) -> Result<(), FormatError> {
    if expected == found { Ok(()) } else { Err(FormatError::Length { what, expected, found }) }
}

fn check_index(what: &'static str, index: usize, count: usize) -> Result<(), FormatError> {
    if index < count { Ok(()) } else { Err(FormatError::Index { what, index, count }) }
}
