//! GPTQ against round to nearest and against a dense textbook elimination.

mod common;

use common::{Random, correlated, hessian_of, identity_hessian};
use marlin_formats::{Format, FormatError, Group, QuantizedMatrix, Scheme};
use marlin_quantize::{
    GptqOptions, Hessian, InverseFactor, QuantizeError, ScaleSearch, fit_group, gptq, proxy_loss, rtn,
};

fn options(act_order: bool, scale_search: ScaleSearch) -> GptqOptions {
    GptqOptions { act_order, scale_search, ..GptqOptions::default() }
}

const BOTH: [bool; 2] = [false, true];

#[test]
fn with_an_identity_hessian_it_is_round_to_nearest() {
    let (n, k) = (9, 300);
    let weight = Random::new(10).normals(n * k);
    let hessian = identity_hessian(k);
    for format in Format::ENCODABLE {
        // The E2M1 search without importance has its own candidate list.
        let searches = match format {
            Format::Fp4E2m1 => vec![ScaleSearch::Range],
            _ => vec![ScaleSearch::Range, ScaleSearch::Mse],
        };
        for search in searches {
            for act_order in BOTH {
                let scheme = Scheme::with_default_group(format);
                let options = options(act_order, search);
                let found = gptq(scheme, &weight, n, k, &hessian, &options).unwrap();
                let expected = rtn(scheme, &weight, n, k, search).unwrap();
                assert_eq!(found.matrix, expected, "{format} {options:?}");
            }
        }
    }
}

#[test]
fn beats_round_to_nearest_on_correlated_inputs_in_every_format() {
    let (rows, n, k) = (1024, 64, 256);
    let mut random = Random::new(11);
    let x = correlated(&mut random, rows, k);
    let weight = random.normals(n * k);
    let hessian = hessian_of(&x, k);
    eprintln!("proxy loss relative to RTN   range  act-order    mse  act-order+mse   RTN+mse");
    for format in Format::ENCODABLE {
        let scheme = Scheme::with_default_group(format);
        let loss = |matrix: &QuantizedMatrix| proxy_loss(&hessian, &weight, &matrix.decode().unwrap()).unwrap();
        let plain = loss(&rtn(scheme, &weight, n, k, ScaleSearch::Range).unwrap());
        let searched = loss(&rtn(scheme, &weight, n, k, ScaleSearch::Mse).unwrap()) / plain;
        let mut ratios = Vec::new();
        for search in [ScaleSearch::Range, ScaleSearch::Mse] {
            for act_order in BOTH {
                let options = options(act_order, search);
                let found = gptq(scheme, &weight, n, k, &hessian, &options).unwrap();
                let ratio = loss(&found.matrix) / plain;
                assert!(ratio < 0.6, "{format} {options:?}: {ratio}");
                ratios.push(ratio);
            }
        }
        eprintln!(
            "{format:26} {:7.3} {:10.3} {:6.3} {:14.3} {searched:9.3}",
            ratios[0], ratios[1], ratios[2], ratios[3]
        );
    }
}

/// The inverse of a symmetric positive definite matrix by Gauss-Jordan elimination.
fn inverse(matrix: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let k = matrix.len();
    let mut left = matrix.to_vec();
    let mut right: Vec<Vec<f64>> = (0..k).map(|i| (0..k).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for p in 0..k {
        let pivot = left[p][p];
        for j in 0..k {
            left[p][j] /= pivot;
            right[p][j] /= pivot;
        }
        for i in (0..k).filter(|&i| i != p) {
            let factor = left[i][p];
            for j in 0..k {
                left[i][j] -= factor * left[p][j];
                right[i][j] -= factor * right[p][j];
            }
        }
    }
    right
}

/// Optimal Brain Quantization in a fixed order, straight from its formulas: quantize feature `p`,
/// spread its error with the inverse Hessian of the features left, remove `p` from that inverse.
fn textbook(
    scheme: Scheme,
    weight: &[f32],
    k: usize,
    hessian: &Hessian,
    options: &GptqOptions,
) -> (Vec<u8>, Vec<Group>) {
    let diagonal = hessian.diagonal();
    let damp = options.damping * diagonal.iter().sum::<f64>() / k as f64;
    let mut order: Vec<usize> = (0..k).collect();
    if options.act_order {
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
    }
    let damped: Vec<Vec<f64>> = (0..k)
        .map(|i| {
            let row = (0..k).map(|j| hessian.at(i, j) + if i == j { damp } else { 0.0 });
            row.collect()
        })
        .collect();
    let inverse = inverse(&damped);
    let tensor_scale = scheme.tensor_scale(weight.iter().fold(0.0, |a: f32, w| a.max(w.abs())));
    let (mut codes, mut groups) = (Vec::new(), Vec::new());
    for row in weight.chunks_exact(k) {
        let mut w: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
        let mut remaining = inverse.clone();
        let mut row_codes = vec![0; k];
        let mut row_groups = vec![Group::ZERO; scheme.groups(k)];
        let fit = |w: &[f64]| {
            let w: Vec<f32> = w.iter().map(|&w| w as f32).collect();
            fit_group(scheme, &w, None, tensor_scale, ScaleSearch::Range).unwrap()
        };
        for (step, &p) in order.iter().enumerate() {
            let g = p / scheme.group_size;
            if options.act_order && step == 0 {
                for (group, w) in row_groups.iter_mut().zip(w.chunks(scheme.group_size)) {
                    *group = fit(w);
                }
            }
            if !options.act_order && p % scheme.group_size == 0 {
                row_groups[g] = fit(&w[p..k.min(p + scheme.group_size)]);
            }
            row_codes[p] = scheme.code(w[p] as f32, &row_groups[g]);
            let decoded = f64::from(scheme.dequantize(row_codes[p], &row_groups[g]));
            let error = (w[p] - decoded) / remaining[p][p];
            for &j in &order[step..] {
                w[j] -= error * remaining[p][j];
            }
            let column: Vec<f64> = (0..k).map(|i| remaining[i][p]).collect();
            for i in 0..k {
                for j in 0..k {
                    remaining[i][j] -= column[i] * column[j] / column[p];
                }
            }
        }
        codes.extend(row_codes);
        groups.extend(row_groups);
    }
    (codes, groups)
}

#[test]
fn equals_the_textbook_elimination() {
    // K is no multiple of the block and the last group is short.
    let (rows, n, k) = (300, 6, 104);
    let mut random = Random::new(12);
    let hessian = hessian_of(&correlated(&mut random, rows, k), k);
    let weight = random.normals(n * k);
    for format in Format::ENCODABLE {
        let group_sizes = match format {
            Format::Nvfp4 => vec![16],
            Format::Mxfp4 => vec![32],
            _ => vec![32, 64, 96, 128],
        };
        for group_size in group_sizes {
            for act_order in BOTH {
                for block in [1, 24, 40, 128] {
                    let scheme = Scheme::new(format, group_size).unwrap();
                    let options = GptqOptions { block, ..options(act_order, ScaleSearch::Range) };
                    let found = gptq(scheme, &weight, n, k, &hessian, &options).unwrap();
                    let (codes, groups) = textbook(scheme, &weight, k, &hessian, &options);
                    compare(&found.matrix, &codes, &groups, &options);
                }
            }
        }
    }
}

/// Rows must agree but for those in which f32 rounding moved a weight over a decision point, after
/// which the two eliminations part.
fn compare(found: &QuantizedMatrix, codes: &[u8], groups: &[Group], options: &GptqOptions) {
    let (k, n) = (found.in_features, found.out_features);
    let groups_per_row = found.scheme.groups(k);
    let parted = (0..n)
        .filter(|&n| {
            let codes_differ = (0..k).any(|i| found.code(n, i) != codes[n * k + i]);
            let groups_differ =
                (0..groups_per_row).any(|g| found.group(n, g).unwrap() != groups[n * groups_per_row + g]);
            codes_differ || groups_differ
        })
        .count();
    assert!(parted <= 1, "{:?} {options:?}: {parted} of {n} rows differ", found.scheme);
}

#[test]
fn reports_the_loss_of_the_damped_hessian() {
    let (rows, n, k) = (400, 5, 96);
    let mut random = Random::new(13);
    let x = correlated(&mut random, rows, k);
    let weight = random.normals(n * k);
    let hessian = hessian_of(&x, k);
    let scheme = Scheme::new(Format::Int3, 32).unwrap();
    for act_order in BOTH {
        let options = options(act_order, ScaleSearch::Range);
        let found = gptq(scheme, &weight, n, k, &hessian, &options).unwrap();
        let decoded = found.matrix.decode().unwrap();
        let damp = options.damping * hessian.diagonal().iter().sum::<f64>() / k as f64;
        let squares = decoded.iter().zip(&weight);
        let damping: f64 = squares.map(|(q, w)| f64::from(q - w).powi(2)).sum::<f64>() * damp;
        let expected = proxy_loss(&hessian, &weight, &decoded).unwrap() + damping;
        assert!((found.loss / expected - 1.0).abs() < 1e-3, "{} {expected}", found.loss);
    }
}

#[test]
fn dead_channels_count_as_zero_weights() {
    let (rows, n, k) = (200, 4, 64);
    let mut random = Random::new(14);
    let mut x = correlated(&mut random, rows, k);
    for row in x.chunks_exact_mut(k) {
        row[3] = 0.0;
        row[40] = 0.0;
    }
    let mut weight = random.normals(n * k);
    weight[3] = 1e4;
    let hessian = hessian_of(&x, k);
    for format in [Format::Int4S4, Format::Int3, Format::Fp4E2m1, Format::Nvfp4] {
        let group_size = if format == Format::Nvfp4 { 16 } else { 32 };
        let scheme = Scheme::new(format, group_size).unwrap();
        for act_order in BOTH {
            for search in [ScaleSearch::Range, ScaleSearch::Mse] {
                let options = options(act_order, search);
                let found = gptq(scheme, &weight, n, k, &hessian, &options).unwrap();
                for n in 0..n {
                    for feature in [3, 40] {
                        let group = found.matrix.group(n, feature / group_size).unwrap();
                        assert_eq!(found.matrix.code(n, feature), scheme.code(0.0, &group));
                        // The outlier on the dead channel must not widen its group.
                        assert!(group.scale < 10.0, "{format} {group:?}");
                    }
                }
                assert!(found.loss.is_finite());
            }
        }
    }
    let silent = hessian_of(&vec![0.0; 8 * k], k);
    let scheme = Scheme::new(Format::Int4S4, 32).unwrap();
    let found = gptq(scheme, &weight, n, k, &silent, &GptqOptions::default()).unwrap();
    assert!(found.matrix.decode().unwrap().iter().all(|&w| w == 0.0));
}

#[test]
fn singular_hessians_are_damped() {
    let (n, k) = (8, 160);
    let mut random = Random::new(15);
    // Fewer rows than features, and two channels that are copies of each other.
    let mut x = correlated(&mut random, 11, k);
    for row in x.chunks_exact_mut(k) {
        row[7] = row[6];
    }
    let weight = random.normals(n * k);
    let hessian = hessian_of(&x, k);
    let scheme = Scheme::with_default_group(Format::Int4S4);
    let plain = rtn(scheme, &weight, n, k, ScaleSearch::Range).unwrap();
    let plain = proxy_loss(&hessian, &weight, &plain.decode().unwrap()).unwrap();
    for damping in [0.0, 1e-14, 0.01] {
        let options = GptqOptions { damping, ..GptqOptions::default() };
        let factor = InverseFactor::new(&hessian, &options).unwrap();
        assert!(factor.damping() >= 1e-6, "{damping} -> {}", factor.damping());
        let found = factor.quantize(scheme, &weight, n, k).unwrap();
        let found = proxy_loss(&hessian, &weight, &found.matrix.decode().unwrap()).unwrap();
        assert!(found < 0.1 * plain, "damping {damping}: {found} against {plain}");
    }
}

#[test]
fn activations_whose_squares_leave_f32_are_an_error() {
    let mut hessian = Hessian::new(2).unwrap();
    hessian.accumulate(&[3e19, 3e19]).unwrap();
    let error = InverseFactor::new(&hessian, &GptqOptions::default()).unwrap_err();
    assert!(matches!(error, QuantizeError::NonFiniteHessian { feature: 0 }), "{error}");
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    let (rows, n, k) = (500, 101, 300);
    let mut random = Random::new(16);
    let x = correlated(&mut random, rows, k);
    let weight = random.normals(n * k);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let hessian = hessian_of(&x, k);
            let scheme = Scheme::with_default_group(Format::Int3);
            gptq(scheme, &weight, n, k, &hessian, &GptqOptions::default()).unwrap()
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn refuses_bad_input() {
    let k = 64;
    let hessian = identity_hessian(k);
    let scheme = Scheme::with_default_group(Format::Int4S4);
    let mut weight = vec![0.25; 2 * k];
    let run = |weight: &[f32], hessian: &Hessian, options: GptqOptions| {
        gptq(scheme, weight, 2, k, hessian, &options).unwrap_err()
    };
    let default = GptqOptions::default();
    for damping in [-0.1, 1.5, f64::NAN] {
        let error = run(&weight, &hessian, GptqOptions { damping, ..default });
        assert!(matches!(error, QuantizeError::Option { option: "damping", .. }), "{error}");
    }
    let error = run(&weight, &hessian, GptqOptions { block: 0, ..default });
    assert!(matches!(error, QuantizeError::Option { option: "block", .. }));
    let error = run(&weight, &identity_hessian(63), default);
    assert!(matches!(error, QuantizeError::Features { hessian: 63, weight: 64 }));
    let error = run(&weight, &Hessian::new(k).unwrap(), default);
    assert!(matches!(error, QuantizeError::NoCalibrationRows));
    let error = run(&weight[1..], &hessian, default);
    assert!(matches!(error, QuantizeError::Length { .. }));
    weight[k + 9] = f32::NAN;
    let error = run(&weight, &hessian, default);
    assert!(matches!(error, QuantizeError::Format(FormatError::NonFiniteWeight { n: 1, k: 9, .. })), "{error}");
}
