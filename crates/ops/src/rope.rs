//! Rotary embedding (operations.md: rope_table, rope_apply, rope_mla_latent).

use std::f64::consts::PI;

use marlin_formats::DType;

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, HostTensor, OpError, Result, Tensor, check};

const FAMILY: &str = "rope";

/// How inverse frequencies are derived from `theta`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `theta^(-2i/d)`.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Context extension factor.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// L0, the context of pre-training.
        original_max_position: f64,
        /// Rotations above which a channel is extrapolated (32).
        beta_fast: f64,
        /// Rotations below which a channel is interpolated (1).
        beta_slow: f64,
        /// Given attention factor; derived from the two mscales when absent.
        attention_factor: Option<f64>,
        /// `mscale`.
        mscale: Option<f64>,
        /// `mscale_all_dim`.
        mscale_all_dim: Option<f64>,
        /// Round the ramp's ends to whole channels.
        truncate: bool,
    },
    /// Llama 3.1 band scaling.
    Llama3 {
        /// Context extension factor.
        factor: f64,
        /// Low frequency factor (1).
        low_freq_factor: f64,
        /// High frequency factor (4).
        high_freq_factor: f64,
        /// L0.
        original_max_position: f64,
    },
}

/// Everything a cos/sin table depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base.
    pub theta: f64,
    /// Rotated channels d, even.
    pub rotary_dim: usize,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// `0.1 mscale ln(factor) + 1`, or 1 for `factor <= 1`.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// Inverse frequencies, `[d/2]`.
    pub fn inverse_frequencies(&self) -> Result<Vec<f64>> {
        const OP: &str = "rope_table";
        let d = self.rotary_dim;
        if d == 0 || !d.is_multiple_of(2) {
            return Err(OpError::value(OP, "rotary_dim", format!("is {d}, must be even and above 0")));
        }
        let positive = |name: &'static str, v: f64| {
            if v.is_finite() && v > 0.0 {
                return Ok(());
            }
            Err(OpError::value(OP, name, format!("is {v}, must be finite and above 0")))
        };
        positive("theta", self.theta)?;
        let base = |i: usize| self.theta.powf(-2.0 * i as f64 / d as f64);
        let half = d / 2;
        Ok(match self.scaling {
            RopeScaling::Default => (0..half).map(base).collect(),
            RopeScaling::Linear { factor } => {
                positive("factor", factor)?;
                (0..half).map(|i| base(i) / factor).collect()
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } => {
                positive("factor", factor)?;
                positive("original_max_position_embeddings", original_max_position)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                let correction = |rotations: f64| {
                    d as f64 * (original_max_position / (2.0 * PI * rotations)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(d as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                (0..half)
                    .map(|i| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        base(i) * (1.0 - ramp) + base(i) / factor * ramp
                    })
                    .collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("original_max_position_embeddings", original_max_position)?;
                if high_freq_factor.is_nan() || high_freq_factor <= low_freq_factor {
                    let reason = format!("is {high_freq_factor}, must exceed low_freq_factor");
                    return Err(OpError::value(OP, "high_freq_factor", reason));
                }
                (0..half)
                    .map(|i| {
                        let wavelength = 2.0 * PI / base(i);
                        let rotations = original_max_position / wavelength;
                        if rotations < low_freq_factor {
                            base(i) / factor
                        } else if rotations > high_freq_factor {
                            base(i)
                        } else {
                            let smooth = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * base(i) / factor + smooth * base(i)
                        }
                    })
                    .collect()
            }
        })
    }

    /// Factor on cos and sin (YaRN's attention factor), 1 for other kinds.
    pub fn attention_factor(&self) -> f64 {
        let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } = self.scaling else {
            return 1.0;
        };
        let nonzero = |v: Option<f64>| v.filter(|&v| v != 0.0);
        match (attention_factor, nonzero(mscale), nonzero(mscale_all_dim)) {
            (Some(given), _, _) => given,
            (None, Some(m), Some(all)) => yarn_mscale(factor, m) / yarn_mscale(factor, all),
            _ => yarn_mscale(factor, 1.0),
        }
    }

    /// `(cos, sin)` for positions `0..positions`, each `[positions, d/2]`, range reduction in f64.
    pub fn tables(&self, positions: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let frequencies = self.inverse_frequencies()?;
        let factor = self.attention_factor();
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        Ok(angles.map(|a| ((a.cos() * factor) as f32, (a.sin() * factor) as f32)).unzip())
    }
}

/// cos and sin on a device, each `[positions, d/2]` f32.
pub struct RopeTable<D: Device> {
    /// Cosines times the attention factor.
    pub cos: Tensor<D>,
    /// Sines times the attention factor.
    pub sin: Tensor<D>,
}

impl<D: Device> RopeTable<D> {
    /// Builds and uploads the table for positions `0..positions`.
    pub fn new(device: &D, config: &RopeConfig, positions: usize) -> Result<Self> {
        let (cos, sin) = config.tables(positions)?;
        let dims = [positions, config.rotary_dim / 2];
        Ok(Self {
            cos: device.upload(&HostTensor::from_f32(&dims, &cos)?)?,
            sin: device.upload(&HostTensor::from_f32(&dims, &sin)?)?,
        })
    }

    /// Positions covered.
    pub fn positions(&self) -> usize {
        self.cos.rows()
    }

    /// Rotated channels d.
    pub fn rotary_dim(&self) -> usize {
        2 * self.cos.columns()
    }

    /// `tokens` rows of the table, and the rotation of `vectors` vectors.
    fn cost(&self, tokens: usize, vectors: usize) -> Cost {
        let pairs = self.cos.columns();
        let mut cost = Cost::default().add_flops(Arithmetic::F32, 6 * pairs * vectors);
        cost.activation_bytes += (2 * tokens * pairs * self.cos.dtype().size_in_bytes()) as u64;
        cost
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        check::dtype(operation, "cos", &self.cos, DType::F32)?;
        check::dtype(operation, "sin", &self.sin, DType::F32)?;
        check::dims(operation, "sin", &self.sin, self.cos.dims())
    }
}

/// Which channels form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(x[2i], x[2i+1])` (DeepSeek, GLM-4.7-Flash).
    Interleaved,
    /// `(x[i], x[i+d/2])` (Llama, Qwen).
    Half,
    /// Reads interleaved pairs, writes all first then all second elements.
    InterleavedToHalf,
}

/// Rotates channels `offset .. offset + d` of every head in place; the others pass through.
pub struct RopeArgs<'a, D: Device> {
    /// `[T, heads, head_dim]`, overwritten.
    pub x: &'a mut Tensor<D>,
    /// `[T]` U32; a position outside the table is the backend's error ([`position_error`]).
    pub positions: &'a Tensor<D>,
    /// Angles.
    pub table: &'a RopeTable<D>,
    /// Pairing of the checkpoint.
    pub pairing: Pairing,
    /// First rotated channel of a head (`qk_nope_head_dim` for MLA queries, else 0).
    pub offset: usize,
    /// Rotate by the negative angle.
    pub inverse: bool,
}

/// Normalises and rotates MLA latent rows and appends them to the cache: row `[c (r) | k_pe (R)]` becomes
/// `[rms_norm(c) | rope(k_pe)]` at `cache[sequence, start + t]`.
pub struct MlaLatentWriteArgs<'a, D: Device> {
    /// `[T, r + R]`.
    pub x: &'a Tensor<D>,
    /// `[r]` norm weight, or none to store `c` as it is.
    pub gamma: Option<&'a Tensor<D>>,
    /// Of the latent norm, above 0.
    pub eps: f32,
    /// `[T]` U32.
    pub positions: &'a Tensor<D>,
    /// Angles; `rotary_dim` is R.
    pub table: &'a RopeTable<D>,
    /// Pairing of the checkpoint; the cache keeps its order.
    pub pairing: Pairing,
    /// `[sequences, capacity, r + R]`, F32, F16 or BF16 (one rounding).
    pub cache: &'a mut Tensor<D>,
    /// Which sequence.
    pub sequence: usize,
    /// Cache row of token 0.
    pub start: usize,
}

impl<D: Device> RopeArgs<'_, D> {
    fn cost(&self) -> Cost {
        let (tokens, vectors) = (self.positions.elements(), self.x.rows());
        let mut cost = self.table.cost(tokens, vectors).add_activations(&[self.positions]);
        // Channels that are not rotated stay where they are.
        cost.activation_bytes += (2 * vectors * self.table.rotary_dim() * self.x.dtype().size_in_bytes()) as u64;
        cost
    }
}

impl<D: Device> MlaLatentWriteArgs<'_, D> {
    fn cost(&self) -> Cost {
        let tokens = self.x.rows();
        let mut cost = self.table.cost(tokens, tokens).add_activations(&[self.x, self.positions]);
        if let Some(gamma) = self.gamma {
            cost = cost.add_weights(gamma.size_in_bytes()).add_flops(Arithmetic::F32, 4 * tokens * gamma.elements());
        }
        cost.activation_bytes += (self.x.elements() * self.cache.dtype().size_in_bytes()) as u64;
        cost
    }
}

/// The rotary family.
pub trait RopeOps: Device {
    /// Body of [`RopeOps::rope`]; arguments are checked, positions are not.
    fn run_rope(&self, args: RopeArgs<'_, Self>) -> Result<()>;

    /// Body of [`RopeOps::mla_latent_write`]; arguments are checked, positions are not.
    fn run_mla_latent_write(&self, args: MlaLatentWriteArgs<'_, Self>) -> Result<()>;

    /// Rotary embedding in place.
    fn rope(&self, args: RopeArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rope";
        args.table.check(OP)?;
        let &[tokens, heads, head_dim] = args.x.dims() else {
            return Err(OpError::shape(OP, "x", args.x.dims(), "[tokens, heads, head_dim]"));
        };
        check::float(OP, "x", args.x)?;
        check::dtype(OP, "positions", args.positions, DType::U32)?;
        check::dims(OP, "positions", args.positions, &[tokens])?;
        if args.offset + args.table.rotary_dim() > head_dim {
            let expected = format!("head_dim >= {} + offset {}", args.table.rotary_dim(), args.offset);
            return Err(OpError::shape(OP, "x", args.x.dims(), expected));
        }
        if tokens == 0 || heads == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, RopeArgs::cost, Self::run_rope)
    }

    /// Appends latent rows to an MLA cache.
    fn mla_latent_write(&self, args: MlaLatentWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "mla_latent_write";
        args.table.check(OP)?;
        let (tokens, width) = (args.x.rows(), args.x.columns());
        check::float(OP, "x", args.x)?;
        check::float(OP, "cache", args.cache)?;
        check::dtype(OP, "positions", args.positions, DType::U32)?;
        check::dims(OP, "positions", args.positions, &[tokens])?;
        check::positive(OP, "eps", args.eps)?;
        let rotary_dim = args.table.rotary_dim();
        if width < rotary_dim {
            let expected = format!("at least {rotary_dim} columns");
            return Err(OpError::shape(OP, "x", args.x.dims(), expected));
        }
        if let Some(gamma) = args.gamma {
            check::dims(OP, "gamma", gamma, &[width - rotary_dim])?;
            check::float(OP, "gamma", gamma)?;
        }
        let fits = match *args.cache.dims() {
            [sequences, capacity, columns] => {
                columns == width
                    && args.sequence < sequences
                    && args.start.checked_add(tokens).is_some_and(|end| end <= capacity)
            }
            _ => false,
        };
        if !fits {
            let expected = format!("[sequences > {}, capacity >= {} + {tokens}, {width}]", args.sequence, args.start);
            return Err(OpError::shape(OP, "cache", args.cache.dims(), expected));
        }
        if tokens == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, MlaLatentWriteArgs::cost, Self::run_mla_latent_write)
    }
}

/// The error of a position outside the table.
pub fn position_error(operation: &'static str, index: usize, position: u32, positions: usize) -> OpError {
    let reason = format!("[{index}] is {position}, the rope table has {positions} positions");
    OpError::value(operation, "positions", reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(factor: f64, theta: f64, d: usize, l0: f64) -> RopeConfig {
        let scaling = RopeScaling::Yarn {
            factor,
            original_max_position: l0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        };
        RopeConfig { theta, rotary_dim: d, scaling }
    }

    #[test]
    fn yarn_ramp_runs_from_10_to_23() {
        // operations.md rope_table: theta 1e4, d 64, L0 4096 gives lo 10, hi 23.
        let f = yarn(40.0, 1e4, 64, 4096.0).inverse_frequencies().unwrap();
        let base = |i: usize| 1e4f64.powf(-2.0 * i as f64 / 64.0);
        assert_eq!(f[10], base(10));
        assert!(f[11] < base(11));
        assert!(f[22] > base(22) / 40.0 * 1.0001);
        assert!((f[23] - base(23) / 40.0).abs() < 1e-18);
        let middle = base(16) * (7.0 / 13.0) + base(16) / 40.0 * (6.0 / 13.0);
        assert!((f[16] / middle - 1.0).abs() < 1e-12);
    }

    #[test]
    fn yarn_attention_factors() {
        let mut config = yarn(40.0, 1e4, 64, 4096.0);
        assert!((config.attention_factor() - (0.1 * 40f64.ln() + 1.0)).abs() < 1e-15);
        let RopeScaling::Yarn { mscale, mscale_all_dim, .. } = &mut config.scaling else { unreachable!() };
        (*mscale, *mscale_all_dim) = (Some(0.707), Some(0.707));
        assert_eq!(config.attention_factor(), 1.0);
        // operations.md section 12: the softmax scale factor of DeepSeek-V2 and V3.
        assert!((yarn_mscale(40.0, 0.707).powi(2) - 1.58963).abs() < 1e-5);
        assert!((yarn_mscale(40.0, 1.0).powi(2) - 1.87385).abs() < 1e-5);
    }

    #[test]
    fn llama3_bands() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let config = RopeConfig { theta: 5e5, rotary_dim: 128, scaling };
        let f = config.inverse_frequencies().unwrap();
        let base = |i: usize| 5e5f64.powf(-2.0 * i as f64 / 128.0);
        assert_eq!(f[0], 1.0);
        assert_eq!(f[63], base(63) / 8.0);
        // Between the bands: wavelength of channel 32 is 2 pi sqrt(5e5) = 4443, 1.844 rotations in 8192.
        let smooth = (8192.0 * base(32) / (2.0 * PI) - 1.0) / 3.0;
        let expected = (1.0 - smooth) * base(32) / 8.0 + smooth * base(32);
        assert!((f[32] / expected - 1.0).abs() < 1e-12);
        assert!(f[32] < base(32) && f[32] > base(32) / 8.0);
    }

    #[test]
    fn tables_reduce_in_f64() {
        let config = RopeConfig { theta: 1e6, rotary_dim: 64, scaling: RopeScaling::Default };
        let (cos, sin) = config.tables(4096).unwrap();
        assert_eq!((cos[0], sin[0]), (1.0, 0.0));
        assert_eq!(cos[4095 * 32], 4095f64.cos() as f32);
        assert_eq!(sin[4095 * 32 + 1], (4095.0 * 1e6f64.powf(-2.0 / 64.0)).sin() as f32);
    }

    #[test]
    fn bad_configurations_are_refused() {
        let good = RopeConfig { theta: 1e4, rotary_dim: 64, scaling: RopeScaling::Default };
        assert!(RopeConfig { rotary_dim: 63, ..good }.inverse_frequencies().is_err());
        assert!(RopeConfig { theta: 0.0, ..good }.inverse_frequencies().is_err());
        assert!(RopeConfig { theta: f64::NAN, ..good }.inverse_frequencies().is_err());
        let scaling = RopeScaling::Linear { factor: 0.0 };
        assert!(RopeConfig { scaling, ..good }.inverse_frequencies().is_err());
        assert!(yarn(-1.0, 1e4, 64, 4096.0).inverse_frequencies().is_err());
    }
}
