//! Float conversion: every 16-bit code, ties and edges.

use marlin_formats::DType;
use marlin_ops::{Backend, HostTensor, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, poison_as};
use crate::tolerance::Tolerance;

/// Values to convert.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// All 65,536 codes of the type.
    AllCodes,
    /// f32 values around every rounding decision of the target.
    Edges,
    /// This many consecutive values.
    Count(usize),
}

struct ConvertCase {
    from: DType,
    to: DType,
    source: Source,
    out_columns: Option<usize>,
}

/// f32 bit patterns: every exponent with mantissas at, below and above the ties of f16 and bf16.
pub(crate) fn edges() -> Vec<u32> {
    let mantissas = [
        0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000,
        0x18001, 0x40_0000, 0x7F_EFFF, 0x7F_F000, 0x7F_7FFF, 0x7F_8000, 0x7F_FFFF,
    ];
    let listed = [0x7F80_0001, 0xFF80_0001, 0x7FC0_0000, 0x7FA1_2345, 0x477F_EFFF, 0x477F_F000];
    (0..=255u32)
        .flat_map(|exponent| mantissas.map(|m| exponent << 23 | m))
        .chain(listed)
        .flat_map(|bits| [bits, bits | 1 << 31])
        .collect()
}

impl ConvertCase {
    fn host(&self) -> Result<HostTensor> {
        let codes = |count: u32, size: usize| -> Vec<u8> {
            (0..count).flat_map(|bits| bits.to_le_bytes()[..size].to_vec()).collect()
        };
        let size = self.from.size_in_bytes();
        let bytes: Vec<u8> = match self.source {
            Source::AllCodes => codes(1 << 16, size),
            Source::Edges => edges().into_iter().flat_map(u32::to_le_bytes).collect(),
            Source::Count(count) => codes(count as u32, size),
        };
        let count = bytes.len() / size;
        HostTensor::new(self.from, &[count], std::sync::Arc::new(bytes), 0)
    }
}

impl Case for ConvertCase {
    const OPERATION: &'static str = "convert";

    fn configuration(&self) -> String {
        format!("{} to {} {:?}", self.from.name(), self.to.name(), self.source)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let x = b.upload(&self.host()?)?;
        let mut out = poison_as(b, self.to, &[self.out_columns.unwrap_or(x.columns())])?;
        b.convert(&x, &mut out)?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Bits]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let case = |from, to, source| ConvertCase { from, to, source, out_columns: None };
    let types = [DType::F32, DType::F16, DType::BF16];
    for (from, to) in types.into_iter().flat_map(|from| types.map(|to| (from, to))) {
        if from == DType::F32 {
            runner.check(&case(from, to, Source::Edges));
        } else {
            runner.check(&case(from, to, Source::AllCodes));
        }
        for count in 0..10 {
            runner.check(&case(from, to, Source::Count(count)));
        }
    }
    let bad = ConvertCase { out_columns: Some(3), ..case(DType::F32, DType::F16, Source::Count(4)) };
    runner.refuse("out of another shape", &bad, Refusal::Shape("out"));
}
