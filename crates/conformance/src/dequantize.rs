//! Weights decoded to floats: every format, every code, tails of K, zero points, both orders.

use marlin_formats::{DType, Format};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::{Backend, Linear, Result, Weight};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, ids, poison_as};
use crate::random::Random;
use crate::tolerance::Tolerance;
use crate::weight::{DENSE, Scales, Storage, all_codes, group_sizes, random_weight};

#[derive(Clone, Copy)]
struct DequantizeCase {
    storage: Storage,
    /// Every code in every slot, instead of `n` random features.
    all_codes: bool,
    scales: Scales,
    n: usize,
    k: usize,
    dtype: DType,
    order: WeightOrder,
    /// Features `first .. first + count`; all when absent.
    part: Option<(usize, usize)>,
    surplus_rows: usize,
    out_words: bool,
}

const CASE: DequantizeCase = DequantizeCase {
    storage: Storage::Dense(DType::F32),
    all_codes: false,
    scales: Scales::Usual,
    n: 5,
    k: 130,
    dtype: DType::F32,
    order: WeightOrder::OutputMajor,
    part: None,
    surplus_rows: 0,
    out_words: false,
};

impl DequantizeCase {
    fn weight(&self) -> Result<Weight> {
        let random = &mut Random::of(&self.configuration());
        match self.storage {
            Storage::Quantized(format, _) if self.all_codes => all_codes(format, self.k, random),
            storage => random_weight(storage, self.n, self.k, self.scales, random),
        }
    }
}

impl Case for DequantizeCase {
    const OPERATION: &'static str = "dequantize";

    fn configuration(&self) -> String {
        let Self { storage, n, k, dtype, order, scales, .. } = self;
        let mut text = format!("{storage} N={n} K={k} {order:?} {}", dtype.name());
        if *scales != Scales::Usual {
            text += &format!(" scales={scales:?}");
        }
        if self.all_codes {
            text += " all codes";
        }
        if let Some((first, count)) = self.part {
            text += &format!(" features {first}..{}", first + count);
        }
        text
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let weight = Linear::new(b, self.weight()?)?;
        let (first, count) = self.part.unwrap_or((0, weight.out_features()));
        let k = weight.in_features() + self.surplus_rows;
        let dims = match self.order {
            WeightOrder::OutputMajor => [count, k],
            WeightOrder::InputMajor => [k, count],
        };
        let mut out = match self.out_words {
            true => ids(b, &dims, &vec![0; count * k])?,
            false => poison_as(b, self.dtype, &dims)?,
        };
        b.dequantize(DequantizeArgs { weight: &weight, first, order: self.order, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Bits]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    const ORDERS: [WeightOrder; 2] = [WeightOrder::OutputMajor, WeightOrder::InputMajor];
    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let formats = Format::ALL.into_iter().map(|format| Storage::Quantized(format, group_sizes(format)[0]));
    let grids = (2..=8).map(|bits| Storage::Grid(bits, 32));
    for storage in DENSE.into_iter().chain(formats).chain(grids) {
        for order in ORDERS {
            for dtype in DTYPES {
                runner.check(&DequantizeCase { storage, order, dtype, ..CASE });
            }
        }
        // Tails of every length; features from the middle of the matrix.
        for k in [1, 2, 7, 31, 33, 65, 128] {
            runner.check(&DequantizeCase { storage, k, n: 3, ..CASE });
        }
        for (i, part) in [(0, 1), (3, 17), (127, 3), (130, 0)].into_iter().enumerate() {
            runner.check(&DequantizeCase { storage, n: 130, k: 65, order: ORDERS[i % 2], part: Some(part), ..CASE });
        }
    }
    for format in Format::ALL {
        for dtype in [DType::F32, DType::F16] {
            let storage = Storage::Quantized(format, group_sizes(format)[0]);
            runner.check(&DequantizeCase { storage, all_codes: true, k: 128, dtype, ..CASE });
            for scales in [Scales::SomeZero, Scales::Large, Scales::Tiny] {
                runner.check(&DequantizeCase { storage, scales, dtype, ..CASE });
            }
        }
        for group_size in group_sizes(format) {
            let case = DequantizeCase { storage: Storage::Quantized(format, group_size), n: 7, k: 300, ..CASE };
            runner.check(&DequantizeCase { order: WeightOrder::InputMajor, ..case });
        }
    }
    for bits in 2..=8 {
        for scales in [Scales::SomeZero, Scales::Large, Scales::Tiny] {
            runner.check(&DequantizeCase { storage: Storage::Grid(bits, 64), scales, n: 20, k: 300, ..CASE });
        }
    }
    bad_arguments(runner);
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    for order in [WeightOrder::OutputMajor, WeightOrder::InputMajor] {
        let case = DequantizeCase { order, ..CASE };
        let surplus = DequantizeCase { surplus_rows: 1, ..case };
        runner.refuse(&format!("{order:?} with K + 1"), &surplus, Refusal::Shape("out"));
        let beyond = DequantizeCase { part: Some((3, 3)), ..case };
        runner.refuse(&format!("{order:?} beyond the last feature"), &beyond, Refusal::Value("first"));
    }
    let ordered = DequantizeCase { storage: Storage::Ordered(Format::Int4S4, 32, 0), ..CASE };
    runner.refuse("rows in an order of their own", &ordered, Refusal::Value("weight"));
    let words = DequantizeCase { out_words: true, ..CASE };
    runner.refuse("U32 output", &words, Refusal::DType("out"));
}
