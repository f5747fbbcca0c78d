//! `--format` and `--bits`.

use std::fmt;

use anyhow::{Result, bail};
use marlin_formats::Format;

/// `--format`: a format, a family that `--bits` chooses from, or EXL3.
#[derive(Clone, Debug)]
pub(super) enum FormatChoice {
    Format(Format),
    Family { name: String, members: &'static [Format] },
    Exl3,
}

impl fmt::Display for FormatChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(format) => format.fmt(f),
            Self::Family { name, .. } => name.fmt(f),
            Self::Exl3 => "exl3".fmt(f),
        }
    }
}

/// What `--format` and `--bits` agree on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Choice {
    /// One format for every module.
    Format(Format),
    /// Several formats of a family with this many bits on average.
    Mixed { members: &'static [Format], bits: f64 },
    /// EXL3 at this many bits on average.
    Exl3 { bits: f64 },
}

/// The formats that `--bits` chooses from, by family.
const FAMILIES: [(&str, &[Format]); 3] = [
    ("int", &[Format::Int2, Format::Int3, Format::Int4S4, Format::Int8]),
    ("nf", &[Format::Nf2, Format::Nf3, Format::Nf4]),
    ("fp", &[Format::Fp4E2m1, Format::Fp8E4m3]),
];

pub(super) fn format_choice(text: &str) -> Result<FormatChoice, String> {
    if text == "exl3" {
        return Ok(FormatChoice::Exl3);
    }
    if let Some((name, members)) = FAMILIES.iter().find(|(name, _)| *name == text) {
        return Ok(FormatChoice::Family { name: (*name).to_owned(), members });
    }
    text.parse().map(FormatChoice::Format).map_err(|error| format!("{error}; or int, nf, fp or exl3 with --bits"))
}

/// A bit rate above 0.
pub(super) fn bits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("must be a number above 0".into()),
    }
}

/// `--head-bits`: 1 to 8, or 16 for a head that stays as stored.
pub(super) fn head_bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits @ (1..=8 | 16)) => Ok(bits),
        _ => Err("must be 1 to 8, or 16 to leave the head as stored".into()),
    }
}

pub(super) fn damping(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("must be in [0, 1]".into()),
    }
}

impl FormatChoice {
    /// The one thing that the choice and `--bits` agree on.
    pub(super) fn resolve(&self, bits: Option<f64>) -> Result<Choice> {
        match (self, bits) {
            (Self::Format(format), None) => Ok(Choice::Format(*format)),
            (Self::Format(format), Some(bits)) if f64::from(format.code_bits()) == bits => Ok(Choice::Format(*format)),
            (Self::Format(format), Some(bits)) => {
                bail!("--format {format} has {} bits, not --bits {bits}", format.code_bits())
            }
            (Self::Exl3, Some(bits)) if (1.0..=8.0).contains(&bits) => Ok(Choice::Exl3 { bits }),
            (Self::Exl3, _) => bail!("--format exl3 needs --bits, from 1 to 8; 3.5 is possible too"),
            (Self::Family { name, members }, bits) => {
                let found = members.iter().find(|format| bits == Some(f64::from(format.code_bits())));
                let widths = || members.iter().map(|format| format.code_bits());
                match (found, bits) {
                    (Some(&format), _) => Ok(Choice::Format(format)),
                    (None, Some(bits))
                        if bits.fract() != 0.0
                            && widths().any(|width| f64::from(width) < bits)
                            && widths().any(|width| f64::from(width) > bits) =>
                    {
                        Ok(Choice::Mixed { members, bits })
                    }
                    _ => {
                        let valid: Vec<String> = widths().map(|width| width.to_string()).collect();
                        bail!("--format {name} needs --bits, one of {}, or a fraction between them", valid.join(", "))
                    }
                }
            }
        }
    }
}
