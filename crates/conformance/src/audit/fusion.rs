//! Fused layers: norm before products, gated products, whole MLPs.

use marlin_formats::DType;
use marlin_ops::linear::{Activation, GatedUpArgs, InputNorm, LinearArgs, Projection, ProjectionsArgs, Residual};
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::{Backend, Linear, Result};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::linear::{activation_named, storage_named};
use super::variants::{LinearKernel, MatrixTile, Variants};
use crate::input::{Output, floats, floats_as, poison, poison_as};
use crate::linear::by_rows;
use crate::random::Random;
use crate::tolerance::Tolerance;
use crate::weight::{Scales, Storage, random_weight};

const EPS: f32 = 1e-6;

/// `rms_norm(x) W_i`, with a residual where there is one output.
#[derive(Debug)]
struct NormLinearCase {
    /// Of the product behind a norm of its own, where there is a residual.
    kernel: Option<LinearKernel>,
    m: usize,
    k: usize,
    outs: Vec<usize>,
    storage: Storage,
    io: DType,
    residual: bool,
}

impl AuditCase for NormLinearCase {
    fn configuration(&self) -> String {
        let Self { kernel, m, k, outs, storage, residual, .. } = self;
        format!("{storage} M={m} K={k} N={outs:?} io={} residual={residual} {kernel:?}", short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let x = floats_as(b, self.io, &[self.m, self.k], &random.normals(self.m * self.k))?;
        let gamma = floats(b, &[self.k], &random.normals(self.k))?;
        let mut weights = Vec::new();
        let mut outs = Vec::new();
        for &n in &self.outs {
            weights.push(Linear::new(b, random_weight(self.storage, n, self.k, Scales::Usual, random)?)?);
            outs.push(poison_as(b, self.io, &[self.m, n])?);
        }
        if self.residual {
            let residual = floats_as(b, self.io, &[self.m, self.outs[0]], &random.normals(self.m * self.outs[0]))?;
            let mut normed = poison(b, &[self.m, self.k])?;
            b.rms_norm(RmsNormArgs {
                x: &x,
                residual: None,
                gamma: Some(&gamma),
                gamma_offset: 0.0,
                eps: EPS,
                out: &mut normed,
            })?;
            let args = LinearArgs {
                x: &normed,
                weight: &weights[0],
                activation: Activation::None,
                out_scale: 1.0,
                residual: Residual::Add(&residual),
                out: &mut outs[0],
            };
            match self.kernel {
                Some(kernel) => variants.linear(b, kernel, args)?,
                None => b.linear(args)?,
            }
        } else {
            let mut projections: Vec<_> =
                weights.iter().zip(&mut outs).map(|(weight, out)| Projection { weight, out }).collect();
            let norm = Some(InputNorm { gamma: &gamma, gamma_offset: 0.0, eps: EPS });
            b.projections(ProjectionsArgs { x: &x, norm, projections: &mut projections })?;
        }
        outs.iter().map(|out| Output::floats(b, "out", out)).collect()
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        self.outs.iter().map(|&n| by_rows(self.m, n, bounds::norm_linear(self.io))).collect()
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

/// `act(x Wg) (x Wu)`, and through `Wd` where there are outputs.
#[derive(Debug)]
struct GatedCase {
    /// Of the first half.
    kernel: Option<LinearKernel>,
    m: usize,
    k: usize,
    intermediate: usize,
    /// N of the second half.
    down: Option<usize>,
    storage: Storage,
    io: DType,
    activation: Activation,
    residual: bool,
}

impl AuditCase for GatedCase {
    fn configuration(&self) -> String {
        let Self { kernel, m, k, intermediate, down, storage, activation, residual, .. } = self;
        let io = short(self.io);
        format!(
            "{storage} M={m} K={k} I={intermediate} N={down:?} io={io} {activation:?} residual={residual} {kernel:?}"
        )
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let x = floats_as(b, self.io, &[self.m, self.k], &random.normals(self.m * self.k))?;
        let mut weight = |n: usize, k: usize| Linear::new(b, random_weight(self.storage, n, k, Scales::Usual, random)?);
        let (gate, up) = (weight(self.intermediate, self.k)?, weight(self.intermediate, self.k)?);
        let down = self.down.map(|n| weight(n, self.intermediate)).transpose()?;
        let hidden_type = if self.down.is_some() { DType::F32 } else { self.io };
        let mut hidden = poison_as(b, hidden_type, &[self.m, self.intermediate])?;
        let activation = self.activation;
        let args = GatedUpArgs { x: &x, norm: None, gate: &gate, up: &up, activation, out: &mut hidden };
        match self.kernel {
            Some(kernel) => variants.gated_up(b, kernel, args)?,
            None => b.gated_up(args)?,
        }
        let Some(down) = down else {
            return Ok(vec![Output::floats(b, "hidden", &hidden)?]);
        };
        let dims = [self.m, down.out_features()];
        let residual = floats_as(b, self.io, &dims, &random.normals(dims[0] * dims[1]))?;
        let mut out = poison_as(b, self.io, &dims)?;
        b.linear(LinearArgs {
            x: &hidden,
            weight: &down,
            activation: Activation::None,
            out_scale: 1.0,
            residual: if self.residual { Residual::Add(&residual) } else { Residual::None },
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        match self.down {
            Some(n) => vec![by_rows(self.m, n, bounds::gated_mlp(self.io))],
            None => vec![by_rows(self.m, self.intermediate, bounds::linear(self.io))],
        }
    }

    fn needs_variants(&self) -> bool {
        self.kernel.is_some()
    }
}

/// The tile of the configuration.
fn matrix(settings: &Settings<'_>) -> Option<LinearKernel> {
    let shape = settings.tile("tile")?;
    Some(LinearKernel::Matrix(MatrixTile {
        m: shape.m,
        n: shape.n,
        k: shape.k?,
        units: settings.count("threads").unwrap_or(128),
        stages: settings.count("stages").unwrap_or(1),
        accumulate: DType::F32,
    }))
}

/// Rows of a launch: those of the configuration, around the edges of its tile otherwise.
fn rows(settings: &Settings<'_>) -> Vec<usize> {
    match settings.ranges("m").as_slice() {
        &[(first, last)] => [1, 2, 8].into_iter().filter(|m| (first..=last).contains(m)).collect(),
        _ => vec![1, 7, 16, 17],
    }
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    let format = settings.word("format").expect("a format");
    // Every sum of these is f32, norms are RMS norms, weights are separate.
    settings.implied(&["acc", "norm", "weights"]);
    // Norms on the way in leave the tile to the kernel.
    let residual = settings.word("epilogue") == Some("residual");
    let kernel = if operation == "gated_up" || residual { matrix(settings) } else { None };
    let shapes = [(512, 65), (200, 129), (1000, 64), (8208, 17)];
    for io in settings.types("io") {
        for m in rows(settings) {
            for ((k, n), group_size) in shapes.into_iter().zip([128, 32, 64, 16]) {
                let storage = storage_named(format, group_size);
                match operation {
                    "linear_norm" | "linear_norm_qkv" => {
                        let outs = if settings.has("outputs") { vec![2 * n, n, n] } else { vec![n] };
                        sink.check(&NormLinearCase { kernel, m, k, outs, storage, io, residual });
                    }
                    _ => {
                        let residual = settings.flag("residual");
                        // An intermediate size of a real layer once.
                        let (k, intermediate) = if k > 4096 { (64, k) } else { (k, n) };
                        let down = (operation == "gated_mlp").then_some(66);
                        for activation in settings.words("act") {
                            let activation = activation_named(activation);
                            sink.check(&GatedCase {
                                kernel,
                                m,
                                k,
                                intermediate,
                                down,
                                storage,
                                io,
                                activation,
                                residual,
                            });
                        }
                    }
                }
            }
        }
    }
    Ok(())
}
