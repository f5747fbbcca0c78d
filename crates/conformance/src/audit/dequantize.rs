//! Decoded weights: every code in every slot, against scales and zero points that are hard to round.

use half::f16;
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::{Backend, Linear, Result, Weight};

use super::bind::Bound;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::Variants;
use crate::input::{Output, poison_as};
use crate::tolerance::Tolerance;

/// What codes and zero points mean in the row; the stored format may hold them in another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    /// As the format stores them.
    Stored,
    /// Codes of 4 bits minus 8, minus a zero point: zero points are stored 8 higher.
    S4,
    /// Signed codes minus a zero point: codes and zero points are stored 128 higher.
    S8,
    /// Codes minus 128: a zero point of 128.
    U8,
}

/// Scales of the columns: zero, the smallest, one, ordinary, large, the largest, and one whose products overflow f16.
fn scale(column: usize) -> f16 {
    const SCALES: [f32; 7] = [0.0, 5.960_464_5e-8, 1.0, 1.0 / 3.0, 1e4, 65504.0, 2e4];
    f16::from_f32(SCALES[column % SCALES.len()])
}

/// Zero points of the columns, as far as the format has them.
fn zero(column: usize, coding: Coding) -> f16 {
    const ZEROS: [f32; 9] = [0.0, 8.0, 15.0, 5.25, 5.5, 5.75, 8.75, -3.0, 200.0];
    // So that the nine meet the seven scales.
    let zero = ZEROS[column % ZEROS.len()];
    f16::from_f32(match coding {
        Coding::Stored => zero,
        Coding::S4 => zero + 8.0,
        Coding::S8 => zero + 128.0,
        Coding::U8 => 128.0,
    })
}

#[derive(Debug)]
struct DecodeCase {
    format: Format,
    coding: Coding,
    k: usize,
    n: usize,
    group_size: usize,
    order: WeightOrder,
    out: DType,
}

impl DecodeCase {
    fn matrix(&self) -> Result<QuantizedMatrix> {
        let scheme = Scheme::new(self.format, self.group_size)?;
        let layout = self.format.layout();
        let codes = 1usize << self.format.code_bits();
        let unit = layout.codes_per_unit();
        let mut words = vec![0; scheme.code_rows(self.k) * self.n];
        for n in 0..self.n {
            // Consecutive units are shifted by one, so that every slot of a unit meets every code.
            let code = |k: usize| (k + k / unit + n) % codes;
            let mut column: Vec<u8> = (0..self.k).map(|k| code(k) as u8).collect();
            if self.coding == Coding::S8 {
                column.iter_mut().for_each(|code| *code ^= 0x80);
            }
            // What lies in the padding does not count.
            column.resize(self.k.next_multiple_of(unit), (codes - 1) as u8);
            layout.store_column(&column, &mut words, self.n, n);
        }
        let groups = scheme.groups(self.k) * self.n;
        let column = |i: usize| i % self.n + i / self.n;
        Ok(QuantizedMatrix {
            scheme,
            in_features: self.k,
            out_features: self.n,
            codes: words,
            scales: (0..groups).map(|i| scale(column(i)).to_bits()).collect(),
            zeros: match self.format.has_zeros() {
                true => (0..groups).map(|i| zero(column(i), self.coding).to_bits()).collect(),
                false => Vec::new(),
            },
            super_scales: Vec::new(),
            super_minima: Vec::new(),
            tensor_scale: None,
        })
    }
}

impl AuditCase for DecodeCase {
    fn configuration(&self) -> String {
        let Self { format, coding, k, n, group_size, order, .. } = self;
        format!("{format}:g{group_size} {coding:?} K={k} N={n} {order:?} out={}", short(self.out))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let weight = Linear::new(b, Weight::quantized(self.matrix()?)?)?;
        let dims = match self.order {
            WeightOrder::InputMajor => [self.k, self.n],
            WeightOrder::OutputMajor => [self.n, self.k],
        };
        let mut out = poison_as(b, self.out, &dims)?;
        b.dequantize(DequantizeArgs { weight: &weight, first: 0, order: self.order, out: &mut out })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

/// Formats and codings of an operation's row.
fn formats(operation: &str, settings: &Settings<'_>) -> Vec<(Format, Coding)> {
    let stored = |format| vec![(format, Coding::Stored)];
    match operation {
        "dequant_fp4" => stored(Format::Fp4E2m1),
        "dequant_int4" => {
            let signs = settings.words("sign");
            let coding = |sign: &&str| if *sign == "s4" { Coding::S4 } else { Coding::Stored };
            let codings = if signs.is_empty() { vec![Coding::Stored] } else { signs.iter().map(coding).collect() };
            codings.into_iter().map(|coding| (Format::Int4U4, coding)).collect()
        }
        "dequant_int8" => {
            let modes = settings.words("mode");
            let all = vec!["sym_s8", "asym_s8", "sym_u8", "asym_u8"];
            let modes = if modes.is_empty() { all } else { modes };
            let format = |mode: &str| match mode {
                "sym_s8" => (Format::Int8, Coding::Stored),
                "asym_s8" => (Format::Int8Asym, Coding::S8),
                "sym_u8" => (Format::Int8Asym, Coding::U8),
                _ => (Format::Int8Asym, Coding::Stored),
            };
            modes.into_iter().map(format).collect()
        }
        _ => {
            let name = settings.word("format").expect("a format");
            stored(name.parse().unwrap_or_else(|_| unreachable!("no format is called `{name}`")))
        }
    }
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    let order = if settings.has("order") { WeightOrder::InputMajor } else { WeightOrder::OutputMajor };
    // A flat stream is one output; K-major words are what every format has; zero points are f16. Scales are always
    // applied, and every code is always there.
    let flat = settings.word("layout") == Some("flat");
    settings.implied(&["zeros", "codes", "scaled"]);
    let words = settings.count("words");
    let whole = settings.word("tail") == Some("none");
    let out = settings.element("out").unwrap_or(DType::F16);
    for (format, coding) in formats(operation, settings) {
        let unit = format.layout().codes_per_unit();
        let codes = 1usize << format.code_bits();
        let group = |size: usize| size.next_multiple_of(unit);
        let case = |k, n, group_size| DecodeCase { format, coding, k, n, group_size, order, out };
        if let Some(words) = words {
            let n = if flat { 1 } else { 7 };
            // A unit of 3-bit codes is three words.
            let k = words * unit;
            sink.check(&case(k, n, group(unit)));
            continue;
        }
        // All slots and codes, then tails of every length.
        let k = codes * unit;
        let n = if flat { 1 } else { 63 };
        sink.check(&case(k, n, group(32)));
        sink.check(&case(k, n, group(128)));
        if flat {
            sink.check(&case(4096, 1, group(8)));
        }
        if !whole {
            for tail in 1..unit {
                sink.check(&case(2 * unit + tail, n, group(32)));
            }
        }
    }
    Ok(())
}
