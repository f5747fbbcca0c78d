//! Rotary embedding and the MLA latent write.

use marlin_ops::rope::{MlaLatentWriteArgs, Pairing, RopeArgs, RopeTable, position_error};
use marlin_ops::{Result, RopeOps};

use crate::Cpu;
use crate::buffer::{FloatsMut, f32s, f32s_mut, optional_f32s, u32s};
use crate::norm::{NormalizeRow, RmsNorm};
use crate::simd::{Kernel, Simd};

/// cos and sin rows of a table.
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
}

impl<'a> Angles<'a> {
    /// The table's rows, after checking that they cover all positions.
    fn new(operation: &'static str, table: &'a RopeTable<Cpu>, positions: &[u32]) -> Result<Self> {
        let rows = table.positions();
        if let Some(i) = positions.iter().position(|&p| p as usize >= rows) {
            return Err(position_error(operation, i, positions[i], rows));
        }
        Ok(Self {
            cos: f32s(operation, "cos", &table.cos)?,
            sin: f32s(operation, "sin", &table.sin)?,
            half: table.cos.columns(),
        })
    }

    fn at(&self, position: u32) -> (&'a [f32], &'a [f32]) {
        let range = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Rotates each head's `2 half` channels from `offset`; `scratch` is as long.
struct Rotate<'a, 'b> {
    heads: &'a mut [f32],
    head_dim: usize,
    offset: usize,
    angles: (&'b [f32], &'b [f32]),
    sign: f32,
    pairing: Pairing,
    scratch: &'a mut [f32],
}

impl Kernel for Rotate<'_, '_> {
    type Output = ();

    // Plain loops: the compiler makes vectors of them.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (cos, sin) = self.angles;
        let half = cos.len();
        let turn = |a: f32, b: f32, c: f32, s: f32| (a * c - b * s, b * c + a * s);
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            let x = &mut head[self.offset..self.offset + 2 * half];
            match self.pairing {
                Pairing::Interleaved => {
                    for ((pair, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                        (pair[0], pair[1]) = turn(pair[0], pair[1], *c, self.sign * s);
                    }
                }
                Pairing::Half => {
                    let (first, second) = x.split_at_mut(half);
                    let pairs = first.iter_mut().zip(second);
                    for (((a, b), c), s) in pairs.zip(cos).zip(sin) {
                        (*a, *b) = turn(*a, *b, *c, self.sign * s);
                    }
                }
                Pairing::InterleavedToHalf => {
                    self.scratch.copy_from_slice(x);
                    let (first, second) = x.split_at_mut(half);
                    let pairs = self.scratch.as_chunks::<2>().0;
                    for (i, pair) in pairs.iter().enumerate() {
                        (first[i], second[i]) = turn(pair[0], pair[1], cos[i], self.sign * sin[i]);
                    }
                }
            }
        }
    }
}

impl RopeOps for Cpu {
    fn run_rope(&self, args: RopeArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rope";
        let positions = u32s(OP, "positions", args.positions)?;
        let angles = Angles::new(OP, args.table, positions)?;
        let (heads, head_dim) = (args.x.dims()[1], args.x.dims()[2]);
        let sign = if args.inverse { -1.0 } else { 1.0 };
        let x = f32s_mut(OP, "x", args.x)?;
        self.for_rows(x, heads * head_dim, |t, row| {
            self.level.run(Rotate {
                heads: row,
                head_dim,
                offset: args.offset,
                angles: angles.at(positions[t]),
                sign,
                pairing: args.pairing,
                scratch: &mut self.workspace.floats.take(2 * angles.half),
            });
        });
        Ok(())
    }

    fn run_mla_latent_write(&self, args: MlaLatentWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "mla_latent_write";
        let positions = u32s(OP, "positions", args.positions)?;
        let angles = Angles::new(OP, args.table, positions)?;
        let x = f32s(OP, "x", args.x)?;
        let gamma = optional_f32s(OP, "gamma", args.gamma)?;
        let width = args.x.columns();
        let rank = width - 2 * angles.half;
        let first = args.sequence * args.cache.dims()[1] + args.start;
        let mut cache = FloatsMut::of(OP, "cache", args.cache)?;
        let mut scratch = self.workspace.floats.take(width + 2 * angles.half);
        let (row, swap) = scratch.split_at_mut(width);
        for (t, source) in x.chunks_exact(width).enumerate() {
            row.copy_from_slice(source);
            let (latent, rope) = row.split_at_mut(rank);
            if gamma.is_some() && rank > 0 {
                let norm = RmsNorm { gamma, gamma_offset: 0.0, eps: args.eps };
                self.level.run(NormalizeRow { norm, row: latent });
            }
            self.level.run(Rotate {
                head_dim: rope.len().max(1),
                heads: rope,
                offset: 0,
                angles: angles.at(positions[t]),
                sign: 1.0,
                pairing: args.pairing,
                scratch: swap,
            });
            cache.store((first + t) * width, row);
        }
        Ok(())
    }
}
