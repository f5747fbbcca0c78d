//! Rotary embedding.

use super::norm::rms_normalized;
use super::{Oracle, floats, store, words};
use crate::rope::{MlaLatentWriteArgs, Pairing, RopeArgs, RopeOps, RopeTable, position_error};
use crate::{Result, Tensor};

/// cos and sin of one position, `[d/2]` each.
struct Angles<'a> {
    cos: &'a [f64],
    sin: &'a [f64],
}

/// The table's row for each position.
fn angles<'a>(
    operation: &'static str,
    positions: &Tensor<Oracle>,
    table: &'a RopeTable<Oracle>,
) -> Result<Vec<Angles<'a>>> {
    let half = table.cos.columns();
    let look_up = |(t, &position): (usize, &u32)| {
        let p = position as usize;
        if p >= table.positions() {
            return Err(position_error(operation, t, position, table.positions()));
        }
        Ok(Angles { cos: &floats(&table.cos)[p * half..][..half], sin: &floats(&table.sin)[p * half..][..half] })
    };
    words(positions).iter().enumerate().map(look_up).collect()
}

/// Rotates the d channels of `x`: pair (a, b) becomes (a cos - b sin, b cos + a sin).
fn rotate(x: &[f64], angles: &Angles<'_>, pairing: Pairing, inverse: bool) -> Vec<f64> {
    let half = x.len() / 2;
    let mut y = vec![0.0; x.len()];
    for i in 0..half {
        let (read, write) = match pairing {
            Pairing::Interleaved => ((2 * i, 2 * i + 1), (2 * i, 2 * i + 1)),
            Pairing::Half => ((i, i + half), (i, i + half)),
            Pairing::InterleavedToHalf => ((2 * i, 2 * i + 1), (i, i + half)),
        };
        let (a, b) = (x[read.0], x[read.1]);
        let cos = angles.cos[i];
        let sin = if inverse { -angles.sin[i] } else { angles.sin[i] };
        y[write.0] = a * cos - b * sin;
        y[write.1] = b * cos + a * sin;
    }
    y
}

impl RopeOps for Oracle {
    fn run_rope(&self, args: RopeArgs<'_, Self>) -> Result<()> {
        let (heads, head_dim) = (args.x.dims()[1], args.x.dims()[2]);
        let rotary_dim = args.table.rotary_dim();
        for (t, angles) in angles("rope", args.positions, args.table)?.iter().enumerate() {
            for h in 0..heads {
                let at = (t * heads + h) * head_dim + args.offset;
                let x = &floats(args.x)[at..][..rotary_dim];
                let y = rotate(x, angles, args.pairing, args.inverse);
                store(args.x, at, &y);
            }
        }
        Ok(())
    }

    fn run_mla_latent_write(&self, args: MlaLatentWriteArgs<'_, Self>) -> Result<()> {
        let width = args.x.columns();
        let rank = width - args.table.rotary_dim();
        let capacity = args.cache.dims()[1];
        let angles = angles("mla_latent_write", args.positions, args.table)?;
        for (t, angles) in angles.iter().enumerate() {
            let (c, k_pe) = floats(args.x)[t * width..][..width].split_at(rank);
            let mut row = match args.gamma {
                None => c.to_vec(),
                Some(gamma) => rms_normalized(c, args.eps).into_iter().zip(floats(gamma)).map(|(v, g)| v * g).collect(),
            };
            row.extend(rotate(k_pe, angles, args.pairing, false));
            let at = (args.sequence * capacity + args.start + t) * width;
            store(args.cache, at, &row);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, empty, ids, tensor};
    use super::*;
    use crate::Device;

    /// One pair of angles per position: position 1 turns pair 0 by 90 degrees and keeps pair 1.
    fn quarter_turn() -> RopeTable<Oracle> {
        RopeTable { cos: tensor(&[2, 2], &[1.0, 1.0, 0.0, 1.0]), sin: tensor(&[2, 2], &[0.0, 0.0, 1.0, 0.0]) }
    }

    fn rotated(pairing: Pairing, inverse: bool, position: u32) -> Result<Vec<f64>> {
        let oracle = Oracle::new();
        let table = quarter_turn();
        // Channel 0 and 5 lie outside the rotated part.
        let mut x = tensor(&[1, 1, 6], &[9.0, 1.0, 2.0, 3.0, 4.0, 8.0]);
        let positions = ids(&[1], &[position]);
        let args = RopeArgs { x: &mut x, positions: &positions, table: &table, pairing, offset: 1, inverse };
        oracle.rope(args)?;
        oracle.read_f64(&x)
    }

    #[test]
    fn pairings() {
        let turn = |pairing| rotated(pairing, false, 1).unwrap();
        assert_eq!(turn(Pairing::Interleaved), [9.0, -2.0, 1.0, 3.0, 4.0, 8.0]);
        assert_eq!(turn(Pairing::Half), [9.0, -3.0, 2.0, 1.0, 4.0, 8.0]);
        assert_eq!(turn(Pairing::InterleavedToHalf), [9.0, -2.0, 3.0, 1.0, 4.0, 8.0]);
        let back = rotated(Pairing::Interleaved, true, 1).unwrap();
        assert_eq!(back, [9.0, 2.0, -1.0, 3.0, 4.0, 8.0]);
        let still = rotated(Pairing::Half, false, 0).unwrap();
        assert_eq!(still, [9.0, 1.0, 2.0, 3.0, 4.0, 8.0]);
        assert!(rotated(Pairing::Half, false, 2).unwrap_err().to_string().contains("[0] is 2"));
    }

    #[test]
    fn latent_rows_land_in_their_slot() {
        let oracle = Oracle::new();
        let table = quarter_turn();
        let x = tensor(&[1, 6], &[3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
        let gamma = tensor(&[2], &[1.0, 2.0]);
        let mut cache = empty(&[2, 2, 6]);
        let positions = ids(&[1], &[1]);
        let args = MlaLatentWriteArgs {
            x: &x,
            gamma: Some(&gamma),
            eps: 0.5,
            positions: &positions,
            table: &table,
            pairing: Pairing::Interleaved,
            cache: &mut cache,
            sequence: 1,
            start: 1,
        };
        oracle.mla_latent_write(args).unwrap();
        let root = 13f64.sqrt();
        let mut expected = vec![0.0; 18];
        expected.extend([3.0 / root, 8.0 / root, -2.0, 1.0, 3.0, 4.0]);
        assert_close(&oracle.read_f64(&cache).unwrap(), &expected, 1e-15);
    }
}
