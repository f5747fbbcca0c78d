//! Argument checks shared by the families.

use marlin_formats::DType;

use crate::{Device, OpError, Result, Tensor};

/// `tensor` has exactly these dimensions.
pub(crate) fn dims<D: Device>(
    operation: &'static str,
    operand: &'static str,
    tensor: &Tensor<D>,
    expected: &[usize],
) -> Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(OpError::shape(operation, operand, tensor.dims(), format!("{expected:?}")))
}

/// `tensor` has this many rows (all dimensions but the last) and columns.
pub(crate) fn rows_columns<D: Device>(
    operation: &'static str,
    operand: &'static str,
    tensor: &Tensor<D>,
    rows: usize,
    columns: usize,
) -> Result<()> {
    if tensor.rows() == rows && tensor.columns() == columns {
        return Ok(());
    }
    Err(OpError::shape(operation, operand, tensor.dims(), format!("[{rows}, {columns}]")))
}

/// `tensor` holds F32, F16 or BF16.
pub(crate) fn float<D: Device>(operation: &'static str, operand: &'static str, tensor: &Tensor<D>) -> Result<()> {
    match tensor.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        found => Err(OpError::DType { operation, operand, found, expected: "F32, F16 or BF16" }),
    }
}

/// `tensor` holds exactly this dtype.
pub(crate) fn dtype<D: Device>(
    operation: &'static str,
    operand: &'static str,
    tensor: &Tensor<D>,
    expected: DType,
) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(OpError::DType { operation, operand, found: tensor.dtype(), expected: expected.name() })
}

/// A finite value greater than zero.
pub(crate) fn positive(operation: &'static str, operand: &'static str, value: f32) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(OpError::value(operation, operand, format!("is {value}, must be finite and above 0")))
}

/// A finite value.
pub(crate) fn finite(operation: &'static str, operand: &'static str, value: f32) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(OpError::value(operation, operand, format!("is {value}, must be finite")))
}
