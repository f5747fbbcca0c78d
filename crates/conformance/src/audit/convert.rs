//! Float conversion: every 16-bit code, the edges of every rounding, counts beside a vector.

use std::sync::Arc;

use marlin_formats::DType;
use marlin_ops::{Backend, HostTensor, Result};

use super::bind::Bound;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::Variants;
use crate::convert::edges;
use crate::input::{Output, poison_as};
use crate::tolerance::Tolerance;

/// There, and back where the row says so.
#[derive(Debug)]
struct ConvertCase {
    from: DType,
    to: DType,
    back: Option<DType>,
    /// The first values of the list, or all.
    count: Option<usize>,
    toward_zero: bool,
}

impl ConvertCase {
    fn host(&self) -> Result<HostTensor> {
        let size = self.from.size_in_bytes();
        let bytes: Vec<u8> = match self.from {
            DType::F32 => edges().into_iter().flat_map(u32::to_le_bytes).collect(),
            _ => (0..1u32 << 16).flat_map(|bits| bits.to_le_bytes()[..size].to_vec()).collect(),
        };
        let count = self.count.unwrap_or(bytes.len() / size);
        HostTensor::new(self.from, &[count], Arc::new(bytes[..count * size].to_vec()), 0)
    }
}

impl AuditCase for ConvertCase {
    fn configuration(&self) -> String {
        let back = self.back.map_or(String::new(), |back| format!(" to {}", short(back)));
        let count = self.count.map_or("every code".to_owned(), |count| format!("{count} values"));
        let rounding = if self.toward_zero { " toward zero" } else { "" };
        format!("{} to {}{back}, {count}{rounding}", short(self.from), short(self.to))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let x = b.upload(&self.host()?)?;
        let mut out = poison_as(b, self.to, &[x.columns()])?;
        match self.toward_zero {
            true => variants.convert_toward_zero(b, &x, &mut out)?,
            false => b.convert(&x, &mut out)?,
        }
        let mut outputs = vec![Output::floats(b, "out", &out)?];
        if let Some(dtype) = self.back {
            let mut back = poison_as(b, dtype, &[x.columns()])?;
            b.convert(&out, &mut back)?;
            outputs.push(Output::floats(b, "back", &back)?);
        }
        Ok(outputs)
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Bits; 1 + usize::from(self.back.is_some())]
    }

    fn needs_variants(&self) -> bool {
        self.toward_zero
    }
}

pub(crate) fn bind<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    // A round trip that is right to the bit has no error to report.
    settings.implied(&["report"]);
    let (from, to) = (settings.element("from").expect("a type"), settings.element("to").expect("a type"));
    let back = settings.element("back");
    let mut roundings = settings.words("rounding");
    if roundings.is_empty() {
        roundings.push("rne");
    }
    for rounding in roundings {
        for count in [None, Some(1), Some(3), Some(4), Some(1001)] {
            sink.check(&ConvertCase { from, to, back, count, toward_zero: rounding == "rtz" });
        }
    }
    Ok(())
}
