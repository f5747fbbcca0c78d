//! marlin-cpu
