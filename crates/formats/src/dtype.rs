//! Element types of stored tensors.

/// Element types of stored tensors and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// Unsigned 32-bit integer; also the packed words of native weights.
    U32,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// E4M3FN float, see [`crate::fp8::e4m3`].
    F8E4M3,
    /// E5M2 float, see [`crate::fp8::e5m2`].
    F8E5M2,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 16-bit integer.
    I16,
    /// Signed 64-bit integer.
    I64,
    /// IEEE binary64.
    F64,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every element type.
    pub const ALL: [DType; 14] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::U32,
        DType::I32,
        DType::U8,
        DType::I8,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::U16,
        DType::I16,
        DType::I64,
        DType::F64,
        DType::Bool,
    ];

    /// Bytes of one element.
    pub const fn size_in_bytes(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::U32 | DType::I32 => 4,
            DType::F16 | DType::BF16 | DType::U16 | DType::I16 => 2,
            DType::U8 | DType::I8 | DType::F8E4M3 | DType::F8E5M2 | DType::Bool => 1,
        }
    }

    /// The name a safetensors header uses, for example `"BF16"`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::U32 => "U32",
            DType::I32 => "I32",
            DType::U8 => "U8",
            DType::I8 => "I8",
            DType::F8E4M3 => "F8_E4M3",
            DType::F8E5M2 => "F8_E5M2",
            DType::U16 => "U16",
            DType::I16 => "I16",
            DType::I64 => "I64",
            DType::F64 => "F64",
            DType::Bool => "BOOL",
        }
    }

    /// The type a safetensors header names, or `None` for a name outside this set.
    pub fn from_safetensors_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name)
    }
}
