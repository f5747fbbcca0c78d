//! Names, sizes and group rules of formats, schemes and element types.

use std::collections::HashSet;

use marlin_formats::{DType, Format, FormatError, ScaleKind, Scheme};

#[test]
fn names_round_trip_and_follow_the_document() {
    let names = [
        "fp4_e2m1",
        "nvfp4",
        "mxfp4",
        "int4_u4",
        "int4_s4",
        "int8",
        "int8_asym",
        "fp8_e4m3",
        "fp8_e5m2",
        "int3",
        "int2",
        "nf4",
        "nf3",
        "nf2",
    ];
    assert_eq!(Format::ENCODABLE.map(Format::name), names);
    for format in Format::ALL {
        assert_eq!(format.name().parse::<Format>().unwrap(), format);
        assert_eq!(format.to_string(), format.name());
    }
    assert_eq!(Format::ALL.iter().collect::<HashSet<_>>().len(), 33);
}

#[test]
fn aliases() {
    for (alias, format) in
        [("fp4", Format::Fp4E2m1), ("int4", Format::Int4S4), ("int4_asym", Format::Int4U4), ("fp8", Format::Fp8E4m3)]
    {
        assert_eq!(alias.parse::<Format>().unwrap(), format);
    }
}

#[test]
fn an_unknown_name_is_answered_with_every_valid_one() {
    let error = "q7_k".parse::<Format>().unwrap_err();
    assert_eq!(error, FormatError::UnknownFormat { name: "q7_k".to_owned() });
    let message = error.to_string();
    assert!(message.contains("`q7_k`"), "{message}");
    for format in Format::ALL {
        assert!(message.contains(&format!(" {}", format.name())), "{message}");
    }
    for name in ["", "FP4", "nvfp4 ", "int5"] {
        assert!(name.parse::<Format>().is_err(), "{name:?}");
    }
}

#[test]
fn code_widths_zeros_and_scale_kinds() {
    use Format::*;
    for format in Format::ENCODABLE {
        let bits = match format {
            Int2 | Nf2 => 2,
            Int3 | Nf3 => 3,
            Fp4E2m1 | Nvfp4 | Mxfp4 | Int4U4 | Int4S4 | Nf4 => 4,
            _ => 8,
        };
        assert_eq!(format.code_bits(), bits, "{format}");
        assert_eq!(format.has_zeros(), matches!(format, Int4U4 | Int8Asym), "{format}");
        let kind = match format {
            Nvfp4 => ScaleKind::E4m3,
            Mxfp4 => ScaleKind::E8m0,
            _ => ScaleKind::F16,
        };
        assert_eq!(format.scale_kind(), kind, "{format}");
    }
}

#[test]
fn default_group_sizes_are_valid() {
    for format in Format::ENCODABLE {
        let expected = match format {
            Format::Nvfp4 => 16,
            Format::Mxfp4 => 32,
            Format::Nf4 => 64,
            _ => 128,
        };
        assert_eq!(format.default_group_size(), expected);
        assert!(format.can_encode());
        let scheme = Scheme::with_default_group(format);
        assert_eq!(Scheme::new(format, expected).unwrap(), scheme);
    }
}

#[test]
fn group_size_rules() {
    use Format::*;
    for format in Format::ALL {
        let fixed = match format {
            Nvfp4 | Q2K | Q3K | Q6K => Some(16),
            Mxfp4 | Q4K | Q5K | Iq4Xs | Iq4Nl | Q4_1 | Q5_0 | Q5_1 => Some(32),
            _ => None,
        };
        assert_eq!(format.fixed_group_size(), fixed);
        let unit = match format.code_bits() {
            2 | 6 => 16,
            3 | 5 => 32,
            4 => 8,
            _ => 4,
        };
        for group_size in 0..600 {
            let valid = match fixed {
                Some(only) => group_size == only,
                None => group_size > 0 && group_size % unit == 0,
            };
            match Scheme::new(format, group_size) {
                Ok(scheme) => {
                    assert!(valid, "{format} {group_size}");
                    assert_eq!(scheme, Scheme { format, group_size });
                }
                Err(FormatError::GroupSize { format: named, group_size: size, rule }) => {
                    assert!(!valid, "{format} {group_size}");
                    assert_eq!((named, size), (format, group_size));
                    assert!(rule.contains(&fixed.unwrap_or(unit).to_string()), "{rule}");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn groups_and_code_rows_round_up() {
    let scheme = Scheme::new(Format::Fp4E2m1, 8).unwrap();
    assert_eq!([1, 8, 9, 12, 16].map(|k| scheme.groups(k)), [1, 1, 2, 2, 2]);
    assert_eq!([1, 8, 9, 16].map(|k| scheme.code_rows(k)), [1, 1, 2, 2]);
    let rows = |format: Format, k| Scheme::with_default_group(format).code_rows(k);
    assert_eq!([4, 5].map(|k| rows(Format::Int8, k)), [1, 2]);
    assert_eq!([16, 17].map(|k| rows(Format::Int2, k)), [1, 2]);
    assert_eq!([1, 32, 33].map(|k| rows(Format::Int3, k)), [3, 3, 6]);
    assert_eq!([1, 32, 33].map(|k| rows(Format::Nf3, k)), [3, 3, 6]);
    assert_eq!(Scheme::with_default_group(Format::Int8).groups(100), 1);
}

#[test]
fn bits_per_weight_of_the_summary_table() {
    let bits = |format, group_size, k, n| Scheme::new(format, group_size).unwrap().bits_per_weight(k, n);
    let (k, n) = (4096, 1024);
    for (group_size, expected) in [(32, 4.5), (64, 4.25), (128, 4.125), (256, 4.0625)] {
        assert_eq!(bits(Format::Fp4E2m1, group_size, k, n), expected);
        assert_eq!(bits(Format::Int4S4, group_size, k, n), expected);
    }
    assert_eq!(bits(Format::Int4U4, 128, k, n), 4.25);
    assert_eq!(bits(Format::Nvfp4, 16, k, n), 4.5 + 32.0 / (4096.0 * 1024.0));
    assert_eq!(bits(Format::Mxfp4, 32, k, n), 4.25);
    assert_eq!(bits(Format::Int8, 128, k, n), 8.125);
    assert_eq!(bits(Format::Int8, k, k, n), 8.0 + 16.0 / 4096.0);
    assert_eq!(bits(Format::Int8Asym, 128, k, n), 8.25);
    assert_eq!(bits(Format::Fp8E4m3, 128, k, n), 8.125);
    assert_eq!(bits(Format::Int3, 128, k, n), 3.125);
    assert_eq!(bits(Format::Nf3, 64, k, n), 3.25);
    assert_eq!(bits(Format::Int2, 128, k, n), 2.125);
    assert_eq!(bits(Format::Nf4, 64, k, n), 4.25);
    let fixed = |format| Scheme::with_default_group(format).bits_per_weight(k, n);
    // Sub-scales take eight bits, where the two-level formats of ggml store four to eight.
    assert_eq!(fixed(Format::Q2K), 2.0 + 16.0 / 16.0 + 32.0 / 256.0);
    assert_eq!(fixed(Format::Q3K), 3.0 + 8.0 / 16.0 + 16.0 / 256.0);
    assert_eq!(fixed(Format::Q4K), 4.0 + 16.0 / 32.0 + 32.0 / 256.0);
    assert_eq!(fixed(Format::Q5K), 5.0 + 16.0 / 32.0 + 32.0 / 256.0);
    assert_eq!(fixed(Format::Q6K), 6.5625);
    assert_eq!(fixed(Format::Iq4Xs), 4.0 + 8.0 / 32.0 + 16.0 / 256.0);
    assert_eq!([Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Iq4Nl].map(fixed), [5.0, 5.5, 6.0, 4.5]);
    assert_eq!(bits(Format::Affine6, 64, k, n), 7.0);
    assert_eq!(bits(Format::Fp8E4m3F32, 128, k, n), 8.25);
    assert_eq!(bits(Format::Int3U3, 128, k, n), 3.25);
    // A short super-block stores its f16 as well.
    assert_eq!(bits(Format::Q4K, 32, 288, 1), (288.0 * 4.0 + 9.0 * 16.0 + 2.0 * 32.0) / 288.0);
    // Padding counts: 12 weights in two words with two scales.
    assert_eq!(bits(Format::Fp4E2m1, 8, 12, 1), 96.0 / 12.0);
    assert_eq!(bits(Format::Nvfp4, 16, 16, 2), (2.0 * 72.0 + 32.0) / 32.0);
}

#[test]
fn dtypes() {
    let expected = [
        ("F32", 4),
        ("F16", 2),
        ("BF16", 2),
        ("U32", 4),
        ("I32", 4),
        ("U8", 1),
        ("I8", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("U16", 2),
        ("I16", 2),
        ("I64", 8),
        ("F64", 8),
        ("BOOL", 1),
    ];
    assert_eq!(DType::ALL.map(|dtype| (dtype.name(), dtype.size_in_bytes())), expected);
    for dtype in DType::ALL {
        assert_eq!(DType::from_safetensors_name(dtype.name()), Some(dtype));
    }
    assert_eq!(DType::from_safetensors_name("F4"), None);
    assert_eq!(DType::F8E4M3.name(), "F8_E4M3");
    assert_eq!(DType::Bool.name(), "BOOL");
}
