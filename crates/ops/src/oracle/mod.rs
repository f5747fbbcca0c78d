//! The f64 oracle.
