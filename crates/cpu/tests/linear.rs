//! Linear layers of every format in both modes, on every instruction set.

mod common;

use common::{Computation, check, normals, poisoned, upload, upload_ids};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD, tile};
use marlin_formats::{DType, Format, Group, QuantizedMatrix, ScaleKind, Scheme, Shift, StoredGroups};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::linear::{Activation, EmbeddingArgs, GatedUpArgs, LinearArgs, Projection, ProjectionsArgs, Residual};
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::{Backend, ConvertOps, Device, HostTensor, Linear, LinearOps, Result, Weight};

struct Product {
    weight: Weight,
    rows: usize,
    x: Vec<f32>,
    activation: Activation,
    scale: f32,
    residual: Option<Vec<f32>>,
}

impl Product {
    fn new(weight: Weight, rows: usize) -> Self {
        let x = normals(rows * weight.in_features(), 7);
        Self { weight, rows, x, activation: Activation::None, scale: 1.0, residual: None }
    }
}

impl Computation for Product {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let (k, n) = (self.weight.in_features(), self.weight.out_features());
        let x = upload(device, &[self.rows, k], &self.x)?;
        let residual = match &self.residual {
            Some(values) => Some(upload(device, &[self.rows, n], values)?),
            None => None,
        };
        let mut out = poisoned(device, &[self.rows, n])?;
        device.linear(LinearArgs {
            x: &x,
            weight: &Linear::new(device, self.weight.clone())?,
            activation: self.activation,
            out_scale: self.scale,
            residual: match &residual {
                Some(tensor) => Residual::Add(tensor),
                None => Residual::None,
            },
            out: &mut out,
        })?;
        device.read_f64(&out)
    }
}

fn quantized(format: Format, group_size: usize, n: usize, k: usize) -> Weight {
    let scheme = Scheme::new(format, group_size).unwrap();
    if !format.can_encode() {
        let codes: Vec<u8> = (0..n * k).map(|i| code_of(format, i * 37 % 251)).collect();
        return stored(scheme, n, k, &codes);
    }
    let values = normals(n * k, 3);
    Weight::quantized(QuantizedMatrix::encode(scheme, &values, n, k).unwrap()).unwrap()
}

/// Code `i` of a format, 0 for the NaNs of FP8: every sum would be NaN.
fn code_of(format: Format, i: usize) -> u8 {
    let code = (i % (1 << format.code_bits())) as u8;
    if format.value(code, 0.0).is_finite() { code } else { 0 }
}

/// A weight of an imported format from its codes `[N, K]`; every group has a scale and zero or offset of its own.
fn stored(scheme: Scheme, n: usize, k: usize, codes: &[u8]) -> Weight {
    let (format, groups, blocks) = (scheme.format, scheme.groups(k) * n, scheme.super_blocks(k) * n);
    let count = |stored: bool, count: usize| if stored { count } else { 0 };
    let shifts = count(format.shift() != Shift::None, groups);
    let floats = |count: usize, factor: f32| -> Vec<f32> { (0..count).map(|i| (i % 53 + 7) as f32 * factor).collect() };
    let halves = |count: usize, first: u16| -> Vec<u16> { (0..count).map(|i| first + 37 * (i % 60) as u16).collect() };
    let bytes = |count: usize, first: usize| -> Vec<u8> { (0..count).map(|i| (first + 11 * i) as u8).collect() };
    let groups = match format.scale_kind() {
        ScaleKind::F16 => StoredGroups::F16 { scales: &halves(groups, 0x2400), shifts: &halves(shifts, 0xB000) },
        ScaleKind::F32 => StoredGroups::F32 { scales: &floats(groups, 0.001), offsets: &floats(shifts, -0.007) },
        _ => StoredGroups::TwoLevel {
            super_scales: &halves(blocks, 0x1400),
            super_minima: &halves(count(format.has_offsets(), blocks), 0x9500),
            scales: &bytes(groups, 200),
            minima: &bytes(shifts, 9),
        },
    };
    Weight::quantized(QuantizedMatrix::from_stored(scheme, k, n, codes, &groups).unwrap()).unwrap()
}

/// Group sizes that reach every path of a format: below, at and above a block of 32, and beyond K.
fn group_sizes(format: Format) -> Vec<usize> {
    [8, 16, 32, 48, 64, 128, 1024].into_iter().filter(|&g| format.check_group_size(g).is_ok()).collect()
}

#[test]
fn every_format_in_both_modes() {
    for format in Format::ALL {
        for group_size in group_sizes(format) {
            // Tails of K in a word, a block and a panel; of N in a tile; rows around the register blocks.
            for (m, k, n) in [(1, 200, 33), (1, 544, 40), (3, 333, 17), (13, 96, 40)] {
                let product = Product::new(quantized(format, group_size, n, k), m);
                for exact in [true, false] {
                    let what = format!("{format} group {group_size} {m}x{k}x{n} exact {exact}");
                    check(&product, exact, 2e-6, &what);
                }
            }
        }
    }
}

/// Dense projections of one row, by their widths.
struct Projections {
    k: usize,
    widths: Vec<usize>,
}

impl Computation for Projections {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let x = upload(device, &[1, self.k], &normals(self.k, 7))?;
        let weight = |(seed, &n): (usize, &usize)| {
            let values = normals(n * self.k, 8 + seed as u64);
            Linear::new(device, Weight::dense(HostTensor::from_f32(&[n, self.k], &values)?)?)
        };
        let weights = self.widths.iter().enumerate().map(weight).collect::<Result<Vec<_>>>()?;
        let mut outs = self.widths.iter().map(|&n| poisoned(device, &[1, n])).collect::<Result<Vec<_>>>()?;
        let mut projections: Vec<_> =
            weights.iter().zip(&mut outs).map(|(weight, out)| Projection { weight, out }).collect();
        device.projections(ProjectionsArgs { x: &x, norm: None, projections: &mut projections })?;
        outs.iter().map(|out| device.read_f64(out)).collect::<Result<Vec<_>>>().map(|outs| outs.concat())
    }
}

#[test]
fn projections_without_outputs_between_others() {
    // Alone and shared out.
    for k in [64, 4096] {
        for widths in [vec![32, 0, 48], vec![0, 40, 0, 0, 100, 0], vec![16, 0, 16, 0, 320]] {
            let what = format!("{widths:?}, K {k}");
            check(&Projections { k, widths }, true, 2e-6, &what);
        }
    }
}

/// Column c holds code c + k at input feature k, every group with a scale and zero of its own.
fn all_codes(format: Format, k: usize) -> Weight {
    let scheme = Scheme::with_default_group(format);
    let n = 1usize << format.code_bits();
    let codes: Vec<u8> = (0..n * k).map(|i| code_of(format, i / k + i % k)).collect();
    if !format.can_encode() {
        return stored(scheme, n, k, &codes);
    }
    let tensor_scale = (format == Format::Nvfp4).then_some(3.0);
    let groups: Vec<Group> = (0..n * scheme.groups(k))
        .map(|i| {
            let bits = match format {
                Format::Nvfp4 | Format::Mxfp4 => 0x30 + (i % 64) as u16,
                _ => 0x3000 + 37 * (i % 60) as u16,
            };
            let zero = if format.has_zeros() { 0x4400 + 11 * i as u16 } else { 0 };
            format.group_from_bits(bits, zero, tensor_scale).unwrap()
        })
        .collect();
    let matrix = QuantizedMatrix::from_codes(scheme, k, n, &codes, &groups, tensor_scale);
    Weight::quantized(matrix.unwrap()).unwrap()
}

#[test]
fn every_code_at_every_place() {
    for format in Format::ALL {
        let (k, rows) = (136, 136);
        // One-hot rows read single weights; 127 makes them exact in int8 too.
        let mut product = Product::new(all_codes(format, k), rows);
        product.x.fill(0.0);
        for row in 0..rows {
            product.x[row * k + row] = 127.0;
        }
        for exact in [true, false] {
            check(&product, exact, 1e-7, &format!("{format} exact {exact}"));
        }
    }
}

#[test]
fn dense_weights() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (m, k, n) in [(1, 1, 1), (1, 520, 35), (9, 300, 48), (70, 64, 20)] {
            let host = HostTensor::from_f32_as(dtype, &[n, k], &normals(n * k, 5)).unwrap();
            let product = Product::new(Weight::dense(host).unwrap(), m);
            check(&product, true, 2e-6, &format!("{dtype:?} {m}x{k}x{n}"));
        }
    }
}

/// Random words: every stream of bits is a tile.
fn exl3(codebook: Codebook, bits: u32, n: usize, k: usize) -> Weight {
    let (padded_k, padded_n) = (k.next_multiple_of(HADAMARD), n.next_multiple_of(HADAMARD));
    let words = padded_k / tile::SIDE * (padded_n / tile::SIDE) * tile::words(bits);
    let word = |part: u32, i: usize| random_word(bits.into(), Stream::Weights, part, 0, i as u32);
    let trellis = (0..words).map(|i| word(0, i) as u16).collect();
    // Magnitudes from 1/2 to 1 of both signs.
    let scales = |part, count| (0..count).map(|i| 0x3800 | (word(part, i) & 0x83FF) as u16).collect();
    let (suh, svh) = (scales(1, padded_k), scales(2, padded_n));
    Weight::exl3(Exl3Matrix { codebook, bits, in_features: k, out_features: n, trellis, suh, svh }).unwrap()
}

/// relF of EXL3 products in a mode. The fast mode leaves out the rounding of values to f16, 1.4e-4 of a value.
fn exl3_tolerance(exact: bool) -> f64 {
    if exact { 2e-6 } else { 4e-4 }
}

#[test]
fn exl3_of_every_rate() {
    for codebook in Codebook::ALL {
        for bits in 1..=8 {
            for (m, k, n) in [(1, 256, 128), (1, 1000, 40), (3, 200, 130), (13, 640, 16)] {
                let product = Product::new(exl3(codebook, bits, n, k), m);
                for exact in [true, false] {
                    let what = format!("{codebook:?} {bits} bits {m}x{k}x{n} exact {exact}");
                    check(&product, exact, exl3_tolerance(exact), &what);
                }
            }
        }
    }
}

#[test]
fn many_exl3_rows_take_the_row_split() {
    for codebook in [Codebook::Mul1, Codebook::Mcg] {
        let product = Product::new(exl3(codebook, 3, 150, 160), 401);
        for exact in [true, false] {
            check(&product, exact, exl3_tolerance(exact), "401 rows");
        }
    }
}

/// Rows of a batch have the bits that they have alone.
fn check_rows_alone(weight: &Weight) {
    let (n, k) = (weight.out_features(), weight.in_features());
    let batch = Product::new(weight.clone(), 19);
    for exact in [true, false] {
        for cpu in common::cpus(exact) {
            let together = batch.run(&cpu).unwrap();
            for row in [0, 7, 16, 18] {
                let mut alone = Product::new(weight.clone(), 1);
                alone.x.copy_from_slice(&batch.x[row * k..][..k]);
                let expected = alone.run(&cpu).unwrap();
                assert_eq!(together[row * n..][..n], expected[..], "{} {:?}", weight.format_name(), cpu.isa());
            }
        }
    }
}

#[test]
fn an_exl3_row_does_not_depend_on_its_batch() {
    for codebook in Codebook::ALL {
        check_rows_alone(&exl3(codebook, 3, 150, 700));
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_own_exl3_row_alone() {
    for codebook in Codebook::ALL {
        let mut product = Product::new(exl3(codebook, 4, 40, 300), 3);
        product.x[300 + 17] = f32::NAN;
        for cpu in [true, false].into_iter().flat_map(common::cpus) {
            let found = product.run(&cpu).unwrap();
            assert!(found[40..80].iter().all(|v| v.is_nan()), "{codebook:?} {:?}", cpu.isa());
            assert!(found[..40].iter().chain(&found[80..]).all(|v| v.is_finite()), "{codebook:?} {:?}", cpu.isa());
        }
    }
}

#[test]
fn many_rows_take_the_row_split() {
    let product = Product::new(quantized(Format::Int4S4, 32, 36, 160), 401);
    for exact in [true, false] {
        check(&product, exact, 2e-6, "401 rows");
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (n, k) = (50, 544);
    // Codes with zero points, in planes, floats of 8 bits, and weights that are not quantized.
    let formats = [(Format::Int4U4, 32), (Format::Int3, 32), (Format::Fp8E4m3, 128)];
    let dense = HostTensor::from_f32_as(DType::BF16, &[n, k], &normals(n * k, 5)).unwrap();
    let mut weights = vec![Weight::dense(dense).unwrap()];
    weights.extend(formats.map(|(format, group_size)| quantized(format, group_size, n, k)));
    weights.iter().for_each(check_rows_alone);
}

#[test]
fn epilogues() {
    use Activation::*;
    for activation in [None, Relu, Relu2, Silu, GeluErf, GeluTanh, GeluQuick, Sigmoid] {
        for rows in [1, 5] {
            let mut product = Product::new(quantized(Format::Int8, 64, 37, 64), rows);
            product.weight = product.weight.with_bias(normals(37, 2)).unwrap();
            product.activation = activation;
            product.scale = -1.5;
            product.residual = Some(normals(rows * 37, 4));
            check(&product, true, 2e-6, &format!("{activation:?}"));
        }
    }
}

#[test]
fn non_finite_activations_reach_the_output() {
    for value in [f32::NAN, f32::INFINITY] {
        let mut product = Product::new(quantized(Format::Int4S4, 32, 18, 96), 2);
        product.x[100] = value;
        for cpu in common::cpus(false) {
            let out = product.run(&cpu).unwrap();
            assert!(out[..18].iter().all(|v| v.is_finite()));
            assert!(out[18..].iter().all(|v| v.is_nan()));
        }
    }
}

struct Gated {
    rows: usize,
}

impl Computation for Gated {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let x = upload(device, &[self.rows, 96], &normals(self.rows * 96, 1))?;
        let gate = quantized(Format::Int4S4, 32, 45, 96).with_bias(normals(45, 8))?;
        // Another order of activations than the gate's.
        let up = quantized(Format::Int8, 32, 45, 96);
        let mut out = poisoned(device, &[self.rows, 45])?;
        device.gated_up(GatedUpArgs {
            norm: None,
            x: &x,
            gate: &Linear::new(device, gate)?,
            up: &Linear::new(device, up)?,
            activation: Activation::Silu,
            out: &mut out,
        })?;
        device.read_f64(&out)
    }
}

#[test]
fn gated_products() {
    for rows in [1, 4, 300] {
        for exact in [true, false] {
            check(&Gated { rows }, exact, 4e-6, &format!("{rows} rows"));
        }
    }
}

struct Embedding(Weight);

impl Computation for Embedding {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>> {
        let ids = upload_ids(device, &[4], &[0, 33, 16, 15])?;
        let mut out = poisoned(device, &[4, self.0.in_features()])?;
        device.embedding(EmbeddingArgs { ids: &ids, table: &Linear::new(device, self.0.clone())?, out: &mut out })?;
        device.read_f64(&out)
    }
}

/// Blocks of outputs and of inputs that are cut off, and a start within a block.
#[test]
fn exl3_weights_decode_to_the_same_bits() {
    let (n, k) = (200, 300);
    for codebook in Codebook::ALL {
        for bits in 1..=8 {
            let weight = exl3(codebook, bits, n, k);
            let expected = weight.to_f32().unwrap();
            for exact in [true, false] {
                // Plain code on every instruction set.
                let cpu = Cpu::new(CpuOptions { exact, ..CpuOptions::default() }).unwrap();
                let what = format!("{codebook:?} {bits} bits exact {exact}");
                let weight = Linear::new(&cpu, weight.clone()).unwrap();
                let rows = [0usize, 199, 127, 128];
                let ids = upload_ids(&cpu, &[4], &rows.map(|row| row as u32)).unwrap();
                let mut out = poisoned(&cpu, &[4, k]).unwrap();
                cpu.embedding(EmbeddingArgs { ids: &ids, table: &weight, out: &mut out }).unwrap();
                let table = rows.map(|row| &expected[row * k..][..k]).concat();
                assert_eq!(cpu.read_f32(&out).unwrap(), table, "embedding of {what}");

                let first = 100;
                let mut out = poisoned(&cpu, &[n - first, k]).unwrap();
                let order = WeightOrder::OutputMajor;
                cpu.dequantize(DequantizeArgs { weight: &weight, first, order, out: &mut out }).unwrap();
                assert_eq!(cpu.read_f32(&out).unwrap(), expected[first * k..], "dequantize of {what}");
            }
        }
    }
}

#[test]
fn embeddings_decode_exactly() {
    for format in Format::ALL {
        let table = Embedding(quantized(format, format.default_group_size(), 34, 200));
        check(&table, true, 0.0, format.name());
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let host = HostTensor::from_f32_as(dtype, &[34, 200], &normals(34 * 200, 5)).unwrap();
        check(&Embedding(Weight::dense(host).unwrap()), true, 0.0, dtype.name());
    }
}
