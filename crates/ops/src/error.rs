use marlin_formats::{DType, FormatError};

/// The result of every operation.
pub type Result<T> = std::result::Result<T, OpError>;

/// Why an operation was refused or failed. Argument errors are raised before any backend runs.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// An operand has the wrong shape.
    #[error("{operation}: `{operand}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Operation that refused the operand.
        operation: &'static str,
        /// Name of the operand.
        operand: &'static str,
        /// Shape that was passed.
        found: Vec<usize>,
        /// Shape in terms of the operation's dimensions.
        expected: String,
    },
    /// An operand has a dtype the operation is not defined for.
    #[error("{operation}: `{operand}` is {found:?}, expected {expected}")]
    DType {
        /// Operation that refused the operand.
        operation: &'static str,
        /// Name of the operand.
        operand: &'static str,
        /// Dtype that was passed.
        found: DType,
        /// Accepted dtypes.
        expected: &'static str,
    },
    /// A parameter or a value inside an operand is outside its range.
    #[error("{operation}: `{operand}` {reason}")]
    Value {
        /// Operation that refused the value.
        operation: &'static str,
        /// Name of the parameter or operand.
        operand: &'static str,
        /// What is wrong, with the first offending index where there is one.
        reason: String,
    },
    /// The backend has no kernel for this combination.
    #[error("{operation} on {backend}: {what} is not supported")]
    Unsupported {
        /// Operation.
        operation: &'static str,
        /// Name of the backend.
        backend: &'static str,
        /// What is missing.
        what: String,
    },
    /// A weight's stored form is invalid.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The device failed (out of memory, lost, compile failure).
    #[error("device error in {operation}: {reason}")]
    Device {
        /// Operation at which the failure surfaced.
        operation: &'static str,
        /// The device's own message.
        reason: String,
    },
}

impl OpError {
    /// A shape error.
    pub fn shape(operation: &'static str, operand: &'static str, found: &[usize], expected: impl Into<String>) -> Self {
        Self::Shape { operation, operand, found: found.to_vec(), expected: expected.into() }
    }

    /// A value error.
    pub fn value(operation: &'static str, operand: &'static str, reason: impl Into<String>) -> Self {
        Self::Value { operation, operand, reason: reason.into() }
    }
}
