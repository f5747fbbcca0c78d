//! Errors of the format layer.

use crate::Format;

/// What can be wrong with a weight, a stored scale or a packed matrix.
///
/// `n` is an output feature, `k` an input feature, `g` a group index along K.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FormatError {
    /// A format name that is neither a format nor an alias.
    #[error("unknown weight format `{name}`; valid formats: {}", Format::name_list())]
    UnknownFormat {
        /// The name that was given.
        name: String,
    },
    /// A group size that the format cannot store.
    #[error("group_size {group_size} is not valid for {format}: {rule}")]
    GroupSize {
        /// The format.
        format: Format,
        /// The refused group size.
        group_size: usize,
        /// What the format requires.
        rule: String,
    },
    /// A NaN or infinity among the weights of one group.
    #[error("weight {index} of the group is {value}; weights must be finite")]
    NonFinite {
        /// Position inside the group.
        index: usize,
        /// The offending value.
        value: f32,
    },
    /// A NaN or infinity in a weight matrix.
    #[error("weight[{n}, {k}] is {value}; weights must be finite")]
    NonFiniteWeight {
        /// Output feature.
        n: usize,
        /// Input feature.
        k: usize,
        /// The offending value.
        value: f32,
    },
    /// A group whose scale is above the largest finite f16.
    #[error("the group needs scale {ideal}, above the largest f16 scale 65504")]
    ScaleOverflow {
        /// The scale before rounding.
        ideal: f32,
    },
    /// A stored scale that no valid file holds.
    #[error("stored scale bits {bits:#06x} are not a valid {kind} scale")]
    InvalidScale {
        /// The stored bits.
        bits: u16,
        /// Name of the scale type.
        kind: &'static str,
    },
    /// A stored zero point or offset that is NaN or infinite.
    #[error("stored zero point or offset bits {bits:#06x} are not a finite f16")]
    InvalidZero {
        /// The stored f16 bits.
        bits: u16,
    },
    /// An f32 scale or offset, or the f16 scale or minimum of a super-block, that is NaN or infinite.
    #[error("stored {what} is {value}, which is not finite")]
    InvalidValue {
        /// What the value is.
        what: &'static str,
        /// The stored value.
        value: f32,
    },
    /// Quantizing to a format that only imported checkpoints have.
    #[error("{format} is only imported: weights cannot be quantized to it")]
    ImportOnly {
        /// The format.
        format: Format,
    },
    /// A group of f32 or two-level scales given as two 16-bit values.
    #[error("a group of {format} does not fit two 16-bit values")]
    WideGroup {
        /// The format.
        format: Format,
    },
    /// Groups stored otherwise than the format stores them.
    #[error("the groups of {format} have {expected} scales, found {found}")]
    GroupKind {
        /// The format.
        format: Format,
        /// Name of the format's scale type.
        expected: &'static str,
        /// Name of the scale type that was given.
        found: &'static str,
    },
    /// NVFP4 without its tensor scale.
    #[error("{format} needs a tensor scale and none was given")]
    MissingTensorScale {
        /// The format.
        format: Format,
    },
    /// A tensor scale on a format that has none.
    #[error("{format} has no tensor scale, but {value} was given")]
    UnexpectedTensorScale {
        /// The format.
        format: Format,
        /// The value that was given.
        value: f32,
    },
    /// A tensor scale that is not a finite positive number.
    #[error("tensor scale {value} is not finite and positive")]
    InvalidTensorScale {
        /// The value that was given.
        value: f32,
    },
    /// An error in one group of a matrix.
    #[error("group [n={n}, g={g}]: {source}")]
    InGroup {
        /// Output feature.
        n: usize,
        /// Group along K.
        g: usize,
        /// What is wrong there.
        source: Box<FormatError>,
    },
    /// A code that does not fit the format's code width.
    #[error("code {code} at [n={n}, k={k}] does not fit {bits} bits")]
    CodeOutOfRange {
        /// Output feature.
        n: usize,
        /// Input feature.
        k: usize,
        /// The code.
        code: u8,
        /// Bits of one code.
        bits: u32,
    },
    /// A buffer whose length contradicts the shape.
    #[error("{what} holds {found} elements, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements required by the shape.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A matrix with no elements, or with more than the address space holds.
    #[error("invalid weight shape [out_features={out_features}, in_features={in_features}]")]
    Shape {
        /// N.
        out_features: usize,
        /// K.
        in_features: usize,
    },
    /// An EXL3 bit rate that does not exist.
    #[error("EXL3 has 1 to 8 bits a weight, not {bits}")]
    TrellisBits {
        /// The bit rate.
        bits: u32,
    },
    /// A bit rate that grid codes do not have.
    #[error("grid codes have 2 to 8 bits, not {bits}")]
    GridBits {
        /// The bit rate.
        bits: u32,
    },
    /// A group size that grid codes do not have.
    #[error("group_size {group_size} is not valid for grid codes: it must be a positive multiple of 32")]
    GridGroupSize {
        /// The refused group size.
        group_size: usize,
    },
    /// A header byte that contradicts the bit rate.
    #[error("the tiles begin with the header byte {header}, which is not their bit rate {bits}")]
    GridHeader {
        /// What was found.
        header: u8,
        /// Bits of one code.
        bits: u32,
    },
    /// A grid that is not odd.
    #[error("grid[{index}] is {value}, which is not minus the value at that place from the end")]
    GridNotOdd {
        /// The code.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A sign of a grid matrix that is neither +1 nor -1.
    #[error("{what}[{index}] is {value}; signs must be 1 or -1")]
    GridSign {
        /// Whether of inputs (`su`) or outputs (`sv`).
        what: &'static str,
        /// Its place.
        index: usize,
        /// What was found.
        value: f32,
    },
    /// A code without a value in the grid.
    #[error("code {code} at [n={n}, k={k}] is outside the grid of {levels} values")]
    GridIndex {
        /// Output feature.
        n: usize,
        /// Input feature.
        k: usize,
        /// The code.
        code: u8,
        /// Length of the grid.
        levels: usize,
    },
    /// A row or group index outside the matrix.
    #[error("{what} {index} is out of range, the matrix has {count}")]
    Index {
        /// Which axis.
        what: &'static str,
        /// The index.
        index: usize,
        /// Number of valid indices.
        count: usize,
    },
}
