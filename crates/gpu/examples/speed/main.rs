//! `cargo run --release -p marlin-gpu --features cuda --example speed [-- --json FILE | --format TEXT [--rows M,M,...]
//! [--activations f16|f32] [--exact]]`: how fast the kernels are on the first CUDA device; that they are right is `verify`'s
//! matter. Times are medians; weights and caches are rotated beyond the device's caches, activations are not, as in a model.
//! Products are replayed in graphs, attention is enqueued.

mod measure;

use std::cell::RefCell;
use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result, bail};
use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_gpu::{AttentionKernel, Cuda};
use marlin_ops::attention::{AttentionArgs, AttentionOps, EmptyRow, Window};
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::{Device, Linear, LinearOps, Tensor, Weight};
use measure::{Bench, Random, rotation};

/// N and K of an up and of a down projection of a model with 4096 hidden features.
const SHAPES: [(usize, usize); 2] = [(14_336, 4096), (4096, 14_336)];

/// How many times the rows of [`SHAPES`] the large products have.
const LARGE: usize = 16;

const FORMATS: [Format; 2] = [Format::Int4S4, Format::Fp4E2m1];

const GROUP_SIZE: usize = 128;

/// Names, codebooks and bits of the trellis weights.
const TRELLISES: [(&str, Codebook, u32); 3] =
    [("exl3-mcg-3", Codebook::Mcg, 3), ("exl3-mul1-3", Codebook::Mul1, 3), ("exl3-mcg-4", Codebook::Mcg, 4)];

/// Rows of the matrix products.
const ROWS: [usize; 4] = [16, 64, 512, 4096];

/// Rows of the products of one format.
const SOME_ROWS: [usize; 8] = [1, 2, 4, 8, 16, 64, 512, 4096];

/// Lengths of the context of attention.
const CONTEXTS: [usize; 2] = [4096, 32_768];

/// Query heads, heads of keys and values, and their size.
const HEADS: [usize; 3] = [32, 8, 128];

/// A figure of a product.
struct Product {
    format: &'static str,
    m: usize,
    n: usize,
    k: usize,
    seconds: f64,
    /// Bytes of weights a second, and as a share of what a copy moves.
    bytes_per_second: f64,
    copy_share: f64,
    flops_per_second: f64,
}

/// A figure of attention.
struct Attention {
    queries: usize,
    context: usize,
    seconds: f64,
    /// Bytes of keys and values a second.
    bytes_per_second: f64,
    /// Of the visible scores and values.
    flops_per_second: f64,
}

/// Everything that was measured.
struct Report {
    device: String,
    copy: f64,
    launch: f64,
    graph_launch: f64,
    products: Vec<Product>,
    attention: Vec<Attention>,
}

fn main() -> Result<()> {
    let (mut json, mut only, mut rows, mut activations, mut exact) = (None, None, None, None, false);
    let mut only_attention = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = Some(arguments.next().context("--json needs a file")?),
            "--format" => only = Some(arguments.next().context("--format needs a part of a name")?),
            "--rows" => rows = Some(parse_rows(&arguments.next().context("--rows needs numbers")?)?),
            "--activations" => activations = Some(parse_dtype(arguments.next().as_deref())?),
            "--exact" => exact = true,
            "--attention" => only_attention = true,
            other => bail!(
                "unknown argument {other}; known: --json FILE, --format TEXT [--rows M,M,...] [--activations f16|f32] \
                 [--exact], --attention"
            ),
        }
    }
    if let Some(name) = only {
        return run_some(&name, activations.unwrap_or(DType::F16), rows.as_deref().unwrap_or(&SOME_ROWS), exact);
    }
    if only_attention && json.is_none() && rows.is_none() && activations.is_none() && !exact {
        return run_attention();
    }
    if only_attention {
        bail!("--attention stands alone");
    }
    if rows.is_some() || activations.is_some() || exact {
        bail!("--rows, --activations and --exact need --format");
    }
    let report = run()?;
    if let Some(file) = json {
        std::fs::write(&file, report.json()).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}

fn parse_rows(list: &str) -> Result<Vec<usize>> {
    let row = |m: &str| match m.parse() {
        Ok(m @ 1..) => Ok(m),
        _ => bail!("--rows: {m} is no number of rows"),
    };
    list.split(',').map(row).collect()
}

fn parse_dtype(name: Option<&str>) -> Result<DType> {
    match name {
        Some("f16") => Ok(DType::F16),
        Some("f32") => Ok(DType::F32),
        _ => bail!("--activations needs f16 or f32"),
    }
}

/// The products of the formats whose names contain `name`.
fn run_some(name: &str, activations: DType, rows: &[usize], exact: bool) -> Result<()> {
    let bench = Bench::new(exact)?;
    let copy = bench.copy_rate()?;
    println!("copy {:.0} GB/s\n\n{HEADER}", copy / 1e9);
    for format in FORMATS.into_iter().filter(|format| format.name().contains(name)) {
        for (n, k) in SHAPES {
            grouped(&bench, copy, format, [n, k], activations, rows)?;
        }
    }
    for (name, codebook, bits) in TRELLISES.into_iter().filter(|trellis| trellis.0.contains(name)) {
        for (n, k) in SHAPES {
            trellis(&bench, copy, (name, codebook, bits), [n, k], activations, rows)?;
        }
    }
    Ok(())
}

const HEADER: &str = "| format | M | N | K | us | GB/s | of copy | TFLOP/s |\n|---|---|---|---|---|---|---|---|";

fn run() -> Result<Report> {
    let device = marlin_gpu::devices().into_iter().find(|d| d.kind == "cuda").context("no CUDA device")?.name;
    let bench = Bench::new(false)?;
    let copy = bench.copy_rate()?;
    let (launch, graph_launch) = bench.launch_seconds()?;
    println!(
        "{device}\ncopy {:.0} GB/s, empty launch {:.2} us, in a graph {:.2} us\n",
        copy / 1e9,
        launch * 1e6,
        graph_launch * 1e6
    );
    println!("{HEADER}");
    let (mut measured, mut attention) = (Vec::new(), Vec::new());
    for format in FORMATS {
        for (n, k) in SHAPES {
            measured.extend(grouped(&bench, copy, format, [n, k], DType::F16, &[1])?);
            measured.extend(grouped(&bench, copy, format, [LARGE * n, k], DType::F16, &[1])?);
        }
    }
    for format in FORMATS {
        for (n, k) in SHAPES {
            measured.extend(grouped(&bench, copy, format, [n, k], DType::F16, &ROWS)?);
        }
    }
    for codes in TRELLISES {
        for (n, k) in SHAPES {
            measured.extend(trellis(&bench, copy, codes, [n, k], DType::F16, &[1])?);
            measured.extend(trellis(&bench, copy, codes, [n, k], DType::F16, &ROWS)?);
        }
    }
    println!("\n| attention: queries | context | us | GB/s | TFLOP/s |\n|---|---|---|---|---|");
    for context in CONTEXTS {
        for queries in [1, context] {
            let measured = attend(&bench, [DType::BF16; 2], queries, context, None)?;
            println!("{measured}");
            attention.push(measured);
        }
    }
    Ok(Report { device, copy, launch, graph_launch, products: measured, attention })
}

/// [`products`] of a grouped format.
fn grouped(
    bench: &Bench,
    copy: f64,
    format: Format,
    [n, k]: [usize; 2],
    activations: DType,
    rows: &[usize],
) -> Result<Vec<Product>> {
    let random = &mut Random(77);
    let weight = random.weight(format, GROUP_SIZE, n, k)?;
    products(bench, copy, format.name(), &weight, activations, rows, random)
}

/// [`products`] of EXL3.
fn trellis(
    bench: &Bench,
    copy: f64,
    (name, codebook, bits): (&'static str, Codebook, u32),
    [n, k]: [usize; 2],
    activations: DType,
    rows: &[usize],
) -> Result<Vec<Product>> {
    let random = &mut Random(78);
    let weight = random.trellis(codebook, bits, n, k)?;
    products(bench, copy, name, &weight, activations, rows, random)
}

/// A linear layer for each number of rows.
fn products(
    bench: &Bench,
    copy: f64,
    format: &'static str,
    weight: &Weight,
    activations: DType,
    rows: &[usize],
    random: &mut Random,
) -> Result<Vec<Product>> {
    let (n, k) = (weight.out_features(), weight.in_features());
    let bytes = weight.size_in_bytes();
    let upload = |_| -> Result<Linear<Cuda>> { Ok(Linear::new(&bench.gpu, weight.clone())?) };
    let weights = (0..rotation(bytes)).map(upload).collect::<Result<Vec<_>>>()?;
    let mut measured = Vec::new();
    for &m in rows {
        let x = bench.normals(activations, &[m, k], random)?;
        let out = RefCell::new(bench.gpu.zeros(activations, &[m, n])?);
        let seconds = bench.graph_seconds(2 * weights.len(), |i| {
            Ok(bench.gpu.linear(LinearArgs {
                x: &x,
                weight: &weights[i % weights.len()],
                activation: Activation::None,
                out_scale: 1.0,
                residual: Residual::None,
                out: &mut out.borrow_mut(),
            })?)
        })?;
        let product = Product {
            format,
            m,
            n,
            k,
            seconds,
            bytes_per_second: bytes as f64 / seconds,
            copy_share: bytes as f64 / seconds / copy,
            flops_per_second: 2.0 * (m * n * k) as f64 / seconds,
        };
        println!("{product}");
        measured.push(product);
    }
    Ok(measured)
}

/// Attention of f32 queries, as models have them, in both modes and beside the kernel for devices without tensor cores.
fn run_attention() -> Result<()> {
    // As chosen there.
    let many = |queries: usize| AttentionKernel { q_tile: 64, kv_tile: 32, chunk: 32, splits: (2112 / queries).max(1) };
    let one = |context: usize| AttentionKernel { q_tile: 4, kv_tile: 128, chunk: 32, splits: (context / 128).min(128) };
    println!("| cache | queries | context | kernel | us | GB/s | TFLOP/s |\n|---|---|---|---|---|---|---|");
    for (queries, context) in [(1, 4096), (1, 32_768), (512, 512), (512, 4096), (4096, 4096)] {
        for cache in [DType::F16, DType::BF16, DType::F32] {
            for (name, exact, kernel) in [
                ("exact", true, None),
                ("default", false, None),
                ("general", true, Some(if queries == 1 { one(context) } else { many(queries) })),
            ] {
                let measured = attend(&Bench::new(exact)?, [DType::F32, cache], queries, context, kernel)?;
                let (us, rate, flops) = measured.figures();
                println!("| {} | {queries} | {context} | {name} | {us:.2} | {rate:.0} | {flops:.1} |", cache.name());
            }
        }
    }
    Ok(())
}

/// The last `queries` positions of a context, causal; queries and results, keys and values of such types.
fn attend(
    bench: &Bench,
    [dtype, cache]: [DType; 2],
    queries: usize,
    context: usize,
    kernel: Option<AttentionKernel>,
) -> Result<Attention> {
    let [heads, kv_heads, size] = HEADS;
    let random = &mut Random(79);
    let bytes = 2 * kv_heads * context * size * cache.size_in_bytes();
    let mut cache = || bench.normals(cache, &[1, kv_heads, context, size], random);
    let mut pair = |_| -> Result<[Tensor<Cuda>; 2]> { Ok([cache()?, cache()?]) };
    // Many queries read each key often.
    let caches = (0..if queries == 1 { rotation(bytes) } else { 1 }).map(&mut pair).collect::<Result<Vec<_>>>()?;
    let dims = [1, queries, heads, size];
    let q = bench.normals(dtype, &dims, random)?;
    let out = RefCell::new(bench.gpu.zeros(dtype, &dims)?);
    let seconds = bench.repeat_seconds(|i| {
        let [k, v] = &caches[i % caches.len()];
        let mut out = out.borrow_mut();
        let args = AttentionArgs {
            q: &q,
            k,
            v,
            kv_len: &[context],
            scale: (size as f32).powf(-0.5),
            causal: true,
            window: Window::None,
            softcap: None,
            mask: None,
            sinks: None,
            empty_row: EmptyRow::Error,
            out: &mut out,
        };
        match kernel {
            Some(kernel) => bench.gpu.attention_with(args, kernel)?,
            None => bench.gpu.attention(args)?,
        }
        Ok(())
    })?;
    let visible = queries * context - queries * (queries - 1) / 2;
    let flops = 4.0 * (heads * size * visible) as f64;
    let (bytes_per_second, flops_per_second) = (bytes as f64 / seconds, flops / seconds);
    Ok(Attention { queries, context, seconds, bytes_per_second, flops_per_second })
}

impl Display for Product {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { format, m, n, k, copy_share, .. } = self;
        let (us, rate, flops) = (self.seconds * 1e6, self.bytes_per_second / 1e9, self.flops_per_second / 1e12);
        write!(f, "| {format} | {m} | {n} | {k} | {us:.2} | {rate:.0} | {copy_share:.2} | {flops:.1} |")
    }
}

impl Attention {
    /// Microseconds, GB/s and TFLOP/s.
    fn figures(&self) -> (f64, f64, f64) {
        (self.seconds * 1e6, self.bytes_per_second / 1e9, self.flops_per_second / 1e12)
    }
}

impl Display for Attention {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (us, rate, flops) = self.figures();
        write!(f, "| {} | {} | {us:.2} | {rate:.0} | {flops:.1} |", self.queries, self.context)
    }
}

impl Report {
    fn json(&self) -> String {
        let product = |p: &Product| {
            format!(
                "    {{\"format\": \"{}\", \"m\": {}, \"n\": {}, \"k\": {}, \"seconds\": {:e}, \
                 \"bytes_per_second\": {:e}, \"copy_share\": {:.4}, \"flops_per_second\": {:e}}}",
                p.format, p.m, p.n, p.k, p.seconds, p.bytes_per_second, p.copy_share, p.flops_per_second,
            )
        };
        let attention = |a: &Attention| {
            format!(
                "    {{\"queries\": {}, \"context\": {}, \"seconds\": {:e}, \"bytes_per_second\": {:e}, \
                 \"flops_per_second\": {:e}}}",
                a.queries, a.context, a.seconds, a.bytes_per_second, a.flops_per_second,
            )
        };
        format!(
            "{{\n  \"device\": {:?},\n  \"copy_bytes_per_second\": {:e},\n  \"launch_seconds\": {:e},\n  \
             \"graph_launch_seconds\": {:e},\n  \"products\": [\n{}\n  ],\n  \"attention\": [\n{}\n  ]\n}}\n",
            self.device,
            self.copy,
            self.launch,
            self.graph_launch,
            self.products.iter().map(product).collect::<Vec<_>>().join(",\n"),
            self.attention.iter().map(attention).collect::<Vec<_>>().join(",\n"),
        )
    }
}
