//! Memory and transfers.

use marlin_formats::DType;
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats_as, ids, poison_as, poison_ids};
use crate::random::Random;
use crate::tolerance::Tolerance;

/// Rows copied from the middle of a tensor.
struct CopyRowsCase {
    /// None: U32.
    dtype: Option<DType>,
    first: usize,
    count: usize,
    out_dtype: Option<DType>,
}

impl Case for CopyRowsCase {
    const OPERATION: &'static str = "copy_rows";

    fn configuration(&self) -> String {
        let dtype = self.dtype.map_or("U32", DType::name);
        format!("{dtype} rows {}..{} of 7x5", self.first, self.first + self.count)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let Some(dtype) = self.dtype else {
            let words: Vec<u32> = (0..35).map(|_| random.word()).collect();
            let source = ids(b, &[7, 5], &words)?;
            let mut out = poison_ids(b, &[self.count, 5])?;
            b.copy_rows(&source, self.first, self.count, &mut out)?;
            return Ok(vec![Output::words(b, "out", &out)?]);
        };
        let source = floats_as(b, dtype, &[7, 5], &random.normals(35))?;
        let mut out = poison_as(b, self.out_dtype.unwrap_or(dtype), &[self.count, 5])?;
        b.copy_rows(&source, self.first, self.count, &mut out)?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

/// Zeros, uploads and rewritten words.
struct TransferCase {
    /// Elements written to a U32 tensor of 6.
    written: usize,
}

impl Case for TransferCase {
    const OPERATION: &'static str = "transfer";

    fn configuration(&self) -> String {
        format!("zeros, f32, f16, bf16, {} words into 6", self.written)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let values = Random::of("transfer").normals(6);
        let mut outputs = Vec::new();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            outputs.push(Output::floats(b, "zeros", &b.zeros(dtype, &[2, 3])?)?);
            let tensor = floats_as(b, dtype, &[2, 3], &values)?;
            outputs.push(Output::floats(b, "uploaded", &tensor)?);
        }
        outputs.push(Output::words(b, "zeros", &b.zeros(DType::U32, &[6])?)?);
        let mut words = poison_ids(b, &[6])?;
        let new: Vec<u32> = (0..self.written as u32).map(|i| u32::MAX - i).collect();
        b.write_u32(&new, &mut words)?;
        outputs.push(Output::words(b, "written", &words)?);
        Ok(outputs)
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 8]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for written in [6, 4, 0] {
        runner.check(&TransferCase { written });
    }
    let case = |dtype, first, count| CopyRowsCase { dtype, first, count, out_dtype: None };
    for dtype in [Some(DType::F32), Some(DType::F16), Some(DType::BF16), None] {
        for (first, count) in [(0, 7), (2, 3), (6, 1), (7, 0)] {
            runner.check(&case(dtype, first, count));
        }
    }
    let f32 = Some(DType::F32);
    runner.refuse("rows beyond the end", &case(f32, 5, 3), Refusal::Shape("source"));
    runner.refuse("too many words", &TransferCase { written: 7 }, Refusal::Shape("tensor"));
}
