//! Scalar grid codes of 2 to 8 bits in tiles of 16 x 16, an early relative of EXL3's layout without its trellis: the
//! earlier Python system wrote them under the name "trellis".
//!
//! `W[k, n] = grid[code(k, n)] * scales[k / group_size, n] * su[k] * sv[n]`, with `su` and `sv` of +1 and -1. A tile is an
//! LSB-first stream of 256 codes of `bits` bits; K and N are padded to whole tiles. Tiles are `[K / 16, N / 16]` in order,
//! columns one after the other inside a tile, unless a file's [`TileOrder`] and [`InnerOrder`] say otherwise.
//!
//! - [`uniform`]: the values of the codes;
//! - [`unpack`] and [`pack`]: tiles to codes and back;
//! - [`GridMatrix`]: one weight matrix, and [`FoldedGrid`], what a kernel reads of it.

mod matrix;

pub use matrix::{FoldedGrid, GROUP_UNIT, GridMatrix};

use crate::FormatError;

/// Rows (along K) and columns (along N) of a tile.
pub const SIDE: usize = 16;

/// What some writers multiplied the uniform grid with: the deviation of EXL3's 3inst codebook.
pub const CODEBOOK_FACTOR: f32 = 1.243_710_9;

/// How a file orders the tiles of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileOrder {
    /// `[K / 16, N / 16]`.
    Kn,
    /// `[N / 16, K / 16]`.
    Nk,
}

/// How a file orders the codes of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InnerOrder {
    /// Code i is at `(k, n) = (i mod 16, i div 16)`.
    Column,
    /// Code i is at `(k, n) = (i div 16, i mod 16)`.
    Row,
}

/// Bytes of a tile.
pub const fn tile_bytes(bits: u32) -> usize {
    SIDE * SIDE * bits as usize / 8
}

/// The values of codes of `bits` bits (2 to 8): `(i - (2^bits - 1) / 2) * factor`, with a factor of 1 or
/// [`CODEBOOK_FACTOR`].
///
/// # Errors
/// [`FormatError::GridBits`].
pub fn uniform(bits: u32, factor: f32) -> Result<Vec<f32>, FormatError> {
    check_bits(bits)?;
    let middle = ((1u32 << bits) - 1) as f32 / 2.0;
    Ok((0..1u32 << bits).map(|i| (i as f32 - middle) * factor).collect())
}

/// The tiles of one matrix.
#[derive(Clone, Copy)]
struct Tiles {
    bits: u32,
    in_features: usize,
    out_features: usize,
    tiles: TileOrder,
    inner: InnerOrder,
}

impl Tiles {
    /// Bytes of all tiles.
    fn bytes(&self) -> Result<usize, FormatError> {
        check_bits(self.bits)?;
        let (n, k) = (self.out_features, self.in_features);
        let count = k.div_ceil(SIDE).checked_mul(n.div_ceil(SIDE)).filter(|&count| count > 0);
        count
            .and_then(|count| count.checked_mul(tile_bytes(8)).map(|_| count * tile_bytes(self.bits)))
            .ok_or(FormatError::Shape { out_features: n, in_features: k })
    }

    /// First byte, and the bit inside it, of the code at `(k, n)`.
    fn place(&self, k: usize, n: usize) -> (usize, usize) {
        let (row, column) = (k / SIDE, n / SIDE);
        let tile = match self.tiles {
            TileOrder::Kn => row * self.out_features.div_ceil(SIDE) + column,
            TileOrder::Nk => column * self.in_features.div_ceil(SIDE) + row,
        };
        let i = match self.inner {
            InnerOrder::Column => n % SIDE * SIDE + k % SIDE,
            InnerOrder::Row => k % SIDE * SIDE + n % SIDE,
        };
        let bit = i * self.bits as usize;
        (tile * tile_bytes(self.bits) + bit / 8, bit % 8)
    }
}

/// The codes `[N, K]` row-major of the tiles of a matrix. One byte more than the tiles have is a header that must be equal
/// to `bits`.
///
/// # Errors
/// [`FormatError::GridBits`], [`FormatError::Shape`], [`FormatError::Length`], and [`FormatError::GridHeader`].
pub fn unpack(
    stream: &[u8],
    bits: u32,
    [out_features, in_features]: [usize; 2],
    tiles: TileOrder,
    inner: InnerOrder,
) -> Result<Vec<u8>, FormatError> {
    let layout = Tiles { bits, in_features, out_features, tiles, inner };
    let expected = layout.bytes()?;
    let stream = match stream.split_first() {
        Some((&header, rest)) if rest.len() == expected => match u32::from(header) == bits {
            true => rest,
            false => return Err(FormatError::GridHeader { header, bits }),
        },
        _ if stream.len() == expected => stream,
        _ => return Err(FormatError::Length { what: "tiles", expected, found: stream.len() }),
    };
    let mask = (1u32 << bits) - 1;
    let mut codes = Vec::with_capacity(out_features * in_features);
    for n in 0..out_features {
        codes.extend((0..in_features).map(|k| {
            let (byte, bit) = layout.place(k, n);
            // The last code of the stream ends with its last byte.
            let next = stream.get(byte + 1).copied().unwrap_or(0);
            ((u32::from(stream[byte]) | u32::from(next) << 8) >> bit & mask) as u8
        }));
    }
    Ok(codes)
}

/// The tiles of codes `[N, K]` row-major, without a header; padding is code 0.
///
/// # Errors
/// [`FormatError::GridBits`], [`FormatError::Shape`], [`FormatError::Length`], and [`FormatError::CodeOutOfRange`].
pub fn pack(
    codes: &[u8],
    bits: u32,
    [out_features, in_features]: [usize; 2],
    tiles: TileOrder,
    inner: InnerOrder,
) -> Result<Vec<u8>, FormatError> {
    let layout = Tiles { bits, in_features, out_features, tiles, inner };
    let bytes = layout.bytes()?;
    let expected = out_features * in_features;
    if codes.len() != expected {
        return Err(FormatError::Length { what: "codes", expected, found: codes.len() });
    }
    let mut stream = vec![0; bytes];
    for (n, row) in codes.chunks_exact(in_features).enumerate() {
        for (k, &code) in row.iter().enumerate() {
            if u32::from(code) >> bits != 0 {
                return Err(FormatError::CodeOutOfRange { n, k, code, bits });
            }
            let (byte, bit) = layout.place(k, n);
            let field = u32::from(code) << bit;
            stream[byte] |= field as u8;
            if field > 255 {
                stream[byte + 1] |= (field >> 8) as u8;
            }
        }
    }
    Ok(stream)
}

fn check_bits(bits: u32) -> Result<(), FormatError> {
    if (2..=8).contains(&bits) { Ok(()) } else { Err(FormatError::GridBits { bits }) }
}
