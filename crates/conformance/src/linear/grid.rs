//! Grid codes: every rate, K and N that are not whole tiles, signs, both grids, epilogues, products of different rates.

use super::*;

/// Every rate, its group sizes in turn.
fn storages(index: usize) -> impl Iterator<Item = Storage> {
    (2..=8).map(move |bits| Storage::Grid(bits, [32, 128, 64, 96][(index + bits as usize) % 4]))
}

pub(super) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let sizes = [(1, 256, 128), (2, 33, 65), (3, 1, 1), (4, 129, 16), (5, 31, 17), (9, 200, 33), (33, 384, 129)];
    for (index, (m, k, n)) in sizes.into_iter().enumerate() {
        for storage in storages(index) {
            runner.check(&LinearCase { m, k, n, storage, ..LINEAR });
        }
    }
    for storage in storages(0) {
        // One-hot rows: every weight of a tile and its neighbours by itself.
        runner.check(&LinearCase { m: 70, k: 70, n: 40, storage, input: Input::OneHot, ..LINEAR });
        for (scales, m) in [(Scales::SomeZero, 1), (Scales::Large, 5), (Scales::Tiny, 33)] {
            runner.check(&LinearCase { m, storage, scales, ..LINEAR });
        }
        for m in [2, 9] {
            runner.check(&LinearCase { m, storage, input: Input::One(f32::NAN), ..LINEAR });
            let epilogue = LinearCase { bias: true, activation: Activation::Silu, out_scale: 0.7, ..LINEAR };
            runner.check(&LinearCase { m, storage, residual: Add::InPlace, ..epilogue });
            runner.check(&ProjectionsCase::new(m, storage));
        }
        runner.check(&EmbeddingCase::new(storage, 129));
    }
    for dtype in runner.half_dtypes() {
        for (m, storage) in [1, 5, 20, 130, 64, 9, 3].into_iter().zip(storages(1)) {
            runner.check(&LinearCase { m, k: 256, n: 64, storage, dtypes: (dtype, dtype), ..LINEAR });
        }
    }
    let int4 = Storage::Quantized(Format::Int4S4, 32);
    let grid = |bits| Storage::Grid(bits, 64);
    for (gate, up) in [(grid(4), grid(4)), (grid(3), grid(2)), (grid(6), int4), (DENSE[1], grid(5)), (grid(8), grid(7))]
    {
        for m in [1, 5, 33] {
            runner.check(&GatedUpCase { m, gate, up, bias: m == 5, ..GATED_UP });
        }
    }
}
