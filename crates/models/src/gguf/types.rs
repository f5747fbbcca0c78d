//! The element and block types of GGUF tensors: ids, names and sizes.

use marlin_formats::DType;

/// A tensor type that this project reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GgmlType {
    /// One value an element.
    Plain(DType),
    /// Blocks of quantized values along the contiguous dimension.
    Block(BlockType),
}

/// A quantized block type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
    Nvfp4,
}

/// Why an id gives no [`GgmlType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TypeError {
    /// A type of the format that this project does not read.
    Unsupported(&'static str),
    /// No type of the format.
    Unknown,
}

impl GgmlType {
    /// The type with this id.
    pub(crate) fn from_id(id: u32) -> Result<Self, TypeError> {
        use BlockType::*;
        let plain = |dtype| Ok(GgmlType::Plain(dtype));
        let block = |block| Ok(GgmlType::Block(block));
        match id {
            0 => plain(DType::F32),
            1 => plain(DType::F16),
            24 => plain(DType::I8),
            25 => plain(DType::I16),
            26 => plain(DType::I32),
            27 => plain(DType::I64),
            28 => plain(DType::F64),
            30 => plain(DType::BF16),
            2 => block(Q4_0),
            3 => block(Q4_1),
            6 => block(Q5_0),
            7 => block(Q5_1),
            8 => block(Q8_0),
            10 => block(Q2K),
            11 => block(Q3K),
            12 => block(Q4K),
            13 => block(Q5K),
            14 => block(Q6K),
            20 => block(Iq4Nl),
            23 => block(Iq4Xs),
            39 => block(Mxfp4),
            40 => block(Nvfp4),
            _ => match UNSUPPORTED.iter().find(|(unsupported, _)| *unsupported == id) {
                Some((_, name)) => Err(TypeError::Unsupported(name)),
                None => Err(TypeError::Unknown),
            },
        }
    }

    /// The name in llama.cpp's spelling.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            GgmlType::Plain(dtype) => dtype.name(),
            GgmlType::Block(block) => block.name(),
        }
    }

    /// Elements of a block.
    pub(crate) const fn block_elements(self) -> usize {
        match self {
            GgmlType::Plain(_) => 1,
            GgmlType::Block(block) => block.size().0,
        }
    }

    /// Bytes of a block.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            GgmlType::Plain(dtype) => dtype.size_in_bytes(),
            GgmlType::Block(block) => block.size().1,
        }
    }
}

impl BlockType {
    /// The name in llama.cpp's spelling.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q2K => "Q2_K",
            BlockType::Q3K => "Q3_K",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
            BlockType::Iq4Nl => "IQ4_NL",
            BlockType::Iq4Xs => "IQ4_XS",
            BlockType::Mxfp4 => "MXFP4",
            BlockType::Nvfp4 => "NVFP4",
        }
    }

    /// Elements and bytes of a block.
    pub(crate) const fn size(self) -> (usize, usize) {
        match self {
            BlockType::Q4_0 | BlockType::Iq4Nl => (32, 18),
            BlockType::Q4_1 => (32, 20),
            BlockType::Q5_0 => (32, 22),
            BlockType::Q5_1 => (32, 24),
            BlockType::Q8_0 => (32, 34),
            BlockType::Q2K => (256, 84),
            BlockType::Q3K => (256, 110),
            BlockType::Q4K => (256, 144),
            BlockType::Q5K => (256, 176),
            BlockType::Q6K => (256, 210),
            BlockType::Iq4Xs => (256, 136),
            BlockType::Mxfp4 => (32, 17),
            BlockType::Nvfp4 => (64, 36),
        }
    }
}

/// Types of the format that are not read: grid codebooks, ternary, and those that exist only while llama.cpp runs.
const UNSUPPORTED: [(u32, &str); 14] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (41, "Q1_0"),
    (42, "Q2_0"),
    (4, "Q4_2 (withdrawn)"),
];
