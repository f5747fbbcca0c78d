//! Weights with their rows in an order of their own, alone and beside others.

use super::*;

/// Formats of every width, with scales of both sizes.
const FORMATS: [(Format, usize); 7] = [
    (Format::Int4S4, 32),
    (Format::Int4U4, 128),
    (Format::Int3U3, 64),
    (Format::Int2U2, 32),
    (Format::Int8, 32),
    (Format::Affine4, 64),
    (Format::Affine6, 32),
];

pub(super) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let ordered = |(format, group_size), order| Storage::Ordered(format, group_size, order);
    for format in FORMATS {
        let storage = ordered(format, 0);
        for m in [1, 3, 17, 130] {
            runner.check(&LinearCase { m, storage, ..LINEAR });
        }
        // One-hot rows: every weight by itself, so every channel at its place.
        runner.check(&LinearCase { m: 70, k: 70, n: 40, storage, input: Input::OneHot, ..LINEAR });
        for m in [1, 9] {
            for other in [storage, ordered(format, 1), Storage::Quantized(format.0, format.1), DENSE[1]] {
                runner.check(&GatedUpCase { m, k: 200, gate: storage, up: other, ..GATED_UP });
                runner.check(&GatedUpCase { m, k: 200, gate: other, up: storage, norm: true, ..GATED_UP });
                let weights = vec![(storage, 65), (storage, 16), (other, 33), (storage, 7)];
                runner.check(&ProjectionsCase { weights, ..ProjectionsCase::new(m, storage) });
            }
        }
    }
    let int4 = ordered(FORMATS[0], 0);
    let epilogue = LinearCase { bias: true, activation: Activation::Silu, out_scale: 0.7, ..LINEAR };
    for m in [1, 9, 70] {
        runner.check(&LinearCase { m, storage: int4, residual: Add::InPlace, ..epilogue });
        runner.check(&LinearCase { m: m + 1, storage: int4, input: Input::One(f32::NAN), ..LINEAR });
    }
    // Rows and columns that tensor cores take.
    for m in [9, 130] {
        runner.check(&LinearCase { m, k: 384, n: 96, storage: int4, ..LINEAR });
        for other in [int4, ordered(FORMATS[0], 1)] {
            runner.check(&GatedUpCase { m, k: 384, n: 96, gate: int4, up: other, norm: true, ..GATED_UP });
            let weights = vec![(int4, 96), (other, 32), (int4, 64)];
            runner.check(&ProjectionsCase { k: 384, weights, ..ProjectionsCase::new(m, int4) });
        }
    }
    for dtype in runner.half_dtypes() {
        for m in [1, 9, 40, 130] {
            runner.check(&LinearCase { m, k: 384, n: 96, storage: int4, dtypes: (dtype, dtype), ..LINEAR });
        }
    }
    runner.refuse("a table in an order of its own", &EmbeddingCase::new(int4, 96), Refusal::Value("table"));
}
