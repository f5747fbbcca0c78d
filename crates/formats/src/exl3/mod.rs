//! EXL3: tail-biting trellis codes of 1 to 8 bits a weight, as ExLlamaV3 writes them (a variant of QTIP, Tseng et al. 2024).
//!
//! A weight `[K, N]` is stored as `diag(suh) H W_inner H diag(svh)`, where `H` is the orthonormal Hadamard transform of
//! every aligned run of [`HADAMARD`] channels and `W_inner` comes from tiles of 16 x 16 weights. A tile is a cyclic stream
//! of `256 bits` bits; the state of a position is the 16 bits that end with its symbol, and a [`Codebook`] turns the state
//! into a value. K and N are padded to multiples of 128.
//!
//! - [`Codebook`]: state to value;
//! - [`tile`]: the bit stream of a tile and the order of its elements;
//! - [`Exl3Matrix`]: one weight matrix.

mod codebook;
mod matrix;
pub mod tile;

pub use codebook::Codebook;
pub use matrix::Exl3Matrix;

/// Channels that one Hadamard transform mixes, and the multiple that K and N are padded to.
pub const HADAMARD: usize = 128;

/// [`crate::hadamard`] of 128 values.
pub fn hadamard(x: &mut [f64; HADAMARD]) {
    crate::hadamard(x, 1);
}
