//! Rows of x in shared memory, and their products with a plane's operands of 32 columns: what kernels for many rows have
//! in common, however their weights are stored.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::fragment::pair_up;

/// Rows of x in shared memory: `[stage, step, part, row, 4]` vectors of eight 16-bit values. A step is 32 input features.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(in crate::linear) struct Stage {
    pub(in crate::linear) rows: usize,
    /// Parts whose sum x is.
    pub(in crate::linear) parts: usize,
    /// Steps of a stage.
    pub(in crate::linear) steps: usize,
    /// Units that fill it.
    pub(in crate::linear) units: usize,
    /// Vectors are permuted by [`pair_up`].
    pub(in crate::linear) paired: bool,
}

impl Stage {
    /// Vectors of a step that a unit stages.
    pub(in crate::linear) const fn own(self) -> usize {
        self.step_vectors() / self.units
    }

    /// Vectors of a step.
    pub(in crate::linear) const fn step_vectors(self) -> usize {
        4 * self.rows * self.parts
    }

    /// Vectors of a stage.
    pub(in crate::linear) const fn vectors(self) -> usize {
        self.step_vectors() * self.steps
    }
}

/// The row of the cube that vector `i` of a unit's belongs to.
#[cube]
pub(in crate::linear) fn row_of(stager: usize, #[comptime] i: usize, #[comptime] s: Stage) -> usize {
    (stager + comptime!(i * s.units)) / 4 % comptime!(s.rows)
}

/// The rows that a unit's vectors belong to, of a cube that has those from `first` on, which are not all before `end`.
#[cube]
pub(in crate::linear) fn rows_from(stager: usize, first: usize, end: usize, #[comptime] s: Stage) -> Array<usize> {
    let mut rows = Array::<usize>::new(comptime!(s.own()));
    let last = end - 1;
    #[unroll]
    for i in 0..comptime!(s.own()) {
        let wanted = first + row_of(stager, i, s);
        // Rows beyond the last are computed from the last and not written.
        rows[i] = select(wanted < last, wanted, last);
    }
    rows
}

/// Where the rows begin whose vectors a unit stages, counted in vectors of x, `[parts, M, K / 8]`.
#[cube]
pub(in crate::linear) fn first_vectors(
    stager: usize,
    rows: &Array<usize>,
    m: u32,
    k: u32,
    #[comptime] s: Stage,
) -> Array<usize> {
    let mut first = Array::<usize>::new(comptime!(s.own()));
    #[unroll]
    for i in 0..comptime!(s.own()) {
        let e = stager + comptime!(i * s.units);
        first[i] = (e / comptime!(4 * s.rows) * m as usize + rows[i]) * (k as usize / 8) + e % 4;
    }
    first
}

/// Loads a unit's vectors of a step.
#[cube]
pub(in crate::linear) fn load_x(
    x: &[Vector<u32, Const<4>>],
    xv: &mut Array<Vector<u32, Const<4>>>,
    first: &Array<usize>,
    stage: usize,
    #[comptime] step: usize,
    #[comptime] s: Stage,
) {
    let at = stage * comptime!(4 * s.steps) + comptime!(4 * step);
    #[unroll]
    for i in 0..comptime!(s.own()) {
        xv[i] = x[first[i] + at];
    }
}

/// Writes a unit's vectors of a step.
#[cube]
pub(in crate::linear) fn store_x(
    shared: &mut Shared<[Vector<u32, Const<4>>]>,
    xv: &Array<Vector<u32, Const<4>>>,
    buffer: usize,
    stager: usize,
    #[comptime] step: usize,
    #[comptime] s: Stage,
) {
    let first = buffer * comptime!(s.vectors()) + comptime!(s.step_vectors() * step) + stager;
    #[unroll]
    for i in 0..comptime!(s.own()) {
        let vector = if comptime!(s.paired) { pair_up(xv[i]) } else { xv[i] };
        shared[first + comptime!(i * s.units)] = vector;
    }
}

/// Sums of a lane: [row block, product], each [half] pairs of rows.
#[cube]
pub(in crate::linear) fn zero_sums(#[comptime] row_blocks: usize) -> Sequence<Array<Vector<f32, Const<2>>>> {
    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _i in 0..comptime!(2 * row_blocks) {
        let mut zero = Array::<Vector<f32, Const<2>>>::new(2usize);
        zero[0] = Vector::<f32, Const<2>>::new(0.0);
        zero[1] = Vector::<f32, Const<2>>::new(0.0);
        sums.push(zero);
    }
    sums
}

/// Multiplies the rows of a part of a staged step with a lane's operands: [product, half of the step].
#[cube]
pub(in crate::linear) fn multiply_step<F: Float>(
    shared: &Shared<[Vector<u32, Const<4>>]>,
    sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    weights: &Sequence<Array<Vector<F, Const<2>>>>,
    from: usize,
    #[comptime] row_blocks: usize,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    // Two row blocks in turn, so that products that add to the same sum are four apart.
    #[unroll]
    for pair in 0..comptime!(row_blocks / 2) {
        let mut inputs = Sequence::<Array<Vector<F, Const<2>>>>::new();
        #[unroll]
        for b in 0..2usize {
            let pairs = shared[from + comptime!(32 * (2 * pair + b))];
            #[unroll]
            for u in 0..2usize {
                let mut input = Array::<Vector<F, Const<2>>>::new(2usize);
                input[0] = Vector::<F, Const<2>>::reinterpret(pairs.extract(comptime!(2 * u)));
                input[1] = Vector::<F, Const<2>>::reinterpret(pairs.extract(comptime!(2 * u + 1)));
                inputs.push(input);
            }
        }
        #[unroll]
        for u in 0..2usize {
            #[unroll]
            for b in 0..2usize {
                #[unroll]
                for h in 0..2usize {
                    let sum = sums.index_mut(comptime!((2 * pair + b) * 2 + h));
                    mma.execute_inplace(weights.index(comptime!(2 * h + u)), inputs.index(comptime!(2 * b + u)), sum);
                }
            }
        }
    }
}
