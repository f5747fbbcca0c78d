//! marlin-ops
