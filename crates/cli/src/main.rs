//! The `marlin` command line.
fn main() {}
