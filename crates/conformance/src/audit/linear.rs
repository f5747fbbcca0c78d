//! Linear layers: every tile, stage count, accumulator, split and epilogue.

use marlin_formats::{DType, Format};
use marlin_ops::linear::{Activation, LinearArgs};
use marlin_ops::{Backend, Linear, Result, Weight};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::{LinearKernel, MatrixTile, Variants};
use crate::input::{Add, Output, floats_as};
use crate::linear::{by_rows, magnitudes, slope};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};
use crate::weight::{Scales, Storage, all_codes, random_weight};

/// What follows a sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Epilogue {
    pub(crate) bias: bool,
    pub(crate) activation: Activation,
    pub(crate) out_scale: f32,
    pub(crate) residual: Add,
}

impl Epilogue {
    pub(crate) const NONE: Self =
        Self { bias: false, activation: Activation::None, out_scale: 1.0, residual: Add::Nothing };

    /// By its name in the table.
    pub(crate) fn named(name: &str) -> Self {
        let (bias, rest) = match name.strip_prefix("bias") {
            Some(rest) => (true, rest.trim_start_matches('+')),
            None => (false, name),
        };
        let plain = Self { bias, ..Self::NONE };
        match rest {
            "" | "none" => plain,
            "residual" => Self { residual: Add::Tensor, ..plain },
            "scaled_residual" => Self { residual: Add::InPlace, out_scale: 0.7, ..plain },
            activation => Self { activation: activation_named(activation), ..plain },
        }
    }
}

/// An activation by its name in the table.
pub(crate) fn activation_named(name: &str) -> Activation {
    match name {
        "silu" => Activation::Silu,
        "gelu_tanh" => Activation::GeluTanh,
        "gelu_erf" => Activation::GeluErf,
        "relu" => Activation::Relu,
        other => unreachable!("no activation is called `{other}`"),
    }
}

/// A weight format by its name in the table, with a group size.
pub(crate) fn storage_named(name: &str, group_size: usize) -> Storage {
    match name {
        "f16" => Storage::Dense(DType::F16),
        name => Storage::Quantized(
            name.parse().unwrap_or_else(|_| unreachable!("no format is called `{name}`")),
            group_size,
        ),
    }
}

/// One linear layer.
#[derive(Clone, Debug)]
struct LinearCase {
    /// By hand, or the device's choice.
    kernel: Option<LinearKernel>,
    m: usize,
    k: usize,
    n: usize,
    storage: Storage,
    io: DType,
    epilogue: Epilogue,
    accumulate: DType,
    /// Row m is one-hot at k = m + this, against every code at every k.
    hot: Option<usize>,
}

impl LinearCase {
    fn inputs(&self) -> Result<(Weight, Vec<f32>)> {
        let random = &mut Random::of(&self.configuration());
        let weight = match self.storage {
            Storage::Quantized(format, _) if self.hot.is_some() => all_codes(format, self.k, random)?,
            storage => random_weight(storage, self.n, self.k, Scales::Usual, random)?,
        };
        let weight = if self.epilogue.bias { weight.with_bias(random.normals(self.n))? } else { weight };
        let x = match self.hot {
            Some(first) => {
                (0..self.m * self.k).map(|i| f32::from(u8::from(i % self.k == i / self.k + first))).collect()
            }
            None => random.normals(self.m * self.k),
        };
        Ok((weight, x))
    }
}

impl AuditCase for LinearCase {
    fn configuration(&self) -> String {
        let Self { m, k, n, storage, epilogue: Epilogue { bias, activation, out_scale, residual }, .. } = self;
        let kernel = self.kernel.map_or("any kernel".to_owned(), |kernel| format!("{kernel:?}"));
        let codes = self.hot.map_or(String::new(), |first| format!(" all codes from {first}"));
        format!(
            "{storage} M={m} K={k} N={n} io={} bias={bias} {activation:?} scale={out_scale} residual={residual:?} \
             {kernel}{codes}",
            short(self.io)
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let (weight, x) = self.inputs()?;
        let weight = Linear::new(b, weight)?;
        let x = floats_as(b, self.io, &[self.m, self.k], &x)?;
        let dims = [self.m, self.n];
        let added = Random::of("residual").normals(self.m * self.n);
        let residual = floats_as(b, self.io, &dims, &added)?;
        let mut out = self.epilogue.residual.output(b, self.io, &dims, || added.clone())?;
        let args = LinearArgs {
            x: &x,
            weight: &weight,
            activation: self.epilogue.activation,
            out_scale: self.epilogue.out_scale,
            residual: self.epilogue.residual.of(&residual),
            out: &mut out,
        };
        match self.kernel {
            Some(kernel) => variants.linear(b, kernel, args)?,
            None => b.linear(args)?,
        }
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        if self.hot.is_some() {
            return vec![Tolerance::Exact];
        }
        if self.accumulate == DType::F16 {
            return vec![by_rows(self.m, self.n, bounds::f16_accumulator(self.k))];
        }
        let (weight, x) = self.inputs().expect("the inputs are valid: the case ran");
        let u = bounds::round_off(self.io);
        // Weights may be rounded to the type of the products, the output once on each side.
        let steps = u + (self.k + 4) as f64 * U32 + tolerance::ACTIVATION;
        let sums = magnitudes(&weight, &x).expect("the inputs are valid: the case ran");
        let absolute = sums.into_iter().map(|sum| slope(self.epilogue.activation, sum) * sum * steps).collect();
        let elements = Tolerance::Elements { ulps: 0.0, relative: 2.0 * u, absolute };
        vec![Tolerance::All(vec![by_rows(self.m, self.n, bounds::linear(self.io)), elements])]
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

/// (M, K, N) at and around the edges of a tile.
fn shapes(m: usize, n: usize, k: usize) -> [(usize, usize, usize); 4] {
    [(m, 4 * k, n), (m + 1, 3 * k + 5, n - 1), (m - 1, k, 2 * n + 1), (3, 200, n + 9)]
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "workspace_zero" => return zero(settings, sink),
        "gemv_quant" => return gemv(settings, sink),
        _ => {}
    }
    if operation == "linear_splitk" && settings.word("phase") == Some("reduce") {
        settings.implied(&["partials", "order"]);
        let tile = MatrixTile { m: 64, n: 64, k: 32, units: 128, stages: 2, accumulate: DType::F32 };
        for io in settings.types("io") {
            for (slices, name) in [(2, "none"), (3, "bias+silu"), (16, "residual")] {
                let kernel = LinearKernel::SplitK { tile, slices };
                let storage = Storage::Quantized(Format::Fp4E2m1, 32);
                let epilogue = Epilogue::named(name);
                sink.check(&LinearCase {
                    kernel: Some(kernel),
                    m: 33,
                    k: 300,
                    n: 65,
                    storage,
                    io,
                    epilogue,
                    accumulate: DType::F32,
                    hot: None,
                });
            }
        }
        return Ok(());
    }
    let accumulate = settings.element("acc").unwrap_or(DType::F32);
    let tile = settings.tile("tile").expect("a tile");
    let tile = MatrixTile {
        m: tile.m,
        n: tile.n,
        k: tile.k.expect("three sizes"),
        units: units(settings),
        stages: settings.count("stages").unwrap_or(1),
        accumulate,
    };
    // Codes are K-major in every format, dense weights in checkpoint order.
    settings.implied(&["layout", "partials", "split", "m_max"]);
    let format = settings.word("format").expect("a format");
    let kernels: Vec<LinearKernel> = match operation {
        "linear_splitk" => [1, 2, 3, 16].map(|slices| LinearKernel::SplitK { tile, slices }).to_vec(),
        "linear_streamk" => {
            settings.implied(&["workers", "assign"]);
            [1, 2, 7, 40].map(|workers| LinearKernel::StreamK { tile, workers }).to_vec()
        }
        _ => vec![LinearKernel::Matrix(tile)],
    };
    let most = settings.count("m_max").unwrap_or(usize::MAX);
    let epilogues = settings.words("epilogue");
    let epilogues = if epilogues.is_empty() { vec!["none"] } else { epilogues };
    for io in settings.types("io") {
        for &kernel in &kernels {
            let case = |(m, k, n): (usize, usize, usize), storage, epilogue| LinearCase {
                kernel: Some(kernel),
                m: m.min(most),
                k,
                n,
                storage,
                io,
                epilogue: Epilogue::named(epilogue),
                accumulate,
                hot: None,
            };
            for (shape, group_size) in shapes(tile.m, tile.n, tile.k).into_iter().zip([32, 64, 128, 16]) {
                sink.check(&case(shape, storage_named(format, group_size), epilogues[0]));
            }
            for name in &epilogues[1..] {
                sink.check(&case((tile.m + 1, 200, tile.n + 9), storage_named(format, 32), name));
            }
            let storage = storage_named(format, 16);
            if matches!(storage, Storage::Quantized(..)) {
                sink.check(&LinearCase { hot: Some(0), ..case((17.min(most), 17.min(most), 16), storage, "none") });
            }
        }
    }
    Ok(())
}

/// Units of the workgroup: given, or 32 for each plane of a plane tile.
fn units(settings: &Settings<'_>) -> usize {
    let planes = settings.tile("subgroup_tile").and_then(|tile| tile.k);
    settings.count("threads").unwrap_or(planes.map_or(128, |planes| 32 * planes))
}

fn gemv<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["layout"]);
    let format = settings.word("format").expect("a format");
    let accumulate = settings.element("acc").expect("an accumulator");
    let epilogue = Epilogue::named(settings.word("epilogue").unwrap_or("none"));
    let &[(first, last)] = settings.ranges("m").as_slice() else { unreachable!("a range of rows") };
    let columns = settings.count("cols_per_thread").unwrap_or(1);
    let outputs = settings.count("cols_per_group");
    let lanes = outputs.map_or(settings.count("threads").unwrap_or(128), |outputs| outputs / columns);
    let rows = [1, 2, 5, 8, 17].into_iter().filter(|m| (first..=last).contains(m));
    for io in settings.types("io") {
        for m in rows.clone() {
            let rows = m.next_power_of_two().min(8);
            let kernel = Some(LinearKernel::Gemv { rows, columns, lanes });
            let case = |k, n, group_size| LinearCase {
                kernel,
                m,
                k,
                n,
                storage: storage_named(format, group_size),
                io,
                epilogue,
                accumulate,
                hot: None,
            };
            for (k, n, group_size) in [(512, 513, 128), (200, 65, 32), (129, 16, 64), (1000, 256, 16)] {
                sink.check(&case(k, n, group_size));
            }
            if epilogue == Epilogue::NONE {
                for first in [0, 7, 8, 16] {
                    sink.check(&LinearCase { hot: Some(first), ..case(17 + m, 16, 16) });
                }
            }
        }
    }
    Ok(())
}

/// Zeroed memory of both types.
#[derive(Debug)]
struct ZeroCase {
    dtype: DType,
    count: usize,
}

impl AuditCase for ZeroCase {
    fn configuration(&self) -> String {
        format!("{} {}", self.count, short(self.dtype))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let zeros = b.zeros(self.dtype, &[self.count])?;
        let read = if self.dtype == DType::U32 { Output::words } else { Output::floats };
        Ok(vec![read(b, "zeros", &zeros)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

fn zero<S: Sink>(settings: &Settings<'_>, sink: &mut S) -> Bound {
    settings.implied(&["buffers"]);
    for dtype in settings.types("elem") {
        for count in [1, 17, 4096, 100_003] {
            sink.check(&ZeroCase { dtype, count });
        }
    }
    Ok(())
}
