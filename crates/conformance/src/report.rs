use serde::Serialize;

/// The outcome of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseResult {
    /// Operation family.
    pub family: &'static str,
    /// Operation.
    pub operation: &'static str,
    /// Shapes, formats and options.
    pub configuration: String,
    /// The error that came closest to (or exceeded) its bound, in the metric of that bound; `f64::MAX` when an output
    /// is not finite where it should be, or could not be computed.
    pub max_error: f64,
    /// The bound on `max_error`.
    pub tolerance: f64,
    /// `max_error <= tolerance` for every output.
    pub passed: bool,
    /// Why there is nothing to compare: an error, a panic, a missing refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The outcome of [`crate::verify`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Name of the device.
    pub device: String,
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed.
    pub failed: usize,
    /// All cases, in a fixed order.
    pub results: Vec<CaseResult>,
}

impl Report {
    /// Counts `results`.
    pub fn new(device: &str, results: Vec<CaseResult>) -> Self {
        let passed = results.iter().filter(|result| result.passed).count();
        Self { device: device.to_owned(), passed, failed: results.len() - passed, results }
    }

    /// The results that did not pass.
    pub fn failures(&self) -> impl Iterator<Item = &CaseResult> {
        self.results.iter().filter(|result| !result.passed)
    }
}
