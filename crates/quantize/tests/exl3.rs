//! EXL3: published vectors, quality on normal weights, the reference quantizer's own example, padding, hostile input.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Random, correlated, hessian_of};
use half::f16;
use marlin_formats::FormatError;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::trellis::{Path, PathSearch, Tile};
use marlin_ops::{OpError, Result};
use marlin_quantize::exl3::{BitGroup, Encoder, Exl3, Exl3Inputs, Exl3Options, OutputScales, allocate_bits, exl3};
use marlin_quantize::{Hessian, QuantizeError};
use safetensors::SafeTensors;

const GOLDEN: &[u8] = include_bytes!("golden/exl3_quantizer.safetensors");

fn assert_cyclic(path: &Path, bits: u32) {
    for (p, word) in path.iter().enumerate() {
        let before = path[(p + path.len() - 1) % path.len()];
        assert_eq!(word >> bits, before & (0xFFFF >> bits), "{bits} bits, position {p}");
    }
}

fn mean_squared_error(encoder: &Encoder, path: &Path, target: &[f32]) -> f64 {
    let square = |(&word, &x): (&u16, &f32)| f64::from(encoder.value(word) - x).powi(2);
    path.iter().zip(target).map(square).sum::<f64>() / target.len() as f64
}

#[test]
fn tiles_encode_to_the_vectors() {
    let mut state = 7u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 16) / 65_536.0
    };
    let target: [f32; tile::WEIGHTS] =
        std::array::from_fn(|_| f16::from_f64((0..12).map(|_| draw()).sum::<f64>() - 6.0).to_f32());
    assert_eq!(target[..4].iter().map(|t| format!("{t:.7}")).collect::<Vec<_>>().join(" "), {
        "0.5678711 0.5913086 -0.9130859 0.2453613"
    });
    // Mean squared error and first three words, in each codebook.
    type Expected = [(&'static str, [u16; 3]); 3];
    let vectors: [(u32, Expected); 3] = [
        (
            2,
            [
                ("0.073426", [0x2A31, 0xA8C6, 0xA31A]),
                ("0.074946", [0xB295, 0xCA56, 0x295B]),
                ("0.068178", [0xF1DB, 0xC76C, 0x1DB2]),
            ],
        ),
        (
            3,
            [
                ("0.019159", [0xB9C4, 0xCE25, 0x712C]),
                ("0.018676", [0x29BA, 0x4DD6, 0x6EB7]),
                ("0.016468", [0x96E0, 0xB705, 0xB82E]),
            ],
        ),
        (
            4,
            [
                ("0.004690", [0x35CC, 0x5CC3, 0xCC35]),
                ("0.004867", [0x7DAE, 0xDAE4, 0xAE41]),
                ("0.004437", [0xCB76, 0xB766, 0x7668]),
            ],
        ),
    ];
    for (bits, expected) in vectors {
        for (codebook, (mse, words)) in Codebook::ALL.into_iter().zip(expected) {
            let encoder = Encoder::new(codebook, bits);
            let path = encoder.encode(&target, &mut encoder.workspace());
            assert_cyclic(&path, bits);
            assert_eq!(path[..3], words, "{bits} bits, {codebook:?}");
            assert_eq!(
                format!("{:.6}", mean_squared_error(&encoder, &path, &target)),
                mse,
                "{bits} bits, {codebook:?}"
            );
        }
    }
}

#[test]
fn normal_weights_reach_the_published_errors() {
    let gates = [
        (1, 1.05, 0.267),
        (2, 1.0, 0.0680),
        (3, 0.95, 0.0175),
        (4, 0.925, 0.0044),
        (5, 0.9, 0.00113),
        (6, 0.925, 0.00029),
        (8, 0.875, 0.00002),
    ];
    let mut random = Random::new(11);
    let tiles: Vec<Vec<f32>> = (0..12).map(|_| random.normals(tile::WEIGHTS)).collect();
    for (bits, deviation, gate) in gates {
        for codebook in Codebook::ALL {
            let encoder = Encoder::new(codebook, bits);
            let mut workspace = encoder.workspace();
            let scale = deviation * codebook.deviation();
            let mut error = 0.0;
            for tile in &tiles {
                let target: [f32; tile::WEIGHTS] = std::array::from_fn(|i| tile[i] * scale);
                let path = encoder.encode(&target, &mut workspace);
                assert_cyclic(&path, bits);
                error += mean_squared_error(&encoder, &path, &target) / 12.0;
            }
            let error = error / f64::from(scale).powi(2);
            println!("{bits} bits, {codebook:?}: {error:.6}, gate {gate}");
            // The last gate has one digit.
            let gate = if bits == 8 { gate + 5e-6 } else { gate };
            assert!(error < 1.1 * gate, "{bits} bits, {codebook:?}: {error} is not near {gate}");
        }
    }
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A Hessian proportional to `sum`, `[k, k]`: its Cholesky factor as calibration rows.
fn hessian_of_sum(sum: &[f32], k: usize) -> Hessian {
    let mut lower = vec![0.0f64; k * k];
    for i in 0..k {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|p| lower[i * k + p] * lower[j * k + p]).sum();
            let rest = f64::from(sum[i * k + j]) - dot;
            lower[i * k + j] = if i == j { rest.sqrt() } else { rest / lower[j * k + j] };
        }
    }
    let rows: Vec<f32> = (0..k * k).map(|i| lower[i % k * k + i / k] as f32).collect();
    hessian_of(&rows, k)
}

#[test]
fn proxy_errors_are_those_of_the_reference_quantizer() {
    const N: usize = 384;
    const K: usize = 256;
    let golden = SafeTensors::deserialize(GOLDEN).unwrap();
    let metadata = SafeTensors::read_metadata(GOLDEN).unwrap().1.metadata().clone().unwrap();
    let number = |key: &str| metadata[key].parse::<f64>().unwrap();
    let hessian = hessian_of_sum(&floats(&golden, "H_sum"), K);
    // Stored [K, N].
    let transposed = floats(&golden, "W");
    let weight: Vec<f32> = (0..N * K).map(|i| transposed[i % K * N + i / K]).collect();
    let cases =
        [(Codebook::ThreeInst, 3), (Codebook::Mcg, 2), (Codebook::Mcg, 3), (Codebook::Mul1, 3), (Codebook::Mul1, 4)];
    for (codebook, bits) in cases {
        let prefix = format!("{}.k{bits}", codebook.name());
        let options = Exl3Options { codebook, bits, sigma: number("sigma_reg"), ..Exl3Options::default() };
        let inputs = Exl3Inputs::new(&hessian, "golden", &options).unwrap();
        let Exl3 { matrix, proxy_error, global_scale } =
            exl3(None, &inputs, "golden", &weight, N, K, &options).unwrap();
        matrix.validate().unwrap();
        let expected = number(&format!("{prefix}.proxy_err"));
        println!("{prefix}: proxy error {proxy_error:.6}, reference {expected:.6}, global scale {global_scale:.4}");
        assert!(proxy_error <= 1.03 * expected, "{prefix}: {proxy_error} against {expected}");
        assert!((f64::from(global_scale) / number(&format!("{prefix}.g_scale")) - 1.0).abs() < 0.1, "{prefix}");
    }
}

/// `|W - Q|^2 / |W|^2` of the effective weight.
fn relative_error(quantized: &Exl3, weight: &[f32]) -> f64 {
    let decoded = quantized.matrix.decode_f64().unwrap();
    assert_eq!(decoded.len(), weight.len());
    let error: f64 = decoded.iter().zip(weight).map(|(q, &w)| (q - f64::from(w)).powi(2)).sum();
    error / weight.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>()
}

fn uncalibrated(weight: &[f32], n: usize, k: usize, options: &Exl3Options) -> Exl3 {
    let inputs = Exl3Inputs::uncalibrated(k, "input", options).unwrap();
    assert!(!inputs.is_calibrated());
    exl3(None, &inputs, "module", weight, n, k, options).unwrap()
}

#[test]
fn effective_weights_are_as_close_as_the_bit_rate_allows() {
    let (n, k) = (256, 128);
    let mut random = Random::new(5);
    let mut weight = random.normals(n * k);
    // Channels of very different size, and one large weight, which the rotation spreads.
    weight.iter_mut().enumerate().for_each(|(i, w)| *w *= 0.02 * [1.0, 0.1, 7.0][i / k % 3] * [1.0, 3.0][i % 2]);
    weight[7 * k + 5] = 4.0;
    for ((bits, gate), codebook) in [(2, 0.0680), (3, 0.0175), (4, 0.0044)].into_iter().zip(Codebook::ALL) {
        let options = Exl3Options { codebook, bits, ..Exl3Options::default() };
        let quantized = uncalibrated(&weight, n, k, &options);
        let error = relative_error(&quantized, &weight);
        println!("{bits} bits, {codebook:?}: {error:.5}");
        assert!(error < 1.1 * gate, "{bits} bits, {codebook:?}: {error}");
        assert!((quantized.proxy_error / gate - 1.0).abs() < 0.15, "{bits} bits: {}", quantized.proxy_error);
    }
}

#[test]
fn every_tile_closes() {
    let (n, k) = (128, 128);
    let weight = Random::new(8).normals(n * k);
    for bits in [1, 5] {
        let matrix = uncalibrated(&weight, n, k, &Exl3Options { bits, ..Exl3Options::default() }).matrix;
        for words in matrix.trellis.chunks_exact(tile::words(bits)) {
            assert_cyclic(&tile::states(words).unwrap(), bits);
        }
    }
}

#[test]
fn sizes_are_padded() {
    let (n, k) = (200, 100);
    let mut random = Random::new(6);
    let mut weight = random.normals(n * k);
    weight[17 * k..18 * k].fill(0.0);
    let hessian = hessian_of(&correlated(&mut random, 300, k), k);
    let options = Exl3Options { bits: 4, ..Exl3Options::default() };
    let inputs = Exl3Inputs::new(&hessian, "input", &options).unwrap();
    assert!(inputs.is_calibrated());
    let calibrated = exl3(None, &inputs, "module", &weight, n, k, &options).unwrap();
    for quantized in [&calibrated, &uncalibrated(&weight, n, k, &options)] {
        let matrix = &quantized.matrix;
        matrix.validate().unwrap();
        assert_eq!((matrix.padded_in(), matrix.padded_out()), (128, 256));
        let zero = |n: usize| matrix.svh[n] == 0;
        assert!((0..256).all(|i| zero(i) == (i == 17 || i >= n)));
        assert!(matrix.suh.iter().all(|&bits| bits & 0x7FFF != 0));
    }
    assert!(relative_error(&uncalibrated(&weight, n, k, &options), &weight) < 0.006);
    assert!(relative_error(&calibrated, &weight) < 0.05);
}

#[test]
fn calibration_lowers_the_output_error() {
    let (n, k) = (128, 256);
    let mut random = Random::new(9);
    let weight = random.normals(n * k);
    let hessian = hessian_of(&correlated(&mut random, 1000, k), k);
    let options = Exl3Options { bits: 3, ..Exl3Options::default() };
    let loss = |inputs: &Exl3Inputs| {
        let decoded = exl3(None, inputs, "module", &weight, n, k, &options).unwrap().matrix.decode().unwrap();
        marlin_quantize::proxy_loss(&hessian, &weight, &decoded).unwrap()
    };
    let calibrated = loss(&Exl3Inputs::new(&hessian, "input", &options).unwrap());
    let plain = loss(&Exl3Inputs::uncalibrated(k, "input", &options).unwrap());
    println!("output error {:.3} of that without calibration", calibrated / plain);
    assert!(calibrated < 0.3 * plain, "{calibrated} against {plain}");
}

#[test]
fn results_depend_on_names_and_seed_but_not_on_threads() {
    let (n, k) = (128, 128);
    let mut random = Random::new(10);
    let weight = random.normals(n * k);
    let hessian = hessian_of(&correlated(&mut random, 200, k), k);
    let run = |threads: usize, seed: u64, input: &str, module: &str| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let options = Exl3Options { bits: 4, seed, ..Exl3Options::default() };
            let inputs = Exl3Inputs::new(&hessian, input, &options).unwrap();
            exl3(None, &inputs, module, &weight, n, k, &options).unwrap()
        })
    };
    let signs = |scales: &[u16]| scales.iter().map(|s| s >> 15).collect::<Vec<_>>();
    let one = run(1, 3, "a", "m");
    assert_eq!(run(3, 3, "a", "m"), one);
    let module = run(2, 3, "a", "other").matrix;
    assert_eq!(signs(&module.suh), signs(&one.matrix.suh));
    assert_ne!(signs(&module.svh), signs(&one.matrix.svh));
    let seed = run(2, 4, "a", "m").matrix;
    assert_ne!(signs(&seed.suh), signs(&one.matrix.suh));
    assert_ne!(signs(&seed.svh), signs(&one.matrix.svh));
    let input = run(2, 3, "b", "m").matrix;
    assert_ne!(signs(&input.suh), signs(&one.matrix.suh));
}

#[test]
fn output_scales_are_chosen() {
    let (n, k) = (128, 128);
    let mut random = Random::new(12);
    let mut weight = random.normals(n * k);
    weight.iter_mut().enumerate().for_each(|(i, w)| *w *= 1.0 + (i / k) as f32);
    let even = random.normals(400 * k);
    let mut uneven = even.clone();
    uneven.iter_mut().step_by(k).for_each(|x| *x *= 1000.0);
    let scaled = |activations: &[f32], output_scales| {
        let options = Exl3Options { bits: 5, output_scales, ..Exl3Options::default() };
        let inputs = Exl3Inputs::new(&hessian_of(activations, k), "input", &options).unwrap();
        let svh = exl3(None, &inputs, "module", &weight, n, k, &options).unwrap().matrix.svh;
        let ones = svh.iter().all(|&bits| bits & 0x7FFF == f16::ONE.to_bits());
        !ones
    };
    assert!(scaled(&even, OutputScales::Auto) && scaled(&uneven, OutputScales::Always));
    assert!(!scaled(&uneven, OutputScales::Auto) && !scaled(&even, OutputScales::Never));
}

#[test]
fn empty_calibration_and_empty_weights() {
    let (n, k) = (128, 128);
    let options = Exl3Options { bits: 2, ..Exl3Options::default() };
    let mut silent = Hessian::new(k).unwrap();
    assert!(!Exl3Inputs::new(&silent, "input", &options).unwrap().is_calibrated());
    silent.accumulate(&vec![0.0; 3 * k]).unwrap();
    let inputs = Exl3Inputs::new(&silent, "input", &options).unwrap();
    assert!(!inputs.is_calibrated());
    let quantized = exl3(None, &inputs, "module", &vec![0.0; n * k], n, k, &options).unwrap();
    assert_eq!(quantized.proxy_error, 0.0);
    assert!(quantized.matrix.decode().unwrap().iter().all(|&w| w == 0.0));
    // One direction only: the damping makes it definite; without damping there is none.
    let mut single = Hessian::new(k).unwrap();
    single.accumulate(&vec![1.0; k]).unwrap();
    assert!(Exl3Inputs::new(&single, "input", &options).unwrap().is_calibrated());
    let undamped = Exl3Inputs::new(&single, "input", &Exl3Options { sigma: 0.0, ..options });
    assert!(matches!(undamped, Err(QuantizeError::NotPositiveDefinite { .. })));
}

#[test]
fn hostile_input_is_refused() {
    let (n, k) = (128, 128);
    let options = Exl3Options::default();
    let inputs = Exl3Inputs::uncalibrated(k, "input", &options).unwrap();
    let weight = Random::new(1).normals(n * k);
    let run = |weight: &[f32], n, k| exl3(None, &inputs, "module", weight, n, k, &options);

    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut bad = weight.clone();
        bad[3 * k + 9] = value;
        let error = run(&bad, n, k);
        assert!(matches!(error, Err(QuantizeError::Format(FormatError::NonFiniteWeight { n: 3, k: 9, .. }))));
    }
    for size in [0, n * k - 1, n * k + 1] {
        let error = run(&vec![0.0; size], n, k);
        assert!(
            matches!(error, Err(QuantizeError::Length { what: "weight", expected: 16384, found }) if found == size)
        );
    }
    for (n, k) in [(0, k), (n, 0), (usize::MAX, k), (n, usize::MAX), (usize::MAX / 2, 2)] {
        assert!(matches!(run(&weight, n, k), Err(QuantizeError::Format(FormatError::Shape { .. }))));
    }
    let error = run(&weight, 64, 256);
    assert!(matches!(error, Err(QuantizeError::Features { hessian: 128, weight: 256 })));
    for scale in [1e7, 1e38] {
        let large: Vec<f32> = weight.iter().map(|w| w.clamp(-2.0, 2.0) * scale).collect();
        assert!(matches!(run(&large, n, k), Err(QuantizeError::Format(FormatError::ScaleOverflow { .. }))));
    }
    for features in [0, usize::MAX, 1 << 40] {
        assert!(matches!(Exl3Inputs::uncalibrated(features, "", &options), Err(QuantizeError::Format(_))));
    }
    for bits in [0, 9, u32::MAX] {
        let options = Exl3Options { bits, ..options };
        let error = exl3(None, &inputs, "module", &weight, n, k, &options);
        assert!(matches!(error, Err(QuantizeError::Format(FormatError::TrellisBits { .. }))));
        assert!(Exl3Inputs::uncalibrated(k, "", &options).is_err());
    }
    for sigma in [-0.1, 1.5, f64::NAN] {
        let error = Exl3Inputs::uncalibrated(k, "", &Exl3Options { sigma, ..options });
        assert!(matches!(error, Err(QuantizeError::Option { option: "sigma", .. })));
    }
}

/// A device that searches on the CPU, for so many calls.
struct Device {
    calls: AtomicUsize,
    most_calls: usize,
}

impl PathSearch for Device {
    fn tiles_at_once(&self, _: u32) -> usize {
        5
    }

    fn run_search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>> {
        assert!((1..=5).contains(&targets.len()), "{} tiles", targets.len());
        if self.calls.fetch_add(1, Ordering::Relaxed) >= self.most_calls {
            return Err(OpError::Device { operation: "search_paths", reason: "it was unplugged".into() });
        }
        let encoder = Encoder::new(codebook, bits);
        let mut workspace = encoder.workspace();
        Ok(targets.iter().map(|target| encoder.encode(target, &mut workspace)).collect())
    }
}

#[test]
fn a_device_searches_all_tiles_and_its_failure_is_told() {
    let (n, k) = (200, 256);
    let mut random = Random::new(12);
    let weight = random.normals(n * k);
    let hessian = hessian_of(&correlated(&mut random, 300, k), k);
    let options = Exl3Options { bits: 4, ..Exl3Options::default() };
    let inputs = Exl3Inputs::new(&hessian, "input", &options).unwrap();
    let device = |most_calls| Device { calls: AtomicUsize::new(0), most_calls };
    let run = |device: &Device| exl3(Some(device), &inputs, "module", &weight, n, k, &options);

    let whole = device(usize::MAX);
    assert_eq!(run(&whole).unwrap(), exl3(None, &inputs, "module", &weight, n, k, &options).unwrap());
    let calls = whole.calls.into_inner();
    // The scales take most of them: 16 row blocks of 4 batches of columns follow.
    for most_calls in [0, calls - 64, calls - 1] {
        let error = run(&device(most_calls)).unwrap_err();
        assert!(matches!(error, QuantizeError::Device(_)) && error.to_string().contains("unplugged"), "{error}");
    }
}

#[test]
fn tiny_and_uneven_weights_keep_their_size() {
    let (n, k) = (128, 128);
    let mut weight = Random::new(2).normals(n * k);
    // A dead input whose weights decayed, and an output that is almost zero.
    (0..n).for_each(|n| weight[n * k + 5] *= 1e-30);
    weight[9 * k..10 * k].iter_mut().for_each(|w| *w *= 1e-6);
    let quantized = uncalibrated(&weight, n, k, &Exl3Options::default());
    assert!(relative_error(&quantized, &weight) < 0.006);
    let decoded = quantized.matrix.decode().unwrap();
    assert!((0..n).all(|n| decoded[n * k + 5].abs() < 1e-6));
    assert!(decoded[9 * k..10 * k].iter().all(|w| w.abs() < 1e-5));
}

#[test]
fn bits_are_allocated_by_priority_and_layer() {
    let groups: Vec<BitGroup> = (0..5)
        .flat_map(|layer| {
            let group = |weights, priority| BitGroup { weights, priority, layer };
            [group(100, 2), group(300, 1)]
        })
        .collect();
    let bits = |average| allocate_bits(&groups, 5, average).unwrap();
    assert_eq!(bits(3.0), [3; 10]);
    assert_eq!(bits(8.0), [8; 10]);
    // 2000 weights: 2.15 leaves 300, three groups of the highest priority from the ends.
    assert_eq!(bits(2.15), [3, 2, 3, 2, 2, 2, 2, 2, 3, 2]);
    // 1100 more bits: all of the first priority, then the outermost two of the second.
    assert_eq!(bits(2.55), [3, 3, 3, 2, 3, 2, 3, 2, 3, 3]);
    // 950: a group that is too large is passed over.
    let uneven =
        [(500, 1), (400, 1), (600, 0), (50, 0)].map(|(weights, priority)| BitGroup { weights, priority, layer: 0 });
    assert_eq!(allocate_bits(&uneven, 1, 1.0 + 960.0 / 1550.0).unwrap(), [2, 2, 1, 2]);
    let total: u64 = groups.iter().zip(bits(4.9)).map(|(group, bits)| group.weights * u64::from(bits)).sum();
    assert!(total <= 9800 && total > 9500);
    assert!(allocate_bits(&[], 0, 4.0).unwrap().is_empty());
    for average in [0.99, 8.01, f64::NAN, f64::INFINITY] {
        assert!(matches!(
            allocate_bits(&groups, 5, average),
            Err(QuantizeError::Option { option: "bits a weight", .. })
        ));
    }
    assert!(matches!(allocate_bits(&groups, 4, 3.0), Err(QuantizeError::Option { option: "layer", .. })));
}
