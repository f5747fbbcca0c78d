//! Round to nearest against the format layer's scalar encoder.

mod common;

use common::Random;
use marlin_formats::{Format, FormatError, QuantizedMatrix, Scheme};
use marlin_quantize::{QuantizeError, ScaleSearch, fit_group, rtn};

#[test]
fn equals_the_scalar_encoder_in_every_format() {
    let (n, k) = (37, 300);
    let weight = Random::new(1).normals(n * k);
    for format in Format::ENCODABLE {
        let scheme = Scheme::with_default_group(format);
        let expected = QuantizedMatrix::encode(scheme, &weight, n, k).unwrap();
        let found = rtn(scheme, &weight, n, k, ScaleSearch::Range).unwrap();
        assert_eq!(found, expected, "{format}");
    }
}

fn squared_error(matrix: &QuantizedMatrix, weight: &[f32]) -> f64 {
    let decoded = matrix.decode().unwrap();
    let errors = decoded.iter().zip(weight);
    errors.map(|(&q, &w)| (f64::from(q) - f64::from(w)).powi(2)).sum()
}

#[test]
fn the_scale_search_lowers_the_squared_error_below_eight_bits() {
    let (n, k) = (16, 512);
    let weight = Random::new(2).normals(n * k);
    for format in Format::ENCODABLE {
        let scheme = Scheme::with_default_group(format);
        let range = rtn(scheme, &weight, n, k, ScaleSearch::Range).unwrap();
        let searched = rtn(scheme, &weight, n, k, ScaleSearch::Mse).unwrap();
        if format.code_bits() == 8 {
            assert_eq!(searched, range, "{format}");
            continue;
        }
        let ratio = squared_error(&searched, &weight) / squared_error(&range, &weight);
        eprintln!("{format:10} searched / range squared error {ratio:.3}");
        // MXFP4 has only powers of two to choose from.
        let limit = if format == Format::Mxfp4 { 1.0 } else { 0.95 };
        assert!(ratio < limit, "{format}: {ratio}");
    }
}

#[test]
fn importance_moves_the_scale_towards_the_important_weights() {
    let scheme = Scheme::new(Format::Int4S4, 8).unwrap();
    let group = [7.0, 0.31, -0.24, 0.18, 0.4, -0.37, 0.29, -0.11];
    let importance = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    let equal = fit_group(scheme, &group, None, None, ScaleSearch::Mse).unwrap();
    let weighted = fit_group(scheme, &group, Some(&importance), None, ScaleSearch::Mse).unwrap();
    assert!(weighted.scale < 0.7 * equal.scale, "{weighted:?} {equal:?}");
}

#[test]
fn zero_groups_have_scale_zero_with_every_search() {
    for format in Format::ENCODABLE {
        let scheme = Scheme::with_default_group(format);
        for search in [ScaleSearch::Range, ScaleSearch::Mse] {
            let matrix = rtn(scheme, &[0.0; 64], 1, 64, search).unwrap();
            assert!(matrix.decode().unwrap().iter().all(|&w| w == 0.0));
            assert!(matrix.scales.iter().all(|&s| s == 0), "{format}");
        }
    }
}

#[test]
fn refuses_bad_weights_with_their_index() {
    let scheme = Scheme::with_default_group(Format::Int4S4);
    let mut weight = vec![0.5; 4 * 32];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        weight[2 * 32 + 5] = bad;
        let error = rtn(scheme, &weight, 4, 32, ScaleSearch::Range).unwrap_err();
        assert!(matches!(error, QuantizeError::Format(FormatError::NonFiniteWeight { n: 2, k: 5, .. })), "{error}");
    }
    weight[2 * 32 + 5] = 3e6;
    let error = rtn(scheme, &weight, 4, 32, ScaleSearch::Range).unwrap_err();
    assert!(matches!(error, QuantizeError::Format(FormatError::InGroup { n: 2, g: 0, .. })), "{error}");
    let error = rtn(scheme, &weight, 4, 31, ScaleSearch::Range).unwrap_err();
    assert!(matches!(error, QuantizeError::Length { expected: 124, found: 128, .. }));
    assert!(rtn(scheme, &[], 0, 32, ScaleSearch::Range).is_err());
}
