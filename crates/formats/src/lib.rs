//! marlin-formats
