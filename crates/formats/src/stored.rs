//! Groups of imported matrices, as their checkpoints store them.

use half::f16;

use crate::matrix::{Lengths, check_length};
use crate::{FormatError, Group, QuantizedMatrix, SUPER_BLOCK, ScaleKind, Scheme, Shift};

/// The stored groups of a matrix, each array `[N, G]` row-major, or `[N, super-blocks]` where said: the orientation of
/// checkpoints. Arrays that the format does not have are empty.
#[derive(Clone, Copy, Debug)]
pub enum StoredGroups<'a> {
    /// One f16 scale a group.
    F16 {
        /// Scales, f16 bits.
        scales: &'a [u16],
        /// Zero points or offsets, f16 bits.
        shifts: &'a [u16],
    },
    /// One f32 scale a group.
    F32 {
        /// Scales.
        scales: &'a [f32],
        /// Offsets.
        offsets: &'a [f32],
    },
    /// One byte a group, times an f16 per [`SUPER_BLOCK`] weights along K.
    TwoLevel {
        /// f16 bits of the multipliers of `scales`, `[N, super-blocks]`.
        super_scales: &'a [u16],
        /// f16 bits of the multipliers of `minima`, `[N, super-blocks]`.
        super_minima: &'a [u16],
        /// Scales: unsigned, or two's complement, as [`crate::Format::scale_kind`] says.
        scales: &'a [u8],
        /// Minima, which are subtracted.
        minima: &'a [u8],
    },
}

impl QuantizedMatrix {
    /// Assembles a matrix from unpacked codes `[N, K]` row-major and groups as a checkpoint stores them.
    ///
    /// # Errors
    /// [`FormatError::GroupKind`] when the format stores its groups in another type,
    /// [`FormatError::CodeOutOfRange`] for a code wider than the format's, a scale, zero point or offset that is not
    /// finite, a wrong group size, length or shape.
    pub fn from_stored(
        scheme: Scheme,
        in_features: usize,
        out_features: usize,
        codes: &[u8],
        groups: &StoredGroups<'_>,
    ) -> Result<Self, FormatError> {
        let lengths = Lengths::new(scheme, out_features, in_features)?;
        let (format, n) = (scheme.format, out_features);
        let kind = format.scale_kind();
        let found = match groups {
            StoredGroups::F16 { .. } if kind != ScaleKind::F16 => Some("F16"),
            StoredGroups::F32 { .. } if kind != ScaleKind::F32 => Some("F32"),
            StoredGroups::TwoLevel { .. } if !kind.is_two_level() => Some("two-level"),
            _ => None,
        };
        if let Some(found) = found {
            return Err(FormatError::GroupKind { format, expected: kind.name(), found });
        }
        let mut matrix = Self::packed(scheme, in_features, out_features, codes, &lengths, None)?;
        let shifts = if format.shift() == Shift::None { 0 } else { lengths.groups };
        match *groups {
            StoredGroups::F16 { scales, shifts: values } => {
                transpose("scales", lengths.groups, n, scales, |at, v| matrix.scales[at] = v)?;
                transpose("shifts", shifts, n, values, |at, v| matrix.zeros[at] = v)?;
            }
            StoredGroups::F32 { scales, offsets } => {
                transpose("scales", lengths.groups, n, scales, |at, v| store_f32(&mut matrix.scales, at, v))?;
                transpose("offsets", shifts, n, offsets, |at, v| store_f32(&mut matrix.zeros, at, v))?;
            }
            StoredGroups::TwoLevel { super_scales, super_minima, scales, minima } => {
                let supers = [lengths.super_scales, lengths.super_minima];
                transpose("super_scales", supers[0], n, super_scales, |at, v| matrix.super_scales[at] = v)?;
                transpose("super_minima", supers[1], n, super_minima, |at, v| matrix.super_minima[at] = v)?;
                transpose("scales", lengths.groups, n, scales, |at, v| matrix.scales[at] = u16::from(v))?;
                transpose("minima", shifts, n, minima, |at, v| matrix.zeros[at] = u16::from(v))?;
            }
        }
        matrix.validate()?;
        Ok(matrix)
    }

    /// Reads a group whose indices and buffers have been checked.
    pub(crate) fn stored_group(&self, n: usize, g: usize) -> Result<Group, FormatError> {
        let at = g * self.out_features + n;
        let format = self.scheme.format;
        let kind = format.scale_kind();
        match kind {
            ScaleKind::F16 | ScaleKind::E4m3 | ScaleKind::E8m0 => {
                let zero_bits = if format.shift() == Shift::None { 0 } else { self.zeros[at] };
                format.group_from_bits(self.scales[at], zero_bits, self.tensor_scale)
            }
            ScaleKind::F32 => {
                let scale = finite("scale", load_f32(&self.scales, at))?;
                let offset = match format.has_offsets() {
                    true => finite("offset", load_f32(&self.zeros, at))?,
                    false => 0.0,
                };
                Ok(Group { scale, offset, ..Group::ZERO })
            }
            ScaleKind::F16U8 | ScaleKind::F16I8 => {
                let block = g * self.scheme.group_size / SUPER_BLOCK * self.out_features + n;
                let byte =
                    |bits: u16| u8::try_from(bits).map_err(|_| FormatError::InvalidScale { bits, kind: kind.name() });
                let scale_bits = self.scales[at];
                let scale = match kind {
                    ScaleKind::F16I8 => f32::from(byte(scale_bits)? as i8),
                    _ => f32::from(byte(scale_bits)?),
                };
                // Eleven bits times eight: these products are exact.
                let scale = finite_f16("super-block scale", self.super_scales[block])? * scale;
                let group = Group { scale_bits, scale, ..Group::ZERO };
                if !format.has_offsets() {
                    return Ok(group);
                }
                let zero_bits = self.zeros[at];
                let minimum = f32::from(byte(zero_bits)?);
                let minimum = finite_f16("super-block minimum", self.super_minima[block])? * minimum;
                Ok(Group { zero_bits, offset: -minimum, ..group })
            }
        }
    }
}

/// Visits `values`, `[N, rows]`, with the index of each in `[rows, N]`.
fn transpose<T: Copy>(
    what: &'static str,
    expected: usize,
    n: usize,
    values: &[T],
    mut set: impl FnMut(usize, T),
) -> Result<(), FormatError> {
    check_length(what, expected, values.len())?;
    let rows = expected / n;
    for (i, &value) in values.iter().enumerate() {
        set(i % rows * n + i / rows, value);
    }
    Ok(())
}

/// Value `at` of f32 values that are stored as words of 16 bits, the low one first.
///
/// # Panics
/// When there is no such value, as slice indexing does.
pub fn load_f32(halves: &[u16], at: usize) -> f32 {
    f32::from_bits(u32::from(halves[2 * at]) | u32::from(halves[2 * at + 1]) << 16)
}

/// The opposite of [`load_f32`].
///
/// # Panics
/// As [`load_f32`].
pub fn store_f32(halves: &mut [u16], at: usize, value: f32) {
    halves[2 * at] = value.to_bits() as u16;
    halves[2 * at + 1] = (value.to_bits() >> 16) as u16;
}

fn finite(what: &'static str, value: f32) -> Result<f32, FormatError> {
    if value.is_finite() { Ok(value) } else { Err(FormatError::InvalidValue { what, value }) }
}

fn finite_f16(what: &'static str, bits: u16) -> Result<f32, FormatError> {
    finite(what, f16::from_bits(bits).to_f32())
}
