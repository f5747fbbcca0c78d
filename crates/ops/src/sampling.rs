//! Sampling (operations.md section 7): argmax, logits processing, filtered draws, draws by cdf and by Gumbel noise.

use marlin_formats::DType;

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, OpError, Result, Tensor, check};

const FAMILY: &str = "sampling";

/// Penalties, bans and temperature, applied in the order of the fields to an f32 row.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsProcess {
    /// rho over the set of `prompt + generated` ids: `l > 0: l / rho, else l rho`; 1 for none.
    pub repetition_penalty: f32,
    /// `l -= frequency_penalty * count` over generated ids; 0 for none.
    pub frequency_penalty: f32,
    /// `l -= presence_penalty` for generated ids; 0 for none.
    pub presence_penalty: f32,
    /// `l /= temperature`, above 0; 1 for none. Greedy is [`SamplingOps::argmax`], not temperature 0.
    pub temperature: f32,
}

impl Default for LogitsProcess {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, frequency_penalty: 0.0, presence_penalty: 0.0, temperature: 1.0 }
    }
}

/// Filters of a draw, in this order, each renormalising over the survivors.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleFilter {
    /// Keep the k largest (value descending, index ascending).
    pub top_k: Option<usize>,
    /// Keep the shortest prefix with mass >= p, at least one; p in [0, 1].
    pub top_p: Option<f32>,
    /// Keep `p_v >= min_p max p`, in [0, 1].
    pub min_p: Option<f32>,
    /// Locally typical mass (Meister et al.), in (0, 1).
    pub typical: Option<f32>,
}

impl SampleFilter {
    /// No filter.
    pub const NONE: Self = Self { top_k: None, top_p: None, min_p: None, typical: None };
}

/// Processes one row of logits in place.
pub struct LogitsProcessArgs<'a, D: Device> {
    /// `[V]` F32, overwritten.
    pub logits: &'a mut Tensor<D>,
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// Ids generated so far.
    pub generated: &'a [u32],
    /// What to apply.
    pub process: &'a LogitsProcess,
}

/// Draws one id per row.
pub struct SampleArgs<'a, D: Device> {
    /// `[R, V]` F32.
    pub logits: &'a Tensor<D>,
    /// Filters, the same for all rows.
    pub filter: &'a SampleFilter,
    /// Key of the generator.
    pub seed: u64,
    /// Row id of each row (request), `[R]`.
    pub rows: &'a [u32],
    /// Position in the request of each row, `[R]`.
    pub steps: &'a [u32],
    /// `[R]` U32.
    pub ids: &'a mut Tensor<D>,
}

/// Draws one id per row without filters.
pub struct DrawArgs<'a, D: Device> {
    /// `[R, V]`: probabilities, or logits.
    pub values: &'a Tensor<D>,
    /// Key of the generator.
    pub seed: u64,
    /// Row id of each row (request), `[R]`.
    pub rows: &'a [u32],
    /// Position in the request of each row, `[R]`.
    pub steps: &'a [u32],
    /// `[R]` U32.
    pub ids: &'a mut Tensor<D>,
}

impl<D: Device> DrawArgs<'_, D> {
    fn check(&self, operation: &'static str, operand: &'static str) -> Result<()> {
        check::float(operation, operand, self.values)?;
        check_vocabulary(operation, operand, self.values)?;
        check_draws(operation, self.values.rows(), self.rows, self.steps, self.ids)
    }

    fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 2 * self.values.elements());
        cost.add_activations(&[self.values, self.ids])
    }
}

impl<D: Device> LogitsProcessArgs<'_, D> {
    fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, self.logits.elements());
        cost.add_activations(&[self.logits, self.logits])
    }
}

impl<D: Device> SampleArgs<'_, D> {
    fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 3 * self.logits.elements());
        cost.add_activations(&[self.logits, self.ids])
    }
}

/// The sampling family. A NaN or +inf logit, or a row of only -inf, is an error ([`bad_logit_error`],
/// [`empty_logits_error`]).
pub trait SamplingOps: Device {
    /// Body of [`SamplingOps::argmax`]; shapes are checked.
    fn run_argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()>;

    /// Body of [`SamplingOps::process_logits`]; arguments are checked.
    fn run_process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()>;

    /// Body of [`SamplingOps::sample`]; arguments are checked.
    fn run_sample(&self, args: SampleArgs<'_, Self>) -> Result<()>;

    /// Body of [`SamplingOps::sample_categorical`]; arguments are checked. A negative, NaN or infinite probability
    /// ([`bad_probability_error`]) and a row of zeros ([`no_probability_error`]) are the backend's errors.
    fn run_sample_categorical(&self, args: DrawArgs<'_, Self>) -> Result<()>;

    /// Body of [`SamplingOps::sample_gumbel`]; arguments are checked.
    fn run_sample_gumbel(&self, args: DrawArgs<'_, Self>) -> Result<()>;

    /// Smallest index among the maxima of each row of `[R, V]`; -0 equals +0.
    fn argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "argmax";
        check::float(OP, "logits", logits)?;
        check_vocabulary(OP, "logits", logits)?;
        check::dtype(OP, "ids", ids, DType::U32)?;
        check::dims(OP, "ids", ids, &[logits.rows()])?;
        let cost = |(logits, ids): &(&Tensor<Self>, &mut Tensor<Self>)| Cost::default().add_activations(&[logits, ids]);
        let body = |device: &Self, (logits, ids): (&Tensor<Self>, &mut Tensor<Self>)| device.run_argmax(logits, ids);
        profile::run(self, Operation::new(FAMILY, OP), (logits, ids), cost, body)
    }

    /// Penalties and temperature.
    fn process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        const OP: &str = "logits_process";
        check::dtype(OP, "logits", args.logits, DType::F32)?;
        check_vocabulary(OP, "logits", args.logits)?;
        let p = args.process;
        check::positive(OP, "repetition_penalty", p.repetition_penalty)?;
        check::finite(OP, "frequency_penalty", p.frequency_penalty)?;
        check::finite(OP, "presence_penalty", p.presence_penalty)?;
        check::positive(OP, "temperature", p.temperature)?;
        let vocab = args.logits.elements();
        for (name, ids) in [("prompt", args.prompt), ("generated", args.generated)] {
            if let Some(i) = ids.iter().position(|&id| id as usize >= vocab) {
                let reason = format!("[{i}] is {}, vocabulary has {vocab}", ids[i]);
                return Err(OpError::value(OP, name, reason));
            }
        }
        profile::run(self, Operation::new(FAMILY, OP), args, LogitsProcessArgs::cost, Self::run_process_logits)
    }

    /// A filtered draw: survivors in descending probability (ties: ascending index), the first whose cumulative weight
    /// exceeds `u Z`, Z the survivors' mass, u from (seed, row, step).
    fn sample(&self, args: SampleArgs<'_, Self>) -> Result<()> {
        const OP: &str = "sample";
        check::dtype(OP, "logits", args.logits, DType::F32)?;
        check_vocabulary(OP, "logits", args.logits)?;
        check_filter(args.filter)?;
        check_draws(OP, args.logits.rows(), args.rows, args.steps, args.ids)?;
        profile::run(self, Operation::new(FAMILY, OP), args, SampleArgs::cost, Self::run_sample)
    }

    /// A draw from given probabilities, which need not add up to 1: the first id v with `p_0 + .. + p_v > u Z`, Z the
    /// sum of all, u from (seed, row, step). An id of probability 0 is never drawn.
    fn sample_categorical(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        const OP: &str = "sample_categorical";
        args.check(OP, "probabilities")?;
        profile::run(self, Operation::new(FAMILY, OP), args, DrawArgs::cost, Self::run_sample_categorical)
    }

    /// A draw from the softmax of logits by noise: `argmax_v (l_v + g_v)`, `g = -ln(-ln(1 - U))`,
    /// `U = min((X + 1/2) 2^-32, 1 - 2^-24)`, X word v of the stream of (seed, row, step). Ties go to the lower id.
    fn sample_gumbel(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        const OP: &str = "sample_gumbel";
        args.check(OP, "logits")?;
        profile::run(self, Operation::new(FAMILY, OP), args, DrawArgs::cost, Self::run_sample_gumbel)
    }
}

/// Ranges of the filters (also for callers that want the error before loading a model).
pub fn check_filter(filter: &SampleFilter) -> Result<()> {
    const OP: &str = "sample";
    if filter.top_k == Some(0) {
        return Err(OpError::value(OP, "top_k", "is 0, must be at least 1"));
    }
    for (name, value) in [("top_p", filter.top_p), ("min_p", filter.min_p)] {
        if let Some(v) = value.filter(|v| !(0.0..=1.0).contains(v)) {
            return Err(OpError::value(OP, name, format!("is {v}, must be in [0, 1]")));
        }
    }
    if let Some(v) = filter.typical.filter(|v| !(*v > 0.0 && *v < 1.0)) {
        return Err(OpError::value(OP, "typical", format!("is {v}, must be in (0, 1)")));
    }
    Ok(())
}

fn check_vocabulary<D: Device>(operation: &'static str, operand: &'static str, values: &Tensor<D>) -> Result<()> {
    if values.columns() == 0 {
        return Err(OpError::shape(operation, operand, values.dims(), "at least one column"));
    }
    Ok(())
}

/// A row id, a step and an id for each of `count` rows.
fn check_draws<D: Device>(
    operation: &'static str,
    count: usize,
    rows: &[u32],
    steps: &[u32],
    ids: &Tensor<D>,
) -> Result<()> {
    for (name, len) in [("rows", rows.len()), ("steps", steps.len())] {
        if len != count {
            return Err(OpError::shape(operation, name, &[len], format!("[{count}]")));
        }
    }
    check::dtype(operation, "ids", ids, DType::U32)?;
    check::dims(operation, "ids", ids, &[count])
}

/// The error of a NaN or +inf logit.
pub fn bad_logit_error(operation: &'static str, row: usize, id: usize, value: f64) -> OpError {
    OpError::value(operation, "logits", format!("[{row}, {id}] is {value}"))
}

/// The error of a row of only -inf.
pub fn empty_logits_error(operation: &'static str, row: usize) -> OpError {
    OpError::value(operation, "logits", format!("row {row} holds only -inf"))
}

/// The error of a negative, NaN or infinite probability.
pub fn bad_probability_error(row: usize, id: usize, value: f64) -> OpError {
    OpError::value("sample_categorical", "probabilities", format!("[{row}, {id}] is {value}"))
}

/// The error of a row of zeros.
pub fn no_probability_error(row: usize) -> OpError {
    OpError::value("sample_categorical", "probabilities", format!("row {row} holds only zeros"))
}
