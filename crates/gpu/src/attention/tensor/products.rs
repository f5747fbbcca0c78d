//! The two products, of queries with keys and of probabilities with values.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::stage::place;
use super::{Fragments, LIFT, LaneRows, Pair, Sums, Words, lane_row, zeros};
use crate::attention::flash::FlashConfig;
use crate::halves::{pair, rest};
use crate::linear::exl3::rotate::LANES;

/// The operands of the plane's queries in a step: [part, half of the step].
#[cube]
pub(super) fn query_operands<F: Float>(
    queries: &Shared<[Words]>,
    #[comptime] step: usize,
    #[comptime] f: Fragments,
) -> Sequence<Array<Pair<F>>> {
    let row = lane_row();
    let column = UNIT_POS as usize % 4usize + comptime!(4 * step);
    let mut out = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for part in 0..comptime!(f.row_parts) {
        let near = queries[place(comptime!(part * f.rows()) + row, column, f)];
        let far = queries[place(comptime!(part * f.rows() + 8) + row, column, f)];
        #[unroll]
        for u in 0..2usize {
            let mut operand = Array::<Pair<F>>::new(4usize);
            operand[0] = Pair::<F>::reinterpret(near.extract(comptime!(2 * u)));
            operand[1] = Pair::<F>::reinterpret(far.extract(comptime!(2 * u)));
            operand[2] = Pair::<F>::reinterpret(near.extract(comptime!(2 * u + 1)));
            operand[3] = Pair::<F>::reinterpret(far.extract(comptime!(2 * u + 1)));
            out.push(operand);
        }
    }
    out
}

/// Adds the operands of a lane's words of eight keys: [half of the step].
#[cube]
pub(super) fn push_operands<F: Float>(operands: &mut Sequence<Array<Pair<F>>>, words: Words) {
    #[unroll]
    for u in 0..2usize {
        let mut operand = Array::<Pair<F>>::new(2usize);
        operand[0] = Pair::<F>::reinterpret(words.extract(comptime!(2 * u)));
        operand[1] = Pair::<F>::reinterpret(words.extract(comptime!(2 * u + 1)));
        operands.push(operand);
    }
}

/// Adds the products of a step with `blocks` blocks of eight keys, [block, part, half of the step], to their scores, the
/// first of which is `first`. Blocks take turns, so that products that add to the same sum are apart.
#[cube]
pub(super) fn multiply_blocks<F: Float>(
    lefts: &Sequence<Array<Pair<F>>>,
    rights: &Sequence<Array<Pair<F>>>,
    scores: &mut Sums,
    #[comptime] first: usize,
    #[comptime] blocks: usize,
    #[comptime] f: Fragments,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for u in 0..2usize {
        #[unroll]
        for a in 0..comptime!(f.row_parts) {
            #[unroll]
            for b in 0..comptime!(f.cache_parts) {
                // The product of two rests is less than what is lost anyway.
                if comptime!(a + b < 2) {
                    #[unroll]
                    for j in 0..blocks {
                        let left = lefts.index(comptime!(2 * a + u));
                        let right = rights.index(comptime!((j * f.cache_parts + b) * 2 + u));
                        mma.execute_inplace(left, right, scores.index_mut(comptime!(first + j)));
                    }
                }
            }
        }
    }
}

/// Products of the plane's queries and all keys of the tile, added to `scores`.
#[cube]
pub(super) fn multiply_keys<F: Float>(
    queries: &Shared<[Words]>,
    keys: &Shared<[Words]>,
    scores: &mut Sums,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let tile = comptime!(c.kernel.kv_tile);
    let lane = UNIT_POS as usize % LANES;
    #[unroll]
    for step in 0..comptime!(f.key_steps) {
        let lefts = query_operands::<F>(queries, step, f);
        let column = lane % 4usize + comptime!(4 * step);
        #[unroll]
        for four in 0..comptime!(tile / 32) {
            let mut rights = Sequence::<Array<Pair<F>>>::new();
            #[unroll]
            for j in 0..4usize {
                #[unroll]
                for part in 0..comptime!(f.cache_parts) {
                    let key = comptime!(part * tile + 32 * four + 8 * j) + lane / 4usize;
                    push_operands::<F>(&mut rights, keys[place(key, column, f)]);
                }
            }
            multiply_blocks::<F>(&lefts, &rights, scores, comptime!(4 * four), 4usize, f);
        }
    }
}

/// The operands of the probabilities: [part, sixteen keys].
#[cube]
fn weights<F: Float>(scores: &Sums, #[comptime] c: FlashConfig, #[comptime] f: Fragments) -> Sequence<Array<Pair<F>>> {
    let lift = comptime!(if f.bf16 { 1.0 } else { LIFT });
    let mut out = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for part in 0..comptime!(f.row_parts) {
        #[unroll]
        for sixteen in 0..comptime!(c.kernel.kv_tile / 16) {
            let mut operand = Array::<Pair<F>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                let block = scores.index(comptime!(2 * sixteen + i / 2));
                let two = block[comptime!(i % 2)] * Vector::<f32, Const<2>>::new(lift);
                let (a, b) = (two.extract(0usize), two.extract(1usize));
                operand[i] = if comptime!(part == 0) { pair::<F>(a, b) } else { pair::<F>(rest::<F>(a), rest::<F>(b)) };
            }
            out.push(operand);
        }
    }
    out
}

/// Adds the tile's values, weighted. The products of a tile begin at 0 and are added in f32: tensor cores cut off what
/// they add to a sum.
#[cube]
pub(super) fn add_values<F: Float>(
    values: &Shared<[Vector<F, Const<8>>]>,
    scores: &Sums,
    total: &mut Sums,
    rows: &mut LaneRows,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let tile = comptime!(c.kernel.kv_tile);
    let lefts = weights::<F>(scores, c, f);
    let lane = UNIT_POS as usize % LANES;
    // Addresses of four matrices of eight keys and eight columns: two of keys, then those of the next columns.
    let key = lane % 16usize;
    let column = lane / 16usize;
    #[unroll]
    for step in 0..comptime!(f.value_steps) {
        let mut fresh = zeros(4usize);
        #[unroll]
        for sixteen in 0..comptime!(tile / 16) {
            #[unroll]
            for b in 0..comptime!(f.cache_parts) {
                // [block of eight columns]
                let mut rights = Sequence::<Array<Pair<F>>>::new();
                #[unroll]
                for two in 0..2usize {
                    let at = (comptime!(b * tile + 16 * sixteen) + key) * comptime!(f.value_pitch())
                        + column
                        + comptime!(4 * step + 2 * two);
                    let matrices = mma.load_matrix::<Vector<F, Const<8>>, Const<2>>(
                        &values[at..at + 1],
                        MatrixIdent::B,
                        4usize,
                        true,
                    );
                    #[unroll]
                    for i in 0..2usize {
                        let mut right = Array::<Pair<F>>::new(2usize);
                        right[0] = matrices[comptime!(2 * i)];
                        right[1] = matrices[comptime!(2 * i + 1)];
                        rights.push(right);
                    }
                }
                #[unroll]
                for a in 0..comptime!(f.row_parts) {
                    if comptime!(a + b < 2) {
                        #[unroll]
                        for j in 0..4usize {
                            let left = lefts.index(comptime!(a * (tile / 16) + sixteen));
                            mma.execute_inplace(left, rights.index(j), fresh.index_mut(j));
                        }
                    }
                }
            }
        }
        #[unroll]
        for j in 0..4usize {
            let sum = total.index_mut(comptime!(4 * step + j));
            let new = fresh.index(j);
            #[unroll]
            for half in 0..2usize {
                sum[half] = fma(sum[half], Vector::<f32, Const<2>>::new(rows.factor[half]), new[half]);
            }
        }
    }
}
