//! Accumulation of `X^T X`.

mod common;

use common::{Random, hessian_of};
use marlin_quantize::{Hessian, QuantizeError, proxy_loss};

#[test]
fn equals_the_f64_product_for_any_split_of_the_rows() {
    let (rows, k) = (777, 301);
    let x = Random::new(3).normals(rows * k);
    let whole = hessian_of(&x, k);
    let mut split = Hessian::new(k).unwrap();
    for part in x.chunks(100 * k) {
        split.accumulate(part).unwrap();
    }
    assert_eq!((whole.rows(), split.rows()), (777, 777));
    for i in 0..k {
        for j in 0..k {
            let products = x.chunks_exact(k).map(|row| f64::from(row[i]) * f64::from(row[j]));
            let exact = products.sum::<f64>() / rows as f64;
            for hessian in [&whole, &split] {
                // Unit-variance channels: the f32 sums keep six digits of the diagonal's size.
                assert!((hessian.at(i, j) - exact).abs() < 3e-6, "[{i}, {j}]");
            }
        }
    }
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    let (rows, k) = (600, 520);
    let x = Random::new(4).normals(rows * k);
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| hessian_of(&x, k))
    };
    assert!(with_threads(1) == with_threads(5));
}

#[test]
fn refuses_bad_activations_and_sizes() {
    let mut hessian = Hessian::new(4).unwrap();
    hessian.accumulate(&[1.0; 8]).unwrap();
    let before = hessian.clone();
    let error = hessian.accumulate(&[1.0, 1.0, f32::NAN, 1.0]).unwrap_err();
    assert!(matches!(error, QuantizeError::NonFiniteActivation { row: 2, feature: 2, .. }), "{error}");
    assert!(matches!(hessian.accumulate(&[1.0; 7]), Err(QuantizeError::Length { found: 7, .. })));
    // The first of two, beyond what one task looks at.
    let mut long = vec![1.0; 4 * 40_000];
    (long[4 * 17_000 + 3], long[4 * 39_000]) = (f32::INFINITY, f32::NAN);
    let error = hessian.accumulate(&long).unwrap_err();
    assert!(matches!(error, QuantizeError::NonFiniteActivation { row: 17_002, feature: 3, .. }), "{error}");
    assert!(hessian == before);
    assert!(matches!(Hessian::new(0), Err(QuantizeError::HessianSize { .. })));
    assert!(matches!(Hessian::new(usize::MAX), Err(QuantizeError::HessianSize { .. })));
}

#[test]
fn proxy_loss_is_the_mean_squared_output_error() {
    let (rows, n, k) = (50, 3, 20);
    let mut random = Random::new(5);
    let (x, w, q) = (random.normals(rows * k), random.normals(n * k), random.normals(n * k));
    let mut expected = 0.0;
    for x in x.chunks_exact(k) {
        for n in 0..n {
            let error: f64 =
                (0..k).map(|i| f64::from(x[i]) * (f64::from(w[n * k + i]) - f64::from(q[n * k + i]))).sum();
            expected += error * error / rows as f64;
        }
    }
    let found = proxy_loss(&hessian_of(&x, k), &w, &q).unwrap();
    assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    assert!(proxy_loss(&hessian_of(&x, k), &w, &q[1..]).is_err());
    assert!(proxy_loss(&hessian_of(&x, k), &w[1..], &q[1..]).is_err());
}
