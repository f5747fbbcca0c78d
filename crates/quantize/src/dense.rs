//! Row-major slices as matrices for `ndarray`'s products, which work on any strides.

use ndarray::{ArrayView2, ArrayViewMut2, Dim};

/// `values` as `[rows, columns]`.
///
/// # Panics
/// When the length is no multiple of `columns`.
pub(crate) fn view<T>(values: &[T], columns: usize) -> ArrayView2<'_, T> {
    assert_eq!(values.len() % columns, 0, "whole rows");
    let shape = Dim([values.len() / columns, columns]);
    ArrayView2::from_shape(shape, values).expect("the length was checked")
}

/// `values` as `[rows, columns]`, to be written.
///
/// # Panics
/// When the length is no multiple of `columns`.
pub(crate) fn view_mut<T>(values: &mut [T], columns: usize) -> ArrayViewMut2<'_, T> {
    assert_eq!(values.len() % columns, 0, "whole rows");
    let shape = Dim([values.len() / columns, columns]);
    ArrayViewMut2::from_shape(shape, values).expect("the length was checked")
}
